"""The page of results: tables, one figure and what they say, computed from committed result files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from agents.envs.prune_loads import Draw, prune_draws
from agents.evaluation.ablation import ablation_markdown
from agents.evaluation.cluster_report import cluster_section
from agents.evaluation.prune import grid
from agents.evaluation.serve_report import serve_section
from agents.evaluation.statistics import Interval, paired_difference
from sim.atomic import write_whole
from sim.paths import REPOSITORY
from sim.results.run_folder import write_text

PAGE = REPOSITORY / "agents" / "RESULTS.md"
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
ABOUT = {
    "dense": "nothing is dropped, so nothing fits",
    "static": "one mask, the best on 2,000 training loads",
    "random": "a random order until it fits, 20 orders",
    "ffn_only": "FFN blocks by their own loss, then MHA",
    "mha_only": "MHA blocks by their own loss, then FFN",
    "one_shot": "all blocks by their own loss (RAP's ablation)",
    "cosine": "all blocks by similarity of input and output (ShortGPT)",
    "lis_w4": "whole layers in MorphServe's order",
    "greedy_stop": "RAP's greedy order (GSI) until it fits",
    "ratio": "fitted cost a byte freed at this load, until it fits",
    "knapsack": "the exact optimum of the additive surrogate",
    "oracle": "the same on the losses of the test text, which no policy may know",
}


def unseen_loads() -> list[Draw]:
    """Return loads outside the range of training: larger batches, longer sequences, tighter budgets."""
    pairs = [(1, 128), (1, 8192), (4, 8192), (32, 512), (32, 2048), (64, 1024)]
    return [
        Draw(batch=batch, sequence_tokens=tokens, budget_share=share)
        for batch, tokens in pairs
        for share in (0.9, 0.7, 0.5, 0.4)
    ]


def policies_of(frame: pd.DataFrame) -> list[str]:
    """Return the policies, the oracle last."""
    names = list(dict.fromkeys(frame["policy"]))
    return [name for name in names if name != "oracle"] + [name for name in names if name == "oracle"]


def learned_of(frame: pd.DataFrame) -> list[str]:
    """Return the policies that were learned."""
    return [name for name in policies_of(frame) if name not in NOT_LEARNED]


def _against(frame: pd.DataFrame, ours: str, theirs: str, column: str = "utility_test") -> Interval:
    return paired_difference(grid(frame, ours, column), grid(frame, theirs, column))


def _shown(interval: Interval) -> str:
    mark = "" if interval.excludes_zero() else " (0 inside)"
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]{mark}"


def prune_table_markdown(frame: pd.DataFrame) -> str:
    """Return the main table: every policy over all loads and seeds."""
    lines = [
        f"| policy | seeds | utility | minus {REFERENCE} | of knapsack | worse than {REFERENCE} | fits "
        "| loss, nats | utility, other fit | decision, us |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    best = float(grid(frame, "knapsack", "utility_test").mean())
    reference = grid(frame, REFERENCE, "utility_test").mean(axis=0)
    for name in policies_of(frame):
        part = frame[frame["policy"] == name]
        values = grid(frame, name, "utility_test")
        worse = int((values < reference - 1e-9).sum())
        micros = 1e6 * part["decision_s"]
        lines.append(
            f"| {name} | {len(values)} | {values.mean():.4f} | "
            + ("-" if name == REFERENCE else _shown(_against(frame, name, REFERENCE)))
            + f" | {100 * values.mean() / best:.1f} % | {worse} of {values.size} | {100 * part['fits'].mean():.0f} % | "
            f"{part['loss_test'].mean():.3f} | {part['utility_test_neighbours'].mean():.4f} | "
            f"{micros.median():.0f} (P99 {micros.quantile(0.99):.0f}) |"
        )
    return "\n".join(lines) + "\n"


def by_budget_markdown(frame: pd.DataFrame) -> str:
    """Return mean utility by budget."""
    budgets = sorted(frame["budget_share"].unique(), reverse=True)
    lines = [
        "| policy | " + " | ".join(f"{100 * b:.0f} %" for b in budgets) + " |",
        "|---|" + "---:|" * len(budgets),
    ]
    for name in policies_of(frame):
        part = frame[frame["policy"] == name]
        cells = [f"{part[part['budget_share'] == b]['utility_test'].mean():.3f}" for b in budgets]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def training_markdown(curves: pd.DataFrame, knapsack_validation: float) -> str:
    """Return what the trainings took and reached."""
    lines = [
        "| training | seeds | best validation utility, mean (lowest to highest) | of knapsack | seconds | environment "
        "steps | seconds to 95 % of knapsack | sampling : learning |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, part in curves.groupby("policy", sort=False):
        best = part.groupby("seed")["best_utility"].max()
        ends = part.groupby("seed").last()
        near = part[part["best_utility"] >= 0.95 * knapsack_validation].groupby("seed")["seconds"].min()
        sampled = part["sample_seconds"].sum() / (part["sample_seconds"] + part["learn_seconds"]).sum()
        reached = f"{near.median():.0f} (median of {len(near)})" if len(near) else "not reached"
        lines.append(
            f"| {name} | {len(best)} | {best.mean():.4f} ({best.min():.4f} to {best.max():.4f}) | "
            f"{100 * best.mean() / knapsack_validation:.1f} % | {ends['seconds'].mean():.0f} | "
            f"{ends['env_steps'].mean():,.0f} | {reached} | {100 * sampled:.0f} : {100 - 100 * sampled:.0f} |"
        )
    return "\n".join(lines) + "\n"


def worst_markdown(frame: pd.DataFrame, name: str, count: int = 5) -> str:
    """Return the loads on which a policy falls behind the knapsack most."""
    columns = ["batch", "sequence_tokens", "budget_share"]
    picked = ["utility_test", "dropped_mha", "dropped_ffn"]
    ours = frame[frame["policy"] == name].groupby(columns)[picked].mean()
    theirs = frame[frame["policy"] == "knapsack"].groupby(columns)[picked].mean()
    behind = (theirs["utility_test"] - ours["utility_test"]).sort_values(ascending=False).head(count)
    lines = ["| batch | tokens | budget | utility | knapsack's | drops MHA + FFN | knapsack's |"]
    lines.append("|---:|---:|---:|---:|---:|---:|---:|")
    for key in behind.index.tolist():
        batch, tokens, share = key
        mine, other = ours.loc[key], theirs.loc[key]
        lines.append(
            f"| {batch} | {tokens} | {100 * share:.0f} % | {mine['utility_test']:.3f} | {other['utility_test']:.3f} | "
            f"{mine['dropped_mha']:.1f} + {mine['dropped_ffn']:.1f} | "
            f"{other['dropped_mha']:.0f} + {other['dropped_ffn']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def verdict(frame: pd.DataFrame) -> str:
    """Return what the main table says of the claim, whichever way it went."""
    learned = learned_of(frame)
    if not learned:
        return "No learned policy was evaluated.\n"
    best = max(learned, key=lambda name: float(grid(frame, name, "utility_test").mean()))
    against = _against(frame, best, REFERENCE)
    solved = _against(frame, best, "knapsack")
    values, reference = grid(frame, best, "utility_test"), grid(frame, REFERENCE, "utility_test").mean(axis=0)
    share = float(values.mean() / grid(frame, "knapsack", "utility_test").mean())
    oracle = float(values.mean() / grid(frame, "oracle", "utility_test").mean())
    worse = int((values < reference - 1e-9).sum())
    means = {name: float(grid(frame, name, "utility_test").mean()) for name in policies_of(frame)}
    solved_share = means["knapsack"] / means["oracle"]
    simple = max((n for n in means if n not in (*learned, "knapsack", "oracle")), key=lambda name: means[name])
    simple_share = means[simple] / means["knapsack"]
    text_matters = 1 / solved_share - 1 > max(1 - simple_share, 1 - share)
    blind = [n for n in policies_of(frame) if n not in learned and n != "oracle"]
    beaten = [n for n in blind if _against(frame, best, n).low > 0]
    unbeaten = [n for n in blind if n not in beaten]
    return (
        f"The best learned policy is **{best}**: utility {values.mean():.4f}, {_shown(against)} against {REFERENCE}, "
        f"{_shown(solved)} against the knapsack ({100 * share:.1f} % of it), {100 * oracle:.1f} % of the oracle. "
        f"It is below {REFERENCE} on {worse} of {values.size} (load, seed) pairs. With an interval that excludes zero "
        f"it beats {', '.join(beaten) or 'none'}; it does not beat {', '.join(unbeaten) or 'none'}.\n\n"
        "**When learning helps here, and when not.** One load and one budget is a small deterministic problem. Under "
        "an additive surrogate the knapsack solves it exactly, and no policy can be better on the losses that both "
        "know; what a learned policy can show is that it finds nearly the same plans without being told the structure "
        "of the problem. "
        + (
            f"It does: {100 * share:.1f} % of the knapsack's utility on the test text. "
            if share > 0.98
            else f"It stays {100 * (1 - share):.1f} % short of that. "
        )
        + (
            f"Knowing the losses of the right text would be worth {100 * (1 / solved_share - 1):.0f} % more than the "
            f"knapsack, the best rule without learning ({simple}) lacks {100 * (1 - simple_share):.1f} % of it"
            + (": which text the losses come from matters more than who decides.\n" if text_matters else ".\n")
        )
    )


def figure(folder: Path, frame: pd.DataFrame, curves: pd.DataFrame | None) -> None:
    """Write prune.png: utility by budget, and training curves over seeds."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    picture = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots(1, 2)
    budgets = sorted(frame["budget_share"].unique())
    learned = learned_of(frame)
    for name in policies_of(frame):
        if name == "dense":
            continue
        part = frame[frame["policy"] == name]
        means = [part[part["budget_share"] == b]["utility_test"].mean() for b in budgets]
        style: dict[str, Any] = {"linewidth": 2.2} if name in learned else {"linewidth": 1.0, "alpha": 0.8}
        style["color"] = colours[policies_of(frame).index(name) % len(colours)]
        axes[0].plot([100 * b for b in budgets], means, label=name, marker="o", markersize=3, **style)
    axes[0].set(xlabel="budget, % of the dense peak", ylabel="utility on the test text", title="RAP's ten loads")
    axes[0].legend(fontsize=7)
    if curves is not None:
        for k, (label, part) in enumerate(curves.groupby("policy", sort=False)):
            for line, (_, one) in enumerate(part.groupby("seed")):
                axes[1].plot(
                    one["env_steps"], one["validation_utility"], color=f"C{k}", alpha=0.6, linewidth=0.9,
                    label=str(label) if line == 0 else None,
                )  # fmt: skip
        axes[1].set(xlabel="environment steps", ylabel="validation utility", title="training, one line a seed")
        axes[1].legend(fontsize=8)
    write_whole(folder / "prune.png", lambda part: picture.savefig(part, format="png"))


def write_report(folder: Path, page: Path = PAGE) -> Path:
    """Write the page and its figure from the result files of a folder."""
    frame, unseen = pd.read_parquet(folder / "prune.parquet"), pd.read_parquet(folder / "prune_unseen.parquet")
    made: dict[str, Any] = json.loads((folder / "prune.json").read_text(encoding="utf-8"))
    curves_path, ablation_path = folder / "training.parquet", folder / "prune_ablation.parquet"
    curves = pd.read_parquet(curves_path) if curves_path.exists() else None
    figure(folder, frame, curves)
    loads, shares = len(frame[["batch", "sequence_tokens"]].drop_duplicates()), frame["budget_share"].nunique()
    fresh = set(made["trained_on"]) <= {made["quality_sha256"]}
    parts = [
        "# Does learning beat simple rules?\n",
        f"Made by `{made['command']}` from the files of `agents/results` (`measure=false` writes this page again); "
        f"commit {made['commit'][:12]}, quality table {made['quality_sha256'][:12]}, {made['machine']}."
        + (
            ""
            if fresh
            else " The learned policies were trained on an earlier state of that table "
            f"({', '.join(x[:12] for x in made['trained_on'])}), while the rules decide on the present one."
        )
        + "\n",
        "## Pruning one load to its budget (`PruneToBudget-v0`)\n",
        f"RAP's {loads} loads at {shares} budgets on {made['model']}. Utility is exp(-loss), the dense perplexity over "
        "the plan's, if the plan fits its budget, else 0; the mean over all loads. Every policy decides on losses of "
        "the calibration text; the figures are on the test text, predicted by the table of `conf/quality` "
        "(`hw/SCORES.md` states its held-out error). Intervals: paired bootstrap over loads and seeds, 95 %. "
        "A decision is a whole plan; one evaluation of the network, that is one block, takes "
        f"{1e6 * made['network_p50_s']:.0f} us (P99 {1e6 * made['network_p99_s']:.0f}). "
        '"Other fit" is the same plans under the fit with terms for neighbours, in which no knapsack is exact.\n',
        prune_table_markdown(frame),
        "Baselines: " + "; ".join(f"**{name}** {ABOUT[name]}" for name in ABOUT) + ".\n",
        verdict(frame),
        "![utility by budget, and training](results/prune.png)\n",
        "### By budget\n",
        by_budget_markdown(frame),
    ]
    learned = learned_of(frame)
    if learned:
        best = max(learned, key=lambda name: float(grid(frame, name, "utility_test").mean()))
        parts += [
            "### Where it fails\n",
            f"The loads on which {best} falls behind the knapsack most (mean over seeds):\n",
            worst_markdown(frame, best),
        ]
    parts += [
        "### Loads that training never reaches\n",
        "Batches to 64, sequences of 128 and 8,192 tokens, budgets down to 40 %; training drew batches of "
        f"{prune_draws().batch[0]} to {prune_draws().batch[1]}, {prune_draws().sequence_tokens[0]} to "
        f"{prune_draws().sequence_tokens[1]} tokens, budgets of {100 * prune_draws().budget_share[0]:.0f} to "
        f"{100 * prune_draws().budget_share[1]:.0f} %.\n",
        prune_table_markdown(unseen),
    ]
    if curves is not None:
        parts += [
            "### Training\n",
            "One process on two shared cores beside other work, so seconds are wall time and an upper bound; an "
            "environment step costs 6 us of CPU in them (`tests/bench/bench_env.py`), the rest is RLlib's sampling and "
            f"the learner. The knapsack's validation utility is {float(made['knapsack_validation']):.4f}"
            + ("" if fresh else " on the present quality table, the trainings' figures are on that of their time")
            + ".\n",
            training_markdown(curves, float(made["knapsack_validation"])),
        ]
    if ablation_path.exists():
        parts += [
            "### Which entries of the observation matter\n",
            "The trained policies play the validation loads while one kind of entry is taken from another load "
            "(permutation importance; nothing is trained again).\n",
            ablation_markdown(pd.read_parquet(ablation_path), "loads"),
        ]
    parts += [serve_section(folder), cluster_section(folder)]
    write_text(page, "\n".join(parts).rstrip("\n") + "\n")
    return page
