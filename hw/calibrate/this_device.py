"""Calibrates this device: measures and fits every term, checks the fit in the engine, writes the file and a plot."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hw.calibrate import device as d
from hw.calibrate import measurements as m
from hw.calibrate.calibration import Fixed, Target, calibrate, error_summary, times
from hw.calibrate.engine_runs import Iterations, latency_of, line_over_terms, load_of, run_engine
from hw.calibrate.figure import plot
from hw.calibrate.plan_changes import Changes
from hw.calibrate.writing import write_calibration
from hw.elastic.checkpoint import load_weights
from hw.elastic.model import ElasticModel
from sim.cost.gpu import Gpu
from sim.cost.latency import CALIBRATIONS
from sim.cost.model_spec import ModelSpec
from sim.errors import CalibrationError
from sim.json_file import read_json_object
from sim.paths import REPOSITORY, RESULTS
from sim.results.run_folder import commit


def dtype_of(model: ModelSpec) -> str:
    """Return the type in which a model is loaded."""
    return "float32" if model.weight_dtype_bytes == 4 else "bfloat16"


def place_of(gpu: Gpu) -> str:
    """Return where torch finds a device of conf/gpu: cpu or cuda."""
    return "cpu" if gpu.name.startswith("cpu") else "cuda"


def load(
    model: ModelSpec, gpu: Gpu, checkpoint: str, threads: int, seed: int, config: Path | None = None
) -> ElasticModel:
    """Load the model onto the device, with PyTorch's threads and seed set."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    elastic, _ = load_weights(checkpoint, model, dtype=dtype_of(model), device=place_of(gpu), config=config)
    return elastic


def measure_changes(elastic: ElasticModel, settings: d.DeviceSettings, path: Path) -> dict[str, Any]:
    """Measure only what plan changes cost, and put it into the calibration at ``path``; return its content."""
    content: dict[str, Any] = read_json_object(path, CalibrationError, "measure all again")
    content["device_run"] |= Changes(d.Bench(elastic, settings)).measure(settings.seed)
    write_calibration(content, path)
    return content


def measure_all(elastic: ElasticModel, settings: d.DeviceSettings, gpu: Gpu, out: Path) -> dict[str, Any]:
    """Measure every term, fit and write the calibration and its plot; return the content.

    Samples are kept under runs/calibrate, so that a run that was stopped continues.
    """
    name = f"{settings.model}_{settings.device}"
    dtype, threads = dtype_of(elastic.spec), torch.get_num_threads()
    # Not in conf/calibration: every JSON file there is a calibration.
    samples = d.Samples(
        REPOSITORY / "runs" / "calibrate" / f"{name}.json",
        {
            **asdict(settings),
            "dtype": dtype,
            "threads": threads,
            "processor": elastic.hardware.name,
            "commit": commit(),  # samples of other code say nothing about this one
        },
    )
    started_s = time.monotonic()
    load = load_of(elastic, settings.seconds, gpu.memory_bytes, gpu.memory_bandwidth_bytes_per_s)
    load = replace(load, attention=settings.attention)
    bench = d.Bench(elastic, settings)
    runs, survey = d.measure(bench, samples, settings, load)
    terms = d.terms_of(samples)
    content = calibrate(_target(name, settings, terms, dtype, threads), out, Fixed(us=0.0, source=""))
    for term in content["errors"].values():
        if term.get("note") == "no reason known":
            term["note"] = "single cells of a coarse grid: products switch kernels between few and many tokens"
    content = scaled_to_runs(content, runs)
    held_out = run_engine(elastic, settings.clock, settings.seed + 100, load, load.held_out_rps, load.held_out_s)
    priced_s = held_out.priced_s(latency_of(content))
    content["errors"]["iteration"] = error_summary(priced_s, held_out.measured_s) | {
        "note": f"iterations of a run of the engine, of which nothing was fitted; their sum is off by "
        f"{priced_s.sum() / held_out.measured_s.sum() - 1:+.1%}, the machine's changes of speed included"
    }
    content["notes"] = [*content["notes"], *bench.grid.notes, *([elastic.note] if elastic.note else [])]
    content["device_run"] = {
        "seconds": round(time.monotonic() - started_s),
        "clock": settings.clock,
        "processor": elastic.hardware.name,
        **_sampling(samples),
        "limits": asdict(settings.limits),
        "points": {term.name: term.summary() for term in survey.terms.values()},
        **_host(bench),
        "memory_bandwidth_bytes_per_s": float(f"{d.memory_bandwidth_bytes_per_s(elastic.hardware):.3g}"),
        **Changes(bench).measure(settings.seed),
    }
    write_calibration(content, out / f"{name}.json")
    title = f"{settings.model} on {settings.device}, {content['date']}"
    plot(
        (RESULTS / "calibration" if out == CALIBRATIONS else out) / f"{name}.png",
        terms,
        latency_of(content),
        held_out,
        title,
    )
    return content


def _target(name: str, settings: d.DeviceSettings, terms: m.Terms, dtype: str, threads: int) -> Target:
    return Target(
        name=name,
        model=settings.model,
        device=settings.device,
        kind="measured",
        stack=f"hw.engine: PyTorch {torch.__version__}, {dtype}, {threads} thread(s), {settings.clock} seconds",
        sources=({"path": "python -m hw.calibrate source=device", "commit": commit()},),
        read=lambda _: terms,
        notes=(
            "Weights of 8 and 4 bits are unpacked for every product: memory is saved, time is not",
            "Prompt chunks and decodes of one iteration are separate calls of attention, and their times add",
        ),
    )


def scaled_to_runs(content: dict[str, Any], runs: list[Iterations]) -> dict[str, Any]:
    """Return a calibration scaled to engine runs: a factor on all terms, and a constant per iteration."""
    line = line_over_terms(runs, content)
    scaled = times(content, line.factor, line.prefill_attention_factor)
    scaled["fixed_us"] = round(line.fixed_s * 1e6, 1)
    scaled["fixed_source"] = (
        f"{sum(len(run.shapes) for run in runs)} iterations of {len(runs)} runs of hw.engine between the measurements "
        f"take this long and {line.factor:.3f} times what their terms take one by one, for the attention of prompts "
        f"{line.prefill_attention_factor:.3f} times (soft L1; off by {line.off:.1%} in the median); the tables hold "
        "the terms times that"
    )
    return scaled


def _host(bench: d.Bench) -> dict[str, Any]:
    """Return what the host needed to start one layer's work, where the device was timed alone; nothing on a CPU."""
    found = bench.host_us()
    if not found:
        return {}
    layers = bench.elastic.spec.num_layers
    kinds = {name: [us / layers for key, us in found.items() if key.startswith(name)] for name in ("mha_16", "ffn_16")}
    return {"host_us_per_layer": {name: float(f"{np.median(values):.3g}") for name, values in kinds.items() if values}}


def _sampling(samples: d.Samples) -> Mapping[str, Any]:
    counts = [len(values) for values in samples.of.values()]
    spreads = sorted(d.spread(values) for values in samples.of.values())
    return {
        "cells": len(counts),
        "samples": sum(counts),
        "repeats": [min(counts), max(counts)],
        "standard_error_of_medians_p50_p95": [float(f"{np.quantile(spreads, q):.2g}") for q in (0.5, 0.95)],
    }
