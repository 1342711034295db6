"""A measured run: when each request was sent and answered, checked, with what its files state of the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sim.engine.protocol import EngineConfig
from sim.errors import ConfigError
from sim.results.records import Moments
from sim.traces.trace import MAX_ARRIVAL_S, MAX_TOKENS
from sim.types import Floats, Ints

LEAST_REQUESTS = 10
MOST_REQUESTS = 200_000
MOST_LEFT_OUT = 0.5
"""Largest share of a file's requests that may be left out as failed or unusable."""
Side = Literal["client", "engine"]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredRun(Moments):
    """A run of a real server: one entry per answered request, in order of sending; seconds since the first one.

    name, source: the file. kind: its format, for people.
    side: where times were taken: by the client, with the front end, or in the engine.
    itl_s: every gap between two tokens, of all requests; None if the file has only times of first and last tokens.
    prompts: a number for each prompt that is the same for equal texts; None if the file has no texts.
    config, kv_blocks: the engine's settings and KV blocks, if the run's files state them.
    model, device: as the files state them, else empty.
    left_out: what was left out and why, one phrase each.
    """

    name: str
    source: str
    kind: str
    side: Side = "client"
    itl_s: Floats | None = None
    prompts: Ints | None = None
    config: EngineConfig | None = None
    kv_blocks: int | None = None
    model: str = ""
    device: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def rate_rps(self) -> float:
        """Requests per second of sending; ``inf`` if all were sent at once."""
        span_s = float(self.arrival_s[-1])
        return (len(self) - 1) / span_s if span_s > 0 else float("inf")

    @property
    def served_rps(self) -> float:
        """Requests per second that were served, from the first sending to the last token."""
        return len(self) / max(float(np.nanmax(self.finish_s)), 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Columns:
    """The requests of a file before they are checked; NaN where a file has no number. Times share one clock.

    lines: how the file numbers its requests. failed: requests that the file itself states as failed.
    """

    sent_s: Floats
    first_token_s: Floats
    finish_s: Floats
    prompt_tokens: Floats
    output_tokens: Floats
    failed: Bools | None = None
    itl_s: Sequence[Sequence[float]] | None = None
    prompts: Ints | None = None


def measured_run(columns: Columns, *, name: str, source: str, kind: str, side: Side = "client") -> MeasuredRun:
    """Return the run that a file's columns make; failed and unusable requests are left out and counted.

    Raises:
        ConfigError: if too few requests are left, or more than half are left out.
    """
    c, total = columns, len(columns.sent_s)
    if total > MOST_REQUESTS:
        raise ConfigError(f"{source} has {total:,} requests; at most {MOST_REQUESTS:,} are allowed, cut the file")
    keep = np.ones(total, dtype=bool)
    left_out = []
    for wrong, reason in _wrong_rows(c):
        new = wrong & keep
        if new.any():
            left_out.append(f"{int(new.sum()):,} requests: {reason} (first: request {int(np.flatnonzero(new)[0]) + 1})")
            keep &= ~wrong
    kept = int(keep.sum())
    why = f" ({'; '.join(left_out)})" if left_out else ""
    if kept < LEAST_REQUESTS:
        raise ConfigError(
            f"{source} has {kept} usable requests of {total}{why}; a fit needs at least {LEAST_REQUESTS}, better some "
            "hundreds"
        )
    if kept < (1 - MOST_LEFT_OUT) * total:
        raise ConfigError(
            f"{source}: only {kept} of {total} requests are usable{why}; mend the file, or measure again: the failed "
            "requests held the server up too"
        )
    order = np.flatnonzero(keep)[np.argsort(c.sent_s[keep], kind="stable")]
    start_s = float(c.sent_s[order[0]])
    gaps = None if c.itl_s is None else np.concatenate([np.asarray(c.itl_s[i], dtype=np.float64) for i in order])
    return MeasuredRun(
        arrival_s=c.sent_s[order] - start_s,
        first_token_s=c.first_token_s[order] - start_s,
        finish_s=c.finish_s[order] - start_s,
        prompt_tokens=c.prompt_tokens[order].astype(np.int64),
        produced_tokens=c.output_tokens[order].astype(np.int64),
        name=name,
        source=source,
        kind=kind,
        side=side,
        itl_s=gaps if gaps is not None and len(gaps) else None,
        prompts=None if c.prompts is None else c.prompts[order],
        left_out=tuple(left_out),
    )


def _wrong_rows(c: Columns) -> list[tuple[Bools, str]]:
    """Return which rows cannot be used, for each reason."""
    with np.errstate(invalid="ignore"):
        tokens = [
            (values >= 1) & (values <= MAX_TOKENS) & (values == np.floor(values))
            for values in (c.prompt_tokens, c.output_tokens)
        ]
        span_s = c.sent_s - np.nanmin(c.sent_s, initial=np.inf)
        return [
            (np.zeros(len(c.sent_s), dtype=bool) if c.failed is None else c.failed, "failed"),
            (~np.isfinite(c.sent_s) | ~(span_s <= MAX_ARRIVAL_S), "no time of sending"),
            (~tokens[0], "prompt tokens are no whole number from 1"),
            (~tokens[1], "output tokens are no whole number from 1"),
            (~np.isfinite(c.first_token_s), "no time of the first token"),
            (~(c.first_token_s > c.sent_s), "the first token is not after the sending"),
            (~(c.finish_s >= c.first_token_s) | ~np.isfinite(c.finish_s), "the last token is before the first"),
            (~(c.finish_s - c.sent_s <= MAX_ARRIVAL_S), "a time is too large"),
        ]


def stating(run: MeasuredRun, config: EngineConfig, kv_blocks: int, model: str, device: str) -> MeasuredRun:
    """Return a run with what its files state of the server."""
    return replace(run, config=config, kv_blocks=kv_blocks, model=model, device=device)
