"""Small engines and traces for the tests of serving: a tiny model, and prices that can be computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.budget import Budget
from sim.engine import EngineConfig, Request, Restore, SimEngine
from sim.memory import budget_for_kv_blocks
from sim.model import ModelSpec
from sim.plan import Plan, dense_plan
from sim.scheduler import Limits, SchedulerName

TINY = ModelSpec(
    name="tiny",
    num_layers=3,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=100,
    max_context_tokens=4096,
)


@dataclass(frozen=True)
class LinearPrice:
    """``base + a token + a context token``: enough to tell iterations apart, easy to add up by hand."""

    base_s: float = 1.0
    token_s: float = 0.0
    context_s: float = 0.0

    def iteration_s(
        self, plan: Plan, chunks: Sequence[tuple[int, int]], decode_batch: int, decode_context_sum: int, sequences: int
    ) -> float:
        tokens = sum(tokens for tokens, _ in chunks) + decode_batch
        return self.base_s + self.token_s * tokens + self.context_s * decode_context_sum

    def layered_iteration_s(self, rows: NDArray[np.int64], tokens: int, sequences: int) -> float:
        layers, contexts = rows[:, 0], rows[:, 5]
        return self.base_s + self.token_s * tokens + self.context_s * float((layers * contexts).sum() / layers.sum())

    def in_range(self, *_: object) -> bool:
        return True


def tiny_engine(
    *,
    kv_blocks: int = 1000,
    kv_block_tokens: int = 4,
    scheduler: SchedulerName = "chunked",
    max_batch_tokens: int = 64,
    max_running: int = 8,
    long_prefill_tokens: int = 0,
    reserve_full_prompt: bool = True,
    kv_watermark_share: float = 0.0,
    reuse_preempted_kv: bool = False,
    max_context_tokens: int | None = None,
    price: LinearPrice | None = None,
    plan: Plan | None = None,
    restore: Restore = "new_requests",
    budget: Budget | None = None,
    host_to_device_bytes_per_s: float = 1e6,
    copy_slowdown: float = 0.0,
) -> SimEngine:
    plan = plan or dense_plan(TINY)
    return SimEngine(
        model=TINY,
        latency=price or LinearPrice(),
        config=EngineConfig(
            scheduler=scheduler,
            limits=Limits(
                max_batch_tokens=max_batch_tokens,
                max_running=max_running,
                long_prefill_tokens=long_prefill_tokens,
                reserve_full_prompt=reserve_full_prompt,
            ),
            kv_block_tokens=kv_block_tokens,
            kv_watermark_share=kv_watermark_share,
            reuse_preempted_kv=reuse_preempted_kv,
            max_context_tokens=max_context_tokens,
            restore=restore,
        ),
        plan=plan,
        budget_bytes=budget or budget_for_kv_blocks(TINY, plan, kv_blocks, 0, kv_block_tokens),
        host_to_device_bytes_per_s=host_to_device_bytes_per_s,
        copy_slowdown=copy_slowdown,
    )


def requests(*rows: tuple[float, int, int]) -> list[Request]:
    """``(arrival_s, prompt_tokens, output_tokens)`` rows as requests."""
    return [
        Request(request_id=i, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
        for i, (arrival_s, prompt, output) in enumerate(rows)
    ]
