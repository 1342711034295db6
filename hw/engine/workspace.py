"""Whether a pass fits into the workspace that is set aside for it; where it does not, batches become smaller.

A simulated engine takes its batches from the same settings, so the message says which ones to change there.
"""

from __future__ import annotations

from dataclasses import replace

from hw.elastic.attention import Attention
from sim.cost.memory import pass_bytes
from sim.cost.model_spec import ModelSpec
from sim.engine.protocol import EngineConfig


def needed_bytes(
    model: ModelSpec, config: EngineConfig, attention: Attention, tokens: int, *, sampled: bool = False
) -> int:
    """Return the most bytes that a pass of ``tokens`` tokens takes for a moment."""
    sequences = min(config.limits.max_running, tokens)
    context = min(config.max_context_tokens or model.max_context_tokens, model.max_context_tokens)
    scratch = attention.scratch_bytes(model, sequences, context)
    return pass_bytes(model, tokens, sequences, sampled=sampled) + scratch


def fit_batches(
    model: ModelSpec, config: EngineConfig, attention: Attention, workspace_bytes: int, *, sampled: bool = False
) -> tuple[EngineConfig, str | None]:
    """Return the settings whose passes fit into the workspace, and what to tell the user; None if nothing changed.

    Only prompts can be computed in smaller chunks. If that does not help, the settings stay.
    """
    limits = config.limits
    most = max(limits.max_batch_tokens, limits.max_running)

    def needed(tokens: int) -> int:
        return needed_bytes(model, config, attention, tokens, sampled=sampled)

    if needed(most) <= workspace_bytes:
        return config, None
    takes = f"a pass of {most} tokens takes {needed(most):,} bytes for a moment"
    problem = f"{takes}, more than workspace_bytes={workspace_bytes}"
    least = limits.max_running + 1 if config.scheduler == "chunked" else most
    if least >= most or needed(least) > workspace_bytes:
        return config, f"{problem}; it may run out of memory: set workspace_bytes={needed(most)}"
    fits, too_many = least, most
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if needed(middle) <= workspace_bytes else (fits, middle)
    return (
        replace(config, limits=replace(limits, max_batch_tokens=fits)),
        f"{problem}; this engine computes at most {fits} tokens an iteration. In simulation, set "
        f"engine.limits.max_batch_tokens={fits} for the same batches; or set workspace_bytes={needed(most)} in both",
    )
