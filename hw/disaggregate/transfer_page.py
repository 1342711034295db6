"""The page docs/results/transfer/index.md, from the figures that ``hw.disaggregate.transfer`` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hw.disaggregate.transfer import MOST_BYTES_PER_S
from hw.validate.compare import judged_figure
from hw.validate.suite import ranking
from sim.pages.render import commit_of, render, show, table
from sim.paths import RESULTS

RESULT, PAGE = (RESULTS / "transfer" / name for name in ("transfer.json", "index.md"))
TEMPLATE = Path(__file__).parent / "templates" / "transfer.md.j2"
SHOWN = {
    "way_s.mean": "KV transfer",
    "ttft_s.mean": "TTFT",
    "tpot_s.mean": "TPOT",
    "e2e_s.mean": "E2E",
    "makespan_s": "makespan",
}
SIDES = {"simulated": "as it is", "at_speed": "at measured speed"}
CROWDED_CORES = 0.2
"""Above this many cores kept busy by other programs, in the median run, times say little."""


def of(row: Mapping[str, Any], name: str) -> float | None:
    """Return the figure with a dotted name."""
    value: Any = row
    for part in name.split("."):
        value = value[part]
    return None if value is None else float(value)


def compared(variant: Mapping[str, Any], side: str) -> dict[str, dict[str, Any]]:
    """Return the figures of a simulation next to those of the real runs."""
    real = variant["real"]
    return {name: judged_figure(of(variant[side], name), [of(row, name) for row in real], None) for name in SHOWN}


def crowded(busy_cores: Sequence[float]) -> bool:
    """Return whether other programs kept the machine too busy for times to mean much."""
    return len(busy_cores) > 0 and float(np.median(busy_cores)) > CROWDED_CORES


def page(content: Mapping[str, Any]) -> str:
    """Return the page, in Markdown."""
    variants, busy = content["variants"], content["others_busy_cores"]
    limited = {label: variant for label, variant in variants.items() if variant["link"] == "10 MB/s"}
    repeated = all(len(variant["real"]) > 1 for variant in variants.values())  # a single run has no known noise
    return render(
        TEMPLATE,
        content=content,
        made=content["provenance"],
        commit=commit_of(content["provenance"]),
        busy=(float(np.median(busy)), max(busy)) if busy else None,
        crowded=crowded(busy),
        speeds={stage: [speed[stage] for speed in content["speeds"]] for stage in content["times"]},
        bytes=bytes_table(variants),
        times=times_table(variants),
        errors=errors_table(variants),
        links=links_table(content["links"]),
        gains=gains_table(limited),
        ranking=ranking_table(limited) if repeated else "",
        plans=table([{"variant": label, "plan": variant["plan"]} for label, variant in variants.items()], left=2),
    )


def bytes_table(variants: Mapping[str, Any]) -> str:
    """Return the bytes that each variant sent, and whether the plan and the simulation say the same."""
    dense = variants["dense"]["real"][0]["sent_bytes"]
    rows = []
    for label, variant in variants.items():
        real, simulated = variant["real"], variant["simulated"]
        sent = real[0]["sent_bytes"]
        same = all(row["as_planned"] and row["sent_bytes"] == simulated["sent_bytes"] for row in real)
        finished, preemptions = (", ".join(sorted({str(r[key]) for r in real})) for key in ("finished", "preemptions"))
        rows.append(
            {
                "variant": label,
                "KV sent (bytes)": sent,
                "as planned": "equal" if same else "**differs**",
                "KV reduction": f"{dense / sent:.2f}x",
                "overhead": variant["header_bytes"] / sent,
                "finished": finished,
                "preemptions": preemptions,
            }
        )
    return table(rows, {"KV sent (bytes)": ",", "overhead": ".1%"})


def times_table(variants: Mapping[str, Any]) -> str:
    """Return every time: real median, noise, and the simulator's error as it is and at measured speed."""
    rows = []
    for label, variant in variants.items():
        sides = {heading: compared(variant, side) for side, heading in SIDES.items()}
        for name, figure in SHOWN.items():
            first = next(iter(sides.values()))[name]
            errors = {f"error {heading}": found[name]["error"] for heading, found in sides.items()}
            known = {"real": duration(first["real"]), "noise": first["noise"]}
            rows.append({"variant": label, "time": figure} | known | errors)
    return table(rows, {"noise": ".1%"} | {f"error {heading}": "+.1%" for heading in SIDES.values()}, left=2)


def duration(value: float | None) -> str:
    """Return seconds as ``1.23 s`` or ``123 ms``."""
    return "-" if value is None else f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def errors_table(variants: Mapping[str, Any]) -> str:
    """Return the median absolute error of each time over the variants."""
    rows = []
    for name, figure in SHOWN.items():
        row: dict[str, Any] = {"time": figure}
        for side, heading in SIDES.items():
            errors = [compared(variant, side)[name]["error"] for variant in variants.values()]
            row[heading] = float(np.median(np.abs([error for error in errors if error is not None])))
        rows.append(row)
    return table(rows, dict.fromkeys(SIDES.values(), ".1%"))


def links_table(links: Mapping[str, Any]) -> str:
    """Return the calibrated links."""
    rows = [
        {
            "link": name,
            "transfers": link["transfers"],
            "bandwidth (MB/s)": 1e-6 * link["bytes_per_s"] if link["bytes_per_s"] < MOST_BYTES_PER_S else None,
            "latency (ms)": 1e3 * link["latency_s"],
            "median error (ms)": 1e3 * link["median_error_s"],
        }
        for name, link in links.items()
    ]
    return table(rows, {"bandwidth (MB/s)": ",.1f", "latency (ms)": ".1f", "median error (ms)": ".1f"})


def gains_table(variants: Mapping[str, Any]) -> str:
    """Return how many times as long dense takes, over the limited link."""
    real = {label: compared(variant, "simulated") for label, variant in variants.items()}
    rows = [
        {"variant": label}
        | {
            SHOWN[name]: f"{show(real['dense'][name]['real'] / found[name]['real'], '.2f')}x"
            for name in ("way_s.mean", "e2e_s.mean")
        }
        for label, found in real.items()
        if label != "dense"
    ]
    return table(rows)


def ranking_table(variants: Mapping[str, Any]) -> str:
    """Return how many pairs of plans that differ beyond their noise the simulator orders like the real runs."""
    rows = []
    for side, heading in SIDES.items():
        found = ranking({"all": {label: {"figures": compared(v, side)} for label, v in variants.items()}})["all"]
        for name, row in found.items():
            pairs = f"{row['agreed']} of {row['pairs_beyond_noise']}"
            rows.append({"simulator": heading, "time": SHOWN[name], "pairs": pairs, "regret": row["regret"]})
    return table(rows, {"regret": ".1%"}, left=2)
