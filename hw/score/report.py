"""Write hw/SCORES.md from the scores and the quality table of a model: figures of files, none by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from hw.score.block_numbers import block_number
from hw.score.fit import (
    BEST_CURVE,
    BEST_STAGE_SHARE,
    QualityError,
    QualityTable,
    choose,
    errors_of,
    fit,
    held_out,
    held_out_kind,
    read_table,
)
from sim.cost.memory import weight_bytes
from sim.cost.model_spec import ModelSpec, load_model, model_names
from sim.cost.plan import Plan
from sim.cost.plan_json import plan_to_json
from sim.cost.quality import BEST_FORM, FORMS
from sim.errors import ConfigError

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
        "losses below are on the test text, which no order has seen, unless a line says otherwise.",
        *_order(gsi),
        *_speed([_read(path) for path in sorted(scores.glob(f"{model}_gsi*.json"))]),
        *_full_test(_read(scores / f"{model}_full_test.json")),
        *_samples(_read(scores / f"{model}_samples.json")),
    ]
    path = tables / f"{model}.json"
    if path.is_file():
        table, raw = read_table(path), json.loads(path.read_text(encoding="utf-8"))
        parts += _orders(model, scores, table)
        parts += _precision(table)
        parts += _predictor(table, raw)
        parts += _pdtrim(_read(scores / f"{model}_pdtrim.json"), table, raw)
    else:
        parts += ["## Quality table", "Not measured yet: `python -m hw.score kind=table`."]
    parts += _generation(_read(scores / f"{model}_generation.json"))
    parts += _attention(_read(scores / f"{model}_attention.json"))
    return "\n\n".join(parts) + "\n"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _grid(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _order(gsi: dict[str, Any]) -> list[str]:
    spent = sum(r["cpu_s"] for r in gsi["rounds"])
    return [
        "## Greedy order (GSI)",
        f"`python -m hw.score kind=gsi`: exact; {len(gsi['order'])} rounds in {spent:.0f} CPU seconds.",
        " ".join(gsi["order"]),
    ]


def _speed(searches: Sequence[dict[str, Any]]) -> list[str]:
    title = "## Naive against fast"
    timed = [search for search in searches if search["naive_rounds"]]
    if not timed:
        return [title, "Not measured yet: `python -m hw.score kind=gsi calibration.tokens=256 gsi.compare_every=15`."]
    parts = [
        title,
        "`python -m hw.score kind=gsi calibration.tokens=256 gsi.compare_every=15`, and with as many tokens and rounds "
        "as said below: both in one process, from the same state, in the same dtype. The naive algorithm runs one "
        "candidate on all tokens in a batch; that the fast one has several candidates in a batch is a part of what it "
        "saves.",
    ]
    ranked = sorted(timed, key=lambda search: -len(search["naive_rounds"]))
    for search in ranked:
        parts += _speed_of(search)
    return [*parts, _limits(ranked[0])]


def _limits(gsi: dict[str, Any]) -> str:
    """Say what exactness leaves to be saved."""
    kept = sorted(block_number(name) for name in gsi["rounds"][0]["candidates"])
    last, naive, run = -1, 0, 0
    shares = []
    for row in gsi["rounds"]:
        naive += len(kept) * (len(kept) - 1)
        run += sum(sum(other > max(block, last) for other in kept) for block in kept)
        shares += [row["nll"] / nll for nll in row["candidates"].values()]
        last = block_number(row["removed"])
        kept.remove(last)
    return (
        f"The aim was 4. What is exact has its limits: shared states leave {100 * run / naive:.0f} % of the naive "
        "block runs, and a candidate can be given up for certain only once as much of the text was seen as the best "
        f"loss is of its own, {100 * np.mean(shares):.0f} % in the mean. The rest is the head; bounds replace it but "
        "for the candidates that come near."
    )


def _speed_of(gsi: dict[str, Any]) -> list[str]:
    compared = gsi["naive_rounds"]
    rows = [
        [
            row["round"],
            row["candidates"],
            f"{row['naive_cpu_s']:.1f}",
            f"{row['exact_cpu_s']:.1f}",
            f"{row['naive_cpu_s'] / row['exact_cpu_s']:.1f}",
            row["naive_removes"],
            row["exact_removes"],
        ]
        for row in compared
    ]
    naive, exact = (sum(row[f"{name}_cpu_s"] for row in compared) for name in ("naive", "exact"))
    text = (
        f"On {gsi['text']['tokens']:,} tokens {gsi['text']['windows']}, in {gsi['dtype']}. Naive over exact, CPU "
        f"seconds of these rounds: **{naive / exact:.1f}**."
    )
    whole = sum(r["cpu_s"] for r in gsi["rounds"])
    if len(compared) > 2:
        # What the naive algorithm spends on a candidate falls evenly with the blocks that are left.
        each = [row["naive_cpu_s"] / row["candidates"] for row in compared]
        sizes = [len(r["candidates"]) for r in gsi["rounds"]]
        between = np.interp(sizes, [row["candidates"] for row in compared][::-1], each[::-1])
        whole_naive = float((between * sizes).sum())
        text += (
            f" Of all {len(gsi['rounds'])} rounds: **{whole_naive / whole:.1f}**, {whole_naive:.0f} s against "
            f"{whole:.0f} s, the naive rounds in between interpolated."
        )
    same = sum(row["naive_removes"] == row["exact_removes"] for row in compared)
    text += f" Both remove the same block in {same} of {len(compared)} rounds."
    for row in compared:
        if row["naive_removes"] != row["exact_removes"]:
            behind = row["naive_nll_of_exact"] - row["naive_nll"]
            text += (
                f" In round {row['round']} the naive algorithm puts {row['naive_removes']} ahead of "
                f"{row['exact_removes']} by {behind:.1e} nats a token."
            )
    head = ["round", "candidates", "naive CPU s", "exact CPU s", "ratio", "naive removes", "exact removes"]
    return [text, _grid(head, rows)]


FULL_TEST = "python -m hw.score kind=full_test test.tokens=null test.window=2048 test.keep_newlines=true"


def _full_test(found: Any) -> list[str]:
    title = "## The whole test text"
    if found is None:
        return [title, f"Not measured yet: `{FULL_TEST}`."]
    rows = [[row["name"], f"{math.exp(row['nll']):.2f}"] for row in found["plans"]]
    return [
        title,
        f"`{FULL_TEST}`: all {found['text']['tokens']:,} tokens of `{found['text']['text']}` in windows of "
        f"{found['text']['window_tokens']}, rows with their newlines as in the data set of Hugging Face.",
        _grid(["plan", "perplexity"], rows),
    ]


def _samples(found: Any) -> list[str]:
    title = "## Greedy against one-shot, over calibration samples"
    if found is None:
        return [title, "Not measured yet: `python -m hw.score kind=samples`."]
    samples = sorted({row["sample"] for row in found["rows"]})
    rows = []
    for size in SIZES:
        row: list[object] = [size]
        for order in ("gsi", "one_shot"):
            at = [math.exp(r["nll"]) for r in found["rows"] if r["order"] == order and r["removals"] == size]
            row.append(f"{np.mean(at):.2f}" if at else "not measured")
            row.append(f"{min(at):.2f} to {max(at):.2f} ({len(at)})" if at else "")
        rows.append(row)
    return [
        title,
        f"Perplexity on the first {found['text']['tokens']:,} test tokens, windows of "
        f"{found['text']['window_tokens']}: mean and range (of so many) over orders from calibration samples "
        f"{'; '.join(samples)}.",
        _grid(["removals", "GSI", "range", "one-shot", "range"], rows),
    ]


def _key(plan: dict[str, Any]) -> str:
    return json.dumps(plan, sort_keys=True)


def _orders(model: str, scores: Path, table: QualityTable) -> list[str]:
    measured = {_key(plan_to_json(p)): x for p, x in zip(table.plans, table.loss, strict=True)}
    dense = next(plan_to_json(p) for p, kinds in zip(table.plans, table.kinds, strict=True) if "dense" in kinds)
    columns = {}
    for name in ("gsi", "one_shot", "cosine", "pdtrim"):
        found = _read(scores / f"{model}_{name}.json")
        if found is not None:
            columns[name] = found["order"]
    rows = []
    longest = max(len(order) for order in columns.values())
    for size in (size for size in SIZES if size <= longest):
        row: list[object] = [size]
        for order in columns.values():
            dropped = sorted(order[:size], key=lambda b: (int(b[3:]), b[:3] == "FFN"))
            loss = measured.get(_key({**dense, "prefill_drop": dropped, "decode_drop": dropped}))
            row.append("not measured" if loss is None else f"{math.exp(table.dense_nll + loss):.2f}")
        rows.append(row)
    return [
        "## Orders side by side",
        f"Perplexity on the test slice of the table after so many removals; dense is {math.exp(table.dense_nll):.2f}. "
        "One calibration sample. cosine: of the dense model, once; pdtrim: measured anew after every removal.",
        _grid(["removals", *columns], rows),
    ]


def _precision(table: QualityTable) -> list[str]:
    found: dict[tuple[int, str, int], float] = {}
    for plan, kinds, loss in zip(table.plans, table.kinds, table.loss, strict=True):
        for kind in kinds:
            if kind.startswith(("W4", "W8")):
                count = sum(bits != 16 for bits in plan.weight_bits)
                found[int(kind[1]), "lis" if "lis" in kind else "front", count] = math.exp(table.dense_nll + loss)
    if not found:
        return []
    columns = [(4, "front"), (4, "lis"), (8, "front"), (8, "lis")]
    rows = [
        [count, *(f"{found[*column, count]:.2f}" if (*column, count) in found else "" for column in columns)]
        for count in sorted({count for *_, count in found})
    ]
    return [
        "## W8 and W4",
        "Perplexity on the test slice of the table. Round to nearest, groups of 128. The weights come from a 4-bit "
        "file already, which W8 hardly changes.",
        _grid(["layers", "W4 front to back", "W4 by LIS", "W8 front to back", "W8 by LIS"], rows),
    ]


def _predictor(table: QualityTable, raw: dict[str, Any]) -> list[str]:
    def cells(error: QualityError) -> list[object]:
        return [
            error.plans,
            f"{100 * error.median:.1f} %",
            f"{100 * error.p90:.1f} %",
            "" if math.isnan(error.spearman) else f"{error.spearman:.3f}",
        ]

    forms = []
    for form in FORMS:
        errors = {error.kind: error for error in errors_of(table, held_out(table, (form,)), form)}
        forms += [[form, kind, *cells(errors[kind])] for kind in ("all", "random mask") if kind in errors]
    kinds = [[error.kind, *cells(error)] for error in errors_of(table, held_out(table), "chosen")]
    whole = [
        [kind, *cells(errors_of(table, held_out_kind(table, kind), kind)[0])]
        for kind in ("random mask", *(f"prefix of {name}" for name in ("gsi", "one_shot", "cosine", "pdtrim")))
        if sum(kind in kinds for kinds in table.kinds) > 5
    ]
    best = choose(table)
    used = (BEST_FORM, BEST_CURVE if BEST_FORM.startswith("warped") else 0.0, BEST_STAGE_SHARE)
    now = "" if best == used else f" On this table `choose` would now take {best[0]}, curve {best[1]}, share {best[2]}."
    fitted = fit(table)
    columns = ["plans", "median", "P90", "Spearman"]
    return [
        "## Predicting a plan",
        f"{len(table.plans)} plans measured, each on the same {raw['test_text']['tokens']:,} test tokens "
        f"({raw['test_text']['windows']}) and {raw['text']['tokens']:,} calibration tokens. Below: error of perplexity "
        "on plans held out in five folds, of those under three times dense. Dense and the plans that remove one block, "
        "or cut one layer's KV, are always known and not reported on. A mask that prefill alone drops is no "
        "Plan: decode would find no KV there. Of each form, the curve and what decode alone counts are chosen within "
        "the other four folds.",
        _grid(["form", "kind of plan", *columns], forms),
        "The form chosen within the other folds too, so that no plan has a say in what predicts it:",
        _grid(["kind of plan", *columns], kinds),
        "An earlier choice is a prefix of an order that has been found anew since. With all plans of a kind held out:",
        _grid(["kind of plan", *columns], whole),
        f"`load_quality` uses {fitted.form}, curve {fitted.curve}, decode alone counts {fitted.stage_share}.{now}",
    ]


def _pdtrim(found: Any, table: QualityTable, raw: dict[str, Any]) -> list[str]:
    title = "## Nested sets for prefill and decode (PDTrim)"
    if found is None:
        return [title, "Not measured yet: `python -m hw.score kind=pdtrim`."]
    head = ["prefill drops", "decode drops", "at the start", "found"]
    searches = [
        [
            " ".join(s["prefill"]) or "none",
            " ".join(s["decode"]),
            f"{math.exp(s['start_decode_nll']):.2f}",
            f"{math.exp(s['decode_nll']):.2f}",
        ]
        for s in found["searches"]
    ]
    parts = [
        title,
        f"Perplexity behind the prompt on the calibration text ({found['text']['tokens']:,} tokens), of the most "
        f"redundant blocks and after a search of {found['steps']} steps.",
        _grid(head, searches),
    ]
    rows = _equal_bytes(table, raw)
    if rows:
        parts += [
            "Beside a single set at equal bytes, perplexity behind the prompt on the test slice of the table. Weights "
            "are those of a prefill and a decode replica together. The single set is the uniform mask of the table "
            "with the lowest loss on the calibration text among those that take no more bytes, GSI's among them; so "
            "the rows in which the search drops the same in both stages say what the search itself lags behind.",
            _grid(
                ["prefill drops", "decode drops", "MB", "perplexity", "single set drops", "MB", "perplexity"],
                rows,
            ),
        ]
    return parts


def _equal_bytes(table: QualityTable, raw: dict[str, Any]) -> list[list[object]]:
    if table.name not in model_names():
        return []
    spec = load_model(table.name)
    pairs = [(plan, row) for plan, row in zip(table.plans, raw["plans"], strict=True) if _is_mask(plan)]
    single = [pair for pair in pairs if pair[0].prefill == pair[0].decode]
    rows: list[list[object]] = []
    for plan, row in pairs:
        if "PDTrim search" not in row["chosen_as"]:
            continue
        allowed = _both(spec, plan)
        fitting = [pair for pair in single if _both(spec, pair[0]) <= allowed]
        beside, other = min(fitting, key=lambda pair: pair[1]["nll_calibration"])
        rows.append(
            [
                len(row["plan"]["prefill_drop"]),
                len(row["plan"]["decode_drop"]),
                f"{allowed / 1e6:.1f}",
                f"{math.exp(row['nll_test_decode']):.2f}",
                len(other["plan"]["decode_drop"]),
                f"{_both(spec, beside) / 1e6:.1f}",
                f"{math.exp(other['nll_test_decode']):.2f}",
            ]
        )
    return sorted(rows, key=lambda row: (str(row[1]), str(row[0])))


def _is_mask(plan: Plan) -> bool:
    return set(plan.weight_bits) == {16} and all(keep.first_tokens is None for keep in plan.kv_keep)


def _both(spec: ModelSpec, plan: Plan) -> int:
    return weight_bytes(spec, plan, "prefill") + weight_bytes(spec, plan, "decode")


def _generation(found: Any) -> list[str]:
    title = "## Greedy decoding beside dense"
    if found is None:
        return [title, "Not measured yet: `python -m hw.score kind=generation`."]
    loss = np.array([row["loss"] for row in found["plans"]])
    share = np.array([row["share_equal"] for row in found["plans"]])
    first = np.array([row["tokens_before_parting"] for row in found["plans"]])
    bands: list[tuple[str, Callable[[Any], Any]]] = [
        ("under 0.02", lambda x: x < 0.02),
        ("0.02 to 0.1", lambda x: (x >= 0.02) & (x < 0.1)),
        ("0.1 to 0.3", lambda x: (x >= 0.1) & (x < 0.3)),
        ("0.3 to 0.7", lambda x: (x >= 0.3) & (x < 0.7)),
        ("0.7 and more", lambda x: x >= 0.7),
    ]
    rows = [
        [
            name,
            int(at.sum()),
            f"{share[at].mean():.2f}",
            f"{share[at].min():.2f} to {share[at].max():.2f}",
            f"{first[at].mean():.1f}",
        ]
        for name, inside in bands
        if (at := inside(loss)).any()
    ]
    return [
        title,
        f"{len(loss)} plans of the table, spread over losses up to four times dense; {found['prompts']} prompts of "
        f"{found['prompt_tokens']} test tokens, {found['decoded_tokens']} tokens decoded. The share of places with the "
        "same token, and the tokens before the two part. Spearman of a plan's loss and its share: "
        f"**{spearmanr(loss, share).statistic:.2f}**; of its loss and the tokens before parting: "
        f"**{spearmanr(loss, first).statistic:.2f}**.",
        _grid(["loss, nats a token", "plans", "share equal", "range", "tokens before parting"], rows),
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
