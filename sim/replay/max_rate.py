"""The maximum rate of a server: what it finishes per second when all requests of a trace come at once.

TTFT grows without bound as the rate of a trace comes near it, and then depends on small errors of the prices. So a
summary states the maximum rate and the share of it that the trace offers, its utilization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from omegaconf import DictConfig

from sim.policies import Fixed, Policy
from sim.results.records import Records, Status
from sim.traces.trace import Trace

FULL_SHARE = 0.5
"""Share of the time in which some request must wait, so that a rate counts as the server's maximum."""


def is_measured(cfg: DictConfig, policy: Policy | None = None) -> bool:
    """Return whether a configuration measures the maximum rate.

    policy: that of a single replay, which measures it by default if it is a fixed plan; None for other runs.
    """
    wanted = cfg.max_rate if "max_rate" in cfg else False  # a real engine's has no such key
    return isinstance(policy, Fixed) if wanted is None else bool(wanted)


def all_at_once(trace: Trace) -> Trace:
    """Return the same requests, all arriving at 0 s in their order; no turn of a session waits for another."""
    return replace(
        trace,
        arrival_s=np.zeros(len(trace)),
        time_quantum_s=0.0,
        session=None,
        think_s=None,
        history=(*trace.history, "all requests at once"),
    )


def without_queue_limit(policy: Policy) -> Policy:
    """Return a fixed policy without limits of the queue, which reject requests that come at once; others as is."""
    return Fixed(replace(policy.first_plan, max_waiting=None, max_wait_s=None)) if isinstance(policy, Fixed) else policy


def rate_figures(records: Records, summary: Mapping[str, Any]) -> dict[str, float | None]:
    """Return ``max_rate_rps`` and ``utilization`` for the summary of a replay.

    Utilization is None where the requests are too few to fill the server: none of them waits for more than half of the
    time, and the rate says how long the last ones take rather than how many the server can serve.

    Args:
        records: of the same requests, all at 0 s. summary: of the replay, whose rate is compared with the maximum.
    """
    finished = records.status == Status.FINISHED
    if not finished.any():
        return {"max_rate_rps": None, "utilization": None}
    end_s, full_until_s = float(records.finish_s[finished].max()), float(records.admitted_s[finished].max())
    most_rps, offered_rps = float(finished.sum()) / end_s, summary["request_rate_rps"]
    known = offered_rps is not None and full_until_s >= FULL_SHARE * end_s
    return {"max_rate_rps": most_rps, "utilization": offered_rps / most_rps if known else None}
