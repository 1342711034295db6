"""Runs of the engine between the measurements: what an iteration takes in all, over what its terms take one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from hw.calibrate.calibration import times
from hw.elastic.device import Accelerator
from hw.elastic.model import ElasticModel
from hw.engine.clock import RealClock
from hw.engine.hw_engine import HwEngine
from hw.engine.iteration_log import Shape
from hw.engine.prompts import RandomPrompts
from sim.cost.latency import LatencyModel, calibration_from_dict
from sim.cost.memory import budget_for_kv_blocks, kv_blocks
from sim.cost.plan import dense_plan
from sim.engine.protocol import EngineConfig
from sim.engine.scheduler import Limits
from sim.policies import Fixed
from sim.replay.loop import replay
from sim.traces.generate import lognormal_lengths, poisson
from sim.types import Floats

BLOCK_TOKENS = 16
USED_SHARE = 0.9
"""Share of the device memory that a run uses; the driver and libraries need some of the rest."""
WORKSPACE_BYTES = {"cpu": 0, "cuda": 3_000_000_000}
"""What the largest pass takes besides weights and KV."""
LEAST_REQUESTS = 8
"""Of a run, on average: in a second and a half at a low rate there might be none."""
MOST_PASSES_PER_S = 250.0
"""Of a small model, which the host cannot start as fast as a GPU could run it."""
FULL_S = 480.0
"""Seconds of a calibration whose runs are at their longest."""


@dataclass(frozen=True, slots=True)
class Iterations:
    """Iterations of a run of the engine: the seconds and the batch of each."""

    measured_s: Floats
    shapes: tuple[Shape, ...]

    def priced_s(self, latency: LatencyModel) -> Floats:
        """Return the seconds that a latency model predicts for each."""
        prices = [
            latency.iteration_s(s.plan, s.chunks, s.decode_batch, s.decode_context_sum, s.sequences)
            for s in self.shapes
        ]
        return np.array(prices)


@dataclass(frozen=True, slots=True)
class Line:
    """The seconds of an iteration: ``factor * terms + prefill_attention_factor * prefill attention + fixed_s``.

    The factors are not 1 because a term finds other data in the caches during a run than when it is timed in a loop,
    and because the attention of prompts touches KV blocks and masks that were never used before.
    off: median absolute relative error over the iterations.
    """

    factor: float
    prefill_attention_factor: float
    fixed_s: float
    off: float


def line_over_terms(runs: Sequence[Iterations], content: Mapping[str, Any]) -> Line:
    """Fit the line to the iterations of runs: relative errors with a soft L1 loss, so that those above 5 % count less.

    content: the calibration with the terms; its ``fixed_us`` is 0.
    """
    measured_s = np.concatenate([run.measured_s for run in runs])
    once, twice = (latency_of(times(content, 1.0, factor)) for factor in (1.0, 2.0))
    all_s, more_s = (np.concatenate([run.priced_s(latency) for run in runs]) for latency in (once, twice))
    terms_s = np.column_stack((2 * all_s - more_s, more_s - all_s, np.full(len(all_s), 1e-3)))

    def off(at: Floats) -> Floats:
        errors: Floats = terms_s @ at / measured_s - 1
        return errors

    bounds = ([0.1, 0.1, 0.0], np.inf)
    found = least_squares(off, (1.0, 1.0, 1.0), bounds=bounds, loss="soft_l1", f_scale=0.05).x
    return Line(float(found[0]), float(found[1]), float(found[2]) * 1e-3, float(np.median(np.abs(off(found)))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the engine serves between the measurements.

    limits: of the scheduler. prompt_tokens, output_tokens: median and most of each. kv_tokens: that the pool holds.
    rates_rps: arrival rates of the runs in turn, from single requests to full batches with prompts.
    run_s, held_out_s: seconds of arrivals in each of them, and in the run of which nothing is fitted.
    held_out_rps: its arrival rate. workspace_bytes: that the passes may take. attention: as in hw.replay.
    """

    limits: Limits
    prompt_tokens: tuple[int, int] = (70, 300)
    output_tokens: tuple[int, int] = (14, 60)
    kv_tokens: int = 3200
    rates_rps: tuple[float, ...] = (1.5, 6.0, 0.7, 3.0)
    run_s: float = 10.0
    held_out_s: float = 25.0
    held_out_rps: float = 2.0
    workspace_bytes: int = 0
    attention: str = "auto"


CPU_LOAD = Load(limits=Limits(max_batch_tokens=128, max_running=16))
"""Short requests."""


def load_of(elastic: ElasticModel, seconds: float, memory_bytes: float, bandwidth_bytes_per_s: float) -> Load:
    """Return a load that the device can serve: of short requests on a CPU, of usual ones on a GPU.

    seconds: of the calibration; the runs take about a fifth of it. memory_bytes: of the device.
    """
    share = min(seconds / FULL_S, 1.0)
    load = replace(CPU_LOAD, run_s=max(10.0 * share, 1.5), held_out_s=max(25.0 * share, 4.0))
    if not isinstance(elastic.hardware, Accelerator):
        return load
    spec = elastic.spec
    passes_per_s = min(bandwidth_bytes_per_s / elastic.bytes(), MOST_PASSES_PER_S)  # of decodes that read all weights
    most_prompt = min(3000, spec.max_context_tokens // 2)
    free_bytes = memory_bytes * USED_SHARE - elastic.hardware.in_use_bytes() - 2 * WORKSPACE_BYTES["cuda"]
    per_token = spec.num_layers * spec.kv_bytes_per_token_layer
    return replace(
        load,
        limits=Limits(max_batch_tokens=2048, max_running=256),
        prompt_tokens=(min(400, most_prompt), most_prompt),
        output_tokens=(64, 256),
        kv_tokens=max(4096, min(40_000, int(free_bytes / per_token))),
        rates_rps=tuple(passes_per_s * per_pass for per_pass in (0.02, 0.08, 0.01, 0.05)),
        held_out_rps=passes_per_s * 0.04,
        workspace_bytes=WORKSPACE_BYTES["cuda"],
    )


def run_engine(
    elastic: ElasticModel,
    clock: str,
    seed: int,
    load: Load,
    rate_rps: float,
    seconds: float | None = None,
    bits: int | None = None,
) -> Iterations:
    """Serve random requests on the model with all blocks, for ``seconds`` of arrivals or those of the load.

    bits: precision of all layers; None keeps that of the checkpoint.
    """
    spec = elastic.spec
    plan = dense_plan(spec)
    if bits is not None:
        plan = replace(plan, weight_bits=(bits,) * spec.num_layers)
    elastic.apply(plan)
    config = EngineConfig(limits=load.limits, kv_block_tokens=BLOCK_TOKENS)
    trace = poisson(
        rate_rps=rate_rps,
        duration_s=max(load.run_s if seconds is None else seconds, LEAST_REQUESTS / rate_rps),
        lengths=lambda rng, requests: lognormal_lengths(
            rng,
            requests,
            prompt_tokens_p50=load.prompt_tokens[0],
            prompt_sigma=0.7,
            output_tokens_p50=load.output_tokens[0],
            output_sigma=0.6,
            max_prompt_tokens=load.prompt_tokens[1],
            max_output_tokens=load.output_tokens[1],
        ),
        seed=seed,
    )
    blocks = kv_blocks(load.kv_tokens, BLOCK_TOKENS)
    engine = HwEngine(
        elastic=elastic,
        config=config,
        plan=plan,
        budget_bytes=budget_for_kv_blocks(spec, plan, blocks, load.workspace_bytes, BLOCK_TOKENS),
        workspace_bytes=load.workspace_bytes,
        attention=load.attention,
        prompts=RandomPrompts(spec.vocab_size, seed),
        clock=RealClock(clock, skip_idle=True),
        plans=[plan],
    )
    replay(trace, engine, Fixed(plan))
    rows, shapes = engine.iterations(), engine.shapes()
    engine.close()
    # An iteration lasts until the next one starts, if that follows at once.
    following = np.append(rows.start_s[1:], np.inf)
    lasting = np.where(following - rows.end_s < 0.005, following, rows.end_s) - rows.start_s
    return Iterations(lasting, tuple(shapes))


def latency_of(content: Mapping[str, Any]) -> LatencyModel:
    """Return the latency model of a calibration's content."""
    return calibration_from_dict(content, str(content["name"]))
