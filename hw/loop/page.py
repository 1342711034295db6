"""The results page of the loop, from loop.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hw.loop.predictions import predicted_utility
from sim.pages.render import render, table
from sim.results.plots import COLORS, figure_file

TEMPLATE = Path(__file__).parent / "templates" / "loop.md.j2"


def page(content: Mapping[str, Any]) -> str:
    """Return the page, in Markdown."""
    verdict, rounds = content["verdict"], content["rounds"]
    return render(
        TEMPLATE,
        content=content,
        made=content["provenance"],
        commits=content.get("commits", [content["provenance"]["commit"]]),  # earlier versions lack both
        left_out=content.get("left_out", []),
        verdict=verdict,
        rounds=_rounds_table(content),
        measured=any(one["measured"] for one in rounds),
        policies=_policies_table(content),
        cells=_cells_table(content),
        hindsight=_hindsight(content),
        speed=speed_share(content),
        pairs=_pairs_table(verdict),
        changes=_changes(content),
        within=sum(abs(row["error"]) <= verdict["level"]["points"] for row in verdict["level"]["cells"]),
        missed=[row for row in verdict["level"]["cells"] if not row["holds"]],
        ranged=[row["in_range"] for row in verdict["level"]["cells"] if "in_range" in row],
        run_speeds=[speed for one in rounds for speed in one["predictions"]["run_speeds"]],
        slower=[run["slower"] for by in content["real"].values() for runs in by.values() for run in runs],
        requests=[int(n["requests"]) for one in rounds for n in one["predictions"]["windows"].values()],
        number_of_rounds=len({one["round"] for one in rounds}),
        each_run=len({(one["round"], one["window"]) for one in rounds}) < len(rounds),
    )


def _rounds_table(content: Mapping[str, Any]) -> str:
    """Return when each window was predicted in each round, and how fast the machine was before and during its runs."""
    numbers = sorted({one["round"] for one in content["rounds"]})
    repeats = content["repeats"] // len(numbers)
    order = {policy: at for at, policy in enumerate(next(iter(content["real"].values())))}
    parts: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for one in content["rounds"]:
        parts.setdefault((one["round"], one["window"]), []).append(one)
    rows = []
    for (number, window), served in parts.items():
        found = sorted(served, key=lambda one: order[next(iter(one["predictions"]["outcomes"][one["window"]]))])
        first = numbers.index(number) * repeats
        runs = [run for each in content["real"][window].values() for run in each[first : first + repeats]]
        rows.append(
            {
                "round": str(number),
                "window": window,
                "predictions written": _from_to([one["predictions"]["provenance"]["written_at"] for one in found]),
                "SHA-256": ", ".join(f"`{one['predictions']['sha256'][:8]}`" for one in found),
                "slowdown": float(np.mean([one["predictions"]["slowdown"] for one in found])),
                **{
                    f"{bits} bits": float(np.mean([ratio for one in found for ratio in one["measured"][bits]]))
                    for bits in found[0]["measured"]
                },
                "runs after it": ", ".join(f"{run['slower']:.2f}" for run in runs),
            }
        )
    return table(rows, {"slowdown": ".2f", "16 bits": ".2f", "8 bits": ".2f", "4 bits": ".2f"}, left=4)


def _from_to(times: Sequence[str]) -> str:
    """Return the first of some times, and the last if there are more: without its date if that is the same."""
    first, last = min(times)[:19], max(times)[:19]
    if first == last:
        return first
    return f"{first} to {last[11:] if first[:10] == last[:10] else last}"


def _policies_table(content: Mapping[str, Any]) -> str:
    """Return the means of each policy over windows, simulated and real."""
    real, rows = content["real"], []
    predicted = [(one["window"], one["predictions"]) for one in content["rounds"]]
    for policy in next(iter(real.values())):
        mine = [(window, one) for window, one in predicted if policy in one["outcomes"][window]]
        ours = [one["outcomes"][window][policy] for window, one in mine]
        theirs = [one for by in real.values() for one in by[policy]]
        rows.append(
            {
                "policy": policy,
                "slowdown": float(np.mean([one["slowdown"] for _, one in mine])),
                "utility, simulated": float(np.mean([predicted_utility(one, w, policy) for w, one in mine])),
                "utility, real": float(np.mean([one["utility"] for one in theirs])),
                "SLO, simulated": float(np.mean([one["slo_attainment"] for one in ours])),
                "SLO, real": float(np.mean([one["slo_attainment"] for one in theirs])),
                "changes/min, simulated": float(np.mean([one["changes_per_minute"] for one in ours])),
                "changes/min, real": float(np.mean([one["changes_per_minute"] for one in theirs])),
            }
        )
    specs = {
        "slowdown": ".2f",
        "utility, simulated": ".4f",
        "utility, real": ".4f",
        "SLO, simulated": ".1%",
        "SLO, real": ".1%",
    }
    return table(rows, specs | {"changes/min, simulated": ".1f", "changes/min, real": ".1f"})


def _changes(content: Mapping[str, Any]) -> str:
    """Return how often a minute each policy changed plans on the real engine, and in which window least."""
    said = []
    for policy, mean in content["verdict"]["changes"]["per_minute"].items():
        each = {w: np.mean([run["changes_per_minute"] for run in by[policy]]) for w, by in content["real"].items()}
        least = min(each, key=each.__getitem__)
        said.append(f"{policy} {mean:.1f} ({each[least]:.1f} in {least})")
    return ", ".join(said)


def speed_share(content: Mapping[str, Any]) -> dict[str, float] | None:
    """Return how much of the learned policy's lead over the best rule is due to a machine that was faster in its runs.

    In random order, a policy may meet the machine at a better speed than another. A least squares fit over the runs of
    policies that change plans, each minus the mean of its cell, says what a unit of slowdown costs in utility.

    Returns:
        "learned" and "rule": their mean slowdowns. "slope": utility per unit of slowdown. "share": of the lead. None
        without a learned policy, without two rounds, or if no policy changes plans or no speed differs.
    """
    verdict, windows = content["verdict"], content["real"]
    if "learner" not in verdict or content["repeats"] < 2:
        return None
    rounds = len({one["round"] for one in content["rounds"]})
    slowdowns: dict[tuple[str, str], list[float]] = {}
    for one in content["rounds"]:
        for policy in one["predictions"]["outcomes"][one["window"]]:
            cell = slowdowns.setdefault((one["window"], policy), [])
            cell += [one["predictions"]["slowdown"]] * (content["repeats"] // rounds)
    met: dict[str, list[float]] = {}
    moved, gained = [], []
    for (window, policy), of_rounds in slowdowns.items():
        runs = windows[window][policy]
        speeds = np.array([slowdown * run["slower"] for slowdown, run in zip(of_rounds, runs, strict=True)])
        utilities = np.array([run["utility"] for run in runs])
        met.setdefault(policy, []).append(float(speeds.mean()))
        if policy in verdict["changes"]["per_minute"]:
            moved.append(speeds - speeds.mean())
            gained.append(utilities - utilities.mean())
    if not moved or not np.any(moved):
        return None
    x, y = np.concatenate(moved), np.concatenate(gained)
    slope = float((x * y).sum() / (x * x).sum())
    learned, rule = (float(np.mean(met[verdict["learner"][key]])) for key in ("learner", "best_rule"))
    return {"learned": learned, "rule": rule, "slope": slope, "share": slope * (learned - rule)}


def _hindsight(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how close simulation is to the judged runs at the speed that the machine had during them."""
    found = content.get("hindsight")
    if found is None:
        return None

    def off(cells: Sequence[Mapping[str, Any]]) -> float:
        return float(np.sqrt(np.mean([row["error"] ** 2 for row in cells])))

    points = content["verdict"]["level"]["points"]
    return {
        "hold": sum(row["holds"] for row in found),
        "within": sum(abs(row["error"]) <= points for row in found),
        "off": off(found),
        "off_predicted": off(content["verdict"]["level"]["cells"]),
    }


def _cells_table(content: Mapping[str, Any]) -> str:
    """Return every predicted utility next to its repeats."""
    cells = content["verdict"]["level"]["cells"]
    known = [row["simulated"] for row in content.get("hindsight") or []]
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
