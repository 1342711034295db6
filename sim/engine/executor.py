"""What a replica needs from whatever carries out its decisions: an executor, weights and a clock.

Simulated ones are in sim/engine/pricing_executor.py, those of a device in hw/engine/torch_executor.py. The fourth seam, the memory
behind KV blocks, is ``sim.engine.kv_pool.KVStorage``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from sim.cost.plan import Plan
from sim.engine.live_request import LiveRequest
from sim.engine.scheduler import Batch
from sim.engine.transition import LayerCopy, Resident


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """One iteration for an executor to run.

    number: iterations that ended before. batch: who computes how many tokens. plan: what runs.
    copying: whether a layer is being copied in meanwhile. memory_bytes: resident weights and the KV pool.
    """

    number: int
    start_s: float
    batch: Batch[LiveRequest]
    plan: Plan
    copying: bool
    memory_bytes: int

    @property
    def decodes(self) -> list[LiveRequest]:
        """Requests that compute one token after their prefill."""
        return [live for live, _ in self.batch.scheduled if live.decoding]

    @property
    def prefills(self) -> list[tuple[LiveRequest, int]]:
        """Requests that compute tokens of their prefill, and how many."""
        return [(live, tokens) for live, tokens in self.batch.scheduled if not live.decoding]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What an iteration brought.

    end_s: when it ends. extrapolated: whether its price lies outside the calibrated range.
    next_tokens: request_id -> the token it produced; empty where tokens are not real.
    stopped: requests that end with this token, before their output limit.
    """

    end_s: float
    extrapolated: bool = False
    next_tokens: Mapping[int, int] = field(default_factory=dict)
    stopped: frozenset[int] = frozenset()


class Executor(Protocol):
    """Computes the iterations of a replica."""

    def run(self, iteration: Iteration) -> Ran | None:
        """Run one iteration; return None if memory ran out and nothing was computed."""
        ...

    def follow_budget(self, budget_bytes: int) -> None:
        """Take no more memory than this from now on; called once what is held fits it, or no request runs."""
        ...


class Clock(Protocol):
    """What time it is, in seconds since the start of the trace."""

    def now_s(self) -> float:
        """Return the present."""
        ...

    def wait_until(self, time_s: float) -> None:
        """Let nothing happen until then; return at once when it has passed."""
        ...


class Weights(Protocol):
    """The weights on a device, and the one layer that may be on its way there."""

    def drop(self, resident: Resident) -> None:
        """Free the blocks that are not resident any more; a copy under way goes on."""
        ...

    def start(self, copy: LayerCopy, now_s: float) -> None:
        """Start to copy a layer in; none is under way."""
        ...

    def arrived(self, now_s: float) -> bool:
        """Return whether the copy under way is complete."""
        ...

    def wait(self, now_s: float, until_s: float) -> None:
        """Let time pass until ``until_s``, or until the copy under way is complete."""
        ...

    def join(self) -> None:
        """Put the layer that arrived in the place of what it replaces."""
        ...

    def abandon(self) -> None:
        """Give the copy under way up."""
        ...
