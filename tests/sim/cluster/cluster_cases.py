"""Random clusters for comparing the compiled loop with the plain one: made from a seed, shrunk if they differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import simpy

from sim.cluster import routers
from sim.cluster.cluster import Autoscaler, Cluster, ClusterRecords, Replica
from sim.cluster.outages import Outage
from sim.cluster.routers import Candidate, KernelRouter, RoutingRequest
from sim.cost.plan import Plan
from sim.engine.protocol import EngineState
from sim.engine.sim_engine import SimEngine
from sim.errors import BudgetError
from sim.traces.trace import Trace
from tests.sim.cluster.plain_cluster import PlainCluster, PlainReplica, Row
from tests.sim.engine.kernel_cases import RELATIVE, Case, random_case
from tests.sim.engine.plain_engine import PlainEngine
from tests.sim.engine.session_cases import sessions_trace
from tests.sim.shrink import shrunk_case, without_some

ROUTERS = ("round_robin", "least_outstanding", "least_kv", "shortest_expected_wait", "prefix_affinity", "power_of_two")


@dataclass(frozen=True, kw_only=True)
class ClusterCase:
    """One cluster: requests with prefix ids, a case per replica (its own requests are not used), outages."""

    requests: tuple[tuple[float, int, int, tuple[int, ...]], ...]
    replicas: tuple[Case, ...]
    outages: tuple[tuple[Outage, ...], ...]
    router: str
    seed: int
    load_bytes_per_s: float
    start_s: float
    sessions: tuple[int, ...] = ()
    thinks_s: tuple[float, ...] = ()
    users: int | None = None
    migrate_bytes_per_s: float | None = None

    def trace(self) -> Trace:
        """Return the requests as a trace."""
        columns = list(zip(*self.requests, strict=True))
        if self.sessions:
            return sessions_trace(
                columns[0],
                columns[1],
                columns[2],
                self.sessions,
                self.thinks_s,
                self.users,
                [np.array(i) for i in columns[3]],
            )
        return Trace(
            arrival_s=np.array(columns[0]),
            prompt_tokens=np.array(columns[1]),
            output_tokens=np.array(columns[2]),
            hash_ids=tuple(np.array(ids, dtype=np.int64) for ids in columns[3]),
        )


class AtTimes:
    """A policy that follows a schedule of plans and ignores the rest of the state."""

    def __init__(self, case: Case) -> None:
        self.first_plan, self._plans = case.first_plan, dict(case.plans)

    def __call__(self, state: EngineState) -> Plan:
        """Return the plan scheduled for this time, else the current target."""
        return self._plans.get(state.time_s, state.target)


def moments(case: Case) -> tuple[float, ...]:
    """Return the times of a replica's decisions."""
    return tuple(sorted({time_s for time_s, _ in case.plans} | set(case.ticks_s)))


def engine(kind: type[Any], case: Case, env: simpy.Environment | None, **more: Any) -> Any:
    """Return an engine of a case."""
    return kind(
        model=case.model,
        latency=case.latency,
        config=case.config,
        plan=case.first_plan,
        budget_bytes=case.budget(),
        host_to_device_bytes_per_s=case.host_to_device_bytes_per_s,
        slowdown=case.slowdown,
        copy_slowdown=case.copy_slowdown,
        copy_layer_s=case.copy_layer_s,
        quality_nll=case.quality_nll,
        env=env,
        **more,
    )


def random_session_cluster(seed: int) -> ClusterCase:
    """Return the case of a seed with requests that are turns of sessions."""
    case = random_cluster(seed)
    rng = np.random.default_rng([seed, 16])
    count = len(case.requests)
    block = case.replicas[0].config.hash_block_tokens
    thinks_s = np.where(rng.random(count) < 0.4, rng.choice([0.0, 1.0, 3.0], count), rng.exponential(4.0, count))
    sessions = rng.integers(0, max(1, count // int(rng.choice([1, 3, 10]))), count).tolist()
    ids = [
        tuple(range(1000 * (n + 1), 1000 * (n + 1) + (p + o) // block))
        for n, (_, p, o, _) in zip(sessions, case.requests, strict=True)
    ]
    return replace(
        case,
        requests=tuple((a, p, o, i) for (a, p, o, _), i in zip(case.requests, ids, strict=True)),
        sessions=tuple(sessions),
        thinks_s=tuple(thinks_s.tolist()),
        users=int(rng.choice([1, 3, 6])) if rng.random() < 0.5 else None,
        router=str(rng.choice([*ROUTERS, "session_affinity", "session_affinity"])),
    )


def random_cluster(seed: int, *, ahead: bool | None = None, later: bool = True) -> ClusterCase:
    """Return the case of a seed; ``ahead`` and ``later`` as in ``random_case``."""
    rng = np.random.default_rng([seed, 8])
    count = int(rng.choice([1, 2, 2, 3, 4]))
    cases = [random_case(int(rng.integers(1 << 30)), ahead=ahead, later=later) for _ in range(count)]
    if rng.random() < 0.3:
        cases = [cases[0]] * count  # ties everywhere
    requests = sorted(row for case in cases for row in case.requests)
    outages = []
    for _ in range(count):
        mine, time_s = [], 0.0
        for _ in range(int(rng.choice([0, 0, 1, 3]))):
            time_s += float(np.round(rng.exponential(15.0)) if rng.random() < 0.5 else rng.exponential(15.0))
            end_s = time_s + float(rng.choice([1.0, 5.0, 20.0, np.inf], p=[0.25, 0.25, 0.25, 0.25]))
            mine.append(Outage(from_s=time_s, until_s=end_s, notice_s=float(rng.choice([0.0, 0.0, 2.0, 10.0]))))
            time_s = end_s + 1e-3
            if end_s == np.inf:
                break
        outages.append(tuple(mine))
    case = ClusterCase(
        requests=tuple((a, p, o, cases[0].hash_ids(p, o)[: int(rng.choice([0, 3, 99]))]) for a, p, o in requests),
        replicas=tuple(cases),
        outages=tuple(outages),
        router=str(rng.choice(ROUTERS)),
        seed=seed,
        load_bytes_per_s=float(rng.choice([1e4, 1e6])),
        start_s=float(rng.choice([0.0, 1.0])),
    )
    return with_migration(case) if later else case


def with_migration(case: ClusterCase) -> ClusterCase:
    """Return the case with KV that goes with its requests after a notice, if its seed says so.

    Most of these have equal replicas with room for more requests.
    """
    rng = np.random.default_rng([case.seed, 21])
    if rng.random() < 0.6:
        return case
    replicas = [replace(one, config=replace(one.config, prefix_caching=False)) for one in case.replicas]
    if rng.random() < 0.7:
        first = replicas[0]
        limits = replace(first.config.limits, max_running=int(rng.choice([8, 40])))
        roomy = replace(first, kv_blocks=int(rng.choice([60, 400])), config=replace(first.config, limits=limits))
        replicas = [roomy] * max(len(replicas), 2)

    def noticed(outage: Outage) -> Outage:
        return replace(outage, notice_s=float(rng.choice([0.0, 2.0, 5.0, 10.0, 30.0])))

    outages = [tuple(noticed(outage) for outage in mine) for mine in case.outages]
    return replace(
        case,
        outages=tuple(outages + [()] * (len(replicas) - len(outages))),
        replicas=tuple(replicas),
        migrate_bytes_per_s=float(rng.choice([1e2, 1e3, 1e4, 1e6])),
    )


def router_of(case: ClusterCase) -> KernelRouter:
    """Return the router of a case; affinity has low thresholds, so that both of its branches are used."""
    if case.router in ("prefix_affinity", "session_affinity"):
        return getattr(routers, case.router)(most_apart=3, most_times=2)  # type: ignore[no-any-return]
    return getattr(routers, case.router)()  # type: ignore[no-any-return]


def fast_cluster(
    case: ClusterCase,
    router: Any = None,
    stops_s: Sequence[float] = (),
    *,
    timers_s: Sequence[float] = (),
    progress_s: float = math.inf,
    autoscaler: Autoscaler | None = None,
) -> Cluster:
    """Serve a case with the compiled cluster and return it.

    It stops at ``stops_s`` and observes every replica; timers go off at ``timers_s``; progress is shown every
    ``progress_s``.
    """

    def replica(one: Case, outages: tuple[Outage, ...], name: str) -> Replica:
        return Replica(
            name=name,
            build=lambda env: (engine(SimEngine, one, env, external_clock=True), AtTimes(one)),
            decisions_s=lambda: iter(moments(one)),
            outages=outages,
        )

    pairs = zip(case.replicas, case.outages, strict=True)
    cluster = Cluster(
        case.trace(),
        [replica(one, outages, str(i)) for i, (one, outages) in enumerate(pairs)],
        router or router_of(case),
        seed=case.seed,
        load_bytes_per_s=case.load_bytes_per_s,
        start_s=case.start_s,
        autoscaler=autoscaler,
        migrate_bytes_per_s=case.migrate_bytes_per_s,
    )
    for timer_s in timers_s:
        cluster.env.timeout(timer_s)
    for stop_s in stops_s:
        cluster.run_until(stop_s)
        assert cluster.env.now == stop_s
        for i in cluster.accepting():
            cluster.observe(i)
    cluster.run((lambda now_s, routed: None) if progress_s < math.inf else None, progress_s)
    return cluster


def plain_cluster(case: ClusterCase) -> list[Row]:
    """Serve a case with the plain cluster and return its rows."""
    router = router_of(case)
    pairs = zip(case.replicas, case.outages, strict=True)

    def replica(one: Case, outages: tuple[Outage, ...]) -> PlainReplica:
        return PlainReplica(
            build=lambda now_s: (engine(PlainEngine, one, simpy.Environment(initial_time=now_s)), AtTimes(one)),
            decisions_s=moments(one),
            outages=outages,
        )

    return PlainCluster(
        trace=case.trace(),
        replicas=[replica(one, outages) for one, outages in pairs],
        router=case.router,
        draws=router.draws(len(case.requests), case.seed),
        load_bytes_per_s=case.load_bytes_per_s,
        start_s=case.start_s,
        most_apart=router.most_apart,
        most_times=router.most_times,
        migrate_bytes_per_s=case.migrate_bytes_per_s,
    ).run()


def columns(rows: list[Row]) -> dict[str, Any]:
    """Return the rows of the plain cluster as columns of records."""
    lives = [row.live for row in rows]

    def of(name: str, default: float) -> list[Any]:
        return [getattr(live, name) if live is not None else default for live in lives]

    produced = np.array(of("produced_tokens", 0), dtype=np.float64)
    tokens = np.where(produced > 0, produced, np.nan)
    held = np.array([row.replica < 0 for row in rows])
    params = np.array([row.params or 1 for row in rows])
    return {
        "arrival_s": [row.request.arrival_s for row in rows],
        "replica": [row.replica for row in rows],
        "moves": [row.moves for row in rows],
        "produced_tokens": produced,
        "preemptions": np.where(held, 0, of("preemptions", 0)),
        "cached_tokens": np.where(held, 0, np.maximum(of("cached_tokens", 0), 0)),
        "status": [
            int(live.status) if live is not None and row.replica >= 0 else 0
            for row, live in zip(rows, lives, strict=True)
        ],
        "admitted_s": of("admitted_s", np.nan),
        "first_token_s": of("first_token_s", np.nan),
        "finish_s": of("finish_s", np.nan),
        "kept_params_share": np.where(held, np.nan, np.array(of("kept_params", 0)) / (tokens * params)),
        "quality_nll": np.where(held, np.nan, np.array(of("nll_sum", 0.0)) / tokens),
    }


def differences(case: ClusterCase) -> list[str]:
    """Return the differences between the two clusters; empty if they agree, or refuse the case with the same error.

    The two round the end of an iteration differently, in the last digit. Where two turns arrive in the same instant but
    for that, either may be routed first; such a case is compared with think times that leave no ties.
    """
    found, at = _differences(case)
    if found and case.thinks_s and at is not None:
        apart_s = 1e-3 * np.random.default_rng([case.seed, 19]).random(len(case.thinks_s))
        found, _ = _differences(replace(case, thinks_s=tuple((np.array(case.thinks_s) + apart_s).tolist())))
    return found


def _differences(case: ClusterCase) -> tuple[list[str], int | None]:
    """Return the differences, and the first row whose arrival is rounded differently before them; None for none."""
    try:
        fast: ClusterRecords | str = fast_cluster(case).records()
    except BudgetError as error:
        fast = str(error)
    try:
        plain: dict[str, Any] | str = columns(plain_cluster(case))
    except BudgetError as error:
        plain = str(error)
    if isinstance(plain, str) or isinstance(fast, str):
        return ([] if plain == fast else [f"plain: {plain}; compiled: {fast}"]), None
    found, first = [], len(fast)
    for name, values in plain.items():
        a, b = np.asarray(values, dtype=np.float64), np.asarray(getattr(fast, name), dtype=np.float64)
        same = np.isclose(a, b, rtol=RELATIVE, atol=1e-9, equal_nan=True)
        if not same.all():
            at = int(np.argmin(same))
            first = min(first, at)
            found.append(f"{name}: first at request {at}: plain {a[at]}, compiled {b[at]}")
    rounded = np.flatnonzero(np.asarray(plain["arrival_s"]) != fast.arrival_s)
    return found, (int(rounded[0]) if len(rounded) and rounded[0] <= first else None)


class FewestRequests:
    """The router to the fewest requests, as a `PythonRouter`."""

    def __call__(self, candidates: list[Candidate], request: RoutingRequest) -> int:
        """Return the replica with the fewest waiting and running requests."""
        return min(candidates, key=lambda c: c.state.waiting + c.state.running).replica


def shrunk(case: ClusterCase) -> ClusterCase:
    """Return a smaller case that still differs."""
    return shrunk_case(case, _smaller, differences)


def _smaller(case: ClusterCase) -> Iterator[ClusterCase]:
    for rows in without_some(case.requests):
        if rows:  # fewer requests than entries of sessions is fine
            yield replace(case, requests=rows)
    if case.migrate_bytes_per_s is not None:
        yield replace(case, migrate_bytes_per_s=None)
    for i, one in enumerate(case.replicas):
        if len(case.replicas) > 1:
            yield replace(
                case,
                replicas=case.replicas[:i] + case.replicas[i + 1 :],
                outages=case.outages[:i] + case.outages[i + 1 :],
            )
        for name in ("plans", "ticks_s", "budget_steps"):
            if getattr(one, name):
                simpler = dataclasses.replace(one, **{name: ()})
                yield replace(case, replicas=(*case.replicas[:i], simpler, *case.replicas[i + 1 :]))
        if case.outages[i]:
            yield replace(case, outages=(*case.outages[:i], case.outages[i][:-1], *case.outages[i + 1 :]))
