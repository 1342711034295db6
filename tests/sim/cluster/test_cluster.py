"""A cluster loses no request, leaves its engines' records alone, and equals the plain one, request by request."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from sim.cluster import kernel as cluster_kernel
from sim.cluster import routers
from sim.cluster.cluster import Cluster, ClusterState, Phase, Replica
from sim.cluster.outages import Outage
from sim.cluster.routers import Candidate, RoutingRequest
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.plan import dense_plan
from sim.engine import batch_step
from sim.engine.budget import Budget
from sim.engine.sim_engine import SimEngine
from sim.errors import BudgetError, ConfigError
from sim.policies import Fixed
from sim.results.records import Records, Status
from sim.traces.trace import Trace
from tests.sample import examples, quick
from tests.sim.cluster.cluster_cases import (
    AtTimes,
    FewestRequests,
    differences,
    engine,
    fast_cluster,
    moments,
    random_cluster,
    shrunk,
)
from tests.sim.cluster.plain_cluster import PlainCluster
from tests.sim.engine.kernel_cases import random_case
from tests.sim.engine.test_batch_step import assert_seen
from tests.sim.serving import TINY, linear_latency, tiny_engine

DENSE = dense_plan(TINY)


def trace_of(*rows: tuple[float, int, int]) -> Trace:
    arrival_s, prompts, outputs = zip(*rows, strict=True)
    return Trace(arrival_s=np.array(arrival_s), prompt_tokens=np.array(prompts), output_tokens=np.array(outputs))


def tiny(**overrides: object) -> Callable[[simpy.Environment], tuple[SimEngine, Fixed]]:
    """Return a function that builds a tiny engine whose iterations take a second."""
    return lambda env: (tiny_engine(env=env, external_clock=True, **overrides), Fixed(DENSE))  # type: ignore[arg-type]


def replicas(count: int, outages: Sequence[Outage] = (), **overrides: object) -> list[Replica]:
    """Return tiny replicas; the outages are those of the first."""
    return [
        Replica(name=str(i), build=tiny(**overrides), outages=tuple(outages) if i == 0 else ()) for i in range(count)
    ]


@pytest.mark.parametrize("first", quick(range(0, 160, 20), 4))
def test_the_compiled_cluster_leaves_the_records_of_the_plain_one(first: int) -> None:
    for seed in range(first, first + 20):
        found = differences(random_cluster(seed))
        assert found == [], f"seed {seed}; `make fuzz KIND=cluster FIRST={seed} CASES=1` shrinks it"


def test_a_request_whose_longest_wait_ends_with_its_replica_is_rejected_and_not_moved() -> None:
    assert differences(random_cluster(10331)) == []


def test_the_random_clusters_meet_everything_that_has_rules() -> None:
    names = ("moved", "moved twice", "moved after its first token", "rejected", "held", "preempted", "left alone")
    met = dict.fromkeys(names, 0)
    for seed in range(80):
        try:
            records = fast_cluster(random_cluster(seed)).records()
        except BudgetError:
            continue
        moved = records.moves > 0
        met["moved"] += moved.any()
        met["moved twice"] += (records.moves > 1).any()
        met["moved after its first token"] += (moved & (records.produced_tokens > 0)).any()
        met["rejected"] += (records.status == Status.REJECTED).any()
        met["held"] += (records.replica < 0).any()
        met["preempted"] += (records.preemptions > 0).any()
        met["left alone"] += not moved.any()
    assert min(met.values()) >= 2, met


def test_a_difference_between_the_clusters_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: it detects a plain cluster whose ties go to the last replica."""
    original = PlainCluster._choose
    monkeypatch.setattr(
        PlainCluster,
        "_choose",
        lambda self, row, tokens: len(self.replicas) - 1 if len(self.replicas) > 1 else original(self, row, tokens),
    )
    cases = (random_cluster(seed) for seed in range(60))
    case = next(case for case in cases if not any(case.outages) and differences(case))
    small = shrunk(case)
    assert differences(small)
    assert len(small.requests) <= 2
    assert len(small.replicas) == 2


def test_the_end_of_a_cluster_is_that_of_its_last_iteration_whatever_its_budget_does_later() -> None:
    """The requests end at 6 s; the budget cannot hold the weights from 50 s until 60 s and from 70 s until 80 s."""
    full = budget_for_kv_blocks(TINY, dense_plan(TINY), 100, 0, 4)
    moving = Budget((0.0, 50.0, 60.0, 70.0, 80.0), (full, 1000, full, 1000, full))
    trace = trace_of((0.0, 8, 5), (1.0, 8, 5))

    def build(env: simpy.Environment) -> tuple[SimEngine, Fixed]:
        return tiny_engine(env=env, external_clock=True, budget=moving), Fixed(dense_plan(TINY))

    cluster = Cluster(trace, [Replica(name="0", build=build)], routers.round_robin())
    cluster.run()
    assert cluster.end_s == 6.0
    assert cluster.engines()[0].engine.budget_violation_s == 0.0


@pytest.mark.parametrize("seed", quick(range(60), 20))
def test_a_cluster_of_one_leaves_the_very_records_of_the_engine_alone(seed: int) -> None:
    case = random_case(seed)
    try:
        alone: SimEngine = engine(SimEngine, case, None)
    except BudgetError:
        pytest.skip("the budget of this seed holds no engine")
    ids = tuple(np.array(request.hash_ids) for request in case.submitted())
    trace = dataclasses.replace(trace_of(*case.requests), hash_ids=ids)
    alone.submit_arrays(trace.arrival_s, trace.prompt_tokens, trace.output_tokens, trace.hash_ids)
    policy, times = AtTimes(case), iter(moments(case))
    while not alone.drained:
        state = alone.run_until(next(times, math.inf))
        if not alone.drained:
            alone.apply(policy(state))
    alone.run_until(math.inf)  # a cluster, too, completes the copies that are under way at its end

    def build(env: simpy.Environment) -> tuple[SimEngine, AtTimes]:
        return engine(SimEngine, case, env, external_clock=True), AtTimes(case)

    cluster = Cluster(
        trace, [Replica(name="0", build=build, decisions_s=lambda: iter(moments(case)))], routers.least_kv()
    )
    cluster.run()
    (served,) = cluster.engines()
    records = cluster.records()
    assert not records.moves.any()
    for field in dataclasses.fields(Records):
        ours, theirs = getattr(records, field.name), getattr(alone.records(), field.name)
        assert np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f"), field.name
    for name in ("iterations", "token_gaps", "transitions"):
        ours, theirs = getattr(served.engine, name)(), getattr(alone, name)()
        for field in dataclasses.fields(ours):
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            if isinstance(a, np.ndarray):
                assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), f"{name}.{field.name}"
            else:
                assert a == b, f"{name}.{field.name}"


@given(seed=st.integers(0, 1 << 32))
def test_no_request_is_lost_or_served_twice_whatever_fails(seed: int) -> None:
    case = random_cluster(seed)
    try:
        cluster = fast_cluster(case)
    except BudgetError:
        return
    records = cluster.records()
    assert len(records) == len(case.requests)
    finished, rejected = records.status == Status.FINISHED, records.status == Status.REJECTED
    left = ~finished & ~rejected
    counted = np.zeros(3, dtype=np.int64)
    for served in cluster.engines():
        state = served.engine.observe(served.engine.env.now)
        counted[:2] += (state.finished, state.rejected)
        if math.isinf(served.ended_s):
            counted[2] += state.waiting + state.running
    counted[2] += (records.replica < 0).sum()
    assert counted.tolist() == [finished.sum(), rejected.sum(), left.sum()]
    assert np.isfinite(records.finish_s[finished]).all()
    assert (records.ttft_s[finished] >= 0).all()
    assert (records.finish_s[finished] >= records.first_token_s[finished]).all()
    limits = np.minimum(records.output_tokens, [max(r.config.max_context_tokens or 0 for r in case.replicas)])
    assert (records.produced_tokens <= np.minimum(records.output_tokens, limits)).all()
    if left.any():  # only those that no replica could ever serve are left
        assert cluster.drained


@given(seed=st.integers(0, 1 << 32))
@examples(30)
def test_kv_blocks_of_every_replica_add_up_to_its_pool_when_all_is_done(seed: int) -> None:
    try:
        cluster = fast_cluster(random_cluster(seed))
    except BudgetError:
        return
    for served in cluster.engines():
        if math.isinf(served.ended_s):
            state = served.engine.observe(served.engine.env.now)
            held = sum(holder.layer_blocks for holder in served.engine.holders())
            assert state.kv_used_layer_blocks == held + served.engine.shared_layer_blocks


def test_two_runs_with_one_seed_leave_identical_records() -> None:
    for seed in (3, 17, 40):
        first, second = (fast_cluster(random_cluster(seed)).records() for _ in range(2))
        for field in dataclasses.fields(first):
            a, b = getattr(first, field.name), getattr(second, field.name)
            assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), field.name


def test_a_cluster_that_stops_on_its_way_leaves_the_records_of_one_that_does_not() -> None:
    stops_s = [0.1, *(1.7 * k for k in range(1, 60))]
    for seed in range(40):
        try:
            first, second = (fast_cluster(random_cluster(seed), stops_s=stops).records() for stops in ((), stops_s))
        except BudgetError:
            continue
        for field in dataclasses.fields(first):
            a, b = getattr(first, field.name), getattr(second, field.name)
            assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), f"seed {seed}: {field.name}"


def test_observing_all_replicas_at_once_equals_observing_each() -> None:
    case = next(case for case in map(random_cluster, range(60)) if len(case.replicas) > 1 and not any(case.outages))
    several = [
        Replica(
            name=str(i), build=lambda env, one=one: (engine(SimEngine, one, env, external_clock=True), AtTimes(one))
        )
        for i, one in enumerate(case.replicas)
    ]
    cluster = Cluster(case.trace(), several, routers.least_kv())
    seen = np.zeros((len(several), batch_step.SEEN_COLUMNS))
    for stop_s in (1.0, 5.0, 20.0):
        cluster.run_until(stop_s)
        cluster.observe_into(seen)
        for i in range(len(several)):
            assert_seen(seen[i], cluster.observe(i))
        cluster.apply(0, DENSE)
    assert cluster.observe(0).target == DENSE


def test_a_python_router_does_what_the_compiled_one_does() -> None:
    for seed in range(30):
        case = dataclasses.replace(random_cluster(seed), router="least_outstanding")
        try:
            ours, theirs = fast_cluster(case, FewestRequests()).records(), fast_cluster(case).records()
        except BudgetError:
            continue
        for field in dataclasses.fields(ours):
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), (seed, field.name)


def test_a_router_is_never_shown_an_output_length() -> None:
    shown = {field.name for field in dataclasses.fields(RoutingRequest)} | {
        f.name for f in dataclasses.fields(Candidate)
    }
    assert not any("output" in name or "limit" in name for name in shown)


def test_a_failed_replicas_request_goes_on_elsewhere_with_the_tokens_it_had() -> None:
    """An iteration takes 1 s: two tokens by 2 s; at 2.5 s it starts again elsewhere, and its third comes at 3.5 s."""
    trace = trace_of((0.0, 8, 5))
    cluster = Cluster(trace, replicas(2, [Outage(from_s=2.5, until_s=math.inf)]), routers.least_outstanding())
    cluster.run()
    records = cluster.records()
    assert records.first_token_s.tolist() == [1.0]
    assert records.finish_s.tolist() == [5.5]
    assert records.produced_tokens.tolist() == [5]
    assert (records.replica.tolist(), records.moves.tolist()) == ([1], [1])
    second = cluster.engines()[1].engine.iterations()
    assert second.prefill_tokens.tolist() == [10, 0, 0]  # the prompt, and the two tokens it had
    assert [(e.time_s, e.replica, e.phase, e.moved) for e in cluster.events()][2:] == [(2.5, 0, Phase.DOWN, 1)]


def test_with_notice_what_runs_goes_on_and_what_waits_leaves_at_once() -> None:
    """The first replica takes one at a time; its second request waits there until the notice, at 1.5 s."""
    trace = trace_of((0.0, 8, 3), (0.0, 8, 9), (0.0, 8, 1))
    outage = Outage(from_s=10.0, until_s=math.inf, notice_s=8.5)
    cluster = Cluster(trace, replicas(2, [outage], max_running=1), routers.round_robin())
    cluster.run()
    records = cluster.records()
    assert records.replica.tolist() == [0, 1, 1]
    assert records.moves.tolist() == [0, 0, 1]
    assert records.finish_s.tolist() == [3.0, 9.0, 10.0]


def test_a_replica_that_comes_back_loads_its_weights_first_and_requests_wait_for_it_in_order() -> None:
    trace = trace_of((2.0, 8, 1), (2.0, 8, 1))
    load_s = 4.0
    loaded = tiny()(simpy.Environment())[0].observe(0.0).weight_bytes / load_s
    cluster = Cluster(
        trace,
        replicas(1, [Outage(from_s=1.0, until_s=3.0)], max_running=1),
        routers.round_robin(),
        load_bytes_per_s=loaded,
        start_s=0.5,
    )
    cluster.run()
    assert [(e.time_s, e.phase) for e in cluster.events()] == [
        (0.0, Phase.SERVING),
        (1.0, Phase.DOWN),
        (3.0, Phase.LOADING),
        (7.5, Phase.SERVING),
    ]
    assert cluster.records().finish_s.tolist() == [8.5, 9.5]
    assert cluster.records().moves.tolist() == [0, 0]


def test_requests_that_no_replica_will_ever_serve_are_still_waiting() -> None:
    cluster = Cluster(trace_of((0.0, 8, 9), (5.0, 8, 1)), replicas(1, [Outage(from_s=2.5, until_s=math.inf)]),
                      routers.round_robin())  # fmt: skip
    cluster.run()
    records = cluster.records()
    assert records.status.tolist() == [Status.WAITING, Status.WAITING]
    assert records.replica.tolist() == [-1, -1]
    assert records.first_token_s[0] == 1.0
    assert records.produced_tokens.tolist() == [2, 0]


def test_a_request_goes_where_its_context_fits_and_is_rejected_where_it_fits_nowhere() -> None:
    small, large = tiny(max_context_tokens=16), tiny(max_context_tokens=64)
    both = [Replica(name="small", build=small), Replica(name="large", build=large)]
    cluster = Cluster(trace_of((0.0, 20, 1), (0.0, 8, 1), (0.0, 99, 1)), both, routers.least_outstanding())
    cluster.run()
    assert cluster.records().replica.tolist() == [1, 0, 0]
    assert cluster.records().status.tolist() == [Status.FINISHED, Status.FINISHED, Status.REJECTED]


def test_requests_with_one_beginning_go_to_one_replica_while_loads_are_close() -> None:
    ids = [(1, 2), (7,), (1, 3), (1, 2, 4), (7, 8)]
    trace = dataclasses.replace(
        trace_of(*((30.0 * i, 8, 1) for i in range(5))), hash_ids=tuple(np.array(i, dtype=np.int64) for i in ids)
    )
    busy = dataclasses.replace(trace, arrival_s=np.arange(5) * 1e-3)
    for arrivals, most_apart, expected in (
        (trace, 5, [0, 0, 0, 0, 0]),
        (busy, 5, [0, 1, 0, 0, 1]),
        (busy, 0, [0, 1, 0, 1, 1]),
    ):
        cluster = Cluster(arrivals, replicas(2), routers.prefix_affinity(most_apart=most_apart, most_times=1))
        cluster.run()
        assert cluster.records().replica.tolist() == expected


def test_the_shortest_expected_wait_counts_the_price_of_each_replica() -> None:
    slow, fast = linear_latency(base_s=0.0, token_s=1.0), linear_latency(base_s=0.0, token_s=0.25)
    both = [Replica(name="slow", build=tiny(latency=slow)), Replica(name="fast", build=tiny(latency=fast))]
    cluster = Cluster(trace_of(*((i * 1e-3, 8, 1) for i in range(5))), both, routers.shortest_expected_wait())
    cluster.run()
    assert np.bincount(cluster.records().replica).tolist() == [1, 4]


@dataclasses.dataclass
class ByQueue:
    """As many replicas as there are requests, up to a few."""

    most: int
    period_s: float = 1.0
    first: int = 1

    def __call__(self, state: ClusterState) -> int:
        return min(self.most, max(1, sum(s.waiting + s.running for s in state.serving) + state.held))


def test_an_autoscaler_adds_replicas_that_load_and_takes_away_those_that_are_done() -> None:
    trace = trace_of(*((0.0, 8, 6) for _ in range(4)), (20.0, 8, 2))
    cluster = Cluster(trace, replicas(3, max_running=1), routers.least_outstanding(), autoscaler=ByQueue(3),
                      load_bytes_per_s=1e9, start_s=2.0)  # fmt: skip
    cluster.run()
    records = cluster.records()
    assert (records.status == Status.FINISHED).all()
    phases = [(round(e.time_s, 2), e.replica, e.phase) for e in cluster.events()]
    assert (1.0, 1, Phase.LOADING) in phases
    assert (1.0, 2, Phase.LOADING) in phases
    assert {i for _, i, phase in phases if phase is Phase.OFF} == {1, 2}
    assert records.finish_s.tolist() == [6.0, 12.0, 18.0, 24.0, 26.0]  # a waiting request stays where it was sent


def test_an_autoscaler_replaces_a_replica_that_fails_from_its_notice_on() -> None:
    """One replica is wanted all the time. Before, nothing replaced one that was gone, and the run had no end."""
    trace = trace_of((0.0, 8, 9), (5.0, 8, 1))
    for until_s in (math.inf, 30.0):
        outage = Outage(from_s=4.5, until_s=until_s, notice_s=2.0)
        cluster = Cluster(trace, replicas(2, [outage]), routers.least_outstanding(), autoscaler=ByQueue(1),
                          load_bytes_per_s=1e9, start_s=2.0)  # fmt: skip
        cluster.run()
        assert (cluster.records().status == Status.FINISHED).all()
        phases = [(round(e.time_s, 2), e.phase) for e in cluster.events() if e.replica == 1]
        assert phases == [(3.0, Phase.LOADING), (5.0, Phase.SERVING)]
        # The machine that comes back is not needed, as the other one serves.
        assert all(e.phase is not Phase.LOADING for e in cluster.events() if e.replica == 0)


def test_an_autoscaler_cannot_want_more_than_there_are() -> None:
    crowd = trace_of(*((0.0, 8, 9) for _ in range(9)))
    with pytest.raises(ConfigError, match="wants 9 replicas; it must want 1 to 2"):
        Cluster(crowd, replicas(2), routers.round_robin(), autoscaler=ByQueue(most=9)).run()


def test_an_impossible_argument_is_an_error_that_states_what_is_allowed() -> None:
    trace = trace_of((0.0, 8, 1))
    with pytest.raises(ConfigError, match="at least one replica"):
        Cluster(trace, [], routers.round_robin())
    with pytest.raises(ConfigError, match="load_bytes_per_s is 0"):
        Cluster(trace, replicas(1), routers.round_robin(), load_bytes_per_s=0)
    with pytest.raises(ConfigError, match="end after that"):
        Outage(from_s=3.0, until_s=3.0)
    with pytest.raises(ConfigError, match=r"before the previous one ends at 9\.0 s"):
        replicas(1, [Outage(from_s=3.0, until_s=9.0), Outage(from_s=5.0, until_s=12.0)])
    with pytest.raises(ConfigError, match=r"chose replica 7; it must choose one of its candidates, \[0, 1\]"):
        Cluster(trace, replicas(2), lambda candidates, request: 7).run()
    with pytest.raises(ConfigError, match="most_apart is -1"):
        routers.prefix_affinity(most_apart=-1)


def test_compiled_rules_and_the_plain_ones_have_the_same_names() -> None:
    made = [routers.round_robin(), routers.least_outstanding(), routers.least_kv(), routers.shortest_expected_wait(),
            routers.prefix_affinity(), routers.session_affinity(), routers.power_of_two()]  # fmt: skip
    assert sorted(router.rule for router in made) == list(range(cluster_kernel.ASK))
