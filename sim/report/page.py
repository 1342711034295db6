"""One HTML file from runs: figures, tables and provenance. It holds Plotly itself and asks no server for anything.

All text of the runs is escaped. The page states a content security policy that lets a browser run the two scripts that
this module wrote, by their hashes, and load nothing else from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sim.report import figures, series
from sim.report.run_data import DISTRIBUTIONS, FIGURES, STATISTICS, RunData
from sim.results.report import COUNTS, cells, columns_of, shown_number

TEMPLATES = Path(__file__).parent / "templates"
MOST_DIFFERENCES = 60
"""Rows of the table of keys in which runs differ."""
LONGEST_VALUE = 120
FRONT_END_S = 0.1
"""Most seconds by which the arrivals of equal requests may differ: a client sends before the engine's queue gets it."""


def page(runs: Sequence[RunData], made_by: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        made_by: provenance of the report.
    """
    from plotly.offline import get_plotlyjs  # the extra `report`

    library = get_plotlyjs().replace("\r\n", "\n")
    boot = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    drawn = {"timeline": figures.timeline(runs), "latencies": figures.latencies(runs)}
    plans, front = figures.plan_maps(runs), figures.pareto(runs)
    if plans is not None:
        drawn["plans"] = plans
    if front is not None:
        drawn["pareto"] = front[0]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    end_s = max(run.end_s for run in runs)
    return environment.get_template("report.html.j2").render(
        policy=_security_policy(library, boot),
        library=script_code(library),
        boot=script_code(boot),
        figures=script_data(drawn),
        runs=runs,
        styles=[figures.style_of(rank, len(runs)) for rank in range(len(runs))],
        states=list(figures.STATES.values()),
        has_plans=plans is not None,
        exact_plans=all(found is None or found.exact for run in runs if (found := series.plan_map(run, run.end_s))),
        front=[runs[rank].label for rank in front[1]] if front is not None else None,
        excels_in=front[2] if front is not None else [],
        same_requests=all(same_requests(runs[0], run) for run in runs[1:]),
        slos=slos(runs),
        missing=missing_parts(runs),
        one_side=len({run.judged_side for run in runs}) == 1,
        bins=series.BINS,
        plan_columns=series.PLAN_COLUMNS,
        bin_s=series.bin_width_s(end_s, series.SLO_BINS),
        budget_known=any(run.server is not None for run in runs),
        figure_rows=figure_rows(runs),
        latency_rows=latency_rows(runs),
        count_rows=count_rows(runs),
        notes=[(run.label, str(note)) for run in runs if (note := run.summary.get("quality_note"))],
        differences=differences(runs),
        provenance_rows=provenance_rows(runs),
        made_by=made_by,
    )


def figure_rows(runs: Sequence[RunData]) -> list[list[str]]:
    """Return the table of the main figures, the headings first."""
    summaries = {run.label: [_complete(run)] for run in runs}
    columns = columns_of(summaries)
    rows = [[label, *cells(row, columns)] for label, row in summaries.items()]
    shown = [at for at in range(len(columns) + 1) if any(row[at] != "-" for row in rows)]
    return [[row[at] for at in shown] for row in [["run", *columns], *rows]]


def _complete(run: RunData) -> dict[str, Any]:
    """Return a summary with every key of the table; None for what another command's or an older summary lacks."""
    client = {f"client_{name}": run.summary[name] for name in ("ttft_s", "e2e_s")}
    return {**dict.fromkeys((*FIGURES, "utility")), **client, **run.summary, "perplexity_ratio": run.perplexity_ratio}


def latency_rows(runs: Sequence[RunData]) -> list[list[str]]:
    """Return the table of latencies in seconds, the headings first; client-side ones only where they differ."""
    rows = [["run", "seconds", *(name.upper() if name[0] == "p" else name for name in STATISTICS)]]
    for run in runs:
        for name in DISTRIBUTIONS:
            values = run.summary.get(name)
            if not isinstance(values, dict):
                continue
            if name.startswith("client_") and values == run.summary.get(name.removeprefix("client_")):
                continue
            heading = name.removesuffix("_s").upper().replace("CLIENT_", "client ")
            rows.append([run.label, heading, *(shown_number(values.get(one)) for one in STATISTICS)])
    return rows


def count_rows(runs: Sequence[RunData]) -> list[list[str]]:
    """Return the table of counts, the headings first."""
    rows = [["run", *(name.replace("_", " ") for name in COUNTS)]]
    return rows + [[run.label, *(_count(run.summary.get(name)) for name in COUNTS)] for run in runs]


def differences(runs: Sequence[RunData]) -> list[list[str]]:
    """Return the keys of the configurations whose values differ, the headings first; empty if none do."""
    flat = [dict(_leaves(run.config)) for run in runs]
    keys = sorted({key for one in flat for key in one})
    rows = []
    for key in keys:
        values = [_short(one[key]) if key in one else "-" for one in flat]
        if len(set(values)) > 1:
            rows.append([key, *values])
    if not rows:
        return []
    if (more := len(rows) - MOST_DIFFERENCES) > 0:
        rows = [*rows[:MOST_DIFFERENCES], [f"and {more} more keys", *[""] * len(runs)]]
    return [["key", *(run.label for run in runs)], *rows]


def _leaves(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, dict) or not node:
        return [(prefix, node)]
    return [leaf for key, value in node.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else str(key))]


def provenance_rows(runs: Sequence[RunData]) -> list[list[str]]:
    """Return the table of where runs come from, the headings first."""
    stated = [_provenance(run) for run in runs]
    names = dict.fromkeys(name for one in stated for name in one)
    return [["", *(run.label for run in runs)], *([name, *(one.get(name, "-") for one in stated)] for name in names)]


def _provenance(run: RunData) -> dict[str, str]:
    made, hardware = run.provenance, run.hardware or {}
    versions, trace = made.get("versions"), made.get("trace")
    found = {
        "folder": str(run.folder),
        "command": made.get("command"),
        "commit": made.get("commit"),
        "seed": made.get("seed"),
        "written at": made.get("written_at"),
        "machine": made.get("machine"),
        "Python": made.get("python"),
        "packages": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else None,
        "trace": trace.get("source") if isinstance(trace, dict) else None,
        "SHA-256 of the trace": trace.get("sha256") if isinstance(trace, dict) else None,
        "device": hardware.get("device"),
        "clock": hardware.get("clock"),
        "attention": hardware.get("attention"),
    }
    return {name: _short(value, 400) for name, value in found.items() if value is not None}


def same_requests(one: RunData, other: RunData) -> bool:
    """Return whether two runs got the same requests at the same times, to the delay of a front end."""
    lengths, others = (np.sort(run.column("output_tokens")) for run in (one, other))
    if not np.array_equal(lengths, others):
        return False
    arrival_s, other_s = one.column("arrival_s"), other.column("arrival_s")
    return bool((np.abs(arrival_s - other_s) <= FRONT_END_S).all())


def slos(runs: Sequence[RunData]) -> list[str]:
    """Return each SLO in words with the runs that it judges, as ``TTFT 2 s (dense, int4)``; nothing if there is one."""
    judged: dict[str, list[str]] = {}
    for run in runs:
        targets = ", ".join(f"{name.removesuffix('_s').upper()} {limit:g} s" for name, limit in run.targets_s.items())
        words = (targets or "no target") + (" seen by the client" if run.judged_side == "client" else "")
        judged.setdefault(words, []).append(run.label)
    return [f"{words} ({', '.join(labels)})" for words, labels in judged.items()] if len(judged) > 1 else []


def missing_parts(runs: Sequence[RunData]) -> dict[tuple[str, ...], list[str]]:
    """Return what folders lack -> the runs that lack just that."""
    found: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        if run.missing:
            found.setdefault(tuple(run.missing), []).append(run.label)
    return found


def _short(value: Any, most: int = LONGEST_VALUE) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "-"


# --- Scripts in HTML -------------------------------------------------------------------------------------------------


def script_code(code: str) -> Markup:
    """Return code for a script element.

    Raises:
        ValueError: if the code would end the element.
    """
    if "</script" in code.lower() or "<!--" in code:
        raise ValueError("a script holds </script or <!--, which ends it in HTML")
    return Markup(code)


def script_data(value: Any) -> Markup:
    """Return values as JSON that is safe inside a script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":  # in JSON these stand in strings alone
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _security_policy(*scripts: str) -> str:
    """Return the policy: these scripts and the page's own styles; images that the page itself makes; nothing else."""
    hashes = (base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in scripts)
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
