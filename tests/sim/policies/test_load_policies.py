"""Admission limits and policies that follow load: their decisions on states built by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from sim.config import CONF_DIR
from sim.cost.model_spec import load_model
from sim.cost.plan import check_plan, dense_plan
from sim.engine.protocol import EngineState
from sim.errors import ConfigError, PlanError
from sim.policies.admission import Limited, limited, saber
from sim.policies.base import PolicyContext
from sim.policies.fixed import Fixed
from sim.policies.pressure import adaptive_precision, adaptive_pruning
from tests.sim.serving import TINY, tiny_engine

SERVED = PolicyContext(model=TINY)
STATE = tiny_engine().run_until(0.0)
ORDER = ["MHA1", "FFN1", "FFN2", "MHA0"]


def seen(**changed: Any) -> EngineState:
    return dataclasses.replace(STATE, **{"kv_layer_blocks": 100, "kv_used_layer_blocks": 0, **changed})


def test_saber_lets_as_many_wait_as_get_their_first_token_in_time() -> None:
    policy = saber(SERVED, ttft_s=2.0, margin=0.5, most=50, smoothing_s=1e-6)
    assert policy(seen(time_s=0.0, waiting=5)).max_waiting == 50  # nothing is known yet
    assert policy(seen(time_s=1.0, waiting=5, first_tokens=10)).max_waiting == 10  # 10 a second, half of two seconds
    assert policy(seen(time_s=2.0, waiting=5, first_tokens=14)).max_waiting == 4
    assert policy(seen(time_s=3.0, waiting=0, first_tokens=15)).max_waiting == 4  # without a queue speed says nothing
    assert policy(seen(time_s=4.0, waiting=9, first_tokens=15)).max_waiting == 4
    assert policy(seen(time_s=5.0, waiting=9, first_tokens=15)).max_waiting == 1  # at a standstill, the least


def test_a_limit_changes_nothing_else_of_another_policys_plan() -> None:
    inner = Fixed(dataclasses.replace(dense_plan(TINY), weight_bits=(4, 4, 4)))
    policy = limited(SERVED, policy=lambda served: inner, max_waiting=3)
    assert isinstance(policy, Limited)
    assert policy(seen()) == policy.first_plan == dataclasses.replace(inner.first_plan, max_waiting=3)


def test_a_limit_in_seconds_leaves_the_count_of_the_other_policy() -> None:
    inner = Fixed(dataclasses.replace(dense_plan(TINY), max_waiting=7))
    policy = limited(SERVED, policy=lambda served: inner, max_wait_s=1.5)
    assert policy(seen()) == policy.first_plan == dataclasses.replace(inner.first_plan, max_wait_s=1.5)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "1"], ids=repr)
def test_a_limit_in_seconds_is_above_zero(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"policy\.max_wait_s .* seconds above 0"):
        limited(SERVED, policy=lambda served: Fixed(dense_plan(TINY)), max_wait_s=value)
    with pytest.raises(PlanError, match=r"plan\.max_wait_s is .* seconds above 0"):
        check_plan(TINY, dataclasses.replace(dense_plan(TINY), max_wait_s=value))


def test_precision_falls_with_pressure_and_returns_with_calm() -> None:
    policy = adaptive_precision(SERVED, levels=3, calm=0.5, smoothing=1.0)
    low_layers = [policy(seen(kv_used_layer_blocks=used)).weight_bits.count(4) for used in (0, 40, 60, 80, 100, 80, 0)]
    assert low_layers == [0, 0, 1, 2, 3, 3, 1]
    assert policy(seen()).weight_bits.count(4) <= 1
    waiting = adaptive_precision(SERVED, levels=3, calm=0.5, smoothing=1.0)
    assert waiting(seen(waiting=1, oldest_wait_s=10.0)).weight_bits.count(4) == 3


def test_pressure_drops_blocks_of_the_order_step_by_step_and_only_after_it_persisted() -> None:
    policy = adaptive_pruning(SERVED, order=ORDER, step=2, most=4, smoothing=1.0)
    pressed = [policy(seen(oldest_wait_s=1.0)) for _ in range(6)]
    dropped = [plan.decode.mha.count(False) + plan.decode.ffn.count(False) for plan in pressed]
    assert dropped == [0, 0, 2, 2, 2, 4]
    relaxed = [policy(seen()) for _ in range(5)]
    assert relaxed[-1].decode.mha.count(False) + relaxed[-1].decode.ffn.count(False) == 2


@pytest.mark.parametrize(
    "name", ["saber", "adaptive_precision", "adaptive_pruning", "limited", "greedy_stop", "morphserve"]
)
def test_every_file_builds_its_policy_and_starts_dense_but_for_the_queue(name: str) -> None:
    node = OmegaConf.load(CONF_DIR / "policy" / f"{name}.yaml")
    model = load_model("llama2_7b")
    policy = instantiate(node, _convert_="all")(PolicyContext(model=model))
    assert dataclasses.replace(policy.first_plan, max_waiting=None) == dense_plan(model)


def test_numbers_out_of_range_are_refused() -> None:
    for wrong in ({"margin": 0.0}, {"least": 5, "most": 4}, {"smoothing_s": 0.0}):
        with pytest.raises(ConfigError):
            saber(SERVED, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        limited(SERVED, policy=lambda served: Fixed(dense_plan(TINY)), max_waiting=-1)
    with pytest.raises(ConfigError):
        adaptive_precision(SERVED, calm=1.0)
    with pytest.raises(ConfigError):
        adaptive_pruning(SERVED, order=ORDER, step=3, most=2)
