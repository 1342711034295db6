"""Law 11: looking, and an event that concerns no request, leave everything recorded as it was, bit for bit.

Each test serves a random case twice, the second time with empty events: the system is observed at additional times, the
plan that is wanted anyway is applied again, the budget has steps that change nothing, or timers go off in SimPy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import simpy

from sim.cluster.cluster import Cluster, ClusterState
from sim.disaggregate.disaggregate import Disaggregated
from sim.engine.budget import Budget
from sim.engine.sim_engine import SimEngine
from sim.errors import BudgetError
from tests.sim.cluster.cluster_cases import fast_cluster, random_cluster
from tests.sim.disaggregate.disaggregated_cases import fast_disaggregated, random_disaggregated
from tests.sim.engine.kernel_cases import LATE_S, Case, quality_nll, random_case
from tests.sim.engine.plain_engine import PlainEngine
from tests.sim.serving import linear_latency

Kind = type[SimEngine] | type[PlainEngine]
EVENTS = ("looks", "the same plan", "the same budget", "timers")


def times(seed: int, until_s: float, some: Sequence[float] = ()) -> list[float]:
    """Return random times, some of them round and some equal to times at which something happens."""
    rng = np.random.default_rng([seed, 11])
    found = rng.uniform(0.0, until_s, int(rng.integers(1, 40)))
    found = np.round(found) if rng.random() < 0.3 else found
    finite = np.asarray(some)[np.isfinite(some)]
    exact = rng.choice(finite, 5) if len(finite) and rng.random() < 0.5 else []
    return sorted({float(time_s) for time_s in (*found, *exact)})


def with_equal_steps(budget: Budget, times_s: Sequence[float]) -> Budget:
    """Return the budget with additional steps that change nothing."""
    steps = dict(zip(budget.change_s, budget.budget_bytes, strict=True))
    for time_s in times_s:
        steps.setdefault(time_s, steps[max(start_s for start_s in budget.change_s if start_s <= time_s)])
    return Budget(tuple(sorted(steps)), tuple(steps[time_s] for time_s in sorted(steps)), budget.notice_s)


def served(kind: Kind, case: Case, event: str = "", times_s: Sequence[float] = ()) -> tuple[Any, list[Any]]:
    """Return the engine after a case with empty events, and the states at the times of the case."""
    more: dict[str, Any] = {}
    if event == "timers" and kind is SimEngine:
        more["env"] = simpy.Environment()
        for time_s in times_s:
            more["env"].timeout(time_s)
    engine = kind(
        model=case.model,
        latency=case.latency,
        config=case.config,
        plan=case.first_plan,
        budget_bytes=with_equal_steps(case.budget(), times_s if event == "the same budget" else ()),
        host_to_device_bytes_per_s=case.host_to_device_bytes_per_s,
        slowdown=case.slowdown,
        copy_slowdown=case.copy_slowdown,
        quality_nll=quality_nll,
        **more,
    )
    engine.submit(case.submitted())
    engine.apply_at([time_s for time_s, _ in case.scheduled], [plan for _, plan in case.scheduled])
    changes, states = dict(case.plans), []
    looks = set(times_s) if event in ("looks", "the same plan") else set()
    for time_s in sorted({*changes, *case.ticks_s, *looks}):
        state = engine.run_until(time_s)
        if event == "the same plan":
            engine.apply(state.target)
        if time_s in changes or time_s in case.ticks_s:
            states.append(state)
        if time_s in changes:
            engine.apply(changes[time_s])
    engine.run_until(math.inf)
    return engine, [*states, engine.run_until(LATE_S)]


def unequal(one: Any, other: Any) -> Iterator[str]:
    """Yield the fields of two tables or states that differ in any bit."""
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray | float):
            if not np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f"):
                yield field.name
        elif a != b:
            yield field.name


def unequal_engines(one: Any, other: Any) -> list[str]:
    """Return what two engines recorded differently."""
    found = [f"{name}.{what}" for name in ("records", "iterations", "transitions")
             for what in unequal(getattr(one, name)(), getattr(other, name)())]  # fmt: skip
    gaps = [np.sort(np.repeat(engine.token_gaps().itl_s, engine.token_gaps().count)) for engine in (one, other)]
    if not np.array_equal(*gaps):
        found.append("token_gaps")
    return found + (["kept_share"] if one.kept_share() != other.kept_share() else [])


@pytest.mark.parametrize("kind", [SimEngine, PlainEngine])
def test_law_11_an_empty_event_changes_nothing_that_an_engine_records(kind: Kind) -> None:
    compared = 0
    # Added seeds: a decision scheduled for after the last request, and long stretches over budget.
    for seed in (*range(20), 125, 190, 228, 572, 642):
        case = random_case(seed)
        try:
            engine, states = served(kind, case)
        except BudgetError:
            continue
        compared += 1
        until_s = 1.2 * float(np.nan_to_num(engine.records().finish_s).max(initial=0.0)) + 5.0
        times_s = times(seed, until_s, engine.iterations().end_s)
        for event in EVENTS:
            other, seen = served(kind, case, event, times_s)
            found = unequal_engines(engine, other)
            found += [f"state.{what}" for a, b in zip(states, seen, strict=True) for what in unequal(a, b)]
            assert found == [], f"seed {seed}, {event}"
    assert compared > 15


@pytest.mark.parametrize("kind", [SimEngine, PlainEngine])
def test_law_11_a_decision_after_the_last_request_waits_whether_or_not_the_engine_is_observed(kind: Kind) -> None:
    """The engine serves one request until 5 s; a plan is scheduled for 8 s, and the engine is observed at 9 s."""
    case = replace(
        random_case(1),
        requests=((0.0, 8, 5),),
        plans=(),
        scheduled=((8.0, replace(random_case(1).first_plan, max_running=1)),),
        ticks_s=(),
        budget_steps=(),
        latency=linear_latency(1.0),
    )
    for times_s in ([], [9.0], [9.0, 10.0]):
        engine, states = served(kind, case, "looks", times_s)
        assert len(engine.transitions()) == 0
        assert states[-1].plan == case.first_plan
        assert states[-1].target.max_running == 1  # it is known, and begins with the next request


def unequal_clusters(one: Cluster, other: Cluster) -> list[str]:
    """Return what two clusters recorded differently."""
    found = [f"records.{what}" for what in unequal(one.records(), other.records())]
    if one.events() != other.events() or one.end_s != other.end_s:
        found.append("events")
    for a, b in zip(one.engines(), other.engines(), strict=True):
        found += unequal_engines(a.engine, b.engine)
        if a.engine.budget_violation_s != b.engine.budget_violation_s:
            found.append("budget_violation_s")
    return found


class AsManyAsServe:
    """An autoscaler that never changes anything."""

    def __init__(self, replicas: int) -> None:
        self.period_s, self.first = 1.7, replicas

    def __call__(self, state: ClusterState) -> int:
        """Return the number of all replicas."""
        return self.first


def test_law_11_an_empty_event_changes_nothing_that_a_cluster_records() -> None:
    # Added seeds: copies under way and budgets that move after the end, and an iteration that a failure cuts off.
    for seed in (*range(15), 54, 129, 150, 162, 201):
        case = random_cluster(seed)
        try:
            cluster = fast_cluster(case)
        except BudgetError:
            continue
        times_s = times(seed, 1.2 * cluster.end_s + 5.0, cluster.records().finish_s)
        for event, other in (
            ("looks", fast_cluster(case, None, [time_s for time_s in times_s if time_s <= cluster.end_s])),
            ("timers", fast_cluster(case, timers_s=times_s)),
            ("progress", fast_cluster(case, progress_s=1.3)),
            ("an autoscaler that wants all replicas", fast_cluster(case, autoscaler=AsManyAsServe(len(case.replicas)))),
        ):
            assert unequal_clusters(cluster, other) == [], f"seed {seed}, {event}"


def recorded(system: Disaggregated) -> list[Any]:
    """Return the tables that a system has recorded."""
    return [system.records(), *(engine.iterations() for engine in system.engines().values())]


@pytest.mark.parametrize("overlap", [False, True])
def test_law_11_an_empty_event_changes_nothing_that_prefill_and_decode_record(overlap: bool) -> None:
    """Five of these systems sent KV only at the next event after an iteration had made room, whatever it was."""
    for seed in (*range(20), 37, 125, 181, 219, 303):
        case = random_disaggregated(seed)
        system = fast_disaggregated(case, overlap)
        system.run()
        until_s = float(np.nan_to_num(system.records().finish_s).max(initial=0.0)) + 5.0
        times_s = times(seed, until_s, system.records().sent_s)
        for looks in (False, True):
            other = fast_disaggregated(case, overlap)
            for time_s in times_s:
                timer = other.env.timeout(time_s)
                if looks:
                    timer.callbacks.append(lambda _, other=other: observe_all_sides(other))
            other.run()
            found = [what for a, b in zip(recorded(system), recorded(other), strict=True) for what in unequal(a, b)]
            assert found == [], f"seed {seed}, {'looks' if looks else 'timers'}"
            assert other.events() == system.events(), f"seed {seed}"


def observe_all_sides(system: Disaggregated) -> None:
    """Observe every replica, and read what has been recorded so far."""
    for side in (*system.prefill, *system.decode):
        side.engine.observe(system.env.now)
    system.records()
