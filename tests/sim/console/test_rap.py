"""``rap NAME`` is ``python -m MODULE``, and shells complete what each command takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sim.config import ReplayConfig, option_names
from sim.console.commands import commands, find_command, short_names
from sim.console.completion import KEYS, SCRIPTS, complete
from sim.console.rap import overview, run
from sim.errors import ConfigError
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


def test_options_of_a_folder_of_ones_own_are_completed(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "mine.yaml").write_text("_target_: mine.policy\nwait_s: 1.0\n", encoding="utf-8")
    line = f"rap replay --config-dir {tmp_path} policy=mine "
    assert "policy=mine" in complete(f"{line}policy=m")
    assert complete(f"{line}policy.w") == ["policy.wait_s="]


def test_completion_imports_no_command() -> None:
    code = (
        "import sys; sys.argv = ['rap', '__complete', 'rap replay po']; from sim.console.rap import main; main();"
        "print(sorted({'numba', 'torch', 'hydra', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.split() == ["policy=", "[]"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_with_and_without_equals_as_a_word_break(tmp_path: Path) -> None:
    rap = tmp_path / "rap"
    start = f'exec {sys.executable} -c "from sim.console.rap import main; main()" "$@"'
    rap.write_text(f"#!/bin/sh\nPYTHONPATH={REPOSITORY} {start}\n", encoding="utf-8")
    rap.chmod(0o755)
    ask = f"""
PATH={tmp_path}:$PATH
eval "$(rap completion bash)"
compopt() {{ :; }}
COMP_LINE="rap replay policy=mor" COMP_POINT=21
COMP_WORDBREAKS=" ="; _rap; echo "${{COMPREPLY[@]}}"
COMP_WORDBREAKS=" "; _rap; echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", ask], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["morphserve morphserve_rtx3090", "policy=morphserve policy=morphserve_rtx3090"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_reads_its_script() -> None:
    subprocess.run(["zsh", "-fn"], input=SCRIPTS["zsh"], check=True, text=True, timeout=60)


def test_the_keys_that_are_completed_are_those_of_every_command() -> None:
    known = json.loads(KEYS.read_text(encoding="utf-8"))
    assert set(known) == set(commands())
