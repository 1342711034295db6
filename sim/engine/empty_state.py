"""The arrays of the compiled kernel for a replica that has no request, plan or memory yet."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sim.cost.kv_format import kv_precisions
from sim.cost.latency import LatencyModel
from sim.cost.memory import kv_block_layer_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import WEIGHT_BITS
from sim.engine import kernel
from sim.engine.budget import Budget
from sim.engine.kernel.state import BUDGET_STEP
from sim.engine.plan_graph import PlanGraph
from sim.engine.protocol import EngineConfig


def empty_state(
    model: ModelSpec,
    latency: LatencyModel,
    config: EngineConfig,
    budget: Budget,
    graph: PlanGraph,
    keep_iterations: bool,
) -> kernel.State:
    """Return the kernel's state of a replica without requests, plan or memory."""
    slots, block_bytes = config.limits.max_running, kv_block_layer_bytes(model, config.kv_block_tokens)
    precision_tokens, read_bytes = kv_precisions(model, config.kv_block_tokens)
    prefix_block_kv_blocks = config.hash_block_tokens // config.kv_block_tokens
    kv_sets = 2 * slots + 4  # of the plan, and of each running request, now and after its prefill
    owners = slots  # of free KV blocks: requests that were preempted, prefix blocks without holders
    if config.prefix_caching:
        kv_sets += slots  # of its prefix blocks
        owners += max(budget.budget_bytes) // block_bytes // prefix_block_kv_blocks
    steps = np.zeros(len(budget.change_s), dtype=BUDGET_STEP)
    steps["from_s"], steps["budget_bytes"] = budget.change_s, budget.budget_bytes
    state = kernel.State(
        kernel.REPLICA,
        kernel.Sizes(
            slots=slots,
            layers=model.num_layers,
            words=graph.words,
            most_block_tokens=max(precision_tokens),
            kv_sets=kv_sets,
            free_runs=4 * owners + 16,
            precisions=len(WEIGHT_BITS),
            kv_precisions=len(precision_tokens),
            log_rows=1024 if keep_iterations else 1,
        ),
        budget=steps,
        latency_data=latency.tables.data,
        latency_layout=latency.tables.layout,
        **graph.arrays(),
    )
    n = kernel.fields_of(state.counters)
    _set_counters(n, config, block_bytes, keep_iterations)
    n.notice_s, n.qkv_share = budget.notice_s, model.qkv_share
    state.kv_precisions["block_tokens"], state.kv_precisions["token_bytes"] = precision_tokens, read_bytes
    state.slots["next"][slots] = state.slots["previous"][slots] = slots
    state.due_clocks[:] = kernel.NEVER
    state.free_slots[:slots] = np.arange(slots)
    return state


def _set_counters(n: Any, config: EngineConfig, block_bytes: int, log_enabled: bool) -> None:
    """Write an engine's settings into the kernel's counters, and -1, NEVER, ``inf`` or nan for values not yet known."""
    limits = config.limits
    n.scheduling_rule = kernel.SchedulingRule[config.scheduler.upper()]
    n.admits_by_value = config.admission_order == "value"
    n.max_batch_tokens, n.long_prefill_tokens = limits.max_batch_tokens, limits.long_prefill_tokens
    n.reserve_full_prompt, n.slots = limits.reserve_full_prompt, limits.max_running
    n.block_tokens, n.block_bytes = config.kv_block_tokens, block_bytes
    n.least_free_blocks, n.watermark_share = limits.watermark_layer_blocks, config.kv_watermark_share
    n.reuse_preempted_kv, n.recompute_on_restore = config.reuse_preempted_kv, config.restore == "recompute"
    n.log_enabled, n.prefix_caching = log_enabled, config.prefix_caching
    n.schedules_ahead, n.late_from = config.schedules_ahead, kernel.NEVER
    n.copies_block = config.copying == "blocking"
    n.free_runs_kept = config.reuse_preempted_kv or config.prefix_caching
    n.prefix_block_tokens = config.hash_block_tokens
    n.prefix_block_kv_blocks = config.hash_block_tokens // config.kv_block_tokens
    n.residency = n.decided_target = n.copy = n.open_change = -1
    n.next_due, n.next_limit, n.group_count = kernel.NEVER, kernel.NEVER, 1
    n.next_arrival_s = n.next_decision_s = n.copy_end_s = math.inf
    n.start_s = n.end_s = n.over_since_s = math.nan
