"""The watermark of vLLM's KV cache, pull request 44594: a table that checks a scheduler almost without prices.

Qwen2.5-7B, 299,584 tokens of KV cache, prompts of about 1,000 tokens and outputs of about 5,000, each +- 20 %, 450 of
them in a closed loop of 128. How often requests are preempted depends on admission and lengths. The device is a GB200,
of which no kernel times are at hand: prices are a roofline of its data sheet, and one number, the overhead of an
iteration, is fitted on the throughput at a watermark of 0.05.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from scipy.optimize import brentq

from hw.calibrate.rtx3090 import product_table
from sim.cost.latency import SCHEMA, LatencyModel, calibration_from_dict
from sim.cost.memory import budget_for_kv_blocks, ffn_weight_bytes, mha_weight_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan
from sim.engine.protocol import EngineConfig
from sim.engine.scheduler import Limits
from sim.engine.sim_engine import SimEngine
from sim.replay.closed_loop import closed_loop

PUBLISHED = {0.0: (1065, 11582), 0.02: (400, 12134), 0.05: (187, 12167), 0.10: (168, 11835), 0.15: (168, 11635)}
"""Watermark -> preemptions and output tokens per second."""
FITTED = 0.05
MODEL, KV_TOKENS, BLOCK_TOKENS = "qwen2.5_7b", 299_584, 16
PROMPT_TOKENS, OUTPUT_TOKENS, SPREAD = 1000, 5000, 0.2
REQUESTS, USERS = 450, 128
SEEDS = (0, 1, 2)
BANDWIDTH_BYTES_PER_S, FLOP_PER_S, ACHIEVED = 8e12, 2.5e15, 0.85
"""Of one GPU of a GB200 (data sheet: HBM3e, dense BF16), and the share of both that is taken as achieved."""


def latency(fixed_s: float) -> LatencyModel:
    """Return a roofline of the model on the device, with this overhead of an iteration."""
    model = load_model(MODEL)
    tokens = [1, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
    rate, flops = BANDWIDTH_BYTES_PER_S * ACHIEVED, FLOP_PER_S * ACHIEVED

    def block_us(size_bytes: int) -> list[float]:
        return [1e6 * max(size_bytes / rate, count * size_bytes / flops) for count in tokens]

    head_us = 1e6 * model.vocab_size * model.hidden_size * 2 / rate
    return calibration_from_dict(
        {
            "schema": SCHEMA,
            "name": "qwen2.5_7b_gb200_roofline",
            "model": MODEL,
            "device": "gb200",
            "kind": "composed",
            "fixed_us": fixed_s * 1e6,
            "fixed_source": "fitted on one throughput",
            "validation": "none",
            "errors": {},
            "sources": [],
            "notes": [],
            "tables": {
                "tokens": tokens,
                "linear_us": {
                    "16": {"mha": block_us(mha_weight_bytes(model)), "ffn": block_us(ffn_weight_bytes(model))}
                },
                "token_us": [0.0] * len(tokens),
                "sequences": [1, 256],
                "head_us": [head_us] * 2,
                "prefill_attention": product_table(
                    ("tokens", "context"), (1, 8192), (1, 8192), 4e6 * model.hidden_size / flops
                ),
                "decode_attention": product_table(
                    ("batch", "context"), (1, 256), (1, 8192), 1e6 * model.kv_bytes_per_token_layer / rate
                ),
            },
        }
    )


def served(watermark: float, fixed_s: float, seed: int) -> SimEngine:
    """Return an engine that has served the closed loop."""
    model, rng = load_model(MODEL), np.random.default_rng(seed)
    plan = dense_plan(model)
    engine = SimEngine(
        model=model,
        latency=latency(fixed_s),
        config=EngineConfig(
            limits=Limits(max_batch_tokens=8192, max_running=256),
            kv_block_tokens=BLOCK_TOKENS,
            kv_watermark_share=watermark,
            max_context_tokens=8192,
            schedules_ahead=True,
        ),
        plan=plan,
        budget_bytes=budget_for_kv_blocks(model, plan, KV_TOKENS // BLOCK_TOKENS, 0, BLOCK_TOKENS),
    )
    prompts, outputs = (
        rng.integers(round(mean * (1 - SPREAD)), round(mean * (1 + SPREAD)) + 1, REQUESTS)
        for mean in (PROMPT_TOKENS, OUTPUT_TOKENS)
    )
    closed_loop(engine, prompts, outputs, USERS)
    return engine


def figures(engine: SimEngine) -> tuple[int, float]:
    """Return the preemptions and the output tokens per second of a run."""
    records = engine.records()
    return int(records.preemptions.sum()), float(records.produced_tokens.sum() / np.nanmax(records.finish_s))


def fit_fixed_s() -> float:
    """Return the overhead of an iteration at which the throughput of one row is the published one."""
    wanted = PUBLISHED[FITTED][1]
    return float(brentq(lambda fixed_s: figures(served(FITTED, fixed_s, SEEDS[0]))[1] - wanted, 0.0, 8e-3, xtol=2e-5))


def row() -> dict[str, Any]:
    """Return the table: published and simulated figures for each watermark."""
    fixed_s = fit_fixed_s()
    rows = []
    for watermark, (preemptions, tokens_per_s) in PUBLISHED.items():
        found = [figures(served(watermark, fixed_s, seed)) for seed in SEEDS]
        counts, speeds = zip(*found, strict=True)
        rows.append(
            {
                "watermark": watermark,
                "preemptions, published": preemptions,
                "simulated": statistics.fmean(counts),
                "over seeds": f"{min(counts)} to {max(counts)}",
                "tokens/s, published": tokens_per_s,
                "tokens/s, simulated": statistics.fmean(speeds),
                "error": statistics.fmean(speeds) / tokens_per_s - 1,
            }
        )
    return {"rows": rows, "fixed_ms": 1e3 * fixed_s, "fitted": FITTED, "seeds": len(SEEDS)}
