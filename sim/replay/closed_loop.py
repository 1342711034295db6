"""A closed loop: a number of users, each of whom sends the next request as soon as the last one has ended.

Benchmarks with a limit of concurrent requests (``--max-concurrency`` of ``vllm bench serve``) are such loops. A trace
cannot state them, for arrivals depend on the server.
"""

from __future__ import annotations

import math

import numpy as np

from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError
from sim.types import Ints


def closed_loop(engine: SimEngine, prompt_tokens: Ints, output_tokens: Ints, users: int) -> None:
    """Serve all requests in their order, at most ``users`` of them at a time; the engine keeps the records.

    The first ones come at 0 s, and each later one when a request ends, finished or rejected. Requests end only at the
    end of an iteration, so the engine is stopped there: the next ones can be in the iteration that follows.

    Args:
        engine: an idle one that starts at 0 s. prompt_tokens, output_tokens: int64[n].
    Raises:
        ConfigError: for fewer than one user, or if requests can never be served.
    """
    if users < 1:
        raise ConfigError(f"users is {users}; a closed loop needs at least 1")
    sent, now_s, total = 0, 0.0, len(prompt_tokens)
    while True:
        state = engine.run_until(now_s)
        free = users - (sent - state.finished - state.rejected)
        more = slice(sent, min(sent + free, total))
        count = more.stop - more.start
        if count > 0:
            engine.submit_arrays(np.full(count, now_s), prompt_tokens[more], output_tokens[more])
            sent = more.stop
        elif sent == total and state.finished + state.rejected == total:
            return
        # A moment later the next iteration has started, or requests have been rejected.
        state = engine.run_until(math.nextafter(now_s, math.inf))
        ended = state.finished + state.rejected
        if engine.last_iteration_end_s > now_s:
            now_s = engine.last_iteration_end_s
        elif ended < sent:
            raise ConfigError(f"{sent - ended} requests wait, and nothing can start them: the KV pool is too small")
        else:
            now_s = state.time_s
