"""The section of the agents page on ``ServeTrace``, computed from its result files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agents.evaluation.ablation import WINDOWS, ablation_markdown
from agents.evaluation.serve import ORACLES, serve_grid
from agents.evaluation.statistics import Interval, paired_difference
from agents.evaluation.tables import (
    by_kind,
    plot_by_source,
    plot_training,
    policies_of,
    read_if_there,
    seconds_of,
    signed,
    standing,
    training_table,
)
from sim.pages.render import commit_of, table
from sim.results.plots import figure_file

REFERENCE = "greedy_stop+queue"
COMPARED = ("dense", "static", "greedy_stop+queue", "precision+queue", "lookahead")
"""Rules shown next to learned policies where something differs from training."""
SPECS = {"utility": ".4f", "SLO attainment": ".1%", "goodput (req/s)": ".2f", "TTFT P95 (s)": ".2f", "rejected": ".1%"}
SPECS |= {"loss (nats)": ".4f", "over budget (s)": ".2f", "plan changes": ".1f"}


def _learned(frame: pd.DataFrame) -> list[str]:
    return [name for name in policies_of(frame, ORACLES) if name.startswith("learned")]


def against(frame: pd.DataFrame, ours: str, theirs: str) -> Interval:
    """Return how much higher the utility of one policy is than another's, window by window."""
    return paired_difference(serve_grid(frame, ours), serve_grid(frame, theirs))


def table_row(frame: pd.DataFrame, name: str, reference: str) -> dict[str, Any]:
    """Return the figures of a policy that the tables of servers and of clusters share."""
    part = frame[frame["policy"] == name]
    compared = name != reference and reference in set(frame["policy"])
    return {
        "policy": name,
        "seeds": part["seed"].nunique(),
        "utility": part["utility"].mean(),
        f"minus {reference}": signed(against(frame, name, reference)) if compared else None,
        "SLO attainment": part["slo_attainment"].mean(),
        "goodput (req/s)": part["goodput_rps"].mean(),
        "TTFT P95 (s)": part["ttft_p95_s"].mean(),
        "rejected": part["rejected_share"].mean(),
        "loss (nats)": part["loss"].mean(),
        "over budget (s)": part["budget_violation_s"].mean(),
        "plan changes": part["transitions"].mean(),
    }


def serve_table_markdown(frame: pd.DataFrame) -> str:
    """Return the main table: every policy over all windows and seeds."""
    by_policy = frame.groupby("policy")[["decision_p50_s", "decision_p99_s"]].median() * 1e6
    rows = [
        table_row(frame, name, REFERENCE)
        | {f"decision {p.upper()} (us)": by_policy[f"decision_{p}_s"][name] for p in ("p50", "p99")}
        for name in policies_of(frame, ORACLES)
    ]
    return table(rows, SPECS | {"decision P50 (us)": ".0f", "decision P99 (us)": ".0f"})


def gaps(frame: pd.DataFrame, ours: str, theirs: str, columns: tuple[str, ...]) -> dict[str, float]:
    """Return by how much the utility of one policy is above another's, for every kind in some columns."""
    found: dict[str, float] = {}
    for column in columns:
        means = frame.groupby([column, "policy"])["utility"].mean().unstack()
        found |= {str(kind): float(value) for kind, value in (means[ours] - means[theirs]).items()}
    return found


def serve_verdict(frame: pd.DataFrame, trained_on: list[str]) -> dict[str, Any]:
    """Return how the best learned policy stands against rules and oracles, and what a queue limit adds to the rules."""
    names, learned = policies_of(frame, ORACLES), _learned(frame)
    means = {name: float(frame[frame["policy"] == name]["utility"].mean()) for name in names}
    rules = [name for name in names if name not in (*learned, *ORACLES)]
    simple = max(rules, key=lambda name: means[name])
    oracle = next(name for name in reversed(ORACLES) if name in names)
    found: dict[str, Any] = {"simple": simple, "oracle": oracle, "simple_of_oracle": means[simple] / means[oracle]}
    pairs = [(name, name.removesuffix("+queue")) for name in rules if name.endswith("+queue")]
    gains = {plain: means[limited] - means[plain] for limited, plain in pairs if plain in means}
    if gains:
        found["queue_gain"] = (min(gains.values()), max(gains.values()))
        found["rule_gain"] = max(means[plain] - means["dense"] for plain in gains)
    if not learned:
        return found
    best = max(learned, key=lambda name: means[name])
    kinds = gaps(frame, best, simple, ("source", "budget"))
    return {
        **found,
        "best": best,
        "utility": means[best],
        "against_reference": signed(against(frame, best, REFERENCE)),
        "against_simple": signed(against(frame, best, simple)),
        "of_oracle": means[best] / means[oracle],
        **standing(lambda name: against(frame, best, name), rules),
        "worst": min(kinds.items(), key=lambda item: item[1]),
        "easiest": max(kinds.items(), key=lambda item: item[1]),
        "where_trained": float(np.mean([kinds[source] for source in trained_on if source in kinds])),
    }


def serve_figure(folder: Path, frame: pd.DataFrame, curves: pd.DataFrame | None) -> None:
    """Write serve.png: utility of every policy by trace, and training curves."""
    with figure_file(folder / "serve.png", 1, 2, size=(11, 5.5), width_ratios=(3, 2)) as (figure, (left, right)):
        plot_by_source(left, frame, policies_of(frame, ORACLES))
        left.set(xlabel="utility on held-out windows")
        plot_training(right, curves)
        figure.legend(loc="outside lower center", ncols=5)


def elsewhere_context(folder: Path, frame: pd.DataFrame, made: dict[str, Any]) -> dict[str, Any]:
    """Return the tables of what policies do away from their training: other traces, other loads, other losses."""
    compared = [name for name in policies_of(frame, ORACLES) if name in COMPARED or name in _learned(frame)]
    found: dict[str, Any] = {"elsewhere": "", "other_quality": ""}
    trained, other = (read_if_there(folder / f"serve_{name}.parquet") for name in ("elsewhere", "quality"))
    if trained is not None:
        both = pd.concat([frame[frame["policy"].isin(compared)], trained])
        found["elsewhere_seeds"] = trained.groupby("policy")["seed"].nunique().max()
        found["elsewhere"] = by_kind(both, policies_of(both, ORACLES), {"source": "", "load": "load "})
    if other is not None:
        known = frame[frame["policy"].isin(other["policy"])].assign(losses="published")
        both = pd.concat([known, other.assign(losses=made["other_quality"])])
        found["other_quality"] = by_kind(both, policies_of(both, ORACLES), {"losses": ""})
    return found


def serve_context(folder: Path) -> dict[str, Any] | None:
    """Return what the template shows, and write serve.png; None where nothing was evaluated."""
    frame = read_if_there(folder / "serve.parquet")
    if frame is None:
        return None
    made: dict[str, Any] = json.loads((folder / "serve.json").read_text(encoding="utf-8"))
    curves, ablation = (read_if_there(folder / f"serve_{name}.parquet") for name in ("training", "ablation"))
    serve_figure(folder, frame, curves)
    return {
        "made": made,
        "commit": commit_of(made),
        "later": made.get("replayed", []),
        "windows": frame["window"].nunique(),
        "sources": list(dict.fromkeys(frame["source"])),
        "table": serve_table_markdown(frame),
        "verdict": serve_verdict(frame, made["trained_on"]),
        "by_kind": by_kind(frame, policies_of(frame, ORACLES), {"source": "", "budget": "", "load": "load "}),
        "seconds": seconds_of(made),
        "training": "" if curves is None else training_table(curves),
        "ablation": "" if ablation is None else ablation_markdown(ablation, "windows"),
        "ablation_seeds": 0 if ablation is None else ablation["seed"].nunique(),
        "ablation_windows": WINDOWS,
        **elsewhere_context(folder, frame, made),
    }
