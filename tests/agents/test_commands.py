"""The commands: each module imports, and its configuration composes with the schema that it registers."""

from __future__ import annotations

import importlib

import pytest

from sim.config import help_text
from tests.agents.helpers import composed, run_python
from tests.commands import keys_taken_for_groups

NAMES = [
    *("train", "clone", "tune", "offline", "export", "evaluate", "static_plans", "knobs", "claim", "tune_rules"),
    "windows",
]
REQUIRED = {"export": ("run=r", "name=n"), "offline": ("by=dense",)}


@pytest.mark.parametrize("name", NAMES)
def test_every_command_imports_and_composes_its_configuration(name: str) -> None:
    assert callable(importlib.import_module(f"agents.{name}").main)
    cfg = composed(name, *REQUIRED.get(name, ()))
    assert len(cfg) > 2


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_command_can_be_set(name: str) -> None:
    importlib.import_module(f"agents.{name}")
    assert keys_taken_for_groups(name) == set()


def test_importing_agents_loads_neither_torch_nor_ray() -> None:
    run = run_python("-c", "import sys, agents, agents.envs.registration; print({'torch', 'ray'} & set(sys.modules))")
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command_is_its_own(name: str) -> None:
    importlib.import_module(f"agents.{name}")
    assert f"python -m agents.{name} " in help_text(name).split("== ")[0]
