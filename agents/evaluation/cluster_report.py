"""The part of the results page on ``ServeCluster``, computed from its result files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from agents.evaluation.serve_report import against, by_kind_markdown, signed, training_markdown
from sim.atomic import write_whole

REFERENCE = "precision+queue"
ORACLE = "oracle_static"
COMPARED = ("dense", "static", "greedy_stop+queue", "precision+queue", "saber")
"""Rules that stand beside learned policies behind other routers."""
ABOUT = {
    "learned_serve": "the policy that ships for one replica, which does not look at the others",
    "learned_cluster": "one policy for all replicas, PPO in clusters that went on from learned_serve; each sees the "
    "others and is paid what the cluster earns",
    "learned_cluster_own": "the same, each paid for its own requests too (own_share=1)",
    "learned_cluster_blind": "the same as learned_cluster, but what it would see of the others is hidden",
    ORACLE: "the best single plan for all replicas, chosen in hindsight for each cluster",
}


def _policies(frame: pd.DataFrame) -> list[str]:
    names = [str(name) for name in dict.fromkeys(frame["policy"])]
    return [name for name in names if name != ORACLE] + [name for name in names if name == ORACLE]


def _trained_in_clusters(names: list[str]) -> list[str]:
    return [name for name in names if name.startswith("learned_cluster")]


def cluster_table_markdown(frame: pd.DataFrame) -> str:
    """Return the main table: every policy over all clusters and seeds."""
    lines = [
        f"| policy | seeds | utility | minus {REFERENCE} | SLO attainment | goodput, 1/s | TTFT P95, s | rejected "
        "| loss, nats | over budget, s | plan changes a replica | busiest replica |",
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
            f"{100 * part['busiest_share'].mean():.1f} % |"
        )
    return "\n".join(lines) + "\n"


def cluster_verdict(frame: pd.DataFrame) -> str:
    """Return what the table says, whichever way it went."""
    names = _policies(frame)
    means = {name: float(frame[frame["policy"] == name]["utility"].mean()) for name in names}
    rules = [name for name in names if not name.startswith("learned") and name != ORACLE]
    simple = max(rules, key=lambda name: means[name])
    learned = _trained_in_clusters(names)
    if not learned:
        return f"The best rule is **{simple}**, utility {means[simple]:.4f}.\n"
    best = max(learned, key=lambda name: means[name])
    found = {name: against(frame, best, name) for name in rules}
    beaten = [name for name in rules if found[name].low > 0]
    lost = [name for name in rules if found[name].high < 0]
    even = [name for name in rules if name not in beaten and name not in lost]
    text = (
        f"**{best}** has utility {means[best]:.4f}: {signed(found[simple])} against the best rule here ({simple}, "
        f"{means[simple]:.4f}). With an interval that excludes zero it beats {', '.join(beaten) or 'none'}; it loses "
        f"to {', '.join(lost) or 'none'}; undecided are {', '.join(even) or 'none'}.\n\n"
    )
    if "learned_serve" in names:
        text += (
            f"**What training in clusters adds** to the policy of one replica (learned_serve, "
            f"{means['learned_serve']:.4f}, {signed(against(frame, 'learned_serve', simple))} against {simple}): "
            + "; ".join(f"{name} {signed(against(frame, name, 'learned_serve'))}" for name in learned)
            + ".\n\n"
        )
    others = [name for name in learned if name != "learned_cluster"]
    if "learned_cluster" in learned and others:
        text += (
            "**What it sees and what it is paid for.** learned_cluster minus "
            + "; minus ".join(f"{name}: {signed(against(frame, 'learned_cluster', name))}" for name in others)
            + ".\n\n"
        )
    table = frame.groupby(["source", "policy"])["utility"].mean()
    kinds = {str(kind): float(table[(kind, best)]) - float(table[(kind, simple)]) for kind in set(frame["source"])}
    worst, easiest = min(kinds, key=kinds.__getitem__), max(kinds, key=kinds.__getitem__)
    text += (
        f"Against {simple}, {best} is worst on {worst} ({kinds[worst]:+.3f}) and best on {easiest} "
        f"({kinds[easiest]:+.3f}).\n"
    )
    return text


def cluster_figure(folder: Path, frame: pd.DataFrame, curves: pd.DataFrame | None) -> None:
    """Write cluster.png: how far every policy is from the reference, by source, and training curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(picture)
    points, lines = picture.subplots(1, 2, width_ratios=(3, 2))
    means = frame.groupby(["source", "policy"])["utility"].mean()
    names = [name for name in _policies(frame) if name != REFERENCE]
    for k, source in enumerate(dict.fromkeys(frame["source"])):
        apart = [float(means[(source, name)]) - float(means[(source, REFERENCE)]) for name in names]
        points.plot(apart, range(len(names)), "o", color=f"C{k}", label=str(source), markersize=5)
    points.axvline(0.0, color="black", linewidth=0.8)
    points.set_yticks(range(len(names)), names, fontsize=8)
    points.invert_yaxis()
    points.grid(axis="x", alpha=0.4)
    points.set(xlabel=f"utility minus that of {REFERENCE}, held-out clusters")
    points.legend(fontsize=8)
    if curves is not None:
        for k, (label, part) in enumerate(curves.groupby("policy", sort=False)):
            for line, (_, one) in enumerate(part.groupby("seed")):
                shown = str(label) if line == 0 else None
                lines.plot(one["env_steps"], one["validation_utility"], color=f"C{k}", alpha=0.7, label=shown)
        lines.set(xlabel="replica ticks", ylabel="validation utility", title="training, one line a seed")
        lines.legend(fontsize=8)
    write_whole(folder / "cluster.png", lambda part: picture.savefig(part, format="png"))


def cluster_section(folder: Path) -> str:
    """Return the section, and write its figure; empty where nothing was evaluated."""
    if not (folder / "cluster.json").exists():  # written last
        return ""
    frame = pd.read_parquet(folder / "cluster.parquet")
    made: dict[str, Any] = json.loads((folder / "cluster.json").read_text(encoding="utf-8"))
    path = folder / "cluster_training.parquet"
    curves = pd.read_parquet(path) if path.exists() else None
    cluster_figure(folder, frame, curves)
    tuned = made["tuned"]
    parts = [
        "## Serving with many replicas (`ServeCluster-v0`)\n",
        f"`{made['command']}`, commit {made['commit'][:12]}"
        + (f" (rules: {made['rules_commit'][:12]})" if "rules_commit" in made else "")
        + f": {frame['window'].nunique()} held-out clusters of "
        f"{made['replicas']} replicas behind the router {made['router']}. A cluster serves as many windows of 120 s as "
        "it has replicas, all of one trace and one load, whose requests arrive together; each replica lives under a "
        "budget of its own (full, a co-tenant, or a random walk), so that some are pressed while others are not. "
        "Model, device, SLO and quality are those of ServeTrace above. Every replica has its own policy, which decides "
        f"once a second. Rules were tuned on {tuned['windows']} training clusters: static plan '{tuned['static']}', "
        f"queue limit {tuned['queue']}, greedy_stop {json.dumps(tuned['greedy_stop'])}, SABER's margin "
        f"{tuned['saber_margin']}. Learned policies were trained on training windows of "
        + "; ".join(f"{', '.join(kinds)} ({name})" for name, kinds in made["sources"].items())
        + ". Intervals: paired bootstrap over clusters and seeds, 95 %; clusters of one trace draw from the same "
        "held-out minutes, so intervals are narrower than those of independent clusters would be.\n",
        cluster_table_markdown(frame),
        "Rules: as above, one for each replica. "
        + "; ".join(f"**{name}**: {text}" for name, text in ABOUT.items() if name in set(frame["policy"]))
        + ".\n",
        cluster_verdict(frame),
        "![utility by trace, and training](results/cluster.png)\n",
        "### Clusters by trace\n",
        by_kind_markdown(frame, "source"),
        "### Clusters by load\n",
        "How far along its trace's range of rates, on a logarithmic scale; a replica's share of the load.\n",
        by_kind_markdown(frame, "load"),
        "### Clusters by how many replicas are pressed\n",
        f"Replicas of {made['replicas']} whose memory moves.\n",
        by_kind_markdown(frame.sort_values("pressed", kind="stable"), "pressed"),
    ]
    if (folder / "cluster_routers.parquet").exists():
        parts += [
            "### Clusters behind other routers\n",
            f"The same clusters; learned policies and rules are those of {made['router']}.\n",
            by_kind_markdown(pd.read_parquet(folder / "cluster_routers.parquet"), "router"),
        ]
    if curves is not None:
        taken = ", ".join(f"{name} {min(x):.0f} to {max(x):.0f}" for name, x in made["seconds"].items())
        parts += [
            "### Training in clusters\n",
            f"Wall seconds of one process on two shared cores beside other work; a step is a tick of one replica. "
            f"Until its best policy each took: {taken}. learned_serve has validation utility "
            f"{made['learned_serve_validation']:.4f} in these clusters.\n",
            training_markdown(curves),
        ]
    return "\n".join(parts)
