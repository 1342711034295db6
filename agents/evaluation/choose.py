"""The page that says which policy to choose when, from the results of ``ServeTrace`` alone.

For every scenario, load, trace and kind of budget it names the simplest rule that is as good as the learned policy: one
of the least effort whose mean utility is at most ``AS_GOOD`` below. Rules are chosen with the results known, so the
page favors them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from agents.evaluation.rules import BASES, RULES, about_rule, parts_of
from agents.evaluation.serve_report import against, compared_policy, difference_text, rules_of, trace_mean
from agents.evaluation.tables import read_if_there
from sim.pages.render import commit_of, render, table
from sim.results.run_folder import write_text

TEMPLATE = Path(__file__).parent / "templates" / "choose.md.j2"
FILE = "choose.md"
AS_GOOD = 0.005
"""In utility; rules within it of the learned policy count as equally good."""
EFFORTS = (
    "one plan",
    "one plan, limits that you set",
    "one plan, limits from the targets (SABER)",
    "a rule that changes plans",
    "a table made from recorded windows",
    "a model of the server",
)
"""What a rule needs, from little to much."""
SPECS = {"windows": ",d", "rule's utility": ".4f", "learned": ".4f"}


def effort_of(rule: str) -> int:
    """Return the position of a rule in ``EFFORTS``."""
    base, limit = parts_of(rule)
    if base == "lookahead":
        return 5
    if base == "load_table":
        return 4
    if BASES[base].changes:
        return 3
    return {"": 0, "+queue": 1, "+wait": 1}.get(limit, 2)


def simplest(part: pd.DataFrame, ours: str) -> dict[str, Any]:
    """Return the rule to choose instead of a policy on some windows, and by how much the policy is above it.

    If no rule is as good, it is the best one, and "as good" is False.
    """
    played = part.groupby("policy")["window"].nunique()
    rules = [name for name in rules_of(part) if name in RULES and played[name] == part["window"].nunique()]
    utility = {name: trace_mean(part, name) for name in (*rules, ours)}
    enough = [name for name in rules if utility[ours] - utility[name] <= AS_GOOD]
    if enough:
        least = min(effort_of(name) for name in enough)
        rules = [name for name in enough if effort_of(name) == least]
    chosen = max(rules, key=lambda name: utility[name])
    blocks = part[["source", "block"]].drop_duplicates()
    return {
        "windows": part["window"].nunique(),
        "rule": chosen,
        "effort": EFFORTS[effort_of(chosen)],
        "rule's utility": utility[chosen],
        "learned": utility[ours],
        "difference": difference_text(against(part, ours, chosen), len(blocks)),
        "as good": bool(enough),
    }


def by_kinds(frame: pd.DataFrame, ours: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return ``simplest`` for each combination of kinds in some columns, in the order of the frame."""
    rows = []
    for kinds in dict.fromkeys(frame[list(columns)].itertuples(index=False, name=None)):
        part = frame[(frame[list(columns)] == list(kinds)).all(axis=1)]
        rows.append({**dict(zip(columns, map(str, kinds), strict=True)), **simplest(part, ours)})
    return rows


def stands_in_cells(frame: pd.DataFrame, ours: str) -> dict[str, Any]:
    """Return how a policy stands in the windows of each trace and scenario, against the best rule there and each alone.

    Returns:
        ``count`` of cells; in how many a rule is more than ``AS_GOOD`` above, ``lost``; the widest such difference,
        ``most``; and the rule that alone is above in most cells, ``rule``, with their number, ``alone``.
    """
    lost, most, above, count = 0, 0.0, dict.fromkeys(rules_of(frame), 0), 0
    for _, part in frame.groupby(["source", "scenario"]):
        count += 1
        played, means = part.groupby("policy")["window"].nunique(), part.groupby("policy")["utility"].mean()
        every = part["window"].nunique()
        over = {name: means[name] - means[ours] for name in above if name in RULES and played.get(name, 0) == every}
        for name, difference in over.items():
            above[name] += difference > AS_GOOD
        lost += max(over.values(), default=0.0) > AS_GOOD
        most = max(most, *over.values(), 0.0)
    rule = max(above, key=lambda name: above[name])
    return {"count": count, "lost": lost, "most": most, "rule": rule, "alone": above[rule]}


def choices_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows of ``by_kinds`` as a table; a rule that is not as good stands in brackets."""
    shown = [
        {
            **{key: value for key, value in row.items() if key not in ("rule", "as good", "effort")},
            "choose": row["rule"] if row["as good"] else f"learned (best rule compared: {row['rule']})",
            "kind": row["effort"] if row["as good"] else "a trained policy",
        }
        for row in rows
    ]
    return table(shown, SPECS, left=1)


def choose_page(folder: Path) -> str | None:
    """Return the page, in Markdown; None if no learned policy was played."""
    frame = read_if_there(folder / "serve.parquet")
    if frame is None:
        return None
    made: dict[str, Any] = json.loads((folder / "serve.json").read_text(encoding="utf-8"))
    ours = compared_policy(frame, made["compared"])
    if ours is None:
        return None
    columns = {"scenario": ["scenario"], "load": ["scenario", "load"], "source": ["source"], "budget": ["budget"]}
    kinds = {name: by_kinds(frame, ours, of) for name, of in columns.items()}
    named = sorted({row["rule"] for rows in kinds.values() for row in rows}, key=lambda name: (effort_of(name), name))
    return render(
        TEMPLATE,
        made=made,
        commit=commit_of(made),
        ours=ours,
        as_good=AS_GOOD,
        tables={name: choices_table(rows) for name, rows in kinds.items()},
        equal=[row for row in kinds["load"] if row["as good"]],
        count=len(kinds["load"]),
        sure=sum(not row["as good"] and "(" not in row["difference"] for row in kinds["load"]),
        cells=stands_in_cells(frame, ours),
        rules=[(name, about_rule(name), EFFORTS[effort_of(name)]) for name in named],
    )


def write_choices(folder: Path) -> None:
    """Write the page next to the results, if there is one to write."""
    if (text := choose_page(folder)) is not None:
        write_text(folder / FILE, text)
