"""The memory there is for weights, workspace and KV cache together."""

from __future__ import annotations

from sim.errors import BudgetError
from sim.gpu import Gpu
from sim.memory import budget_for_kv_blocks
from sim.model import ModelSpec
from sim.plan import Plan


def gpu_share(
    *, share: float, workspace_bytes: float, model: ModelSpec, gpu: Gpu, plan: Plan, kv_block_tokens: int
) -> int:
    """Return ``share`` of the device memory, as vLLM's ``gpu_memory_utilization`` takes it.

    Raises:
        BudgetError: if share is not in (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise BudgetError(f"budget.share is {share}; it must be above 0 and at most 1 (vLLM's default is 0.9)")
    return int(share * gpu.memory_bytes)


def constant(
    *, budget_bytes: float, workspace_bytes: float, model: ModelSpec, gpu: Gpu, plan: Plan, kv_block_tokens: int
) -> int:
    """Return a stated number of bytes.

    Raises:
        BudgetError: if it is not above 0.
    """
    if not budget_bytes > 0:
        raise BudgetError(f"budget.budget_bytes is {budget_bytes}; it must be above 0")
    return int(budget_bytes)


def kv_blocks(
    *, blocks: int, workspace_bytes: float, model: ModelSpec, gpu: Gpu, plan: Plan, kv_block_tokens: int
) -> int:
    """Return the bytes that hold the first plan's weights, the workspace, and so many KV blocks over all kept layers.

    This is how real engines state their cache (vLLM's ``num_gpu_blocks``).

    Raises:
        BudgetError: if blocks is not above 0.
    """
    if blocks < 1:
        raise BudgetError(f"budget.blocks is {blocks}; it must be at least 1")
    return budget_for_kv_blocks(model, plan, blocks, int(workspace_bytes), kv_block_tokens)
