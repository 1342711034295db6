"""Small engines and traces for the tests of serving: a tiny model, and prices that can be computed by hand."""

from __future__ import annotations

import simpy

from sim.cost.latency import LatencyModel, calibration_from_dict
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan, dense_plan
from sim.engine.budget import Budget
from sim.engine.protocol import Copying, EngineConfig, Preemption, Request, Restore
from sim.engine.scheduler import AdmissionOrder, Limits, SchedulerName
from sim.engine.sim_engine import SimEngine

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


def linear_latency(base_s: float = 1.0, token_s: float = 0.0, context_s: float = 0.0) -> LatencyModel:
    """Return a latency model: seconds per iteration, per token, and per context token (over all layers)."""
    far = 4096
    tokens_us, contexts_us = [token_s * 1e6, far * token_s * 1e6], context_s * 1e6 / TINY.num_layers
    none = {"mha": [0.0, 0.0], "ffn": [0.0, 0.0]}
    return calibration_from_dict(
        {
            "schema": 1,
            "name": "linear",
            "model": TINY.name,
            "device": "none",
            "kind": "composed",
            "fixed_us": base_s * 1e6,
            "fixed_source": "by hand",
            "errors": {},
            "validation": "none",
            "sources": [],
            "notes": [],
            "tables": {
                "tokens": [1, far],
                "linear_us": {"16": none, "8": none, "4": none},
                "token_us": tokens_us,
                "sequences": [1, far],
                "head_us": [0.0, 0.0],
                "prefill_attention": {"tokens": [1, far], "context": [1.0, far], "us": [[0.0, 0.0], [0.0, 0.0]]},
                "decode_attention": {
                    "batch": [1, far],
                    "context": [1.0, far],
                    "us": [[contexts_us, far * contexts_us], [far * contexts_us, far * far * contexts_us]],
                },
            },
        }
    )


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
    admission_order: AdmissionOrder = "fcfs",
    latency: LatencyModel | None = None,
    plan: Plan | None = None,
    restore: Restore = "new_requests",
    prefix_caching: bool = False,
    hash_block_tokens: int = 8,
    schedules_ahead: bool = False,
    preemption: Preemption = "recompute",
    host_kv_blocks: int = 0,
    copying: Copying = "overlapped",
    budget: Budget | None = None,
    host_to_device_bytes_per_s: float = 1e6,
    copy_slowdown: float = 0.0,
    copy_layer_s: float = 0.0,
    env: simpy.Environment | None = None,
    external_clock: bool = False,
) -> SimEngine:
    plan = plan or dense_plan(TINY)
    return SimEngine(
        model=TINY,
        latency=latency or linear_latency(),
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
            admission_order=admission_order,
            restore=restore,
            prefix_caching=prefix_caching,
            hash_block_tokens=hash_block_tokens,
            schedules_ahead=schedules_ahead,
            preemption=preemption,
            host_kv_blocks=host_kv_blocks,
            copying=copying,
        ),
        plan=plan,
        budget_bytes=budget or budget_for_kv_blocks(TINY, plan, kv_blocks, 0, kv_block_tokens),
        host_to_device_bytes_per_s=host_to_device_bytes_per_s,
        copy_slowdown=copy_slowdown,
        copy_layer_s=copy_layer_s,
        env=env,
        external_clock=external_clock,
    )


def requests(*rows: tuple[float, int, int]) -> list[Request]:
    """``(arrival_s, prompt_tokens, output_tokens)`` rows as requests."""
    return [
        Request(request_id=i, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
        for i, (arrival_s, prompt, output) in enumerate(rows)
    ]
