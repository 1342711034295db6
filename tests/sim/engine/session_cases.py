"""Random replays whose requests are turns of sessions, for comparing the compiled engine with the plain one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.engine.protocol import sessions_of
from sim.engine.sim_engine import SimEngine
from sim.traces.sessions import earliest_arrivals, first_turns
from sim.traces.trace import Trace, sorted_trace
from sim.types import Ints
from tests.sim.engine import kernel_cases
from tests.sim.engine.kernel_cases import Case, differences, shrunk
from tests.sim.engine.plain_engine import PlainEngine

__all__ = ["SessionCase", "differences", "random_case", "shrunk"]


def sessions_trace(
    arrival_s: Sequence[float],
    prompts: Sequence[int],
    outputs: Sequence[int],
    sessions: Sequence[int],
    thinks_s: Sequence[float],
    users: int | None,
    ids: Sequence[Ints],
) -> Trace:
    """Return requests as a trace with sessions, in the order of the earliest arrivals.

    Args:
        sessions, thinks_s: of each request; more entries than requests are fine, so that a case can shrink.
        users: of a closed loop; None lets every session begin at the time of its first request.
    """
    count = len(arrival_s)
    session, think_s = np.array(sessions[:count]), np.array(thinks_s[:count], dtype=np.float64)
    begins = np.flatnonzero(first_turns(session))
    if users is None:
        think_s[begins] = math.nan
    else:
        think_s = np.where(np.isnan(think_s), 1.0, think_s)
        think_s[begins[:users]] = math.nan
    return sorted_trace(
        arrival_s=earliest_arrivals(np.array(arrival_s), session, think_s),
        prompt_tokens=np.array(prompts),
        output_tokens=np.array(outputs),
        hash_ids=ids,
        session=session,
        think_s=think_s,
    )


@dataclass(frozen=True, kw_only=True)
class SessionCase(Case):
    """A replay of sessions.

    sessions: of each request; more than there are requests is fine, so that a case can shrink. thinks_s: the same.
    users: of a closed loop; None lets every session begin at the time of its first request.
    """

    sessions: tuple[int, ...]
    thinks_s: tuple[float, ...]
    users: int | None

    @property
    def trace(self) -> Trace:
        """The requests as a trace, in the order of the earliest arrivals."""
        rows = zip(self.sessions, self.requests, strict=False)
        ids = [self._ids(session, prompt + output) for session, (_, prompt, output) in rows]
        return sessions_trace(*zip(*self.requests, strict=True), self.sessions, self.thinks_s, self.users, ids)

    def _ids(self, session: int, tokens: int) -> Ints:
        """Return the ids of a prompt and its answer: all sessions begin alike, and each goes on in its own way."""
        block = np.arange(tokens // self.config.hash_block_tokens, dtype=np.int64)
        return np.where(block < session % 3, block, block + 1000 * (session + 1))

    def submit(self, engine: SimEngine | PlainEngine) -> None:
        """Hand the sessions to an engine."""
        trace = self.trace
        engine.submit_arrays(
            trace.arrival_s, trace.prompt_tokens, trace.output_tokens, trace.hash_ids, sessions=sessions_of(trace)
        )


def random_case(seed: int) -> SessionCase:
    """Return the case of a seed: that of one replica, its requests in sessions."""
    case = kernel_cases.random_case(seed)
    rng = np.random.default_rng([seed, 15])
    count = len(case.requests)
    if rng.random() < 0.3:  # more often than by chance, as turns are there to share what others have computed
        config = dataclasses.replace(case.config, prefix_caching=True, preemption="recompute", host_kv_blocks=0)
        case = dataclasses.replace(case, config=config)
    thinks_s = rng.choice([0.0, 0.0, 1.0, 3.0], count)
    if rng.random() < 0.5:
        thinks_s = np.where(rng.random(count) < 0.3, thinks_s, rng.exponential(4.0, count))
    own = rng.random(count) < (0.1 if rng.random() < 0.3 else 0.0)
    return SessionCase(
        **{field.name: getattr(case, field.name) for field in dataclasses.fields(Case)},
        sessions=tuple(rng.integers(0, max(1, count // int(rng.choice([1, 3, 10]))), count).tolist()),
        thinks_s=tuple(np.where(own, math.nan, thinks_s).tolist()),
        users=int(rng.choice([1, 2, 5])) if rng.random() < 0.5 else None,
    )
