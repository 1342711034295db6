"""What KV at 8 and 4 bits costs: losses of a real model after its prompts, and each layer's share of them.

The loss of a plan is taken as a sum over layers. Each layer alone is measured at 4 bits, then all of them, and
prefixes, which say by how much the sum is off (one factor). At 8 bits a layer alone loses less than can be measured, so
the loss of all layers is divided among them like that at 4 bits. Random layers at 4, or at 8 and 4 bits, and quantized
KV together with 4-bit weights or dropped blocks, are only predicted: their errors are in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from hw.score.block_numbers import plan_without
from hw.score.job import Job
from hw.score.nll import measure_many
from sim.cost.kv_loss import KVLoss
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan, dense_plan
from sim.cost.plan_json import plan_from_json, plan_to_json
from sim.cost.quality import QUALITIES, Text
from sim.errors import ConfigError
from sim.progress import progress
from sim.types import Floats

RANDOM, DROPPED = 8, 8
MEASURED_BY = ("seconds", "cpu_seconds", "date", "commit")
"""Keys of a file that say when, and with which code, its losses were measured."""
AT_ONCE = 8
"""Plans that are measured between two reports of progress."""
FITTED, HELD_OUT, TOGETHER = ("all layers", "prefix"), ("random layers", "mixture"), ("with 4-bit weights", "pruned")
"""Kinds of plans. The factor is fitted to the first; the second and third are predicted, and plans of the third lose by
their weights or blocks as well."""


def kv_plans(spec: ModelSpec, drop_first: Sequence[int], seed: int) -> Iterator[tuple[str, Plan]]:
    """Yield the plans to measure, each with its kind.

    Args:
        spec: the model. drop_first: blocks in the order in which they are dropped. seed: of random layers.
    """
    layers, dense = spec.num_layers, dense_plan(spec)
    four_bit_weights = replace(dense, weight_bits=(4,) * layers)
    pruned = plan_without(spec, drop_first[:DROPPED])
    yield "dense", dense
    yield "dense", four_bit_weights
    yield "dense", pruned
    for bits in (8, 4):
        yield "all layers", _at(dense, bits, range(layers))
    for layer in range(layers):
        yield "one layer", _at(dense, 4, [layer])
    for share in (4, 2):
        yield "prefix", _at(dense, 4, range(layers // share))
    rng = np.random.default_rng(seed)
    for _ in range(RANDOM):
        yield "random layers", _at(dense, 4, rng.permutation(layers)[: int(rng.integers(2, layers))].tolist())
    for _ in range(RANDOM // 2):
        mixed = _at(dense, 8, rng.permutation(layers)[: layers // 2].tolist())
        yield "mixture", _at(mixed, 4, rng.permutation(layers)[: layers // 3].tolist())
    for bits in (8, 4):
        yield "with 4-bit weights", _at(four_bit_weights, bits, range(layers))
        yield "pruned", _at(pruned, bits, range(layers))


def _at(plan: Plan, bits: int, layers: Sequence[int]) -> Plan:
    chosen = set(layers)
    return replace(plan, kv_bits=tuple(bits if i in chosen else old for i, old in enumerate(plan.kv_bits)))


def score_kv_bits(job: Job) -> None:
    """Measure the losses, fit each layer's share, and write both; losses that a file has are only fitted again."""
    calibration, test = job.text("calibration"), job.text("test")
    path = Path(job.cfg.out) if job.cfg.out else QUALITIES / "kv_bits" / f"{job.name}.json"
    wanted = list(kv_plans(job.elastic.spec, job.order("one_shot"), job.cfg.seed))
    # Plans that share their first layers follow one another, so that these layers run once.
    wanted.sort(key=lambda pair: (pair[1].weight_bits, pair[1].prefill.mha, pair[1].prefill.ffn, pair[1].kv_bits))
    old = job.earlier(path, calibration)
    rows: list[dict[str, Any]] = []
    if old is not None:
        rows = old["plans"]
        asked = [[kind, plan_to_json(plan)] for kind, plan in wanted]
        if old["test_text"] != test.source or [[row["kind"], row["plan"]] for row in rows] != asked:
            raise ConfigError(f"{path} has losses of other plans or another test text; remove the file, or set out=")
        job.say(f"{path} has these losses; they are fitted again")
    with progress("measuring", len(wanted), "plans") as report:
        for first in range(len(rows), len(wanted), AT_ONCE):
            part = wanted[first : first + AT_ONCE]
            plans = [plan for _, plan in part]
            found = [measure_many(job.elastic, plans, text.tokens) for text in (calibration, test)]
            for (kind, plan), on_calibration, on_test in zip(part, *found, strict=True):
                nll = {"calibration": on_calibration.decode_mean, "test": on_test.decode_mean}
                tokens = {"calibration": on_calibration.decode_tokens, "test": on_test.decode_tokens}
                rows.append({"kind": kind, "plan": plan_to_json(plan), "nll": nll, "tokens": tokens})
            report(len(rows))
    fits = {text: fit_kv_bits(rows, text) for text in get_args(Text)}
    source = "NLL of the tokens after a prompt of half a window, in nats; sim.cost.kv_loss reads the fits"
    measured = {key: old[key] for key in MEASURED_BY} if old is not None else {}
    job.write(path, calibration, source, {"test_text": test.source, "fits": fits, "plans": rows, **measured})


def fit_kv_bits(rows: Sequence[Mapping[str, Any]], text: Text) -> dict[str, Any]:
    """Return what each layer's KV costs at 8 and 4 bits, in nats a token, and the errors of sums over layers.

    Args:
        rows: as ``score_kv_bits`` measures them. text: whose losses are fitted.
    """
    plans = [plan_from_json(row["plan"]) for row in rows]
    base = {_without_kv(plan): row["nll"][text] for row, plan in zip(rows, plans, strict=True) if _plain(plan)}
    loss = np.array([row["nll"][text] - base[_without_kv(plan)] for row, plan in zip(rows, plans, strict=True)])
    kinds = [row["kind"] for row in rows]
    layers = len(plans[0].kv_bits)
    alone = np.zeros(layers)
    for plan, kind, one in zip(plans, kinds, loss, strict=True):
        if kind == "one layer":
            alone[plan.kv_bits.index(4)] = max(0.0, one)
    four = np.array([[bits == 4 for bits in plan.kv_bits] for plan in plans])
    sums = four @ alone
    fitted = [i for i, kind in enumerate(kinds) if kind in FITTED and four[i].any()]
    if not alone.any():  # too little text, or a model that loses nothing: every layer costs the same
        alone = np.full(layers, 1.0 / layers)
        sums = four @ alone
    factor = max(0.0, float(sums[fitted] @ loss[fitted] / (sums[fitted] @ sums[fitted])))
    (all_8,) = (i for i, plan in enumerate(plans) if kinds[i] == "all layers" and set(plan.kv_bits) == {8})
    at_4, at_8 = alone * factor, alone / alone.sum() * max(0.0, float(loss[all_8]))
    costs = KVLoss("", tuple(at_8.tolist()), tuple(at_4.tolist()))
    predicted = np.array([costs.of(plan) for plan in plans])
    return {
        "8": at_8.tolist(),
        "4": at_4.tolist(),
        "factor": factor,
        "errors": [_error(name, loss, predicted, kinds, chosen) for name, chosen in _JUDGED.items()],
    }


_JUDGED = {"held-out layers": HELD_OUT, "with 4-bit weights": TOGETHER[:1], "with dropped blocks": TOGETHER[1:]}


def _error(
    name: str, loss: Floats, predicted: Floats, kinds: Sequence[str], chosen: Sequence[str]
) -> dict[str, float | int | str]:
    at = [i for i, kind in enumerate(kinds) if kind in chosen]
    errors = np.abs(predicted[at] - loss[at])
    return {
        "plans": name,
        "count": len(at),
        "mean_loss": float(loss[at].mean()),
        "mean_error": float(errors.mean()),
        "worst_error": float(errors.max()),
    }


def _plain(plan: Plan) -> bool:
    return set(plan.kv_bits) == {16}


def _without_kv(plan: Plan) -> Plan:
    return replace(plan, kv_bits=(16,) * len(plan.kv_bits))
