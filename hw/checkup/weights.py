"""Step: the weights on the device, and their copies at 16, 8 and 4 bits: bytes as predicted, and seconds."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from hw.checkup.findings import Findings
from hw.checkup.setup import Setup
from hw.elastic.device import Accelerator
from sim.cost.memory import weight_bytes
from sim.cost.plan import WEIGHT_BITS, Plan, dense_plan, drop, with_mask


def run(setup: Setup, findings: Findings) -> None:
    """Make or load the weights, store them at every precision, and bring the model to plans of each."""
    start_s = time.perf_counter()
    elastic, _ = setup.loaded()
    findings.figure("load_s", time.perf_counter() - start_s)
    findings.figure("model", setup.model.name)
    findings.figure("weights", elastic.note or setup.checkpoint or setup.model.name)
    spec, dense = elastic.spec, dense_plan(elastic.spec)
    _check_bytes(findings, elastic, "dense", dense)
    if isinstance(elastic.hardware, Accelerator):
        taken = elastic.hardware.in_use_bytes()
        findings.figure("allocated_bytes", taken)
        # The allocator rounds each tensor up to 512 bytes, and keeps a few constants.
        most = weight_bytes(spec, dense) * 1.02 + (64 << 20)
        findings.check("bytes that the allocator holds", taken <= most, taken, f"at most {most:.0f}")
    stored: dict[str, Any] = {}
    for bits in WEIGHT_BITS:
        before, start_s = elastic.stored_bytes, time.perf_counter()
        elastic.prepare((bits,))
        elastic.hardware.synchronize()
        seconds = time.perf_counter() - start_s
        stored[str(bits)] = {"bytes": elastic.stored_bytes - before, "seconds": seconds}
        findings.figure("stored", stored)
    findings.figure("stored_bytes", elastic.stored_bytes)
    moved: dict[str, Any] = {}
    for bits in (8, 4, 16):
        plan = replace(dense, weight_bits=(bits,) * spec.num_layers)
        seconds = _apply(elastic, plan)
        moved[f"to {bits} bits"] = {"seconds": seconds, "bytes_per_s": weight_bytes(spec, plan) / seconds}
        findings.figure("plan_changes", moved)
        _check_bytes(findings, elastic, f"all at {bits} bits", plan)
    pruned = with_mask(dense, drop(spec, mha=range(0, spec.num_layers, 2), ffn=range(1, spec.num_layers, 2)))
    moved["to half of the blocks"] = {"seconds": _apply(elastic, pruned)}
    _check_bytes(findings, elastic, "half of the blocks", pruned)
    seconds = _apply(elastic, dense)
    copied = weight_bytes(spec, dense) - weight_bytes(spec, pruned)
    moved["half of the blocks back"] = {"seconds": seconds, "bytes_per_s": copied / seconds}
    findings.figure("plan_changes", moved)
    _check_bytes(findings, elastic, "dense again", dense)
    with torch.inference_mode():
        logits = elastic.forward([list(range(1, 17))])
    findings.check("logits that are finite", bool(torch.isfinite(logits).all()), tuple(logits.shape), "all")


def _apply(elastic: Any, plan: Plan) -> float:
    start_s = time.perf_counter()
    elastic.apply(plan)
    elastic.hardware.synchronize()
    return time.perf_counter() - start_s


def _check_bytes(findings: Findings, elastic: Any, what: str, plan: Plan) -> None:
    found, predicted = elastic.bytes(), weight_bytes(elastic.spec, plan)
    findings.check(f"bytes of weights, {what}", found == predicted, found, str(predicted))
