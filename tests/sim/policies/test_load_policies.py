"""Admission limits and policies that follow load: their decisions on states built by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from sim.config import CONF_DIR
from sim.cost.memory import weight_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import check_plan, dense_plan
from sim.engine.protocol import EngineState
from sim.errors import ConfigError, PlanError
from sim.policies.admission import WAIT_STEP_S, Limited, limited, saber
from sim.policies.base import PolicyContext
from sim.policies.fixed import Fixed
from sim.policies.ladder import load_ladder, memory_ladder
from sim.policies.load_table import load_table
from sim.policies.pressure import adaptive_precision, adaptive_pruning, kv_precision
from tests.sim.serving import TINY, tiny_engine

SERVED = PolicyContext(model=TINY)
STATE = tiny_engine().run_until(0.0)
ORDER = ["MHA1", "FFN1", "FFN2", "MHA0"]


def seen(**changed: Any) -> EngineState:
    return dataclasses.replace(STATE, **{"kv_layer_blocks": 100, "kv_used_layer_blocks": 0, **changed})


def always_dense(served: PolicyContext) -> Fixed:
    return Fixed(dense_plan(served.model))


def test_saber_rejects_a_request_when_its_first_token_can_no_longer_come_in_time() -> None:
    policy = saber(SERVED, policy=always_dense, ttft_s=2.0, margin=0.75, smoothing_s=1e-6)
    assert policy.first_plan.max_wait_s == 1.5  # nothing is known yet
    assert policy(seen(time_s=0.0)).max_wait_s == 1.5
    # Ten first tokens after 0.4 s each, without a queue: 1.6 s are left, and three quarters of them used.
    plan = policy(seen(time_s=1.0, first_tokens=10, ttft_sum_s=4.0))
    assert plan.max_wait_s == pytest.approx(0.75 * 1.6)  # 1.2 s
    assert dataclasses.replace(plan, max_wait_s=None) == dense_plan(TINY)
    # The next ten took 1.3 s, of which 1 s in the queue: 0.8 and 1.2 s at its head before and after.
    policy(seen(time_s=2.0, first_tokens=10, ttft_sum_s=4.0, waiting=5, oldest_wait_s=0.8))
    late = seen(time_s=3.0, first_tokens=20, ttft_sum_s=17.0, waiting=5, oldest_wait_s=1.2)
    assert policy(late).max_wait_s == pytest.approx(1.25)  # three quarters of 1.7 s, down to a multiple of 0.05 s
    # No first token in an interval says nothing; one that took longer than the target leaves the least wait.
    assert policy(dataclasses.replace(late, time_s=4.0)).max_wait_s == pytest.approx(1.25)
    slow = dataclasses.replace(late, time_s=5.0, first_tokens=21, ttft_sum_s=30.0)
    assert policy(slow).max_wait_s == WAIT_STEP_S


def test_saber_never_lets_a_request_wait_longer_than_the_policy_that_it_follows() -> None:
    inner = Fixed(dataclasses.replace(dense_plan(TINY), max_wait_s=0.5, max_waiting=3))
    policy = saber(SERVED, policy=lambda served: inner, margin=0.75)
    assert policy(seen(time_s=0.0)) == inner.first_plan


def test_saber_limits_how_many_run_by_the_line_through_what_iterations_took() -> None:
    policy = saber(SERVED, policy=always_dense, tpot_s=0.1, margin=0.5)
    assert policy(seen(time_s=0.0, running=10)).max_running is None
    first = seen(time_s=1.0, running=10, iterations=50, busy_s=1.0)  # 20 ms per iteration at 10 running requests
    assert policy(first).max_running is None  # one point is no line
    # 30 ms at 20, on average between the two states: 10 ms and 1 ms for each request, so 40 keep half of 100 ms.
    assert policy(seen(time_s=2.0, running=30, iterations=80, busy_s=1.9)).max_running == 40


def test_the_earlier_form_lets_as_many_wait_as_get_their_first_token_in_time() -> None:
    policy = saber(SERVED, policy=always_dense, limit="requests", ttft_s=2.0, margin=0.5, most=50, smoothing_s=1e-6)
    assert policy(seen(time_s=0.0, waiting=5)).max_waiting == 50  # nothing is known yet
    assert policy(seen(time_s=1.0, waiting=5, first_tokens=10)).max_waiting == 10  # 10 a second, half of two seconds
    assert policy(seen(time_s=2.0, waiting=5, first_tokens=14)).max_waiting == 4
    assert policy(seen(time_s=3.0, waiting=0, first_tokens=15)).max_waiting == 4  # without a queue speed says nothing
    assert policy(seen(time_s=4.0, waiting=9, first_tokens=15)).max_waiting == 4
    assert policy(seen(time_s=5.0, waiting=9, first_tokens=15)).max_waiting == 1  # at a standstill, the least


def test_a_wrapped_policy_can_be_named() -> None:
    served = PolicyContext(model=load_model("llama2_7b"))
    named = saber(served, policy="int4")
    assert named.first_plan.weight_bits == (4,) * 32
    stop = limited(served, policy={"name": "greedy_stop", "headroom": 1.2, "patience": 7}, max_wait_s=1.0)
    assert (stop.first_plan.max_wait_s, stop.policy.headroom, stop.policy.patience) == (1.0, 1.2, 7)  # type: ignore[attr-defined]
    both = saber(served, policy={"name": "limited", "max_wait_s": 0.5, "policy": {"name": "int4"}})
    assert (both.first_plan.max_wait_s, both.first_plan.weight_bits) == (0.5, (4,) * 32)
    with pytest.raises(ConfigError, match="takes no 'headrom'; did you mean 'headroom'"):
        saber(served, policy={"name": "greedy_stop", "headrom": 1.2})
    with pytest.raises(ConfigError, match="there is no policy=int5; did you mean 'int8'"):
        saber(served, policy="int5")
    with pytest.raises(ConfigError, match=r"policy\.policy is 3; name a file of conf/policy"):
        saber(served, policy=3)


def test_a_limit_changes_nothing_else_of_another_policys_plan() -> None:
    inner = Fixed(dataclasses.replace(dense_plan(TINY), weight_bits=(4, 4, 4)))
    policy = limited(SERVED, policy=lambda served: inner, max_waiting=3)
    assert isinstance(policy, Limited)
    assert policy(seen()) == policy.first_plan == dataclasses.replace(inner.first_plan, max_waiting=3)


def test_a_limit_in_seconds_leaves_the_count_of_the_other_policy() -> None:
    inner = Fixed(dataclasses.replace(dense_plan(TINY), max_waiting=7))
    policy = limited(SERVED, policy=lambda served: inner, max_wait_s=1.5)
    assert policy(seen()) == policy.first_plan == dataclasses.replace(inner.first_plan, max_wait_s=1.5)


def test_a_limit_of_running_requests_may_stand_alone_and_is_at_least_one() -> None:
    inner = Fixed(dataclasses.replace(dense_plan(TINY), max_waiting=7))
    policy = limited(SERVED, policy=lambda served: inner, max_running=5)
    assert policy(seen()) == policy.first_plan == dataclasses.replace(inner.first_plan, max_running=5)
    for value in (0, 1.5, True, "3"):
        with pytest.raises(ConfigError, match=r"policy\.max_running .* at least 1 running request"):
            limited(SERVED, policy=lambda served: inner, max_running=value)  # type: ignore[arg-type]


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


def test_kv_falls_to_8_bits_and_then_layer_by_layer_to_4() -> None:
    policy = kv_precision(SERVED, low_layers=[1, 3], calm=0.5, smoothing=1.0)
    chosen = [policy(seen(kv_used_layer_blocks=used)).kv_bits for used in (0, 60, 80, 100, 100, 60)]
    assert chosen == [(16, 16, 16), (8, 8, 8), (4, 8, 8), (4, 4, 4), (4, 4, 4), (8, 8, 8)]
    assert len(kv_precision(SERVED).plans) == 2
    for wrong in ([2, 1], [4], [0]):
        with pytest.raises(ConfigError, match=r"policy\.low_layers is .* must ascend and lie between 1 and 3"):
            kv_precision(SERVED, low_layers=wrong)


def test_kv_returns_to_16_bits_after_calm() -> None:
    policy = kv_precision(SERVED, low_layers=[1, 3], calm=0.5)
    assert [policy(seen(kv_used_layer_blocks=100)).kv_bits for _ in range(5)][-1] == (4, 4, 4)
    calm = [policy(seen()).kv_bits for _ in range(8)]
    assert calm[3] == (8, 8, 8)
    assert calm[-1] == (16, 16, 16)
    assert policy.pressure > 0.0  # smoothed pressure halves, and never reaches 0
    assert {policy(seen()).kv_bits for _ in range(100)} == {(16, 16, 16)}
    # With this hysteresis the second level could not fall either.
    lazy = kv_precision(SERVED, low_layers=[1, 3], calm=0.5, smoothing=1.0, hysteresis=1.5)
    assert lazy(seen(kv_used_layer_blocks=80)).kv_bits == (4, 8, 8)
    assert lazy(seen(kv_used_layer_blocks=40)).kv_bits == (16, 16, 16)


def test_a_load_near_calm_does_not_change_the_bits_of_kv_at_every_step() -> None:
    policy = kv_precision(SERVED, low_layers=[1, 3], calm=0.5, smoothing=1.0)

    def bits(*used: int) -> list[int]:  # 0.06 levels per 0.01 of load above calm
        return [policy(seen(kv_layer_blocks=1000, kv_used_layer_blocks=load)).kv_bits[0] for load in used]

    assert bits(500, 510, 500, 515) == [16, 16, 16, 16]
    assert bits(520, 515, 510, 520) == [8, 8, 8, 8]
    assert bits(505, 510, 515) == [16, 16, 16]


def test_pressure_drops_blocks_of_the_order_step_by_step_and_only_after_it_persisted() -> None:
    policy = adaptive_pruning(SERVED, order=ORDER, step=2, most=4, smoothing=1.0)
    pressed = [policy(seen(oldest_wait_s=1.0)) for _ in range(6)]
    dropped = [plan.decode.mha.count(False) + plan.decode.ffn.count(False) for plan in pressed]
    assert dropped == [0, 0, 2, 2, 2, 4]
    relaxed = [policy(seen()) for _ in range(5)]
    assert relaxed[-1].decode.mha.count(False) + relaxed[-1].decode.ffn.count(False) == 2


def test_a_memory_ladder_lowers_precision_before_it_drops_a_block() -> None:
    policy = memory_ladder(SERVED, order=ORDER, low_layers=[1, 3], drops=[2], headroom=1.0, restore_headroom=1.0)
    sizes = policy.weights_bytes
    assert list(sizes) == sorted(sizes, reverse=True)
    chosen = [policy(seen(budget_bytes=size, next_budget_bytes=size)) for size in sizes]
    assert [plan.weight_bits.count(4) for plan in chosen] == [0, 1, 3, 3]
    assert [plan.decode.mha.count(False) + plan.decode.ffn.count(False) for plan in chosen] == [0, 0, 0, 2]
    assert policy(seen(budget_bytes=1, next_budget_bytes=1)) == chosen[-1]


def test_a_load_ladder_passes_over_plans_that_do_not_fit_the_budget() -> None:
    policy = load_ladder(SERVED, order=ORDER, low_layers=[1, 3], drops=[2], smoothing=1.0)
    sizes = policy.weights_bytes
    for level, size in enumerate(sizes):
        assert policy(seen(budget_bytes=size, next_budget_bytes=size)) == policy.plans[level]
    assert policy(seen(budget_bytes=1, next_budget_bytes=1)) == policy.plans[-1]
    roomy = seen(budget_bytes=sizes[0], next_budget_bytes=sizes[2])  # the announced decrease counts
    assert policy(roomy) == policy.plans[2]
    assert policy(dataclasses.replace(roomy, next_budget_bytes=sizes[0])) in policy.plans[:2]


def test_waits_do_not_count_while_prefill_is_the_bottleneck() -> None:
    waits = {"oldest_wait_s": 5.0, "waiting": 3, "budget_bytes": 10**12, "next_budget_bytes": 10**12}
    for prefill_tokens, low in ((None, 3), (200, 0), (300, 3)):
        policy = load_ladder(SERVED, low_layers=[3], smoothing=1.0, prefill_tokens=prefill_tokens)
        policy(seen(time_s=0.0, **{**waits, "oldest_wait_s": 0.0}))
        # 10 iterations compute 2,300 tokens of admitted prompts and produce 100: 240 for each.
        later = {"arrived_prompt_tokens": 3000, "waiting_tokens": 700, "produced_tokens": 100, "iterations": 10}
        assert policy(seen(time_s=1.0, **waits, **later)).weight_bits.count(4) == low
    full = {**waits, "kv_used_layer_blocks": 100}
    policy = load_ladder(SERVED, low_layers=[3], smoothing=1.0, prefill_tokens=200)
    policy(seen(time_s=0.0, **waits))
    assert policy(seen(time_s=1.0, **full, **later)).weight_bits.count(4) == 3  # memory counts all the same


def test_a_load_table_is_read_by_budget_and_arrival_rate() -> None:
    dense_bytes = weight_bytes(TINY, dense_plan(TINY))
    policy = load_table(
        SERVED,
        order=ORDER,
        table=[[[2, 3], [2, 3]], [[0, 0], [0, 3]]],
        rates=[100.0],
        budgets=[2.0],
        margin=0.2,
        smoothing_s=1e-6,
    )
    assert policy.first_plan == dense_plan(TINY)
    found, tokens = [], 0
    # A rate that is 20 % above the edge changes the column, and one 20 % below it changes it back.
    for time_s, rate in enumerate((50, 119, 121, 81, 79), start=1):
        tokens += rate
        large = {"budget_bytes": 2 * dense_bytes, "next_budget_bytes": 2 * dense_bytes}
        found.append(policy(seen(time_s=float(time_s), arrived_prompt_tokens=tokens, **large)).weight_bits.count(4))
    assert found == [0, 0, 3, 3, 0]
    small = seen(time_s=5.0, arrived_prompt_tokens=tokens, budget_bytes=2 * dense_bytes, next_budget_bytes=1)
    assert policy(small) == policy.plans[0][0] != policy.first_plan


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"rates": [2.0, 1.0]}, r"policy\.rates is \[2\.0, 1\.0\]; the edges must"),
        ({"budgets": [True]}, r"policy\.budgets is \[True\]"),
        ({"table": [[[0, 0]]]}, "1 rows of \\[1\\] entries; 1 budgets and 1 rates need 2 rows of 2"),
        ({"table": [[[0, 0], [0, 9]], [[0, 0], [0, 0]]]}, "tiny has 3 layers"),
        ({"table": [[[0, 0], [9, 0]], [[0, 0], [0, 0]]]}, "at most 4 blocks"),
        ({"margin": 1.0}, r"policy\.margin is 1\.0"),
    ],
)
def test_a_load_table_that_does_not_fit_its_edges_is_refused(wrong: dict[str, Any], named: str) -> None:
    right: dict[str, Any] = {"rates": [1.0], "budgets": [1.0], "table": [[[0, 0], [0, 3]], [[0, 0], [0, 0]]]}
    with pytest.raises((ConfigError, PlanError), match=named):
        load_table(SERVED, order=ORDER, **{**right, **wrong})


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"low_layers": [2, 1]}, r"policy\.low_layers is \[2, 1\]; the numbers must ascend"),
        ({"low_layers": [4]}, "between 1 and 3"),
        ({"drops": [5]}, "between 1 and 4"),
        ({}, "policy.low_layers and policy.drops are empty"),
        ({"drops": [1], "prefill_tokens": 0}, "policy.prefill_tokens is 0"),
    ],
)
def test_a_ladder_that_does_not_go_down_is_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_ladder(SERVED, order=ORDER, **wrong)


@pytest.mark.parametrize(
    "name",
    [
        "saber",
        "adaptive_precision",
        "adaptive_pruning",
        "kv_precision",
        "nestedfp",
        "limited",
        "greedy_stop",
        "morphserve",
        "memory_ladder",
        "load_ladder",
        "load_table",
    ],
)
def test_every_file_builds_its_policy_and_starts_dense_but_for_the_queue(name: str) -> None:
    node = OmegaConf.load(CONF_DIR / "policy" / f"{name}.yaml")
    model = load_model("llama2_7b")
    policy = instantiate(node, _convert_="all")(PolicyContext(model=model))
    assert dataclasses.replace(policy.first_plan, max_waiting=None, max_wait_s=None) == dense_plan(model)


def test_numbers_out_of_range_are_refused() -> None:
    for wrong, named in (
        ({"margin": 0.0}, "margin 0.0"),
        ({"least": 5, "most": 4}, "least 5, most 4"),
        ({"smoothing_s": 0.0}, "smoothing_s 0.0"),
        ({"tpot_s": 0.0}, "policy.tpot_s is 0.0"),
        ({"tpot_s": 0.1, "limit": "requests"}, "policy.limit=requests"),
        ({"limit": "second"}, "did you mean 'seconds'"),
    ):
        with pytest.raises(ConfigError, match=named):
            saber(SERVED, policy=always_dense, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        limited(SERVED, policy=lambda served: Fixed(dense_plan(TINY)), max_waiting=-1)
    with pytest.raises(ConfigError):
        adaptive_precision(SERVED, calm=1.0)
    with pytest.raises(ConfigError):
        adaptive_pruning(SERVED, order=ORDER, step=3, most=2)
