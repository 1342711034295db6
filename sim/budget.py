"""The memory there is for weights, workspace and KV cache together, over time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sim.errors import BudgetError
from sim.gpu import Gpu
from sim.memory import budget_for_kv_blocks
from sim.model import ModelSpec
from sim.plan import Plan


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget that changes in steps.

    change_s: when each step begins, ascending from 0. budget_bytes: what there is from then on.
    notice_s: how long before a step a server is told of it; 0 for sudden ones.
    """

    change_s: tuple[float, ...]
    budget_bytes: tuple[int, ...]
    notice_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.change_s or len(self.change_s) != len(self.budget_bytes):
            raise BudgetError(
                f"a budget needs as many times as bytes, and at least one; got {len(self.change_s)} times "
                f"and {len(self.budget_bytes)} bytes"
            )
        if self.change_s[0] != 0.0:
            raise BudgetError(f"a budget begins at 0 s; the first step begins at {self.change_s[0]} s")
        if any(not b > a for a, b in zip(self.change_s, self.change_s[1:], strict=False)):
            raise BudgetError("the times of a budget's steps must ascend; sort them and leave out repeated ones")
        if any(not math.isfinite(t) for t in self.change_s) or any(b < 1 for b in self.budget_bytes):
            raise BudgetError("a budget's times must be finite and its bytes at least 1")
        if not (self.notice_s >= 0 and math.isfinite(self.notice_s)):
            raise BudgetError(f"budget.notice_s is {self.notice_s}; it must be a number of seconds of at least 0")


def constant_budget(budget_bytes: int) -> Budget:
    """Return a budget that never changes."""
    return Budget((0.0,), (budget_bytes,))


def stepped(rows: Iterable[tuple[float, int]], notice_s: float = 0.0) -> Budget:
    """Return the budget of (time_s, bytes) rows, steps that change nothing left out."""
    times: list[float] = []
    values: list[int] = []
    for time_s, budget_bytes in rows:
        if not values or budget_bytes != values[-1]:
            times.append(time_s)
            values.append(budget_bytes)
    return Budget(tuple(times), tuple(values), notice_s)


def gpu_share(
    *, share: float, workspace_bytes: float, model: ModelSpec, gpu: Gpu, plan: Plan, kv_block_tokens: int
) -> Budget:
    """Return ``share`` of the device memory, as vLLM's ``gpu_memory_utilization`` takes it.

    Raises:
        BudgetError: if share is not in (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise BudgetError(f"budget.share is {share}; it must be above 0 and at most 1 (vLLM's default is 0.9)")
    return constant_budget(int(share * gpu.memory_bytes))


def constant(
    *, budget_bytes: float, workspace_bytes: float, model: ModelSpec, gpu: Gpu, plan: Plan, kv_block_tokens: int
) -> Budget:
    """Return a stated number of bytes.

    Raises:
        BudgetError: if it is not above 0.
    """
    if not budget_bytes > 0:
        raise BudgetError(f"budget.budget_bytes is {budget_bytes}; it must be above 0")
    return constant_budget(int(budget_bytes))


def kv_blocks(
    *, blocks: int, workspace_bytes: float, model: ModelSpec, gpu: Gpu, plan: Plan, kv_block_tokens: int
) -> Budget:
    """Return the bytes that hold the first plan's weights, the workspace, and so many KV blocks over all kept layers.

    This is how real engines state their cache (vLLM's ``num_gpu_blocks``).

    Raises:
        BudgetError: if blocks is not above 0.
    """
    if blocks < 1:
        raise BudgetError(f"budget.blocks is {blocks}; it must be at least 1")
    return constant_budget(budget_for_kv_blocks(model, plan, blocks, int(workspace_bytes), kv_block_tokens))
