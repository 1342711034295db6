"""The kinds of ``hw.score`` that measure the losses of plans, one function per kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hw.elastic.text import differing
from hw.score.block_numbers import block_number, plan_without
from hw.score.fit import read_table, write_fits
from hw.score.full_test import agreement, chosen_plans, greedy_tokens, measure_chosen, spread
from hw.score.job import SCORES, Job
from hw.score.nll import measure
from hw.score.quality_table import measure_table, read_orders, read_searches
from hw.score.report import SIZES
from sim.cost.plan import dense_plan
from sim.cost.plan_json import plan_to_json
from sim.cost.quality import QUALITIES
from sim.errors import ConfigError
from sim.json_file import read_json_object
from sim.progress import progress


def score_table(job: Job) -> None:
    """Measure the quality table, saved every few plans and continued if the file exists; then fit it."""
    path = Path(job.cfg.out) if job.cfg.out else QUALITIES / f"{job.name}.json"
    calibration, test = job.text("calibration"), job.text("test")
    described = {**job.described(calibration), "test_text": test.source}
    measure_table(job.elastic, calibration.tokens, test.tokens, path, described, SCORES, seed=job.cfg.seed, say=job.say)
    job.say(f"wrote {write_fits(path)}")


def score_full_test(job: Job) -> None:
    """Measure about a dozen plans on the full test text, saved after each and continued if the file exists."""
    windows, path = job.text("test"), job.path("full_test")
    old = job.earlier(path, windows)
    plans = chosen_plans(job.elastic.spec, *read_orders(SCORES, job.name), read_searches(SCORES, job.name))
    plans = plans[: job.cfg.full_plans]

    def save(rows: list[dict[str, Any]]) -> None:
        row = rows[-1]
        job.say(f"{len(rows)} of {len(plans)}: {row['name']}, perplexity {np.exp(row['nll']):.3f}, {row['cpu_s']} s")
        job.write(path, windows, "perplexity of all but a window's first token", {"plans": rows})

    measure_chosen(job.elastic, windows.tokens, plans, old["plans"] if old else [], save)


def score_samples(job: Job) -> None:
    """Measure on test text the orders that other calibration samples gave; equal sets of blocks are measured once.

    Raises:
        ConfigError: if there are no such orders.
    """
    windows = job.text("test")
    path, spec = job.path("samples"), job.elastic.spec
    described = job.described(windows)
    old = read_json_object(path, ConfigError, "remove the file, or set out=") if path.is_file() else {}
    different, unstated = differing(described, old)
    same = not different and not unstated  # what was measured on unstated tokens is measured again
    known = {json.dumps(sorted(r["drop"])): r for r in old.get("rows", [])} if same else {}
    rows: list[dict[str, Any]] = []
    files = [file for kind in ("gsi", "one_shot") for file in sorted(SCORES.glob(f"{job.name}_{kind}_*_seed*.json"))]
    if not files:
        raise ConfigError(
            f"no orders of other calibration samples of {job.name} in conf/score; make some: "
            "python -m hw.score kind=gsi,one_shot calibration.tokens=256 calibration.seed=0,1,2 --multirun"
        )
    scores = {file: read_json_object(file, ConfigError, "measure it again") for file in files}
    wanted = [(file, size) for file in files for size in SIZES if size <= len(scores[file]["order"])]
    with progress("measuring", len(wanted), "sets of blocks") as report:
        for file, size in wanted:
            score = scores[file]
            drop = score["order"][:size]
            row = known.get(json.dumps(sorted(drop)))
            if row is None:
                plan = plan_without(spec, [block_number(b) for b in drop])
                row = {"drop": drop, "nll": measure(job.elastic, plan, windows.tokens).mean}
                known[json.dumps(sorted(drop))] = row
            kind = "gsi" if "_gsi" in file.stem else "one_shot"
            sample = f"{score['text']['tokens']} tokens {score['text']['windows']}"
            rows.append({"order": kind, "sample": sample, "removals": size, "drop": drop, "nll": row["nll"]})
            job.say(f"{file.stem}, {size} removals: perplexity {np.exp(row['nll']):.2f}")
            job.write(path, windows, "the same sizes of orders from several calibration samples", {"rows": rows})
            report(len(rows))


def score_generation(job: Job) -> None:
    """Compare greedy decoding of plans of the quality table with that of the dense model."""
    cfg = job.cfg.generation
    table = read_table(QUALITIES / f"{job.name}.json")
    windows = job.text("test")
    prompts = windows.tokens[:, : cfg.prompt_tokens]
    dense = greedy_tokens(job.elastic, dense_plan(job.elastic.spec), prompts, cfg.tokens)
    rows: list[dict[str, Any]] = []
    chosen = spread(table.loss.tolist(), cfg.plans, float(np.log(cfg.times_dense)))
    with progress("decoding", len(chosen), "plans") as report:
        for index in chosen:
            plan = table.plans[index]
            found = agreement(dense, greedy_tokens(job.elastic, plan, prompts, cfg.tokens))
            rows.append(
                {
                    "plan": plan_to_json(plan),
                    "chosen_as": list(table.kinds[index]),
                    "loss": float(table.loss[index]),
                    "share_equal": found.share,
                    "tokens_before_parting": found.first,
                }
            )
            job.say(f"{len(rows)} of {len(chosen)}: loss {rows[-1]['loss']:.3f}, {found.share:.2f} of tokens equal")
            report(len(rows))
    result = {"prompt_tokens": cfg.prompt_tokens, "decoded_tokens": cfg.tokens, "prompts": len(prompts), "plans": rows}
    job.write(job.path("generation"), windows, "greedy decoding compared with dense, position by position", result)


def score_perplexity(job: Job) -> None:
    """Measure the perplexity of the dense model on the test text."""
    windows = job.text("test")
    found = measure(job.elastic, dense_plan(job.elastic.spec), windows.tokens)
    result = {"nll": found.mean, "perplexity": float(np.exp(found.mean)), "predicted_tokens": found.tokens}
    job.write(job.path("perplexity"), windows, "perplexity of the dense model; all but a window's first token", result)
    job.say(f"perplexity {result['perplexity']:.3f}")
