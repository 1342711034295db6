"""``python -m agents.windows``: write the validation and test windows of ``ServeTrace``, in every scenario.

Loads follow one rule: for each source, amount of memory and split, the rates at which a plain reference
(``agents.envs.serve_pool``: 4-bit weights, or greedy_stop where there are no low-precision copies, with a wait limit of
1.5 s) serves 60, 75 and 90 % of requests in time, relative to what it serves at a tenth of the trace's own rate. They
are found by bisection on windows spread over the part, under every kind of budget. Without low-precision copies the
least memory may hold no model at all, so there the loads are found with the most memory.

Test windows lie in blocks of time that do not overlap; a source with few blocks plays each load and kind of budget once
in every scenario, the others three times, in blocks of their own as long as there are some. A window that decides
nothing, because dense without a limit and the reference both serve all requests in time, or both none, is replaced by
one in the next block. Starts, blocks and budgets are drawn by numbers that begin at ``first_place`` of
conf/split/serve.yaml, so that a new claim gets windows that no earlier one played; the courses of memory repeat
when a split has no more seeds for budgets, which the command says.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from agents.baselines.serve import conf_policy, policy_context
from agents.envs.prune_loads import Split
from agents.envs.serve import ServeSetting
from agents.envs.serve_lists import FILE, SCENARIOS, SHARES, check_scenarios, memory_of, scenario_kwargs, server_of
from agents.envs.serve_pool import reference_attainment
from agents.envs.serve_sources import serve_split, source_of, sources_with
from agents.envs.serve_windows import Window
from sim.atomic import check_writable
from sim.config import one_thread, run_command
from sim.errors import ConfigError, nearest
from sim.progress import progress, say
from sim.results.metrics import met_slo
from sim.results.run_folder import write_text

LOWEST_RATE, HIGHEST_RATE = 0.1, 64.0
STEPS, PLACES = 4, 9
"""Halvings of the range of rates, on a logarithmic scale, and windows that each rate is tried on."""
ENOUGH_BLOCKS, TRIES = 27, 5
FEWEST_REQUESTS = 10
HELD_OUT: tuple[Split, ...] = ("validation", "test")


@dataclass(kw_only=True)
class WindowsConfig:
    """What to write.

    sources: names of conf/split/serve.yaml; null for all whose data is here. scenarios: MEMORY/LOW_BITS; null for all.
    out: the file; null for conf/split/serve_windows.json.
    """

    sources: list[str] | None = None
    scenarios: list[str] | None = None
    out: str | None = None


ConfigStore.instance().store(name="windows_schema", node=WindowsConfig)


# --- Rates -----------------------------------------------------------------------------------------------------------


def found_rates(setting: ServeSetting, source: str, split: Split, memory: Mapping[str, Any]) -> list[float]:
    """Return the rates at which the reference serves ``SHARES`` of what it serves at the lowest rate."""
    begin_s, end_s = setting.windows.span_s(source, split)
    highest = min(HIGHEST_RATE, 0.95 * (end_s - begin_s) / setting.windows.window_s)
    known: dict[float, float] = {}

    def attained(rate: float) -> float:
        if rate not in known:
            windows = spread_windows(setting, source, split, rate, memory)
            shares = [reference_attainment(setting, window) for window in windows]
            known[rate] = float(np.mean([share for share in shares if share is not None] or [1.0]))
        return known[rate]

    full = attained(LOWEST_RATE)
    return [bisected(attained, share * full, LOWEST_RATE, highest) for share in SHARES]


def bisected(attained: Callable[[float], float], share: float, low: float, high: float) -> float:
    """Return the rate at which a share is attained that falls with the rate, to two parts in a hundred or so.

    The rate doubles from ``low`` until less is attained; then the range is halved, on a logarithmic scale. ``high`` if
    more is attained even there.
    """
    while attained(min(2.0 * low, high)) >= share:
        low *= 2.0
        if low >= high:
            return high
    high = min(2.0 * low, high)
    for _ in range(STEPS):
        # Of a few digits, so that bisections for other shares meet the same rates.
        middle = float(f"{math.sqrt(low * high):.6g}")
        low, high = (middle, high) if attained(middle) >= share else (low, middle)
    return float(f"{math.sqrt(low * high):.4g}")


def spread_windows(
    setting: ServeSetting, source: str, split: Split, rate: float, memory: Mapping[str, Any]
) -> list[Window]:
    """Return ``PLACES`` windows at a rate, evenly spread over a part, under the kinds of budgets in turn."""
    begin_s, end_s = setting.windows.span_s(source, split)
    room_s = end_s - begin_s - setting.windows.window_s * rate
    budgets, first = setting.windows.budgets, setting.windows.budget_seeds[split][0]
    if not memory["low_bits"]:
        budgets = ("full",)
    return [
        Window(
            source=source,
            start_s=begin_s + room_s * place / (PLACES - 1),
            rate=rate,
            budget=budgets[place % len(budgets)],
            budget_seed=first + place,
            **memory,
        )
        for place in range(PLACES)
    ]


# --- Windows ---------------------------------------------------------------------------------------------------------


def blocks_of(setting: ServeSetting, source: str, split: Split, longest: float) -> list[tuple[float, float]]:
    """Return the blocks of time of a part, (start, end) in seconds, each with room for a window at the highest rate.

    A source that repeats one piece has a single one.
    """
    begin_s, end_s = setting.windows.span_s(source, split)
    if source_of(source).repeats:
        return [(begin_s, end_s)]
    count = max(1, math.floor((end_s - begin_s) / (setting.windows.window_s * longest)))
    length_s = (end_s - begin_s) / count
    return [(begin_s + i * length_s, begin_s + (i + 1) * length_s) for i in range(count)]


def chosen_rows(
    setting: ServeSetting,
    source: str,
    split: Split,
    scenario: str,
    rates: Sequence[float],
    blocks: Sequence[tuple[float, float]],
) -> list[list[Any]]:
    """Return the rows of a source in a scenario: start, number of the load, kind of budget, its seed, block."""
    number = SCENARIOS.index(scenario)
    budgets = range(len(setting.windows.budgets))
    combinations = [(load, budget) for load in range(len(SHARES)) for budget in budgets]
    if split == "validation":  # each load and each budget once
        combinations = [(load, (load + number) % len(budgets)) for load in range(len(SHARES))]
    elif len(blocks) >= ENOUGH_BLOCKS:
        combinations *= 3
    order = np.random.default_rng(len(blocks)).permutation(len(blocks))
    # Scenarios follow each other in the order of blocks.
    at = itertools.count(first_place(split) + number * ENOUGH_BLOCKS)
    rows = []
    for load, budget in combinations:
        for _ in range(TRIES):
            place = next(at)
            row = _row(setting, split, place, int(order[place % len(blocks)]), blocks, rates, load, budget)
            if decides(setting, row_window(setting, source, split, scenario, rates, row)):
                rows.append(row)
                break
    return rows


def _row(
    setting: ServeSetting,
    split: Split,
    place: int,
    block: int,
    blocks: Sequence[tuple[float, float]],
    rates: Sequence[float],
    load: int,
    budget: int,
) -> list[Any]:
    begin_s, end_s = blocks[block]
    seeds = setting.windows.budget_seeds[split]
    room_s = end_s - begin_s - setting.windows.window_s * rates[load]
    start_s = begin_s + room_s * float(np.random.default_rng(place).random())
    return [round(start_s, 3), load, budget, place % (seeds[1] - seeds[0]), block]


def row_window(
    setting: ServeSetting, source: str, split: Split, scenario: str, rates: Sequence[float], row: Sequence[Any]
) -> Window:
    """Return the window of a row."""
    start_s, load, budget, seed, _ = row
    return Window(
        source=source,
        start_s=start_s,
        rate=rates[load],
        budget=setting.windows.budgets[budget],
        budget_seed=setting.windows.budget_seeds[split][0] + seed,
        **memory_of(scenario),
    )


def decides(setting: ServeSetting, window: Window) -> bool:
    """Return whether it matters what is done in a window: dense and the reference do not both serve all or none."""
    requests = len(setting.windows.arrays(window)[0])
    if requests < FEWEST_REQUESTS:
        return False
    reference = reference_attainment(setting, window)
    assert reference is not None
    if 0.0 < reference < 1.0:
        return True
    dense = conf_policy("dense")(policy_context(setting)).first_plan
    engine = setting.build_engine(window, dense)
    engine.run_until(math.inf)
    return float(met_slo(engine.records(), setting.slo).mean()) != reference


def first_place(split: Split) -> int:
    """Return where the numbers begin that a split's windows are drawn by (``first_place`` of conf/split/serve.yaml)."""
    return int(serve_split().get("first_place", {}).get(split, 0))


def seeds_note(split: Split) -> str | None:
    """Return what to say if the numbers of a list go beyond the split's budget seeds; None if they do not."""
    first, end = serve_split()["budget_seeds"][split]
    if first_place(split) + ENOUGH_BLOCKS * len(SCENARIOS) <= end - first:
        return None
    return (
        f"{split} windows have courses of memory that earlier lists had: conf/split/serve.yaml has {end - first:,} "
        f"budget seeds, and first_place is {first_place(split):,}; widen budget_seeds.{split}"
    )


# --- Command ---------------------------------------------------------------------------------------------------------


def listed_sources(split: Split) -> list[str]:
    """Return the sources whose windows are listed: in the test split none that is made of others."""
    names = sources_with(split)[0]
    return names if split != "test" else [name for name in names if not source_of(name).made_of]


def made_lists(sources: Sequence[str] | None, scenarios: Sequence[str] | None) -> dict[str, Any]:
    """Return the content of the file: rates and windows by split, scenario and source."""
    names = check_scenarios(scenarios)
    settings = {name: ServeSetting(**scenario_kwargs(name)) for name in names}
    by_split = {split: listed_sources(split) for split in HELD_OUT}
    for note in dict.fromkeys(note for split in HELD_OUT for note in sources_with(split)[1]):
        say(note)
    for split in HELD_OUT:
        if (repeats := seeds_note(split)) is not None:
            say(repeats)
    if sources is not None:
        listed = set().union(*by_split.values())
        for name in sources:
            if name not in listed:
                raise ConfigError(f"sources: {name!r} has no validation or test windows; {nearest(name, listed)}")
        by_split = {split: [name for name in known if name in sources] for split, known in by_split.items()}
    total = sum(len(known) * len(names) for known in by_split.values())
    if not total:
        raise ConfigError("sources is []; name at least one, or leave it null for all")
    content: dict[str, Any] = {
        "command": "python -m agents.windows",
        "server": server_of(settings[names[0]]),
        "shares": list(SHARES),
        "rates": {},
        "windows": {},
    }
    with progress("finding loads", total, "loads") as report:
        done = 0
        for split, known in by_split.items():
            rates: dict[str, dict[str, list[float]]] = {name: {} for name in names}
            rows: dict[str, dict[str, list[list[Any]]]] = {name: {} for name in names}
            for source in known:
                found: dict[str, list[float]] = {}
                for name in names:
                    key = str(memory_of(name))  # what copies cost changes no time
                    if key not in found:
                        found[key] = found_rates(settings[name], source, split, memory_of(name))
                    rates[name][source] = found[key]
                    done += 1
                    report(done)
                # Without copies a load may need a much higher rate; its windows must fit the blocks of the others.
                longest = max(
                    max(rates[name][source]) for name in names if memory_of(name)["low_bits"] or len(names) == 1
                )
                blocks = blocks_of(settings[names[0]], source, split, longest)
                for name in names:
                    rates[name][source] = [min(rate, longest) for rate in rates[name][source]]
                    rows[name][source] = chosen_rows(settings[name], source, split, name, rates[name][source], blocks)
            content["rates"][split], content["windows"][split] = rates, rows
    return content


def lists_text(content: Mapping[str, Any]) -> str:
    """Return the file: JSON, with a line for each source of each scenario."""

    def lines(value: Any, depth: int, indent: str) -> str:
        if depth == 0 or not isinstance(value, Mapping):
            return json.dumps(value)
        inner = indent + " "
        rows = [f"{inner}{json.dumps(key)}: {lines(one, depth - 1, inner)}" for key, one in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"

    return lines(content, 4, "") + "\n"


def _run(cfg: DictConfig) -> None:
    if not cfg.out and (cfg.sources is not None or cfg.scenarios is not None):
        raise ConfigError(f"sources and scenarios make a part of the lists of {FILE.name}; set out=FILE.json for it")
    path = Path(cfg.out) if cfg.out else FILE
    check_writable(path)
    content = made_lists(cfg.sources, cfg.scenarios)
    write_text(path, lists_text(content))
    for split in HELD_OUT:
        rows = [row for by_source in content["windows"][split].values() for row in by_source.values()]
        blocks = {
            (source, row[4])
            for by_source in content["windows"][split].values()
            for source, some in by_source.items()
            for row in some
        }
        print(f"{split}: {sum(map(len, rows))} windows in {len(blocks)} blocks of time")
    print(f"wrote {path}")


def main() -> None:
    """Run ``python -m agents.windows``."""
    one_thread()
    run_command(_run, "windows")
