"""What the real engine logs of an iteration besides its times: what it computed, and the memory afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from sim.cost.latency import chunk_context_sum
from sim.cost.plan import Plan, describe
from sim.results.records import Iterations


@dataclass(frozen=True, slots=True)
class Shape:
    """What an iteration computed, in the terms that ``sim.cost.latency`` prices, and the plan that it ran.

    chunks: (tokens, tokens before them) of each prompt. forward_s: seconds of the pass; the rest of an iteration is the
    host's. started: how the pass was started, one of the values in hw/elastic/graphs.py.
    """

    plan: Plan
    chunks: tuple[tuple[int, int], ...]
    decode_batch: int
    decode_context_sum: int
    sequences: int
    forward_s: float
    started: str = "operations"

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


def passes_table(shapes: Sequence[Shape], iterations: Iterations) -> pd.DataFrame:
    """Return one row per iteration: its times in seconds, what it computed, under which plan, and how it was started.

    With it a latency model can be fitted, or judged, without the device. Contexts are summed over tokens.
    """

    count = len(shapes)
    prefills = [sum(chunk_context_sum(tokens, before) for tokens, before in shape.chunks) for shape in shapes]
    return pd.DataFrame(
        {
            "start_s": iterations.start_s[:count],
            "end_s": iterations.end_s[:count],
            "forward_s": [shape.forward_s for shape in shapes],
            "started": [shape.started for shape in shapes],
            "chunks": [len(shape.chunks) for shape in shapes],
            "prefill_tokens": [shape.prefill_tokens for shape in shapes],
            "prefill_context_sum": prefills,
            "decode_batch": [shape.decode_batch for shape in shapes],
            "decode_context_sum": [shape.decode_context_sum for shape in shapes],
            "sequences": [shape.sequences for shape in shapes],
            "plan": [describe(shape.plan) for shape in shapes],
        }
    )
