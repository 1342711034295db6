"""The check-up as a command: what a step that hangs or fails leaves, what it takes from others, and the exit status."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from hw.checkup import machine
from hw.checkup.child import run_child
from hw.checkup.findings import Findings, plain
from hw.checkup.run import begun_rows, gpu_option, main, outcome, probe, run_steps, slug
from hw.checkup.schedule import STEPS, TOTAL_S, Step, limit_s
from hw.checkup.setup import Setup
from sim.config import option_names
from sim.errors import ConfigError
from sim.paths import REPOSITORY
from tests.commands import exit_status

HERE = "tests.hw.checkup"


def step(name: str, share_s: float = 1.0) -> Step:
    """Return a step of tests/hw/checkup/NAME.py."""
    return Step(name, share_s, "a step of a test", HERE)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    setup = Setup(device="cpu", size="short", checkpoint="", overrides=(), work=str(tmp_path), out=str(tmp_path))
    setup.write(tmp_path / "setup.json")
    return tmp_path


def row(name: str, work: Path, limit_s: float = 60.0) -> dict[str, object]:
    ended = run_child(step(name), work, limit_s, lambda *_: None)
    return outcome(work, name, ended)


def test_a_step_that_fails_leaves_its_traceback_its_figures_and_its_output(work: Path) -> None:
    found = row("step_that_fails", work)
    assert (found["status"], found["reason"]) == ("failed", "ValueError: the seventh thing went wrong")
    assert found["figures"] == {"before": 1}
    error = found["error"]
    assert isinstance(error, dict)
    assert "step_that_fails.py" in error["traceback"]
    assert str(REPOSITORY) not in json.dumps(found)
    assert "printed before" in str(found["output"])


def test_a_step_that_crashes_is_a_failure_with_the_name_of_the_signal(work: Path) -> None:
    found = row("step_that_crashes", work)
    assert found["status"] == "failed"
    assert "SIGKILL" in str(found["reason"])


def test_a_step_that_hangs_is_ended_shows_where_it_was_and_takes_no_time_from_the_next(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_the_limit() -> float:
        """Let the time of the step be over once it hangs."""
        return time.monotonic() + (15.0 if (work / "hangs").exists() else 0.0)

    clock = SimpleNamespace(monotonic=at_the_limit, sleep=time.sleep)
    monkeypatch.setattr("hw.checkup.child.time", clock)
    steps = [step("step_that_hangs", 15.0), step("step_that_skips", TOTAL_S - 15.0)]
    content = {"steps": begun_rows(steps)}
    saved: list[list[str]] = []
    run_steps(steps, work, content, time.monotonic(), TOTAL_S, lambda: saved.append(_states(content)))
    hung, skipped = content["steps"]
    assert _states(content) == ["failed", "skipped"]
    assert hung["reason"].startswith("it did not end within 1")
    assert hung["figures"] == {"before": 1}
    assert "in wait_for_ever" in hung["output"]
    assert not runs(int((work / "grandchild").read_text()))  # what the step had started has ended too
    assert skipped["limit_s"] > 250
    assert skipped["reason"] == "it does not apply here"
    assert ["failed", "running"] in saved


def runs(pid: int) -> bool:
    """Return whether a process runs; one that has ended may wait for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _states(content: dict[str, list[dict[str, str]]]) -> list[str]:
    return [one["status"] for one in content["steps"]]


def test_a_missed_check_fails_the_step_and_says_what_was_found_and_wanted(work: Path) -> None:
    findings = Findings(work / "some.json")
    findings.check("copies", True, 25e9, "above 2e10")
    findings.check("bytes", False, 7, "8")
    found = outcome(work, "some", None)
    assert (found["status"], found["reason"]) == ("failed", "bytes: 7, wanted 8")


def test_the_steps_have_modules_and_fit_into_nine_minutes() -> None:
    assert TOTAL_S == 540
    for one in STEPS:
        assert (REPOSITORY / "hw" / "checkup" / f"{one.name}.py").is_file()


def test_every_step_is_sure_of_its_share_and_gets_what_earlier_ones_left() -> None:
    hang, after = Step("a", 100, ""), [Step("b", 240, ""), Step("c", 200, "")]
    assert limit_s(hang, after, 540.0, 540.0) == 100
    assert limit_s(after[0], after[1:], 440.0, 540.0) == 240
    assert limit_s(after[0], after[1:], 530.0, 540.0) == 330
    assert limit_s(hang, after, 270.0, 270.0) == 50


def test_values_that_json_does_not_know_become_plain() -> None:
    assert plain({1: (float("nan"), {"a": float("inf")}), "p": REPOSITORY / "hw"}) == {
        "1": [None, {"a": None}],
        "p": "./hw",
    }


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("NVIDIA H100 80GB HBM3", "h100_80gb"),
        ("NVIDIA H200", "h200_141gb"),
        ("NVIDIA A100-SXM4-80GB", "a100_80gb"),
        ("NVIDIA L4", "l4_24gb"),
        ("NVIDIA L40S", "l40s_48gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090_24gb"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx_pro_6000_96gb"),
        ("NVIDIA RTX A6000", "a6000_48gb"),
    ],
)
def test_the_option_of_a_gpu_is_found_by_its_name(name: str, option: str) -> None:
    assert gpu_option(name) == option
    assert option in option_names("gpu")


def test_a_gpu_without_an_option_is_an_error_that_names_the_key() -> None:
    with pytest.raises(ConfigError, match="set gpu= to one of a100_80gb"):
        gpu_option("Tesla T4")


def test_a_folder_is_named_after_the_device() -> None:
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"


def test_the_command_writes_its_files_and_its_status_says_whether_a_step_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAP_LAB_PROGRESS", "1")
    monkeypatch.setattr("hw.checkup.run.probe", cache(probe))  # torch is imported in a process to find the device: once
    keys = ["device=cpu", "size=short", "model=tiny", "hw.checkpoint=random:0", "commit=abc"]
    folders = [f"out={tmp_path / 'out'}", f"work={tmp_path / 'work'}"]
    assert exit_status(main, *keys, *folders, "steps=[environment,kernels]") == 0
    content = json.loads((tmp_path / "out" / "checkup.json").read_text(encoding="utf-8"))
    assert content["passed"]
    assert content["commit"] == "abc"
    assert [row["name"] for row in content["steps"]] == ["environment", "kernels"]
    assert str(tmp_path) not in json.dumps(content)
    assert content["steps"][0]["figures"]["memory_bandwidth_bytes_per_s"] > 0
    assert content["versions"]["torch"] != "not installed"
    assert (tmp_path / "out" / "checkup.png").stat().st_size > 10_000
    assert str(tmp_path) not in capsys.readouterr().err.replace(str(tmp_path / "out"), "")
    assert exit_status(main, *keys, *folders, "steps=[environment]", "seconds=1") == 1


def test_an_unknown_step_size_or_device_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(main, "steps=[enviroment]", f"out={tmp_path}") == 2
    assert "did you mean 'environment'" in capsys.readouterr().err
    assert exit_status(main, "size=huge", f"out={tmp_path}") == 2
    assert "huge" in capsys.readouterr().err
    assert exit_status(main, "device=tpu", f"out={tmp_path}", "steps=[environment]") == 2
    assert "did you mean 'cpu'" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_one_line_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["device=cpu", "model=hf", f"model.config={tmp_path / 'none'}", f"out={tmp_path / 'out'}"]
    assert exit_status(main, *keys, "steps=[environment]") == 2
    assert "no model config at" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(machine.nvidia_smi() is not None, reason="has a GPU")
def test_a_gpu_that_torch_does_not_find_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(main, "device=cuda", f"out={tmp_path}") == 2
    assert "torch cannot use device=cuda" in capsys.readouterr().err


def test_the_check_up_itself_needs_no_torch() -> None:
    """A torch that cannot be imported must not keep the check-up from saying so."""
    code = "import sys; import hw.checkup.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
