"""``python -m sim.new``: what it writes runs at once; a name that cannot be one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import sim.new.run
import sim.replay.__main__
from tests.commands import exit_status


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_new_policy_runs_and_its_keys_can_be_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(sim.new.run.main, "policy", "begun_of_test", "folder=my policies") == 0
    assert "--config-dir 'my policies' policy=begun_of_test" in capsys.readouterr().out
    own = ("--config-dir", "my policies", "policy=begun_of_test", "trace=poisson", "trace.duration_s=3")
    assert exit_status(sim.replay.__main__.main, *own, "policy.limit=0", "hydra.run.dir=run") == 0
    assert (folder / "run" / "summary.json").exists()
    assert exit_status(sim.replay.__main__.main, *own, "policy.limit=-1") == 2
    assert "policy.limit is -1; it must be at least 0 requests" in capsys.readouterr().err


def test_an_existing_file_is_never_written_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine_of_test.py").write_text("mine\n")
    assert exit_status(sim.new.run.main, "policy", "mine_of_test") == 2
    assert "mine_of_test.py exists already" in capsys.readouterr().err
    assert (folder / "mine_of_test.py").read_text() == "mine\n"
    assert not (folder / "policy").exists()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ([], "say what to begin and its name"),
        (["policy"], "say what to begin and its name"),
        (["polcy", "mine"], "did you mean 'policy'"),
        (["policy", "dense"], "there is a policy=dense already"),
        (["policy", "json"], "Python has a module json already"),
        (["policy", "../mine"], "'../mine' cannot be the name"),
        (["policy", "Mine"], "'Mine' cannot be the name"),
        (["policy", "class"], "'class' cannot be the name"),
        (["policy", "none"], "means something else in YAML or Python"),
        (["policy", "true"], "means something else in YAML or Python"),
        (["policy", "_"], "means something else in YAML or Python"),
        (["policy", "_1"], "means something else in YAML or Python"),
        (["policy", "config_error"], "the file uses ConfigError already"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused(
    what: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(sim.new.run.main, *what) == 2
    assert said in capsys.readouterr().err
    assert not list(folder.iterdir())
