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
from sim.cost.kv_format import stored_kv_bytes
from sim.cost.memory import kv_blocks
from sim.cost.model_spec import load_model
from sim.cost.plan import Plan, dense_plan, drop
from sim.disaggregate.disaggregate import Disaggregated, decode_side, transfer_reduction, with_prefill
from sim.disaggregate.links import Link
from sim.engine import kernel
from sim.errors import ConfigError, PlanError
from sim.policies.fixed import static_plan
from sim.results.records import Status
from sim.traces.trace import Trace
from tests.sample import quick
from tests.sim.disaggregate.disaggregated_cases import differences, fast_disaggregated, random_disaggregated
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
    return Disaggregated(
        trace,
        plan=plan,
        prefill=[lambda env: tiny_engine(env=env, external_clock=True, plan=plan, **overrides)] * prefill,
        decode=[
            lambda env: tiny_engine(
                env=env, external_clock=True, plan=decode_side(plan), **{**overrides, "kv_blocks": decode_blocks}
            )
        ]
        * decode,
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
    overrides = {
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
    }
    return trace_of(*rows), overrides


@given(made=systems())
def test_no_request_is_lost_and_every_kv_block_is_counted_once_on_any_input(made: tuple[Trace, dict[str, Any]]) -> None:
    trace, overrides = made
    pair = system(trace, **overrides)
    plan, checked = pair.plan, 0

    def blocks(request: int) -> int:
        prompt = int(trace.prompt_tokens[request])
        kept = zip(plan.kv_keep, plan.decode.mha, strict=True)
        return sum(kv_blocks(keep.tokens(prompt), 4) for keep, runs in kept if runs)

    def check() -> None:
        """Used blocks are those of running requests and of KV that waits or is sent (prefill) or received (decode)."""
        nonlocal checked
        checked += 1
        now_s, sent = pair.env.now, pair._sent
        for sides, column, waits in ((pair.prefill, 0, True), (pair.decode, 2, False)):
            for number, side in enumerate(sides):
                state = side.engine.observe(now_s)
                held = sum(holder.layer_blocks for holder in side.engine.holders())
                mine = np.flatnonzero(pair._home[:, column] == number)
                if waits:  # prefilled, and not yet arrived at decode
                    there = [r for r in mine if _prefilled(pair, r) and not np.isfinite(sent[r, 1])]
                else:  # room reserved, and not yet joined
                    there = [r for r in mine if pair._home[r, 3] < 0]
                    there += [r for r, (_, to) in pair._early.items() if to == number]
                assert side.held_blocks == sum(blocks(r) for r in there)
                assert state.kv_used_layer_blocks == held + side.held_blocks
                assert 0 <= state.kv_used_layer_blocks <= state.kv_layer_blocks

    original = pair._send_those_ready

    def send_and_check() -> None:
        original()
        check()

    pair._send_those_ready = send_and_check  # type: ignore[method-assign]
    pair.run()
    records = pair.records()
    assert checked > 0
    assert pair.drained
    assert len(records) == len(trace)
    assert np.isin(records.status, (Status.FINISHED, Status.REJECTED)).all()
    finished = records.status == Status.FINISHED
    assert (records.produced_tokens[finished] <= trace.output_tokens[finished]).all()
    assert (records.finish_s[finished] >= records.first_token_s[finished]).all()
    shipped = np.isfinite(records.sent_s)
    assert (records.sent_s[shipped] >= np.maximum(records.send_s[shipped], records.first_token_s[shipped])).all()
    assert (records.decode_replica[shipped] >= 0).all()
    assert all(side.held_blocks == 0 for side in (*pair.prefill, *pair.decode))
    # Bytes are conserved: what was sent has arrived, is what the plan says, and took the time that the link needs.
    total = sum(stored_kv_bytes(TINY, plan, int(p)) for p in trace.prompt_tokens[shipped])
    assert total == records.sent_bytes.sum() == sum(link.sent_bytes for link in pair.links)
    for link in pair.links:
        assert link.arrived_bytes == link.sent_bytes
        assert link.under_way == 0
        assert link.busy_s * link.bytes_per_s == pytest.approx(link.sent_bytes, rel=1e-9, abs=1e-6)


def _prefilled(pair: Disaggregated, request: int) -> bool:
    number, row = pair._home[request, :2]
    if row < 0 or pair._output_limit(int(request)) < 2:
        return False
    return bool(pair.prefill[number].engine.rows(np.array([row]))["status"][0] == Status.FINISHED)


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
    met = dict.fromkeys(("waited for room", "preempted", "rejected", "windowed KV", "nested"), 0)
    for seed in range(60):
        case = random_disaggregated(seed)
        made = fast_disaggregated(case)
        made.run()
        records = made.records()
        met["waited for room"] += bool((records.send_s > records.first_token_s + 1e-9).any())
        met["preempted"] += bool((records.preemptions > 0).any())
        met["rejected"] += bool((records.status == Status.REJECTED).any())
        met["windowed KV"] += any(keep.tokens(99) < 99 for keep in case.plan.kv_keep)
        met["nested"] += case.plan.prefill != case.plan.decode
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
