"""Sessions on many replicas: when turns arrive, and which replica serves them; compiled and plain cluster are equal."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import simpy

from sim.cluster import routers
from sim.cluster.cluster import Cluster, ClusterRecords, Replica
from sim.cluster.outages import Outage
from sim.cluster.routers import Candidate, Router, RoutingRequest
from sim.errors import ConfigError
from sim.policies import Fixed
from sim.results.records import Status
from sim.traces.chats import chat_users, chats
from sim.traces.generate import lognormal_lengths, poisson, poisson_arrivals
from sim.traces.sessions import next_turns, turn_numbers
from sim.traces.trace import Trace
from tests.sample import quick
from tests.sim.cluster import cluster_cases
from tests.sim.serving import linear_latency, tiny_engine

LENGTHS = partial(lognormal_lengths, prompt_tokens_p50=15, prompt_sigma=0.8, output_tokens_p50=10, output_sigma=0.8)
LATENCY = linear_latency(0.0625, 0.0078125, 0.001)


def replicas(count: int, outages: dict[int, Outage] | None = None, **settings: object) -> list[Replica]:
    def build(env: simpy.Environment):  # type: ignore[no-untyped-def]
        engine = tiny_engine(latency=LATENCY, env=env, external_clock=True, **settings)  # type: ignore[arg-type]
        return engine, Fixed(engine.graph.plan(0))

    found = outages or {}
    return [Replica(name=str(i), build=build, outages=(found[i],) if i in found else ()) for i in range(count)]


def served(trace: Trace, router: Router, count: int = 4, **more: object) -> tuple[Cluster, ClusterRecords]:
    cluster = Cluster(trace, replicas(count, **more), router, load_bytes_per_s=1e6)  # type: ignore[arg-type]
    cluster.run()
    assert cluster.drained
    return cluster, cluster.records()


def some_chats(seed: int = 0, rate_rps: float = 1.0) -> Trace:
    starts = partial(poisson_arrivals, rate_rps=rate_rps, duration_s=40.0)
    return chats(arrivals=starts, lengths=LENGTHS, think_s=3.0, max_context_tokens=250, block_tokens=8, seed=seed)


@pytest.mark.parametrize("seed", quick(range(400), 40))
def test_the_compiled_cluster_serves_sessions_like_the_plain_one(seed: int) -> None:
    assert cluster_cases.differences(cluster_cases.random_session_cluster(seed)) == []


@pytest.mark.parametrize("router", [routers.round_robin(), routers.session_affinity(), cluster_cases.FewestRequests()])
def test_law_every_turn_arrives_once_after_the_one_before_it_on_whichever_replica_that_ended(router: Router) -> None:
    trace = some_chats()
    assert trace.session is not None
    assert trace.think_s is not None
    outages = {0: Outage(from_s=10.0, until_s=20.0, notice_s=0.0), 1: Outage(from_s=15.0, until_s=30.0, notice_s=2.0)}
    cluster, records = served(trace, router, 2, outages=outages)
    assert (records.moves > 0).any()
    assert (records.status == Status.FINISHED).all()
    order = cluster.arrival_order()
    assert sorted(order.tolist()) == list(range(len(trace)))
    row = np.argsort(order)
    arrival_s, finish_s = records.arrival_s[row], records.finish_s[row]
    for before, after in enumerate(next_turns(trace.session, trace.think_s).tolist()):
        if after >= 0:
            assert arrival_s[after] == finish_s[before] + trace.think_s[after]


@pytest.mark.parametrize("count", [1, 3])
def test_law_a_closed_loop_never_has_more_requests_in_the_cluster_than_users(count: int) -> None:
    trace = chat_users(users=6, lengths=LENGTHS, think_s=1.0, max_context_tokens=200, block_tokens=8, seed=1)
    _, records = served(trace, routers.least_outstanding(), count)
    events = np.concatenate([records.arrival_s, records.finish_s])
    change = np.concatenate([np.ones(len(records)), -np.ones(len(records))])
    assert int(np.cumsum(change[np.lexsort((change, events))]).max()) <= 6


def test_a_cluster_of_one_replica_leaves_the_records_of_its_engine() -> None:
    trace = some_chats()
    _, records = served(trace, routers.round_robin(), 1, prefix_caching=True)
    engine = tiny_engine(latency=LATENCY, prefix_caching=True)
    engine.submit_trace(trace)
    engine.run_until(np.inf)
    alone = engine.records()
    for name in ("arrival_s", "first_token_s", "finish_s", "cached_tokens"):
        assert getattr(records, name).tobytes() == getattr(alone, name).tobytes(), name


def test_affinity_keeps_sessions_on_one_replica_and_finds_more_in_its_cache_than_round_robin() -> None:
    trace = some_chats(rate_rps=2.0)
    assert trace.session is not None
    found = {}
    for name, router in (("affinity", routers.session_affinity()), ("round robin", routers.round_robin())):
        cluster, records = served(trace, router, 4, prefix_caching=True)
        session = trace.session[cluster.arrival_order()]
        homes = [len(set(records.replica[session == number].tolist())) for number in set(session.tolist())]
        found[name] = records.cached_tokens.sum() / records.prompt_tokens.sum(), max(homes)
    assert found["affinity"][1] == 1
    assert found["round robin"][1] > 1
    assert found["affinity"][0] > 1.5 * found["round robin"][0]
    # All that a turn could find is there: the prompt and the answer before it, in full blocks, without the last token.
    cluster, records = served(trace, routers.session_affinity(), 4, prefix_caching=True)
    later = turn_numbers(trace.session)[cluster.arrival_order()] > 0
    assert (records.cached_tokens[later] > 0).mean() > 0.95


def test_affinity_yields_to_load_and_a_session_stays_where_it_has_moved_to() -> None:
    trace = some_chats(rate_rps=3.0)
    assert trace.session is not None
    strict = routers.session_affinity(most_apart=1, most_times=1)
    cluster, records = served(trace, strict, 2, max_running=1)
    session = trace.session[cluster.arrival_order()]
    moved = [number for number in set(session.tolist()) if len(set(records.replica[session == number].tolist())) > 1]
    assert moved
    calm, _ = served(trace, routers.session_affinity(), 2, max_running=1)
    assert len(calm.records()) == len(records)


def test_affinity_leaves_a_replica_that_has_gone() -> None:
    trace = some_chats()
    gone = {0: Outage(from_s=12.0, until_s=np.inf, notice_s=0.0)}
    _, records = served(trace, routers.session_affinity(), 2, outages=gone)
    assert (records.replica[records.arrival_s > 12.0] == 1).all()
    assert (records.replica == 0).any()


def test_a_router_in_python_is_never_shown_an_output_length_in_sessions() -> None:
    seen: list[RoutingRequest] = []

    def router(candidates: list[Candidate], request: RoutingRequest) -> int:
        seen.append(request)
        return candidates[-1].replica

    trace = some_chats()
    served(trace, router, 2)  # type: ignore[arg-type]
    assert len(seen) == len(trace)
    assert not any(hasattr(request, "output_tokens") for request in seen)


def test_affinity_without_sessions_sends_requests_to_the_fewest() -> None:
    trace = poisson(rate_rps=3.0, duration_s=20.0, lengths=LENGTHS)
    _, one = served(trace, routers.session_affinity(), 2)
    _, other = served(trace, routers.least_outstanding(), 2)
    assert one.replica.tolist() == other.replica.tolist()
    with pytest.raises(ConfigError, match="most_apart is -1"):
        routers.session_affinity(most_apart=-1)
