"""KV that goes with its requests when a replica is taken away with notice."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.cluster import routers
from sim.cluster.cluster import Cluster, ClusterState, Phase, Replica
from sim.cluster.outages import Outage
from sim.cluster.run import run
from sim.config import CONF_DIR
from sim.cost.plan import drop, with_mask
from sim.errors import BudgetError, ConfigError
from sim.results.records import Status
from tests.sample import quick
from tests.sim.cluster.cluster_cases import (
    differences,
    fast_cluster,
    random_cluster,
    random_session_cluster,
    with_migration,
)
from tests.sim.cluster.test_cluster import DENSE, replicas, tiny, trace_of
from tests.sim.serving import TINY

NOTICE = Outage(from_s=10.0, until_s=math.inf, notice_s=8.0)


def test_a_decoding_request_takes_its_kv_along_and_computes_nothing_again() -> None:
    """Iterations take 1 s, and a token's KV 384 bytes, 0.06 s on the link; looks are 0.125 s apart.

    At 8.875 s there are 15 tokens, 0.9 s of the link: two looks later it would be too late. The iteration ends at 9 s;
    16 tokens then need 0.96 s. Nine of 20 tokens are there, and the other eleven follow at the other replica.
    """
    cluster = Cluster(trace_of((0.0, 8, 20)), replicas(2, [NOTICE]), routers.round_robin(), migrate_bytes_per_s=6400.0)
    cluster.run()
    (sent,) = cluster.migrations()
    assert (sent.request, sent.replica, sent.to, sent.size_bytes, sent.reused) == (0, 0, 1, 16 * 384, True)
    assert (sent.begun_s, sent.ended_s) == (9.0, pytest.approx(9.96))
    records = cluster.records()
    assert records.finish_s.tolist() == [pytest.approx(20.96)]
    assert (records.replica.tolist(), records.moves.tolist(), records.preemptions.tolist()) == ([1], [1], [0])
    assert not cluster.engines()[1].engine.iterations().prefill_tokens.any()
    left = [(e.time_s, e.phase, e.moved) for e in cluster.events() if e.replica == 0]
    assert left == [(0.0, Phase.SERVING, 0), (8.875, Phase.LEAVING, 0), (10.0, Phase.DOWN, 1)]


def test_a_replica_with_notice_accepts_requests_until_it_has_to_send() -> None:
    trace = trace_of((0.0, 8, 20), (0.0, 8, 1), (5.0, 8, 2))
    with_kv = Cluster(trace, replicas(2, [NOTICE]), routers.round_robin(), migrate_bytes_per_s=6400.0)
    without = Cluster(trace, replicas(2, [NOTICE]), routers.round_robin())
    for cluster, replica in ((with_kv, 0), (without, 1)):
        cluster.run()
        assert cluster.records().replica[2] == replica


def test_over_a_slow_link_requests_go_without_kv_as_if_none_were_sent() -> None:
    trace = trace_of((0.0, 8, 20), (3.0, 8, 4), (3.0, 8, 4))
    slow, none = (
        Cluster(trace, replicas(2, [NOTICE]), routers.round_robin(), migrate_bytes_per_s=rate) for rate in (1.0, None)
    )
    for cluster in (slow, none):
        cluster.run()
    assert slow.migrations() == ()
    assert slow.records().finish_s.tolist() == none.records().finish_s.tolist()
    assert slow.events() == none.events()


def test_kv_that_finds_no_room_when_it_arrives_is_computed_again() -> None:
    """The other replica has one place. It is free at 9 s, and taken by a request that arrives before 9.96 s."""
    trace = trace_of((0.0, 8, 20), (9.5, 8, 3))
    cluster = Cluster(trace, replicas(2, [NOTICE], max_running=1), routers.round_robin(), migrate_bytes_per_s=6400.0)
    cluster.run()
    (sent,) = cluster.migrations()
    assert not sent.reused
    records = cluster.records()
    assert records.moves.tolist() == [1, 0]
    assert records.finish_s.tolist() == [12.5 + 11, 12.5]
    assert cluster.engines()[1].engine.iterations().prefill_tokens.tolist()[3] == 8 + 9


def test_records_before_the_end_show_requests_on_their_way() -> None:
    cluster = Cluster(trace_of((0.0, 8, 20)), replicas(2, [NOTICE]), routers.round_robin(), migrate_bytes_per_s=6400.0)
    cluster.run_until(9.5)
    records = cluster.records()
    assert (records.replica.tolist(), records.produced_tokens.tolist()) == ([-1], [9])
    assert records.first_token_s.tolist() == [1.0]
    assert not cluster.drained


def test_a_replica_whose_context_is_too_short_gets_no_kv() -> None:
    short = Replica(name="short", build=tiny(max_context_tokens=12))
    cluster = Cluster(
        trace_of((0.0, 8, 20)),
        [*replicas(1, [NOTICE]), short, *replicas(1)],
        routers.round_robin(),
        migrate_bytes_per_s=6400.0,
    )
    cluster.run()
    assert [(one.to, one.reused) for one in cluster.migrations()] == [(2, True)]


def test_kv_goes_where_most_of_it_is_reused_and_only_layers_that_run_there_are_sent() -> None:
    """A replica that drops an MHA block could reuse two thirds of the KV; it gets some if there is no other one."""
    pruned = Replica(name="pruned", build=tiny(plan=with_mask(DENSE, drop(TINY, mha=[0]))))
    for others, to, layers in (([pruned, *replicas(1)], 2, 3), ([pruned], 1, 2)):
        cluster = Cluster(
            trace_of((0.0, 8, 20)), [*replicas(1, [NOTICE]), *others], routers.round_robin(), migrate_bytes_per_s=6400.0
        )
        cluster.run()
        (sent,) = cluster.migrations()
        assert (sent.to, sent.size_bytes, sent.reused) == (to, 16 * 128 * layers, True)


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=40, deadline=None)
def test_no_replica_sends_more_than_its_link_carries_within_the_notice(seed: int) -> None:
    case = with_migration(random_cluster(seed))
    try:
        cluster = fast_cluster(case)
    except BudgetError:
        return
    for i, outages in enumerate(case.outages):
        mine = sorted((one for one in cluster.migrations() if one.replica == i), key=lambda one: one.begun_s)
        for before, after in itertools.pairwise(mine):
            assert before.ended_s <= after.begun_s
        for outage in outages:
            sent = [one for one in mine if outage.from_s - outage.notice_s <= one.begun_s <= outage.from_s]
            assert all(one.ended_s <= outage.from_s for one in sent)
            assert case.migrate_bytes_per_s is not None or not sent
            assert sum(one.size_bytes for one in sent) <= (case.migrate_bytes_per_s or 0.0) * outage.notice_s * 1.000001
            mine = [one for one in mine if one not in sent]
        assert mine == []
    records = cluster.records()
    assert len(records) == len(case.requests)
    moves = np.bincount([one.request for one in cluster.migrations()], minlength=len(records))
    assert (moves <= records.moves).all()


def test_an_autoscaler_takes_a_replica_away_that_sends_and_its_request_goes_on() -> None:
    """At 9.5 s the autoscaler wants one replica fewer. The second replica is sending its last request then."""

    class FewerAtLast:
        period_s, first = 9.5, 2

        def __call__(self, state: ClusterState) -> int:
            return 1

    one, other = replicas(2, [NOTICE])
    cluster = Cluster(
        trace_of((0.0, 8, 1), (0.0, 8, 20)),
        [other, one],
        routers.round_robin(),
        autoscaler=FewerAtLast(),
        migrate_bytes_per_s=6400.0,
    )
    cluster.run()
    (sent,) = cluster.migrations()
    assert (sent.begun_s, sent.to, sent.reused) == (9.0, 0, True)
    assert (9.5, 1, Phase.OFF, 1) in [(e.time_s, e.replica, e.phase, e.moved) for e in cluster.events()]
    assert cluster.records().finish_s.tolist() == [1.0, pytest.approx(20.96)]


def test_the_figures_of_a_configuration_count_what_was_sent() -> None:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        overrides = ["trace.duration_s=40", "outages=schedule", "outages.rows=[[0,20,30]]", "outages.notice_s=10"]
        cfg = compose("cluster", overrides=[*overrides, "migrate_bytes_per_s=3.125e9"])
    cluster, summary = run(cfg)
    per_token = 32 * 2 * 32 * 128 * 2  # Llama-2-7B: layers, keys and values, heads, head dimension, bytes
    assert summary["moved_with_kv"] == sum(one.reused for one in cluster.migrations()) > 0
    assert summary["migrated_bytes"] % per_token == 0
    assert 0 < summary["migrated_bytes"] <= 3.125e9 * 10.0
    assert summary["finished"] == summary["requests"]


def test_the_random_clusters_send_kv_that_is_reused() -> None:
    reused = failed = finished = 0
    for seed in quick(range(400), 400):
        case = random_cluster(seed)
        if case.migrate_bytes_per_s is None or not any(outage.notice_s for mine in case.outages for outage in mine):
            continue
        try:
            cluster = fast_cluster(case)
        except BudgetError:
            continue
        status = cluster.records().status
        for one in cluster.migrations():
            reused, failed = reused + one.reused, failed + (not one.reused)
            finished += status[one.request] == Status.FINISHED
    assert reused >= 10
    assert finished >= 10


@pytest.mark.parametrize("make", [random_cluster, random_session_cluster])
def test_the_compiled_cluster_sends_what_the_plain_one_sends(make) -> None:  # type: ignore[no-untyped-def]
    for seed in range(1000, 1060):
        case = make(seed)
        if case.migrate_bytes_per_s is not None:
            assert differences(case) == [], f"seed {seed}"


@pytest.mark.parametrize("bytes_per_s", [0.0, -1.0, math.inf, math.nan])
def test_a_bandwidth_out_of_range_is_refused(bytes_per_s: float) -> None:
    with pytest.raises(ConfigError, match=r"migrate_bytes_per_s is .* at least 1 byte per second"):
        Cluster(trace_of((0.0, 8, 1)), replicas(1), routers.round_robin(), migrate_bytes_per_s=bytes_per_s)


def test_a_prefix_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.prefix_caching is true"):
        Cluster(trace_of((0.0, 8, 1)), replicas(1, prefix_caching=True), routers.round_robin(), migrate_bytes_per_s=1e9)
