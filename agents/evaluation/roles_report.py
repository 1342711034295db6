"""The section of the agents page on ``ServeRoles``, computed from its result files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from agents.evaluation.serve_report import against, trace_mean
from agents.evaluation.tables import by_kind, policies_of, read_rows, signed, standing
from sim.pages.render import commit_of, table

SPECS = {"SLO attainment": ".1%", "goodput (req/s)": ".2f", "TTFT P95 (s)": ".2f", "TPOT P95 (ms)": ".0f"}
SPECS |= {"role changes": ".1f"}


def roles_table_markdown(frame: pd.DataFrame, compared: str = "learned_roles") -> str:
    """Return the main table: every policy over all episodes and seeds, each traffic counting the same."""
    played = set(frame["policy"].unique())
    rows = [
        {
            "policy": name,
            "SLO attainment": trace_mean(frame, name),
            f"{compared} minus it": (
                signed(against(frame, compared, name)) if name != compared and compared in played else None
            ),
            "goodput (req/s)": trace_mean(frame, name, "goodput_rps"),
            "TTFT P95 (s)": trace_mean(frame, name, "ttft_p95_s"),
            "TPOT P95 (ms)": 1e3 * trace_mean(frame, name, "tpot_p95_s"),
            "role changes": trace_mean(frame, name, "role_changes"),
        }
        for name in policies_of(frame, ())
    ]
    return table(rows, SPECS)


def roles_verdict(frame: pd.DataFrame, compared: str) -> dict[str, Any]:
    """Return how a learned policy stands against the rules; without it, only the best rule."""
    names = policies_of(frame, ())
    known = [name for name in names if not name.startswith("learned")]
    best = max(known, key=lambda name: trace_mean(frame, name))
    found: dict[str, Any] = {"best": best, "best_utility": trace_mean(frame, best)}
    if compared in names:
        found |= {
            "compared": compared,
            "utility": trace_mean(frame, compared),
            "against_best": signed(against(frame, compared, best)),
            **standing(lambda name: against(frame, compared, name), known),
        }
    return found


def roles_context(folder: Path) -> dict[str, Any] | None:
    """Return what the template shows; None where nothing was evaluated."""
    if not (folder / "roles.json").exists():  # written last
        return None
    frame = read_rows(folder / "roles.parquet")
    made: dict[str, Any] = json.loads((folder / "roles.json").read_text(encoding="utf-8"))
    kinds = {"source": "", "phases": "phases ", "outages": "outages "}
    return {
        "made": made,
        "commit": commit_of(made),
        "episodes": frame["window"].nunique(),
        "table": roles_table_markdown(frame, made["compared"]),
        "verdict": roles_verdict(frame, made["compared"]),
        "by_kind": by_kind(frame, policies_of(frame, ()), kinds),
        "seconds": sum(made["seconds"].get(made["compared"], [])),
    }
