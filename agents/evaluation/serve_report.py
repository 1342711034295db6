"""The section of the agents page on ``ServeTrace``, computed from its result files alone.

Means are over traces: first over the windows of each trace, then over traces. Two policies are compared on the windows
that both played, because some rules need low-precision copies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agents.evaluation.ablation import WINDOWS, ablation_markdown
from agents.evaluation.claim import CRITERIA, MOST_BELOW, ORACLE_SHARE
from agents.evaluation.rules import RULES, about_rule
from agents.evaluation.serve import MEMBERS, ORACLES, serve_grid
from agents.evaluation.statistics import Interval, paired_difference, share_of
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
from sim.results.plots import COLORS, figure_file

REFERENCE = "dense"
FEWEST_BLOCKS = 6
"""A bootstrap of fewer blocks is no interval: with two, a trace's would have three possible values."""
EASY, HOPELESS = 0.99, 0.1
"""Windows in which some rule has a higher utility, or none does, say little about the choice of a policy."""
SHOWN = 12
"""Rules in tables by trace, scenario, load and budget: those with the highest utility."""
SPECS = {"windows": ",d", "utility": ".4f", "SLO attainment": ".1%", "goodput (req/s)": ".2f", "TTFT P95 (s)": ".2f"}
SPECS |= {"rejected": ".1%", "loss (nats)": ".4f", "over budget (s)": ".2f", "plan changes": ".1f"}


def rules_of(frame: pd.DataFrame) -> list[str]:
    """Return the rules in a frame: neither learned nor an oracle."""
    return [name for name in policies_of(frame, ORACLES) if not name.startswith("learned") and name not in ORACLES]


def learned_of(frame: pd.DataFrame) -> list[str]:
    """Return the learned policies in a frame, without the networks that one averages."""
    names = policies_of(frame, ORACLES)
    return [name for name in names if name.startswith("learned") and not name.endswith(MEMBERS)]


def trace_mean(frame: pd.DataFrame, policy: str, column: str = "utility") -> float:
    """Return the mean of a policy over traces, each counting the same."""
    part = frame[frame["policy"] == policy]
    return float(part.groupby("source")[column].mean().mean())


def common(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Return the rows of some policies on the windows that all of them played."""
    part = frame[frame["policy"].isin(names)]
    played = part.groupby("window")["policy"].nunique()
    return part[part["window"].isin(played[played == len(set(names))].index)]


def against(frame: pd.DataFrame, ours: str, theirs: str) -> Interval:
    """Return how much higher the utility of one policy is than another's, on the windows that both played."""
    part = common(frame, (ours, theirs))
    windows = part.drop_duplicates("window").sort_values("window")
    return paired_difference(
        serve_grid(part, ours),
        serve_grid(part, theirs),
        traces=windows["source"],
        blocks=windows.get("block"),
    )


def table_row(frame: pd.DataFrame, name: str, reference: str, *, ours_first: bool = False) -> dict[str, Any]:
    """Return the figures of a policy that the tables of servers and of clusters share.

    Args:
        reference: the policy to compare with. ours_first: show the reference minus this policy, not the reverse.
    """
    part = frame[frame["policy"] == name]
    compared = name != reference and reference in set(frame["policy"].unique())
    pair = (reference, name) if ours_first else (name, reference)
    return {
        "policy": name,
        "seeds": part["seed"].nunique(),
        **({"windows": part["window"].nunique()} if ours_first else {}),
        "utility": trace_mean(frame, name),
        (f"{reference} minus it" if ours_first else f"minus {reference}"): (
            signed(against(frame, *pair)) if compared else None
        ),
        "SLO attainment": trace_mean(frame, name, "slo_attainment"),
        "goodput (req/s)": trace_mean(frame, name, "goodput_rps"),
        "TTFT P95 (s)": trace_mean(frame, name, "ttft_p95_s"),
        "rejected": trace_mean(frame, name, "rejected_share"),
        "loss (nats)": trace_mean(frame, name, "loss"),
        "over budget (s)": trace_mean(frame, name, "budget_violation_s"),
        "plan changes": trace_mean(frame, name, "transitions"),
    }


def serve_table_markdown(frame: pd.DataFrame, compared: str = "learned_serve") -> str:
    """Return the main table: every policy over all its windows and seeds, compared with one of them."""
    reference = compared_policy(frame, compared) or REFERENCE
    by_policy = frame.groupby("policy")[["decision_p50_s", "decision_p99_s"]].median() * 1e6
    rows = [
        table_row(frame, name, reference, ours_first=True)
        | {f"decision {p.upper()} (us)": by_policy[f"decision_{p}_s"][name] for p in ("p50", "p99")}
        for name in policies_of(frame, ORACLES)
    ]
    return table(rows, SPECS | {"decision P50 (us)": ".0f", "decision P99 (us)": ".0f"})


def compared_policy(frame: pd.DataFrame, compared: str) -> str | None:
    """Return the policy of the comparison; if it did not play, the best learned one; None without any."""
    learned = learned_of(frame)
    return compared if compared in learned else max(learned, key=lambda name: trace_mean(frame, name), default=None)


def best_rule(frame: pd.DataFrame) -> str:
    """Return the rule with the highest utility among those that played every window."""
    counts = frame.groupby("policy")["window"].nunique()
    full = [name for name in rules_of(frame) if counts[name] == frame["window"].nunique()]
    return max(full or rules_of(frame), key=lambda name: trace_mean(frame, name))


def gaps(frame: pd.DataFrame, ours: str, theirs: str, columns: tuple[str, ...]) -> dict[str, float]:
    """Return by how much the utility of one policy is above another's, for every kind in some columns."""
    found: dict[str, float] = {}
    for column in columns:
        means = frame.groupby([column, "policy"])["utility"].mean().unstack()
        found |= {str(kind): float(value) for kind, value in (means[ours] - means[theirs]).items()}
    return found


def hardest_rule(frame: pd.DataFrame, ours: str) -> str:
    """Return the rule that a policy is least above, on the windows that both played."""

    def above(name: str) -> float:
        part = common(frame, (ours, name))
        return trace_mean(part, ours) - trace_mean(part, name)

    return min(rules_of(frame), key=above)


def against_the_best(frame: pd.DataFrame, ours: str, column: str) -> list[dict[str, Any]]:
    """Return, for each kind in a column, the rule that a policy is least above there, and by how much it is."""
    rows = []
    for kind in frame[column].unique().tolist():
        part = frame[frame[column] == kind]
        rule = hardest_rule(part, ours)
        part = common(part, (ours, rule))
        blocks = part.drop_duplicates("window")[["source", "block"]].drop_duplicates()
        found = against(part, ours, rule)
        rows.append(
            {
                column: str(kind),
                "windows": part["window"].nunique(),
                "blocks": len(blocks),
                "hardest rule": rule,
                "its utility": trace_mean(part, rule),
                ours: trace_mean(part, ours),
                "difference": difference_text(found, len(blocks)),
                "mean": found.mean,
            }
        )
    return rows


def difference_text(interval: Interval, blocks: int) -> str:
    """Return a difference with its interval, or alone where there are too few blocks for one."""
    return signed(interval) if blocks >= FEWEST_BLOCKS else f"{interval.mean:+.4f} (too few blocks)"


def same_rate(frame: pd.DataFrame) -> int:
    """Return how many windows have the rate of another load of their trace and scenario."""
    windows = frame.drop_duplicates("window")
    loads = windows.groupby(["scenario", "source", "rate"])["load"].transform("nunique")
    return int((loads > 1).sum())


def claims_held(frame: pd.DataFrame, ours: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return of each of ``CRITERIA`` whether it holds for a policy, and by which figures.

    Args:
        found: ``standing`` of the policy, and its shares of the oracles.
    """
    missing = [*found["undecided"], *found["loses_to"]]
    worst = min(against_the_best(frame, ours, "source"), key=lambda row: float(row["mean"]))
    found_share = next((row for row in found["oracles"] if row["oracle"] == "oracle_search"), None)
    share = None if found_share is None else found_share[f"share of it, {ours}"]
    reached = "it did not play" if found_share is None else f"{share:.1%} {found_share['its 95 % interval']}"
    return [
        {
            "claim": CRITERIA["rules"],
            "holds": not missing,
            "figures": f"{len(found['beats'])} of {len(found['beats']) + len(missing)} rules",
        },
        {
            "claim": CRITERIA["traces"],
            "holds": worst["mean"] >= -MOST_BELOW,
            "figures": f"least on {worst['source']}, against {worst['hardest rule']}: {worst['difference']}",
        },
        {
            "claim": CRITERIA["oracle"],
            "holds": None if share is None else share >= ORACLE_SHARE,
            "figures": reached,
        },
    ]


def easy_and_hopeless(frame: pd.DataFrame, ours: str | None, simple: str) -> dict[str, Any] | None:
    """Return how many windows decide little, and how a policy stands without them; None where there are none.

    A window is easy if some rule has a utility above ``EASY``, and hopeless if none has more than ``HOPELESS``.

    Returns:
        Counts of ``easy`` windows and of those of them that ``dense`` serves so, ``hopeless``, and ``against_simple``:
        a policy minus the best rule on all other windows.
    """
    by_window = frame[frame["policy"].isin(rules_of(frame))].groupby("window")["utility"].max()
    dense = frame[frame["policy"] == REFERENCE].set_index("window")["utility"]
    easy, hopeless = by_window[by_window > EASY].index, by_window[by_window <= HOPELESS].index
    if easy.empty and hopeless.empty:
        return None
    others = frame[~frame["window"].isin([*easy, *hopeless])]
    source = frame[frame["window"].isin(easy)].drop_duplicates("window")["source"]
    return {
        "easy": len(easy),
        "easiest": source.value_counts().index[0] if len(easy) else "",
        "of_easiest": int(source.value_counts().iloc[0]) if len(easy) else 0,
        "dense": int((dense > EASY).sum()),
        "hopeless": len(hopeless),
        "against_simple": signed(against(others, ours, simple)) if ours and len(others) else "",
    }


def oracle_shares(frame: pd.DataFrame, ours: str, column: str) -> list[dict[str, Any]]:
    """Return, for each kind in a column, the share of oracle_search's utility that a policy reaches."""
    part = common(frame, (ours, "oracle_search"))
    rows = []
    for kind in part[column].unique().tolist():
        one = part[part[column] == kind]
        high = trace_mean(one, "oracle_search")
        row = {column: str(kind), "windows": one["window"].nunique(), "its utility": high}
        rows.append(row | {f"share of it, {ours}": trace_mean(one, ours) / high})
    return rows


def share_interval(frame: pd.DataFrame, ours: str, oracle: str) -> str:
    """Return the 95 % interval of the share of an oracle's utility; the frame has the windows that both played."""
    windows = frame.drop_duplicates("window").sort_values("window")
    found = share_of(
        serve_grid(frame, ours)[0],
        serve_grid(frame, oracle)[0],
        traces=windows["source"],
        blocks=windows["block"],
    )
    return f"[{found.low:.1%}, {found.high:.1%}]"


def few_blocks(frame: pd.DataFrame) -> dict[str, int]:
    """Return the traces with too few blocks of time for an interval, and how many they have."""
    counts = frame.groupby("source")["block"].nunique()
    return {str(source): int(count) for source, count in counts.items() if count < FEWEST_BLOCKS}


def serve_verdict(frame: pd.DataFrame, compared: str) -> dict[str, Any]:
    """Return how a learned policy stands against every rule, and which share of the oracles it reaches."""
    simple, ours = best_rule(frame), compared_policy(frame, compared)
    found: dict[str, Any] = {"simple": simple, "simple_utility": trace_mean(frame, simple), "oracles": []}
    if ours is None:
        return found
    for oracle in (name for name in ORACLES if name in set(frame["policy"].unique())):
        part = common(frame, (ours, simple, oracle))
        high = trace_mean(part, oracle)
        found["oracles"].append(
            {
                "oracle": oracle,
                "windows": part["window"].nunique(),
                "its utility": high,
                f"share of it, {ours}": trace_mean(part, ours) / high,
                "its 95 % interval": share_interval(part, ours, oracle),
                f"share of it, {simple}": trace_mean(part, simple) / high,
            }
        )
    found |= standing(lambda name: against(frame, ours, name), rules_of(frame))
    return {
        **found,
        "claims": claims_held(frame, ours, found),
        "best": ours,
        "utility": trace_mean(frame, ours),
        "against_simple": signed(against(frame, ours, simple)),
        "seeds": signed(against(frame, f"{ours}{MEMBERS}", simple))
        if f"{ours}{MEMBERS}" in set(frame["policy"].unique())
        else "",
    }


def shown_policies(frame: pd.DataFrame, ours: str | None) -> list[str]:
    """Return the policies of the tables by kind: learned ones, the best rules, and dense."""
    rules = sorted(rules_of(frame), key=lambda name: -trace_mean(frame, name))
    chosen = {*learned_of(frame), *rules[:SHOWN], REFERENCE, *([ours] if ours else [])}
    return [name for name in policies_of(frame, ORACLES) if name in chosen]


def serve_figure(
    folder: Path, frame: pd.DataFrame, names: Sequence[str], ours: str | None, curves: pd.DataFrame | None
) -> None:
    """Write serve.png: utility of some policies by trace, how far ours is above them, and training curves if any."""
    panels = 1 + (ours is not None) + (curves is not None)
    with figure_file(folder / "serve.png", 1, panels, size=(4 + 4 * panels, 5.5), squeeze=False) as (figure, axes):
        first, *others = axes[0]
        plot_by_source(first, frame, names)
        first.set(xlabel="utility on held-out windows")
        if ours is not None:
            _plot_above(others[0], frame, names, ours)
        if curves is not None:
            plot_training(others[-1], curves)
        figure.legend(loc="outside lower center", ncols=5)


def _plot_above(axes: Any, frame: pd.DataFrame, names: Sequence[str], ours: str) -> None:
    """Plot the utility of one policy minus that of every other, with 95 % intervals, on windows that both played."""
    for row, name in enumerate(names):
        if name != ours:
            found = against(frame, ours, name)
            reach = np.maximum(0.0, [[found.mean - found.low], [found.high - found.mean]])
            axes.errorbar(found.mean, row, xerr=reach, fmt="o", color=COLORS[0], markersize=4, capsize=3)
    axes.axvline(0.0, color="black", linewidth=1.0)
    axes.set_yticks(range(len(names)), [])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set(xlabel=f"{ours} minus it, with 95 % interval")


def most_trials(tuned: Mapping[str, Any]) -> int:
    """Return the most trials that a rule had; 0 if none was tuned. ``tuned``: by scenario, its rules."""
    entries = [rule for scenario in tuned.values() for rule in scenario.get("rules", {}).values()]
    return max((int(rule.get("trials", 0)) for rule in entries), default=0)


def serve_context(folder: Path) -> dict[str, Any] | None:
    """Return what the template shows, and write serve.png; None where nothing was evaluated."""
    frame = read_if_there(folder / "serve.parquet")
    if frame is None:
        return None
    made: dict[str, Any] = json.loads((folder / "serve.json").read_text(encoding="utf-8"))
    curves, ablation = (read_if_there(folder / f"serve_{name}.parquet") for name in ("training", "ablation"))
    stated = folder / "serve_ablation.json"
    found = serve_verdict(frame, made["compared"])
    ours = found.get("best")
    shown = shown_policies(frame, ours)
    serve_figure(folder, frame, shown, ours, curves)
    specs = {"windows": ",d", "its utility": ".4f", str(ours): ".4f"}
    best = (
        {
            column: [{k: v for k, v in row.items() if k != "mean"} for row in against_the_best(frame, ours, column)]
            for column in ("source", "scenario")
        }
        if ours
        else {}
    )
    shares = {key: ".1%" for row in found["oracles"] for key in row if key.startswith("share")}
    return {
        "made": made,
        "trials": most_trials(made.get("tuned", {})),
        "commit": commit_of(made),
        "later": made.get("replayed", []),
        "windows": frame["window"].nunique(),
        "blocks": len(frame[["source", "block"]].drop_duplicates()),
        "few_blocks": few_blocks(frame),
        "many_blocks": signed(against(frame[~frame["source"].isin(few_blocks(frame))], ours, found["simple"]))
        if ours and 0 < len(few_blocks(frame)) < frame["source"].nunique()
        else "",
        "same_rate": same_rate(frame),
        "decided": easy_and_hopeless(frame, ours, found["simple"]),
        "claims": table(
            [{**row, "holds": {True: "yes", False: "**no**", None: "-"}[row["holds"]]} for row in found["claims"]],
            {},
            left=3,
        )
        if ours and "claim" in made
        else "",
        "sources": frame["source"].unique().tolist(),
        "scenarios": frame["scenario"].unique().tolist(),
        "table": serve_table_markdown(frame, made["compared"]),
        "rules": [(name, about_rule(name)) for name in rules_of(frame) if name in RULES],
        "verdict": found,
        "best": {column: table(rows, specs) for column, rows in best.items()},
        "oracles": table(found["oracles"], specs | shares) if found["oracles"] else "",
        "oracle_shares": [
            table(oracle_shares(frame, ours, column), specs | shares) for column in ("source", "scenario")
        ]
        if ours and any(row["oracle"] == "oracle_search" for row in found["oracles"])
        else [],
        "kinds": {
            column: by_kind(frame, shown, {column: prefix})
            for column, prefix in (("source", ""), ("scenario", ""), ("load", "load "), ("budget", ""))
        },
        "seconds": seconds_of(made),
        "training": "" if curves is None else training_table(curves),
        "ablation": "" if ablation is None else ablation_markdown(ablation, "windows"),
        "ablation_seeds": 0 if ablation is None else ablation["seed"].nunique(),
        "ablation_windows": WINDOWS,
        "ablation_made": commit_of(json.loads(stated.read_text(encoding="utf-8"))) if stated.is_file() else "",
    }
