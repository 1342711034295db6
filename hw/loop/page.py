"""The results page of the loop, from loop.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hw.loop.predictions import predicted_utility
from hw.validate.machine_speed import said_factors
from sim.pages.render import render, table
from sim.results.plots import COLORS, figure_file

TEMPLATE = Path(__file__).parent / "templates" / "loop.md.j2"


def page(content: Mapping[str, Any]) -> str:
    """Return the page, in Markdown."""
    verdict = content["verdict"]
    return render(
        TEMPLATE,
        content=content,
        made=content["provenance"],
        verdict=verdict,
        speed=_speed(content["speed"]),
        policies=_policies_table(content),
        cells=_cells_table(content),
        hindsight=_hindsight(content),
        pairs=_pairs_table(verdict),
        missed=[row for row in verdict["level"]["cells"] if not row["holds"]],
        ranged=[row["in_range"] for row in verdict["level"]["cells"] if "in_range" in row],
        run_speeds=content["predictions"].get("run_speeds", []),
        requests=[int(one["requests"]) for one in content["predictions"]["windows"].values()],
    )


def _speed(speed: Mapping[str, Any]) -> str:
    """Return how fast the machine was before and during the judged runs, relative to the calibration."""

    def ranges(each: Mapping[str, list[float]]) -> str:
        return ", ".join(f"{bits} bits {min(found):.2f} to {max(found):.2f}" for bits, found in each.items())

    if not speed["before_each"]:
        return (
            "No reference run measured the speed; the simulation is frozen at a stated factor of "
            f"{speed['before']:.3f}, and requests arrive slower by it."
        )
    said = (
        f"Reference runs of the dense model before the predictions took {speed['before']:.3f} times their calibrated "
        f"seconds.{said_factors(speed['factors'])} The simulation is frozen at that speed, and requests "
        f"arrive slower by the first factor. Single runs: {ranges(speed['before_each'])}."
    )
    if speed["during"]:
        said += (
            f" Reference runs between the judged runs, which change nothing: {speed['during']:.3f}."
            f"{said_factors(speed['factors_during'])} Single runs: {ranges(speed['during_each'])}."
        )
    return said


def _policies_table(content: Mapping[str, Any]) -> str:
    """Return the means of each policy over windows, simulated and real."""
    predictions, real = content["predictions"], content["real"]
    simulated = predictions["outcomes"]
    rows = []
    for policy in next(iter(real.values())):
        ours = [by[policy] for by in simulated.values()]
        theirs = [one for by in real.values() for one in by[policy]]
        rows.append(
            {
                "policy": policy,
                "utility, simulated": float(np.mean([predicted_utility(predictions, w, policy) for w in simulated])),
                "utility, real": float(np.mean([one["utility"] for one in theirs])),
                "SLO, simulated": float(np.mean([one["slo_attainment"] for one in ours])),
                "SLO, real": float(np.mean([one["slo_attainment"] for one in theirs])),
                "changes/min, simulated": float(np.mean([one["changes_per_minute"] for one in ours])),
                "changes/min, real": float(np.mean([one["changes_per_minute"] for one in theirs])),
            }
        )
    specs = {"utility, simulated": ".4f", "utility, real": ".4f", "SLO, simulated": ".1%", "SLO, real": ".1%"}
    return table(rows, specs | {"changes/min, simulated": ".1f", "changes/min, real": ".1f"})


def _hindsight(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how close simulation is to the judged runs at the speed that the machine had during them."""
    found = content.get("hindsight")
    if found is None:
        return None

    def off(cells: Sequence[Mapping[str, Any]]) -> float:
        return float(np.sqrt(np.mean([row["error"] ** 2 for row in cells])))

    speed, points = content["speed"], content["verdict"]["level"]["points"]
    return {
        "slower": {
            bits: float(np.mean(speed["during_each"][bits]) / np.mean(each))
            for bits, each in speed["before_each"].items()
        },
        "hold": sum(row["holds"] for row in found["cells"]),
        "within": sum(abs(row["error"]) <= points for row in found["cells"]),
        "off": off(found["cells"]),
        "off_predicted": off(content["verdict"]["level"]["cells"]),
    }


def _cells_table(content: Mapping[str, Any]) -> str:
    """Return every predicted utility next to its repeats."""
    cells = content["verdict"]["level"]["cells"]
    known = [row["simulated"] for row in (content.get("hindsight") or {}).get("cells", [])]
    rows = [
        {
            "window": row["window"],
            "policy": row["policy"],
            "repeats": ", ".join(f"{value:.3f}" for value in row["repeats"]),
            "simulated": row["simulated"],
            **({"range": f"{row['least']:.3f} to {row['most']:.3f}"} if "least" in row else {}),
            "real": row["real"],
            "error": ("{}" if row["holds"] else "**{}**").format(f"{row['error']:+.4f}"),
            "noise floor": row["noise_floor"],
            **({"in hindsight": known[at]} if known else {}),
        }
        for at, row in enumerate(cells)
    ]
    return table(rows, {"simulated": ".4f", "real": ".4f", "noise floor": ".4f", "in hindsight": ".4f"}, left=2)


def _pairs_table(verdict: Mapping[str, Any]) -> str:
    """Return every comparison of two policies, those over all windows first."""
    rows = [
        {
            "window": row["window"] or "all",
            "difference": " - ".join(row["policies"]),
            "real": row["real"],
            "noise": row["noise"],
            "simulated": row["simulated"],
            "same sign": "-" if row["agrees"] is None else "yes" if row["agrees"] else "**no**",
        }
        for row in sorted(verdict["order"]["pairs"], key=lambda row: row["window"] is not None)
    ]
    return table(rows, {"real": "+.4f", "noise": ".4f", "simulated": "+.4f"}, left=2)


def plot(path: Path, content: Mapping[str, Any]) -> None:
    """Plot real against simulated utility, a point per window and policy, with the range of the repeats."""
    with figure_file(path, size=(5.5, 5.0)) as (_, axes):
        cells = content["verdict"]["level"]["cells"]
        for color, policy in zip(COLORS, next(iter(content["real"].values())), strict=False):
            mine = [row for row in cells if row["policy"] == policy]
            means = np.array([row["real"] for row in mine])
            reach = np.abs(np.array([[min(row["repeats"]), max(row["repeats"])] for row in mine]).T - means)
            axes.errorbar(
                [row["simulated"] for row in mine], means, yerr=reach, fmt="o", color=color, label=policy, capsize=2
            )
        low = min(min(row["simulated"], *row["repeats"]) for row in cells) - 0.02
        high = max(max(row["simulated"], *row["repeats"]) for row in cells) + 0.02
        axes.plot([low, high], [low, high], color="0.6", linewidth=1)
        axes.set(xlabel="predicted utility", ylabel="utility on the real engine", xlim=(low, high), ylim=(low, high))
        axes.legend()
