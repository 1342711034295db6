"""The part of the results page on ``ServeTrace``, computed from its result files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agents.evaluation.ablation import WINDOWS, ablation_markdown
from agents.evaluation.serve import serve_grid
from agents.evaluation.statistics import Interval, paired_difference
from sim.atomic import write_whole

REFERENCE = "greedy_stop+queue"
ABOUT = {
    "dense": "everything, no limit",
    "int4": "all layers at 4 bits",
    "static": "the best plan of the learned policy's own table",
    "saber": "queue limited by the speed seen (SABER), dense",
    "saber_int4": "the same at 4 bits",
    "greedy_stop": "RAP's rule without learning: drop in a greedy order until memory suffices",
    "random_stop": "the same in a random order",
    "pressure_stop": "MorphServe's controller over the greedy order",
    "precision": "layers at 4 bits in proportion to load (FlexQuant, PMPD)",
    "morphserve": "MorphServe's three modes",
    "+queue": "the same with a queue limit",
    "lookahead": "every plan of the learned policy's table tried on a model of the server, the best taken",
    "learned_clone": "learned what a planner that knew the training windows lost under each plan (agents/training/clone.py)",
    "learned_clone_busy": "the same at the upper half of the rates, tried after at_high below did well here",
    "learned_ppo": "PPO that went on from learned_clone",
    "learned_ppo_plan": "PPO that began with one plan",
    "oracle_static": "the best plan of the table for each window, chosen in hindsight; not a bound for what adapts",
    "oracle_search": "the best schedule of these plans that a search finds with the window known (agents/evaluation/oracle.py)",
}
ORACLES = ("oracle_static", "oracle_search")
COMPARED = ("dense", "static", "greedy_stop+queue", "precision+queue", "lookahead")
"""Rules that stand beside learned policies where something differs from training."""


def _policies(frame: pd.DataFrame) -> list[str]:
    names = list(dict.fromkeys(frame["policy"]))
    return [name for name in names if name not in ORACLES] + [name for name in ORACLES if name in names]


def _learned(frame: pd.DataFrame) -> list[str]:
    return [name for name in _policies(frame) if str(name).startswith("learned")]


def against(frame: pd.DataFrame, ours: str, theirs: str) -> Interval:
    """Return by how much the utility of one policy is above another's, window by window."""
    return paired_difference(serve_grid(frame, ours), serve_grid(frame, theirs))


def signed(interval: Interval) -> str:
    """Return an interval as the tables show it."""
    mark = "" if interval.excludes_zero() else " (0 inside)"
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]{mark}"


def serve_table_markdown(frame: pd.DataFrame) -> str:
    """Return the main table: every policy over all windows and seeds."""
    lines = [
        f"| policy | seeds | utility | minus {REFERENCE} | SLO attainment | goodput, 1/s | TTFT P95, s | rejected "
        "| loss, nats | over budget, s | plan changes | decision, us |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in _policies(frame):
        part = frame[frame["policy"] == name]
        lines.append(
            f"| {name} | {part['seed'].nunique()} | {part['utility'].mean():.4f} | "
            + ("-" if name == REFERENCE else signed(against(frame, name, REFERENCE)))
            + f" | {100 * part['slo_attainment'].mean():.1f} % | {part['goodput_rps'].mean():.2f} | "
            f"{part['ttft_p95_s'].mean():.2f} | {100 * part['rejected_share'].mean():.1f} % | "
            f"{part['loss'].mean():.4f} | {part['budget_violation_s'].mean():.2f} | {part['transitions'].mean():.1f} | "
            f"{1e6 * part['decision_p50_s'].median():.0f} (P99 {1e6 * part['decision_p99_s'].median():.0f}) |"
        )
    return "\n".join(lines) + "\n"


def by_kind_markdown(frame: pd.DataFrame, column: str) -> str:
    """Return mean utility by source, budget or load."""
    kinds = list(dict.fromkeys(frame[column]))
    means = frame.groupby(["policy", column])["utility"].mean()
    lines = ["| policy | " + " | ".join(map(str, kinds)) + " |", "|---|" + "---:|" * len(kinds)]
    lines += [
        f"| {name} | " + " | ".join(f"{float(means[(name, kind)]):.3f}" for kind in kinds) + " |"
        for name in _policies(frame)
    ]
    return "\n".join(lines) + "\n"


def serve_verdict(frame: pd.DataFrame, trained_on: list[str]) -> str:
    """Return what the table says, whichever way it went."""
    names = _policies(frame)
    means = {name: float(frame[frame["policy"] == name]["utility"].mean()) for name in names}
    learned = _learned(frame)
    blind = [name for name in names if name not in learned and name not in ORACLES]
    oracle = next(name for name in reversed(ORACLES) if name in names)
    simple = max(blind, key=lambda name: means[name])
    with_queue = [name for name in blind if name.endswith("+queue") and name.removesuffix("+queue") in means]
    gains = {name: means[name] - means[name.removesuffix("+queue")] for name in with_queue}
    text = ""
    if learned:
        best = max(learned, key=lambda name: means[name])
        beaten = [name for name in blind if against(frame, best, name).low > 0]
        lost = [name for name in blind if against(frame, best, name).high < 0]
        even = [name for name in blind if name not in beaten and name not in lost]
        text += (
            f"**{best}** has utility {means[best]:.4f}: {signed(against(frame, best, REFERENCE))} against "
            f"{REFERENCE}, {signed(against(frame, best, simple))} against the best rule ({simple}). With an interval "
            f"that excludes zero it beats {', '.join(beaten) or 'none'}; it loses to {', '.join(lost) or 'none'}; "
            f"undecided are {', '.join(even) or 'none'}. "
            f"It reaches {100 * means[best] / means[oracle]:.1f} % of the utility of {oracle}, which knows the window; "
            f"the best rule reaches {100 * means[simple] / means[oracle]:.1f} %.\n\n"
        )
        kinds = {}
        for column in ("source", "budget"):
            table = frame.groupby([column, "policy"])["utility"].mean()
            for kind in dict.fromkeys(frame[column]):
                kinds[str(kind)] = float(table[(kind, best)]) - float(table[(kind, simple)])
        trained = float(np.mean([kinds[source] for source in trained_on if source in kinds]))
        worst, easiest = min(kinds, key=kinds.__getitem__), max(kinds, key=kinds.__getitem__)
        text += (
            f"**Where it fails and where it helps.** Against {simple} it is worst on {worst} ({kinds[worst]:+.3f}) and "
            f"best on {easiest} ({kinds[easiest]:+.3f}). It was trained on {' and '.join(trained_on)} alone, and "
            f"differs there from {simple} by {trained:+.3f}.\n\n"
        )
    if gains:
        low, high = min(gains.values()), max(gains.values())
        without = max(means[name.removesuffix("+queue")] - means["dense"] for name in gains)
        text += (
            f"What helps most is no pruning at all: a limit on the queue adds {low:.3f} to {high:.3f} of utility to "
            f"every rule, where the rules alone add at most {without:.3f} to dense: a request that will miss its "
            "target still takes the time of those behind it.\n"
            if low > without
            else f"**A limit on the queue** changes the rules' utility by {low:+.3f} to {high:+.3f}; without it the "
            f"rules change that of dense by at most {without:+.3f}.\n"
        )
    return text


def training_markdown(curves: pd.DataFrame) -> str:
    """Return what training took and reached, a row a kind."""
    lines = ["| training | seeds | best validation utility, mean (lowest to highest) | seconds | environment steps |"]
    lines.append("|---|---:|---:|---:|---:|")
    for name, part in curves.groupby("policy", sort=False):
        ends = part.groupby("seed").agg({"validation_utility": "max", "seconds": "max", "env_steps": "max"})
        best = ends["validation_utility"]
        lines.append(
            f"| {name} | {len(ends)} | {best.mean():.4f} ({best.min():.4f} to {best.max():.4f}) | "
            f"{ends['seconds'].median():.0f} | {ends['env_steps'].median():,.0f} |"
        )
    return "\n".join(lines) + "\n"


LOADS = "How far along its trace's range of rates (conf/split/serve.yaml) a window is, on a logarithmic scale.\n"


def elsewhere_section(folder: Path, frame: pd.DataFrame, made: dict[str, Any]) -> list[str]:
    """Return what policies do where they were not trained: on other traces, at other loads, at other losses."""
    parts = []
    compared = [name for name in _policies(frame) if name in COMPARED or name in _learned(frame)]
    if (folder / "serve_elsewhere.parquet").exists():
        trained = pd.read_parquet(folder / "serve_elsewhere.parquet")
        both = pd.concat([frame[frame["policy"].isin(compared)], trained])
        seeds = trained.groupby("policy")["seed"].nunique().max()
        parts += [
            "### Trained elsewhere\n",
            "The same test windows; **on_X** is learned_clone trained on trace X alone, **at_low** and **at_high** on "
            f"the lower and upper half of the rates of its trace, by {seeds} seed(s) each; conf/evaluate.yaml has the "
            "commands.\n",
            by_kind_markdown(both, "source"),
            by_kind_markdown(both, "load"),
        ]
    if (folder / "serve_quality.parquet").exists():
        other = pd.read_parquet(folder / "serve_quality.parquet")
        columns = ["published", made["other_quality"]]
        pieces = (frame[frame["policy"].isin(other["policy"])], other)
        both = pd.concat([part.assign(losses=name) for name, part in zip(columns, pieces, strict=True)])
        parts += [
            "### At another model's losses\n",
            f"The 4-bit losses of `{made['other_quality']}` in place of the served model's, those of dropped blocks as "
            "before. Learned policies do not know it; lookahead is told.\n",
            by_kind_markdown(both, "losses"),
        ]
    return parts


def ablation_section(folder: Path) -> list[str]:
    """Return which entries the fine-tuned policies live by; nothing where that was not measured."""
    path = folder / "serve_ablation.parquet"
    if not path.exists():
        return []
    ablation = pd.read_parquet(path)
    return [
        "### Which entries of the observation matter to serving\n",
        f"The {ablation['seed'].nunique()} policies of learned_ppo play {WINDOWS} validation windows while entries "
        "come from another of these windows at the same tick (permutation importance; nothing is trained again). Below "
        "zero is noise.\n",
        ablation_markdown(ablation, "windows"),
    ]


def serve_figure(folder: Path, frame: pd.DataFrame, curves: pd.DataFrame | None) -> None:
    """Write serve.png: utility of every policy by source, and training curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(picture)
    bars, lines = picture.subplots(1, 2, width_ratios=(3, 2))
    names = _policies(frame)
    sources = list(dict.fromkeys(frame["source"]))
    for k, source in enumerate(sources):
        part = frame[frame["source"] == source].groupby("policy")["utility"].mean()
        bars.plot([part[name] for name in names], range(len(names)), "o", color=f"C{k}", label=source, markersize=5)
    bars.set_yticks(range(len(names)), names, fontsize=8)
    bars.invert_yaxis()
    bars.grid(axis="x", alpha=0.4)
    bars.set(xlabel="utility on held-out windows")
    bars.legend(fontsize=8)
    if curves is not None:
        for k, (label, part) in enumerate(curves.groupby("policy", sort=False)):
            for line, (_, one) in enumerate(part.groupby("seed")):
                shown = str(label) if line == 0 else None
                lines.plot(one["env_steps"], one["validation_utility"], color=f"C{k}", alpha=0.7, label=shown)
        lines.set(xlabel="environment steps", ylabel="validation utility", title="training, one line a seed")
        lines.legend(fontsize=8)
    write_whole(folder / "serve.png", lambda part: picture.savefig(part, format="png"))


def serve_section(folder: Path) -> str:
    """Return the section, and write its figure; empty where nothing was evaluated."""
    if not (folder / "serve.parquet").exists():
        return ""
    frame = pd.read_parquet(folder / "serve.parquet")
    made: dict[str, Any] = json.loads((folder / "serve.json").read_text(encoding="utf-8"))
    path = folder / "serve_training.parquet"
    curves = pd.read_parquet(path) if path.exists() else None
    serve_figure(folder, frame, curves)
    windows = frame["window"].nunique()
    anew = made.get("anew")
    later = f" ({' and '.join(anew['policies'])}: {anew['commit'][:12]})" if anew else ""
    parts = [
        "## Serving a trace under memory that moves (`ServeTrace-v0`)\n",
        f"`{made['command']}`, commit {made['commit'][:12]}{later}: {windows} held-out windows of 120 s from "
        f"{', '.join(dict.fromkeys(frame['source']))}, each under a full budget, a co-tenant that comes and goes, and "
        "a random walk, at two loads. Llama-2-7B on one A100, the SLO a first token within two seconds; quality from "
        "the published points of `conf/quality/llama2_7b_published.yaml`, where which blocks a plan drops makes no "
        "difference. Every policy decides once a second. The learned policies were trained on windows of "
        f"{', '.join(made['trained_on'])} alone; windows of one trace overlap in time, so their intervals are narrower "
        "than those of independent windows would be. Tuned on training windows: "
        f"static plan '{made['tuned']['static']}', queue limit {made['tuned']['queue']}, greedy_stop "
        f"{json.dumps(made['tuned']['greedy_stop'])}, SABER's margin {made['tuned']['saber_margin']}.\n",
        serve_table_markdown(frame),
        "; ".join(f"**{name}**: {text}" for name, text in ABOUT.items()) + ".\n",
        serve_verdict(frame, made["trained_on"]),
        "![utility by trace, and training](results/serve.png)\n",
        "### By trace\n",
        by_kind_markdown(frame, "source"),
        "### By budget\n",
        by_kind_markdown(frame, "budget"),
    ]
    if "load" in frame:
        parts += ["### By load\n", LOADS, by_kind_markdown(frame, "load")]
    if curves is not None:
        taken = ", ".join(f"{name} {min(x):.0f} to {max(x):.0f}" for name, x in made.get("seconds", {}).items())
        parts += [
            "### Training\n",
            "Wall seconds of one process on two shared cores beside other work. Until its best policy each took: "
            f"{taken} (learned_ppo without the clone it goes on from).\n",
            training_markdown(curves),
        ]
    parts += ablation_section(folder)
    parts += elsewhere_section(folder, frame, made)
    return "\n".join(parts)
