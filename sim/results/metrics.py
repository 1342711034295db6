"""Figures from records: TTFT, TPOT, ITL, goodput, SLO attainment; and the tables of a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from sim.cost.front_end import NO_FRONT_END, FrontEnd
from sim.errors import ConfigError, nearest
from sim.results.records import Iterations, Records, Status, TokenGaps, Transitions
from sim.types import Floats

if TYPE_CHECKING:
    import pandas as pd  # imported where a table is made: it takes half of a short command's start

Side = Literal["engine", "client"]
R = TypeVar("R", bound=Records)

QUANTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Service-level objective: the targets that a request must meet; None for no target.

    ttft_s: most seconds to the first token. tpot_s: most seconds per output token.
    e2e_s: most seconds to the last token.
    side: whose TTFT and E2E are judged: those of the ``engine``, from its queue on, or those of the ``client``, with
        the front end (group ``frontend``). Without a front end both are equal.
    """

    ttft_s: float | None = 2.0
    tpot_s: float | None = None
    e2e_s: float | None = None
    side: Side = "engine"

    def __post_init__(self) -> None:
        if self.side not in get_args(Side):
            raise ConfigError(f"slo.side is {self.side!r}; {nearest(self.side, get_args(Side))}")
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"slo.{name} is {value}; it must be above 0 seconds, or null for no target")


def as_clients_see(records: R, front_end: FrontEnd) -> R:
    """Return the records of an engine with the times that clients see: from the sending, to the arrival of pieces."""
    if front_end.absent:
        return records
    return replace(
        records,
        arrival_s=records.arrival_s - front_end.way_in_s(records.prompt_tokens),
        first_token_s=records.first_token_s + front_end.back_s,
        finish_s=records.finish_s + front_end.back_s,
    )


def met_slo(records: Records, slo: Slo, front_end: FrontEnd = NO_FRONT_END) -> NDArray[np.bool_]:
    """Return bool[n]: which requests finished and met every target. A rejected or unfinished request misses."""
    met = np.ones(len(records), dtype=np.bool_)
    for missed in missed_targets(records, slo, front_end).values():
        met &= ~missed
    return met


def missed_targets(records: Records, slo: Slo, front_end: FrontEnd = NO_FRONT_END) -> dict[str, NDArray[np.bool_]]:
    """Return target -> bool[n]: which requests missed it; ``finished`` for those rejected or unfinished."""
    if slo.side == "client":
        records = as_clients_see(records, front_end)
    found = {"finished": np.asarray(records.status != Status.FINISHED, dtype=np.bool_)}
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        if (target := getattr(slo, name)) is not None:
            # A request of one token has no TPOT and cannot miss it: NaN compares as met.
            found[name] = np.asarray(getattr(records, name) > target, dtype=np.bool_)
    return found


def behind_pace(records: Records, tpot_s: float, now_s: float) -> NDArray[np.bool_]:
    """Return bool[n]: which requests took longer than ``tpot_s`` for each token so far, from the first token on.

    A request that has not finished counts until ``now_s``. One without a first token is not behind.
    """
    last_s = np.where(np.isfinite(records.finish_s), records.finish_s, now_s)
    return np.asarray(last_s - records.first_token_s > tpot_s * np.maximum(records.produced_tokens - 1, 1))


def records_frame(records: Records, slo: Slo, front_end: FrontEnd = NO_FRONT_END) -> pd.DataFrame:
    """Return the table of ``records.parquet``: one row per request, in order of arrival in the engine's queue.

    With a front end it has ``client_ttft_s`` and ``client_e2e_s`` in addition.
    """
    import pandas as pd

    names = {int(status): status.name.lower() for status in Status}
    frame = pd.DataFrame(
        {
            "request_id": np.arange(len(records), dtype=np.int64),
            "arrival_s": records.arrival_s,
            "prompt_tokens": records.prompt_tokens,
            "output_tokens": records.output_tokens,
            "produced_tokens": records.produced_tokens,
            "admitted_s": records.admitted_s,
            "first_token_s": records.first_token_s,
            "finish_s": records.finish_s,
            "ttft_s": records.ttft_s,
            "tpot_s": records.tpot_s,
            "e2e_s": records.e2e_s,
            "preemptions": records.preemptions,
            "status": pd.Categorical([names[int(s)] for s in records.status], categories=list(names.values())),
            "met_slo": met_slo(records, slo, front_end),
            "kept_params_share": records.kept_params_share,
            "quality_nll": records.quality_nll,
            "cached_tokens": records.cached_tokens,
        }
    )
    if not front_end.absent:
        seen = as_clients_see(records, front_end)
        frame["client_ttft_s"], frame["client_e2e_s"] = seen.ttft_s, seen.e2e_s
    return frame


ITERATION_COLUMNS = (
    "start_s",
    "end_s",
    "prefill_tokens",
    "decode_requests",
    "running",
    "waiting",
    "kv_used_share",
    "preemptions",
    "extrapolated",
)
"""The columns of ``iterations.parquet``."""


def iterations_frame(iterations: Iterations) -> pd.DataFrame:
    """Return the table of ``iterations.parquet``: one row per iteration."""
    import pandas as pd

    return pd.DataFrame({name: getattr(iterations, name) for name in ITERATION_COLUMNS})


def transitions_frame(transitions: Transitions) -> pd.DataFrame:
    """Return the table of ``transitions.parquet``: one row per plan change."""
    import pandas as pd

    return pd.DataFrame(
        {
            "time_s": transitions.time_s,
            "from": list(transitions.from_plan),
            "to": list(transitions.to_plan),
            "bytes_in": transitions.bytes_in,
            "bytes_freed": transitions.bytes_freed,
            "ready_s": transitions.ready_s,
            "preempted": transitions.preempted,
            "recomputed_tokens": transitions.recomputed_tokens,
            "kv_blocks_before": transitions.kv_blocks_before,
            "kv_blocks_after": transitions.kv_blocks_after,
        }
    )


def kept_share_frame(changes: Sequence[tuple[float, float]]) -> pd.DataFrame:
    """Return the table of ``kept_share.parquet``: one row per change of the resident share of the dense weights."""
    import pandas as pd

    return pd.DataFrame(np.array(changes, dtype=np.float64).reshape(-1, 2), columns=["time_s", "kept_share"])


def merged_iterations(parts: Sequence[Iterations]) -> Iterations:
    """Return the iterations of several engines, in the order in which they ended."""
    order = np.argsort(np.concatenate([part.end_s for part in parts]), kind="stable")
    names = [f.name for f in fields(Iterations)]
    return Iterations(**{name: np.concatenate([getattr(part, name) for part in parts])[order] for name in names})


def merged_gaps(parts: Sequence[TokenGaps]) -> TokenGaps:
    """Return the gaps between tokens of several engines."""
    return TokenGaps(
        itl_s=np.concatenate([part.itl_s for part in parts]), count=np.concatenate([part.count for part in parts])
    )


def distribution(values: Floats) -> dict[str, float | None]:
    """Return mean, p50, p90, p95, p99 and max of the finite values (linear interpolation); None without any."""
    values = values[np.isfinite(values)]
    if not len(values):
        return dict.fromkeys(("mean", *QUANTILES, "max"))
    points = np.quantile(values, list(QUANTILES.values()))
    return {
        "mean": float(values.mean()),
        **dict(zip(QUANTILES, map(float, points), strict=True)),
        "max": float(values.max()),
    }


def gap_distribution(gaps: TokenGaps) -> dict[str, float | None]:
    """Return mean, p50, p90, p95, p99 and max of the gaps between tokens (nearest rank)."""
    if not len(gaps.itl_s):
        return dict.fromkeys(("mean", *QUANTILES, "max"))
    order = np.argsort(gaps.itl_s, kind="stable")
    itl_s, count = gaps.itl_s[order], gaps.count[order]
    rank = np.cumsum(count)
    total = int(rank[-1])
    points = {name: float(itl_s[np.searchsorted(rank, np.ceil(q * total))]) for name, q in QUANTILES.items()}
    return {"mean": float((itl_s * count).sum() / total), **points, "max": float(itl_s[-1])}


def summarise(
    records: Records,
    iterations: Iterations,
    gaps: TokenGaps,
    slo: Slo,
    *,
    transitions: int = 0,
    budget_violation_s: float = 0.0,
    not_arrived: int = 0,
    cpu_s: float = 0.0,
    end_s: float | None = None,
    front_end: FrontEnd = NO_FRONT_END,
) -> dict[str, Any]:
    """Return the figures of one replay, the content of ``summary.json``.

    Args:
        records, iterations, gaps: what the engine recorded.
        slo: which requests count towards SLO attainment and goodput.
        transitions: plan changes. budget_violation_s: seconds in which the held bytes exceeded the budget.
        not_arrived: requests of the trace that had not arrived when the replay stopped.
        cpu_s: process CPU seconds of the replay; 0 if not measured.
        end_s: when the replay ended; None takes the end of the last iteration.
        front_end: what lies between clients and the engine.

    ``ttft_s``, ``e2e_s``: engine-side, from the arrival in the engine's queue. ``client_ttft_s``, ``client_e2e_s``:
    client-side, from the sending to the arrival of the piece; without a front end they are the same.
    ``max_rate_rps``, ``utilization``: None; who measures the maximum rate sets them (sim/replay/max_rate.py).
    ``recomputed_tokens``: prefill tokens beyond computing each answered request's uncached prompt once.
    ``cached_share``: tokens found in the prefix cache over all prompt tokens that were admitted.
    """
    requests = len(records)
    met = met_slo(records, slo, front_end)
    last_s = end_s if end_s is not None else float(iterations.end_s[-1]) if len(iterations) else 0.0
    first_s = float(records.arrival_s[0]) if requests else 0.0
    makespan_s = max(last_s - first_s, 0.0)
    arrivals_s = float(records.arrival_s[-1] - records.arrival_s[0]) if requests else 0.0
    admitted = np.isfinite(records.admitted_s)
    ttft_s, e2e_s = distribution(records.ttft_s), distribution(records.e2e_s)
    seen = as_clients_see(records, front_end)
    return {
        **_counts(records),
        "not_arrived": not_arrived,
        "makespan_s": makespan_s,
        "ttft_s": ttft_s,
        "tpot_s": distribution(records.tpot_s),
        "itl_s": gap_distribution(gaps),
        "e2e_s": e2e_s,
        "client_ttft_s": ttft_s if front_end.absent else distribution(seen.ttft_s),
        "client_e2e_s": e2e_s if front_end.absent else distribution(seen.e2e_s),
        "slo_attainment": float(met.mean()) if requests else None,
        "goodput_rps": _rate(float(met.sum()), makespan_s),
        "request_rate_rps": _rate(requests - 1, arrivals_s),
        "max_rate_rps": None,
        "utilization": None,
        "output_tokens_per_s": _rate(float(records.produced_tokens.sum()), makespan_s),
        "transitions": transitions,
        "budget_violation_s": budget_violation_s,
        "kept_params_share": distribution(records.kept_params_share)["mean"],
        "quality_nll": _mean_nll(records),
        "preemptions": int(records.preemptions.sum()),
        "recomputed_tokens": _recomputed_tokens(records, iterations),
        "cached_share": _rate(float(records.cached_tokens.sum()), float(records.prompt_tokens[admitted].sum())),
        "kv_peak_share": float(iterations.kv_used_share.max()) if len(iterations) else 0.0,
        "extrapolated_share": float(iterations.extrapolated.mean()) if len(iterations) else 0.0,
        "iterations": len(iterations),
        "cpu_s": cpu_s,
        "requests_per_cpu_s": _rate(requests, cpu_s),
    }


def _mean_nll(records: Records) -> float | None:
    """Return the mean NLL of the requests with a token; None if that of any is unknown, for the others flatter it."""
    nll = records.quality_nll[records.produced_tokens > 0]
    return float(nll.mean()) if len(nll) and np.isfinite(nll).all() else None


def _counts(records: Records) -> dict[str, int]:
    """Return how many requests arrived, and how each ended."""
    finished = records.status == Status.FINISHED
    truncated = finished & (records.produced_tokens < records.output_tokens)
    return {
        "requests": len(records),
        "finished": int(finished.sum()),
        "rejected": int((records.status == Status.REJECTED).sum()),
        "unfinished": int(np.isin(records.status, (Status.WAITING, Status.RUNNING)).sum()),
        "truncated": int(truncated.sum()),
    }


def _rate(count: float, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None


def _recomputed_tokens(records: Records, iterations: Iterations) -> int:
    answered = np.isfinite(records.first_token_s)
    computed_once = (records.prompt_tokens - records.cached_tokens)[answered].sum()
    # Unanswered requests may have computed part of their prompt, which this counts as well; it never falls below 0.
    return max(int(iterations.prefill_tokens.sum() - computed_once), 0)
