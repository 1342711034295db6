"""``python -m tests.soak page``: writes docs/results/robustness/index.md from the figures next to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sim.pages.render import commit_of, render, table
from tests.soak.figures import read

TEMPLATE = Path(__file__).parent / "templates" / "robustness.md.j2"
LABELS = {
    "traces": "trace files",
    "requests": "server requests",
    "plans": "plans",
    "policies": "policy files",
    "links": "link frames",
    "files": "models, calibrations, quality tables",
    "http": "HTTP over loopback",
}


def write_page(folder: Path) -> Path:
    """Write the page and return its path."""
    path = folder / "index.md"
    path.write_text(page(folder), encoding="utf-8")
    return path


def page(folder: Path) -> str:
    """Return the page, in Markdown."""
    inputs, kills, saturation, disk, faults = (
        read(folder / f"{name}.json") for name in ("inputs", "kills", "saturation", "disk", "faults")
    )
    return render(
        TEMPLATE,
        inputs=input_table(inputs),
        total=sum(piece["inputs"] for piece in inputs["slices"].values()),
        input_faults=sum(len(piece["faults"]) for piece in inputs["slices"].values()),
        inputs_made=_made(inputs["slices"]),
        note=inputs.get("note", ""),
        kills=kill_table(kills),
        kill_count=sum(one["kills"] for one in kills["scenarios"].values()),
        kills_made=_made(kills["scenarios"]),
        server=saturation,
        server_rows=saturation_table(saturation),
        server_made=_made({"": saturation}),
        disk=disk_table(disk),
        disk_made=_made(disk["commands"]),
        faults=fault_table(faults),
        fault_kinds=len(faults["faults"]),
    )


def input_table(inputs: Mapping[str, Any]) -> str:
    """Return the table of hostile inputs, one row per kind."""
    rows = []
    for kind, label in LABELS.items():
        slices = [piece for key, piece in inputs["slices"].items() if key.split()[0] == kind]
        if not slices:
            continue
        verdicts: Counter[str] = Counter()
        targets: set[str] = set()
        for piece in slices:
            verdicts.update(piece["verdicts"])
            targets.update(piece["targets"])
        rows.append(
            {
                "kind": label,
                "readers": len(targets),
                "inputs": sum(piece["inputs"] for piece in slices),
                "accepted": verdicts["accepted"],
                "refused": verdicts["refused"],
                "faults": verdicts["fault"],
                "slowest (s)": max(piece["slowest_s"] for piece in slices),
                "most memory (MB)": max(piece["most_mb"] for piece in slices),
            }
        )
    counts = dict.fromkeys(("inputs", "accepted", "refused", "faults"), ",")
    return table(rows, {**counts, "slowest (s)": ".2f", "most memory (MB)": ".0f"})


def kill_table(kills: Mapping[str, Any]) -> str:
    """Return the table of killed runs, one row per command."""
    rows = [
        {
            "command": f"`{name}`",
            "kills": one["kills"],
            "before any file": one["before_any_file"],
            "some of it complete": one["complete_already"],
            "half-written": sum(fault["what"] == "half-written" for fault in one["faults"]),
            "equal afterwards": one["equal"],
            "temporary files left": one["leftovers"],
        }
        for name, one in kills["scenarios"].items()
    ]
    return table(rows)


def saturation_table(found: Mapping[str, Any]) -> str:
    """Return the figures of the loaded server, one a row."""
    growth, last, late = found["growth"], found["last"], found["streams_refused_by_the_plan"]
    end = "at the end" if "exit_status" in found else "at the last sample, still under load"
    sent, accepted, left = found["requests_sent"], found["accepted"], found["accepted_by_end"]["abort"]
    rows = {
        "hours under load": f"{found['load_s'] / 3600:.2f}",
        "clients; most requests at once": f"{found['clients']}; {found['max_waiting']}",
        "running; waiting, on average": f"{found['mean_running']:.1f}; {found['mean_waiting']:.1f}",
        "requests sent; accepted": f"{sent:,}; {accepted:,.0f}",
        "accepted ones that a client left": f"{left:,.0f}: {left / accepted:.0%}; {left / sent:.0%} of all sent",
        "complete answers by status": ", ".join(f"{k}: {v:,}" for k, v in found["answers_by_status"].items()),
        "streams refused by a plan; cut short": f"{late:,}; {found['streams_cut_short']:,}",
        "plan changes": f"{found['plan_changes']:,}",
        "answers of 500 and above; tracebacks": f"{found['server_errors']}; {found['tracebacks']}",
        "tokens": f"{found['tokens']:,.0f}",
        f"running, waiting, KV blocks in use {end}": ", ".join(f"{last[name]:.0f}" for name in last),
        f"resident memory after {growth['fit_from_s'] / 60:.0f} min": f"{growth['first_mb']:.1f} MB",
        f"resident memory {end}": f"{growth['last_mb']:.1f} MB",
        "growth, straight line": f"{growth['mb_per_hour']:+.2f} MB/h, {growth['bytes_per_request']:+.0f} bytes/request",
        f"file descriptors under load; {end}": _range(found["file_descriptors"])
        + f"; {found['last_file_descriptors']:.0f}",
        "threads": _range(found["threads"]),
    }
    return table([{"figure": name, "value": value} for name, value in rows.items()])


def _range(values: list[float]) -> str:
    low, high = values
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def disk_table(disk: Mapping[str, Any]) -> str:
    """Return the table of runs on a full disk, one row per command."""
    rows = [
        {
            "command": f"`{name}`",
            "limits tried": one["runs"],
            "refused in one line": one["runs"] - one["complete"],
            "wrote everything": one["complete"],
            "half-written": one["half_written"],
            "faults": len(one["faults"]),
        }
        for name, one in disk["commands"].items()
    ]
    return table(rows)


def fault_table(faults: Mapping[str, Any]) -> str:
    """Return the table of faults that this found, one row per kind."""
    return table(faults["faults"], left=4)


def _made(pieces: Mapping[str, Mapping[str, Any]]) -> str:
    """Return dates, commits and machine of results."""
    dates = sorted({piece["date"][:10] for piece in pieces.values()})
    commits = sorted({commit_of(piece) for piece in pieces.values()})
    machines = sorted({piece["machine"] for piece in pieces.values()})
    named = ", ".join(commits) if len(commits) < 6 else f"{len(commits)} commits, in the JSON"
    return f"{' to '.join(dates[:1] + dates[1:][-1:])}, commit {named}, {'; '.join(machines)}"
