"""How many replicas prefill and how many decode, while a system serves: fixed, or a rule by the load of both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sim.engine.protocol import EngineState
from sim.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Totals:
    """Counters of a system from its start; those of replicas that fail or change their role are kept.

    arrived, arrived_prompt_tokens: requests, and the tokens of their prompts. first_tokens, ttft_sum_s: prompts that
        have been computed, and the sum of their TTFT. produced_tokens, finished: tokens after the first ones, and
        requests that ended with one of them.
    prefill_busy_s, decode_busy_s: seconds in iterations, sums over replicas. decode_iterations: their number.
    link_busy_s, link_s: seconds in which links carried KV, and in which they were there to be used.
    """

    arrived: int = 0
    arrived_prompt_tokens: int = 0
    first_tokens: int = 0
    ttft_sum_s: float = 0.0
    produced_tokens: int = 0
    finished: int = 0
    prefill_busy_s: float = 0.0
    decode_busy_s: float = 0.0
    decode_iterations: int = 0
    link_busy_s: float = 0.0
    link_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemState:
    """What can be observed of a disaggregated system at one moment; it contains no output length.

    prefill, decode: states of the replicas that accept requests in each role.
    to_prefill: replicas that have the role of prefill or will have it. replicas: all of them.
    turning: replicas whose role is changing, until they serve in the new one.
    held: requests that wait because no replica prefills. ready: requests whose KV waits for room at decode.
    in_flight: requests whose KV is being sent.
    away: replicas that are down, load weights after an outage, or have been announced to fail.
    held_tokens: tokens of the held requests. ending: requests of replicas that serve and accept no more.
    possible: numbers of prefill replicas that leave a replica for each role (``Disaggregated.possible``), ascending.
    """

    time_s: float
    prefill: tuple[EngineState, ...]
    decode: tuple[EngineState, ...]
    to_prefill: int
    replicas: int
    turning: int
    held: int
    ready: int
    in_flight: int
    away: int = 0
    held_tokens: int = 0
    ending: int = 0
    possible: tuple[int, ...] = ()
    totals: Totals = Totals()


class Roles(Protocol):
    """Decides how many replicas prefill."""

    @property
    def period_s(self) -> float:
        """Seconds between two decisions."""
        ...

    def __call__(self, state: SystemState) -> int:
        """Return how many replicas should prefill, from 1 to all but one."""
        ...


def fixed() -> None:
    """Return None: each replica keeps its role."""
    return


def kv_share(states: Sequence[EngineState]) -> float:
    """Return the share of the KV pools of some replicas that is held; 1 for no replica."""
    blocks = sum(state.kv_layer_blocks for state in states)
    return sum(state.kv_used_layer_blocks for state in states) / blocks if blocks else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ByLoad:
    """Gives a replica to the side that is short, if the other side can spare one.

    Prefill is short if a prompt has waited for ``most_wait_s`` or longer, or no replica prefills. Decode is short if KV
    waits for room there, or more than ``most_kv_share`` of its KV blocks are held. A side can spare a replica if it is
    not short and another one serves in its role; decode also only if those that are left would hold at most
    ``most_kv_share``. Nothing changes while the role of a replica is changing.

    period_s: seconds between decisions.
    """

    most_wait_s: float
    most_kv_share: float
    period_s: float = 5.0

    def __post_init__(self) -> None:
        if not (self.most_wait_s > 0 and 0 < self.most_kv_share <= 1 and self.period_s > 0):
            raise ConfigError(
                f"roles.most_wait_s is {self.most_wait_s}, most_kv_share {self.most_kv_share} and period_s "
                f"{self.period_s}; the first and the last must be above 0 seconds, most_kv_share above 0 and at most 1"
            )

    def __call__(self, state: SystemState) -> int:
        """Return how many replicas should prefill."""
        count, decoding = state.to_prefill, len(state.decode)
        if state.turning:
            return count
        waits_s = max((one.oldest_wait_s for one in state.prefill), default=0.0)
        prefill_short = state.held > 0 or waits_s >= self.most_wait_s
        share = kv_share(state.decode)
        decode_short = state.ready > 0 or share > self.most_kv_share
        if prefill_short and not decode_short and decoding > 1:
            return count + 1 if share * decoding / (decoding - 1) <= self.most_kv_share else count
        if decode_short and not prefill_short and len(state.prefill) > 1:
            return count - 1
        return count
