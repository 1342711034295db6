"""What a token costs a request: a base, a share for each running sequence, a share for each prompt that comes in.

A request that decodes n gaps between two tokens while on average r sequences decode and k prompts come in waits

    n * base + n * r * sequence + k * prompt

in total, so its mean gap is linear in (1, r, k / n). A price or a setting that is wrong shows in one of the three: base
is reading the weights and the overhead of an iteration, sequence reading the KV of one request, prompt the computation
of one prompt, which is near 0 if its KV is in the prefix cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import lsq_linear

from sim.results.records import Moments
from sim.types import Floats

LEAST_GAPS = 2
"""A request with fewer gaps says little of the mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds of one gap between two tokens; ``error``: the standard errors of the three.

    base_s: with nothing else on the server. sequence_s: more for each running sequence. prompt_s: for each prompt that
    comes in.
    """

    base_s: float
    sequence_s: float
    prompt_s: float
    error: tuple[float, float, float]


def decoding(moments: Moments) -> Floats:
    """Return the mean number of requests that decode while each request decodes, itself included; NaN for one token."""
    first, finish = moments.first_token_s, moments.finish_s
    known = np.isfinite(first) & np.isfinite(finish)
    span = np.where(known & (finish > first), finish - first, np.nan)
    served = _integral(np.sort(first[known]), finish) - _integral(np.sort(finish[known]), finish)
    served -= _integral(np.sort(first[known]), first) - _integral(np.sort(finish[known]), first)
    return served / span


def _integral(events_s: Floats, until_s: Floats) -> Floats:
    """Return, for each time, the sum of (time - event) over earlier events: the integral of their count."""
    total = np.concatenate(([0.0], np.cumsum(events_s)))
    before = np.searchsorted(events_s, until_s)
    result: Floats = before * until_s - total[before]
    return result


def prompts_in(moments: Moments) -> Floats:
    """Return how many other prompts ended their prefill while each request decoded."""
    first = np.sort(moments.first_token_s[np.isfinite(moments.first_token_s)])
    inside = np.searchsorted(first, moments.finish_s, side="right")
    return (inside - np.searchsorted(first, moments.first_token_s, side="right")).astype(np.float64)


def costs(moments: Moments) -> Costs | None:
    """Return the three costs, each at least 0, by least squares; None without enough requests."""
    gaps = (moments.produced_tokens - 1).astype(np.float64)
    gap_s = moments.tpot_s
    use = np.isfinite(gap_s) & (gap_s > 0) & (gaps >= LEAST_GAPS)
    if use.sum() < 10:
        return None
    design = np.stack([np.ones(int(use.sum())), decoding(moments)[use], prompts_in(moments)[use] / gaps[use]], axis=1)
    # Relative errors: a long gap is as uncertain, relatively, as a short one; a mean of more gaps is less.
    weight = np.sqrt(np.minimum(gaps[use], 100.0)) / gap_s[use]
    scaled, wanted = design * weight[:, None], gap_s[use] * weight
    spread = np.maximum(np.abs(scaled).max(axis=0), 1e-12)
    found = lsq_linear(scaled / spread, wanted, bounds=(0.0, np.inf))
    rest = float(np.sum((scaled / spread @ found.x - wanted) ** 2)) / max(len(wanted) - 3, 1)
    covariance = np.linalg.pinv((scaled / spread).T @ (scaled / spread)) * rest
    errors = np.sqrt(np.maximum(np.diag(covariance), 0.0)) / spread
    base, sequence, prompt = (found.x / spread).tolist()
    return Costs(base_s=base, sequence_s=sequence, prompt_s=prompt, error=tuple(errors.tolist()))
