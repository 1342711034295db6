"""The windows of ``ServeTrace``, and which of them each split may use (conf/split/serve.yaml)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from agents.envs.prune_loads import SPLITS, Split, check_split
from agents.envs.serve_budgets import BUDGETS
from agents.envs.serve_requests import WindowRequests, cut
from agents.envs.serve_sources import load_source, serve_split, source_of, source_span_s, source_trace, sources
from sim.engine.protocol import Request
from sim.errors import ConfigError, nearest
from sim.types import Floats, Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What one episode serves: a window of a trace, sped up or slowed down, under one budget.

    source: name of the trace. start_s: start of the window in the trace, in seconds. rate: speed-up of arrivals.
    budget: kind of budget (``agents.envs.serve_budgets``). budget_seed: its seed.
    slowdown: real seconds of an iteration over the calibrated ones.
    low_bit_cost: factor on the loss, in nats, of layers at low precision.
    prompt_scale, output_scale: factors on the lengths of the requests (``Windows.arrays``).
    high_share, low_share, notice_s: memory of this window and how long before it a step is announced, in place of the
        scenario's (``agents.envs.serve_budgets``); None keeps that.
    low_bits: whether the server has low-precision copies of the weights.
    """

    source: str
    start_s: float
    rate: float
    budget: str
    budget_seed: int
    slowdown: float = 1.0
    low_bit_cost: float = 1.0
    prompt_scale: float = 1.0
    output_scale: float = 1.0
    high_share: float | None = None
    low_share: float | None = None
    notice_s: float | None = None
    low_bits: bool = True


FACTORS = ("slowdown", "low_bit_cost", "prompt_scale", "output_scale")
"""Fields of ``Window`` that randomization samples; it also widens ``rate``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """The split of traces (``agents.envs.serve_sources``), and of budgets by seed.

    budget_seeds: for each split, the first seed and the one after the last.
    window_s: length of an episode in seconds. max_total_tokens: longer requests are dropped.
    rates: for each source, lowest and highest speed-up. budgets: kinds of budgets.
    ranges: what ``randomized(True)`` samples: lowest and highest value of each of ``FACTORS``, and of a factor on rate.
    randomize: the ranges in use, empty for none. They change windows of the train split alone.
    """

    budget_seeds: Mapping[str, tuple[int, int]]
    window_s: float
    max_total_tokens: int
    rates: Mapping[str, tuple[float, float]]
    budgets: tuple[str, ...]
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    randomize: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def randomized(self, randomize: bool | Mapping[str, Sequence[float]]) -> Windows:
        """Return the same split whose training windows are randomized.

        Args:
            randomize: True takes all ranges of conf/split/serve.yaml, False none; a mapping holds ranges of its own.
        Raises:
            ConfigError: for an unknown name, or a range that is not 0 < low <= high.
        """
        if isinstance(randomize, bool):
            return replace(self, randomize=dict(self.ranges) if randomize else {})
        return replace(self, randomize=check_ranges(randomize))

    def span_s(self, source: str, split: Split) -> tuple[float, float]:
        """Return the start and end of a split in a source, in seconds of the trace."""
        return source_span_s(source, split)

    def at_load(self, low: float, high: float) -> Windows:
        """Return the same split with a narrower range of rates.

        Args:
            low, high: new limits as positions in each source's range, on a logarithmic scale: 0 is its lowest rate,
                1 its highest.
        Raises:
            ConfigError: unless 0 <= low <= high <= 1.
        """
        if not 0.0 <= low <= high <= 1.0:
            raise ConfigError(f"load is [{low}, {high}]; both values must lie in [0, 1] and must not descend")
        rates = {name: (a * (b / a) ** low, a * (b / a) ** high) for name, (a, b) in self.rates.items()}
        return replace(self, rates=rates)

    def sample(
        self,
        rng: np.random.Generator,
        split: Split,
        sources: Sequence[str],
        rate: float | None = None,
        budget: str | None = None,
    ) -> Window:
        """Return a random window; ``rate`` and ``budget`` fix these two instead of sampling them.

        In the train split, every range of ``randomize`` is sampled on a logarithmic scale.
        """
        source = sources[int(rng.integers(len(sources)))]
        ranges = self.randomize if split == "train" else {}
        factor = _log_uniform(rng, self.rates[source]) if rate is None else rate
        if "rate" in ranges and rate is None:
            factor *= _log_uniform(rng, ranges["rate"])
        begin_s, end_s = self.span_s(source, split)
        length_s = self.window_s * factor
        if length_s > end_s - begin_s:
            raise ConfigError(
                f"the {split} part of {source} is {end_s - begin_s:.0f} s long, but a window at rate {factor:.2f} "
                f"needs {length_s:.0f} s; shorten window_s in conf/split/serve.yaml, or lower the rate"
            )
        kind = self.budgets[int(rng.integers(len(self.budgets)))] if budget is None else budget
        first, last = self.budget_seeds[split]
        window = Window(
            source=source,
            start_s=float(rng.uniform(begin_s, end_s - length_s)),
            rate=factor,
            budget=kind,
            budget_seed=int(rng.integers(first, last)),
        )
        return replace(window, **self.factors(rng)) if ranges else window

    def factors(self, rng: np.random.Generator) -> dict[str, Any]:
        """Return sampled values of those fields of a window that are randomized."""
        return {name: _log_uniform(rng, self.randomize[name]) for name in FACTORS if name in self.randomize}

    def cut(self, window: Window, *, with_ids: bool = False) -> WindowRequests:
        """Return the requests of a window (``agents.envs.serve_requests``).

        Lengths are multiplied by the scales of the window and rounded, to at least 1 token. A request that would exceed
        ``max_total_tokens`` is shortened to it; its prompt and its output shrink by the same factor.

        Args:
            with_ids: whether to return the hash ids of prompts, for a prefix cache.
        """
        source = load_source(window.source)
        found = cut(
            source.trace,
            source.chains,
            start_s=window.start_s,
            rate=window.rate,
            window_s=self.window_s,
            from_s=source.from_s(window.start_s),
            with_ids=with_ids,
        )
        if (window.prompt_scale, window.output_scale) == (1.0, 1.0):
            return found
        prompts, outputs = _scaled_lengths(window, found.prompt_tokens, found.output_tokens, self.max_total_tokens)
        return replace(found, prompt_tokens=prompts, output_tokens=outputs)

    def arrays(self, window: Window) -> tuple[Floats, Ints, Ints]:
        """Return arrival_s (0 is the start of the window), prompt_tokens and output_tokens of a window's requests."""
        found = self.cut(window)
        return found.arrival_s, found.prompt_tokens, found.output_tokens

    def requests(self, window: Window) -> list[Request]:
        """Return the requests of a window, without their sessions."""
        columns = (column.tolist() for column in self.arrays(window))
        return [
            Request(request_id=i, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
            for i, (arrival_s, prompt, output) in enumerate(zip(*columns, strict=True))
        ]


def _log_uniform(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    return math.exp(rng.uniform(math.log(limits[0]), math.log(limits[1])))


def _scaled_lengths(window: Window, prompts: Ints, outputs: Ints, max_total_tokens: int) -> tuple[Ints, Ints]:
    """Return the lengths of requests times the scales of a window (``Windows.arrays``)."""
    prompt, output = prompts * window.prompt_scale, outputs * window.output_scale
    shrink = np.minimum(1.0, max_total_tokens / (prompt + output))
    # A long prompt leaves at least one token of the context to the output.
    prompt = np.clip(np.rint(prompt * shrink), 1, max_total_tokens - 1).astype(np.int64)
    output = np.minimum(np.maximum(np.rint(output * shrink), 1).astype(np.int64), max_total_tokens - prompt)
    return prompt, output


def check_ranges(ranges: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    """Return ranges of randomization as pairs of numbers.

    Raises:
        ConfigError: for an unknown name, or a range that is not 0 < low <= high.
    """
    found = {}
    for name, limits in ranges.items():
        if name not in (*FACTORS, "rate"):
            raise ConfigError(f"randomize: there is no range {name!r}; {nearest(str(name), (*FACTORS, 'rate'))}")
        try:
            low, high = (float(limit) for limit in limits)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"randomize.{name} is {limits!r}; it must be two numbers, lowest and highest ({error})"
            ) from error
        if not 0 < low <= high < math.inf:
            raise ConfigError(f"randomize.{name} is [{low}, {high}]; both must be above 0 and must not descend")
        found[str(name)] = (low, high)
    return found


@cache
def serve_windows() -> Windows:
    """Read the split.

    Raises:
        ConfigError: if the file is malformed, or its parts overlap.
    """
    value = serve_split()
    try:
        windows = Windows(
            budget_seeds={name: (int(a), int(b)) for name, (a, b) in value["budget_seeds"].items()},
            window_s=float(value["window_s"]),
            max_total_tokens=int(value["max_total_tokens"]),
            rates={name: source.rate for name, source in sources().items()},
            budgets=tuple(value["budgets"]),
            ranges=check_ranges(value["randomize"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"conf/split/serve.yaml is not a valid split of windows ({type(error).__name__}: {error})"
        ) from error
    seeds = windows.budget_seeds
    if {*seeds} != {*SPLITS} or any(b[0] < a[1] for a, b in pairwise(sorted(seeds.values()))):
        raise ConfigError(
            f"conf/split/serve.yaml: budget_seeds must have train, validation and test that do not overlap, but are "
            f"{dict(seeds)}"
        )
    return windows


def as_window(value: Window | Mapping[str, Any]) -> Window:
    """Return a window, or one made of its fields.

    Raises:
        ConfigError: for a field that is missing, unknown or out of range.
    """
    try:
        window = value if isinstance(value, Window) else Window(**value)
        check_sources([window.source])
        if window.budget not in BUDGETS:
            raise ValueError(f"there is no budget {window.budget!r}; {nearest(window.budget, BUDGETS)}")
        if not (0 <= window.start_s < math.inf and 0 < window.rate < math.inf):
            raise ValueError(f"start_s must be at least 0 and rate above, but are {window.start_s} and {window.rate}")
        if isinstance(window.budget_seed, bool) or not isinstance(window.budget_seed, int) or window.budget_seed < 0:
            raise ValueError(f"budget_seed is {window.budget_seed}; it must be a whole number of at least 0")
        for name in FACTORS:
            factor = getattr(window, name)
            if isinstance(factor, bool) or not 0 < factor < math.inf:
                raise ValueError(f"{name} is {factor}; it must be a finite number above 0")
        for name in ("high_share", "low_share", "notice_s"):
            amount = getattr(window, name)
            if amount is not None and not 0 <= amount < math.inf:
                raise ValueError(f"{name} is {amount}; it must be a finite number of at least 0, or None")
        if not isinstance(window.low_bits, bool):
            raise ValueError(f"low_bits is {window.low_bits!r}; it must be true or false")
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{value!r} is no window ({error})") from error
    return window


def check_sources(names: Sequence[str], key: str = "sources") -> tuple[str, ...]:
    """Return the sources as a tuple.

    Args:
        key: the configuration's name for them.
    Raises:
        ConfigError: for an empty list, a name that it has twice, or one that conf/split/serve.yaml does not have.
    """
    for name in names:
        source_of(name)
    if not names:
        raise ConfigError(f"{key} is empty; name at least one, such as {key}=[burst]")
    if twice := [name for name in dict.fromkeys(names) if list(names).count(name) > 1]:
        raise ConfigError(f"{key} has {', '.join(twice)} more than once; name each trace once")
    return tuple(names)


__all__ = [
    "Window",
    "Windows",
    "as_window",
    "check_sources",
    "check_split",
    "serve_windows",
    "source_trace",
]
