"""A trace: when each request arrives, how long its prompt is, and how long its answer will be."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim.errors import TraceError
from sim.traces.sessions import check_sessions, check_taken
from sim.types import Floats, Ints

MAX_TOKENS = 10**9
"""No real prompt or answer is longer; a larger number means a wrong unit or a swapped column."""
MAX_ARRIVAL_S = 1e9
"""31 years; a larger number is a Unix time or milliseconds, not seconds since the start of the trace."""
HASH_BLOCK_TOKENS = 512
"""Prompt tokens per entry of ``hash_ids``, unless a trace says otherwise (Mooncake, FAST 2025, on its traces)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Requests sorted by arrival; ties keep their order in the file. The arrays are read-only.

    Time 0 is the start of the covered period, which need not be an arrival: readers of logs put it at the first
    request, ``window`` at the start of the window, a generator at the start of its process.
    Two traces are equal when their requests are equal (arrivals, lengths, prefix ids, sessions). Name, source and
    history record the origin and are not compared.

    Args:
        arrival_s: seconds since the start, float64, not decreasing; for a turn with a think time, when it would arrive
            if every answer came at once.
        prompt_tokens: at least 1, int64.
        output_tokens: at least 1, int64. Engines know it; policies never see it.
        hash_ids: for each request, the ids of its prefix blocks of ``hash_block_tokens`` tokens; None if the source
            has none.
        name: the label in tables and plots.
        source: the file as the user named it, or the generator.
        history: the steps that made the trace, one readable sentence each, oldest first.
        time_quantum_s: resolution of the source's clock; 0 for a fine one, 1 for BurstGPT, 3 for Mooncake.
        hash_block_tokens: prompt tokens per id as the source states it (512 for Mooncake, 16 for Qwen-Bailian); None
            if it does not.
        session, think_s: which requests follow which, and how long after their answers (sim/traces/sessions.py); None
            for a trace whose requests all arrive at ``arrival_s``. With sessions, ids beyond the full prefix blocks of
            a prompt are those of its answer, which is cached when the request ends.

    Raises:
        TraceError: if a value is out of range; the message names the first such request, its value and the range.
    """

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    hash_ids: tuple[Ints, ...] | None = None
    name: str = "trace"
    source: str = "arrays"
    history: tuple[str, ...] = ()
    time_quantum_s: float = 0.0
    hash_block_tokens: int | None = None
    session: Ints | None = None
    think_s: Floats | None = None

    def __post_init__(self) -> None:
        arrival_s = _frozen_floats(self.arrival_s)
        prompt_tokens = _frozen_tokens("prompt_tokens", self.prompt_tokens)
        output_tokens = _frozen_tokens("output_tokens", self.output_tokens)
        lengths = {
            "arrival_s": len(arrival_s),
            "prompt_tokens": len(prompt_tokens),
            "output_tokens": len(output_tokens),
        }
        if len(set(lengths.values())) != 1:
            raise TraceError(f"columns of different length: {lengths}; every request needs one entry in each")
        if len(arrival_s) == 0:
            raise TraceError("a trace needs at least one request and this one has none")
        _check(arrival_s, "arrival_s", np.isfinite(arrival_s), "a finite number of seconds")
        _check(arrival_s, "arrival_s", arrival_s >= 0, "at least 0")
        _check(arrival_s, "arrival_s", arrival_s <= MAX_ARRIVAL_S, f"at most {MAX_ARRIVAL_S:g} s; subtract the start")
        in_order = np.concatenate(([True], arrival_s[1:] >= arrival_s[:-1]))
        _check(arrival_s, "arrival_s", in_order, "not before the request ahead of it; sort by arrival_s first")
        _check_hash_ids_count(self.hash_ids, len(arrival_s))
        self._freeze_sessions(len(arrival_s))
        if not (np.isfinite(self.time_quantum_s) and self.time_quantum_s >= 0):
            raise TraceError(f"time_quantum_s is {self.time_quantum_s}; it must be a finite number, 0 for a fine clock")
        if self.hash_block_tokens is not None and not 1 <= self.hash_block_tokens <= MAX_TOKENS:
            raise TraceError(
                f"hash_block_tokens is {self.hash_block_tokens}; it must be from 1 to {MAX_TOKENS:,} tokens"
            )
        object.__setattr__(self, "arrival_s", arrival_s)
        object.__setattr__(self, "prompt_tokens", prompt_tokens)
        object.__setattr__(self, "output_tokens", output_tokens)
        object.__setattr__(self, "hash_ids", None if self.hash_ids is None else _frozen_hash_ids(self.hash_ids))
        object.__setattr__(self, "history", tuple(self.history))
        object.__setattr__(self, "time_quantum_s", float(self.time_quantum_s))

    def _freeze_sessions(self, requests: int) -> None:
        """Check the two columns of sessions, which come together, and make them read-only."""
        if self.session is None and self.think_s is None:
            return
        if self.session is None or self.think_s is None:
            raise TraceError("a trace has session or think_s alone; give both, or none")
        session, think_s = np.array(self.session, dtype=np.int64), np.array(self.think_s, dtype=np.float64)
        if session.shape != (requests,) or think_s.shape != (requests,):
            raise TraceError(
                f"session has {session.shape} and think_s {think_s.shape} entries for {requests} requests; every "
                "request needs one in each"
            )
        check_sessions(session, think_s)
        session.setflags(write=False)
        think_s.setflags(write=False)
        object.__setattr__(self, "session", session)
        object.__setattr__(self, "think_s", think_s)

    def __len__(self) -> int:
        return len(self.arrival_s)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trace):
            return NotImplemented
        if (self.hash_ids is None) != (other.hash_ids is None) or len(self) != len(other):
            return False
        if self.hash_ids is not None and self.block_tokens != other.block_tokens:
            return False
        if not _equal_columns(self.session, other.session) or not _equal_columns(self.think_s, other.think_s):
            return False
        return (
            np.array_equal(self.arrival_s, other.arrival_s)
            and np.array_equal(self.prompt_tokens, other.prompt_tokens)
            and np.array_equal(self.output_tokens, other.output_tokens)
            and all(np.array_equal(a, b) for a, b in zip(self.hash_ids or (), other.hash_ids or (), strict=True))
        )

    def __hash__(self) -> int:
        return hash(self.content_hash())

    def content_hash(self) -> str:
        """Return the SHA-256 of the requests as hex; equal traces have equal hashes on every machine."""
        digest = hashlib.sha256(f"trace of {len(self)} requests".encode())
        # + 0.0 turns -0.0 into 0.0, which is equal and must hash the same.
        digest.update((self.arrival_s + 0.0).astype("<f8").tobytes())
        digest.update(self.prompt_tokens.astype("<i8").tobytes())
        digest.update(self.output_tokens.astype("<i8").tobytes())
        if self.hash_ids is not None:
            counts, flat = _flatten(self.hash_ids)
            digest.update(b"hash_ids")
            digest.update(counts.astype("<i8").tobytes())
            digest.update(flat.astype("<i8").tobytes())
            if self.block_tokens != HASH_BLOCK_TOKENS:
                digest.update(f"of {self.block_tokens} tokens".encode())
        if self.session is not None and self.think_s is not None:
            digest.update(b"sessions")
            digest.update(self.session.astype("<i8").tobytes())
            digest.update(np.where(np.isnan(self.think_s), np.nan, self.think_s + 0.0).astype("<f8").tobytes())
        return digest.hexdigest()

    @property
    def block_tokens(self) -> int:
        """Prompt tokens per hash id; 512 where the source does not say."""
        return HASH_BLOCK_TOKENS if self.hash_block_tokens is None else self.hash_block_tokens

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return float(self.arrival_s[-1] - self.arrival_s[0])

    @property
    def mean_rate_rps(self) -> float:
        """Requests divided by ``duration_s``; NaN if all arrive at the same instant."""
        return len(self) / self.duration_s if self.duration_s > 0 else float("nan")

    @property
    def interarrival_cv(self) -> float:
        """Coefficient of variation of the gaps between arrivals: 1 for a Poisson process; NaN without a gap."""
        gaps_s = np.diff(self.arrival_s)
        mean_s = float(gaps_s.mean()) if len(gaps_s) else 0.0
        return float(gaps_s.std()) / mean_s if mean_s > 0 else float("nan")

    def peak_rate_rps(self, window_s: float = 60.0) -> float:
        """Return the highest request rate over any window of ``window_s`` seconds."""
        last = np.searchsorted(self.arrival_s, self.arrival_s + window_s, side="left")
        return float((last - np.arange(len(self))).max()) / window_s

    def with_history(self, step: str) -> Trace:
        """Return the same requests with one more line of history."""
        return replace(self, history=(*self.history, step))

    def take(self, index: ArrayLike) -> Trace:
        """Return the requests at ``index`` (a mask or increasing positions); everything else is unchanged.

        Raises:
            TraceError: if none is left, or a turn of a session stays without the one that it follows.
        """
        index = np.asarray(index)
        chosen = np.flatnonzero(index) if index.dtype == np.bool_ else index
        if self.session is not None and self.think_s is not None:
            check_taken(self.session, self.think_s, chosen)
        return replace(
            self,
            arrival_s=self.arrival_s[chosen],
            prompt_tokens=self.prompt_tokens[chosen],
            output_tokens=self.output_tokens[chosen],
            hash_ids=None if self.hash_ids is None else tuple(self.hash_ids[i] for i in chosen),
            session=None if self.session is None else self.session[chosen],
            think_s=None if self.think_s is None else self.think_s[chosen],
        )


def sorted_trace(
    *,
    arrival_s: ArrayLike,
    prompt_tokens: ArrayLike,
    output_tokens: ArrayLike,
    hash_ids: Sequence[Ints] | None = None,
    session: Ints | None = None,
    think_s: Floats | None = None,
    **described: Any,
) -> Trace:
    """Sort requests by arrival and return their trace; ties keep their order.

    Args:
        described: name, source, history and time_quantum_s, as in ``Trace``.
    Raises:
        TraceError: as ``Trace`` does.
    """
    arrival = np.asarray(arrival_s)
    order = np.argsort(arrival, kind="stable")
    return Trace(
        arrival_s=arrival[order],
        prompt_tokens=np.asarray(prompt_tokens)[order],
        output_tokens=np.asarray(output_tokens)[order],
        hash_ids=None if hash_ids is None else tuple(hash_ids[i] for i in order),
        session=None if session is None else session[order],
        think_s=None if think_s is None else think_s[order],
        **described,
    )


def _equal_columns(one: NDArray[Any] | None, other: NDArray[Any] | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def _frozen_floats(values: ArrayLike) -> Floats:
    try:
        array = np.array(values, dtype=np.float64, ndmin=1)  # a copy: the caller's array stays writable
    except (TypeError, ValueError) as error:
        raise TraceError(f"arrival_s must hold numbers of seconds: {error}") from error
    if array.ndim != 1:
        raise TraceError(f"arrival_s has {array.ndim} dimensions; it must have one, with a number for each request")
    array.setflags(write=False)
    return array


def _frozen_tokens(name: str, values: ArrayLike) -> Ints:
    array = np.array(values, ndmin=1)
    if array.ndim != 1:
        raise TraceError(f"{name} has {array.ndim} dimensions; it must have one, with a number for each request")
    if array.dtype.kind == "f":
        integral = np.isfinite(array) & (array == np.floor(array))
        _check(array, name, integral, "a whole number")
    elif array.dtype.kind not in "iu":
        raise TraceError(f"{name} has type {array.dtype}; it must hold whole numbers")
    _check(array, name, array >= 1, "at least 1")
    _check(array, name, array <= MAX_TOKENS, f"at most {MAX_TOKENS:,}")
    tokens: Ints = array.astype(np.int64)
    tokens.setflags(write=False)
    return tokens


def _check(values: NDArray[Any], name: str, good: NDArray[np.bool_], allowed: str) -> None:
    if not good.all():
        first = int(np.argmin(good))
        raise TraceError(
            f"{name} of request {first} is {values[first]}; it must be {allowed} "
            f"({int((~good).sum())} of {len(values)} requests are wrong)"
        )


def _check_hash_ids_count(hash_ids: Sequence[Ints] | None, requests: int) -> None:
    if hash_ids is not None and len(hash_ids) != requests:
        raise TraceError(
            f"hash_ids has {len(hash_ids)} entries for {requests} requests; give one list per request, or None"
        )


def _flatten(hash_ids: Sequence[Ints]) -> tuple[Ints, Ints]:
    counts = np.fromiter(map(len, hash_ids), dtype=np.int64, count=len(hash_ids))
    flat = np.concatenate(hash_ids) if counts.sum() else np.empty(0)
    return counts, flat.astype(np.int64)


def _frozen_hash_ids(hash_ids: Iterable[Ints]) -> tuple[Ints, ...]:
    # One flat read-only array and a view per request: a million small arrays would need far more memory.
    counts, flat = _flatten([np.asarray(ids) for ids in hash_ids])
    if len(flat) and flat.min() < 0:
        raise TraceError(f"hash_ids holds {flat.min()}; ids of prefix blocks are 0 or more")
    flat.setflags(write=False)
    ends = np.cumsum(counts)
    return tuple(flat[start:end] for start, end in zip((ends - counts).tolist(), ends.tolist(), strict=True))
