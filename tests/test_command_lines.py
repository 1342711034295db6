"""Every command line that the project shows runs, shortened by its own keys; the long ones are marked slow."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

pytest.importorskip("ray", reason="the pages show the commands of all packages: pip install -e '.[dev]'")

from agents.evaluation.chosen import named
from sim.config import check_overrides, compose_config
from sim.config.arguments import read_arguments
from sim.paths import REPOSITORY, data_dir
from sim.reference import POSITIONAL, commands, page
from tests.command_lines import command_lines, other_lines, split, unquoted
from tests.commands import exit_status

MAINS = {
    "sim.replay": "sim.replay.__main__:main",
    "sim.compare": "sim.compare:compare_command",
    "sim.capacity": "sim.capacity.run:main",
    "sim.cluster": "sim.cluster.run:cluster_command",
    "sim.disaggregate": "sim.disaggregate.run:disaggregate_command",
    "sim.fit_trace": "sim.fit_trace:main",
    "sim.reference": "sim.reference:main",
    "sim.report": "sim.report.run:main",
    "sim.serve": "sim.serve.server:main",
    "sim.new": "sim.new.run:main",
    "sim.runs": "sim.table.list_runs:main",
    "sim.table": "sim.table.run:main",
    "sim.trace": "sim.report.timeline:main",
    "sim.results": "sim.pages.simulation:main",
    "sim.cluster_results": "sim.pages.clusters:main",
    "hw.calibrate": "hw.calibrate.__main__:main",
    "hw.checkup": "hw.checkup.run:main",
    "hw.checkup.wheels": "hw.checkup.wheels:main",
    "hw.client": "hw.client.client:main",
    "hw.compare": "hw.compare:main",
    "hw.disaggregate": "hw.disaggregate.run:disaggregate_command",
    "hw.disaggregate_results": "hw.disaggregate.results:main",
    "hw.fidelity": "hw.fidelity:main",
    "hw.fit": "hw.fit.run:main",
    "hw.loop": "hw.loop.run:main",
    "hw.replay": "hw.replay.run:main",
    "hw.reproduction": "hw.reproduction.run:main",
    "hw.score": "hw.score.run:main",
    "hw.serve": "hw.serve.server:main",
    "hw.swap_results": "hw.validate.swapping:main",
    "hw.validate": "hw.validate.run:main",
    "agents.claim": "agents.evaluation.make_claim:main",
    "agents.clone": "agents.training.clone:main",
    "agents.evaluate": "agents.evaluation.evaluate:main",
    "agents.export": "agents.training.export:main",
    "agents.offline": "agents.training.offline:main",
    "agents.knobs": "agents.evaluation.knobs:main",
    "agents.static_plans": "agents.evaluation.static_plans:main",
    "agents.train": "agents.training.train:main",
    "agents.tune": "agents.training.tune:main",
    "agents.tune_rules": "agents.evaluation.tuning:main",
    "agents.windows": "agents.evaluation.windows:main",
}
NOT_OURS = (
    "tests.bench.count_operations",
    "tests.bench.walk",
    "tests.frozen.runs",
    "tests.hw.elastic.compile_kernels",
    "tests.soak",
)
"""Started by hand, not configured by Hydra."""
OTHER_LINES = {"make demo", "pip install -c constraints.txt -e ."}
"""Not run here. ``make demo`` is ``python -m sim.compare workers=2``. Lines of curl: tests/hw/serve."""
LINES = [line for line in command_lines() if split(line)[0] not in NOT_OURS]
TYPED_LINES = sorted(set(LINES).intersection(command_lines(results=False)))
"""Lines that a user may type: those of the pages of results are not among them."""

# --- What runs here --------------------------------------------------------------------------------------------------

ELSEWHERE = {
    r"measure=true": "measures for minutes, and replaces committed figures; the command behind each has its own test",
    r"ray\.address=|executor=ray": "needs a Ray cluster: tests/agents/training/test_ray_cluster.py",
    r"hw\.device=cuda|gpu=h100_80gb clock=wall|checkpoint=FOLDER": "needs a GPU or a checkpoint",
    r"hw\.checkup": "runs for minutes: tests/hw/checkup",
    r"hw\.client": "needs a server: tests/hw/client, tests/hw/serve",
    r"hw\.compare": "needs a real run: tests/hw/validate/test_compare.py",
    r"hw\.fidelity run=FOLDER": "needs the published run of another server: tests/hw/validate/test_fidelity.py",
    r"hw\.loop": "serves for an hour: tests/hw/loop",
    r"served\.parquet": "needs what a server has served: tests/sim/serve",
    r"policy=tuned": "needs rules that were tuned for minutes: tests/agents/evaluation/test_rules.py",
    r"hw\.fit": "needs the run of a server: tests/hw/fit",
    r"sim\.reference": "make docs runs it: tests/sim/test_reference.py",
    r"sim\.(runs|table)": "needs run folders: tests/sim/table",
    r"(hw|sim)\.serve": "serves until it is stopped: tests/hw/serve, tests/sim/serve",
    r"hw\.validate(?! page=only)": "runs the complete suite: tests/hw/validate",
    r"hw\.calibrate source=device": "measures for minutes: tests/hw/calibrate/test_device.py",
    r"hw\.reproduction": "minutes: tests/hw/reproduction",
    r"hw\.score": "measures for hours: tests/hw/score",
    r"agents\.(claim|evaluate|knobs|tune|tune_rules|offline|export|clone|static_plans|windows)": (
        "minutes, or needs a training: tests/agents"
    ),
    r"agents\.train(?! experiment=(ppo_prune|dqn_prune)$)": "needs a training before, or is one of several alike",
}
"""Lines that are only composed here, and why."""
SLOW = (
    r"hw\.calibrate(?!.*target=llama2_7b_a100)|hw\.fidelity|hw\.replay|hw\.disaggregate(?!_)|agents\.train"
    r"|experiment=(pdtrim_transfer|prefix_caching|cluster_scale)|seed=range|experiment=morphserve_l4 model=llama3_8b$"
    r"|morphserve_l4.*factor="
)
"""Lines that take more than seconds: a real model, a training, a search, a fit; or that differ little from others."""
ALIKE = r"workers=\d+|out=\S+|source=measurements"
"""Keys that a shortened line sets otherwise, or that are the default: of lines that only differ in them, one runs."""
LEARNED = {f"learned_serve_llama2.{end}": f"mine.{end}" for end in ("json", "safetensors")}
"""Files of a shipped policy, and the names that the pages give to one's own."""
CUT = "workload.steps=[{_target_: sim.traces.transforms.window, _partial_: true, start_s: 0, duration_s: 20}]"
"""The first seconds of a trace file."""

LENGTHENS = r"\+?(experiment|trace|workload|windows|window_s|seeds|executor|cells)\b"
"""Keys that say how long a run takes; lines with the same ones share a composition."""
RUN_FOLDER = r"RUN(_\w+)?|runs/\w+"
"""What stands for a run folder, each for another one."""


def only_composed(line: str) -> str:
    """Return why a line is not run here; nothing if it is."""
    return next((why for pattern, why in ELSEWHERE.items() if re.search(pattern, line)), "")


def shortened(command: str, arguments: list[str]) -> list[str]:
    """Return keys that shorten a command: seconds of the trace, two seeds, one window, one process."""
    if command == "agents.train":
        return ["iterations=1", "minutes=1", "num_envs=2", "hidden=[8]", "validate_every=100"]
    if command in ("hw.fidelity", "hw.calibrate", "sim.fit_trace"):
        return ["out=written"]
    if "--config-dir" in arguments:
        return ["trace.duration_s=5"]
    # Of a key with several values, a job of a sweep has one.
    single = [text for text in read_arguments(arguments).overrides if "," not in text.partition("=")[2] or "[" in text]
    lengths = [text for text in single if "range(" not in text and re.match(LENGTHENS, text)]
    cfg = _composed(commands()[command].stem, tuple(lengths), False)
    if command == "sim.capacity" and "duration_s" in cfg.trace:
        return ["trace.duration_s=20", *_fewer_runs(cfg)]  # of fewer requests, two that are too long miss the target
    return [*_shorter_trace(cfg), *_fewer_runs(cfg)]


def _shorter_trace(cfg: DictConfig) -> list[str]:
    if "trace" not in cfg:
        return []
    if OmegaConf.select(cfg, "windows"):
        return ["windows=[0]", f"window_s={20 if 'path' in cfg.trace or 'file' in cfg.trace else 5}"]
    return ["trace.duration_s=5"] if "duration_s" in cfg.trace else [CUT]


def _fewer_runs(cfg: DictConfig) -> list[str]:
    found = ["workers=1"] if OmegaConf.select(cfg, "executor") is not None else []
    found += ["cells=2"] if (OmegaConf.select(cfg, "cells") or 1) > 2 else []
    return [*found, "seeds=[0,1]"] if OmegaConf.select(cfg, "seeds") else found


@pytest.fixture(scope="module", autouse=True)
def schemas() -> None:
    """Register the schema of every command, as the page of keys needs them all."""
    page()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Return a function that makes a simulated run folder once, to be compared."""
    folder = tmp_path_factory.mktemp("runs")

    def make() -> Path:
        keys = "trace=small model=smollm2_135m gpu=cpu_epyc_1thread engine=small budget=small workspace_bytes=1e8"
        if not (folder / "run").exists():
            main = resolve_name(MAINS["sim.replay"])
            assert exit_status(main, *keys.split(), "iterations=true", f"hydra.run.dir={folder / 'run'}") == 0
        return folder / "run"

    return make


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a folder that holds what the lines name: a trace, and the policy that the README shows."""
    monkeypatch.chdir(tmp_path)
    Path("my.csv").write_text(
        "arrival_s,prompt_tokens,output_tokens,ts,in_tokens,out_tokens\n0,100,20,0,100,20\n0.5,200,10,500,200,10\n"
    )
    shutil.copytree(REPOSITORY / "conf" / "policy", "policies", ignore=lambda _, names: set(names) - set(LEARNED))
    for name, shipped in LEARNED.items():
        Path("policies", name).rename(Path("policies", shipped))
    for end in ("json", "safetensors"):  # what training the roles of replicas exports
        shutil.copy(REPOSITORY / "conf" / "policy" / f"learned_roles_llama2.{end}", f"mine.{end}")
    result = {"completed": 2, "input_lens": [10, 20], "output_lens": [5, 6], "start_times": [100.0, 101.0]}
    Path("result.json").write_text(
        json.dumps(result | {"ttfts": [0.1, 0.2], "itls": [[0.01], [0.02]], "errors": ["", ""]})
    )
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    Path("mine/policy").mkdir(parents=True)
    code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    Path("mine/drop_when_busy.py").write_text(code)
    values = re.findall(r"`(_target_: \S+|_partial_: true|limit: 20)`", readme.replace("\n", " "))
    Path("mine/policy/drop_when_busy.yaml").write_text("\n".join(values) + "\n")
    return tmp_path


@cache
def _composed(config_name: str, overrides: tuple[str, ...], with_hydra: bool) -> DictConfig:
    return compose_config(config_name, overrides, with_hydra=with_hydra)


@pytest.fixture
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the lines that choose the same options share one composition."""

    def copied(config_name: str, overrides: Sequence[str] = (), *, with_hydra: bool = False) -> DictConfig:
        return deepcopy(_composed(config_name, tuple(overrides), with_hydra))

    monkeypatch.setattr("sim.config.overrides.compose_config", copied)


def lines_to_run() -> list[Any]:
    """Return the lines that are run here, one of those that are alike, the long ones marked slow."""
    found = {_without_alike(line): line for line in reversed(LINES) if not only_composed(line)}
    return [
        pytest.param(line, marks=[pytest.mark.slow] if re.search(SLOW, line) else []) for line in sorted(found.values())
    ]


def _without_alike(line: str) -> str:
    return " ".join(word for word in line.split(" ") if not re.fullmatch(ALIKE, word))


def lines_to_compose() -> list[str]:
    """Return the lines of which only the keys are checked, at least by the tests that are not slow."""
    run = {param.values[0] for param in lines_to_run() if not param.marks}
    return [line for line in LINES if line not in run]


# --- The tests -------------------------------------------------------------------------------------------------------


def test_every_other_line_of_the_pages_is_known() -> None:
    assert {line for line in other_lines() if not line.startswith("curl ")} == OTHER_LINES


@pytest.mark.parametrize("line", TYPED_LINES)
def test_a_shell_takes_the_line_as_it_stands(line: str) -> None:
    assert not re.search(r"[()\[\]{}*?~<>|&;$!#]", unquoted(line)), "quote what a shell would expand"


@pytest.mark.parametrize("line", lines_to_compose())
def test_the_groups_options_keys_and_values_of_a_line_that_is_long_exist(
    line: str, place: Path, composed_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, typed = split(line)
    if command == "agents.evaluate":
        typed = [named(text) for text in typed]
    arguments = read_arguments(typed, positional=POSITIONAL.get(command))
    if arguments.config_dir is not None:
        monkeypatch.syspath_prepend(arguments.config_dir)
    placeholders = [text for text in arguments.overrides if re.search(r"=(MODEL|GPU)$", text)]
    overrides = [text for text in arguments.overrides if text not in placeholders]
    check_overrides(overrides, commands()[command].stem, arguments.config_dir, multirun=arguments.multirun)


@pytest.mark.parametrize("line", lines_to_run())
def test_the_line_runs(
    line: str,
    place: Path,
    composed_once: None,
    runs: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, arguments = split(line)
    if (
        re.search("azure|mooncake|burstgpt|morphserve_l4|hw.fidelity|hw.calibrate|fit_trace", line)
        and not (data_dir() / "traces").is_dir()
    ):
        pytest.skip("needs published traces or measurements: set RAP_LAB_DATA")
    arguments = _with_folders(arguments, runs)
    _keep_pages(command, monkeypatch)
    assert exit_status(resolve_name(MAINS[command]), *arguments, *_shorter(command, arguments)) in _statuses(command)
    assert "Traceback" not in capsys.readouterr().err


def _shorter(command: str, arguments: list[str]) -> list[str]:
    return [] if "--cfg" in arguments or command in POSITIONAL else shortened(command, arguments)


def _statuses(command: str) -> tuple[int, ...]:
    """Return the exit statuses of a command that did its work: 1 says that a check is missed."""
    return (0, 1) if command in ("hw.compare", "hw.validate", "sim.reference") else (0,)


def _with_folders(arguments: list[str], runs: Callable[[], Path]) -> list[str]:
    """Return the arguments with a real folder for each one that they name."""
    found = []
    for text in arguments:
        if re.fullmatch(RUN_FOLDER, text):
            shutil.copytree(runs(), text := text.replace("/", "_"))
        if text == "data=FOLDER":
            text = f"data={data_dir() / 'calibration'}"
        if text == "run=FOLDER":
            continue  # the published run
        found.append(text.replace("FOLDER", "written"))
    return found


def _keep_pages(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the commands that write pages write copies of them."""
    folders = {"sim.results": "sim.pages.simulation:FOLDER", "sim.cluster_results": "sim.pages.clusters:FOLDER"}
    pages = {
        "sim.reference": "sim.reference:PAGE",
        "hw.disaggregate_results": "hw.disaggregate.results:PAGE",
        "hw.swap_results": "hw.validate.swapping:PAGE",
    }
    if command in folders:
        folder = resolve_name(folders[command])
        shutil.copytree(folder, Path("pages").absolute())
        monkeypatch.setattr(folders[command].replace(":", "."), Path("pages").absolute())
    if command in pages:
        path = resolve_name(pages[command])
        Path("pages").mkdir()
        shutil.copy(path, Path("pages").absolute())
        monkeypatch.setattr(pages[command].replace(":", "."), Path("pages").absolute() / path.name)
    if command == "hw.validate":
        for name in ("PAGE", "PLOT"):
            monkeypatch.setattr(f"hw.validate.run.{name}", Path(name).absolute())
