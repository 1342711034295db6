"""Clusters too large for one process: cells, which are independent clusters with a share of the requests each.

Large deployments are divided so: a front deals requests to cells in a fixed way, and each cell has its own router,
outages and autoscaler. No cell depends on another, so that they run in processes or on a Ray cluster, in any order,
with equal results. Each writes its own records, and of these only one cell's are in the memory of a process at a
time.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from sim.cost.front_end import FrontEnd
from sim.errors import ConfigError, nearest
from sim.limits import MOST_CELLS, check_count
from sim.results.histogram import Histogram
from sim.results.metrics import Slo, as_clients_see, met_slo
from sim.results.report import CLIENT_DISTRIBUTIONS, COUNTS, DISTRIBUTIONS

if TYPE_CHECKING:
    from sim.cluster.cluster import Cluster
    from sim.results.records import TokenGaps

RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
CELL_SEEDS = 100_000_000
"""Between the seeds of two cells; those of a cell's replicas are 1,000 apart."""
REQUESTS = ("share", "own")
SUMMED = (
    *COUNTS,
    "moved",
    "moves",
    "moved_with_kv",
    "migrated_bytes",
    "never_routed",
    "budget_violation_s",
    "replica_hours",
    "cpu_s",
)
"""Figures of a cluster that add up over cells."""
TIMES = (*DISTRIBUTIONS, *CLIENT_DISTRIBUTIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class CellJob:
    """One cell to serve. folder: where its records go; None writes none."""

    cfg: DictConfig
    cell: int
    folder: Path | None = None


@dataclass(slots=True, kw_only=True)
class CellResult:
    """What is kept of a cell, or of several together.

    figures: those of ``SUMMED``. times: name -> distribution over requests, ``itl_s`` over tokens.
    met, produced_tokens, cached_tokens, admitted_prompt_tokens: sums over requests. first_s, last_s: of arrivals.
    end_s: of the replay. kept_share, nll: sum over the requests that have one, and their number.
    nll_unknown: requests with a token whose loss is unknown. recomputed_tokens, kv_peak_share, extrapolated: None
    without iterations; the last is their number. attainment: of each cell. peak_bytes: the most memory that the process
    held until then. replicas: rows of ``replicas.parquet``.
    """

    figures: dict[str, Any]
    times: dict[str, Histogram]
    met: int
    produced_tokens: int
    cached_tokens: int
    admitted_prompt_tokens: int
    first_s: float
    last_s: float
    end_s: float
    kept_share: tuple[float, int]
    nll: tuple[float, int]
    nll_unknown: int
    recomputed_tokens: int | None
    kv_peak_share: float | None
    extrapolated: int | None
    attainment: list[float | None]
    peak_bytes: int
    replicas: list[dict[str, Any]] = field(default_factory=list)


def check_cells(cfg: DictConfig) -> None:
    """Check the keys of cells.

    Raises:
        ConfigError: for a number below 1, an unknown way to deal requests, cells that would all serve the same
            requests, and for a figure or a maximum rate, which are those of one cluster.
    """
    if cfg.cells < 1:
        raise ConfigError(f"cells is {cfg.cells}; it must be at least 1")
    check_count(cfg.cells, "cells", MOST_CELLS, "lower cells")
    if cfg.cell_requests not in REQUESTS:
        raise ConfigError(f"unknown cell_requests={cfg.cell_requests}; {nearest(cfg.cell_requests, REQUESTS)}")
    if cfg.cells == 1:
        return
    if cfg.plot:
        raise ConfigError(f"plot=true draws the replicas of one cluster, but cells is {cfg.cells}; set plot=false")
    if cfg.max_rate:
        raise ConfigError(
            f"max_rate=true measures the maximum rate of one cluster, but cells is {cfg.cells}; leave it out, or set "
            "cells=1"
        )
    if cfg.cell_requests == "own" and _seed_of(cell_config(cfg, 0)) == _seed_of(cell_config(cfg, 1)):
        raise ConfigError(
            "cell_requests=own draws the requests of each cell by its own seed, but this trace has none (or a fixed "
            "one), so that all cells would serve the same; set cell_requests=share, or a trace with seed: ${seed}"
        )


def _seed_of(cfg: DictConfig) -> Any:
    return cfg.trace.get("seed")


def cell_config(cfg: DictConfig, cell: int) -> DictConfig:
    """Return the configuration of a cell, whose seed is its own."""
    one = cfg.copy()
    one.seed = int(cfg.seed) + CELL_SEEDS * cell
    return one


def result_of(cluster: Cluster, summary: dict[str, Any], gaps: TokenGaps, slo: Slo, front_end: FrontEnd) -> CellResult:
    """Return what is kept of a cell that has served.

    Args:
        summary: of ``cluster_figures``. gaps: between the tokens of all its engines.
    """
    records = cluster.records()
    seen = as_clients_see(records, front_end)
    admitted = np.isfinite(records.admitted_s)
    share = records.kept_params_share[np.isfinite(records.kept_params_share)]
    nll = records.quality_nll[records.produced_tokens > 0]
    known = nll[np.isfinite(nll)]
    extrapolated = summary["extrapolated_share"]
    return CellResult(
        figures={name: summary[name] for name in SUMMED},
        times={
            "ttft_s": Histogram.of(records.ttft_s),
            "tpot_s": Histogram.of(records.tpot_s),
            "itl_s": Histogram.of(gaps.itl_s, gaps.count),
            "e2e_s": Histogram.of(records.e2e_s),
            "client_ttft_s": Histogram.of(seen.ttft_s),
            "client_e2e_s": Histogram.of(seen.e2e_s),
        },
        met=int(met_slo(records, slo, front_end).sum()),
        produced_tokens=int(records.produced_tokens.sum()),
        cached_tokens=int(records.cached_tokens.sum()),
        admitted_prompt_tokens=int(records.prompt_tokens[admitted].sum()),
        first_s=float(records.arrival_s[0]),
        last_s=float(records.arrival_s[-1]),
        end_s=float(cluster.end_s),
        kept_share=(float(share.sum()), len(share)),
        nll=(float(known.sum()), len(known)),
        nll_unknown=len(nll) - len(known),
        recomputed_tokens=summary["recomputed_tokens"],
        kv_peak_share=summary["kv_peak_share"],
        extrapolated=None if extrapolated is None else round(extrapolated * summary["iterations"]),
        attainment=[summary["slo_attainment"]],
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES,
        replicas=summary["replicas"],
    )


def merged(parts: Sequence[CellResult]) -> CellResult:
    """Return the cells together, added up in their order."""
    times = {name: Histogram() for name in TIMES}
    for part in parts:
        for name in TIMES:
            times[name].add(part.times[name])

    def total(name: str) -> Any:
        return sum(getattr(part, name) for part in parts)

    def known(name: str, put_together: Callable[[list[Any]], Any]) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if any(value is None for value in values) else put_together(values)

    return CellResult(
        figures={name: sum(part.figures[name] for part in parts) for name in SUMMED},
        times=times,
        met=total("met"),
        produced_tokens=total("produced_tokens"),
        cached_tokens=total("cached_tokens"),
        admitted_prompt_tokens=total("admitted_prompt_tokens"),
        first_s=min(part.first_s for part in parts),
        last_s=max(part.last_s for part in parts),
        end_s=max(part.end_s for part in parts),
        kept_share=(sum(part.kept_share[0] for part in parts), sum(part.kept_share[1] for part in parts)),
        nll=(sum(part.nll[0] for part in parts), sum(part.nll[1] for part in parts)),
        nll_unknown=total("nll_unknown"),
        recomputed_tokens=known("recomputed_tokens", sum),
        kv_peak_share=known("kv_peak_share", max),
        extrapolated=known("extrapolated", sum),
        attainment=[one for part in parts for one in part.attainment],
        peak_bytes=max(part.peak_bytes for part in parts),
        replicas=[{"cell": cell, **row} for cell, part in enumerate(parts) for row in part.replicas],
    )


def cells_summary(whole: CellResult) -> dict[str, Any]:
    """Return the figures of several cells together, with the keys of ``cluster_figures`` but for ``replicas``.

    Percentiles are those of narrow bins (``sim.results.histogram``), off by at most 0.05 %; all else is exact.
    ``cell_attainment``: lowest, median and highest SLO attainment of a cell. ``peak_process_bytes``: the most memory
    that a process held.
    """
    figures = whole.figures
    makespan_s, arrivals_s = whole.end_s - whole.first_s, whole.last_s - whole.first_s
    iterations, attainment = figures["iterations"], [one for one in whole.attainment if one is not None]
    return {
        **figures,
        **{name: values.distribution() for name, values in whole.times.items()},
        "makespan_s": makespan_s,
        "slo_attainment": _ratio(whole.met, figures["requests"]),
        "goodput_rps": _ratio(whole.met, makespan_s),
        "request_rate_rps": _ratio(figures["requests"] - 1, arrivals_s),
        "max_rate_rps": None,
        "utilization": None,
        "output_tokens_per_s": _ratio(whole.produced_tokens, makespan_s),
        "kept_params_share": _ratio(*whole.kept_share),
        "quality_nll": None if whole.nll_unknown else _ratio(*whole.nll),
        "recomputed_tokens": whole.recomputed_tokens,
        "cached_share": _ratio(whole.cached_tokens, whole.admitted_prompt_tokens),
        "kv_peak_share": whole.kv_peak_share,
        "extrapolated_share": None if whole.extrapolated is None else _ratio(whole.extrapolated, iterations),
        "requests_per_cpu_s": _ratio(figures["requests"], figures["cpu_s"]),
        "cells": len(whole.attainment),
        "peak_process_bytes": whole.peak_bytes,
        "cell_attainment": [float(np.quantile(attainment, q)) for q in (0.0, 0.5, 1.0)] if attainment else None,
    }


def _ratio(number: float, of: float) -> float | None:
    return number / of if of > 0 else None
