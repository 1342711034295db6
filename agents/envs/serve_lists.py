"""The fixed windows of validation and test, in every scenario (conf/split/serve_windows.json).

``python -m agents.windows`` finds their loads and writes the file (``agents.evaluation.windows``), so that playing them
needs no search. A scenario is an amount of memory (conf/scenario) and what low-precision copies cost (conf/low_bits).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf

from agents.envs.serve_sources import source_of, sources_with
from agents.envs.serve_windows import Window, serve_windows
from sim.config import CONF_DIR, load_option, option_path
from sim.errors import ConfigError, nearest

if TYPE_CHECKING:
    from agents.envs.serve import ServeSetting

FILE = CONF_DIR / "split" / "serve_windows.json"
MEMORIES = ("roomy", "mid", "tight")
LOW_BITS = ("published", "measured", "none")
SCENARIOS = tuple(f"{memory}/{low_bits}" for memory in MEMORIES for low_bits in LOW_BITS)
"""All scenarios: an option of conf/scenario, and one of conf/low_bits."""
SHARES = (0.6, 0.75, 0.9)
"""The loads: at its rate, the reference serves this share of requests in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A window of a list.

    scenario: one of ``SCENARIOS``. share: its load, one of ``SHARES``. block: its block of time in the source; windows
    of different blocks do not overlap.
    """

    window: Window
    scenario: str
    share: float
    block: int


def check_scenarios(names: Sequence[str] | None) -> tuple[str, ...]:
    """Return scenarios by name; None stands for all.

    Raises:
        ConfigError: for an unknown name, or an empty list.
    """
    for name in names or ():
        if name not in SCENARIOS:
            raise ConfigError(f"there is no scenario {name!r}; {nearest(str(name), SCENARIOS)}")
    if names is not None and not names:
        raise ConfigError(f"scenarios is empty; name at least one, such as {SCENARIOS[0]}")
    return SCENARIOS if names is None else tuple(names)


def scenario_kwargs(scenario: str) -> dict[str, Any]:
    """Return the arguments of ``ServeSetting`` in a scenario: those of env=serve_trace scenario=... low_bits=..."""
    memory, low_bits = check_scenarios([scenario])[0].split("/")
    changed = (OmegaConf.load(option_path(*one)).env.kwargs for one in (("scenario", memory), ("low_bits", low_bits)))
    kwargs: Any = OmegaConf.to_container(OmegaConf.merge(load_option("env", "serve_trace").kwargs, *changed))
    return dict(kwargs)


@cache
def memory_of(scenario: str) -> dict[str, Any]:
    """Return the fields of ``Window`` that a scenario sets."""
    budget = scenario_kwargs(scenario)["budget"]
    return {
        "high_share": float(budget["high_share"]),
        "low_share": float(budget["low_share"]),
        "low_bits": not scenario.endswith("/none"),
    }


def server_of(setting: ServeSetting) -> list[Any]:
    """Return what the loads depend on next to the scenario: model, gpu, latency, engine, SLO, workspace and tp."""
    model, gpu, latency, _, engine, slo, workspace_bytes, *tp = setting.stated["server"]
    return [model, gpu, latency, engine, slo, workspace_bytes, *tp]


@cache
def read_lists(path: Path = FILE) -> dict[str, Any]:
    """Return the content of the file of windows.

    Raises:
        ConfigError: if it is missing or malformed.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"server", "rates", "windows"} <= set(content):
            raise ValueError("server, rates or windows is missing")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is not a list of windows ({error}); write it with python -m agents.windows"
        ) from error
    return content


def listed_windows(
    split: str,
    *,
    scenarios: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    content: dict[str, Any] | None = None,
) -> list[Listed]:
    """Return the windows of a split, the same in every call, in the order of scenarios, sources and the file.

    Args:
        split: validation or test. scenarios: None for all. sources: None for all listed ones whose data is here.
        content: of the file; None reads it.
    Raises:
        ConfigError: for an unknown name, or a source that has no windows in the split.
    """
    content = read_lists() if content is None else content
    lists, rates = content["windows"][split], content["rates"][split]
    found = []
    for scenario in check_scenarios(scenarios):
        here = [name for name in sources_with(split)[0] if name in lists[scenario]]
        for name in here if sources is None else sources:
            source_of(name)
            if name not in lists[scenario]:
                raise ConfigError(
                    f"{name} has no {split} windows ({nearest(name, lists[scenario])}); make them with "
                    "python -m agents.windows"
                )
            found += [_listed(split, scenario, name, row, rates[scenario][name]) for row in lists[scenario][name]]
    return found


def _listed(split: str, scenario: str, source: str, row: Sequence[Any], rates: Sequence[float]) -> Listed:
    """Return the window of a row of the file: start, number of its load, kind of budget, its seed, block."""
    start_s, load, budget, seed, block = row
    windows = serve_windows()
    window = Window(
        source=source,
        start_s=float(start_s),
        rate=float(rates[load]),
        budget=windows.budgets[budget],
        budget_seed=windows.budget_seeds[split][0] + int(seed),
        **memory_of(scenario),
    )
    return Listed(window=window, scenario=scenario, share=SHARES[load], block=int(block))


def windows_sha256(listed: Sequence[Listed]) -> str:
    """Return a hash of windows and of the requests in them: arrivals to the microsecond, and lengths."""
    digest, windows = hashlib.sha256(), serve_windows()
    for one in listed:
        digest.update(json.dumps(asdict(one), sort_keys=True).encode())
        arrival_s, prompts, outputs = windows.arrays(one.window)
        for column in (np.rint(arrival_s * 1e6), prompts, outputs):
            digest.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
    return digest.hexdigest()


__all__ = [
    "FILE",
    "LOW_BITS",
    "MEMORIES",
    "SCENARIOS",
    "SHARES",
    "Listed",
    "check_scenarios",
    "listed_windows",
    "memory_of",
    "read_lists",
    "scenario_kwargs",
    "server_of",
    "windows_sha256",
]
