"""The section of the agents page on ``ServeCluster``, computed from its result files alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from agents.evaluation.serve_report import REFERENCE, SPECS, against, gaps, shown_policies, table_row
from agents.evaluation.tables import (
    by_kind,
    plot_by_source,
    plot_training,
    policies_of,
    read_if_there,
    read_rows,
    seconds_of,
    signed,
    standing,
    training_table,
)
from sim.pages.render import commit_of, table
from sim.results.plots import figure_file

ORACLES = ("oracle_static",)
COMPARED = ("dense", "static+saber", "greedy_stop+saber", "precision+saber", "load_table+saber")
"""Rules shown next to learned policies behind other routers."""


def cluster_table_markdown(frame: pd.DataFrame, compared: str = "learned_cluster") -> str:
    """Return the main table: every policy over all clusters and seeds, next to one of them; without it, to dense."""
    names = policies_of(frame, ORACLES)
    reference = compared if compared in names else REFERENCE
    busiest = frame.groupby("policy")["busiest_share"].mean()
    rows = [
        {("plan changes per replica" if key == "plan changes" else key): value for key, value in figures.items()}
        | {"busiest replica": busiest[figures["policy"]]}
        for figures in (table_row(frame, name, reference) for name in names)
    ]
    return table(rows, SPECS | {"plan changes per replica": ".1f", "busiest replica": ".1%"})


def cluster_verdict(frame: pd.DataFrame, compared: str) -> dict[str, Any]:
    """Return how a policy stands against rules, and against other learned policies.

    Args:
        frame: one row per policy, seed and cluster. compared: the policy.
    """
    names = policies_of(frame, ORACLES)
    means = {name: float(frame[frame["policy"] == name]["utility"].mean()) for name in names}
    rules = [name for name in names if not name.startswith("learned") and name not in ORACLES]
    simple = max(rules, key=lambda name: means[name])
    found: dict[str, Any] = {"simple": simple, "simple_utility": means[simple]}
    if compared not in names:
        return found
    kinds = gaps(frame, compared, simple, ("source",))
    found |= {
        "compared": compared,
        "utility": means[compared],
        "against_simple": signed(against(frame, compared, simple)),
        **standing(lambda name: against(frame, compared, name), rules),
        "worst": min(kinds.items(), key=lambda item: item[1]),
        "easiest": max(kinds.items(), key=lambda item: item[1]),
    }
    others = [name for name in names if name.startswith("learned") and name != compared]
    pairs = [(compared, name) for name in others] + [(name, simple) for name in others]
    found["pairs"] = [{"policy": a, "minus": b, "utility": signed(against(frame, a, b))} for a, b in pairs]
    return found


def cluster_figure(folder: Path, frame: pd.DataFrame, names: Sequence[str], curves: pd.DataFrame | None) -> None:
    """Write cluster.png: the utility of some policies by trace, and training curves."""
    with figure_file(folder / "cluster.png", 1, 2, size=(12, 5.5), width_ratios=(3, 2)) as (figure, (left, right)):
        plot_by_source(left, frame, names)
        left.set(xlabel="utility in held-out clusters")
        plot_training(right, curves, "replica ticks")
        figure.legend(loc="outside lower center", ncols=5)


def cluster_context(folder: Path) -> dict[str, Any] | None:
    """Return what the template shows, and write cluster.png; None where nothing was evaluated."""
    if not (folder / "cluster.json").exists():  # written last
        return None
    frame = read_rows(folder / "cluster.parquet")
    made: dict[str, Any] = json.loads((folder / "cluster.json").read_text(encoding="utf-8"))
    curves, routers = (read_if_there(folder / f"cluster_{name}.parquet") for name in ("training", "routers"))
    oracles = [name for name in policies_of(frame, ORACLES) if name in ORACLES]
    shown = [*shown_policies(frame, made["compared"]), *oracles]
    cluster_figure(folder, frame, shown, curves)
    found = cluster_verdict(frame, made["compared"])
    kinds = {"source": "", "load": "load ", "pressed": "pressed "}
    return {
        "made": made,
        "commit": commit_of(made),
        "clusters": frame["window"].nunique(),
        "policies": set(frame["policy"].unique()),
        "table": cluster_table_markdown(frame, made["compared"]),
        "verdict": found,
        "pairs": table(found["pairs"], left=2) if found.get("pairs") else "",
        "by_kind": by_kind(frame, shown, kinds),
        "routers": "" if routers is None else by_kind(routers, policies_of(routers, ORACLES), {"router": ""}),
        "seconds": seconds_of(made),
        "training": "" if curves is None else training_table(curves),
    }
