"""How a command ends: one line on stderr and exit status 2 for all that a user can mend."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from sim.config import run_command
from sim.config.failures import (
    INTERRUPTED,
    errors_in_one_line,
    explain,
    extra_of,
    interrupts_held_back,
    same_handler_of_sigterm,
    sigterm_as_ctrl_c,
)
from sim.errors import ConfigError
from sim.paths import REPOSITORY
from sim.replay.__main__ import main
from tests.commands import exit_status

QUICK = ("trace=poisson", "trace.duration_s=3")
HIDE = """
import runpy, sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "ray", "gymnasium", "httpx", "httpx_sse", "transformers", "uvicorn"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
for command in sys.argv[1:]:
    sys.argv = [command]
    try:
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print(command, end.code, file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("folder", ["/proc/nope/x", "/dev/null/x", "taken/x", "taken"])
def test_a_run_folder_that_cannot_be_made_is_one_line_and_status_2(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken").write_text("a file")
    assert exit_status(main, *QUICK, f"hydra.run.dir={folder}") == 2
    error = capsys.readouterr().err
    assert error.startswith(("error: /", "error: taken"))
    assert error.count("\n") == 1
    assert "hydra.run.dir=FOLDER" in error


def test_a_command_without_its_packages_names_the_extra_that_installs_them() -> None:
    commands = ["agents.train", "agents.tune", "agents.tune_rules", "agents.clone", "agents.offline", "agents.evaluate"]
    commands += ["sim.serve", "hw.replay", "hw.serve", "hw.client", "hw.score", "hw.validate", "hw.disaggregate"]
    run = [sys.executable, "-c", HIDE, *commands]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    lines = done.stderr.splitlines()
    assert len(lines) == 2 * len(commands), done.stderr
    for command, error, status in zip(commands, lines[::2], lines[1::2], strict=True):
        assert error.startswith("error: this needs the package ")
        assert status == f"{command} 2"
    assert f"pip install -e '{REPOSITORY}[agents]'" in lines[0]
    assert f"pip install -e '{REPOSITORY}[serve]'" in lines[2 * commands.index("sim.serve")]
    assert extra_of("httpx") == "hw"
    assert extra_of("torch") == "hw"


def test_what_the_system_refuses_is_explained_in_one_line() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x")
    assert (
        explain(full)
        == "runs/x: No space left on device; free some space, or write elsewhere with hydra.run.dir=FOLDER"
    )
    assert explain(full, "out=PATH").endswith("; free some space, or write elsewhere with out=PATH")
    assert explain(full, "").endswith("; free some space")
    assert explain(MemoryError()) == "not enough memory; use a smaller trace, or fewer workers"
    assert explain(OSError("odd")) == "odd"
    with pytest.raises(Exception) as missing:  # noqa: PT011
        _ = OmegaConf.create({"run": "???"}).run
    assert explain(missing.value) == "run has no value; set it: run=VALUE"


def test_an_error_of_the_code_itself_keeps_its_trace() -> None:
    with pytest.raises(TypeError), errors_in_one_line():
        raise TypeError("a bug")
    with pytest.raises(ModuleNotFoundError), errors_in_one_line():
        raise ModuleNotFoundError("No module named 'sim.nothing'", name="sim.nothing")


def test_ctrl_c_ends_with_status_130_and_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, errors_in_one_line():
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_sigterm_interrupts_what_runs_and_does_what_it_did_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert exit_status(lambda: run_command(lambda _: signal.raise_signal(signal.SIGTERM), "replay")) == INTERRUPTED
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert signal.getsignal(signal.SIGTERM) is before


@interrupts_held_back()
def held_back(*numbers: int, error: Exception | None = None, reached: list[str] | None = None) -> None:
    for number in numbers:
        signal.raise_signal(number)
    if error is not None:
        raise error
    if reached is not None:
        reached.append("end")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_what_is_short_and_a_second_one_does_not(number: signal.Signals) -> None:
    reached: list[str] = []
    with sigterm_as_ctrl_c():
        before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
        with pytest.raises(KeyboardInterrupt):
            held_back(number, reached=reached)
        assert reached == ["end"]
        with pytest.raises(KeyboardInterrupt):
            held_back(number, signal.SIGINT, reached=reached)
        assert reached == ["end"]
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_held_back_interrupt_hides_no_error_and_an_ignored_one_stays_ignored() -> None:
    with pytest.raises(ValueError, match="a full disk"):
        held_back(signal.SIGINT, error=ValueError("a full disk"))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        held_back(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_no_handler_is_set() -> None:
    def enter() -> None:
        with sigterm_as_ctrl_c(), same_handler_of_sigterm(), interrupts_held_back():
            pass

    with ThreadPoolExecutor() as threads:
        threads.submit(enter).result()


def test_a_job_of_a_sweep_that_kept_its_records_at_ctrl_c_is_noted_as_interrupted() -> None:
    def task(cfg: DictConfig) -> None:
        raise SystemExit(INTERRUPTED)

    arguments = ("--multirun", "seed=0,1", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra.job.num}")
    assert exit_status(lambda: run_command(task, "replay"), *arguments) == INTERRUPTED
    assert json.loads(Path("sweep/failed/0.json").read_text())["error"] == "interrupted"


def test_a_refused_run_leaves_no_folder_and_takes_none_that_holds_something() -> None:
    def task(cfg: DictConfig) -> None:
        raise ConfigError("no")

    for folder in ("made/label/seed_0", "kept/label/seed_0"):
        Path("kept").mkdir(exist_ok=True)
        Path("kept/file").write_text("")
        assert exit_status(lambda: run_command(task, "replay"), f"hydra.run.dir={folder}") == 2
    assert [path.name for path in Path().iterdir()] == ["kept"]
    assert [path.name for path in Path("kept").iterdir()] == ["file"]


def run(*arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "RAP_LAB_PROGRESS": "0"} | changed
    command = [sys.executable, "-m", "sim.replay", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_every_sign_of_the_output_reaches_a_terminal_that_only_knows_ascii() -> None:
    done = run(*QUICK, "seeds=[0,1]", "label='café'", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "mean +- sd" in done.stdout
    assert "cafe" in done.stdout


def test_a_reader_that_closes_the_pipe_sees_no_trace() -> None:
    command = f"{sys.executable} -m sim.replay --help | head -1"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env=environment)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_a_replay_without_compilation_is_refused_in_one_line() -> None:
    done = run(*QUICK, NUMBA_DISABLE_JIT="1")
    assert done.returncode == 2
    assert done.stderr == "error: NUMBA_DISABLE_JIT is set, but the simulator only runs compiled; unset it\n"
