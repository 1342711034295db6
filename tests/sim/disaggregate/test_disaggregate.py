"""Disaggregated prefill and decode: what is sent, when it arrives, and where each KV block is counted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from sim.cluster import kernel as ck
from sim.cluster.outages import schedule
from sim.cost.kv_format import stored_kv_bytes
from sim.cost.memory import kv_blocks
from sim.cost.model_spec import load_model
from sim.cost.plan import Plan, dense_plan, drop
from sim.disaggregate.disaggregate import Disaggregated, decode_side, transfer_reduction, with_prefill
from sim.disaggregate.links import Link
from sim.disaggregate.members import Role
from sim.disaggregate.roles import ByLoad
from sim.engine import kernel
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError, PlanError
from sim.policies.fixed import static_plan
from sim.results.records import Status
from sim.traces.trace import Trace
from tests.sample import quick
from tests.sim.disaggregate.disaggregated_cases import (
    differences,
    fast_disaggregated,
    random_changes,
    random_disaggregated,
    serve_fast,
)
from tests.sim.serving import TINY, linear_latency, tiny_engine

DENSE = dense_plan(TINY)
KV_BYTES = TINY.kv_bytes_per_token_layer


def trace_of(*rows: tuple[float, int, int]) -> Trace:
    arrival_s, prompts, outputs = zip(*rows, strict=True)
    return Trace(arrival_s=np.array(arrival_s), prompt_tokens=np.array(prompts), output_tokens=np.array(outputs))


def system(
    trace: Trace,
    *,
    plan: Plan = DENSE,
    prefill: int = 1,
    decode: int = 1,
    decode_blocks: int = 1000,
    bytes_per_s: float = 1e9,
    more: dict[str, Any] | None = None,
    **overrides: Any,
) -> Disaggregated:
    def as_prefill(env: simpy.Environment) -> SimEngine:
        return tiny_engine(env=env, external_clock=True, plan=plan, **overrides)

    def as_decode(env: simpy.Environment) -> SimEngine:
        given = {**overrides, "kv_blocks": decode_blocks}
        return tiny_engine(env=env, external_clock=True, plan=decode_side(plan), **given)

    return Disaggregated(
        trace,
        plan=plan,
        prefill=[as_prefill] * prefill,
        decode=[as_decode] * decode,
        turned=[as_decode] * prefill + [as_prefill] * decode,
        link_bytes_per_s=bytes_per_s,
        **(more or {}),
    )


def served(trace: Trace, **overrides: Any) -> Disaggregated:
    made = system(trace, **overrides)
    made.run()
    return made


def test_a_request_is_prefilled_sent_and_decoded_at_the_seconds_of_a_sum_by_hand() -> None:
    """1 s of prefill; 8 tokens x 3 layers x 128 bytes at 1,536 bytes/s are 2 s; then four more tokens of 1 s."""
    assert KV_BYTES == 128
    found = served(trace_of((0.0, 8, 5)), bytes_per_s=1536.0).records()
    assert found.first_token_s.tolist() == [1.0]
    assert (found.send_s.tolist(), found.sent_s.tolist()) == ([1.0], [3.0])
    assert found.sent_bytes.tolist() == [8 * 3 * 128]
    assert found.finish_s.tolist() == [7.0]
    assert found.status.tolist() == [Status.FINISHED]
    assert found.produced_tokens.tolist() == [5]


def test_latency_is_paid_once_and_one_token_is_never_sent() -> None:
    found = served(trace_of((0.0, 8, 2), (10.0, 8, 1)), bytes_per_s=1536.0, more={"link_latency_s": 0.5}).records()
    assert found.finish_s.tolist() == [4.5, 11.0]
    assert found.sent_bytes.tolist() == [3072, 0]
    assert found.decode_replica.tolist() == [0, -1]


def test_transfers_share_a_link() -> None:
    """Both are prefilled at 1 s; 1,536 and 3,072 bytes share 1,536 a second: the short one takes 2 s, the other 3 s."""
    found = served(trace_of((0.0, 4, 2), (0.0, 8, 2)), bytes_per_s=1536.0).records()
    assert found.sent_s.tolist() == [3.0, 4.0]


def test_each_prefill_replica_has_a_link_of_its_own_unless_one_is_shared() -> None:
    rows = trace_of((0.0, 8, 2), (0.0, 8, 2))
    separate = served(rows, prefill=2, bytes_per_s=1536.0).records()
    shared = served(rows, prefill=2, bytes_per_s=1536.0, more={"one_link": True}).records()
    assert separate.prefill_replica.tolist() == shared.prefill_replica.tolist() == [0, 1]
    assert (separate.sent_s.tolist(), shared.sent_s.tolist()) == ([3.0, 3.0], [5.0, 5.0])


def test_with_overlap_only_the_last_layer_is_sent_after_the_prompt() -> None:
    """Two of three layers go while the iteration of 1 s runs; on a slower link they take until 4 s."""
    rows = trace_of((0.0, 8, 2))
    fast = served(rows, bytes_per_s=2048.0, more={"overlap": True}).records()
    slow = served(rows, bytes_per_s=512.0, more={"overlap": True}).records()
    assert (fast.send_s.tolist(), fast.sent_s.tolist()) == ([0.0], [1.5])
    assert slow.sent_s.tolist() == [6.0]
    assert served(rows, bytes_per_s=512.0).records().sent_s.tolist() == [7.0]


def test_without_room_to_decode_kv_waits_at_prefill_and_stops_it_in_the_end() -> None:
    """Decode has room for one request. With room for three prompts all are prefilled at once; with less they wait."""
    rows = trace_of((0.0, 8, 4), (0.0, 8, 4), (0.0, 8, 4))
    found = served(rows, kv_blocks=4, decode_blocks=3, max_context_tokens=12, max_batch_tokens=8).records()
    assert found.first_token_s.tolist() == [1.0, 2.0, 3.0]
    assert (np.diff(found.send_s) >= 3.0 - 1e-6).all()
    assert (found.status == Status.FINISHED).all()
    few = served(rows, kv_blocks=3, decode_blocks=3, max_context_tokens=12, max_batch_tokens=8).records()
    assert few.first_token_s[1] > few.sent_s[0]
    assert few.first_token_s[2] > few.sent_s[1] > few.finish_s[0]


def test_pdtrim_sends_what_its_plan_leaves_and_the_reduction_is_the_papers_formula() -> None:
    plan = static_plan(TINY, drop_mha=[1], prefill_drop_mha=[], kv_first_tokens=2, kv_last_tokens=2, kv_layers=[2])
    found = served(trace_of((0.0, 16, 3)), plan=plan).records()
    assert found.sent_bytes.tolist() == [stored_kv_bytes(TINY, plan, 16)] == [(16 + 4) * 128]
    layers, removed, shortened, fraction = 3, 1, 1, 4 / 16
    assert transfer_reduction(TINY, plan, 16) == layers / (layers - removed - shortened + shortened * fraction)
    assert transfer_reduction(TINY, plan, 16) == stored_kv_bytes(TINY, DENSE, 16) / stored_kv_bytes(TINY, plan, 16)
    assert transfer_reduction(TINY, static_plan(TINY, drop_mha=[0, 1, 2], prefill_drop_mha=[]), 16) == math.inf


def test_the_papers_reduction_needs_about_25_of_32_layers_shortened() -> None:
    """arXiv 2509.04467: 4.95x less; here 25 layers send 4 + 60 tokens of 2,048."""
    llama = load_model("llama2_7b")
    plan = static_plan(llama, kv_first_tokens=4, kv_last_tokens=60, kv_layers=list(range(25)))
    assert (
        4.0
        < transfer_reduction(llama, plan, 2048)
        < 4.95
        < transfer_reduction(
            llama, static_plan(llama, kv_first_tokens=4, kv_last_tokens=60, kv_layers=list(range(27))), 2048
        )
    )


def test_prefill_holds_its_own_weights_and_decode_only_its_own() -> None:
    plan = static_plan(TINY, drop_mha=[0, 1], drop_ffn=[2], prefill_drop_mha=[], prefill_drop_ffn=[])
    made = system(trace_of((0.0, 8, 2)), plan=plan)
    prefill, decode = (side[0].engine.observe(0.0) for side in (made.prefill, made.decode))
    dropped = 2 * TINY.mha_params + TINY.ffn_params
    assert prefill.weight_bytes - decode.weight_bytes == dropped * TINY.weight_dtype_bytes


def test_decode_is_charged_as_if_its_kv_was_made_by_prefills_mask() -> None:
    plan = static_plan(TINY, drop_mha=[0], prefill_drop_mha=[])
    seen = with_prefill(lambda p: 1.0 + sum(not keep for keep in p.prefill.mha), plan.prefill)
    assert seen is not None
    assert seen(decode_side(plan)) == 1.0


@st.composite
def systems(draw: Any) -> tuple[Trace, dict[str, Any]]:
    count = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    rows = zip(
        np.cumsum(rng.exponential(draw(st.sampled_from([0.0, 0.3, 2.0])), count)).tolist(),
        rng.integers(1, draw(st.sampled_from([6, 40])), count).tolist(),
        rng.integers(1, draw(st.sampled_from([3, 25])), count).tolist(),
        strict=True,
    )
    mha = [layer for layer in range(3) if rng.random() < 0.3]
    kv = {"kv_first_tokens": 2, "kv_last_tokens": 3, "kv_layers": [0, 2]} if rng.random() < 0.4 else {}
    overrides: dict[str, Any] = {
        "plan": static_plan(TINY, drop_mha=mha, drop_ffn=mha[:1], prefill_drop_mha=mha[:1], prefill_drop_ffn=[], **kv),
        "prefill": int(rng.integers(1, 4)),
        "decode": int(rng.integers(1, 4)),
        "kv_blocks": int(rng.choice([25, 60, 300])),
        "decode_blocks": int(rng.choice([25, 60, 300])),
        "bytes_per_s": float(rng.choice([500.0, 5e3, 1e6])),
        "max_batch_tokens": int(rng.choice([4, 16, 64])),
        "max_running": int(rng.choice([1, 3, 8])),
        "scheduler": str(rng.choice(["chunked", "prefill_first"])),
        "latency": linear_latency(base_s=0.3, token_s=0.01, context_s=0.001),
        "more": {
            "overlap": bool(rng.random() < 0.5),
            "one_link": bool(rng.random() < 0.5),
            "link_latency_s": float(rng.choice([0.0, 0.1])),
        },
        "turns": (),
    }
    trace = trace_of(*rows)
    if draw(st.booleans()):
        replicas = overrides["prefill"] + overrides["decode"]
        changes = random_changes(rng, replicas, 2.0 * max(10.0, float(trace.arrival_s[-1])))
        outages, overrides["turns"] = changes.pop("outages"), changes.pop("turns")
        overrides["more"] |= {**changes, "outages": outages.__getitem__}
    return trace, overrides


@given(made=systems())
def test_no_request_is_lost_and_every_kv_block_is_counted_once_on_any_input(made: tuple[Trace, dict[str, Any]]) -> None:
    trace, overrides = made
    turns = overrides.pop("turns")
    pair = system(trace, **overrides)
    plan, checked = pair.plan, 0

    def blocks(request: int) -> int:
        tokens = int(pair._tokens[request])
        kept = zip(plan.kv_keep, plan.decode.mha, strict=True)
        return sum(kv_blocks(keep.tokens(tokens), 4) for keep, runs in kept if runs)

    def check() -> None:
        """Used blocks are those of running requests and of KV that waits or is sent (prefill) or received (decode)."""
        nonlocal checked
        checked += 1
        now_s, sent = pair.env.now, pair._sent
        for side in (*pair.prefill, *pair.decode):
            state = side.engine.observe(now_s)
            held = sum(holder.layer_blocks for holder in side.engine.holders())
            if side.role is Role.PREFILL:  # prefilled, and not yet arrived at decode
                mine = np.flatnonzero(pair._home[:, 0] == side.index).tolist()
                there = [r for r in mine if _prefilled(pair, r) and not np.isfinite(sent[r, 1])]
            else:  # room reserved, and not yet joined
                there = [r for r, transfer in pair._transfers.items() if transfer.to is side] + side.arrived
            assert side.held_blocks == sum(blocks(r) for r in there)
            assert state.kv_used_layer_blocks == held + side.held_blocks
            assert 0 <= state.kv_used_layer_blocks <= state.kv_layer_blocks

    original = pair._send_those_ready

    def send_and_check() -> None:
        original()
        check()

    pair._send_those_ready = send_and_check  # type: ignore[method-assign]
    for time_s, count in turns:
        pair.run_until(time_s)
        pair.set_prefill(count)
    pair.run()
    records = pair.records()
    assert checked > 0
    assert len(records) == len(trace)
    if not pair.drained:  # only if replicas that never come back have left a role without one
        assert not any(side.accepts for side in pair.prefill) or not any(side.accepts for side in pair.decode)
        return
    assert np.isin(records.status, (Status.FINISHED, Status.REJECTED)).all()
    finished = records.status == Status.FINISHED
    assert (records.produced_tokens[finished] <= trace.output_tokens[finished]).all()
    assert (records.finish_s[finished] >= records.first_token_s[finished]).all()
    shipped = np.isfinite(records.sent_s)
    assert (records.sent_s[shipped] >= np.maximum(records.send_s[shipped], records.first_token_s[shipped])).all()
    assert (records.decode_replica[shipped] >= 0).all()
    assert all(side.held_blocks == 0 for side in (*pair.prefill, *pair.decode))
    # Bytes are conserved: what was sent has arrived, is what the plan says, and took the time that the link needs.
    lost = sum(link.lost_bytes for link in pair.links)
    assert all(link.under_way == 0 and link.arrived_bytes + link.lost_bytes == link.sent_bytes for link in pair.links)
    if records.moves.any() or lost:
        assert records.sent_bytes.sum() <= sum(link.arrived_bytes for link in pair.links)
        return
    total = sum(stored_kv_bytes(TINY, plan, int(p)) for p in trace.prompt_tokens[shipped])
    assert total == records.sent_bytes.sum() == sum(link.sent_bytes for link in pair.links)
    for link in pair.links:
        assert link.busy_s * link.bytes_per_s == pytest.approx(link.sent_bytes, rel=1e-9, abs=1e-6)


def _prefilled(pair: Disaggregated, request: int) -> bool:
    found = pair._prefill_record(request)
    return bool(found["status"][0] == Status.FINISHED and found["produced_tokens"][0] < pair._output_limit(request))


def ends_on_a_link(bytes_per_s: float, transfers: list[tuple[float, int]]) -> dict[int, float]:
    """Return when each transfer ends on one link, for the second at which it begins and its bytes."""
    env, ends = simpy.Environment(), {}
    link = Link(env, bytes_per_s)

    def one(i: int, at_s: float, size: int) -> Any:
        yield env.timeout(at_s)
        yield from link.send(size)
        ends[i] = env.now

    for i, (at_s, size) in enumerate(transfers):
        env.process(one(i, at_s, size))
    env.run()
    return ends


@given(
    sizes=st.lists(st.tuples(st.floats(0, 10), st.integers(0, 5000)), min_size=1, max_size=20),
    bytes_per_s=st.floats(100, 10_000),
)
def test_a_link_gives_each_transfer_an_equal_share(sizes: list[tuple[float, int]], bytes_per_s: float) -> None:
    """Against a step-by-step model in fractions: each active transfer gets bandwidth / count until the next change."""
    rate, now_s = Fraction(bytes_per_s), Fraction(0)
    left: dict[int, Fraction] = {}
    exact: dict[int, Fraction] = {}
    coming = sorted((Fraction(at_s), i) for i, (at_s, _) in enumerate(sizes))
    while coming or left:
        times = [now_s + min(left.values()) * len(left) / rate] if left else []
        at_s = min([*times, *(begin_s for begin_s, _ in coming[:1])])
        for i in left:
            left[i] -= (at_s - now_s) * rate / len(left)
        now_s = at_s
        while coming and coming[0][0] <= now_s:
            _, i = coming.pop(0)
            left[i] = Fraction(sizes[i][1])
        for i in [i for i, rest in left.items() if rest == 0]:
            exact[i] = now_s
            del left[i]
    for i, end_s in ends_on_a_link(bytes_per_s, sizes).items():
        assert math.nextafter(end_s, -math.inf) < exact[i] <= end_s  # Python compares these without rounding


def test_transfers_that_end_at_the_same_exact_moment_end_together_however_they_shared_their_links() -> None:
    """A link that is never idle has carried 700 bytes at the same moment, whatever the transfers that they belong to.

    Begin and rate are no round numbers, so the last bit of a sum of floats would depend on its order.
    """
    rate = 200.0 / 7.0
    alone = ends_on_a_link(rate, [(0.3, 700)])[0]
    for transfers in ([(0.3, 600), (0.3, 100)], [(0.3, 300), (2.1, 200), (5.9, 200)], [(0.3, 699), (7.7, 1)]):
        assert max(ends_on_a_link(rate, transfers).values()) == alone


def test_transfers_that_end_together_join_in_the_order_in_which_they_were_sent() -> None:
    """At 1 s, prompts of 7 and 5 tokens go over one link, of 8 and 4 over another, 4 tokens a second: both end at 4 s.

    The shorter one of the first link ends last of the short ones, at 3.5 s, so its link is the last to know its end.
    """
    rows = trace_of((0.0, 7, 9), (0.0, 8, 9), (0.0, 5, 9), (0.0, 4, 9))
    made = served(rows, prefill=2, decode=1, bytes_per_s=4.0 * TINY.num_layers * KV_BYTES)
    found = made.records()
    assert found.prefill_replica.tolist() == [0, 1, 0, 1]
    assert found.sent_s.tolist() == [4.0, 4.0, 3.5, 3.0]
    joined = made._home[:, 3]  # rows of the decode replica, in the order of joining
    assert np.argsort(joined).tolist() == [3, 2, 0, 1]


ENDS_TOGETHER = 2030
"""A random system whose prefill replicas are alike, so that transfers on three links end at the same moment."""
WAITED_TOO_LONG = 700_076
"""A random system in which a prompt comes when another has waited too long at one of two prefill replicas."""


@pytest.mark.parametrize(
    "seeds", quick([[ENDS_TOGETHER, WAITED_TOO_LONG], *(range(first, first + 20) for first in range(0, 120, 20))], 4)
)
def test_the_system_leaves_the_records_of_the_plain_one(seeds: Sequence[int]) -> None:
    for seed in seeds:
        found = differences(random_disaggregated(seed))
        assert found == [], f"seed {seed}; `make fuzz KIND=disaggregated FIRST={seed} CASES=1` shrinks it"


def test_the_random_systems_meet_what_has_rules() -> None:
    met = dict.fromkeys(
        ("waited for room", "preempted", "rejected", "windowed KV", "nested", "moved", "KV sent again", "turned"), 0
    )
    for seed in range(60):
        case = random_disaggregated(seed)
        made = serve_fast(case)
        records = made.records()
        met["waited for room"] += bool((records.send_s > records.first_token_s + 1e-9).any())
        met["preempted"] += bool((records.preemptions > 0).any())
        met["rejected"] += bool((records.status == Status.REJECTED).any())
        met["windowed KV"] += any(keep.tokens(99) < 99 for keep in case.plan.kv_keep)
        met["nested"] += case.plan.prefill != case.plan.decode
        met["moved"] += bool((records.moves > 0).any())
        met["KV sent again"] += any(link.lost_bytes for link in made.links)
        met["turned"] += any(event.role is not Role(event.replica >= case.prefill) for event in made.events())
    assert min(met.values()) >= 2, met


def test_two_runs_leave_identical_records() -> None:
    rows = trace_of(*((0.4 * i, 5 + i % 7, 3 + i % 5) for i in range(40)))
    overrides: dict[str, Any] = {
        "prefill": 2,
        "decode": 2,
        "decode_blocks": 30,
        "bytes_per_s": 3e3,
        "max_context_tokens": 20,
    }
    first, second = (served(rows, **overrides).records() for _ in range(2))
    for field in dataclasses.fields(first):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), field.name


def test_an_impossible_argument_is_an_error_that_states_what_is_allowed() -> None:
    rows = trace_of((0.0, 8, 2))
    with pytest.raises(ConfigError, match="0 prefill and 1 decode replicas"):
        system(rows, prefill=0)
    with pytest.raises(ConfigError, match=r"link_bytes_per_s is 0"):
        system(rows, bytes_per_s=0.0)
    nested = dataclasses.replace(DENSE, prefill=drop(TINY, mha=[1]))
    with pytest.raises(PlanError, match="decode keeps MHA1 but prefill drops it"):
        Disaggregated(rows, plan=nested, prefill=[lambda env: tiny_engine(env=env, external_clock=True)],
                      decode=[lambda env: tiny_engine(env=env, external_clock=True)], link_bytes_per_s=1.0)  # fmt: skip
    with pytest.raises(ConfigError, match=r"kv_block_tokens \[4, 8\]"):
        Disaggregated(rows, plan=DENSE, prefill=[lambda env: tiny_engine(env=env, external_clock=True)],
                      decode=[lambda env: tiny_engine(env=env, external_clock=True, kv_block_tokens=8)],
                      link_bytes_per_s=1.0)  # fmt: skip


def test_room_is_kept_for_no_more_than_may_run_and_fit() -> None:
    side = system(trace_of((0.0, 8, 2)), max_running=3, decode_blocks=10).decode[0]
    pool = side.engine.observe(0.0).kv_layer_blocks
    assert pool == 10 * TINY.num_layers
    assert ck.free_share(side.table, 30, 0) == 1.0
    assert ck.free_share(side.table, 31, 0) == -1.0
    assert ck.free_share(side.table, 1, 3) == -1.0


def outages(*rows: tuple[int, float, float]) -> dict[str, Any]:
    """Return arguments: these outages, after which a replica accepts again at once."""
    return {"outages": schedule(rows=[list(row) for row in rows]), "load_bytes_per_s": 1e18}


def test_a_prefill_replica_that_fails_loses_its_kv_and_others_compute_it_again() -> None:
    """At 2 s the KV of request 0 is half sent: replica 1 computes 9 tokens until 3 s, the second one, and sends 9."""
    rows = trace_of((0.0, 8, 5))
    found = served(rows, prefill=2, bytes_per_s=1536.0, more=outages((0, 2.0, 99.0))).records()
    assert found.first_token_s.tolist() == [1.0]
    assert (found.prefill_replica.tolist(), found.moves.tolist()) == ([1], [1])
    assert (found.send_s.tolist(), found.sent_s.tolist()) == ([3.0], [3.0 + 9 * 3 * 128 / 1536.0])
    assert found.sent_bytes.tolist() == [9 * 3 * 128]
    assert found.finish_s.tolist() == [3.0 + 2.25 + 3.0]
    assert found.produced_tokens.tolist() == [5]


def test_requests_wait_while_no_replica_prefills_and_kv_waits_while_none_decodes() -> None:
    rows = trace_of((0.0, 8, 3), (1.5, 8, 3))
    found = served(rows, more=outages((0, 1.2, 5.0))).records()
    assert found.first_token_s.tolist() == pytest.approx([1.0, 6.0], abs=1e-9)
    assert found.moves.tolist() == [0, 0]
    found = served(rows, more=outages((1, 0.5, 5.0))).records()
    assert found.send_s.tolist() == pytest.approx([5.0, 5.0], abs=1e-9)
    never = served(rows, more={"outages": schedule(rows=[[0, 1.2, None]])})
    assert never.records().status.tolist() == [Status.FINISHED, Status.WAITING]
    assert not never.drained


def test_kv_on_its_way_to_a_decode_replica_that_fails_is_sent_again_first() -> None:
    """Prefill still has it: nothing is computed again. Half of the first KV had been sent to replica 0 by 2 s."""
    rows = trace_of((0.0, 8, 3), (1.5, 8, 3))
    found = served(rows, decode=2, bytes_per_s=1536.0, more=outages((1, 2.0, 99.0))).records()
    assert found.decode_replica.tolist() == [1, 1]
    assert (found.send_s.tolist(), found.moves.tolist()) == ([2.0, 2.5], [0, 0])
    assert found.sent_bytes.tolist() == [3072, 3072]
    assert found.preemptions.tolist() == [0, 0]


def test_requests_of_a_decode_replica_that_fails_keep_their_tokens() -> None:
    """Three tokens at 3 s; the outage cuts the fourth off; it comes at prefill at 4.5 s, and the fifth 1 s later."""
    found = served(trace_of((0.0, 8, 5)), decode=2, more=outages((1, 3.5, 99.0))).records()
    assert (found.decode_replica.tolist(), found.moves.tolist()) == ([1], [1])
    assert found.produced_tokens.tolist() == [5]
    assert found.finish_s.tolist() == pytest.approx([5.5], abs=1e-4)
    assert found.sent_bytes.tolist() == [(8 + 11) * 3 * 128]


def test_a_notice_moves_what_waits_and_lets_the_rest_end() -> None:
    rows = trace_of(*((0.0, 8, 1) for _ in range(6)))
    leaves = {"outages": schedule(rows=[[0, 2.5, 99.0]], notice_s=2.0)}
    made = served(rows, prefill=2, max_running=1, more=leaves)
    found = made.records()
    assert found.prefill_replica.tolist() == [0, 1, 1, 1, 1, 1]
    assert found.moves.tolist() == [0, 0, 1, 0, 1, 0]
    assert found.finish_s.max() == 5.0
    assert [(event.time_s, event.phase.name) for event in made.events()][:2] == [(0.5, "LEAVING"), (2.5, "DOWN")]


def test_a_replica_changes_its_role_when_it_holds_nothing_and_loads_what_it_lacks() -> None:
    """Decode lacks MHA 0: the way to prefill takes its bytes, the way to decode none; what runs ends first."""
    plan = static_plan(TINY, drop_mha=[0], prefill_drop_mha=[])
    lacks_s = TINY.mha_params * TINY.weight_dtype_bytes / 1e6
    made = system(trace_of((0.0, 8, 4)), plan=plan, prefill=2, decode=2, more={"load_bytes_per_s": 1e6, "turn_s": 0.25})
    made.run_until(2.5)
    made.set_prefill(3)  # replica 3 has nothing to do, replica 2 decodes
    made.run_until(2.6)
    made.set_prefill(3)
    made.run()
    assert [(event.replica, event.role.name, event.phase.name) for event in made.events()] == [
        (3, "DECODE", "LEAVING"), (3, "PREFILL", "LOADING"), (3, "PREFILL", "SERVING"),
    ]  # fmt: skip
    assert [event.time_s for event in made.events()] == [2.5, 2.5, pytest.approx(2.75 + lacks_s)]
    made = system(trace_of((0.0, 8, 4)), plan=plan, decode=2, more={"turn_s": 0.25, "load_bytes_per_s": 1e6})
    made.run_until(0.5)
    with pytest.raises(ConfigError, match="0 of 3 replicas are to prefill; each role needs at least one"):
        made.set_prefill(0)
    made.set_prefill(2)
    made.run_until(2.5)
    made.set_prefill(1)  # replica 0 has sent its KV; both could leave, the last one does
    made.run()
    roles = [(event.replica, event.role.name) for event in made.events() if event.phase.name == "SERVING"]
    assert roles == [(2, "PREFILL"), (2, "DECODE")]
    assert made.records().status.tolist() == [Status.FINISHED]


def test_a_change_of_role_that_is_taken_back_ends_at_once() -> None:
    made = system(trace_of((0.0, 8, 9), (0.0, 8, 9)), decode=2)
    made.run_until(2.5)
    made.set_prefill(2)
    assert [side.accepts for side in made.decode].count(False) == 1
    made.set_prefill(1)
    assert all(side.accepts for side in (*made.prefill, *made.decode))
    made.run()
    assert [event.phase.name for event in made.events()] == ["LEAVING", "SERVING"]


def test_a_rule_gives_replicas_to_the_side_that_is_short() -> None:
    """Eight prompts of 1 s need decode replicas with room for long answers; forty with one token need none."""
    rule = ByLoad(most_wait_s=0.5, most_kv_share=0.8, period_s=0.7)
    overrides: dict[str, Any] = {"decode_blocks": 24, "max_batch_tokens": 16, "max_context_tokens": 60}
    for rows, prefill, decode, gets in (
        (trace_of(*((0.0, 16, 30) for _ in range(8))), 3, 1, "DECODE"),
        (trace_of(*((0.1 * i, 16, 1) for i in range(40))), 1, 3, "PREFILL"),
    ):
        fixed = served(rows, prefill=prefill, decode=decode, **overrides)
        made = served(rows, prefill=prefill, decode=decode, **overrides, more={"roles": rule})
        began = [event.role.name for event in made.events() if event.phase.name == "SERVING"]
        assert began[0] == gets
        assert (made.records().status == Status.FINISHED).all()
        assert made.records().finish_s.max() < 0.8 * fixed.records().finish_s.max()


def test_looks_at_the_times_of_events_change_nothing() -> None:
    """A look ends before iterations start: those that are due must start at that time all the same."""
    for seed in range(80):
        case = random_disaggregated(seed)
        for overlap in (False, True):
            records = serve_fast(case, overlap).records()
            times_s = [records.sent_s, records.send_s, records.first_token_s, records.finish_s, records.arrival_s]
            other = fast_disaggregated(case, overlap)
            looks_s = sorted({float(time_s) for column in times_s for time_s in column if math.isfinite(time_s)})
            turns = list(case.turns)
            for time_s in sorted([*looks_s, *(time_s for time_s, _ in turns)]):
                other.run_until(time_s)
                other.observe()
                while turns and turns[0][0] <= time_s:
                    other.set_prefill(turns.pop(0)[1])
            other.run()
            found = other.records()
            for field in dataclasses.fields(records):
                a, b = getattr(records, field.name), getattr(found, field.name)
                assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), f"seed {seed}: {field.name}"


def test_a_wait_for_room_begins_at_the_end_of_the_last_prefill() -> None:
    found = served(trace_of((0.0, 8, 5)), decode=2, more=outages((1, 3.5, 99.0))).records()
    assert found.first_token_s.tolist() == [1.0]
    assert found.prefilled_s.tolist() == found.send_s.tolist() == [4.5]


def test_a_rule_that_decides_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.disaggregate.disaggregate.MOST_ROLE_DECISIONS", 50)
    rule = ByLoad(most_wait_s=1.0, most_kv_share=0.8, period_s=0.1)
    with pytest.raises(ConfigError, match=r"roles\.period_s is 0\.1, and 50 decisions have not been enough"):
        served(trace_of((0.0, 8, 3)), bytes_per_s=1.0, more={"roles": rule})
    assert served(trace_of((0.0, 8, 3)), more={"roles": rule}).drained


def test_links_count_while_their_replica_prefills() -> None:
    made = served(trace_of((0.0, 8, 3)), prefill=2, decode=2, more=outages((0, 2.0, 99.0)))
    assert made.link_seconds(10.0) == 2.0 + 10.0
    assert served(trace_of((0.0, 8, 3)), prefill=2, more={"one_link": True}).link_seconds(10.0) == 10.0


@pytest.mark.parametrize("time_s", [math.nan, "3", None])
def test_a_time_that_is_no_number_is_refused(time_s: Any) -> None:
    with pytest.raises(ConfigError, match="must be a number of seconds"):
        system(trace_of((0.0, 8, 2))).run_until(time_s)


@pytest.mark.parametrize("count", [1.5, "2", None, True, 0, 3])
def test_a_number_of_replicas_that_leaves_a_role_without_one_is_refused(count: Any) -> None:
    with pytest.raises(ConfigError, match="whole number from 1 to 2"):
        system(trace_of((0.0, 8, 2)), prefill=1, decode=2).set_prefill(count)


def test_a_rule_stops_when_nothing_can_happen() -> None:
    never = {
        "outages": schedule(rows=[[0, 0.5, None], [1, 0.5, None]]),
        "roles": ByLoad(most_wait_s=1.0, most_kv_share=0.8),
    }
    made = served(trace_of((0.0, 8, 3)), more=never)
    assert made.records().status.tolist() == [Status.WAITING]


def test_a_request_that_joins_takes_over_nothing_from_the_last_request_in_its_slot() -> None:
    """With kv_keep, requests that join are counted one by one; a stale entry would fill a prefix cache for them."""
    plan = static_plan(TINY, kv_first_tokens=2, kv_last_tokens=3, kv_layers=[0, 2])
    made = system(trace_of((0.0, 8, 5)), plan=plan)
    (side,) = made.decode
    slots = side.engine._state.slots
    slots["fill_tokens"][:-1], slots["shared_blocks"][:-1] = 1, 7
    made.run()
    (slot,) = np.flatnonzero(slots["request"][:-1] == made._home[0, 3])[-1:]
    assert (slots["fill_tokens"][slot], slots["shared_blocks"][slot]) == (kernel.NEVER, 0)
    assert made.records().finish_s.tolist() == served(trace_of((0.0, 8, 5)), plan=plan).records().finish_s.tolist()
