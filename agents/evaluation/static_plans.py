"""``python -m agents.static_plans``: what dropping blocks is worth in each scenario, and where it is useless.

Every plan of a scenario's table serves training windows without ever being changed. The best of them is compared with
the best of those that drop nothing, with and without copies of the weights at low precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from agents.envs.reward import kept_quality
from agents.envs.serve import ServeSetting
from agents.envs.serve_windows import Window
from sim.config import compose_config, one_thread, option_path, run_command
from sim.cost.plan import KeepMask, dense_plan, with_mask
from sim.cost.quality import FittedQuality, PublishedQuality, TransferredQuality, load_quality
from sim.errors import ConfigError
from sim.pages.render import commit_of, render, table
from sim.paths import results_folder
from sim.progress import progress
from sim.results.metrics import met_slo
from sim.results.run_folder import provenance, write_json, write_text
from sim.types import Floats

TEMPLATE = Path(__file__).parent / "templates" / "static_plans.md.j2"
KINDS = ("dense", "drops", "w4", "both")
"""Which plans compete: the dense one; also those that drop blocks; also those with 4-bit layers; all of them."""


@dataclass(kw_only=True)
class StaticPlansConfig:
    """Which plans to play.

    env: the environment whose arguments the scenarios change.
    scenarios: files of conf/scenario. copies: files of conf/low_bits.
    sources: traces of the training windows. windows: windows for each trace and kind of budget.
    seed: of the windows. out: folder of the page and its figures.
    """

    env: Any
    scenarios: list[str] = field(default_factory=lambda: ["roomy", "mid", "tight"])
    copies: list[str] = field(default_factory=lambda: ["published", "measured", "none"])
    sources: list[str] = field(default_factory=lambda: ["burst", "azure_conv", "azure_code", "gamma", "mmpp"])
    windows: int = 4
    seed: int = 20261127
    out: str = "runs/static_plans"


ConfigStore.instance().store(name="static_plans_schema", node=StaticPlansConfig)


def scenario_kwargs(scenario: str, copies: str) -> dict[str, Any]:
    """Return the arguments of ``ServeSetting`` in a scenario with these copies of the weights at low precision.

    Raises:
        ConfigError: for a scenario or copies that conf/ does not have.
    """
    for group, name in (("scenario", scenario), ("low_bits", copies)):
        option_path(group, name)
    cfg = compose_config("static_plans", [f"scenario={scenario}", f"low_bits={copies}"])
    kwargs: Any = OmegaConf.to_container(cfg.env.kwargs, resolve=True)
    return dict(kwargs)


def training_windows(setting: ServeSetting, sources: Sequence[str], each: int, seed: int) -> list[Window]:
    """Return ``each`` training windows for every source and kind of budget; those without requests are replaced."""
    rng = np.random.default_rng(seed)
    found = []
    for source in sources:
        for budget in setting.windows.budgets:
            for _ in range(each):
                window = setting.windows.sample(rng, "train", (source,), budget=budget)
                while not len(setting.windows.arrays(window)[0]):
                    window = setting.windows.sample(rng, "train", (source,), budget=budget)
                found.append(window)
    return found


def attainments(setting: ServeSetting, windows: Sequence[Window]) -> Floats:
    """Return the SLO attainment of every plan that is never changed, float64[windows, plans]."""
    found = np.empty((len(windows), len(setting.actions.plans)))
    for row, window in enumerate(windows):
        for column, plan in enumerate(setting.actions.plans):
            engine = setting.build_engine(window, plan)
            engine.run_until(math.inf)
            found[row, column] = met_slo(engine.records(), setting.slo).mean()
    return found


def compared(setting: ServeSetting, utility: Floats) -> dict[str, Any]:
    """Return the best plans of each kind, and what drops add to them.

    Args:
        utility: float64[windows, plans].
    """
    dropping = np.array([not all(plan.decode.mha + plan.decode.ffn) for plan in setting.actions.plans])
    low = np.array(setting.actions.low)
    allowed = {"dense": ~dropping & ~low, "drops": ~low, "w4": ~dropping, "both": np.ones_like(low)}
    found: dict[str, Any] = {}
    for kind in KINDS:
        masked = np.where(allowed[kind], utility, -1.0)
        best = int(masked.mean(0).argmax())
        found[kind] = {
            "plan": setting.actions.names[best],
            "utility": float(utility[:, best].mean()),
            "hindsight": float(masked.max(1).mean()),
            "by_window": utility[:, best],
        }
    found["ever_best"] = sorted({_weights_of(setting.actions.names[i]) for i in utility.argmax(1).tolist()})
    found["weights"] = len(set(map(_weights_of, setting.actions.names)))
    return found


def _weights_of(name: str) -> str:
    """Return the part of a plan's name that says which weights it runs."""
    return ", ".join(name.split(", ")[:2])


def worth(found: Mapping[str, Any], with_drops: str, without: str) -> tuple[float, float]:
    """Return how much more the best plan with drops earns than the best without, and the standard error."""
    gained = found[with_drops]["by_window"] - found[without]["by_window"]
    error = gained.std(ddof=1) / math.sqrt(len(gained)) if len(gained) > 1 else math.nan
    return float(gained.mean()), float(error)


def play(cfg: DictConfig) -> dict[str, Any]:
    """Play every scenario; return the figures of the page.

    Scenarios that differ in quality alone take the same time, so their plans are played once.
    """
    rows: list[dict[str, Any]] = []
    done: dict[str, Floats] = {}
    pairs = [(scenario, copies) for scenario in cfg.scenarios for copies in cfg.copies]
    if not pairs:
        raise ConfigError("scenarios or copies is empty; name at least one of each, such as scenarios=[tight]")
    if cfg.windows < 1:
        raise ConfigError(f"windows is {cfg.windows}; it must be at least 1 (windows of each trace and kind of budget)")
    with progress("playing", len(pairs), "scenarios") as report:
        for number, (scenario, copies) in enumerate(pairs):
            kwargs = scenario_kwargs(scenario, copies) | {"sources": list(cfg.sources)}
            setting = ServeSetting(**kwargs)
            windows = training_windows(setting, list(cfg.sources), int(cfg.windows), int(cfg.seed))
            key = repr({name: value for name, value in kwargs.items() if name != "quality"})
            if key not in done:
                done[key] = attainments(setting, windows)
            loss = np.array([setting.nll(plan) - setting.dense_nll for plan in setting.actions.plans])
            found = compared(setting, done[key] * kept_quality(loss))
            rows.append({"scenario": scenario, "copies": copies, "windows": len(windows), **_row(found, copies)})
            report(number + 1)
    return {**provenance(int(cfg.seed)), "sources": list(cfg.sources), "rows": rows, "held_out": held_out()}


def _row(found: Mapping[str, Any], copies: str) -> dict[str, Any]:
    row: dict[str, Any] = {kind: {k: v for k, v in found[kind].items() if k != "by_window"} for kind in KINDS}
    row["drops_worth"], row["drops_error"] = worth(found, "drops", "dense")
    has_copies = copies != "none"
    on_top = worth(found, "both", "w4") if has_copies else (math.nan, math.nan)
    row["on_top_worth"], row["on_top_error"] = (None, None) if math.isnan(on_top[0]) else on_top
    row["drops_hindsight"] = found["drops"]["hindsight"] - found["dense"]["hindsight"]
    row["on_top_hindsight"] = found["both"]["hindsight"] - found["w4"]["hindsight"] if has_copies else None
    return row | {"ever_best": found["ever_best"], "weights": found["weights"]}


def held_out(published: str = "llama2_7b_published", profile: str = "smollm2_135m") -> list[dict[str, Any]]:
    """Return each published mask as the transferred quality predicts it from the other masks."""
    points, theirs = load_quality(published), load_quality(profile)
    assert isinstance(points, PublishedQuality)
    assert isinstance(theirs, FittedQuality)
    rows = []
    for left_out in points.points:
        rest = replace(points, points=tuple(point for point in points.points if point is not left_out))
        quality = TransferredQuality.of(rest, theirs)
        layers = range(points.model.num_layers)
        mask = KeepMask(
            mha=tuple(layer not in left_out.drop_mha for layer in layers),
            ffn=tuple(layer not in left_out.drop_ffn for layer in layers),
        )
        plan = with_mask(dense_plan(points.model), mask)
        predicted = quality.perplexity(plan) if quality.in_range(plan) else None
        rows.append({"mask": left_out.source, "published": left_out.perplexity, "predicted": predicted})
    return rows


def figures_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the best plans, in Markdown."""

    def with_error(value: float | None, error: float | None) -> str:
        return "-" if value is None or error is None else f"{value:+.3f} ± {error:.3f}"

    return table(
        [
            {
                "scenario": row["scenario"],
                "W4 copies": row["copies"],
                "dense": row["dense"]["utility"],
                "drops": row["drops"]["utility"],
                "W4": _with_copies(row, "w4"),
                "W4 and drops": _with_copies(row, "both"),
                "drops alone are worth": with_error(row["drops_worth"], row["drops_error"]),
                "on top of W4": with_error(row["on_top_worth"], row["on_top_error"]),
                "in hindsight": row["drops_hindsight"] if row["on_top_hindsight"] is None else row["on_top_hindsight"],
                "best plan": row["both"]["plan"],
            }
            for row in rows
        ],
        dict.fromkeys(("dense", "drops", "W4", "W4 and drops"), ".3f") | {"in hindsight": "+.3f"},
        left=2,
    )


def _with_copies(row: Mapping[str, Any], kind: str) -> float | None:
    return None if row["on_top_worth"] is None else float(row[kind]["utility"])


def page(figures: Mapping[str, Any]) -> str:
    """Return the page of the figures, in Markdown."""
    return render(
        TEMPLATE,
        made=figures,
        commit=commit_of(figures),
        table_of_plans=figures_table(figures["rows"]),
        table_of_masks=table(figures["held_out"], {"published": ".2f", "predicted": ".2f"}),
    )


def _run(cfg: DictConfig) -> None:
    figures = play(cfg)
    folder = results_folder(cfg.out, StaticPlansConfig.out)
    write_json(folder / "static_plans.json", figures)
    write_text(folder / "index.md", page(figures))
    shown = figures_table(figures["rows"])
    Console().print(f"{shown}\nfiles: {folder}", highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Run ``python -m agents.static_plans``."""
    one_thread()
    run_command(_run, "static_plans")
