"""The kinds of ``hw.score`` that write an order of blocks or layers, one function per kind."""

from __future__ import annotations

import json
import time
from typing import Any

from torch import Tensor

from hw.score.block_numbers import block_name, random_order
from hw.score.cosine import block_cosines
from hw.score.gsi import Round, gsi, gsi_round_naive
from hw.score.job import Job
from hw.score.lis import layer_importance
from hw.score.nll import measure
from hw.score.one_shot import one_shot, single_removals
from hw.score.pdtrim import attention_mass, redundancy_order, redundancy_sets, two_stage_search
from sim.cost.plan import dense_plan
from sim.progress import progress


def score_gsi(job: Job) -> None:
    """Write RAP's greedy order; saved after every round, and continued if the file is there."""
    windows, path = job.text("calibration"), job.path("gsi")
    old = job.earlier(path, windows)
    done = [Round.from_json(value) for value in old["rounds"]] if old else []
    naive: list[dict[str, Any]] = old["naive_rounds"] if old else []
    earlier_s = old["cpu_seconds"] if old else 0.0
    if old:
        job.say(f"continuing from round {len(done)} in {path}")
    blocks = 2 * job.elastic.spec.num_layers
    wanted = min(blocks, job.cfg.gsi.removals or blocks)
    dense = measure(job.elastic, dense_plan(job.elastic.spec), windows.tokens).mean
    # A round with k candidates runs about k / 2 blocks for each, so its cost grows with k squared.
    work = [(blocks - index) ** 2 / 2 for index in range(wanted)]

    def save(rounds: list[Round]) -> None:
        last = rounds[-1]
        job.say(
            f"round {len(rounds)}/{wanted}: {block_name(last.removed)} leaves {last.nll:.4f} nats per token; "
            f"{len(last.abandoned)} of {len(last.candidates)} abandoned; {last.cpu_s:.1f} CPU s"
        )
        if job.cfg.gsi.compare_every and (len(rounds) - 1) % job.cfg.gsi.compare_every == 0:
            naive.append(_naive_round(job, windows.tokens, rounds))
            job.say(json.dumps(naive[-1]))
        result = {
            "dense_nll": dense,
            "order": [block_name(r.removed) for r in rounds],
            "nll": [r.nll for r in rounds],
            "rounds": [r.to_json() for r in rounds],
            "naive_rounds": naive,
            "earlier_cpu_seconds": earlier_s,
        }
        job.write(path, windows, "RAP (arXiv 2505.17138), Greedy Sequential Importance", result)
        report(sum(work[len(done) : len(rounds)]))

    with progress("removing", sum(work[len(done) :]), "block runs") as report:
        gsi(job.elastic, windows.tokens, done=done, removals=wanted, on_round=save)


def _naive_round(job: Job, windows: Tensor, rounds: list[Round]) -> dict[str, Any]:
    """Return the time and the choice of the naive algorithm in the last round, and those of ``gsi``."""
    started = time.process_time()
    found = gsi_round_naive(job.elastic, windows, [r.removed for r in rounds[:-1]])
    spent = time.process_time() - started
    removed = min(found, key=lambda block: (found[block], block))
    return {
        "round": len(rounds),
        "candidates": len(found),
        "naive_cpu_s": spent,
        "exact_cpu_s": rounds[-1].cpu_s,
        "naive_removes": block_name(removed),
        "exact_removes": block_name(rounds[-1].removed),
        "naive_nll": found[removed],
        "naive_nll_of_exact": found[rounds[-1].removed],
    }


def score_one_shot(job: Job) -> None:
    """Write RAP's one-shot ranking."""
    windows = job.text("calibration")
    found = single_removals(job.elastic, windows.tokens)
    order = one_shot(found)
    result = {"order": [block_name(b) for b in order], "nll": [found[b] for b in order]}
    job.write(job.path("one_shot"), windows, "RAP (arXiv 2505.17138), one-shot ranking", result)


def score_cosine(job: Job) -> None:
    """Write ShortGPT's similarity and PDTrim's pruning and distillation sets."""
    windows = job.text("calibration")
    cosines = block_cosines(job.elastic, windows.tokens)
    pruning, distillation = redundancy_sets(cosines, job.cfg.pdtrim.threshold)
    order = pruning + distillation
    result = {
        "order": [block_name(b) for b in order],
        "cosine": [cosines[b] for b in order],
        "threshold": job.cfg.pdtrim.threshold,
        "pruning_set": [block_name(b) for b in pruning],
        "distillation_set": [block_name(b) for b in distillation],
    }
    source = "ShortGPT (arXiv 2403.03853), Block Influence, of half layers; PDTrim (arXiv 2509.04467), redundancy"
    job.write(job.path("cosine"), windows, source, result)


def score_lis(job: Job) -> None:
    """Write MorphServe's order of layers."""
    windows = job.text("calibration", job.cfg.lis.tokens)
    bits = job.cfg.lis.bits
    found = layer_importance(job.elastic, windows.tokens, bits)
    result = {"bits": bits, "order": found.order, "lts": found.lts, "lrs": found.lrs, "mds": found.mds}
    result["lis"] = found.lis
    source = "MorphServe (arXiv 2506.02006), LIS = 0.25 LTS + 0.25 LRS + 0.5 MDS"
    job.write(job.path(f"lis_w{bits}"), windows, source, result)


def score_pdtrim(job: Job) -> None:
    """Write PDTrim's nested sets for prefill and decode, and its redundancy order."""
    windows = job.text("calibration", job.cfg.pdtrim.tokens)
    pool = job.order("cosine")
    searches = []
    for prefill, decode in job.cfg.pdtrim.sizes:
        found = two_stage_search(
            job.elastic,
            windows.tokens,
            pool,
            prefill_removals=prefill,
            decode_removals=decode,
            steps=job.cfg.pdtrim.steps,
            rng=job.rng,
        )
        searches.append(
            {
                "prefill": [block_name(b) for b in found.prefill],
                "decode": [block_name(b) for b in found.decode],
                "decode_nll": found.nll,
                "start_decode_nll": found.start_nll,
                "evaluations": found.evaluations,
            }
        )
        job.say(f"{prefill} in prefill, {decode} in decode: {found.start_nll:.4f} -> {found.nll:.4f} nats per token")
    order = redundancy_order(job.elastic, windows.tokens, job.cfg.pdtrim.removals)
    source = "PDTrim (arXiv 2509.04467), iterative removal and nested search; schedule and objective are ours"
    result = {"order": [block_name(b) for b in order], "steps": job.cfg.pdtrim.steps, "searches": searches}
    job.write(job.path("pdtrim"), windows, source, result)


def score_attention(job: Job) -> None:
    """Write the share of attention on the first and last tokens, and the layers ordered by it."""
    windows = job.text("calibration")
    cfg = job.cfg.attention
    shares = attention_mass(job.elastic, windows.tokens, first_tokens=cfg.first_tokens, last_tokens=cfg.last_tokens)
    result = {
        "first_tokens": cfg.first_tokens,
        "last_tokens": cfg.last_tokens,
        "threshold": cfg.threshold,
        "share": shares,
        "order": sorted(range(len(shares)), key=lambda layer: (-shares[layer], layer)),
        "local_layers": [layer for layer, share in enumerate(shares) if share >= cfg.threshold],
    }
    job.write(job.path("attention"), windows, "PDTrim (arXiv 2509.04467), token-aware cache pruning", result)


def score_random(job: Job) -> None:
    """Write random orders."""
    blocks = 2 * job.elastic.spec.num_layers
    orders = [
        [block_name(b) for b in random_order(blocks, job.cfg.seed + index)] for index in range(job.cfg.random_orders)
    ]
    job.write(job.path("random"), None, "uniform permutations, one seed after the other", {"orders": orders})
