"""Replays a trace on an engine under a policy: the main loop, and the command around it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from sim.engine import Engine, Request
from sim.policies.base import Policy
from sim.trace import Trace

PROGRESS_STEPS = 200


def requests_of(trace: Trace) -> list[Request]:
    """Return the requests of a trace, numbered in order of arrival."""
    columns = (trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist())
    return [
        Request(request_id=i, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
        for i, (arrival_s, prompt, output) in enumerate(zip(*columns, strict=True))
    ]


def replay(
    trace: Trace,
    engine: Engine,
    policy: Policy,
    *,
    tick_s: float | None = None,
    on_progress: Callable[[float, int], None] | None = None,
) -> None:
    """Serve a whole trace; the engine keeps the records.

    Args:
        trace: what arrives when. engine: who serves it. policy: who decides what runs.
        tick_s: seconds between two decisions; None asks the policy nothing after its first plan.
        on_progress: called now and then with the engine's time and the requests that ended.
    """
    engine.submit(requests_of(trace))
    period_s = tick_s or max(trace.duration_s / PROGRESS_STEPS, 1e-3)
    step = 0
    while not engine.drained:
        step += 1
        # The step's own multiple, not a running sum: ticks stay where they are said to be.
        state = engine.run_until(step * period_s if tick_s or on_progress else math.inf)
        if on_progress is not None:
            on_progress(state.time_s, state.finished + state.rejected)
        if tick_s is not None and not engine.drained:
            engine.apply(policy(state))


def main() -> None:
    """Run ``python -m sim.replay``."""
    from sim.command import replay_command

    replay_command()


if __name__ == "__main__":
    started_s = time.perf_counter()
    main()
