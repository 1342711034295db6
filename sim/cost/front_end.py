"""The front end of a server: what lies between a client and the engine's queue, on the way in and on the way out.

HTTP, tokenizing and the queue between two processes on the way in; detokenizing and HTTP on the way out. The front end
never holds the engine up, so two delays describe it. A trace states when clients send; `into_queue` returns the trace
that the engine receives. Engine-side figures count from there, client-side ones from the sending (``way_in_s``,
``back_s``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from sim.errors import ConfigError
from sim.traces.loops import sessions_from
from sim.traces.trace import Trace, sorted_trace
from sim.types import Floats, Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontEnd:
    """The delays of a server's front end; with all of them 0 there is no front end.

    front_s: seconds from a client's sending to the engine's queue. front_token_s: seconds more per token of the prompt.
    back_s: seconds from the engine to the client, the same for each piece of the answer.
    """

    front_s: float = 0.0
    front_token_s: float = 0.0
    back_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("front_s", "front_token_s", "back_s"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"frontend.{name} is {value}; it must be a number of seconds from 0")

    @property
    def absent(self) -> bool:
        """Whether all delays are 0."""
        return self.front_s == self.front_token_s == self.back_s == 0.0

    def way_in_s(self, prompt_tokens: Ints) -> Floats:
        """Return the seconds from the sending of requests to the engine's queue: front_s + front_token_s x tokens."""
        return self.front_s + self.front_token_s * prompt_tokens.astype(np.float64)


NO_FRONT_END = FrontEnd()
"""Clients put their requests into the engine's queue themselves."""


def into_queue(trace: Trace, front_end: FrontEnd) -> Trace:
    """Return a trace as the engine's queue receives it: each request later by its way in, in the order of arrival.

    A short prompt may overtake a long one that was sent just before it. Ties keep their order. A turn of a session
    also waits for the way out of the answer before it.
    """
    if trace.session is None and front_end.front_s == front_end.front_token_s == 0.0:
        return trace
    if front_end.absent:
        return trace
    step = f"front end: each request {front_end.front_s:g} s later, and {front_end.front_token_s:g} s per prompt token"
    way_in_s = front_end.way_in_s(trace.prompt_tokens)
    if trace.session is not None and trace.think_s is not None:
        # A client thinks from the moment at which it has the answer until it sends the next prompt.
        later = replace(trace, think_s=trace.think_s + way_in_s + front_end.back_s)
        return sessions_from(later, trace.arrival_s + way_in_s, step)
    return sorted_trace(
        arrival_s=trace.arrival_s + way_in_s,
        prompt_tokens=trace.prompt_tokens,
        output_tokens=trace.output_tokens,
        hash_ids=trace.hash_ids,
        name=trace.name,
        source=trace.source,
        history=(*trace.history, step),
        time_quantum_s=trace.time_quantum_s,
        hash_block_tokens=trace.hash_block_tokens,
    )
