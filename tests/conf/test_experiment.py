"""Every file of conf/experiment composes with the command that its second line names, and builds."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from sim.cluster.run import replicas_of
from sim.compare import variants
from sim.config import CONF_DIR, check_overrides
from sim.cost.latency import load_calibration
from sim.cost.plan import check_plan
from sim.disaggregate import run as disaggregate_command
from sim.policies import Fixed
from sim.replay.run import build_parts
from sim.replay.variants import variants as cluster_variants

COMMANDS = {
    "sim.compare": "compare",
    "sim.cluster": "cluster",
    "sim.disaggregate": "disaggregate",
    "hw.loop": "hw_loop",
    "agents.train": "train",
    "agents.clone": "clone",
}
EXPERIMENTS = [
    path
    for path in sorted((CONF_DIR / "experiment").glob("*.yaml"))
    if any(f"python -m {command} " in path.read_text() for command in COMMANDS)
]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_composes_with_the_command_of_its_second_line(path: Path) -> None:
    first, second = path.read_text().splitlines()[:2]
    assert first == "# @package _global_"
    arguments = shlex.split(second.removeprefix("# "))
    assert arguments[:2] == ["python", "-m"]
    assert f"experiment={path.stem}" in arguments
    if arguments[2].startswith("agents") and importlib.util.find_spec("ray") is None:
        pytest.skip("needs ray")
    spec = importlib.util.find_spec(arguments[2])
    assert spec is not None
    package = spec.submodule_search_locations is not None
    importlib.import_module(f"{arguments[2]}.run" if package else arguments[2])  # which registers its schema
    check_overrides(arguments[3:], COMMANDS[arguments[2]])


@pytest.mark.parametrize(
    "path", [p for p in EXPERIMENTS if "sim.cluster " in p.read_text()], ids=lambda path: path.stem
)
def test_every_experiment_on_a_cluster_builds_each_of_its_variants(path: Path) -> None:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("cluster", overrides=[f"experiment={path.stem}"])
    for one in cluster_variants(cfg).values():
        assert replicas_of(one)


@pytest.mark.parametrize("path", [p for p in EXPERIMENTS if "sim.disaggregate" in p.read_text()], ids=lambda p: p.stem)
def test_every_disaggregated_experiment_builds_the_plan_of_each_of_its_variants(path: Path) -> None:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("disaggregate", overrides=[f"experiment={path.stem}"])
    for one in cluster_variants(cfg).values():
        check_plan(build_parts(one).model, disaggregate_command.plan_of(one))


@pytest.mark.parametrize("path", [p for p in EXPERIMENTS if "sim.compare" in p.read_text()], ids=lambda path: path.stem)
def test_every_comparison_builds_its_policies_and_budgets_and_has_prices_for_their_plans(path: Path) -> None:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("compare", overrides=[f"experiment={path.stem}"])
    for one in variants(cfg).values():
        parts = build_parts(one)
        latency = load_calibration(one.latency) if one.latency else parts.server.priced()
        plans = [parts.policy.first_plan] if isinstance(parts.policy, Fixed) else getattr(parts.policy, "plans", ())
        for plan in plans:
            latency.check_bits(plan)


@pytest.mark.parametrize(("model", "blocks"), [("llama2_7b", 958), ("llama3_8b", 2599)])
def test_one_budget_holds_the_kv_blocks_that_morphserve_states_for_both_models(model: str, blocks: int) -> None:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("compare", overrides=["experiment=morphserve_l4", f"model={model}"])
    parts = build_parts(variants(cfg)["fp16"])
    kv_block_bytes = 16 * parts.model.num_layers * parts.model.kv_bytes_per_token_layer
    room = parts.budget.budget_bytes[0] - 2 * parts.model.total_params - cfg.workspace_bytes
    assert room / kv_block_bytes == pytest.approx(blocks, rel=0.002)
