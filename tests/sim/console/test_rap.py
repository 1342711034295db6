"""``rap NAME`` is ``python -m MODULE``, and shells complete what each command takes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from sim.config import ReplayConfig, help_text, option_names
from sim.console.commands import commands, find_command, short_names
from sim.console.completion import KEYS, complete
from sim.console.rap import overview, run
from sim.errors import ConfigError
from sim.new.run import FILES
from sim.paths import REPOSITORY


def test_every_command_has_one_short_name_and_the_simulator_comes_first() -> None:
    short = short_names()
    assert len(short) == len(commands())
    expected = {
        "replay": "sim.replay",
        "hw.replay": "hw.replay",
        "serve": "sim.serve",
        "train": "agents.train",
        "validate": "hw.validate",
        "fit-trace": "sim.fit_trace",
    }
    assert {name: find_command(name).module for name in expected} == expected
    assert {find_command(module).module for module in commands()} == set(commands())
    assert [name for name in short if f"  {name} " not in overview()] == []


def test_a_command_that_does_not_exist_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'replay'"):
        run(["repaly"])
    with pytest.raises(ConfigError, match="bash or zsh"):
        run(["completion", "fish"])


def test_rap_runs_the_command_as_python_does(tmp_path: Path) -> None:
    arguments = ["trace=small", "trace.duration_s=5", f"hydra.run.dir={tmp_path / 'run'}"]
    code = f"import sys; sys.argv = ['rap', 'replay', *{arguments!r}]; from sim.console.rap import main; main()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=REPOSITORY, timeout=120)
    made = json.loads((tmp_path / "run" / "provenance.json").read_text(encoding="utf-8"))
    assert made["command"] == " ".join(["python", "-m", "sim.replay", *arguments])


def test_a_mistake_after_the_name_is_one_line_and_exit_status_2() -> None:
    code = "import sys; sys.argv = ['rap', 'replay', 'polcy=dense']; from sim.console.rap import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "policy" in done.stderr


def test_the_version_is_that_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    run(["--quiet", "--version"])
    assert capsys.readouterr().out.startswith("rap-lab ")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"rap": "sim.console.rap:main"}


def test_commands_groups_options_keys_and_values_are_completed() -> None:
    assert complete("rap rep") == ["replay", "report", "reproduction"]
    assert complete("rap replay policy=") == [f"policy={name}" for name in option_names("policy")]
    assert complete("rap replay policy=mor") == ["policy=morphserve", "policy=morphserve_rtx3090"]
    assert complete("rap replay policy.mo") == []  # the default, dense, has no keys
    assert complete("rap replay policy=morphserve policy.mo") == ["policy.mode="]
    assert complete("rap hw.replay hw.cl") == ["hw.clock="]
    assert complete("rap hw.replay hw.skip_idle=") == ["hw.skip_idle=false", "hw.skip_idle=true"]
    assert complete("rap replay --con") == ["--config-dir"]
    assert complete("rap completion ") == ["bash", "zsh"]
    assert complete("rap nothing po") == []
    every = {text.rstrip("=") for text in complete("rap replay ")}
    assert {"policy", "seed", "tick_s"} <= every
    assert {name for name in ReplayConfig.__dataclass_fields__ if name not in every} == set()


def test_experiments_are_completed_for_their_own_command_and_those_of_a_user_for_any(tmp_path: Path) -> None:
    assert "experiment=ppo_serve" in complete("rap train experiment=")
    assert not {"experiment=ppo_serve", "experiment=loop_smollm2"} & set(complete("rap cluster experiment="))
    assert complete("rap hw.loop experiment=") == ["experiment=loop_llama2_gpu", "experiment=loop_smollm2"]
    mine = tmp_path / "experiment" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text("# @package _global_\nseed: 3\n", encoding="utf-8")
    assert complete(f"rap hw.loop --config-dir {tmp_path} experiment=m") == ["experiment=mine"]
    importlib.import_module("sim.compare")
    offered = re.search(r"^experiment: (.+)$", help_text("compare"), re.MULTILINE)
    assert offered is not None
    assert "cotenant_burst" in offered[1]
    assert "chat_affinity" not in offered[1]


def test_options_of_a_folder_of_ones_own_are_completed(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "mine.yaml").write_text("_target_: mine.policy\nwait_s: 1.0\n", encoding="utf-8")
    line = f"rap replay --config-dir {tmp_path} policy=mine "
    assert "policy=mine" in complete(f"{line}policy=m")
    assert complete(f"{line}policy.w") == ["policy.wait_s="]


@pytest.mark.parametrize(
    "typed", ["--config-dir 'my policies'", '--config-dir="my policies"', r"--config-dir my\ policies"]
)
def test_a_folder_of_ones_own_may_have_a_space_in_its_name(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my policies", "policy").mkdir(parents=True)
    Path("my policies", "policy", "mine.yaml").write_text("_target_: mine.policy\nwait_s: 1.0\n", encoding="utf-8")
    assert complete(f"rap replay {typed} policy=min") == ["policy=mine"]
    assert complete(f"rap replay policy=mine {typed} policy.w") == ["policy.wait_s="]


@pytest.mark.parametrize("folder", ["m", "'my po", r"my\ po", ""])
def test_the_shell_completes_folders(folder: str) -> None:
    assert complete(f"rap replay --config-dir {folder}") == []
    assert complete("rap report r") == complete("rap table runs") == complete("rap hw.compare r") == []


def test_what_can_be_begun_is_completed_once() -> None:
    assert set(FILES) < set(complete("rap new "))
    assert complete("rap new po") == complete("rap new folder=mine po") == ["policy"]
    assert complete("rap new policy po") == []


def test_launchers_of_sweeps_are_completed_where_a_command_has_sweeps() -> None:
    offered = complete("rap replay --multirun hydra/launcher=")
    assert {"hydra/launcher=basic", "hydra/launcher=ray"} <= set(offered)
    assert ("hydra/launcher=joblib" in offered) == bool(importlib.util.find_spec("hydra_plugins"))
    assert complete("rap replay hydra/la") == ["hydra/launcher="]
    assert complete("rap replay hydra/launcher=ray hydra.launcher.a") == ["hydra.launcher.address="]
    assert complete("rap serve hydra") == ["hydra.run.dir="]
    assert complete("rap report hydra/launcher=r") == []


def test_a_command_that_begins_with_the_file_of_another_completes_its_keys() -> None:
    assert set(complete("rap train ")) <= set(complete("rap clone "))


def test_completion_imports_no_command() -> None:
    code = (
        "import sys; sys.argv = ['rap', '__complete', 'rap replay po']; from sim.console.rap import main; main();"
        "print(sorted({'numba', 'torch', 'hydra', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.split() == ["policy=", "[]"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a folder with ``rap`` in ``bin``, and options of one's own in a folder with a space in its name."""
    rap = tmp_path / "bin" / "rap"
    rap.parent.mkdir()
    start = f'exec {sys.executable} -c "from sim.console.rap import main; main()" "$@"'
    rap.write_text(f"#!/bin/sh\nPYTHONPATH={REPOSITORY} {start}\n", encoding="utf-8")
    rap.chmod(0o755)
    (tmp_path / "my policies" / "policy").mkdir(parents=True)
    (tmp_path / "my policies" / "policy" / "begun_here.yaml").write_text("_target_: x.y\n", encoding="utf-8")
    return tmp_path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_with_and_without_equals_as_a_word_break(home: Path) -> None:
    ask = """
eval "$(rap completion bash)"
compopt() { :; }
COMP_LINE="rap replay policy=mor" COMP_POINT=21
COMP_WORDBREAKS=" ="; _rap; echo "${COMPREPLY[@]}"
COMP_WORDBREAKS=" "; _rap; echo "${COMPREPLY[@]}"
COMP_LINE="rap replay --config-dir my" COMP_POINT=26; _rap; echo "${#COMPREPLY[@]}"
"""
    environment = os.environ | {"PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", ask], check=True, capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.splitlines() == [
        "morphserve morphserve_rtx3090",
        "policy=morphserve policy=morphserve_rtx3090",
        "0",  # so bash completes names of files
    ]


SHELLS = {"bash": ("bash", "--norc", "--noprofile", "-i"), "zsh": ("zsh", "-f", "-i")}


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of Unix")
@pytest.mark.parametrize("shell", SHELLS)
def test_the_key_completes_on_a_terminal(shell: str, home: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    pairs = {
        "rap new po": "rap new policy ",
        "rap replay --multirun hydra/launcher=r": "hydra/launcher=ray ",
        "true && rap replay --config-dir 'my policies' policy=beg": "'my policies' policy=begun_here ",
        "rap replay --config-dir my": r"--config-dir my\ policies/",
    }
    with terminal(SHELLS[shell], home) as press:
        press(f'eval "$(rap completion {shell})"; echo read"y"\n', "ready")
        for typed, completed in pairs.items():
            press(f"{typed}\t", completed)
            press('\x15echo again"$((6*7))"\n', "again42")  # the line is cleared


@contextmanager
def terminal(command: Sequence[str], home: Path) -> Iterator[Callable[[str, str], None]]:
    """Start a shell on a terminal; yield a function that presses keys and waits until the shell has shown a text."""
    import pty

    process, screen = pty.fork()
    if process == 0:
        os.chdir(home)
        path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
        os.execvpe(command[0], command, os.environ | {"PATH": path, "HOME": str(home), "TERM": "dumb"})

    def press(keys: str, shown: str) -> None:
        os.write(screen, keys.encode())
        seen, end_s = b"", time.monotonic() + 60
        while shown.encode() not in seen.replace(b"\x07", b""):
            assert time.monotonic() < end_s, f"no {shown!r} after {keys!r}, but {seen!r}"
            if select.select([screen], [], [], 0.5)[0]:
                seen += os.read(screen, 65536)

    try:
        yield press
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(screen)


def test_the_keys_that_are_completed_are_those_of_every_command() -> None:
    known = json.loads(KEYS.read_text(encoding="utf-8"))
    assert set(known) == set(commands())
