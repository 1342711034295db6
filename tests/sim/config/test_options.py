"""Options of a user's own folder: a YAML and a Python file outside the package work like those of conf/."""

from __future__ import annotations

from pathlib import Path

import pytest

import sim.compare
import sim.replay.__main__
from sim.config import compose_config, with_differences
from sim.errors import ConfigError
from tests.commands import exit_status

POLICY = """
from sim.cost.plan import dense_plan

class Mine:
    def __init__(self, context, *, limit=3):
        self.first_plan = dense_plan(context.model)

    def __call__(self, state):
        return self.first_plan
"""
QUICK = ("trace=poisson", "trace.duration_s=3")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with policy/mine_of_test.yaml and the Python file that it names."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my options"
    (folder / "policy").mkdir(parents=True)
    (folder / "mine_of_test.py").write_text(POLICY)
    text = "_target_: mine_of_test.Mine\n_partial_: true\nlimit: 4\n"
    (folder / "policy" / "mine_of_test.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("how", [["--config-dir", "{}"], ["--config-dir={}"], ["hydra.searchpath=['{}']"]])
def test_an_own_policy_works_from_its_own_folder(
    folder: Path, how: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    where = [text.format(folder) for text in how]
    assert exit_status(sim.replay.__main__.main, "policy=mine_of_test", *where, *QUICK, "policy.limit=5") == 0
    assert exit_status(sim.replay.__main__.main, "policy=mine_of_test", *where, "policy.limit=many") == 2
    assert "policy.limit is 'many'; it must be a number, such as 4" in capsys.readouterr().err
    assert exit_status(sim.replay.__main__.main, *where, "--help") == 0
    assert "mine_of_test" in capsys.readouterr().out


@pytest.mark.parametrize("sweep", [(), ("--multirun",)], ids=["run", "sweep"])
def test_an_own_policy_that_ends_the_process_is_an_error_that_names_its_line(
    sweep: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = POLICY.replace("Mine", "Ends").replace("return self.first_plan", "raise SystemExit")
    (folder / "ends_of_test.py").write_text(code)
    (folder / "policy" / "ends_of_test.yaml").write_text("_target_: ends_of_test.Ends\n_partial_: true\n")
    typed = ("policy=ends_of_test", "--config-dir", str(folder), *sweep, "hydra.run.dir=run", "hydra.sweep.dir=jobs")
    assert exit_status(sim.replay.__main__.main, *typed, *QUICK) == (1 if sweep else 2)
    said = capsys.readouterr().err
    assert "ends_of_test.py, line 9, ended the run before it was complete" in said
    assert not list(Path.cwd().glob("*/**/summary.json"))


def test_a_comparison_takes_an_own_policy_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = "+policies.mine={policy: mine_of_test}"
    arguments = ("--config-dir", str(folder), own, "only=[mine]", "trace.duration_s=10")
    assert exit_status(sim.compare.compare_command, *arguments) == 0
    assert "| mine |" in capsys.readouterr().out
    assert exit_status(sim.compare.compare_command, own, "only=[mine]", "trace.duration_s=10") == 2
    assert "policies.mine: there is no policy=mine_of_test" in capsys.readouterr().err


def test_a_folder_or_a_file_of_ones_own_that_cannot_be_used_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = sim.replay.__main__.main
    (folder / "policy" / "broken.yaml").write_text("a: [1\n")
    (folder / "policy" / "needs.yaml").write_text("_target_: needs_of_test.X\n_partial_: true\n")
    (folder / "needs_of_test.py").write_text("import a_package_of_nobody\n")
    for arguments, said in (
        (["hydra.searchpath=[/not/there]"], "no such folder /not/there"),
        (["hydra.searchpath=[pkg://not_there]"], "no such folder pkg://not_there"),
        (["--config-dir", str(folder), "policy=broken"], "expected ',' or ']'"),
        (["--config-dir", str(folder), "policy=needs"], "pip install a_package_of_nobody"),
        (["--shell-completion"], "Expecting one subcommand"),
    ):
        assert exit_status(main, *arguments, *QUICK) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert said in error
        assert error.count("\n") == 1


def test_the_configuration_is_shown_without_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main, where = sim.replay.__main__.main, ("--config-dir", str(folder))
    assert exit_status(main, "policy=mine_of_test", "--cfg", "job", *where, "--package", "policy") == 0
    assert "limit: 4" in capsys.readouterr().out
    assert exit_status(main, "--cfg", "job", "--resolve", "seed=7", "trace=poisson") == 0
    assert "seed: 7" in capsys.readouterr().out
    assert exit_status(main, "--info", "searchpath") == 0
    assert not Path("runs").exists()


def test_a_difference_that_names_something_else_replaces_what_the_option_names() -> None:
    cfg = compose_config("replay", ["trace=poisson"])
    fixed = {"_target_": "sim.traces.generate.fixed_lengths", "_partial_": True, "prompt_tokens": 8, "output_tokens": 2}
    one = with_differences(cfg, {"trace": "gamma", "trace.lengths": fixed}, "policies.short")
    assert one.trace.lengths == fixed
    with pytest.raises(ConfigError, match=r"no 'trace\.lenghts'"):
        with_differences(cfg, {"trace.lenghts": fixed}, "policies.short")
