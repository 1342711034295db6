"""The page docs/results/scores/index.md, from the scores and the quality table of a model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from hw.score.block_numbers import block_number
from hw.score.fit import (
    BEST_CURVE,
    BEST_STAGE_SHARE,
    RANGE_ERROR,
    RANGE_WINDOW,
    QualityError,
    QualityTable,
    choose,
    errors_of,
    fit,
    held_out,
    held_out_kind,
    measured_range,
    read_table,
)
from sim.cost.kv_loss import kv_loss_path
from sim.cost.memory import weight_bytes
from sim.cost.model_spec import ModelSpec, load_model, model_names
from sim.cost.plan import Plan, dense_plan
from sim.cost.plan_json import plan_from_json, plan_to_json
from sim.cost.quality import BEST_FORM, FORMS
from sim.errors import ConfigError
from sim.json_file import read_json_object
from sim.pages.render import render, table

SIZES = (4, 8, 12, 16, 20, 30)
TEMPLATE = Path(__file__).parent / "templates" / "scores.md.j2"
LOSS_BANDS = (0.02, 0.1, 0.3, 0.7)
"""Edges between the bands of loss, nats per token, in which greedy decoding is reported."""


def scores_page(model: str, scores: Path, tables: Path) -> str:
    """Return the page, in Markdown; the template says how to measure what is missing.

    Args:
        model: a name of conf/model.
        scores: folder of the files NAME_KIND.json. tables: folder of the quality tables.

    Raises:
        ConfigError: if the model has no GSI order.
    """
    gsi = _read(scores / f"{model}_gsi.json")
    if gsi is None:
        raise ConfigError(f"no {model}_gsi.json in conf/score; run python -m hw.score kind=gsi first")
    kinds = ("full_test", "samples", "generation", "attention", "pdtrim")
    found = {kind: _read(scores / f"{model}_{kind}.json") for kind in kinds}
    searches = [_read(path) for path in sorted(scores.glob(f"{model}_gsi*.json"))]
    timed = sorted((s for s in searches if s["naive_rounds"]), key=lambda search: -len(search["naive_rounds"]))
    path = tables / f"{model}.json"
    measured = read_table(path) if path.is_file() else None
    return render(
        TEMPLATE,
        model=model,
        gsi=gsi,
        gsi_cpu_s=sum(row["cpu_s"] for row in gsi["rounds"]),
        speed=[speed_of(search) for search in timed],
        limits=limits(timed[0]) if timed else None,
        full_test=found["full_test"] and full_test(found["full_test"]),
        samples=found["samples"] and samples(found["samples"]),
        quality=None if measured is None else quality(measured, _read(path), scores, found["pdtrim"]),
        pdtrim=found["pdtrim"] and pdtrim(found["pdtrim"]),
        generation=found["generation"] and generation(found["generation"]),
        attention=found["attention"],
        kv_bits=kv_bits(costs) if (costs := _read(kv_loss_path(path))) else None,
    )


def kv_bits(found: dict[str, Any]) -> dict[str, Any]:
    """Return what KV at 8 and 4 bits costs on test text: measured in all layers, by layer, and the errors of sums."""
    plans = [plan_from_json(row["plan"]) for row in found["plans"]]
    nll = {plan: row["nll"]["test"] for plan, row in zip(plans, found["plans"], strict=True)}
    dense = dense_plan(load_model(found["model"]))
    fit = found["fits"]["test"]
    layers, total = len(fit["4"]), sum(fit["4"])
    costly = sorted(range(layers), key=lambda layer: -fit["4"][layer])[:5]
    rows = [
        {
            "plans that were predicted": error["plans"],
            "number": error["count"],
            "mean loss": error["mean_loss"],
            "mean error": error["mean_error"],
            "largest error": error["worst_error"],
        }
        for error in fit["errors"]
    ]
    return {
        "tokens": found["plans"][0]["tokens"]["test"],
        "commit": found["commit"],
        "all": {bits: nll[replace(dense, kv_bits=(bits,) * layers)] - nll[dense] for bits in (8, 4)},
        "factor": fit["factor"],
        "costly": [{"layer": layer, "nats": fit["4"][layer]} for layer in costly],
        "share": sum(fit["4"][layer] for layer in costly) / total if total else 0.0,  # 0: no loss was measured
        "table": table(rows, dict.fromkeys(("mean loss", "mean error", "largest error"), ".4f")),
    }


def _read(path: Path) -> Any:
    return read_json_object(path, ConfigError, "measure it again") if path.is_file() else None


def limits(gsi: dict[str, Any]) -> dict[str, float]:
    """Return the share of naive block runs that shared states leave, and of the text that an exact search must see."""
    kept = sorted(block_number(name) for name in gsi["rounds"][0]["candidates"])
    last, naive, run = -1, 0, 0
    shares: list[float] = []
    for row in gsi["rounds"]:
        naive += len(kept) * (len(kept) - 1)
        run += sum(sum(other > max(block, last) for other in kept) for block in kept)
        shares += [row["nll"] / nll for nll in row["candidates"].values()]
        last = block_number(row["removed"])
        kept.remove(last)
    return {"block_runs": run / naive, "text": float(np.mean(shares))}


def speed_of(gsi: dict[str, Any]) -> dict[str, Any]:
    """Return the ratio of naive to exact CPU seconds, and the rounds in which the searches remove different blocks."""
    compared, rounds = gsi["naive_rounds"], gsi["rounds"]
    naive_s, exact_s = (sum(row[f"{name}_cpu_s"] for row in compared) for name in ("naive", "exact"))
    all_s, all_naive_s = sum(row["cpu_s"] for row in rounds), None
    if len(compared) > 2:
        # What the naive algorithm spends on a candidate falls evenly with the blocks that are left.
        each = [row["naive_cpu_s"] / row["candidates"] for row in compared]
        sizes = [len(row["candidates"]) for row in rounds]
        between = np.interp(sizes, [row["candidates"] for row in compared][::-1], each[::-1])
        all_naive_s = float((between * sizes).sum())
    rows = [
        {
            "round": row["round"],
            "candidates": row["candidates"],
            "naive CPU (s)": row["naive_cpu_s"],
            "exact CPU (s)": row["exact_cpu_s"],
            "ratio": row["naive_cpu_s"] / row["exact_cpu_s"],
            "naive removes": row["naive_removes"],
            "exact removes": row["exact_removes"],
        }
        for row in compared
    ]
    return {
        "text": gsi["text"],
        "dtype": gsi["dtype"],
        "ratio": naive_s / exact_s,
        "rounds": len(rounds),
        "all_s": all_s,
        "all_naive_s": all_naive_s,
        "compared": len(compared),
        "same": sum(row["naive_removes"] == row["exact_removes"] for row in compared),
        "different": [
            {**row, "behind": row["naive_nll_of_exact"] - row["naive_nll"]}
            for row in compared
            if row["naive_removes"] != row["exact_removes"]
        ],
        "table": table(rows, dict.fromkeys(("naive CPU (s)", "exact CPU (s)", "ratio"), ".1f")),
    }


def full_test(found: dict[str, Any]) -> dict[str, Any]:
    """Return the perplexity of chosen plans on the full test text."""
    rows = [{"plan": row["name"], "perplexity": math.exp(row["nll"])} for row in found["plans"]]
    return {"text": found["text"], "table": table(rows, {"perplexity": ".2f"})}


def samples(found: dict[str, Any]) -> dict[str, Any]:
    """Return the perplexity of greedy and one-shot orders over calibration samples."""
    rows = []
    for size in SIZES:
        row: dict[str, Any] = {"removals": size}
        for order, name in (("gsi", "GSI"), ("one_shot", "one-shot")):
            at = [math.exp(r["nll"]) for r in found["rows"] if r["order"] == order and r["removals"] == size]
            row[name] = np.mean(at) if at else None
            row[f"{name}, range"] = f"{min(at):.2f} to {max(at):.2f}" if at else None
            row[f"{name}, samples"] = len(at)
        rows.append(row)
    return {
        "text": found["text"],
        "samples": sorted({row["sample"] for row in found["rows"]}),
        "table": table(rows, {"GSI": ".2f", "one-shot": ".2f"}),
    }


def quality(measured: QualityTable, raw: dict[str, Any], scores: Path, searched: Any) -> dict[str, Any]:
    """Return the quality table's figures on orders, precision, and the fit's held-out error."""
    best = choose(measured)
    used = (BEST_FORM, BEST_CURVE if BEST_FORM.startswith("warped") else 0.0, BEST_STAGE_SHARE)
    forms = []
    for form in FORMS:
        errors = {error.kind: error for error in errors_of(measured, held_out(measured, (form,)), form)}
        forms += [{"form": form} | _error(errors[kind]) for kind in ("all", "random mask") if kind in errors]
    by_kind = [
        {"plans of": kind} | _error(errors_of(measured, held_out_kind(measured, kind), kind)[0])
        for kind in ("random mask", *(f"prefix of {name}" for name in ("gsi", "one_shot", "cosine", "pdtrim")))
        if sum(kind in kinds for kinds in measured.kinds) > 5
    ]
    equal_bytes = _equal_bytes(measured, raw) if searched is not None else []
    held = measured_range(measured, BEST_FORM, held_out(measured, (BEST_FORM,)))
    return {
        "dense": math.exp(measured.dense_nll),
        "orders": orders(measured, scores),
        "precision": precision(measured),
        "plans": len(measured.plans),
        "text": raw["text"],
        "test_text": raw["test_text"],
        "forms": table(forms, ERROR_SPECS, left=2),
        "chosen": table([_error(error) for error in errors_of(measured, held_out(measured), "chosen")], ERROR_SPECS),
        "held_out_kinds": table(pd.DataFrame(by_kind).drop(columns="kind of plan"), ERROR_SPECS) if by_kind else "",
        "fitted": fit(measured),
        "range": held,
        "range_perplexity": math.exp(held.loss),
        "window": RANGE_WINDOW,
        "window_error": RANGE_ERROR,
        "better": None if best == used else best,
        "equal_bytes": table(equal_bytes, dict.fromkeys(BYTES_SPECS, ".1f") | PERPLEXITY_SPECS, left=0)
        if equal_bytes
        else "",
    }


ERROR_SPECS = {"median error": ".1%", "P90 error": ".1%", "Spearman": ".3f"}
BYTES_SPECS = ("weights (MB)", "single set, weights (MB)")
PERPLEXITY_SPECS = {"perplexity": ".2f", "single set, perplexity": ".2f"}


def _error(error: QualityError) -> dict[str, Any]:
    return {
        "kind of plan": error.kind,
        "plans": error.plans,
        "median error": error.median,
        "P90 error": error.p90,
        "Spearman": error.spearman,
    }


def orders(measured: QualityTable, scores: Path) -> str:
    """Return the perplexity of the table after the first removals of every order."""
    loss_of = {_key(plan_to_json(plan)): loss for plan, loss in zip(measured.plans, measured.loss, strict=True)}
    dense = next(plan_to_json(p) for p, kinds in zip(measured.plans, measured.kinds, strict=True) if "dense" in kinds)
    found = {name: _read(scores / f"{measured.name}_{name}.json") for name in ("gsi", "one_shot", "cosine", "pdtrim")}
    order_of = {name: content["order"] for name, content in found.items() if content is not None}
    rows = []
    for size in (size for size in SIZES if size <= max(map(len, order_of.values()))):
        row: dict[str, Any] = {"removals": size}
        for name, order in order_of.items():
            dropped = sorted(order[:size], key=lambda b: (int(b[3:]), b[:3] == "FFN"))
            loss = loss_of.get(_key({**dense, "prefill_drop": dropped, "decode_drop": dropped}))
            row[name] = None if loss is None else math.exp(measured.dense_nll + loss)
        rows.append(row)
    return table(rows, dict.fromkeys(order_of, ".2f"))


def _key(plan: dict[str, Any]) -> str:
    return json.dumps(plan, sort_keys=True)


def precision(measured: QualityTable) -> str:
    """Return the perplexity of the table with layers at 8 or 4 bits; empty where no such plan was measured."""
    found: dict[int, dict[str, float]] = {}
    for plan, kinds, loss in zip(measured.plans, measured.kinds, measured.loss, strict=True):
        for kind in kinds:
            if kind.startswith(("W4", "W8")):
                column = f"{kind[:2]} {'by LIS' if 'lis' in kind else 'front to back'}"
                count = sum(bits != 16 for bits in plan.weight_bits)
                found.setdefault(count, {})[column] = math.exp(measured.dense_nll + loss)
    if not found:
        return ""
    columns = [f"{bits} {order}" for bits in ("W4", "W8") for order in ("front to back", "by LIS")]
    rows = [{"layers": count, **{name: found[count].get(name) for name in columns}} for count in sorted(found)]
    return table(rows, dict.fromkeys(columns, ".2f"))


def pdtrim(found: dict[str, Any]) -> dict[str, Any]:
    """Return the sets that PDTrim's two-stage search found."""
    rows = [
        {
            "prefill drops": " ".join(search["prefill"]) or "none",
            "decode drops": " ".join(search["decode"]),
            "perplexity, start": math.exp(search["start_decode_nll"]),
            "perplexity, found": math.exp(search["decode_nll"]),
        }
        for search in found["searches"]
    ]
    specs = {"perplexity, start": ".2f", "perplexity, found": ".2f"}
    return {"text": found["text"], "steps": found["steps"], "table": table(rows, specs, left=2)}


def _equal_bytes(measured: QualityTable, raw: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the searched sets next to the best single set that takes no more weight bytes."""
    if measured.name not in model_names():
        return []
    spec = load_model(measured.name)
    pairs = [(plan, row) for plan, row in zip(measured.plans, raw["plans"], strict=True) if _is_mask(plan)]
    single = [pair for pair in pairs if pair[0].prefill == pair[0].decode]
    rows = []
    for plan, row in pairs:
        if "PDTrim search" not in row["chosen_as"]:
            continue
        allowed = _both(spec, plan)
        fitting = [pair for pair in single if _both(spec, pair[0]) <= allowed]
        best, other = min(fitting, key=lambda pair: pair[1]["nll_calibration"])
        rows.append(
            {
                "prefill drops": len(row["plan"]["prefill_drop"]),
                "decode drops": len(row["plan"]["decode_drop"]),
                "weights (MB)": allowed / 1e6,
                "perplexity": math.exp(row["nll_test_decode"]),
                "single set drops": len(other["plan"]["decode_drop"]),
                "single set, weights (MB)": _both(spec, best) / 1e6,
                "single set, perplexity": math.exp(other["nll_test_decode"]),
            }
        )
    return sorted(rows, key=lambda row: (row["decode drops"], row["prefill drops"]))


def _is_mask(plan: Plan) -> bool:
    return set(plan.weight_bits) == {16} and all(keep.first_tokens is None for keep in plan.kv_keep)


def _both(spec: ModelSpec, plan: Plan) -> int:
    """Return the weight bytes of a prefill and a decode replica together."""
    return weight_bytes(spec, plan, "prefill") + weight_bytes(spec, plan, "decode")


def generation(found: dict[str, Any]) -> dict[str, Any]:
    """Return how far greedy decoding agrees with dense, by bands of loss."""
    frame = pd.DataFrame(found["plans"])
    edges = (-math.inf, *LOSS_BANDS, math.inf)
    rows = []
    for low, high in pairwise(edges):
        part = frame[(frame["loss"] >= low) & (frame["loss"] < high)]
        if len(part):
            share = part["share_equal"]
            name = f"under {high}" if low < 0 else f"{low} and more" if math.isinf(high) else f"{low} to {high}"
            rows.append(
                {
                    "loss (nats per token)": name,
                    "plans": len(part),
                    "equal tokens": share.mean(),
                    "equal tokens, range": f"{share.min():.2f} to {share.max():.2f}",
                    "tokens before parting": part["tokens_before_parting"].mean(),
                }
            )
    loss = frame["loss"].to_numpy()
    return {
        **{key: found[key] for key in ("prompts", "prompt_tokens", "decoded_tokens")},
        "plans": len(frame),
        "table": table(rows, {"equal tokens": ".2f", "tokens before parting": ".1f"}),
        "spearman_share": spearmanr(loss, frame["share_equal"].to_numpy()).statistic,
        "spearman_first": spearmanr(loss, frame["tokens_before_parting"].to_numpy()).statistic,
    }
