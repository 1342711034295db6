"""The section of the agents page on ``PruneToBudget``, computed from its result files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from agents.envs.prune_loads import PruneLoad, prune_loads
from agents.evaluation.ablation import ablation_markdown
from agents.evaluation.prune import grid
from agents.evaluation.statistics import Interval, paired_difference
from agents.evaluation.tables import (
    by_kind,
    plot_training,
    policies_of,
    read_if_there,
    read_rows,
    signed,
    standing,
)
from sim.pages.render import commit_of, table
from sim.results.plots import figure_file, line_style

REFERENCE = "greedy_stop"
NOT_LEARNED = (
    "dense",
    "static",
    "random",
    "ffn_only",
    "mha_only",
    "one_shot",
    "cosine",
    "lis_w4",
    "greedy_stop",
    "ratio",
    "knapsack",
    "oracle",
)


def unseen_loads() -> list[PruneLoad]:
    """Return loads outside the range of training: larger batches, longer sequences, tighter budgets."""
    pairs = [(1, 128), (1, 8192), (4, 8192), (32, 512), (32, 2048), (64, 1024)]
    return [
        PruneLoad(batch=batch, sequence_tokens=tokens, budget_share=share)
        for batch, tokens in pairs
        for share in (0.9, 0.7, 0.5, 0.4)
    ]


def learned_of(frame: pd.DataFrame) -> list[str]:
    """Return the policies that were learned."""
    return [name for name in policies_of(frame) if name not in NOT_LEARNED]


def _mean(frame: pd.DataFrame, name: str) -> float:
    return float(grid(frame, name, "utility_test").mean())


def _against(frame: pd.DataFrame, ours: str, theirs: str) -> Interval:
    return paired_difference(grid(frame, ours, "utility_test"), grid(frame, theirs, "utility_test"))


def _worse(frame: pd.DataFrame, name: str) -> str:
    """Return on how many (load, seed) pairs a policy is below the reference."""
    values = grid(frame, name, "utility_test")
    return f"{int((values < grid(frame, REFERENCE, 'utility_test').mean(axis=0) - 1e-9).sum())} of {values.size}"


def prune_table_markdown(frame: pd.DataFrame) -> str:
    """Return the main table: every policy over all loads and seeds."""
    rows, names = [], policies_of(frame)
    for name in names:
        part = frame[frame["policy"] == name]
        compared = name != REFERENCE and REFERENCE in names
        rows.append(
            {
                "policy": name,
                "seeds": part["seed"].nunique(),
                "utility": _mean(frame, name),
                f"minus {REFERENCE}": signed(_against(frame, name, REFERENCE)) if compared else None,
                "of knapsack": _mean(frame, name) / _mean(frame, "knapsack") if "knapsack" in names else None,
                f"below {REFERENCE}": _worse(frame, name) if REFERENCE in names else None,
                "fits": part["fits"].mean(),
                "in range": part["in_range"].mean(),
                "loss (nats)": part["loss_test"].mean(),
                "utility, neighbor fit": part["utility_test_neighbours"].mean(),
                "decision P50 (us)": 1e6 * part["decision_s"].median(),
                "decision P99 (us)": 1e6 * part["decision_s"].quantile(0.99),
            }
        )
    specs = {"utility": ".4f", "of knapsack": ".1%", "fits": ".0%", "in range": ".0%", "loss (nats)": ".3f"}
    specs |= {"utility, neighbor fit": ".4f", "decision P50 (us)": ".0f", "decision P99 (us)": ".0f"}
    return table(rows, specs)


def training_markdown(curves: pd.DataFrame, knapsack_validation: float) -> str:
    """Return what the trainings took and reached."""
    rows = []
    for name, part in curves.groupby("policy", sort=False):
        best, ends = part.groupby("seed")["best_utility"].max(), part.groupby("seed").last()
        near = part[part["best_utility"] >= 0.95 * knapsack_validation].groupby("seed")["seconds"].min()
        sampled = part["sample_seconds"].sum() / (part["sample_seconds"] + part["learn_seconds"]).sum()
        rows.append(
            {
                "training": name,
                "seeds": len(best),
                "best validation utility": best.mean(),
                "seed range": f"{best.min():.4f} to {best.max():.4f}",
                "of knapsack": best.mean() / knapsack_validation,
                "seconds": ends["seconds"].mean(),
                "environment steps": ends["env_steps"].mean(),
                "seconds to 95 % of knapsack (median)": near.median() if len(near) else None,
                "seeds that reach it": len(near),
                "sampling : learning (%)": f"{100 * sampled:.0f} : {100 - 100 * sampled:.0f}",
            }
        )
    specs = {"best validation utility": ".4f", "of knapsack": ".1%", "seconds": ".0f", "environment steps": ",.0f"}
    return table(rows, specs | {"seconds to 95 % of knapsack (median)": ".0f"})


def worst_markdown(frame: pd.DataFrame, name: str, count: int = 5) -> str:
    """Return the loads on which a policy falls behind the knapsack most, means over seeds."""
    load, figures = ["batch", "sequence_tokens", "budget_share"], ["utility_test", "dropped_mha", "dropped_ffn"]
    ours, theirs = (frame[frame["policy"] == who].groupby(load)[figures].mean() for who in (name, "knapsack"))
    behind = (theirs["utility_test"] - ours["utility_test"]).sort_values(ascending=False).head(count)
    both = ours.join(theirs.add_suffix(" of knapsack")).loc[behind.index].reset_index()
    headings = {"sequence_tokens": "sequence tokens", "budget_share": "budget", "utility_test": "utility"}
    headings |= {"dropped_mha": "MHA dropped", "dropped_ffn": "FFN dropped", "utility_test of knapsack": "its utility"}
    headings |= {"dropped_mha of knapsack": "its MHA", "dropped_ffn of knapsack": "its FFN"}
    specs = {"budget": ".0%", "utility": ".3f", "its utility": ".3f", "its MHA": ".0f", "its FFN": ".0f"}
    return table(both.rename(columns=headings), specs | {"MHA dropped": ".1f", "FFN dropped": ".1f"}, left=0)


def verdict(frame: pd.DataFrame) -> dict[str, Any]:
    """Return how the best learned policy stands against rules and oracle; empty where none was learned.

    The networks that a policy averages, ``NAME_seeds`` next to ``NAME``, do not count: nothing ships them.
    """
    learned = learned_of(frame)
    if not learned:
        return {}
    means = {name: _mean(frame, name) for name in policies_of(frame)}
    members = {f"{name}_seeds" for name in learned}
    best = max((name for name in learned if name not in members), key=lambda name: means[name])
    rules = [name for name in means if name not in (*learned, "oracle")]
    simple = max((name for name in rules if name != "knapsack"), key=lambda name: means[name])
    share, simple_share = (means[name] / means["knapsack"] for name in (best, simple))
    text_gain = means["oracle"] / means["knapsack"] - 1
    return {
        "name": best,
        "utility": means[best],
        "against_reference": signed(_against(frame, best, REFERENCE)),
        "against_knapsack": signed(_against(frame, best, "knapsack")),
        "of_knapsack": share,
        "of_oracle": means[best] / means["oracle"],
        "below": _worse(frame, best),
        **standing(lambda name: _against(frame, best, name), rules),
        "simple": simple,
        "simple_gap": 1 - simple_share,
        "text_gain": text_gain,
        "text_matters": text_gain > max(1 - simple_share, 1 - share),
    }


def prune_figure(folder: Path, frame: pd.DataFrame, curves: pd.DataFrame | None) -> None:
    """Write prune.png: utility by budget, and training curves over seeds."""
    means = frame.groupby(["policy", "budget_share"])["utility_test"].mean().unstack()
    shares = [100 * float(share) for share in means.columns]
    # Learned policies have the first colors, as in the panel of their training; dense fits no budget.
    names = [*learned_of(frame), *(name for name in policies_of(frame) if name in NOT_LEARNED and name != "dense")]
    with figure_file(folder / "prune.png", 1, 2, size=(11, 5)) as (figure, (left, right)):
        for rank, name in enumerate(names, start=1):
            width = 2.2 if name in learned_of(frame) else 1.0
            left.plot(
                shares, means.loc[name], label=name, marker="o", markersize=3, **line_style(rank), linewidth=width
            )
        left.set(xlabel="budget, % of the dense peak", ylabel="utility on the test text, RAP's ten loads")
        plot_training(right, curves)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=7)


def prune_context(folder: Path) -> dict[str, Any]:
    """Return what the template shows, and write prune.png."""
    frame, unseen = read_rows(folder / "prune.parquet"), read_rows(folder / "prune_unseen.parquet")
    made: dict[str, Any] = json.loads((folder / "prune.json").read_text(encoding="utf-8"))
    curves, ablation = (read_if_there(folder / name) for name in ("training.parquet", "prune_ablation.parquet"))
    prune_figure(folder, frame, curves)
    best = verdict(frame)
    shares = frame.assign(share=[f"{share:.0%}".replace("%", " %") for share in frame["budget_share"]])
    return {
        "made": made,
        "commit": commit_of(made),
        "fresh": set(made["trained_on"]) <= {made["quality_sha256"]},
        "loads": len(frame[["batch", "sequence_tokens"]].drop_duplicates()),
        "budgets": frame["budget_share"].nunique(),
        "table": prune_table_markdown(frame),
        "best": best,
        "averaged": [name for name in learned_of(frame) if f"{name}_seeds" in policies_of(frame)],
        "by_budget": by_kind(
            shares.sort_values("budget_share", ascending=False, kind="stable"),
            policies_of(frame),
            {"share": ""},
            "utility_test",
        ),
        "worst": worst_markdown(frame, best["name"]) if best else "",
        "training_loads": prune_loads(),
        "unseen": prune_table_markdown(unseen),
        "training": "" if curves is None else training_markdown(curves, float(made["knapsack_validation"])),
        "ablation": "" if ablation is None else ablation_markdown(ablation, "loads"),
    }
