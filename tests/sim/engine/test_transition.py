"""Plan changes while serving: what is dropped when, what is copied in when, and what it costs."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.cost.memory import ffn_weight_bytes, layer_weight_bytes, mha_weight_bytes, weight_bytes
from sim.cost.plan import KeepMask, KVKeep, Plan, dense_plan, describe, drop, with_mask
from sim.engine.budget import Budget
from sim.engine.sim_engine import SimEngine
from sim.engine.transition import (
    ABSENT,
    copies_between,
    joined,
    peak_weight_bytes,
    resident_of,
    running_plan,
    without_dropped,
)
from sim.errors import BudgetError, PlanError
from sim.results.records import Status
from tests.sim.serving import TINY, linear_latency, requests, tiny_engine

DENSE = dense_plan(TINY)
NO_MHA1 = with_mask(DENSE, drop(TINY, mha=[1]))
NO_FFN1 = with_mask(DENSE, drop(TINY, ffn=[1]))
W4 = dataclasses.replace(DENSE, weight_bits=(4, 16, 16))
MHA_BYTES, FFN_BYTES = mha_weight_bytes(TINY), ffn_weight_bytes(TINY)


def plans() -> st.SearchStrategy[Plan]:
    flags = st.lists(st.booleans(), min_size=3, max_size=3)

    def make(prefill: list[list[bool]], decode: list[list[bool]], bits: list[int], keep: int) -> Plan:
        mha, ffn = (tuple(p or d for p, d in zip(a, b, strict=True)) for a, b in zip(prefill, decode, strict=True))
        kv_keep = (KVKeep(), KVKeep(first_tokens=2, last_tokens=5), KVKeep(first_tokens=0, last_tokens=3))[keep]
        return Plan(
            decode=KeepMask(mha=tuple(decode[0]), ffn=tuple(decode[1])),
            prefill=KeepMask(mha=mha, ffn=ffn),
            weight_bits=tuple(bits),
            kv_keep=(KVKeep(), kv_keep, kv_keep),
        )

    masks = st.lists(flags, min_size=2, max_size=2)
    bits = st.lists(st.sampled_from([16, 8, 4]), min_size=3, max_size=3)
    return st.builds(make, masks, masks, bits, st.integers(0, 2))


@given(old=plans(), new=plans())
def test_copies_lead_from_any_plan_to_any_other(old: Plan, new: Plan) -> None:
    resident = without_dropped(resident_of(old), new)
    fixed_bytes = weight_bytes(TINY, DENSE) - 3 * layer_weight_bytes(TINY)
    most_bytes = resident.weight_bytes(TINY)
    for copy in copies_between(TINY, resident, new):
        most_bytes = max(most_bytes, resident.weight_bytes(TINY) + copy.copied_bytes)
        after = joined(resident, copy)
        assert after.weight_bytes(TINY) - resident.weight_bytes(TINY) == copy.net_bytes
        assert running_plan(after, new).weight_bits[copy.layer] == new.weight_bits[copy.layer]
        resident = after
    assert resident == resident_of(new)
    assert resident.weight_bytes(TINY) + fixed_bytes == weight_bytes(TINY, new)
    assert peak_weight_bytes(TINY, old, new) == most_bytes + fixed_bytes
    reached = running_plan(resident, new)
    assert (reached.decode, reached.prefill) == (new.decode, new.prefill)


def test_copies_that_free_memory_come_first() -> None:
    old = with_mask(DENSE, drop(TINY, ffn=[0]))
    new = dataclasses.replace(DENSE, weight_bits=(16, 16, 4))
    assert [copy.layer for copy in copies_between(TINY, resident_of(old), new)] == [2, 0]


def test_dropped_blocks_leave_the_device_and_absent_ones_cannot_run() -> None:
    resident = without_dropped(resident_of(DENSE), NO_MHA1)
    assert resident.mha_bits == (16, ABSENT, 16)
    assert running_plan(resident, DENSE).decode.mha == (True, False, True)


def busy(engine: SimEngine, tokens: int = 40) -> SimEngine:
    engine.submit(requests((0.0, 8, tokens), (0.0, 8, tokens)))
    return engine


def test_dropping_an_ffn_block_frees_its_weights_at_the_next_iteration_and_no_kv() -> None:
    engine = busy(tiny_engine())
    before = engine.run_until(2.5)
    engine.apply(NO_FFN1)
    during = engine.run_until(2.9)
    after = engine.run_until(3.5)
    assert during.weight_bytes == before.weight_bytes, "the iteration under way still runs it"
    assert before.weight_bytes - after.weight_bytes == FFN_BYTES
    assert after.kv_used_layer_blocks == before.kv_used_layer_blocks == 2 * 3 * 3
    assert after.kv_layer_blocks > before.kv_layer_blocks


def test_dropping_an_mha_block_frees_its_weights_and_its_kv() -> None:
    engine = busy(tiny_engine())
    before = engine.run_until(2.5)
    engine.apply(NO_MHA1)
    after = engine.run_until(3.5)
    assert before.weight_bytes - after.weight_bytes == MHA_BYTES
    assert (before.kv_used_layer_blocks, after.kv_used_layer_blocks) == (2 * 3 * 3, 2 * 2 * 3)


def test_a_decision_at_the_end_of_an_iteration_holds_for_the_next() -> None:
    engine = busy(tiny_engine())
    engine.run_until(3.0)
    engine.apply(NO_FFN1)
    assert engine.run_until(3.1).plan == NO_FFN1
    assert engine.transitions().time_s.tolist() == [3.0]


def test_an_idle_engine_changes_its_plan_at_once() -> None:
    engine = tiny_engine()
    engine.run_until(1.25)
    engine.apply(NO_FFN1)
    assert engine.run_until(1.5).plan == NO_FFN1
    transitions = engine.transitions()
    assert (transitions.time_s.tolist(), transitions.ready_s.tolist()) == ([1.25], [1.25])


def test_a_restored_block_joins_at_the_first_iteration_after_its_copy_is_complete() -> None:
    speed = FFN_BYTES / 2.25  # the copy takes 2.25 s
    engine = busy(tiny_engine(plan=NO_FFN1, host_to_device_bytes_per_s=speed))
    engine.run_until(3.0)
    engine.apply(DENSE)
    copying = engine.run_until(5.9)
    assert copying.plan == NO_FFN1
    assert copying.target == DENSE
    assert copying.incoming_bytes == FFN_BYTES
    assert engine.run_until(6.5).plan == DENSE
    transitions = engine.transitions()
    assert transitions.ready_s.tolist() == [6.0], "its copy ended at 5.25, within an iteration"
    assert transitions.bytes_in.tolist() == [FFN_BYTES]


def test_serving_goes_on_slower_while_weights_are_copied_in() -> None:
    engine = busy(tiny_engine(plan=NO_FFN1, host_to_device_bytes_per_s=FFN_BYTES / 3.0, copy_slowdown=0.5))
    engine.run_until(2.0)
    engine.apply(DENSE)
    engine.run_until(20.0)
    lengths = np.diff(engine.iterations().end_s)
    assert lengths[:5].tolist() == [1.0, 1.5, 1.5, 1.0, 1.0]


def test_a_layer_at_lower_precision_takes_the_place_of_the_old_one() -> None:
    engine = busy(tiny_engine())
    before = engine.run_until(2.0)
    engine.apply(W4)
    copying = engine.run_until(2.001)
    assert copying.incoming_bytes == layer_weight_bytes(TINY, 4)
    after = engine.run_until(9.0)
    assert before.weight_bytes - after.weight_bytes == layer_weight_bytes(TINY, 16) - layer_weight_bytes(TINY, 4)
    assert after.plan.weight_bits == (4, 16, 16)
    row = engine.transitions()
    assert row.bytes_in.tolist() == [layer_weight_bytes(TINY, 4)]
    assert row.bytes_freed.tolist() == [layer_weight_bytes(TINY, 16)]
    assert row.to_plan == ("W4 0",)


def test_a_precision_change_keeps_all_kv_and_preempts_no_request() -> None:
    engine = busy(tiny_engine())
    engine.run_until(2.0)
    engine.apply(W4)
    engine.run_until(math.inf)
    assert engine.records().preemptions.tolist() == [0, 0]
    assert engine.transitions().preempted.tolist() == [0]


def test_the_kv_hole_requests_go_on_without_a_restored_block() -> None:
    """``new_requests``: only requests that are admitted later hold KV of the restored block."""
    engine = busy(tiny_engine(plan=NO_MHA1))
    engine.submit(requests((9.0, 8, 4)))
    engine.run_until(4.0)
    engine.apply(DENSE)
    engine.run_until(10.5)
    assert [len(holder.mha) for holder in engine.holders()] == [2, 2, 3]
    engine.run_until(math.inf)
    records = engine.records()
    assert records.preemptions.tolist() == [0, 0, 0]
    assert records.kept_params_share[2] > records.kept_params_share[0]
    assert records.kept_params_share[2] == 1.0


def test_the_kv_hole_is_filled_by_computing_again() -> None:
    """``recompute``: requests that lack the block are prefilled again, which takes time."""
    engine = busy(tiny_engine(plan=NO_MHA1, restore="recompute"))
    engine.run_until(4.0)
    engine.apply(DENSE)
    engine.run_until(math.inf)
    records, transitions = engine.records(), engine.transitions()
    assert records.preemptions.tolist() == [1, 1]
    assert transitions.preempted.tolist() == [2]
    assert transitions.recomputed_tokens[0] > 16
    assert records.produced_tokens.tolist() == [40, 40]


def test_decode_may_run_less_than_prefill_and_then_holds_less() -> None:
    plan = dataclasses.replace(DENSE, decode=drop(TINY, mha=[1], ffn=[2]))
    engine = busy(tiny_engine(plan=plan))
    engine.submit(requests((1.0, 200, 2)))
    assert engine.run_until(0.5).kv_used_layer_blocks == 2 * 3 * 2, "prefill holds every layer"
    assert engine.run_until(1.0).kv_used_layer_blocks == 2 * 2 * 2, "what decode does not read is left"
    engine.run_until(math.inf)
    assert engine.records().kept_params_share[0] < 1.0


def test_kv_keep_holds_the_first_and_last_tokens_once_prefill_ended() -> None:
    short = KVKeep(first_tokens=4, last_tokens=8)
    plan = dataclasses.replace(DENSE, kv_keep=(KVKeep(), short, short))
    engine = tiny_engine(plan=plan)
    engine.submit(requests((0.0, 40, 9)))
    assert engine.run_until(0.5).kv_used_layer_blocks == 30
    assert engine.run_until(1.0).kv_used_layer_blocks == 10 + 3 + 3
    assert engine.run_until(5.5).kv_used_layer_blocks == 12 + 3 + 3, "45 tokens with the one under way"


def test_kv_keep_shortens_what_attention_reads() -> None:
    short = KVKeep(first_tokens=4, last_tokens=8)
    price = linear_latency(base_s=1.0, context_s=0.01)
    ends = []
    for keep in (KVKeep(), short):
        engine = tiny_engine(plan=dataclasses.replace(DENSE, kv_keep=(keep,) * 3), latency=price)
        engine.submit(requests((0.0, 40, 5)))
        engine.run_until(math.inf)
        ends.append(float(engine.records().finish_s[0]))
    assert ends == pytest.approx([5 + 0.01 * (40 + 41 + 42 + 43), 5 + 0.01 * 4 * 12])


def test_a_new_decision_supersedes_the_one_under_way() -> None:
    both = with_mask(DENSE, drop(TINY, ffn=[0, 1]))
    engine = busy(tiny_engine(plan=both, host_to_device_bytes_per_s=FFN_BYTES / 5.0))
    engine.run_until(1.0)
    engine.apply(DENSE)  # FFN 0 is under way until 6 s, FFN 1 waits
    engine.run_until(3.0)
    engine.apply(with_mask(DENSE, drop(TINY, ffn=[1])))
    engine.run_until(20.0)
    transitions = engine.transitions()
    assert math.isnan(transitions.ready_s[0])
    assert transitions.bytes_in.tolist() == [0, FFN_BYTES], "the copy under way serves the new plan"
    assert transitions.ready_s[1] == 6.0
    assert engine.run_until(21.0).plan.decode.ffn == (True, False, True)


def test_a_copy_that_the_new_plan_does_not_want_is_abandoned() -> None:
    engine = busy(tiny_engine(plan=NO_FFN1, host_to_device_bytes_per_s=FFN_BYTES / 5.0))
    engine.run_until(1.0)
    engine.apply(DENSE)
    engine.run_until(3.0)
    engine.apply(NO_FFN1)
    state = engine.run_until(4.5)
    assert (state.incoming_bytes, state.plan) == (0, NO_FFN1)
    assert engine.transitions().bytes_in.tolist() == [0, 0]


def test_an_illegal_plan_names_its_block_and_what_runs_goes_on() -> None:
    engine = busy(tiny_engine())
    engine.run_until(1.0)
    with pytest.raises(PlanError, match="MHA1"):
        engine.apply(dataclasses.replace(DENSE, prefill=drop(TINY, mha=[1])))
    assert engine.run_until(2.5).plan == DENSE


def test_a_plan_says_in_one_line_what_differs_from_dense() -> None:
    assert describe(DENSE) == "dense"
    plan = dataclasses.replace(with_mask(DENSE, drop(TINY, mha=[0, 1], ffn=[2])), weight_bits=(16, 4, 4), max_waiting=5)
    assert describe(plan) == "-MHA 0-1 -FFN 2; W4 1-2; max_waiting 5"


def start_bytes(kv_blocks: int) -> int:
    return tiny_engine(kv_blocks=kv_blocks).budget.budget_bytes[0]


def test_a_budget_that_shrinks_below_use_preempts_the_newest_until_it_fits() -> None:
    budget = Budget((0.0, 2.5), (start_bytes(10), start_bytes(5)))
    engine = busy(tiny_engine(budget=budget), tokens=12)
    assert engine.run_until(2.2).running == 2
    state = engine.run_until(3.5)
    assert (state.running, state.waiting) == (1, 1)
    assert state.kv_layer_blocks == 15
    engine.run_until(math.inf)
    records = engine.records()
    assert records.status.tolist() == [Status.FINISHED] * 2
    assert records.preemptions[0] == 0 < records.preemptions[1]


def test_seconds_beyond_the_budget_are_counted_until_memory_follows() -> None:
    budget = Budget((0.0, 2.25), (start_bytes(10), start_bytes(5)))
    engine = busy(tiny_engine(budget=budget), tokens=12)
    engine.run_until(math.inf)
    assert engine.budget_violation_s == 0.75, "from 2.25 to the end of the iteration at 3"


def test_weights_beyond_the_budget_hold_work_until_a_plan_fits() -> None:
    """Law 3: nothing crashes and no request is lost while no plan fits, and serving continues once one does."""
    weights = weight_bytes(TINY, DENSE)
    budget = Budget((0.0, 4.0), (start_bytes(10), weights - FFN_BYTES + start_bytes(6) - start_bytes(0 + 1)))
    engine = busy(tiny_engine(budget=budget), tokens=10)
    held = engine.run_until(6.0)
    assert (held.running, held.waiting) == (0, 2)
    assert held.budget_violation_s > 0
    engine.apply(with_mask(DENSE, drop(TINY, ffn=[0, 1])))
    after = engine.run_until(7.0)
    assert after.running > 0
    engine.run_until(math.inf)
    assert engine.records().produced_tokens.tolist() == [10, 10]
    assert engine.budget_violation_s == 2.0


def test_an_announced_budget_can_be_seen_before_it_comes() -> None:
    budget = Budget((0.0, 5.0), (start_bytes(10), start_bytes(5)), notice_s=2.0)
    engine = busy(tiny_engine(budget=budget))
    assert engine.run_until(2.9).next_budget_s == math.inf
    state = engine.run_until(3.0)
    assert (state.next_budget_s, state.next_budget_bytes) == (5.0, start_bytes(5))


@pytest.mark.parametrize(
    ("change_s", "budget_bytes"), [((), ()), ((1.0,), (5,)), ((0.0, 0.0), (5, 6)), ((0.0, 2.0), (5,)), ((0.0,), (0,))]
)
def test_a_budget_that_makes_no_sense_is_refused(change_s: tuple[float, ...], budget_bytes: tuple[int, ...]) -> None:
    with pytest.raises(BudgetError):
        Budget(change_s, budget_bytes)


@given(
    rows=st.lists(st.tuples(st.floats(0, 15), st.integers(1, 40), st.integers(1, 15)), min_size=1, max_size=12),
    decisions=st.lists(st.tuples(st.floats(0.1, 4.0), plans()), max_size=6),
    first=plans(),
    steps=st.lists(st.tuples(st.floats(0.5, 6.0), st.integers(-60_000, 40_000)), max_size=4),
    scheduler=st.sampled_from(["chunked", "prefill_first"]),
    restore=st.sampled_from(["new_requests", "recompute"]),
    reuse=st.booleans(),
    kv_blocks=st.integers(14, 40),
    speed=st.sampled_from([2e4, 3e5]),
)
def test_laws_hold_whatever_plans_and_budgets_do(
    rows: list[tuple[float, int, int]],
    decisions: list[tuple[float, Plan]],
    first: Plan,
    steps: list[tuple[float, int]],
    scheduler: str,
    restore: str,
    reuse: bool,
    kv_blocks: int,
    speed: float,
) -> None:
    """Laws 1 to 4 under random plan changes and budgets."""
    start = tiny_engine(plan=first, kv_blocks=kv_blocks).budget.budget_bytes[0]
    change_s, budget_bytes = [0.0], [start]
    for wait_s, change in steps:
        change_s.append(change_s[-1] + wait_s)
        budget_bytes.append(max(1, start + change))
    # In the end there is room for every plan, so that everybody can be served.
    change_s.append(change_s[-1] + 5.0)
    budget_bytes.append(start + 400_000)
    engine = tiny_engine(
        plan=first,
        kv_blocks=kv_blocks,
        scheduler=scheduler,  # type: ignore[arg-type]
        restore=restore,  # type: ignore[arg-type]
        reuse_preempted_kv=reuse,
        budget=Budget(tuple(change_s), tuple(budget_bytes)),
        latency=linear_latency(base_s=0.2, token_s=0.005, context_s=0.0005),
        host_to_device_bytes_per_s=speed,
        copy_slowdown=0.2,
    )
    rows = sorted(rows)
    engine.submit(requests(*rows))
    time_s, pending = 0.0, list(decisions)
    while not engine.drained:
        time_s += pending[0][0] if pending else 1.0
        state = engine.run_until(time_s)
        if pending:
            engine.apply(pending.pop(0)[1])
        held = sum(holder.layer_blocks for holder in engine.holders())
        assert state.kv_used_layer_blocks == held >= 0
        assert state.kv_layer_blocks >= 0
        assert state.arrived == state.waiting + state.running + state.finished + state.rejected
        for holder in engine.holders():
            runs = state.plan.decode.mha if holder.decoding else state.plan.prefill.mha
            assert holder.mha <= {layer for layer, keep in enumerate(runs) if keep}
        assert time_s < 1e4, "the engine makes no progress"
    records = engine.records()
    assert len(records) == len(rows)
    assert set(records.status.tolist()) <= {Status.FINISHED, Status.REJECTED}
    done = records.status == Status.FINISHED
    assert np.all(records.ttft_s[done] > 0)
    assert np.all((records.kept_params_share[done] > 0) & (records.kept_params_share[done] <= 1))
    transitions = engine.transitions()
    ready = np.isfinite(transitions.ready_s)
    assert np.all(transitions.ready_s[ready] >= transitions.time_s[ready])
