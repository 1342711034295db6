"""The seams of a replica: protocols for the executor, the weights and the clock that carry out its decisions.

The simulated versions are in sim/engine/pricing_executor.py, those of a device in hw/engine/torch_executor.py. The
fourth seam, the memory behind KV blocks, is ``sim.engine.kv_pool.KVStorage``.
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

    number: how many iterations ended before it. batch: how many tokens each request computes. plan: what runs.
    copying: whether a layer is being copied in at the same time. memory_bytes: resident weights plus the KV pool.
    moved_bytes: KV that was copied to the host, or is copied back, since the iteration before.
    """

    number: int
    start_s: float
    batch: Batch[LiveRequest]
    plan: Plan
    copying: bool
    memory_bytes: int
    moved_bytes: int = 0

    @property
    def decodes(self) -> list[LiveRequest]:
        """Requests that have ended their prefill and compute one token."""
        return [live for live, _ in self.batch.scheduled if live.decoding]

    @property
    def prefills(self) -> list[tuple[LiveRequest, int]]:
        """Requests in prefill, each with the number of tokens that it computes."""
        return [(live, tokens) for live, tokens in self.batch.scheduled if not live.decoding]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """The result of an iteration.

    end_s: when it ends. priced_s: what a calibration says that it takes, in seconds; None without one.
    extrapolated: whether its duration was extrapolated beyond the calibrated range.
    next_tokens: request_id -> the token it produced; empty if tokens are simulated.
    stopped: requests that end with this token, before their output limit.
    """

    end_s: float
    priced_s: float | None = None
    extrapolated: bool = False
    next_tokens: Mapping[int, int] = field(default_factory=dict)
    stopped: frozenset[int] = frozenset()


class Executor(Protocol):
    """Computes the iterations of a replica."""

    def stream(self, resident: Resident, now_s: float) -> None:
        """Expect the layers that ``resident`` streams to cross the link from now on."""
        ...

    def prepare(self) -> None:
        """Take the memory that the plan needs besides weights and KV blocks; nothing to do if it is there.

        Raises:
            MemoryError: if there is none now; no iteration runs until there is.
        """
        ...

    def run(self, iteration: Iteration) -> Ran | None:
        """Run one iteration; return None if memory ran out and nothing was computed."""
        ...

    def follow_budget(self, budget_bytes: int) -> None:
        """Take no more memory than this from now on: the budget, or what the replica itself counts if that is more."""
        ...


class Clock(Protocol):
    """The time, in seconds since the start of the trace."""

    def now_s(self) -> float:
        """Return the present time."""
        ...

    def wait_until(self, time_s: float) -> None:
        """Wait until then; return at once if it has passed."""
        ...


class Weights(Protocol):
    """The weights on a device, and at most one layer that is being copied in."""

    def drop(self, resident: Resident) -> None:
        """Free the blocks that are no longer in ``resident``, and stream those layers that it streams.

        A copy under way continues.
        """
        ...

    def start(self, copy: LayerCopy, now_s: float, *, shared: bool = False) -> None:
        """Start to copy a layer in; no other copy is under way. ``shared``: streamed layers cross the same link.

        Raises:
            MemoryError: if there is no memory for it; then nothing has changed.
        """
        ...

    def arrived(self, now_s: float) -> bool:
        """Return whether the copy under way is complete."""
        ...

    def wait(self, now_s: float, until_s: float) -> None:
        """Wait until ``until_s``, or until the copy under way is complete."""
        ...

    def join(self) -> None:
        """Replace the old blocks of the layer with those that were copied in.

        Raises:
            MemoryError: if the copy ran out of memory; it is abandoned then.
        """
        ...

    def abandon(self) -> None:
        """Abandon the copy under way."""
        ...
