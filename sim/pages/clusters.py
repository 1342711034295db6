"""``python -m sim.cluster_results``: write docs/results/clusters/index.md from its JSON files.

With ``measure=true``, repeat all or the comparisons of ``only`` first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sim.cluster.run import CACHE_COLUMNS, CLUSTER_COLUMNS, MIGRATION_COLUMNS
from sim.config import run_command
from sim.disaggregate.run import CHANGE_COLUMNS, STAGED_COLUMNS
from sim.pages.comparison import COUNTS, Comparison, means, read, shown, wins, write_page
from sim.pages.render import commit_of, render, show, table
from sim.paths import RESULTS
from sim.results.report import Columns

FOLDER = RESULTS / "clusters"
TEMPLATE = Path(__file__).parent / "templates" / "clusters.md.j2"
KEEP = (
    *COUNTS,
    "moves",
    "moved_with_kv",
    "migrated_bytes",
    "plan",
    "reduction_at_mean_prompt",
    "quality_outside_share",
)


def _experiment(program: str, name: str, columns: Columns) -> Comparison:
    return Comparison(command=f"{program} experiment={name}", columns=columns, keep=KEEP)


FAILURE_COLUMNS = {
    name: column
    for name, column in CHANGE_COLUMNS.items()
    if not name.startswith(("KV reduction", "perplexity", "link"))
}

COMPARISONS = {
    "cluster_scale": _experiment("sim.cluster", "cluster_scale", CLUSTER_COLUMNS),
    "cluster_cells": Comparison(
        command="sim.cluster experiment=cluster_cells",
        columns=CLUSTER_COLUMNS,
        keep=(*COUNTS, "cells", "cell_attainment", "wall_s", "cpu_s", "peak_process_bytes", "iterations"),
    ),
    "prefix_caching": _experiment("sim.cluster", "prefix_caching", CACHE_COLUMNS),
    "chat_affinity": _experiment("sim.cluster", "chat_affinity", CACHE_COLUMNS),
    "spot_preemption": _experiment("sim.cluster", "spot_preemption", MIGRATION_COLUMNS),
    "pd_disaggregation": _experiment("sim.disaggregate", "pd_disaggregation", STAGED_COLUMNS),
    "pd_failures": _experiment("sim.disaggregate", "pd_failures", FAILURE_COLUMNS),
    "pdtrim_transfer": _experiment("sim.disaggregate", "pdtrim_transfer", STAGED_COLUMNS),
}
"""Name of a JSON file in docs/results/clusters: how it is made."""

Means = Mapping[str, Mapping[str, float]]


def page(folder: Path = FOLDER) -> str:
    """Return the page, in Markdown.

    Raises:
        ConfigError: if a result is missing, with the command that makes it.
    """
    found = {name: read(folder, name, "sim.cluster_results") for name in COMPARISONS}
    mean = {name: means(content) for name, content in found.items()}
    results = {name: shown(found[name], COMPARISONS[name].columns, "variant") | {"title": ""} for name in COMPARISONS}
    scale, caching, staged = mean["cluster_scale"], mean["prefix_caching"], mean["pd_disaggregation"]
    pdtrim = mean["pdtrim_transfer"]
    summaries = found["spot_preemption"]["summaries"].values()
    return render(
        TEMPLATE,
        results=results,
        mean=mean,
        fastest={
            kind: _best({k: v for k, v in scale.items() if k.startswith(kind) and "autoscaled" not in k}, "ttft_s.p95")
            for kind in ("mixed", "12 A100")
        },
        most_attained={
            trace: _best({k: v for k, v in caching.items() if k.startswith(trace) and "room" not in k})
            for trace in ("conversation", "synthetic")
        },
        spot={
            key: sum(row[key] for several in summaries for row in several) for key in ("requests", "finished", "moves")
        },
        moved_wins=wins(found["spot_preemption"], "with notice, KV moved", "with notice"),
        cells=found["cluster_cells"]["summaries"]["run"][0],
        cells_table=_cells_table(found["cluster_cells"]["summaries"]["run"][0]),
        cells_made_by=found["cluster_cells"]["provenance"],
        cells_commit=commit_of(found["cluster_cells"]["provenance"]),
        best_ratio=_best({label: row for label, row in staged.items() if label.endswith("100 Gbit/s")}),
        targets={target: _by_latency(pdtrim, target) for target in ("quality", "bytes")},
        claims=pdtrim_claims(pdtrim),
        bounds=[label for label, row in pdtrim.items() if is_bound(row)],
        formula_error=max(abs(r["transfer_reduction"] / r["reduction_at_mean_prompt"] - 1.0) for r in pdtrim.values()),
        plans=table(
            [{"variant": k, "plan": row[0]["plan"]} for k, row in found["pdtrim_transfer"]["summaries"].items()], left=2
        ),
        verdict=verdict,
    )


def _cells_table(summary: Mapping[str, Any]) -> str:
    """Return the figures of a run in cells."""
    row = {
        "requests": summary["requests"],
        "SLO attainment": summary["slo_attainment"],
        "lowest of a cell": summary["cell_attainment"][0],
        "highest": summary["cell_attainment"][2],
        "TTFT P95 (s)": summary["ttft_s"]["p95"],
        "TPOT P95 (ms)": 1e3 * summary["tpot_s"]["p95"],
        "preemptions": summary["preemptions"],
        "wall time (min)": summary["wall_s"] / 60,
        "largest process (GB)": summary["peak_process_bytes"] / 1e9,
    }
    specs = dict.fromkeys(("requests", "preemptions"), ",.0f")
    specs |= dict.fromkeys(("SLO attainment", "lowest of a cell", "highest"), ".1%")
    specs |= dict.fromkeys(("TTFT P95 (s)", "largest process (GB)"), ".2f")
    return table([row], specs | dict.fromkeys(("TPOT P95 (ms)", "wall time (min)"), ".0f"), 0)


def _best(rows: Means, key: str = "slo_attainment") -> str:
    """Return the label with the highest SLO attainment, or with the lowest of another figure."""
    pick = max if key == "slo_attainment" else min
    return pick(rows, key=lambda label: rows[label][key])


def _by_latency(rows: Means, target: str) -> str:
    """Return the variants of one target, from the shortest mean E2E to the longest."""
    mine = {label.removesuffix(f", {target}"): row for label, row in rows.items() if label.endswith(f", {target}")}
    lines = [
        {
            "variant": label,
            "E2E mean (s)": row["e2e_s.mean"],
            "KV reduction": f"{row['transfer_reduction']:.2f}x",
            "perplexity / dense": ("≤ " if is_bound(row) else "") + show(row["perplexity_ratio"], ".2f"),
        }
        for label, row in sorted(mine.items(), key=lambda item: item[1]["e2e_s.mean"])
    ]
    return table(lines, {"E2E mean (s)": ".2f"})


def is_bound(row: Mapping[str, float]) -> bool:
    """Return whether the perplexity of a row is an upper bound: its plan lies beyond what the quality was fitted on."""
    return row.get("quality_outside_share", 0.0) > 0.0


def verdict(ours: float, theirs: float) -> str:
    """Return whether the first is smaller; a difference of less than 2 % counts as none."""
    return "no difference" if abs(ours / theirs - 1.0) < 0.02 else "yes" if ours < theirs else "no"


def pdtrim_claims(rows: Means) -> dict[str, str]:
    """Return the verdict on each claim about PDTrim; the template words the claims."""

    e2e, cost = "e2e_s.mean", "perplexity_ratio"

    def smaller(key: str, ours: str, *theirs: str) -> str:
        least = min(theirs, key=lambda label: rows[label][key])
        if key == cost and is_bound(rows[ours]) and is_bound(rows[least]):
            return "unknown"  # two upper bounds say nothing on which plan loses more
        return verdict(rows[ours][key], rows[least][key])

    sent = {label: 1.0 / row["transfer_reduction"] for label, row in rows.items()}
    return {
        "kv_sends_less": verdict(sent["PDTrim KV, quality"], sent["PDTrim blocks, quality"]),
        "kv_costs_less": smaller(cost, "PDTrim KV, bytes", "PDTrim blocks, bytes"),
        "nested_costs_less": smaller(cost, "PDTrim blocks, bytes", "unified, bytes"),
        "searched_is_faster": smaller(e2e, "PDTrim searched, 1.5", "PDTrim blocks, 1.5"),
        "both_is_faster": smaller(e2e, "PDTrim both, quality", "PDTrim KV, quality", "PDTrim blocks, quality"),
        "chosen_is_faster": smaller(e2e, "PDTrim KV, quality", "windows, quality"),
        "chosen_costs_less": smaller(cost, "PDTrim KV, bytes", "windows, bytes"),
    }


def _write(cfg: DictConfig) -> None:
    write_page(cfg, COMPARISONS, FOLDER, page)


def main() -> None:
    """Run ``python -m sim.cluster_results``."""
    run_command(_write, "cluster_results")
