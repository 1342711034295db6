"""MorphServe's table and its windows of 72 s (arXiv 2506.02006), simulated on an L4.

The comparisons are those of docs/results/simulation; here they run again and stand next to the paper's figures.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sim.compare import variants
from sim.config import compose_config
from sim.pages.simulation import LOADED, PAPER, PAPER_TTFT_GAIN
from sim.replay.sweep import Executor, Processes, cases_of, config_of, replay_case

EXPERIMENT = "experiment=morphserve_l4"
MODES = ("accuracy", "default", "performance")
PAPER_FEWER_MISSES = 0.9245
"""The paper's mean over modes and traces."""


def _summaries(overrides: Sequence[str], workers: int) -> dict[str, list[Mapping[str, Any]]]:
    """Return label -> summaries over the windows of a comparison."""
    cfg = compose_config("compare", [EXPERIMENT, *overrides])
    jobs = [(label, config_of(one, case)) for label, one in variants(cfg).items() for case in cases_of(cfg)]
    executor: Executor = Processes(workers)
    outcomes = executor(replay_case, [one for _, one in jobs])
    found: dict[str, list[Mapping[str, Any]]] = {}
    for (label, _), outcome in zip(jobs, outcomes, strict=True):
        found.setdefault(label, []).append(outcome.summary)
    return found


def _mean(summaries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        "p95_s": statistics.fmean(summary["ttft_s"]["p95"] for summary in summaries),
        "missed": 1.0 - statistics.fmean(summary["slo_attainment"] for summary in summaries),
        "perplexity_ratio": statistics.fmean(summary["perplexity_ratio"] for summary in summaries),
    }


def table_row(workers: int) -> dict[str, Any]:
    """Return the paper's table of Llama-3-8B next to the simulation at a load at which FP16 misses some."""
    found = _summaries(["model=llama3_8b", *LOADED.split()], workers)
    rows = []
    for label, summaries in found.items():
        mean, paper = _mean(summaries), PAPER.get(label, (None, None))
        rows.append(
            {
                "policy": label,
                "TTFT P95, s, paper": paper[0],
                "here": mean["p95_s"],
                "SLO missed, paper": paper[1],
                "missed here": mean["missed"],
            }
        )
    return {"rows": rows, "windows": len(next(iter(found.values())))}


def windows_row(workers: int) -> dict[str, Any]:
    """Return what each mode gains over FP16 in windows of 72 s of the Azure trace, next to the paper's ranges."""
    found = {label: _mean(summaries) for label, summaries in _summaries([], workers).items()}
    fp16 = found["fp16"]
    rows = [
        {
            "mode": mode,
            "TTFT P95 gain, paper": paper.removesuffix("x"),
            "here": fp16["p95_s"] / found[f"morphserve {mode}"]["p95_s"],
            "fewer misses here": 1.0 - found[f"morphserve {mode}"]["missed"] / fp16["missed"],
            "perplexity here": found[f"morphserve {mode}"]["perplexity_ratio"] - 1.0,
        }
        for mode, paper in zip(MODES, PAPER_TTFT_GAIN, strict=True)
    ]
    return {"rows": rows, "fp16_missed": fp16["missed"], "paper_fewer_misses": PAPER_FEWER_MISSES}
