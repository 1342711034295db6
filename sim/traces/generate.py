"""Traces that need no file: arrival processes, length distributions, and the built-in default ``burst``.

An arrival process is ``f(rng, **parameters) -> arrival_s``, sorted seconds in [0, duration_s). A length distribution is
``f(rng, requests) -> (prompt_tokens, output_tokens)``. A generator combines the two with a seed. Each has its own
stream of random numbers, so a different rate does not change the lengths of the first requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml

from sim.errors import TraceError, WorkloadError, nearest
from sim.limits import MOST_REQUESTS, check_count
from sim.paths import REPOSITORY
from sim.traces.trace import Trace
from sim.traces.transforms import merge
from sim.types import Floats, Ints

Arrivals = Callable[[np.random.Generator], Floats]
Lengths = Callable[[np.random.Generator, int], tuple[Ints, Ints]]
Kind = Literal["conv", "code", "mix"]

TABLES = REPOSITORY / "conf" / "trace" / "tables"
TABLE_OF_KIND = {"code": "azure_code", "conv": "azure_conv"}


# Arrival processes


def poisson_arrivals(rng: np.random.Generator, *, rate_rps: float, duration_s: float) -> Floats:
    """Return arrivals of a Poisson process: independent exponential gaps with mean 1 / rate_rps."""
    _check_positive(rate_rps=rate_rps, duration_s=duration_s)
    _check_requests(rate_rps * duration_s)
    # Given their number, the arrivals of a Poisson process are uniform.
    return np.sort(rng.random(rng.poisson(rate_rps * duration_s))) * duration_s


def gamma_arrivals(rng: np.random.Generator, *, rate_rps: float, cv: float, duration_s: float) -> Floats:
    """Return arrivals with independent Gamma gaps of mean 1 / rate_rps and coefficient of variation ``cv``.

    CV 1 is a Poisson process. Above 1, requests come in clusters; below 1, they are evenly spaced. The first gap starts
    at time 0 and is random like the others.

    Source:
        AlpaServe (OSDI 2023), section 6.2, and BurstGPT (arXiv 2401.17644), section 4: shape 1 / cv^2.
    """
    _check_positive(rate_rps=rate_rps, cv=cv, duration_s=duration_s)
    if not 0.01 <= cv <= 100:
        raise WorkloadError(f"cv is {cv}; it must be from 0.01 (evenly spaced) to 100, beyond which gaps underflow")
    _check_requests(rate_rps * duration_s)
    shape = 1 / cv**2
    batch = 64 + math.ceil(1.1 * rate_rps * duration_s)
    arrival_s = np.cumsum(rng.gamma(shape, 1 / (shape * rate_rps), size=batch))
    while arrival_s[-1] < duration_s:
        more = rng.gamma(shape, 1 / (shape * rate_rps), size=batch)
        arrival_s = np.concatenate([arrival_s, arrival_s[-1] + np.cumsum(more)])
    return arrival_s[arrival_s < duration_s]


def mmpp_arrivals(
    rng: np.random.Generator,
    *,
    on_rate_rps: float,
    off_rate_rps: float,
    mean_on_s: float,
    mean_off_s: float,
    duration_s: float,
) -> Floats:
    """Return arrivals of a Markov-modulated Poisson process with two states, on (a burst) and off.

    The time in each state is exponential. The first state is random, with the long-run share of each state, so that
    the mean rate is (on_rate x mean_on + off_rate x mean_off) / (mean_on + mean_off) from the start.

    Source:
        Fischer and Meier-Hellstern, The Markov-modulated Poisson process cookbook (Performance Evaluation 1993).
    """
    _check_positive(on_rate_rps=on_rate_rps, mean_on_s=mean_on_s, mean_off_s=mean_off_s, duration_s=duration_s)
    if not (math.isfinite(off_rate_rps) and off_rate_rps >= 0):
        raise WorkloadError(f"off_rate_rps is {off_rate_rps}; it must be at least 0")
    _check_requests(max(on_rate_rps, off_rate_rps) * duration_s)
    _check_requests(duration_s / min(mean_on_s, mean_off_s), what="state changes")
    on = bool(rng.random() < mean_on_s / (mean_on_s + mean_off_s))
    start_s = 0.0
    parts = []
    while start_s < duration_s:
        stay_s = rng.exponential(mean_on_s if on else mean_off_s)
        in_state_s = min(stay_s, duration_s - start_s)
        requests = rng.poisson((on_rate_rps if on else off_rate_rps) * in_state_s)
        parts.append(start_s + np.sort(rng.random(requests)) * in_state_s)
        start_s += stay_s
        on = not on
    return np.concatenate(parts)


def diurnal_arrivals(
    rng: np.random.Generator,
    *,
    rate_rps: float,
    amplitude: float,
    duration_s: float,
    period_s: float = 86_400.0,
    peak_s: float = 50_400.0,
) -> Floats:
    """Return arrivals of a Poisson process whose rate follows the day as a cosine.

    rate(t) = rate_rps x (1 + amplitude x cos(2 pi (t - peak_s) / period_s)).

    Args:
        rate_rps: mean over a period.
        amplitude: 0 is a constant rate; at 1, the rate falls to 0 once a period.
        period_s: a day; set a shorter one to see several periods in a short run.
        peak_s: time of the highest rate; 14:00 by default.
    """
    _check_positive(rate_rps=rate_rps, duration_s=duration_s, period_s=period_s)
    if not 0 <= amplitude <= 1:
        raise WorkloadError(f"amplitude is {amplitude}; it must be from 0 (constant) to 1 (falls to nothing)")
    # Thinning: generate at the highest rate; keep each request with probability rate(t) / highest rate.
    candidates_s = poisson_arrivals(rng, rate_rps=rate_rps * (1 + amplitude), duration_s=duration_s)
    share = (1 + amplitude * np.cos(2 * np.pi * (candidates_s - peak_s) / period_s)) / (1 + amplitude)
    return candidates_s[rng.random(len(candidates_s)) < share]


# Length distributions


def fixed_lengths(
    rng: np.random.Generator, requests: int, *, prompt_tokens: int, output_tokens: int
) -> tuple[Ints, Ints]:
    """Return the same prompt and output length for every request."""
    _check_positive(prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    return np.full(requests, prompt_tokens, dtype=np.int64), np.full(requests, output_tokens, dtype=np.int64)


def lognormal_lengths(
    rng: np.random.Generator,
    requests: int,
    *,
    prompt_tokens_p50: float,
    prompt_sigma: float,
    output_tokens_p50: float,
    output_sigma: float,
    max_prompt_tokens: int = 32_768,
    max_output_tokens: int = 32_768,
) -> tuple[Ints, Ints]:
    """Return independent log-normal lengths, rounded, from 1 token to the limits."""
    _check_positive(prompt_tokens_p50=prompt_tokens_p50, output_tokens_p50=output_tokens_p50)
    _check_positive(max_prompt_tokens=max_prompt_tokens, max_output_tokens=max_output_tokens)
    if not (prompt_sigma >= 0 and output_sigma >= 0):
        raise WorkloadError(f"prompt_sigma={prompt_sigma}, output_sigma={output_sigma}: both must be at least 0")

    def draw(p50: float, sigma: float, limit: int) -> Ints:
        # exp() of a large number is infinite; applying the limit to the logarithm keeps it finite.
        log_tokens = np.minimum(math.log(p50) + sigma * rng.standard_normal(requests), math.log(limit))
        return np.clip(np.rint(np.exp(log_tokens)), 1, limit).astype(np.int64)

    prompt_tokens = draw(prompt_tokens_p50, prompt_sigma, max_prompt_tokens)
    return prompt_tokens, draw(output_tokens_p50, output_sigma, max_output_tokens)


def table_lengths(rng: np.random.Generator, requests: int, *, table: str = "azure_conv") -> tuple[Ints, Ints]:
    """Return lengths from the quantile table of a real trace.

    Prompt and output are independent: in the real traces their rank correlation is -0.01 (code) and 0.05
    (conversation).

    Args:
        table: azure_conv, azure_code, or the path of a file written by ``sim.fit_trace``.
    """
    fitted = load_table(table)
    prompt, output = fitted.prompt_tokens.draw(rng, requests), fitted.output_tokens.draw(rng, requests)
    return np.rint(prompt).astype(np.int64), np.rint(output).astype(np.int64)


# Generators


def poisson(*, rate_rps: float, duration_s: float, lengths: Lengths = table_lengths, seed: int = 0) -> Trace:
    """Return a trace with Poisson arrivals; see ``poisson_arrivals``.

    Args (of this and the other generators):
        rate_rps: mean requests a second.
        duration_s: requests arrive in [0, duration_s).
        lengths: a distribution of this module with its parameters bound (``functools.partial``); by default that of
            the Azure conversation trace.
        seed: the same seed gives the same trace.
    Raises:
        WorkloadError: if a number is out of range, or so small that no request arrives.
    """
    arrivals = partial(poisson_arrivals, rate_rps=rate_rps, duration_s=duration_s)
    return generate("poisson", arrivals, lengths, seed=seed)


def gamma(*, rate_rps: float, cv: float, duration_s: float, lengths: Lengths = table_lengths, seed: int = 0) -> Trace:
    """Return a trace with Gamma gaps of the given CV; see ``gamma_arrivals`` and ``poisson``."""
    arrivals = partial(gamma_arrivals, rate_rps=rate_rps, cv=cv, duration_s=duration_s)
    return generate("gamma", arrivals, lengths, seed=seed)


def mmpp(
    *,
    on_rate_rps: float,
    off_rate_rps: float,
    mean_on_s: float,
    mean_off_s: float,
    duration_s: float,
    lengths: Lengths = table_lengths,
    seed: int = 0,
) -> Trace:
    """Return a trace with bursts that start and end at random times; see ``mmpp_arrivals`` and ``poisson``."""
    arrivals = partial(
        mmpp_arrivals,
        on_rate_rps=on_rate_rps,
        off_rate_rps=off_rate_rps,
        mean_on_s=mean_on_s,
        mean_off_s=mean_off_s,
        duration_s=duration_s,
    )
    return generate("mmpp", arrivals, lengths, seed=seed)


def diurnal(
    *,
    rate_rps: float,
    amplitude: float,
    duration_s: float,
    period_s: float = 86_400.0,
    peak_s: float = 50_400.0,
    lengths: Lengths = table_lengths,
    seed: int = 0,
) -> Trace:
    """Return a trace whose rate follows the time of day; see ``diurnal_arrivals`` and ``poisson``."""
    arrivals = partial(
        diurnal_arrivals,
        rate_rps=rate_rps,
        amplitude=amplitude,
        duration_s=duration_s,
        period_s=period_s,
        peak_s=peak_s,
    )
    return generate("diurnal", arrivals, lengths, seed=seed)


def generate(name: str, arrivals: Arrivals, lengths: Lengths, *, seed: int = 0) -> Trace:
    """Return the trace of an arrival process and a length distribution, with a random stream for each.

    Raises:
        WorkloadError: if no request arrives.
    """
    _check_seed(seed)
    arrivals_rng, lengths_rng = np.random.default_rng(seed).spawn(2)
    arrival_s = arrivals(arrivals_rng)
    if len(arrival_s) == 0:
        raise WorkloadError(f"{name} with {_shown(arrivals)} makes no request; raise its rate or trace.duration_s")
    prompt_tokens, output_tokens = lengths(lengths_rng, len(arrival_s))
    return Trace(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        name=name,
        source=f"sim.traces.generate.{name}",
        history=(f"generated {len(arrival_s):,} requests: {_shown(arrivals)}; {_shown(lengths)}; seed={seed}",),
    )


# The built-in default


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution as quantiles: ``value[i]`` is the value below which ``share[i]`` of all samples lie."""

    share: Floats
    value: Floats

    def draw(self, rng: np.random.Generator, size: int) -> Floats:
        """Return random samples, interpolated linearly between the quantiles."""
        drawn: Floats = np.interp(rng.random(size), self.share, self.value)
        return drawn


@dataclass(frozen=True, slots=True)
class TraceTable:
    """The statistics of a real trace that ``sim.fit_trace`` writes.

    bin_s, requests_per_bin: the number of requests in each bin of the trace, in order; this is its rate over time.
    gap_s: gaps between requests of the same bin.
    """

    name: str
    bin_s: float
    requests_per_bin: Ints
    gap_s: Quantiles
    prompt_tokens: Quantiles
    output_tokens: Quantiles

    @property
    def rate_rps(self) -> float:
        """Mean requests a second over all bins."""
        return float(self.requests_per_bin.mean() / self.bin_s)


@lru_cache(maxsize=8)
def load_table(table: str) -> TraceTable:
    """Return a fitted table by its name in conf/trace/tables, or by the path of a file written by ``sim.fit_trace``.

    Raises:
        TraceError: if there is no such table, or the file is not a valid table.
    """
    path = TABLES / f"{table}.yaml"
    if not path.exists():
        path = Path(table)
    if not path.is_file():
        names = [file.stem for file in TABLES.glob("*.yaml")]
        raise TraceError(
            f"there is no table {table!r}; {nearest(table, names)}, or give the path of a file written by sim.fit_trace"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        fitted = TraceTable(
            name=str(content["name"]),
            bin_s=float(content["bin_s"]),
            requests_per_bin=np.array(content["requests_per_bin"], dtype=np.int64),
            gap_s=_quantiles(content["gap_s"]),
            prompt_tokens=_quantiles(content["prompt_tokens"]),
            output_tokens=_quantiles(content["output_tokens"]),
        )
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise TraceError(
            f"{path} is not a table of sim.fit_trace ({error!r}); write it again with that command"
        ) from error
    counts = fitted.requests_per_bin
    if not (fitted.bin_s > 0 and len(counts) > 0 and counts.min() >= 0 and counts.max() > 0):
        raise TraceError(f"{path}: bin_s must be more than 0 and requests_per_bin counts from 0, not all 0")
    return fitted


def table_arrivals(
    rng: np.random.Generator,
    *,
    table: str,
    duration_s: float,
    rate_rps: float | None = None,
    shuffle_s: float | None = None,
    part: tuple[float, float] = (0.0, 1.0),
) -> Floats:
    """Return arrivals with the rate over time, and the gaps, of a real trace.

    The table holds the number of requests in each bin of a few seconds. The random generator chooses the first bin;
    after the last bin the first follows. Gaps within a bin are sampled from the real gaps within bins. If they do not
    fit the bin, they are shrunk; if they do, the requests start at a random time in the bin. Bursts and pauses longer
    than a bin are therefore those of the real trace, in their real order; everything finer is random.

    Args:
        duration_s: may exceed the real trace; its rate over time then repeats.
        rate_rps: mean rate over the full table; None takes the real one. Counts are scaled; a fraction of a request
            becomes one request with that probability.
        shuffle_s: takes pieces of this length of the real trace in random order, for more variety than one order
            of its bursts; None keeps the order.
        part: which bins to use, as shares of the real trace's duration; after the last of them the first follows.
    Raises:
        WorkloadError: if a number is out of range.
    """
    fitted = _part_of(load_table(table), part)
    _check_positive(duration_s=duration_s)
    scale = 1.0
    if rate_rps is not None:
        _check_positive(rate_rps=rate_rps)
        scale = rate_rps / load_table(table).rate_rps
    _check_requests(fitted.rate_rps * scale * duration_s)
    _check_requests(duration_s / fitted.bin_s, what="bins")
    bins = math.ceil(duration_s / fitted.bin_s)
    order = _order_of_bins(rng, fitted, bins, shuffle_s)
    expected = fitted.requests_per_bin[order] * scale
    counts = np.floor(expected + rng.random(bins)).astype(np.int64)
    arrival_s = _fill_bins(rng, fitted, counts, scale)
    return arrival_s[arrival_s < duration_s]


def burst(
    *,
    kind: Kind = "mix",
    duration_s: float = 600.0,
    rate_rps: float | None = None,
    shuffle_s: float | None = None,
    part: Sequence[float] = (0.0, 1.0),
    seed: int = 0,
) -> Trace:
    """Return the built-in default: a trace like the Azure traces of 2023, from tables fitted to them.

    Args:
        kind: "code" is like Azure's code trace (bursts of 70 requests a second, pauses of minutes, long prompts, short
            outputs), "conv" like its conversation trace (close to Poisson), "mix" like both at once on one service.
        duration_s: requests arrive in [0, duration_s).
        rate_rps: mean rate; None takes the real one (3.0 code, 5.9 conv, 8.9 mix). "mix" keeps its proportions.
        shuffle_s, part: see ``table_arrivals``. With a part, ``rate_rps`` is still the mean over the full tables.
        seed: chooses where in the real rate over time the trace starts, and everything random within bins.
    Raises:
        WorkloadError: if a number is out of range, or no request arrives.
    Source:
        Azure/AzurePublicDataset at b469a113cedca53ddc3bdea71a143dc4b7d8700c, CC-BY 4.0; Patel et al., Splitwise
        (ISCA 2024).
    """
    if kind not in get_args(Kind):
        raise WorkloadError(f"trace.kind is {kind!r}; {nearest(str(kind), get_args(Kind))}")
    tables = list(TABLE_OF_KIND.values()) if kind == "mix" else [TABLE_OF_KIND[kind]]
    _check_seed(seed)
    bins: dict[str, Any] = {} if tuple(part) == (0.0, 1.0) else {"part": tuple(part)}
    natural_rps = sum(load_table(table).rate_rps for table in tables)
    scale = 1.0 if rate_rps is None else rate_rps / natural_rps
    if not (math.isfinite(scale) and scale > 0):
        raise WorkloadError(f"trace.rate_rps is {rate_rps}; it must be more than 0, or null for the real rate")
    parts: list[Trace] = []
    for table in tables:
        # Each table has its own random stream: in a mix, the two start at unrelated bins.
        part_seed = int(np.random.SeedSequence([seed, list(TABLE_OF_KIND.values()).index(table)]).generate_state(1)[0])
        arrivals = partial(
            table_arrivals,
            table=table,
            duration_s=duration_s,
            rate_rps=load_table(table).rate_rps * scale,
            shuffle_s=shuffle_s,
            **bins,
        )
        parts.extend(_generate_unless_idle(table, arrivals, partial(table_lengths, table=table), seed=part_seed))
    if not parts:
        raise WorkloadError(
            f"no request in {duration_s:g} s at seed {seed}; raise trace.duration_s or trace.rate_rps, or change seed"
        )
    merged = merge(parts)
    return Trace(
        arrival_s=merged.arrival_s,
        prompt_tokens=merged.prompt_tokens,
        output_tokens=merged.output_tokens,
        name=f"burst_{kind}",
        source="sim.traces.generate.burst",
        history=(*(merged.history if len(parts) > 1 else parts[0].history), f"burst kind={kind}, seed={seed}"),
    )


def _generate_unless_idle(name: str, arrivals: Arrivals, lengths: Lengths, *, seed: int) -> list[Trace]:
    # The code trace pauses for minutes: in a short mix it may have no request.
    try:
        return [generate(name, arrivals, lengths, seed=seed)]
    except WorkloadError as error:
        if "makes no request" in str(error):
            return []
        raise


def _part_of(fitted: TraceTable, part: tuple[float, float]) -> TraceTable:
    """Return the table with the bins of a part of the trace alone; gaps and lengths stay those of the full trace."""
    low, high = part
    if not 0.0 <= low < high <= 1.0:
        raise WorkloadError(f"part is [{low}, {high}]; it must be two shares, 0 <= from < to <= 1, such as [0.0, 0.5]")
    count = len(fitted.requests_per_bin)
    # A bin belongs to the part in which it ends, so that two parts never share one.
    bins = fitted.requests_per_bin[math.floor(low * count) : math.floor(high * count)]
    if not bins.any():
        raise WorkloadError(f"part [{low}, {high}] of {fitted.name} has no request; choose a longer one")
    return replace(fitted, requests_per_bin=bins)


def _order_of_bins(rng: np.random.Generator, fitted: TraceTable, bins: int, shuffle_s: float | None) -> Ints:
    total = len(fitted.requests_per_bin)
    if shuffle_s is None:
        return (int(rng.integers(total)) + np.arange(bins)) % total
    _check_positive(shuffle_s=shuffle_s)
    piece = max(1, round(shuffle_s / fitted.bin_s))
    starts = rng.integers(total, size=math.ceil(bins / piece))
    return ((starts[:, None] + np.arange(piece)) % total).ravel()[:bins]


def _fill_bins(rng: np.random.Generator, fitted: TraceTable, counts: Ints, scale: float) -> Floats:
    """Return sorted arrivals, ``counts[i]`` of them in bin i."""
    requests = int(counts.sum())
    bin_of = np.repeat(np.arange(len(counts)), counts)
    # The gaps of the table are for scale 1; more requests are closer together.
    gaps_s = fitted.gap_s.draw(rng, requests) / scale
    first = np.cumsum(counts) - counts
    gaps_s[first[counts > 0]] = 0.0  # the first request of a bin has no gap before it in that bin
    since_start_s = np.cumsum(gaps_s)
    since_first_s = since_start_s - since_start_s[first[bin_of]]
    span_s = np.zeros(len(counts))
    span_s[counts > 0] = since_first_s[(first + counts - 1)[counts > 0]]
    # n requests span the bin less half a mean gap (bin_s / n), which is left for its two edges.
    full_s = fitted.bin_s * (counts - 0.5) / np.maximum(counts, 1)
    factor = full_s / np.maximum(span_s, 1e-12)
    # Between two bins with requests the real process continues across the edges, so the requests fill the bin. Next
    # to an empty bin a burst begins or ends: its gaps stay as sampled unless they do not fit.
    busy = np.concatenate(([True], counts > 0, [True]))
    begins_or_ends = ~(busy[:-2] & busy[2:])
    factor[begins_or_ends] = np.minimum(factor[begins_or_ends], 1.0)
    factor[counts < 2] = 1.0
    free_s = fitted.bin_s - span_s * factor
    start_s = np.arange(len(counts)) * fitted.bin_s + rng.random(len(counts)) * free_s
    return np.maximum.accumulate(start_s[bin_of] + since_first_s * factor[bin_of])


def _quantiles(content: dict[str, Any]) -> Quantiles:
    share, value = np.array(content["share"], dtype=np.float64), np.array(content["value"], dtype=np.float64)
    rising = len(share) == len(value) >= 2 and (np.diff(share) > 0).all() and (np.diff(value) >= 0).all()
    if not rising or share[0] != 0 or share[-1] != 1 or not np.isfinite(value).all() or value[0] < 0:
        raise ValueError("share must rise from 0 to 1 and value must not fall, one value for each share")
    return Quantiles(share, value)


def _check_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not (math.isfinite(value) and value > 0):
            raise WorkloadError(f"{name} is {value}; it must be a finite number above 0")


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise WorkloadError(f"seed is {seed}; it must be a whole number from 0")


def _check_requests(expected: float, *, what: str = "requests") -> None:
    check_count(expected, what, MOST_REQUESTS, "lower its rate or duration_s (keys of trace)", WorkloadError)


def _shown(function: Any) -> str:
    if isinstance(function, partial):
        numbers = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in function.keywords.items())
        return f"{function.func.__name__}({numbers})"
    return str(getattr(function, "__name__", function))
