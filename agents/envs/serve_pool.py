"""Windows at loads that are neither light nor hopeless, on servers of many speeds and sizes.

A policy learns little from a window in which every plan serves all requests in time, or none does. Randomization makes
most windows such: a machine that is twice as slow, or has a sixth of the memory, carries another load. So each window
of the pool gets the rate at which a plain reference (4-bit weights; greedy_stop where there are no low-precision
copies), with a limit of the wait, reaches a share of requests in time that is sampled first.

The pool is the same for equal arguments. It is kept in runs/pool, because it takes minutes to make.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.envs.prune_loads import SPLITS, Split
from agents.envs.serve_sources import own_sources, serve_split, sources_with
from agents.envs.serve_windows import Window
from sim.config import build_option
from sim.errors import ConfigError, nearest
from sim.paths import REPOSITORY
from sim.policies.admission import Limited
from sim.policies.base import Policy, PolicyContext
from sim.progress import progress
from sim.results.metrics import met_slo
from sim.results.run_folder import write_json

if TYPE_CHECKING:
    from agents.envs.serve import ServeSetting

FOLDER = REPOSITORY / "runs" / "pool"
REFERENCE_WAIT_S = 1.5
STEPS = 5
"""Plays with which the rate of a window is searched."""
FACTOR = 16.0
"""A window's rate lies between its source's lowest rate over this and its highest rate times this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """How the windows of a pool are made.

    size: training windows. validation: windows of the validation split, of every source that it may use.
    seed: of all that is sampled.
    attained: lowest and highest share of requests that the reference serves in time.
    high_share: range of the most memory, in multiples of the dense weights, sampled on a logarithmic scale; the dense
        model must fit the least of it, because a window begins with that.
    low_of_high: range of the least memory, as a share of the most.
    memories: servers that are there more often, as (most, least) memory in multiples of the dense weights; ``named`` is
        the share of windows on one of them.
    low_bits: share of windows whose server has low-precision copies.
    budgets: kinds of budgets, in equal shares; empty for those of the split.
    notices_s: how long before it a step of the budget is announced; training samples one of these for each episode.
    """

    size: int
    validation: int = 120
    seed: int = 0
    attained: tuple[float, float] = (0.5, 0.97)
    high_share: tuple[float, float] = (1.17, 5.343)
    low_of_high: tuple[float, float] = (0.33, 1.0)
    memories: tuple[tuple[float, float], ...] = ()
    named: float = 0.0
    low_bits: float = 0.75
    budgets: tuple[str, ...] = ()
    notices_s: tuple[float, ...] = (0.0, 0.0, 5.0, 15.0)


def pool_options(value: Mapping[str, Any] | None) -> PoolOptions | None:
    """Return the options of a configuration; None for no pool.

    Raises:
        ConfigError: for an unknown option, or values out of range.
    """
    if not value:
        return None
    try:
        given: dict[str, Any] = {key: tuple(of) if isinstance(of, list | tuple) else of for key, of in value.items()}
        given["memories"] = tuple((float(high), float(low)) for high, low in given.get("memories", ()))
        options = PoolOptions(**given)
        ordered = all(0 < low <= high for low, high in (options.attained, options.high_share, options.low_of_high))
        ordered &= all(0 < low <= high for high, low in options.memories)
        shares = (options.named if options.memories else 0.0, options.low_bits, *options.attained, *options.low_of_high)
        counted = min(options.size, options.validation) >= 1 and options.seed >= 0
        counted &= bool(options.notices_s) and min(options.notices_s) >= 0
        if not (counted and ordered and all(0 <= share <= 1 for share in shares)):
            raise ValueError(
                "size and validation must be at least 1, seed at least 0, ranges ascend from above 0, shares lie in "
                "[0, 1], and notices_s holds at least one time, none below 0"
            )
        kinds = serve_split()["budgets"]
        if unknown := [kind for kind in options.budgets if kind not in kinds]:
            raise ValueError(f"budgets has {unknown[0]!r}; {nearest(unknown[0], kinds)}")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"pool is {dict(value)}: {error}") from error
    return options


def window_pool(setting: ServeSetting, options: PoolOptions, split: Split) -> tuple[Window, ...]:
    """Return the windows of a pool; read from runs/pool if it was made before."""
    rng = np.random.default_rng([options.seed, SPLITS.index(split)])
    size = options.size if split == "train" else options.validation
    # In training the sources of the setting. In others all that the split may use, or those for this model alone.
    sources = setting.sources if split == "train" else own_sources(setting.sources) or sources_with(split)[0]
    path = FOLDER / f"{split}_{_key(setting, options, sources)}.json"
    if path.is_file():
        return tuple(Window(**row) for row in json.loads(path.read_text(encoding="utf-8")))
    windows: list[Window] = []
    with progress(f"choosing {split} windows", size, "windows") as report:
        while len(windows) < size:
            # Sources take turns, so that all are there in equal numbers.
            window = _sampled(setting, options, rng, split, sources[len(windows) % len(sources)])
            found = at_attainment(setting, window, split, float(rng.uniform(*options.attained)))
            if found is not None:
                windows.append(found)
                report(len(windows))
    write_json(path, [asdict(window) for window in windows])
    return tuple(windows)


def _sampled(
    setting: ServeSetting, options: PoolOptions, rng: np.random.Generator, split: Split, source: str
) -> Window:
    """Return a window of a source, on a server of some speed and some memory."""
    # The rate is searched later; the lowest makes the shortest window, which fits every part.
    lowest = setting.windows.rates[source][0]
    budget = options.budgets[int(rng.integers(len(options.budgets)))] if options.budgets else None
    window = setting.windows.sample(rng, split, (source,), rate=lowest / FACTOR, budget=budget)
    window = replace(window, **setting.windows.factors(rng))
    low_bits = bool(rng.random() < options.low_bits)
    named = bool(rng.random() < options.named) and bool(options.memories)
    high_share = math.exp(rng.uniform(*np.log(options.high_share)))
    low_share = high_share * float(rng.uniform(*options.low_of_high))
    if named:
        high_share, low_share = options.memories[int(rng.integers(len(options.memories)))]
    return replace(window, low_bits=low_bits, high_share=high_share, low_share=low_share)


def at_attainment(setting: ServeSetting, window: Window, split: Split, attained: float) -> Window | None:
    """Return the window at the rate at which the reference serves this share in time, or None if there is none.

    The search halves the range of rates on a logarithmic scale ``STEPS`` times; the result is the last rate tried.
    """
    low, high = setting.windows.rates[window.source]
    begin_s, end_s = setting.windows.span_s(window.source, split)
    low, high = low / FACTOR, min(high * FACTOR, 0.95 * (end_s - begin_s) / setting.windows.window_s)
    place = (window.start_s - begin_s) / (end_s - begin_s)
    for _ in range(STEPS):
        rate = math.sqrt(low * high)
        length_s = setting.windows.window_s * rate
        window = replace(window, rate=rate, start_s=begin_s + place * (end_s - begin_s - length_s))
        share = reference_attainment(setting, window)
        if share is None or share > attained:
            low = rate
        else:
            high = rate
    share = reference_attainment(setting, window)
    return window if share is not None and 0.02 < share < 0.999 else None


def reference_attainment(setting: ServeSetting, window: Window) -> float | None:
    """Return the share of a window's requests that the reference serves in time; None without requests."""
    requests = len(setting.windows.arrays(window)[0])
    if not requests:
        return None
    policy = reference_policy(setting, window)
    engine = setting.build_engine(window, policy.first_plan)
    for tick in range(1, setting.ticks):
        engine.apply(policy(engine.run_until(tick * setting.tick_s)))
    engine.run_until(math.inf)
    return float(met_slo(engine.records(), setting.slo).sum()) / requests


def reference_policy(setting: ServeSetting, window: Window) -> Policy:
    """Return what the load of a window is measured with."""
    context = PolicyContext.of(setting.server)
    if window.low_bits and any(setting.actions.low):
        policy: Policy = _policy_maker("int4", "{}")(context)
    else:
        order = {"order": setting.action_options["order"], "made_for": None}
        policy = _policy_maker("greedy_stop", json.dumps(order))(context)
    return Limited(policy, None, REFERENCE_WAIT_S)


@lru_cache(maxsize=8)
def _policy_maker(name: str, changed: str) -> Callable[[PolicyContext], Policy]:
    """Return what makes a policy of conf/policy with changed keys, in JSON.

    Reading its file takes as long as serving a window, and a pool needs it thousands of times.
    """
    maker: Callable[[PolicyContext], Policy] = build_option("policy", name, json.loads(changed))
    return maker


def _key(setting: ServeSetting, options: PoolOptions, sources: Sequence[str]) -> str:
    """Return a name for everything that a pool depends on, except the code."""
    split = {key: value for key, value in serve_split().items() if key not in ("sources", "randomize", "first_place")}
    named = {name: serve_split()["sources"][name] for name in sources}
    stated = json.dumps([split, named, setting.stated, asdict(options)], sort_keys=True, default=str)
    return hashlib.sha256(stated.encode()).hexdigest()[:16]


def drawn(
    pool: Sequence[Window], rng: np.random.Generator, seeds: tuple[int, int], notices_s: Sequence[float]
) -> Window:
    """Return a window of a pool, with another course of its budget, announced one of ``notices_s`` before each step."""
    window = pool[int(rng.integers(len(pool)))]
    notice_s = float(rng.choice(notices_s))
    return replace(window, budget_seed=int(rng.integers(*seeds)), notice_s=notice_s)


__all__ = ["PoolOptions", "drawn", "pool_options", "window_pool"]
