"""ServeGen: a statistical description of real clients, from which requests are sampled (not a request log).

One difference from ServeGen's code: it rescales n gaps, which puts the last request exactly at the end of the window,
where rounding decides whether it is dropped. Here n + 1 gaps put all n requests inside.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sim.errors import TraceError
from sim.paths import find_data
from sim.traces.readers.csv_table import read_csv
from sim.traces.readers.files import TraceFile, missing_data, read_content
from sim.traces.readers.json_table import load_document
from sim.traces.readers.rows import Rows
from sim.traces.trace import Trace, sorted_trace
from sim.types import Floats, Ints

ORIGIN = "https://github.com/alibaba/ServeGen (data/, commit f891d1189eb32b3868dfc443800c4150548c282a)"
WINDOW_S = 600.0
LENGTHS_WINDOW_S = 21_600
COLUMNS = ("window_start_s", "rate_rps", "cv", "pattern", "shape", "scale_s")
PATTERNS = ("Gamma", "Weibull")
LITERAL = re.compile(r"\s*\{[0-9eE+\-.:,\s]{0,10000000}\}\s*")
"""A Python dict literal of numbers, as the dataset files hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeGenClient:
    """One client; each array has one entry per window of 600 s.

    pattern: "Gamma" or "Weibull"; empty while the client is idle, with rate_rps 0.
    """

    client: int
    window_start_s: Floats
    rate_rps: Floats
    pattern: tuple[str, ...]
    shape: Floats


@dataclass(frozen=True, slots=True)
class Histogram:
    """Token counts in ascending order; ``cumulated[i]`` is the share of requests with at most ``tokens[i]``."""

    tokens: Ints
    cumulated: Floats

    def draw(self, uniform: Floats) -> Ints:
        """Return the token counts at these points in [0, 1) of the cumulative distribution."""
        position = np.searchsorted(self.cumulated, uniform, side="right")
        return self.tokens[np.minimum(position, len(self.tokens) - 1)]


def read_servegen(
    path: str | Path,
    *,
    clients: Sequence[int] | None = None,
    start_s: float = 0.0,
    duration_s: float = 600.0,
    rate_scale: float = 1.0,
    rate_rps: float | None = None,
    coupled_lengths: bool = True,
    seed: int = 0,
    name: str = "servegen",
) -> Trace:
    """Return requests sampled from ServeGen's description of its clients; time 0 is ``start_s`` of the description.

    In each window of 600 s, a client sends ceil(rate x 600) requests. Their gaps come from its Gamma or Weibull
    distribution and are rescaled to fill the window, so that only the shape of the distribution matters, not its scale.
    Their lengths come from its histograms for that period of 6 h. Each client and window has its own random generator,
    so choosing other clients or times does not change the requests of the remaining ones.

    Args:
        path: a folder with ``chunk-ID-trace.csv`` and ``chunk-ID-dataset.json``, plain or gzip.
        clients: ids of the clients; None takes every client that has both files and reports the others.
        start_s, duration_s: the part of the description (14 days for language models, one day for reasoning models).
        rate_scale: multiplies the rate of every client.
        rate_rps: constant rate of all clients together, divided in proportion to their own rates (ServeGen's rate
            function); replaces rate_scale.
        coupled_lengths: take prompt and output at the same quantile, as ServeGen's code does, so that long prompts
            have long outputs; False makes them independent.
        seed: of everything random.
        name: the trace's name.
    Raises:
        TraceError: if a file or row cannot be used, a client is unknown, or the chosen part has no request.
    Source:
        Xiang et al., ServeGen (arXiv 2505.09999), section 6; alibaba/ServeGen, servegen/construct.py, Apache-2.0.
    """
    folder = find_data(path)
    if not folder.is_dir():
        raise missing_data(path, ORIGIN)
    _check_part(start_s, duration_s, rate_scale, rate_rps)
    history: list[str] = []
    chosen = _choose_clients(path, folder, clients, history)
    described = [read_client(path, client) for client in chosen]
    factors = _rate_factors(path, described, start_s, duration_s, rate_scale, rate_rps)
    parts: list[_Requests] = []
    for client in described:
        if windows := _windows(client, start_s, duration_s):
            parts += _client_requests(path, client, windows, factors, coupled_lengths=coupled_lengths, seed=seed)
    parts = [part.between(start_s, start_s + duration_s) for part in parts]
    requests = sum(len(part.arrival_s) for part in parts)
    if requests == 0:
        raise TraceError(
            f"{path}: clients {chosen} send nothing from {start_s:g} s to {start_s + duration_s:g} s; choose "
            "another part with trace.start_s and trace.duration_s, other trace.clients, or a larger trace.rate_scale"
        )
    scaled = f"rate_scale={rate_scale:g}" if rate_rps is None else f"rate_rps={rate_rps:g}"
    history.append(
        f"drew {requests:,} requests of clients {chosen} from {start_s:g} s to {start_s + duration_s:g} s, {scaled}, "
        f"{'coupled' if coupled_lengths else 'independent'} lengths, seed={seed}"
    )
    return _merged(parts, start_s, name=name, source=str(path), history=history)


def _merged(parts: Sequence[_Requests], start_s: float, *, name: str, source: str, history: Sequence[str]) -> Trace:
    """Return the requests of all clients as one trace that begins at ``start_s``; lengths of 0 become 1."""
    prompt_tokens = np.concatenate([part.prompt_tokens for part in parts])
    output_tokens = np.concatenate([part.output_tokens for part in parts])
    raised = int((prompt_tokens < 1).sum() + (output_tokens < 1).sum())
    return sorted_trace(
        arrival_s=np.concatenate([part.arrival_s for part in parts]) - start_s,
        prompt_tokens=np.maximum(prompt_tokens, 1),
        output_tokens=np.maximum(output_tokens, 1),
        name=name,
        source=source,
        history=(*history, *([f"raised {raised:,} lengths of 0 tokens to 1"] if raised else [])),
    )


@dataclass(frozen=True, slots=True)
class _Requests:
    """The requests of one client in one window; arrivals in seconds of the description."""

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints

    def between(self, start_s: float, end_s: float) -> _Requests:
        """Return the requests that arrive in [start_s, end_s)."""
        inside = (self.arrival_s >= start_s) & (self.arrival_s < end_s)
        return _Requests(self.arrival_s[inside], self.prompt_tokens[inside], self.output_tokens[inside])


def _client_requests(
    path: str | Path,
    client: ServeGenClient,
    windows: Sequence[int],
    factors: Mapping[float, float],
    *,
    coupled_lengths: bool,
    seed: int,
) -> Iterator[_Requests]:
    """Yield what one client sends in each window, by position; ``factors``: see ``_rate_factors``."""
    needed = {_lengths_window(client.window_start_s[window]) for window in windows}
    lengths = read_client_lengths(path, client.client, needed)
    for window in windows:
        window_start_s = float(client.window_start_s[window])
        rate = float(client.rate_rps[window]) * factors[window_start_s]
        # The rates are counts over 600 s; a count that rounding has raised must not become one more.
        requests = math.ceil(rate * WINDOW_S - 1e-6)
        if requests <= 0:
            continue
        rng = np.random.default_rng([seed, client.client, round(window_start_s)])
        arrival_s = _fill_window(rng, client.pattern[window], float(client.shape[window]), requests, window_start_s)
        uniform = rng.random((2, requests))
        histograms = lengths.get(_lengths_window(window_start_s))
        if histograms is None:
            raise TraceError(
                f"{path}: client {client.client} sends requests at {window_start_s:g} s but has no lengths for "
                "that 6 h; choose another part with trace.start_s and trace.duration_s, or other trace.clients"
            )
        prompt, output = histograms
        yield _Requests(
            arrival_s=arrival_s,
            prompt_tokens=prompt.draw(uniform[0]),
            output_tokens=output.draw(uniform[0 if coupled_lengths else 1]),
        )


def read_client(path: str | Path, client: int) -> ServeGenClient:
    """Return the rate, pattern and shape of each window of one client.

    Raises:
        TraceError: if the file is missing or a row is wrong; no row of a description can be skipped.
    """
    file = _client_file(path, client, "trace.csv")
    table = read_csv(TraceFile(path=file, origin=ORIGIN), required=COLUMNS, header=COLUMNS)
    rows = Rows(table)
    window_start_s, rate_rps = rows.seconds("window_start_s"), rows.seconds("rate_rps")
    shape = rows.seconds("shape")
    pattern = tuple(text.strip() for text in table.text_column("pattern").to_pylist())
    active = rate_rps > 0
    known = np.array([text in PATTERNS for text in pattern], dtype=bool)
    rows.reject(active & ~known, "pattern", "unknown pattern", " or ".join(PATTERNS))
    rows.reject(active & (shape <= 0), "shape", "not positive", "a shape above 0")
    rows.reject(
        np.diff(window_start_s, prepend=-WINDOW_S) != WINDOW_S,
        "window_start_s",
        "gap between windows",
        f"0, {WINDOW_S:g}, {2 * WINDOW_S:g} and so on",
    )
    rows.good_rows([])
    return ServeGenClient(client=client, window_start_s=window_start_s, rate_rps=rate_rps, pattern=pattern, shape=shape)


def read_client_lengths(
    path: str | Path, client: int, starts: Collection[int] | None = None
) -> dict[int, tuple[Histogram, Histogram]]:
    """Return one client's histograms of prompt and output tokens by the start of their 6 h, without empty ones.

    Args:
        starts: the needed windows, None for all; parsing a histogram takes milliseconds.
    Raises:
        TraceError: if the file is missing or not in ServeGen's format.
    """
    file = _client_file(path, client, "dataset.json")
    source = TraceFile(path=file, origin=ORIGIN)
    windows = load_document(source, read_content(source), hint="it is not a ServeGen dataset file")
    try:
        described = {
            int(start_s): (window["input_tokens"], window["output_tokens"]) for start_s, window in windows.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TraceError(
            f"{file} is not a ServeGen dataset file ({_shown(error)}); it must be JSON: "
            '{window start in s: {"input_tokens": "{13: 0.5, ...}", "output_tokens": "{...}"}}'
        ) from error
    lengths = {}
    for start_s, (prompt, output) in described.items():
        if starts is not None and start_s not in starts:
            continue
        histograms = (
            _histogram(file, start_s, "input_tokens", prompt),
            _histogram(file, start_s, "output_tokens", output),
        )
        if histograms[0] is not None and histograms[1] is not None:
            lengths[start_s] = (histograms[0], histograms[1])
    return lengths


def _histogram(file: str, start_s: int, field: str, text: Any) -> Histogram | None:
    """Return the histogram in a Python dict literal, or None for an empty one."""
    try:
        if not LITERAL.fullmatch(text):  # ast.literal_eval alone needs a hundred times the memory of a hostile text
            raise ValueError("not a dict of numbers")
        shares = ast.literal_eval(text)
        tokens = np.array(list(shares.keys()), dtype=np.int64)
        probability = np.array(list(shares.values()), dtype=np.float64)
    except (ValueError, TypeError, SyntaxError, AttributeError, OverflowError, MemoryError, RecursionError) as error:
        raise TraceError(
            f"{file}, window {start_s}, {field}: not a histogram ({_shown(error)}); allowed is a string such as "
            '"{13: 0.5, 14: 0.5}", token counts and their shares'
        ) from error
    if len(tokens) == 0:
        return None
    total = probability.sum()
    if tokens.min() < 0 or not np.isfinite(total) or probability.min() < 0 or not 0.99 < total < 1.01:
        raise TraceError(
            f"{file}, window {start_s}, {field}: token counts from {tokens.min()} with shares that sum to {total:g}; "
            "allowed are counts from 0 and shares from 0 that add up to 1"
        )
    order = np.argsort(tokens)
    return Histogram(tokens[order], np.cumsum(probability[order] / total))


def _shown(error: Exception) -> str:
    """Return what an error says, on one line of at most 80 characters: it may repeat the content of a file."""
    return " ".join(repr(error).split())[:80]


def _fill_window(rng: np.random.Generator, pattern: str, shape: float, requests: int, window_start_s: float) -> Floats:
    """Return ``requests`` ascending times inside one window; their gaps follow the pattern's distribution, rescaled."""
    # In logarithms, because the gaps of the burstiest clients (CV of several hundred) exceed the range of a float.
    # Subtracting the largest logarithm only changes the scale, which the rescaling removes anyway.
    uniform = 1.0 - rng.random(requests + 1)
    if pattern == "Weibull":
        log_gaps = np.log(np.maximum(-np.log(uniform), 1e-300)) / shape
    else:
        # Gamma(shape) = Gamma(shape + 1) x U^(1/shape)
        log_gaps = np.log(rng.standard_gamma(shape + 1, requests + 1)) + np.log(uniform) / shape
    gaps = np.exp(log_gaps - log_gaps.max())
    times_s = window_start_s + np.cumsum(gaps)[:-1] * (WINDOW_S / gaps.sum())
    # If the last gap is tiny compared with the others, rounding could put requests at the end of the window.
    inside: Floats = np.minimum(times_s, np.nextafter(window_start_s + WINDOW_S, 0))
    return inside


def _lengths_window(time_s: float) -> int:
    return int(time_s // LENGTHS_WINDOW_S) * LENGTHS_WINDOW_S


def _check_part(start_s: float, duration_s: float, rate_scale: float, rate_rps: float | None) -> None:
    if not (math.isfinite(start_s) and start_s >= 0):
        raise TraceError(f"trace.start_s is {start_s}; it must be at least 0 s")
    if not (math.isfinite(duration_s) and duration_s > 0):
        raise TraceError(f"trace.duration_s is {duration_s}; it must be more than 0 s")
    if not (math.isfinite(rate_scale) and rate_scale > 0):
        raise TraceError(
            f"trace.rate_scale is {rate_scale}; it must be more than 0; 1 keeps the rates of the description"
        )
    if rate_rps is not None and not (math.isfinite(rate_rps) and rate_rps > 0):
        raise TraceError(f"trace.rate_rps is {rate_rps}; it must be more than 0, or null for the clients' own rates")


def _choose_clients(path: str | Path, folder: Path, clients: Sequence[int] | None, history: list[str]) -> list[int]:
    found: dict[str, set[int]] = {"trace.csv": set(), "dataset.json": set()}
    for file in folder.iterdir():
        match = re.fullmatch(r"chunk-(\d+)-(trace\.csv|dataset\.json)(\.gz)?", file.name)
        if match:
            found[match[2]].add(int(match[1]))
    complete = sorted(found["trace.csv"] & found["dataset.json"])
    if not complete:
        raise TraceError(
            f"{path} holds no client with both chunk-ID-trace.csv and chunk-ID-dataset.json; from {ORIGIN}"
        )
    if clients is None:
        without = sorted(found["trace.csv"] - found["dataset.json"])
        if without:
            history.append(f"left out clients {without}: they have no file with lengths")
        return complete
    unknown = sorted(set(clients) - set(complete))
    if unknown or not clients:
        what = f"client {unknown[0]} does not have both files in {path}" if unknown else f"clients of {path} is empty"
        raise TraceError(
            f"{what}; choose from the clients with both files, {', '.join(map(str, complete))}, or set "
            "trace.clients=null for all"
        )
    return sorted(set(clients))


def _client_file(path: str | Path, client: int, ending: str) -> str:
    plain = f"{path}/chunk-{client}-{ending}"
    return plain if find_data(plain).exists() else f"{plain}.gz"


def _windows(client: ServeGenClient, start_s: float, duration_s: float) -> list[int]:
    overlaps = (client.window_start_s + WINDOW_S > start_s) & (client.window_start_s < start_s + duration_s)
    return [int(i) for i in np.flatnonzero(overlaps & (client.rate_rps > 0))]


def _rate_factors(
    path: str | Path,
    clients: Sequence[ServeGenClient],
    start_s: float,
    duration_s: float,
    rate_scale: float,
    rate_rps: float | None,
) -> dict[float, float]:
    """Return the factor for all rates of a window, keyed by the start of the window in seconds."""
    totals: dict[float, float] = {}
    for client in clients:
        for window in _windows(client, start_s, duration_s):
            window_start_s = float(client.window_start_s[window])
            totals[window_start_s] = totals.get(window_start_s, 0.0) + float(client.rate_rps[window])
    end_s = max(float(client.window_start_s[-1]) + WINDOW_S for client in clients)
    if start_s + duration_s > end_s:
        raise TraceError(
            f"{path} describes 0 to {end_s:g} s, but start_s + duration_s is {start_s + duration_s:g} s; "
            "lower trace.start_s or trace.duration_s"
        )
    return {start: rate_scale if rate_rps is None else rate_rps / total for start, total in totals.items()}
