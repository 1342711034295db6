"""The page docs/results/reproduction/index.md: tables from the rows' figures, prose from a template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sim.pages.render import commit_of, render, show, table

TEMPLATE = Path(__file__).parent / "templates" / "reproduction.md.j2"
STATISTICS = ("mean", "p50", "p95", "p99")
FIGURES = {
    "ttft_mean_s": "TTFT mean, s",
    "ttft_p50_s": "TTFT P50, s",
    "ttft_p95_s": "TTFT P95, s",
    "ttft_over_2s": "TTFT over 2 s, of 64",
    "preemptions": "preemptions",
    "tpot_mean_s": "TPOT mean, s",
    "duration_s": "duration, s",
}
SPECS = {"ttft_over_2s": ".0f", "preemptions": ".0f", "tpot_mean_s": ".4f", "duration_s": ".1f"}


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page of the rows that were computed: name of a row -> its content."""
    return render(
        TEMPLATE,
        rows=found,
        tables={name: TABLES[name](content) for name, content in found.items()},
        commits={name: commit_of(content) for name, content in found.items()},
    )


def _plain(content: Mapping[str, Any], specs: Mapping[str, str], left: int = 1) -> str:
    return table(content["rows"], specs, left)


def _rap(content: Mapping[str, Any]) -> dict[str, str]:
    peaks = {
        "peak, GB, published": ".2f",
        "here": ".2f",
        "difference": "+.3f",
        "measured on a GPU, published": ".2f",
        "above the peak": "+.1%",
    }
    return {
        "peaks": _plain(content, peaks),
        "shares": table(content["shares"], {"share of dense": ".3f", "expected": ".3f"}, 0),
    }


def _rtx3090(content: Mapping[str, Any]) -> dict[str, str]:
    fixed = [
        {
            **{key: row[key] for key in ("workload", "plan")},
            "figure": FIGURES[row["figure"]],
            **{
                key: show(row[key], SPECS.get(row["figure"], ".2f"))
                for key in ("measured, lower", "measured, higher", "simulated")
            },
            "lies": row["lies"],
        }
        for row in content["fixed"]
    ]
    crossover = [
        {
            "rate, req/s": row["rate_rps"],
            "seen by the fit": "yes" if row["seen"] else "no",
            "FP16, measured": _span(row["fp16_real"]),
            "FP16, here": row["fp16"],
            "W4, measured": _span(row["w4_real"]),
            "W4, here": row["w4"],
        }
        for row in content["crossover"]
    ]
    return {
        "fixed": table(fixed, left=3),
        "crossover": table(crossover, {"rate, req/s": ".3f", "FP16, here": ".2f", "W4, here": ".2f"}, 0),
        "dynamic": table([_dynamic(row) for row in content["dynamic"]], left=2),
    }


def _dynamic(row: Mapping[str, Any]) -> dict[str, Any]:
    cells = {name: row[key] for key, name in FIGURES.items() if key != "ttft_over_2s"}
    shown = {name: show(cells[name], SPECS.get(key, ".2f")) for key, name in FIGURES.items() if name in cells}
    switches = row.get("to_w4_s")
    return {
        "workload": row["workload"],
        "plan": row["plan"],
        **shown,
        "TTFT over 2 s": f"{row['ttft_over_2s']:.0f}",
        "to 4 bits at, s": None if switches is None else _times(row["to_w4_s"]),
        "back at, s": None if switches is None else _times(row["to_fp16_s"]),
    }


def _times(switches: Sequence[Sequence[float]]) -> str:
    return ", ".join(f"{decided_s:.0f}" for decided_s, _ in switches) or "never"


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _watermark(content: Mapping[str, Any]) -> dict[str, str]:
    specs = {
        "watermark": ".2f",
        "simulated": ".0f",
        "tokens/s, published": ",.0f",
        "tokens/s, simulated": ",.0f",
        "error": "+.1%",
    }
    outside = []
    for row in content["rows"]:
        low, high = map(int, row["over seeds"].split(" to "))
        published = row["preemptions, published"]
        if not low <= published <= high:
            nearer = low if published < low else high
            outside.append(f"{row['watermark']:.2f} ({published:,} against {nearer:,})")
    sentence = "All published counts of preemptions lie in it."
    if outside:
        sentence = f"Published counts of preemptions outside it: at {', '.join(outside)}."
    return {"rows": _plain(content, specs, 0), "outside": sentence}


def _steps(found: Mapping[str, Mapping[str, Any]], named: str) -> str:
    """Return the table of steps on several GPUs (``hw.reproduction.tensor_parallel``) of engines or servers."""
    specs = {"nothing fitted, median": "+.0%", "fitted, median": "+.0%", "median error": ".1%", "largest": ".0%"}
    specs["at the floor"] = ".0%"
    rows = [
        {
            named: name,
            **{key: row[key] for key in ("GPUs", "step")},
            "seen by the fit": "yes" if row["seen by the fit"] else "no",
            "published, ms": f"{row['published, ms'][0]:,.0f} to {row['published, ms'][1]:,.0f}",
            **{key: row[key] for key in specs},
        }
        for name, content in found.items()
        for row in content["rows"]
    ]
    return table(rows, specs, 1)


def _whole(found: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        {"server": name, **row, "seen by the fit": "yes" if row["seen by the fit"] else "no"}
        for name, content in found.items()
        for row in content["whole"]
    ]
    return table(rows, {"median error": ".1%", "largest": ".0%"}, 1)


def _llmservingsim(content: Mapping[str, Any]) -> str:
    errors = content["errors"]
    rows = []
    for name in ("ttft_s", "tpot_s", "e2e_s", "makespan_s"):
        row = errors[name] if name != "makespan_s" else {"mean": errors[name]}
        cells: dict[str, Any] = {"": "makespan" if name == "makespan_s" else name.removesuffix("_s").upper()}
        cells |= {"measured mean, s": row["mean"]["real"], "here": row["mean"]["simulated"]}
        rows.append(
            cells | {("mean" if s == "mean" else s.upper()): row[s]["error"] if s in row else None for s in STATISTICS}
        )
    specs = dict.fromkeys(("mean", "P50", "P95", "P99"), "+.1%") | dict.fromkeys(("measured mean, s", "here"), ".4g")
    return table(rows, specs)


TABLES: dict[str, Any] = {
    "rap_memory": _rap,
    "morphserve_table": lambda content: _plain(
        content,
        {"TTFT P95, s, paper": ".2f", "here": ".2f", "SLO missed, paper": ".1%", "missed here": ".1%"},
    ),
    "morphserve_windows": lambda content: _plain(
        content, {"here": ".1f", "fewer misses here": ".0%", "perplexity here": "+.2%"}
    ),
    "morphserve_rtx3090": _rtx3090,
    "vllm_watermark": _watermark,
    "distserve": lambda content: {
        "capacity": _plain(content, {"largest error": ".4%", "tokens, published": ",.0f", "here": ",.0f"}),
        "steps": _steps(content["steps"], "engine"),
    },
    "splitwise": lambda content: {
        "bounds": _plain(
            content,
            {
                **dict.fromkeys(
                    ("A100, measured, ms", "A100, least, ms", "H100, measured, ms", "H100, least, ms"), ".1f"
                ),
                "H100 / A100, measured": ".2f",
                "least": ".2f",
            },
            0,
        ),
        "steps": _steps(content["predictions"], "server"),
        "whole": _whole(content["predictions"]),
    },
    "llmservingsim": _llmservingsim,
}
"""Name of a row: what makes its tables."""
