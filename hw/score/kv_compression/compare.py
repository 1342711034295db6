"""The kind ``kv_compression`` of ``hw.score``: the loss after a prompt whose KV was compressed once, at equal bytes.

Each window of the test text is a prompt and its continuation. The prompt is computed in full; its KV is compressed by
each variant, and the continuation is scored on what is left. All variants see the same windows, so a variant's loss is
the mean difference from full KV, with the standard error of the windows' differences. Nothing is fitted to the test
text: ReFreeKV's thresholds for each factor come from prompts of the calibration text, whose losses are in the file too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from hw.elastic.kv_compression import refree_kv
from hw.elastic.model import ElasticModel
from hw.elastic.processor import processor_name
from hw.score.figures import Figures
from hw.score.job import Job
from hw.score.kv_compression.continuation import continuation_nll, read_prompt
from hw.score.kv_compression.page import page, plot
from hw.score.kv_compression.variants import FULL, Variant, compressed, variants
from sim.errors import ConfigError
from sim.progress import progress

FIGURES = Figures(kind="kv_compression", folder="kv_compression", page=page, plot=plot)
"""``sim.cost.kv_compression_loss`` reads the losses in it."""


def score_kv_compression(job: Job) -> None:
    """Measure all variants, and write their figures, page and picture.

    Raises:
        ConfigError: for prompts that are too short for a method, or nothing to score.
    """
    cfg, elastic = job.cfg.compression, job.elastic
    prompt_tokens, scored_tokens = int(cfg.prompt_tokens), int(cfg.scored_tokens)
    factors = [float(factor) for factor in cfg.factors]
    observed = max(int(cfg.ada_queries), int(cfg.think_queries))
    _check(prompt_tokens, scored_tokens, factors, int(cfg.ada_queries), observed)
    length = prompt_tokens + scored_tokens
    texts = {
        "calibration": job.text("calibration", cfg.calibration_windows * length, length),
        "test": job.text("test", cfg.windows * length, length),
    }
    mha_order = [block // 2 for block in job.order("one_shot") if block % 2 == 0]
    curves: list[torch.Tensor] = []
    with progress("reading calibration prompts", len(texts["calibration"].tokens), "prompts") as report:
        for number, window in enumerate(texts["calibration"].tokens, start=1):
            prompt = read_prompt(elastic, window[:prompt_tokens], 1)
            curves += [refree_kv.curve(layer) for layer in prompt.layers]
            report(number)
    compared = variants(
        elastic,
        factors,
        thresholds={factor: refree_kv.threshold_for(curves, factor) for factor in factors},
        mha_order=mha_order,
        ada_queries=cfg.ada_queries,
        think_queries=cfg.think_queries,
        prompt_tokens=prompt_tokens,
    )
    chosen = [FULL, *compared]
    rows: list[dict[str, Any]] = [
        {"method": one.method, "factor": one.factor, "setting": one.setting, "nll": {}, "share": {}} for one in chosen
    ]
    for name, text in texts.items():
        found = _measured(elastic, chosen, text.tokens, prompt_tokens, observed)
        for row, (nll, share) in zip(rows, found, strict=True):
            row["nll"][name], row["share"][name] = nll, share
    result: dict[str, Any] = {
        "processor": processor_name(elastic.device),
        "calibration_text": texts["calibration"].source,
        "test_seed": job.cfg.test.seed,
        "prompt_tokens": prompt_tokens,
        "scored_tokens": scored_tokens,
        "factors": factors,
        "ada_queries": int(cfg.ada_queries),
        "think_queries": int(cfg.think_queries),
        "variants": rows,
    }
    path = FIGURES.path(job.cfg.out, job.name)
    source = "NLL of the tokens after a prompt, in nats a token, for each window; share of the bytes of the prompt's KV"
    job.write(path, texts["test"], source, result)
    FIGURES.write_page(job.cfg.out, job.name)


def _check(prompt: int, scored: int, factors: list[float], ada_queries: int, observed: int) -> None:
    """Check that every method can be measured.

    Raises:
        ConfigError: if not.
    """
    if not factors or sorted(set(factors), reverse=True) != factors or not 0 < factors[-1] <= factors[0] < 1:
        raise ConfigError(f"compression.factors is {factors}; list shares between 0 and 1 in descending order")
    least = max(observed + 1, refree_kv.FIRST + 1, math.ceil(ada_queries / factors[-1]))
    if prompt < least or scored < 1:
        raise ConfigError(
            f"compression.prompt_tokens is {prompt} and scored_tokens {scored}; with {observed} observed queries and a "
            f"lowest factor of {factors[-1]:g}, a prompt needs at least {least} tokens, and at least 1 must be scored: "
            "lower compression.ada_queries, or take longer prompts"
        )


def _measured(
    elastic: ElasticModel, chosen: Sequence[Variant], windows: torch.Tensor, prompt_tokens: int, observed: int
) -> list[tuple[list[float], list[float]]]:
    """Return the mean NLL and the share of the bytes of each variant on each window."""
    found: list[tuple[list[float], list[float]]] = [([], []) for _ in chosen]
    with progress("measuring", len(windows) * len(chosen), "continuations") as report:
        for at, window in enumerate(windows):
            prompt = read_prompt(elastic, window[:prompt_tokens], observed)
            for number, (variant, (losses, shares)) in enumerate(zip(chosen, found, strict=True), start=1):
                stored, share = compressed(variant, prompt.layers)
                losses.append(float(continuation_nll(elastic, prompt, window, stored).double().mean()))
                shares.append(share)
                report(at * len(chosen) + number)
    return found
