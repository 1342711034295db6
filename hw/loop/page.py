"""The results page of the loop, from loop.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hw.loop.predictions import predicted_utility
from sim.pages.render import render, show, table
from sim.results.plots import COLORS, figure_file

TEMPLATE = Path(__file__).parent / "templates" / "loop.md.j2"


def page(content: Mapping[str, Any]) -> str:
    """Return the page, in Markdown."""
    verdict, rounds = content["verdict"], content["rounds"]
    return render(
        TEMPLATE,
        content=content,
        made=content["provenance"],
        verdict=verdict,
        rounds=_rounds_table(rounds),
        measured=[one["speed"] for one in rounds if one["speed"]["before_each"]],
        policies=_policies_table(content),
        cells=_cells_table(content),
        hindsight=_hindsight(content),
        pairs=_pairs_table(verdict),
        missed=[row for row in verdict["level"]["cells"] if not row["holds"]],
        ranged=[row["in_range"] for row in verdict["level"]["cells"] if "in_range" in row],
        run_speeds=[speed for one in rounds for speed in one["predictions"]["run_speeds"]],
        requests=[int(one["requests"]) for one in rounds[0]["predictions"]["windows"].values()],
    )


def _rounds_table(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Return when each round was predicted, and how fast the machine was before and during its judged runs."""
    rows = []
    for number, one in enumerate(rounds, start=1):
        speed, predictions = one["speed"], one["predictions"]
        row = {
            "round": str(number),
            "predictions written": predictions["provenance"]["written_at"][:19],
            "their SHA-256": f"`{predictions['sha256'][:16]}`",
        }
        for when, each, pairs in (("before", "before_each", "factors"), ("during", "during_each", "factors_during")):
            row |= {f"slowdown {when}": show(speed[when], ".3f")}
            for bits, found in speed[each].items():
                pair = speed[pairs].get(bits) or speed[pairs]["all"]
                row |= {
                    f"{bits} bits, runs {when}": f"{min(found):.2f} to {max(found):.2f}",
                    f"{bits} bits, factors {when}": f"{pair['memory_bound']:.2f}, {pair['compute_bound']:.2f}",
                }
        rows.append(row)
    return table(pd.DataFrame(rows).set_index("round").T.rename_axis("round").reset_index())


def _policies_table(content: Mapping[str, Any]) -> str:
    """Return the means of each policy over windows, simulated and real."""
    real, rows = content["real"], []
    predicted = [one["predictions"] for one in content["rounds"] for _ in range(one["repeats"])]
    for policy in next(iter(real.values())):
        ours = [by[policy] for one in predicted for by in one["outcomes"].values()]
        theirs = [one for by in real.values() for one in by[policy]]
        rows.append(
            {
                "policy": policy,
                "utility, simulated": float(
                    np.mean([predicted_utility(one, w, policy) for one in predicted for w in real])
                ),
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

    speeds, points = [one["speed"] for one in content["rounds"]], content["verdict"]["level"]["points"]
    return {
        "slower": {
            bits: [float(np.mean(one["during_each"][bits]) / np.mean(one["before_each"][bits])) for one in speeds]
            for bits in speeds[0]["before_each"]
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
