"""Policies that let requests keep hidden states: by pressure, and by Apt-Serve's comparison of what both are worth."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from sim.config import CONF_DIR
from sim.cost.latency import load_calibration
from sim.cost.latency_tables import KV_SHARE
from sim.engine.protocol import EngineState
from sim.engine.server_spec import ServerSpec
from sim.errors import ConfigError, PlanError
from sim.policies.apt_serve import AptServe, apt_serve
from sim.policies.base import PolicyContext
from sim.policies.pressure import hidden_cache
from tests.sim.engine.kernel_cases import without_gqa
from tests.sim.serving import TINY, tiny_engine

SERVED = PolicyContext(model=without_gqa(TINY))
SERVER = ServerSpec.from_names(model="llama2_7b", gpu="a100_80gb", latency="llama2_7b_a100_trtllm")
STATE = tiny_engine().run_until(0.0)


def seen(**changed: Any) -> EngineState:
    """Return a state of a pool of 100 KV blocks."""
    return dataclasses.replace(STATE, **{"kv_layer_blocks": 100, **changed})


def test_hidden_states_are_kept_under_pressure_and_no_more_after_calm() -> None:
    policy = hidden_cache(SERVED, calm=0.5, smoothing=1.0)
    assert not policy.first_plan.kv_hidden
    chosen = [policy(seen(kv_used_layer_blocks=used)).kv_hidden for used in (0, 40, 80, 100, 60, 40)]
    assert chosen == [False, False, True, True, True, False]
    waiting = hidden_cache(SERVED, calm=0.5, smoothing=1.0, wait_s=2.0)
    assert [waiting(seen(oldest_wait_s=wait_s)).kv_hidden for wait_s in (0.9, 2.0)] == [False, True]


def test_no_further_hidden_states_are_kept_while_iterations_are_slow() -> None:
    policy = hidden_cache(SERVED, calm=0.5, smoothing=1.0, tpot_s=0.05)
    moments = (
        (10, 0.1),
        (20, 0.5),
        (20, 0.5),
        (30, 1.1),
        (40, 1.5),
    )  # iterations and their seconds: 40, 60, 40 ms each
    chosen = [policy(seen(kv_used_layer_blocks=100, iterations=n, busy_s=s)).kv_hidden for n, s in moments]
    assert chosen == [True, True, True, False, True]


def apt_state(wait_s: float, running_tokens: int, *, pool_tokens: int = 20_000) -> EngineState:
    """Return a state of Llama-2-7B with 10 waiting requests of 1,000 tokens, 30 running ones and a pool."""
    return seen(
        waiting=10,
        waiting_tokens=10_000,
        running=30,
        running_tokens=running_tokens,
        oldest_wait_s=wait_s,
        kv_layer_blocks=pool_tokens // 16 * 32,
    )


def test_apt_serve_keeps_hidden_states_if_half_of_the_wait_exceeds_the_delay_that_they_mean_for_all() -> None:
    policy = apt_serve(PolicyContext.of(SERVER))
    assert isinstance(policy, AptServe)
    token_s = 32 * KV_SHARE * load_calibration("llama2_7b_a100_trtllm").linear_s("mha", 16, 4096) / 4096
    assert policy.token_s == pytest.approx(token_s)
    delay_s = 40 * 1000 * token_s  # 40 requests wait for 1,000 tokens
    assert 0.2 < delay_s < 0.5
    assert [policy(apt_state(factor * delay_s, 15_000)).kv_hidden for factor in (1.9, 2.1)] == [False, True]


def test_apt_serve_keeps_keys_and_values_where_all_of_them_fit() -> None:
    policy = apt_serve(PolicyContext.of(SERVER))
    assert [policy(apt_state(10.0, tokens)).kv_hidden for tokens in (10_000, 10_001)] == [False, True]
    assert not policy(dataclasses.replace(apt_state(0.0, 90_000), waiting=0, waiting_tokens=0)).kv_hidden


@pytest.mark.parametrize("name", ["hidden_cache", "apt_serve"])
def test_the_files_build_their_policies_for_a_model_without_gqa_alone(name: str) -> None:
    node = OmegaConf.load(CONF_DIR / "policy" / f"{name}.yaml")
    policy = instantiate(node, _convert_="all")(PolicyContext.of(SERVER))
    assert [plan.kv_hidden for plan in policy.plans] == [False, True]
    grouped = ServerSpec.from_names(model="llama3.1_8b", gpu="h100_80gb")
    with pytest.raises(PlanError, match="no GQA"):
        instantiate(node, _convert_="all")(PolicyContext.of(grouped))


def test_numbers_out_of_range_and_a_server_without_prices_are_refused() -> None:
    for wrong in (0.0, -1.0, float("nan"), "0.1"):
        with pytest.raises(ConfigError, match=r"policy\.tpot_s is .*; it must be seconds above 0, or null"):
            hidden_cache(SERVED, tpot_s=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"calm is 1\.0"):
        hidden_cache(SERVED, calm=1.0)
    with pytest.raises(ConfigError, match="needs a server with a calibration"):
        apt_serve(SERVED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calm": 1.0}, "policy.calm is 1.0; it must be a finite number from 0 to below 1"),
        ({"calm": "abc"}, "policy.calm is 'abc'"),
        ({"wait_s": math.nan}, "policy.wait_s is nan; it must be a finite number of seconds above 0"),
        ({"smoothing": None}, "policy.smoothing is None; it must be a finite number above 0, at most 1"),
        ({"hysteresis": math.inf}, "policy.hysteresis is inf; it must be a finite number from 0 on"),
    ],
)
def test_numbers_of_pressure_are_refused_one_by_one(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hidden_cache(PolicyContext.of(SERVER), **options)
