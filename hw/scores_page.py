"""Write hw/SCORES.md from the scores and the quality table of a model: figures of files, none by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sim.errors import CalibrationError, ConfigError
from sim.quality import FORMS, QualityTable, cross_validate, fit, plan_to_json, read_table

SIZES = (4, 8, 12, 16, 20, 30)


def scores_page(model: str, scores: Path, tables: Path) -> str:
    """Return the page, in Markdown; what was not measured is named as missing.

    Raises:
        ConfigError: if the model has no GSI order.
    """
    gsi = _read(scores / f"{model}_gsi.json")
    if gsi is None:
        raise ConfigError(f"no {model}_gsi.json in conf/score; run python -m hw.score kind=gsi first")
    parts = [
        f"# Scores of {model}",
        "Made by `python -m hw.score kind=report`; every figure comes from a file of `conf/score` or `conf/quality`, "
        "which names its own command, text, date and commit.",
        f"Weights: {gsi['weights']}. Calculated in {gsi['dtype']} on {gsi['device']}. Orders are calibrated on "
        f"{gsi['text']['tokens']:,} tokens of `{gsi['text']['text']}` in windows of {gsi['text']['window_tokens']}; "
        "losses below are on the test text, which no order has seen.",
        *_order(gsi),
        *_speed(_read(scores / f"{model}_gsi_speed.json")),
    ]
    path = tables / f"{model}.json"
    if path.is_file():
        table, raw = read_table(path), json.loads(path.read_text(encoding="utf-8"))
        parts += _greedy_against_one_shot(model, scores, table)
        parts += _precision(table)
        parts += _predictor(table, raw)
    else:
        parts += ["## Quality table", "Not measured yet: `python -m hw.score kind=table`."]
    parts += _pdtrim(_read(scores / f"{model}_pdtrim.json"))
    parts += _attention(_read(scores / f"{model}_attention.json"))
    return "\n\n".join(parts) + "\n"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _grid(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _order(gsi: dict[str, Any]) -> list[str]:
    how = "exact" if gsi["exact"] else f"raced with a margin of {gsi['margin']} nats a token, not exact"
    spent = sum(r["cpu_s"] for r in gsi["rounds"])
    return [
        "## Greedy order (GSI)",
        f"`python -m hw.score kind=gsi`: {how}; {len(gsi['order'])} rounds in {spent:.0f} CPU seconds.",
        " ".join(gsi["order"]),
    ]


def _speed(speed: Any) -> list[str]:
    title = "## Naive against fast"
    if speed is None:
        return [title, "Not measured yet: `python -m hw.score kind=gsi_speed`."]
    rows = [
        [
            row["round"],
            row["candidates"],
            *(f"{row[f'{name}_cpu_s']:.1f}" for name in ("naive", "exact", "margin")),
            *(row[f"{name}_removes"] for name in ("naive", "exact", "margin")),
        ]
        for row in speed["compared_rounds"]
    ]
    head = ["round", "candidates", "naive CPU s", "exact CPU s", "raced CPU s", "naive removes", "exact", "raced"]
    return [
        title,
        "`python -m hw.score kind=gsi_speed`: these rounds, each from the state of the order above, all in "
        f"one process on {speed['text']['tokens']:,} tokens. Naive over exact: "
        f"**{speed['naive_over_exact']:.1f}**; naive over raced: **{speed['naive_over_margin']:.1f}**.",
        _grid(head, rows),
        "A candidate that is a few per cent worse than the best can be given up for certain only near its last tokens, "
        "so the exact search saves what precedes a block and most of the head, and little more.",
    ]


def _greedy_against_one_shot(model: str, scores: Path, table: QualityTable) -> list[str]:
    measured = {json.dumps(plan_to_json(p), sort_keys=True): x for p, x in zip(table.plans, table.loss, strict=True)}
    dense = next(plan_to_json(p) for p, kinds in zip(table.plans, table.kinds, strict=True) if "dense" in kinds)
    columns = {}
    for name in ("gsi", "one_shot", "cosine"):
        found = _read(scores / f"{model}_{name}.json")
        if found is not None:
            columns[name] = found["order"]
    rows = []
    longest = max(len(order) for order in columns.values())
    for size in (size for size in SIZES if size <= longest):
        row: list[object] = [size]
        for order in columns.values():
            dropped = sorted(order[:size], key=lambda b: (int(b[3:]), b[:3] == "FFN"))
            key = json.dumps({**dense, "prefill_drop": dropped, "decode_drop": dropped}, sort_keys=True)
            loss = measured.get(key)
            row.append("not measured" if loss is None else f"{math.exp(table.dense_nll + loss):.2f}")
        rows.append(row)
    return [
        "## Greedy against one-shot",
        f"Perplexity on the test slice of the table after so many removals; dense is {math.exp(table.dense_nll):.2f}. "
        "One calibration sample.",
        _grid(["removals", *columns], rows),
    ]


def _precision(table: QualityTable) -> list[str]:
    rows = []
    for plan, kinds, loss in zip(table.plans, table.kinds, table.loss, strict=True):
        rows += [
            [kind, sum(b != 16 for b in plan.weight_bits), f"{math.exp(table.dense_nll + loss):.2f}"]
            for kind in kinds
            if kind.startswith(("W4", "W8"))
        ]
    if not rows:
        return []
    return [
        "## W8 and W4",
        "Round to nearest, groups of 128. The weights come from a 4-bit file already, which W8 hardly changes.",
        _grid(["order", "layers", "perplexity"], rows),
    ]


def _predictor(table: QualityTable, raw: dict[str, Any]) -> list[str]:
    rows = []
    for form in FORMS:
        try:
            errors = cross_validate(table, form)
        except (CalibrationError, ValueError):
            continue
        rows += [
            [e.form, e.kind, e.plans, f"{100 * e.median:.1f} %", f"{100 * e.p90:.1f} %", f"{e.spearman:.3f}"]
            for e in errors
        ]
    fitted = fit(table)
    return [
        "## Predicting a plan",
        f"{len(table.plans)} plans measured on {raw['test_text']['tokens']:,} test tokens "
        f"({raw['test_text']['windows']}). Error of perplexity on plans held out in five folds, of those under three "
        "times dense; dense and single removals are always known.",
        _grid(["form", "kind of plan", "plans", "median", "P90", "Spearman"], rows),
        f"`load_quality` uses {fitted.form}: curve {fitted.curve}, decode alone counts {fitted.stage_share}.",
    ]


def _pdtrim(found: Any) -> list[str]:
    title = "## Nested sets for prefill and decode (PDTrim)"
    if found is None:
        return [title, "Not measured yet: `python -m hw.score kind=pdtrim`."]
    rows = [
        [
            " ".join(s["prefill"]) or "none",
            " ".join(s["decode"]),
            f"{math.exp(s['start_decode_nll']):.2f}",
            f"{math.exp(s['decode_nll']):.2f}",
        ]
        for s in found["searches"]
    ]
    return [
        title,
        f"Perplexity behind the prompt on the calibration text ({found['text']['tokens']:,} tokens), of the most "
        "redundant blocks and after the search.",
        _grid(["prefill drops", "decode drops", "at the start", "found"], rows),
    ]


def _attention(found: Any) -> list[str]:
    if found is None:
        return []
    shares = " ".join(f"{share:.2f}" for share in found["share"])
    return [
        "## Attention on the first and last tokens",
        f"Share of attention on the first {found['first_tokens']} and last {found['last_tokens']} tokens, layer by "
        f"layer; at least {found['threshold']} in layers {found['local_layers']}.",
        shares,
    ]
