"""Prompts that begin alike share their KV: small cases computed by hand, and laws."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.cluster import routers
from sim.cluster.cluster import Cluster, Replica
from sim.cost.plan import KVKeep, Plan, dense_plan, drop, with_mask
from sim.disaggregate.disaggregate import Disaggregated
from sim.engine.protocol import EngineConfig, Request
from sim.engine.sim_engine import SimEngine
from sim.errors import BudgetError, ConfigError
from sim.policies.fixed import Fixed
from sim.replay.loop import replay
from sim.results.records import Records, Status
from sim.traces.trace import Trace
from tests.sim.cluster.cluster_cases import engine as engine_of
from tests.sim.engine.kernel_cases import LATE_S, Case, random_case, serve, with_kv_bits
from tests.sim.engine.plain_engine import PlainEngine
from tests.sim.serving import TINY, linear_latency, tiny_engine

DENSE = dense_plan(TINY)
Row = tuple[float, int, int, tuple[int, ...]]


def requests_of(*rows: Row) -> list[Request]:
    """``(arrival_s, prompt_tokens, output_tokens, hash_ids)`` rows as requests; an id stands for 8 tokens."""
    return [
        Request(request_id=i, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output, hash_ids=ids)
        for i, (arrival_s, prompt, output, ids) in enumerate(rows)
    ]


def served(engine: SimEngine, *rows: Row) -> Records:
    engine.submit(requests_of(*rows))
    engine.run_until(math.inf)
    return engine.records()


def test_a_prompt_that_begins_as_an_earlier_one_computes_only_the_rest() -> None:
    engine = tiny_engine(prefix_caching=True)
    records = served(engine, (0.0, 20, 1, (1, 2, 3)), (5.0, 26, 1, (1, 2, 4, 5)))
    assert records.cached_tokens.tolist() == [0, 16]
    assert engine.iterations().prefill_tokens.tolist() == [20, 10]


def test_an_id_that_is_not_at_the_beginning_is_not_found() -> None:
    engine = tiny_engine(prefix_caching=True)
    assert served(engine, (0.0, 24, 1, (1, 2, 3)), (5.0, 24, 1, (9, 2, 3))).cached_tokens.tolist() == [0, 0]


def test_a_prefix_block_that_lies_partly_in_a_prompt_is_neither_kept_nor_found() -> None:
    engine = tiny_engine(prefix_caching=True)
    records = served(engine, (0.0, 20, 1, (1, 2, 3)), (5.0, 25, 1, (1, 2, 3, 4)), (9.0, 20, 1, (1, 2, 3)))
    assert records.cached_tokens.tolist() == [0, 16, 16]


def test_the_last_prefix_block_of_a_fully_cached_prompt_is_computed_again() -> None:
    engine = tiny_engine(prefix_caching=True)
    assert served(engine, (0.0, 16, 1, (1, 2)), (5.0, 16, 1, (1, 2))).cached_tokens.tolist() == [0, 8]


def test_what_is_found_is_context_that_attention_reads() -> None:
    """A token is 0.01 s, a token of context 0.001 s in decode: prompts of 17 and 24 tokens, the first 16 shared."""
    price = linear_latency(base_s=1.0, token_s=0.01, context_s=0.001)
    engine = tiny_engine(prefix_caching=True, latency=price)
    records = served(engine, (0.0, 17, 1, (1, 2)), (5.0, 24, 2, (1, 2, 3)))
    assert records.first_token_s.tolist() == pytest.approx([1.17, 6.08])
    assert records.finish_s[1] == pytest.approx(6.08 + 1.0 + 0.01 + 0.024)


def test_a_prefix_block_is_in_the_pool_once_even_if_several_requests_hold_it() -> None:
    """Prompts of 17 tokens need 5 KV blocks of 4 tokens in each of 3 layers; two prefix blocks are 4 of them."""
    engine = tiny_engine(prefix_caching=True)
    engine.submit(requests_of((0.0, 17, 9, (1, 2)), (2.0, 17, 9, (1, 2)), (4.0, 17, 9, (1, 2))))
    assert engine.run_until(1.5).kv_used_layer_blocks == 5 * 3
    assert engine.run_until(5.5).kv_used_layer_blocks == (4 + 2 + 1 + 1) * 3  # the oldest has 21 tokens by now
    assert engine.shared_layer_blocks == 4 * 3
    assert [holder.layer_blocks for holder in engine.holders()] == [2 * 3, 3, 3]
    assert engine.run_until(100.0).kv_used_layer_blocks == 0


def test_admission_needs_no_room_for_what_others_hold() -> None:
    """8 KV blocks a layer: two prompts of 17 tokens need 5 each, but 6 together where they share 4."""
    rows: tuple[Row, ...] = ((0.0, 17, 4, (1, 2)), (1.0, 17, 4, (1, 2)))
    for caching, admitted_s in ((False, [0.0, 4.0]), (True, [0.0, 1.0])):
        assert served(tiny_engine(kv_blocks=8, prefix_caching=caching), *rows).admitted_s.tolist() == admitted_s


def test_what_two_compute_at_once_stays_with_the_second_as_its_own() -> None:
    engine = tiny_engine(prefix_caching=True, max_batch_tokens=64)
    engine.submit(requests_of((0.0, 17, 9, (1, 2)), (0.0, 25, 9, (1, 2, 3))))
    assert engine.run_until(1.5).kv_used_layer_blocks == (5 + 7) * 3
    assert engine.shared_layer_blocks == (2 + 2 + 2) * 3  # two of the first, and the third of the second
    assert engine.records().cached_tokens.tolist() == [0, 0]


def test_the_longest_free_go_first_and_the_ends_of_prompts_before_their_beginnings() -> None:
    """10 KV blocks per layer, two per prefix block. The fourth prompt takes 7: two that hold no prefix block, those of
    prefix blocks 4 and 3, which no request used again, and one of prefix block 2.
    """
    rows: list[Row] = [(0.0, 17, 1, (1, 2)), (2.0, 17, 1, (3, 4)), (4.0, 17, 1, (1, 2)), (6.0, 25, 1, (8, 9, 10))]
    for last, found in (((3, 4), 0), ((1, 2), 8)):
        records = served(tiny_engine(kv_blocks=10, prefix_caching=True), *rows, (8.0, 17, 1, last))
        assert records.cached_tokens.tolist() == [0, 0, 16, 0, found]


def test_a_preempted_request_finds_its_prefix_blocks_again_and_with_reuse_more() -> None:
    """7 KV blocks of 4 tokens: two requests of 9 tokens grow until the newer is preempted, at 14 tokens."""
    rows: tuple[Row, ...] = ((0.0, 9, 9, (1,)), (0.0, 9, 9, (2,)))
    computed = {}
    for caching, reuse in ((False, False), (True, False), (True, True)):
        engine = tiny_engine(kv_blocks=7, prefix_caching=caching, reuse_preempted_kv=reuse)
        records = served(engine, *rows)
        assert records.preemptions.tolist() == [0, 1]
        assert records.status.tolist() == [Status.FINISHED] * 2
        computed[caching, reuse] = int(engine.iterations().prefill_tokens.sum())
    assert computed[True, True] <= computed[True, False] < computed[False, False]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (with_mask(DENSE, drop(TINY, mha=[1])), 0),  # KV of fewer layers is other KV
        (with_mask(DENSE, drop(TINY, ffn=[1])), 16),
        (dataclasses.replace(DENSE, weight_bits=(8,) * 3), 16),
        (dataclasses.replace(DENSE, kv_keep=(KVKeep(first_tokens=1, last_tokens=4),) * 3), 0),
        (dataclasses.replace(DENSE, decode=drop(TINY, mha=[1])), 0),
    ],
)
def test_a_plan_that_makes_other_kv_finds_nothing_from_before(change: Plan, found: int) -> None:
    for caching_again in (False, True):
        engine = tiny_engine(prefix_caching=True, host_to_device_bytes_per_s=1e9)
        engine.submit(requests_of((0.0, 17, 1, (1, 2)), (5.0, 17, 1, (1, 2)), (20.0, 17, 1, (1, 2))))
        engine.run_until(3.0)
        engine.apply(change)
        if caching_again:  # and back, before anybody came: what was forgotten stays forgotten
            engine.run_until(4.0)
            engine.apply(DENSE)
        engine.run_until(math.inf)
        assert engine.records().cached_tokens[:2].tolist() == [0, found]


def test_a_dropped_layer_frees_the_blocks_of_a_held_unit_once() -> None:
    engine = tiny_engine(prefix_caching=True)
    engine.submit(requests_of((0.0, 17, 9, (1, 2)), (2.0, 17, 9, (1, 2)), (7.0, 17, 9, (1, 2))))
    assert engine.run_until(3.5).kv_used_layer_blocks == (4 + 1 + 1) * 3
    engine.apply(with_mask(DENSE, drop(TINY, mha=[1])))
    assert engine.run_until(4.5).kv_used_layer_blocks == (4 + 2 + 1) * 2
    state = engine.run_until(7.5)  # the third cannot use it, and has its own
    assert state.kv_used_layer_blocks == (4 + 2 + 2 + 5) * 2
    assert engine.run_until(100.0).kv_used_layer_blocks == 0


def test_with_room_for_all_every_unit_that_came_before_is_found() -> None:
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    known: set[int] = set()
    expected = []
    for i in range(60):
        prompt, chain = int(rng.integers(1, 60)), int(rng.integers(3))
        alike = int(rng.integers(0, 6))
        ids = tuple(100 * chain + j if j < alike else 10_000 * (i + 1) + j for j in range(-(-prompt // 8)))
        usable = ids[: (prompt - 1) // 8]
        expected.append(8 * next((k for k, one in enumerate(usable) if one not in known), len(usable)))
        known |= set(ids[: prompt // 8])
        rows.append((10.0 * i, prompt, 1, ids))
    records = served(tiny_engine(kv_blocks=5000, prefix_caching=True), *rows)
    assert records.cached_tokens.tolist() == expected
    assert sum(expected) > 100


def test_without_the_option_hash_ids_change_nothing() -> None:
    found = []
    for ids in ((1, 2, 3), ()):
        engine = tiny_engine(kv_blocks=12)
        found.append(served(engine, *((0.3 * i, 20, 6, ids) for i in range(30))))
    for field in dataclasses.fields(Records):
        assert np.array_equal(getattr(found[0], field.name), getattr(found[1], field.name), equal_nan=True)


@given(seed=st.integers(0, 1 << 32))
def test_held_and_free_kv_blocks_add_up_with_a_cache(seed: int) -> None:
    """Laws 1 and 2, under plans and budgets that change: each shared block counts once, and all is free at the end."""
    case = with_kv_bits(seed, random_case(seed, later=False))  # swapping excludes a cache
    case = dataclasses.replace(case, config=dataclasses.replace(case.config, prefix_caching=True))
    try:
        engine, _ = serve(SimEngine, dataclasses.replace(case, plans=(), ticks_s=()))
        watched = _engine(case)
    except BudgetError:
        return
    assert engine.run_until(2 * LATE_S).arrived == len(case.requests)
    changes = dict(case.plans)
    for time_s in sorted({*changes, *np.linspace(0.0, 60.0, 30).tolist()}):
        state = watched.run_until(time_s)
        held = sum(holder.layer_blocks for holder in watched.holders()) + watched.shared_layer_blocks
        assert state.kv_used_layer_blocks == held
        if time_s in changes:
            watched.apply(changes[time_s])
    end = watched.run_until(math.inf)
    assert end.arrived == end.waiting + end.running + end.finished + end.rejected
    if not end.running:
        assert end.kv_used_layer_blocks == 0 == watched.shared_layer_blocks


def _engine(case: Case) -> SimEngine:
    made: SimEngine = engine_of(SimEngine, case, None)
    made.submit(case.submitted())
    return made


def test_a_restored_engine_finds_what_was_in_the_cache_then() -> None:
    engine = tiny_engine(kv_blocks=10, prefix_caching=True)
    engine.submit(requests_of((0.0, 17, 3, (1, 2))))
    engine.run_until(5.0)
    here = engine.snapshot()
    found = []
    for others in ((), ((6.0, 30, 1, (5, 6, 7)), (8.0, 30, 1, (15, 16, 17)))):
        engine.submit(requests_of(*others, (20.0, 17, 1, (1, 2))))
        engine.run_until(math.inf)
        found.append(int(engine.records().cached_tokens[-1]))
        engine.restore(here)
    engine.submit(requests_of((20.0, 17, 1, (1, 2))))
    engine.run_until(math.inf)
    assert [*found, int(engine.records().cached_tokens[-1])] == [16, 0, 16]


def trace_of(*rows: Row) -> Trace:
    arrival_s, prompts, outputs, ids = zip(*rows, strict=True)
    return Trace(
        arrival_s=np.array(arrival_s),
        prompt_tokens=np.array(prompts),
        output_tokens=np.array(outputs),
        hash_ids=tuple(np.array(one, dtype=np.int64) for one in ids),
    )


def test_each_replica_has_a_cache_of_its_own() -> None:
    trace = trace_of(*((10.0 * i, 17, 1, (1, 2)) for i in range(4)))
    for router, found in ((routers.round_robin(), [0, 0, 16, 16]), (routers.prefix_affinity(), [0, 16, 16, 16])):
        replica = Replica(
            name="one",
            build=lambda env: (tiny_engine(prefix_caching=True, env=env, external_clock=True), Fixed(DENSE)),
        )
        cluster = Cluster(trace, [replica, replica], router)
        cluster.run()
        assert cluster.records().cached_tokens.tolist() == found


def test_what_cannot_be_is_an_error_that_says_what_can() -> None:
    bare = Trace(arrival_s=np.zeros(1), prompt_tokens=np.array([17]), output_tokens=np.array([1]))
    with pytest.raises(ConfigError, match="trace=mooncake_conversation"):
        replay(bare, tiny_engine(prefix_caching=True), Fixed(DENSE))
    with pytest.raises(ConfigError, match="hash id 7 comes twice in the prompt of request 1"):
        tiny_engine(prefix_caching=True).submit(requests_of((0.0, 9, 1, (7, 8)), (1.0, 20, 1, (7, 8, 7))))
    with pytest.raises(ConfigError, match=r"kv_block_tokens, 16, must divide engine\.hash_block_tokens, 24"):
        EngineConfig(prefix_caching=True, hash_block_tokens=24)
    with pytest.raises(ConfigError, match="hash_block_tokens is 0"):
        EngineConfig(hash_block_tokens=0)

    def build(env: object) -> SimEngine:
        return tiny_engine(prefix_caching=True, env=env, external_clock=True)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="disaggregated serving does not simulate it"):
        Disaggregated(bare, plan=DENSE, prefill=[build], decode=[build], link_bytes_per_s=1e9)


@pytest.mark.parametrize("ids", [("a", "b"), (1.5, 2.0), (float("nan"), 1.0), (2**64, 1), (None, 1)])
def test_hash_ids_that_are_no_whole_numbers_of_64_bits_are_refused(ids: tuple[Any, ...]) -> None:
    compiled = tiny_engine(prefix_caching=True)
    plain = PlainEngine(
        model=TINY, latency=linear_latency(), config=compiled.config, plan=DENSE, budget_bytes=1_000_000_000
    )
    for engine in (compiled, plain):
        with pytest.raises(ConfigError, match=r"hash ids of a prompt are .* 64 bits"):
            engine.submit(requests_of((0.0, 17, 1, ids)))
        engine.submit(requests_of((0.0, 17, 1, (7, 8)), (1.0, 17, 1, ())))
        engine.run_until(math.inf)
        assert len(engine.records()) == 2


def test_the_random_cases_share_prompts_under_all_that_has_rules() -> None:
    """The comparison of the two engines (test_kernel.py) covers the cache only if some cases reach it."""
    met = dict.fromkeys(("found", "preempted", "plans", "budgets", "reuse"), 0)
    for seed in range(150):
        case = random_case(seed)
        if not case.config.prefix_caching:
            continue
        try:
            records = serve(SimEngine, case)[0].records()
        except BudgetError:
            continue
        if records.cached_tokens.any():
            met["found"] += 1
            met["preempted"] += bool(records.preemptions.any())
            met["plans"] += bool(case.plans or case.scheduled)
            met["budgets"] += bool(case.budget_steps)
            met["reuse"] += case.config.reuse_preempted_kv and bool(records.preemptions.any())
    assert min(met.values()) >= 2, met
