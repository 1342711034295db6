"""Replays a trace on an engine under a policy: the main loop. ``python -m sim.replay`` runs it by sim/replay/run.py."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from sim.engine.protocol import Engine, Request, requests_from_arrays, sessions_of
from sim.limits import check_ticks
from sim.policies.base import Policy
from sim.policies.schedule import Schedule
from sim.traces.trace import Trace


def requests_of(trace: Trace) -> list[Request]:
    """Return the requests of a trace, numbered in order of arrival."""
    return requests_from_arrays(trace.arrival_s, trace.prompt_tokens, trace.output_tokens, trace.hash_ids)


def replay(
    trace: Trace,
    engine: Engine,
    policy: Policy,
    *,
    tick_s: float | None = None,
    also_at_s: Sequence[float] = (),
    on_progress: Callable[[float, int], None] | None = None,
    progress_s: float = math.inf,
) -> None:
    """Serve all requests of a trace; the engine keeps the records.

    Args:
        trace: the requests. engine: serves them, under the first plan of the policy. policy: decides what runs.
        tick_s: seconds between two decisions; None keeps the first plan.
        also_at_s: further times of decisions, ascending: where the budget changes.
        on_progress: called with the engine's time and the number of requests that have ended, after each decision.
        progress_s: seconds of the trace between two calls of ``on_progress`` where there are no decisions.
    """
    if tick_s is not None:
        check_ticks(tick_s, float(trace.arrival_s[-1]))
    engine.submit_arrays(
        trace.arrival_s, trace.prompt_tokens, trace.output_tokens, trace.hash_ids, sessions=sessions_of(trace)
    )
    moments_s = decisions(tick_s, also_at_s) if tick_s is not None else _looks(progress_s)
    # A schedule does not depend on the state, so the engine gets its decisions in advance and does not stop for them.
    if tick_s is not None and isinstance(policy, Schedule):
        at_s = _known_decisions(policy, decisions(tick_s, also_at_s))
        engine.apply_at(at_s, [policy.plan_at(time_s) for time_s in at_s])
        moments_s, tick_s = _looks(progress_s), None
    while not engine.drained:
        state = engine.run_until(next(moments_s))
        if on_progress is not None:
            on_progress(state.time_s, state.finished + state.rejected)
        if tick_s is not None and not engine.drained:
            engine.apply(policy(state))


def _looks(progress_s: float) -> Iterator[float]:
    """Return the times at which the engine stops for progress alone."""
    return decisions(progress_s, ()) if progress_s < math.inf else itertools.repeat(math.inf)


def _known_decisions(policy: Schedule, moments_s: Iterator[float]) -> list[float]:
    """Return the times of decisions at which the plan of the schedule changes."""
    found, left = [], deque(policy.at_s[1:])
    while left:
        moment_s = next(moments_s)
        if left[0] <= moment_s:
            found.append(moment_s)
            while left and left[0] <= moment_s:
                left.popleft()
    return found


def decisions(period_s: float, also_at_s: Sequence[float]) -> Iterator[float]:
    """Yield the times at which a policy decides: the multiples of a period, and other times between them."""
    others = list(also_at_s)
    step = 1
    while True:
        # A multiple, not a running sum, so that rounding errors do not add up.
        tick_s = step * period_s
        while others and others[0] <= tick_s:
            if (other_s := others.pop(0)) < tick_s:
                yield other_s
        yield tick_s
        step += 1
