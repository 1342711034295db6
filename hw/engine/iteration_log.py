"""What the real engine writes down of its iterations: when they ran, what they computed, the memory after them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sim.cost.plan import Plan
from sim.results.records import Iterations, TokenGaps


@dataclass(frozen=True, slots=True)
class Shape:
    """What an iteration computed, in the terms in which ``sim.cost.latency`` prices it, and the plan that it ran."""

    plan: Plan
    chunks: tuple[tuple[int, int], ...]  # (tokens, tokens before them) of each prompt
    decode_batch: int
    decode_context_sum: int
    sequences: int
    forward_s: float  # from the first to the last look at the model; the rest of an iteration is the host's

    @property
    def prefill_tokens(self) -> int:
        """Tokens of prompts, or of requests that are computed again."""
        return sum(tokens for tokens, _ in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """Memory after an iteration: what the plan should hold, the tensors that are allocated, the device's own figure."""

    time_s: float
    predicted_bytes: int
    allocated_bytes: int
    in_use_bytes: int


class IterationLog:
    """Iterations that have ended, in order, and the gaps between tokens."""

    def __init__(self) -> None:
        """Begin without any."""
        self.shapes: list[Shape] = []
        self.memory: list[MemoryRow] = []
        self._rows: list[tuple[float, float, int, int, float, int]] = []
        self._gaps_s: list[float] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        shape: Shape,
        *,
        start_s: float,
        end_s: float,
        running: int,
        waiting: int,
        kv_used_share: float,
        preemptions: int,
    ) -> None:
        """Add an iteration that has ended."""
        self.shapes.append(shape)
        self._rows.append((start_s, end_s, running, waiting, kv_used_share, preemptions))

    def add_gap(self, seconds: float) -> None:
        """Add the time between two tokens of one request."""
        self._gaps_s.append(seconds)

    def table(self) -> Iterations:
        """Return one row an iteration."""
        columns = list(zip(*self._rows, strict=True)) or [()] * 6
        float_, int_ = np.float64, np.int64
        return Iterations(
            start_s=np.array(columns[0], dtype=float_),
            end_s=np.array(columns[1], dtype=float_),
            prefill_tokens=np.array([shape.prefill_tokens for shape in self.shapes], dtype=int_),
            decode_requests=np.array([shape.decode_batch for shape in self.shapes], dtype=int_),
            running=np.array(columns[2], dtype=int_),
            waiting=np.array(columns[3], dtype=int_),
            kv_used_share=np.array(columns[4], dtype=float_),
            preemptions=np.array(columns[5], dtype=int_),
            extrapolated=np.zeros(len(self._rows), dtype=np.bool_),  # nothing was priced
        )

    def token_gaps(self) -> TokenGaps:
        """Return every gap between two tokens of one request."""
        gaps_s, count = np.unique(np.array(self._gaps_s, dtype=np.float64), return_counts=True)
        return TokenGaps(itl_s=gaps_s, count=count.astype(np.int64))
