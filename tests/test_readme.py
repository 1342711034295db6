"""README.md keeps its promises: it stays short, its Python runs, its links and commands exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sim.cost.latency import load_calibration
from sim.cost.model_spec import load_model
from sim.engine.protocol import EngineConfig
from sim.engine.sim_engine import SimEngine
from sim.paths import REPOSITORY
from sim.policies import PolicyContext
from sim.replay.loop import replay
from sim.traces.generate import poisson

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_readme_stays_under_90_lines() -> None:
    assert len(README.splitlines()) < 90


def test_the_python_session_runs_and_prints_an_slo_attainment(capsys: pytest.CaptureFixture[str]) -> None:
    exec(PYTHON[0], {})
    share = re.fullmatch(r"([\d.]+)% of requests met the SLO\n", capsys.readouterr().out)
    assert share
    assert 0.0 < float(share[1]) < 100.0


def test_the_policy_of_the_readme_drops_blocks_under_load_and_brings_them_back() -> None:
    scope: dict[str, Any] = {}
    exec(PYTHON[1], scope)
    model = load_model("llama2_7b")
    policy = scope["DropWhenBusy"](PolicyContext(model=model), limit=5)
    engine = SimEngine(
        model=model,
        latency=load_calibration("llama2_7b_a100"),
        config=EngineConfig(),
        plan=policy.first_plan,
        budget_bytes=20 * 10**9,
    )
    replay(poisson(rate_rps=4.0, duration_s=60.0, seed=0), engine, policy, tick_s=1.0)
    shares = [share for _, share in engine.kept_share()]
    assert min(shares) < 1.0
    assert shares[-1] == 1.0


def test_every_command_of_the_readme_exists() -> None:
    commands = set(re.findall(r"python -m ([\w.]+)", README))
    assert commands
    assert {command for command in commands if importlib.util.find_spec(command) is None} == set()
    targets = set(re.findall(r"`make (\w+)`|^    make (\w+)$", README, re.MULTILINE))
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert {name for pair in targets for name in pair if name and f"\n{name}:" not in makefile} == set()


@pytest.mark.parametrize("page", [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert {link for link in links if not (page.parent / link).exists()} == set()


def test_the_figures_of_the_demo_name_the_policies_that_it_runs() -> None:
    experiment = OmegaConf.load(REPOSITORY / "conf" / "experiment" / "cotenant_burst.yaml")
    rows = re.findall(r"^\| (\w+): ", README, re.MULTILINE)
    assert rows == list(experiment.policies)
