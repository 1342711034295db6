"""Figures of a served window or cluster that all serving evaluations report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from agents.envs.serve import Served, ServeSetting
from sim.results.metrics import met_slo
from sim.results.records import Status


def serving_figures(setting: ServeSetting, served: Served, requests: int) -> dict[str, Any]:
    """Return the figures of what has served all its requests.

    Args:
        setting: what was served. served: an engine, cluster or system. requests: number of requests that arrived.
    Returns:
        Utility, SLO attainment and the rejected share in [0, 1]; goodput in requests per second; P95 TTFT of finished
        requests in seconds; loss in nats per token more than dense, mean over finished requests.
    """
    records = served.records()
    met, finished = met_slo(records, setting.slo), records.status == Status.FINISHED
    loss = records.quality_nll[finished] - setting.dense_nll
    ttft_s = np.where(np.isfinite(records.ttft_s), records.ttft_s, np.inf)
    return {
        "requests": requests,
        "utility": setting.earned(served, requests),
        "slo_attainment": float(met.mean()) if len(met) else 1.0,
        "goodput_rps": float(met.sum()) / setting.windows.window_s,
        "ttft_p95_s": float(np.quantile(ttft_s[finished], 0.95)) if finished.any() else math.nan,
        "rejected_share": float((records.status == Status.REJECTED).mean()) if len(met) else 0.0,
        "loss": float(np.maximum(loss, 0.0).mean()) if len(loss) else 0.0,
    }


def best_in_hindsight(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures with the highest utility; the first of equal ones."""
    return max(rows, key=lambda figures: float(figures["utility"]))
