"""The graph of a check-up: how long each step took and how it ended, and the figures that say most."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sim.results.plots import figure_file

COLORS = {"passed": "#2a7f4f", "failed": "#b3261e", "skipped": "#9a9a9a", "not run": "#d0d0d0", "running": "#d0d0d0"}


def plot(path: Path, content: Mapping[str, Any]) -> None:
    """Write the graph."""
    rows = {row["name"]: row for row in content["steps"]}
    title = f"{content['device']['name']}, {content['date'][:10]}, commit {content['commit'][:12]}"
    with figure_file(path, 2, 3, size=(15, 8), title=title) as (_, axes):
        _steps(axes[0][0], content["steps"])
        _bandwidths(axes[0][1], rows)
        _errors(axes[0][2], rows)
        _policies(axes[1][0], rows)
        _comparisons(axes[1][1], rows)
        _peers(axes[1][2], rows)


def _found(rows: Mapping[str, Any], step: str) -> Mapping[str, Any]:
    figures: Mapping[str, Any] = rows.get(step, {}).get("figures") or {}
    return figures


def _bars(axis: Any, values: Mapping[str, float], title: str, unit: str, label: str = "{:.3g}") -> None:
    """Show values as horizontal bars with their numbers, the first on top."""
    axis.set(title=title, xlabel=unit)
    if not values:
        axis.text(0.5, 0.5, "no figures", ha="center", va="center", transform=axis.transAxes, color="#777777")
        axis.set(xticks=[], yticks=[])
        return
    names = list(values)
    bars = axis.barh(range(len(names)), list(values.values()))
    axis.bar_label(bars, [f" {label.format(value)}" for value in values.values()], fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.margins(x=0.22)


def _steps(axis: Any, steps: Any) -> None:
    axis.set(title="steps", xlabel="seconds")
    seconds = [float(row.get("seconds") or 0.0) for row in steps]
    bars = axis.barh(range(len(steps)), seconds, color=[COLORS[row["status"]] for row in steps])
    axis.bar_label(bars, [f" {row['status']}" for row in steps], fontsize=8)
    axis.set_yticks(range(len(steps)), [row["name"] for row in steps])
    axis.invert_yaxis()
    axis.margins(x=0.25)


def _bandwidths(axis: Any, rows: Mapping[str, Any]) -> None:
    environment, weights = _found(rows, "environment"), _found(rows, "weights")
    named = {
        "memory": environment.get("memory_bandwidth_bytes_per_s"),
        "host to device": environment.get("pinned_host_to_device_bytes_per_s"),
        "device to host": environment.get("pinned_device_to_host_bytes_per_s"),
    }
    named |= {name: row.get("bytes_per_s") for name, row in (weights.get("plan_changes") or {}).items()}
    known = {name: value / 1e9 for name, value in named.items() if value}
    _bars(axis, known, "copies", "GB/s")
    if known:
        axis.set_xscale("log")
        axis.tick_params(which="minor", labelbottom=False)


def _errors(axis: Any, rows: Mapping[str, Any]) -> None:
    errors = _found(rows, "calibration").get("errors") or {}
    _bars(axis, {name: 100 * row["median"] for name, row in errors.items()}, "held-out error of prices, median", "%")


def _policies(axis: Any, rows: Mapping[str, Any]) -> None:
    found = _found(rows, "policies").get("policies") or {}
    known = {name: 1e3 * row["tpot_p50_s"] for name, row in found.items() if row.get("tpot_p50_s")}
    _bars(axis, known, "time per output token, median", "ms")


def _comparisons(axis: Any, rows: Mapping[str, Any]) -> None:
    found = _found(rows, "simulation").get("comparisons") or {}
    known = {
        name: 100 * row["errors"]["e2e_s.mean"]
        for name, row in found.items()
        if row["errors"].get("e2e_s.mean") is not None
    }
    _bars(axis, known, "simulated mean E2E over real", "%", "{:+.1f}")
    axis.axvline(0.0, color="black", linewidth=0.8)


def _peers(axis: Any, rows: Mapping[str, Any]) -> None:
    found = _found(rows, "peers").get("tokens_per_s") or {}
    _bars(axis, dict(found), "output tokens per second", "tokens/s")
