"""Runs of a server whose settings and prices are known, because they are simulated, with noise as clients see it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hw.fit.measured import Columns, MeasuredRun, measured_run
from hw.fit.parameters import Point, server_at
from hw.fit.server import Prompts, Server, Simulated, simulate
from sim.config import build_option
from sim.cost.front_end import FrontEnd
from sim.cost.plan import dense_plan
from sim.engine.budget import gpu_share
from sim.engine.server_spec import ServerSpec
from sim.types import Floats


def a_server(**changes: Any) -> Server:
    """Return the described server: Llama-3.1-8B on an H100, scheduled like vLLM V1; ``changes`` of engine settings."""
    spec = ServerSpec.from_names(model="llama3.1_8b", gpu="h100_80gb")
    limits = {key: changes.pop(key) for key in ("max_batch_tokens", "max_running") if key in changes}
    prompts = Prompts(distinct=changes.pop("distinct", None))
    config = replace(spec.config, hash_block_tokens=16, limits=replace(spec.config.limits, **limits), **changes)
    plan = dense_plan(spec.model)
    return Server(
        spec=replace(spec, config=config, quality_nll=None),
        plan=plan,
        budget=gpu_share(spec.budget_context(plan), share=0.9),
        front_end=FrontEnd(front_s=0.006),
        prompts=prompts,
        replicas=1,
        router=build_option("router", "power_of_two"),
    )


def requests(
    *, count: int = 300, rate_rps: float = 8.0, distinct: int | None = None, prompt: float = 600.0, seed: int = 0
) -> MeasuredRun:
    """Return requests that were not served yet: Poisson arrivals, log-normal lengths; their times mean nothing."""
    random = np.random.default_rng(seed)
    sent_s = np.cumsum(random.exponential(1 / rate_rps, size=count))
    lengths = np.maximum(8, prompt * random.lognormal(0.0, 0.5, size=distinct or count)).astype(np.int64)
    output = np.maximum(2, 200 * random.lognormal(0.0, 0.3, size=count)).astype(np.int64)
    return MeasuredRun(
        arrival_s=sent_s - sent_s[0],
        first_token_s=sent_s,
        finish_s=sent_s,
        prompt_tokens=lengths[np.arange(count) % len(lengths)],
        produced_tokens=output,
        name="truth",
        source="truth",
        kind="simulated",
    )


def served(
    server: Server, wanted: MeasuredRun, *, noise: float = 1.0, seed: int = 1, slow_first: int = 0, **values: float
) -> MeasuredRun:
    """Return the run of a server with these prices.

    Args:
        noise: 1 makes each TTFT 10 % and each mean gap 2 % uncertain. slow_first: how many requests a warm-up slows.
        values: the true values of what a fit may change.
    """
    done: Simulated = simulate(server_at(server, Point(values=values)), wanted)
    random = np.random.default_rng(seed)
    ttft_s = done.ttft_s * np.exp(0.1 * noise * random.standard_normal(len(done)))
    gap_s = done.tpot_s * np.exp(0.02 * noise * random.standard_normal(len(done)))
    ttft_s[:slow_first] *= 8.0
    first_s = wanted.arrival_s + ttft_s
    columns = Columns(
        sent_s=wanted.arrival_s,
        first_token_s=first_s,
        finish_s=first_s + np.nan_to_num(gap_s) * (wanted.produced_tokens - 1),
        prompt_tokens=wanted.prompt_tokens.astype(float),
        output_tokens=wanted.produced_tokens.astype(float),
    )
    return measured_run(columns, name="truth", source="truth", kind="simulated")


def gaps_of(run: MeasuredRun) -> list[list[float]]:
    """Return the gaps of each request, all alike."""
    return [[float(gap)] * int(n - 1) for gap, n in zip(np.nan_to_num(run.tpot_s), run.produced_tokens, strict=True)]


def write_vllm_bench(path: Path, run: MeasuredRun, **changes: Any) -> Path:
    """Write a run as ``vllm bench serve --save-detailed`` does."""
    content: dict[str, Any] = {
        "date": "20260101-000000",
        "backend": "vllm",
        "request_throughput": 1.0,
        "start_times": (1000.0 + run.arrival_s).tolist(),
        "input_lens": run.prompt_tokens.tolist(),
        "output_lens": run.produced_tokens.tolist(),
        "ttfts": run.ttft_s.tolist(),
        "itls": gaps_of(run),
        "errors": [""] * len(run),
    }
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def ms(values: Floats) -> list[float]:
    """Return seconds as milliseconds."""
    return (1e3 * values).tolist()
