"""How policies decide: at once when memory runs out, patiently when it is back, never knowing an output length."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.cost.memory import kv_block_layer_bytes, weight_bytes
from sim.cost.plan import Plan, dense_plan, describe
from sim.engine.budget import Budget
from sim.engine.protocol import EngineState
from sim.engine.transition import peak_weight_bytes
from sim.errors import ConfigError, PlanError
from sim.policies.admission import limited, saber
from sim.policies.base import PolicyContext
from sim.policies.fixed import fixed
from sim.policies.greedy_stop import GreedyStop, greedy_stop, random_stop
from sim.policies.morphserve import MODES, MorphServe, morphserve
from sim.policies.pressure import adaptive_precision, adaptive_pruning
from sim.policies.schedule import schedule
from tests.sim.serving import TINY, requests, tiny_engine

SERVED = PolicyContext(model=TINY, workspace_bytes=0, kv_block_tokens=4)
ORDER = ["MHA1", "FFN1", "FFN2"]
DENSE_BYTES = weight_bytes(TINY, dense_plan(TINY))
STATE = tiny_engine().run_until(0.0)


def seen(budget_bytes: int, running_tokens: int = 0, **changed: object) -> EngineState:
    budgets = {"next_budget_bytes": budget_bytes, **changed}
    return dataclasses.replace(STATE, budget_bytes=budget_bytes, running_tokens=running_tokens, **budgets)


def greedy(**changed: float) -> GreedyStop:
    return greedy_stop(SERVED, order=ORDER, **changed)  # type: ignore[arg-type]


def need(policy: GreedyStop, point: int, tokens: int, headroom: float = 1.1) -> int:
    kv = headroom * tokens * policy.mha_blocks[point] * policy.kv_bytes_per_token_layer
    return math.ceil(policy.weights_bytes[point] + kv)


@given(tokens=st.integers(0, 5000), point=st.integers(0, 3))
def test_it_stops_at_the_first_plan_that_fits(tokens: int, point: int) -> None:
    policy = greedy()
    assert policy(seen(need(policy, point, tokens), tokens)) == policy.plans[point]
    if point:
        assert greedy()(seen(need(policy, point - 1, tokens) - 1, tokens)) != policy.plans[point - 1]


@given(budget=st.integers(1, 2 * DENSE_BYTES), less=st.integers(0, DENSE_BYTES), tokens=st.integers(0, 5000))
def test_more_pressure_never_keeps_more(budget: int, less: int, tokens: int) -> None:
    easy, hard = greedy(), greedy()
    easy(seen(budget, tokens))
    hard(seen(max(1, budget - less), tokens + 10))
    assert easy.dropped <= hard.dropped


def test_the_full_order_is_dropped_when_nothing_fits() -> None:
    policy = greedy()
    assert policy(seen(1, 100)) == policy.plans[-1]


def test_blocks_come_back_only_after_patience_in_a_row() -> None:
    policy = greedy(patience=3)
    policy(seen(1))
    assert [policy(seen(10 * DENSE_BYTES)) == policy.plans[0] for _ in range(3)] == [False, False, True]
    policy(seen(1))
    for budget in (10 * DENSE_BYTES, 10 * DENSE_BYTES, 1, 10 * DENSE_BYTES, 10 * DENSE_BYTES):
        assert policy(seen(budget)) == policy.plans[-1]


def test_between_both_headrooms_nothing_changes() -> None:
    policy = greedy(patience=1)
    policy(seen(need(policy, 1, 1000), 1000))
    assert policy.dropped == 1
    between = need(policy, 0, 1000, 1.2)
    assert policy(seen(between, 1000)) == policy(seen(between, 1000)) == policy.plans[1]


def test_an_announced_smaller_budget_counts_already_and_a_larger_one_not_yet() -> None:
    policy = greedy(patience=1)
    assert policy(seen(10 * DENSE_BYTES, next_budget_bytes=1)) == policy.plans[-1]
    assert policy(seen(1, next_budget_bytes=10 * DENSE_BYTES)) == policy.plans[-1]


@pytest.mark.parametrize(
    ("order", "named"), [(["MHA9"], "MHA9"), (["MHA1", "MHA1"], "MHA1"), (["ATT1"], "ATT1"), (["FFN"], "FFN")]
)
def test_an_order_of_blocks_that_are_not_there_names_the_block(order: list[str], named: str) -> None:
    with pytest.raises(PlanError, match=named):
        greedy_stop(SERVED, order=order)


def test_a_restore_headroom_below_the_other_would_swing_and_is_refused() -> None:
    with pytest.raises(ConfigError, match="restore_headroom"):
        greedy(headroom=1.5, restore_headroom=1.2)


def test_a_queue_counts_up_to_a_share_of_the_budget_however_long_it_is() -> None:
    state = seen(need(greedy(), 0, 0) + 100_000, waiting_tokens=10)
    endless = dataclasses.replace(state, waiting_tokens=10**9)
    assert greedy(waiting_share=1.0)(state) == greedy().plans[0]
    assert greedy(waiting_share=1.0, waiting_most=1.0)(endless) == greedy().plans[-1]
    assert greedy(waiting_share=1.0, waiting_most=0.0)(endless) == greedy().plans[0]
    with pytest.raises(ConfigError, match="waiting_most"):
        greedy(waiting_most=1.5)


def random_plans(seed: int) -> list[Plan]:
    """Return the plans of a random policy in twenty shortages of memory, with calm between them."""
    policy = random_stop(
        PolicyContext(model=dataclasses.replace(TINY, num_layers=12)), seed=seed, max_dropped=5, patience=1
    )
    plans = []
    for _ in range(20):
        plans.append(policy(seen(1)))
        assert policy(seen(10**12)) == policy.first_plan
    return plans


def test_random_drops_other_blocks_each_time_by_its_seed_and_spares_first_and_last_layer() -> None:
    plans = random_plans(1)
    assert len(set(plans)) > 15
    assert plans == random_plans(1) != random_plans(2)
    for plan in plans:
        assert all(kept[0] and kept[-1] for kept in (plan.decode.mha, plan.decode.ffn))
        assert plan.decode.mha.count(False) + plan.decode.ffn.count(False) == 5


def test_random_keeps_its_order_while_any_block_is_out() -> None:
    policy = random_stop(
        PolicyContext(model=dataclasses.replace(TINY, num_layers=12)), seed=1, max_dropped=5, patience=1
    )
    order = policy.current.plans
    dense = policy.current.weights_bytes[0]
    for budget in (dense - 1, 1, dense - 1, 1):
        assert policy(seen(budget)) in order[1:]


def sample(kv_share: float, wait_s: float = 0.0) -> EngineState:
    return dataclasses.replace(
        STATE,
        kv_layer_blocks=1000,
        kv_used_layer_blocks=int(1000 * kv_share),
        oldest_wait_s=wait_s,
        budget_bytes=10**12,
        next_budget_bytes=10**12,
    )


def controller(mode: str = "default") -> MorphServe:
    return morphserve(PolicyContext(model=dataclasses.replace(TINY, num_layers=32)), mode=mode, smoothing=1.0)


@pytest.mark.parametrize("mode", list(MODES))
def test_pressure_swaps_layers_every_third_sample_up_to_the_mode_s_limit(mode: str) -> None:
    policy, (step, most) = controller(mode), MODES[mode]
    swapped = [sum(bits == 4 for bits in policy(sample(0.9)).weight_bits) for _ in range(30)]
    assert swapped == [min(step * (i // 3), most) for i in range(1, 31)]


def test_layers_come_back_every_fifth_calm_sample_the_last_swapped_first() -> None:
    policy = controller()
    for _ in range(12):
        policy(sample(0.9))
    bits = [policy(sample(0.5)).weight_bits for _ in range(20)]
    assert [row.count(4) for row in bits] == [8 - 2 * (i // 5) for i in range(1, 21)]
    assert bits[4][:6] == (4,) * 6


def test_layers_come_back_only_as_far_as_they_fit_with_the_kv_in_use() -> None:
    """One at a time if two do not fit; none if not even one does; the controller forgets nothing meanwhile."""
    policy = controller()
    for _ in range(6):
        policy(sample(0.9))
    assert policy.swapped == 4
    model, held = policy.served.model, 500 * kv_block_layer_bytes(policy.served.model, 16)
    three = peak_weight_bytes(model, policy.plans[4], policy.plans[3]) + held
    for budget, swapped in ((three - 1, 4), (three, 3), (10**12, 1)):
        calm = dataclasses.replace(sample(0.5), budget_bytes=budget, next_budget_bytes=budget)
        for _ in range(5):
            policy(calm)
        assert policy.swapped == swapped


def test_pressure_that_does_not_persist_or_lies_between_changes_nothing() -> None:
    policy = controller()
    assert all(policy(sample(share)) == policy.first_plan for share in (0.9, 0.9, 0.7, 0.9, 0.9, 0.7))


def test_a_queue_delay_is_pressure_too() -> None:
    policy = controller()
    plans = [policy(sample(0.1, wait_s=0.2)) for _ in range(3)]
    assert plans[-1].weight_bits.count(4) == 2


def test_an_unknown_mode_or_layer_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
        morphserve(SERVED, mode="acuracy")
    with pytest.raises(PlanError, match="layers 0 to 2"):
        morphserve(SERVED, order=[0, 3])
    with pytest.raises(ConfigError, match="order is empty"):
        morphserve(SERVED, order=[])


def test_a_schedule_runs_the_latest_plan_whose_time_has_come() -> None:
    policy = schedule(SERVED, steps=[{"at_s": 0}, {"at_s": 5, "drop_mha": [1]}])
    at = [policy(dataclasses.replace(STATE, time_s=time_s)) for time_s in (0.0, 4.9, 5.0, 99.0)]
    assert at == [policy.plans[0], policy.plans[0], policy.plans[1], policy.plans[1]]


def test_a_schedule_must_begin_at_zero_and_ascend() -> None:
    for steps in ([], [{"at_s": 1}], [{"at_s": 0}, {"at_s": 0}]):
        with pytest.raises(ConfigError, match="at_s"):
            schedule(SERVED, steps=steps)
    with pytest.raises(PlanError, match="MHA7"):
        schedule(SERVED, steps=[{"at_s": 0, "drop_mha": [7]}])


def test_a_fixed_plan_takes_options_and_an_unknown_one_names_the_nearest() -> None:
    plan = fixed(
        SERVED, drop_mha=[1], prefill_drop_mha=[], kv_first_tokens=4, kv_last_tokens=8, kv_layers=[2]
    ).first_plan
    assert describe(plan) == "decode -MHA 1; KV 4+8 2"
    with pytest.raises(PlanError, match="did you mean 'drop_mha'"):
        fixed(PolicyContext(model=TINY), drop_mah=[1])
    with pytest.raises(PlanError, match="layer 7 does not exist"):
        fixed(PolicyContext(model=TINY), kv_first_tokens=4, kv_last_tokens=8, kv_layers=[7])
    with pytest.raises(PlanError, match="kv_layers shortens nothing alone; add kv_first_tokens"):
        fixed(PolicyContext(model=TINY), kv_layers=[0])


def test_greedy_stop_serves_under_a_budget_that_dense_cannot_meet() -> None:
    """On the engine: the budget falls below the dense weights, and serving continues."""
    weights = weight_bytes(TINY, dense_plan(TINY))
    low = Budget((0.0, 5.0, 60.0), (weights + 60_000, weights - 5_000, weights + 60_000))
    finished = {}
    for name in ("dense", "greedy_stop"):
        engine = tiny_engine(budget=low, host_to_device_bytes_per_s=1e9)
        policy = greedy_stop(PolicyContext(model=TINY, kv_block_tokens=4), order=["MHA1", "FFN2", "MHA0", "FFN0"])
        engine.submit(requests(*[(float(i), 8, 6) for i in range(0, 40, 4)]))
        for k in range(1, 40):
            seen = engine.run_until(float(k))
            if name == "greedy_stop":
                engine.apply(policy(seen))
        finished[name] = engine.run_until(40.0).finished
        engine.run_until(math.inf)
    assert finished["greedy_stop"] > finished["dense"] + 4


def test_morphserve_swaps_to_precisions_that_exist() -> None:
    with pytest.raises(PlanError, match="3"):
        morphserve(PolicyContext(model=TINY), bits=3)


def test_an_order_measured_on_another_model_is_refused() -> None:
    with pytest.raises(PlanError, match="measured on llama2_7b, not on tiny"):
        greedy_stop(PolicyContext(model=TINY), order=["MHA1"], made_for="llama2_7b")


@pytest.mark.parametrize("value", [1.0, True, "1", math.nan, 2**31], ids=repr)
def test_counts_of_a_policy_are_whole_numbers(value: Any) -> None:
    dense = {"_target_": "sim.policies.fixed.fixed", "_partial_": True}
    for make in (
        lambda: limited(SERVED, policy=dense, max_waiting=value),
        lambda: saber(SERVED, policy=dense, least=value),
        lambda: saber(SERVED, policy=dense, most=value),
        lambda: adaptive_precision(SERVED, levels=value),
        lambda: adaptive_pruning(SERVED, order=ORDER, step=value, most=3),
        lambda: morphserve(SERVED, order=[value]),
    ):
        with pytest.raises((ConfigError, PlanError)):
            make()


@pytest.mark.parametrize("at_s", [math.nan, math.inf, True, "5", None], ids=repr)
def test_the_times_of_a_schedule_are_numbers_that_ascend(at_s: Any) -> None:
    with pytest.raises(ConfigError, match=r"policy\.steps have at_s"):
        schedule(SERVED, steps=[{"at_s": 0}, {"at_s": at_s}])
