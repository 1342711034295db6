"""What the real engine logs of an iteration besides its times: what it computed, and the memory afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from sim.cost.plan import Plan


@dataclass(frozen=True, slots=True)
class Shape:
    """What an iteration computed, in the terms that ``sim.cost.latency`` prices, and the plan that it ran.

    chunks: (tokens, tokens before them) of each prompt. forward_s: seconds of the pass; the rest of an iteration is the
    host's.
    """

    plan: Plan
    chunks: tuple[tuple[int, int], ...]
    decode_batch: int
    decode_context_sum: int
    sequences: int
    forward_s: float

    @property
    def prefill_tokens(self) -> int:
        """Tokens of prompts, or of requests that are computed again."""
        return sum(tokens for tokens, _ in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """Memory after an iteration, in bytes.

    predicted: what the plan should hold. allocated: the tensors of weights and KV blocks, without a copy under way.
    in_use: the device's own figure; on CUDA the most since the iteration before, on a CPU what the process has now.
    """

    time_s: float
    predicted_bytes: int
    allocated_bytes: int
    in_use_bytes: int
