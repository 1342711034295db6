"""Every command goes through one Hydra entry: its help has one form, and a mistake is one line and exit status 2."""

from __future__ import annotations

import importlib

import pytest

from sim.config import CONF_DIR, help_text
from sim.paths import REPOSITORY
from tests.commands import exit_status, keys_taken_for_groups

COMMANDS = {
    "sim.replay.__main__": "replay",
    "sim.compare": "compare",
    "sim.capacity.run": "capacity",
    "sim.cluster.run": "cluster",
    "sim.disaggregate.run": "disaggregate",
    "sim.fit_trace": "fit_trace",
    "sim.reference": "reference",
    "sim.report.run": "report",
    "sim.report.timeline": "timeline",
    "sim.serve.server": "sim_serve",
    "sim.table.run": "table",
    "sim.table.list_runs": "runs",
    "sim.new.run": "new",
    "sim.results.__main__": "results",
    "sim.cluster_results": "cluster_results",
    "hw.replay.run": "hw_replay",
    "hw.calibrate.__main__": "calibrate",
    "hw.checkup.run": "checkup",
    "hw.checkup.wheels": "wheels",
    "hw.score.run": "score",
    "hw.serve.server": "serve",
    "hw.client.run": "client",
    "hw.disaggregate.run": "hw_disaggregate",
    "hw.disaggregate.results": "disaggregate_results",
    "hw.compare": "hw_compare",
    "hw.fidelity": "hw_fidelity",
    "hw.fit.run": "fit",
    "hw.loop.settings": "hw_loop",
    "hw.reproduction.run": "reproduction",
    "hw.validate.suite": "hw_validate",
    "hw.validate.swapping": "hw_swap_results",
    "agents.training.train": "train",
    "agents.training.clone": "clone",
    "agents.training.offline": "offline",
    "agents.training.tune": "tune",
    "agents.training.export": "export",
    "agents.evaluation.evaluate": "evaluate",
    "agents.evaluation.knobs": "knobs",
    "agents.evaluation.static_plans": "static_plans",
    "agents.claim": "claim",
    "agents.tune_rules": "tune_rules",
    "agents.windows": "windows",
}
"""Module that registers the command's keys -> its file of conf/."""
REPLAYS = {
    "replay",
    "compare",
    "capacity",
    "cluster",
    "disaggregate",
    "sim_serve",
    "hw_replay",
    "hw_loop",
    "client",
} | {
    "serve",
    "hw_disaggregate",
}


def test_every_configuration_of_a_command_is_listed_here() -> None:
    assert {path.stem for path in CONF_DIR.glob("*.yaml")} == set(COMMANDS.values())


@pytest.mark.parametrize("module", [module for module in COMMANDS if not module.startswith("agents")])
def test_help_shows_how_to_call_the_command_and_lists_the_groups_that_it_uses(module: str) -> None:
    importlib.import_module(module)
    text = help_text(COMMANDS[module])
    assert "python -m " in text
    assert "== This configuration" in text
    assert "$" not in text.replace("${", "")
    groups = text.partition("== Groups")[2].partition("\n\n==")[0]
    assert ("trace:" in groups) == (COMMANDS[module] in REPLAYS)
    assert "router:" not in groups or COMMANDS[module] in ("cluster", "fit")


@pytest.mark.parametrize("module", [module for module in COMMANDS if not module.startswith("agents")])
def test_every_key_of_a_command_can_be_set(module: str) -> None:
    importlib.import_module(module)
    assert keys_taken_for_groups(COMMANDS[module]) == set()


def test_no_file_parses_arguments_of_its_own() -> None:
    own = [
        path.relative_to(REPOSITORY).as_posix()
        for package in ("sim", "hw", "agents")
        for path in (REPOSITORY / package).rglob("*.py")
        if "argparse" in (text := path.read_text(encoding="utf-8"))
        or ("sys.argv" in text and path.name not in ("command.py", "rap.py"))
    ]
    # One records the command line, one lets a new name stand where Hydra wants a "++", one takes it to other processes.
    assert sorted(own) == [
        "agents/evaluation/chosen.py",
        "agents/training/ray_launcher.py",
        "sim/results/run_folder.py",
    ]


def test_arguments_without_a_key_become_a_list_and_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from hw.compare import main

    assert exit_status(main, "/a folder/it's", "b", "out=c") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: /a folder/it's has no records.parquet")
    assert error.count("\n") == 1


def test_a_group_that_the_command_does_not_use_is_refused_with_those_that_it_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from sim.replay.__main__ import main

    assert exit_status(main, "router=least_kv") == 2
    assert capsys.readouterr().err.startswith("error: this command has no group 'router'")


def test_a_mapping_with_the_name_of_a_group_is_refused_with_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    from hw.score.run import main

    assert exit_status(main, "kind=gsi", "model=smollm2_135m") == 2
    said = "error: this command has no group 'model', but keys of that name; set one of them: model.path=VALUE, "
    assert capsys.readouterr().err.startswith(said)
