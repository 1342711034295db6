"""``python -m sim.results``: write sim/RESULTS.md from the files of sim/results; with ``--run``, replay them first.

Every figure of the page comes from those files, which ``--run`` makes with ``python -m sim.compare`` and the words of
``RUNS``. ``--run NAME ...`` replays only these.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sim.atomic import write_whole
from sim.errors import ConfigError
from sim.results.report import SUMMARY_COLUMNS, cells
from sim.results.run_folder import write_json

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE / "RESULTS.md"

LLAMA3 = "experiment=morphserve_l4 model=llama3_8b"
RUNS = {
    "moving_budget": "experiment=moving_budget",
    "morphserve_llama2_7b": "experiment=morphserve_l4",
    "morphserve_llama3_8b": LLAMA3,
    "morphserve_llama3_8b_loaded": f"{LLAMA3} workload.steps.1.factor=0.25 windows=[52,60,70,78,86,94,102,110,118,126]",
    "morphserve_llama3_8b_burstgpt": f"{LLAMA3} trace=burstgpt workload=spread_ties windows=[]",
    "kv_hole": "experiment=kv_hole",
}
"""Name of a file of sim/results: the words that ``python -m sim.compare`` makes it with."""

PICTURES = ("moving_budget", "morphserve_llama2_7b", "kv_hole")
"""Those whose picture the page shows."""

KEPT = {key.split(".")[0] for key, *_ in SUMMARY_COLUMNS.values()} | {"requests", "finished", "rejected", "unfinished"}
PAPER = {  # Llama3-8B, BurstGPT: P95 TTFT in s, share of requests that missed the SLO (arXiv 2506.02006)
    "fp16": (5.65, 0.127),
    "w4 first 8": (2.61, 0.042),
    "w4 first 16": (1.74, 0.0),
    "w4 all": (1.62, 0.0),
    "morphserve default": (1.77, 0.0),
}

Rows = Mapping[str, Sequence[Mapping[str, Any]]]


def replay(name: str, words: str, workers: int, folder: Path) -> None:
    """Replay one comparison; leave its figures and its picture in a folder."""
    run = folder / "run" / name
    command = [sys.executable, "-m", "sim.compare", *words.split(), f"workers={workers}", f"hydra.run.dir={run}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"python -m sim.compare {words} failed: {done.stderr.strip()}")
    content = json.loads((run / "compare.json").read_text(encoding="utf-8"))
    content["provenance"]["command"] = f"python -m sim.compare {words}"  # workers and folder change nothing
    rows = content["summaries"].items()
    content["summaries"] = {label: [_figures(summary) for summary in row] for label, row in rows}
    write_json(folder / f"{name}.json", content)
    _keep_picture(run / "compare.png", folder / f"{name}.png")


def page(results: Path = RESULTS) -> str:
    """Return the page, in Markdown.

    Raises:
        ConfigError: for a result that is missing, with the command that makes it.
    """
    found = {name: _read(results, name) for name in RUNS}
    budget, hole = found["moving_budget"]["summaries"], found["kv_hole"]["summaries"]
    parts = [
        "# What changing the model under load does, in simulation",
        "Made by `python -m sim.results` from the files of `sim/results`; `python -m sim.results --run` replays them. "
        "The devices are simulated (`conf/gpu`, `conf/calibration`); the machine named below each table is the one "
        "that simulated them. Rows are means ± standard deviations over the seeds or windows named; requests that "
        "were rejected or not finished miss the SLO (TTFT 2 s). *params kept* is the share of parameters that made "
        "the tokens, *below 16 bits* the share of layers over time. *perplexity / dense* is predicted from published "
        "points (`conf/quality`): it knows how much a plan drops, not which blocks, so it flatters `random`.",
        "Nothing was fitted to these replays. The co-tenants' sizes follow from bytes, and were tried on seed 100; "
        "MorphServe's period of 0.2 s was taken from 0.1 to 0.25 s before, and tried on windows 4, 44, 84 and 124; the "
        "rate / 4 of the loaded Llama-3-8B was chosen on the first 14 minutes of the trace so that FP16 misses about "
        "as much as the paper's, and is reported on later windows.",
        "## RAP's mechanism: memory that moves",
        _table(found["moving_budget"]),
        _moving_budget(budget),
        "![the seed in which dense attains least](results/moving_budget.png)",
        "## MorphServe's mechanism: layers that change precision",
        "Its own set-up: a 24 GB L4, windows of 72 s, 22.75 GB for weights, workspace and KV cache, which is 958 FP16 "
        "KV blocks for Llama-2-7B and 2,599 for Llama-3-8B, as the paper states. The L4's prices are **derived** from "
        "measurements of an L40S by the ratios of the data sheets; nobody measured them.",
        "### Llama-2-7B, Azure conversation trace at the paper's rate / 4.75",
        _table(found["morphserve_llama2_7b"]),
        _order(found["morphserve_llama2_7b"]["summaries"]),
        "![the window in which FP16 attains least](results/morphserve_llama2_7b.png)",
        "### Llama-3-8B, the same",
        _table(found["morphserve_llama3_8b"]),
        _pressure(found["morphserve_llama3_8b"]["summaries"], "rate / 4.75"),
        "### Llama-3-8B at rate / 4",
        _table(found["morphserve_llama3_8b_loaded"]),
        _order(found["morphserve_llama3_8b_loaded"]["summaries"]),
        "### Llama-3-8B, the published segment of BurstGPT at its full rate",
        _table(found["morphserve_llama3_8b_burstgpt"]),
        _pressure(found["morphserve_llama3_8b_burstgpt"]["summaries"], "full rate, prompts of 125 tokens on average"),
        "### Beside the paper's table (Llama-3-8B)",
        _beside_paper(found["morphserve_llama3_8b_loaded"]["summaries"]),
        "## The KV hole: what a restored MHA block costs",
        _table(found["kv_hole"]),
        _kv_hole(hole),
        "![the seed in which dense attains least](results/kv_hole.png)",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(content: Mapping[str, Any]) -> str:
    made, cases = content["provenance"], content["cases"]
    over = f"{cases[0]} to {cases[-1].split()[-1]}, {len(cases)} replays" if len(cases) > 1 else cases[0]
    where = f"commit {made['commit'][:12]}{'-dirty' if made['commit'].endswith('dirty') else ''}, {made['machine']}"
    source = f"{content['title'].partition(':')[0]}; {over}; {made['written_at'][:10]}, {where}."
    rows = {label: cells(row) for label, row in content["summaries"].items()}
    lines = ["| policy |", "|---|", *(f"| {label} |" for label in rows)]
    same = []
    for at, heading in enumerate(SUMMARY_COLUMNS):
        column = [row[at] for row in rows.values()]
        if len(set(column)) == 1:
            same.append(f"{heading}: {column[0]}")
            continue
        lines = [f"{line} {cell} |" for line, cell in zip(lines, [heading, "---:", *column], strict=True)]
    table = "\n".join(lines)
    alike = f" The same in every row: {'; '.join(same)}." if same else ""
    return f"`{made['command']}`\n\n{table}\n\n{source}{alike}"


def _moving_budget(rows: Rows) -> str:
    lines = []
    for size in ("55 GB", "63.5 GB"):
        names = ("dense", "greedy_stop", "random", "rap_80")
        dense, greedy, random, static = (rows[f"{name} {size}"] for name in names)
        lines.append(
            f"- Co-tenant of {size}: `greedy_stop` against dense, SLO attainment {_share(dense)} -> {_share(greedy)}, "
            f"seconds over budget {_mean(dense, 'budget_violation_s'):.1f} -> "
            f"{_mean(greedy, 'budget_violation_s'):.1f}, preemptions {_mean(dense, 'preemptions'):.0f} -> "
            f"{_mean(greedy, 'preemptions'):.0f}; it keeps {_share(greedy, 'kept_params_share')} of the parameters on "
            f"average over requests, at {_mean(greedy, 'perplexity_ratio'):.2f} times the dense perplexity. It is "
            f"better on {_better(greedy, dense)} seeds. RAP's static mask attains {_share(static)} at "
            f"{_mean(static, 'perplexity_ratio'):.2f} times the dense perplexity all the time, a random order "
            f"{_share(random)}: what an order is worth is quality, which needs a measured table (`hw/SCORES.md`), not "
            "speed."
        )
    ahead = [
        _mean(rows[f"greedy_stop {size}"], "slo_attainment") - _mean(rows[f"rap_80 {size}"], "slo_attainment")
        for size in ("55 GB", "63.5 GB")
    ]
    if max(ahead) < 0.02:
        lines.append(
            "- A policy that adapts does not attain more here than a good static mask: what it buys is the perplexity "
            "of requests that come while memory is there, and with the larger co-tenant a shorter tail."
        )
    lines.append(
        "- The seconds over budget that remain with `greedy_stop` are those until the iteration that runs ends: the "
        "co-tenant comes without notice (`budget.notice_s`). What these plans cost in perplexity is high: pruning "
        "serves a shortage that passes, it is no free speed."
    )
    return "\n".join(lines)


def _order(rows: Rows) -> str:
    """Say which of the paper's orders hold."""
    misses = {label: 1.0 - _mean(row, "slo_attainment") for label, row in rows.items()}
    tail = {label: _mean(row, "ttft_s.p95") for label, row in rows.items()}
    cost = {label: _mean(row, "perplexity_ratio") for label, row in rows.items()}
    static = ["fp16", "w4 first 8", "w4 first 16", "w4 all"]
    modes = ["fp16", "morphserve accuracy", "morphserve default", "morphserve performance"]

    def falls(values: Mapping[str, float], labels: Sequence[str]) -> bool:
        return all(values[b] <= values[a] for a, b in itertools.pairwise(labels))

    best = "morphserve performance"
    checks = {
        "more static W4 layers miss fewer SLOs": falls(misses, static),
        "every stronger mode misses fewer SLOs, FP16 most": falls(misses, modes),
        "P95 TTFT falls in the same order": falls(tail, modes) and falls(tail, static),
        "every mode loses less quality than all layers at W4": max(cost[m] for m in modes) < cost["w4 all"],
        "performance mode misses no more than its 16 layers at W4 all the time": misses[best] <= misses["w4 first 16"],
        "performance mode misses as few as all layers at W4": misses[best] <= misses["w4 all"] + 0.005,
    }
    lines = [f"- {claim}: **{'yes' if holds else 'no'}**" for claim, holds in checks.items()]
    fewer = {mode: 1.0 - misses[mode] / misses["fp16"] for mode in modes[1:]} if misses["fp16"] else {}
    if fewer:
        said = ", ".join(
            f"{mode.split()[1]} {100 * share:.0f} % fewer misses (not more in {_no_worse(rows[mode], rows['fp16'])} "
            f"windows), P95 TTFT {tail['fp16'] / tail[mode]:.1f}x better, "
            f"perplexity +{100 * (cost[mode] - 1):.2f} %"
            for mode, share in fewer.items()
        )
        lines.append(
            f"- Against FP16: {said}. The paper: 92 % fewer on average; 2.2 to 3.9x, 2.9 to 15.7x, 3.4 to 19.5x; "
            "0.51 to 3.82 % of quality."
        )
    return "The paper's orders and directions:\n\n" + "\n".join(lines)


def _pressure(rows: Rows, load: str) -> str:
    fp16 = rows["fp16"]
    if _mean(fp16, "slo_attainment") > 0.99:
        return (
            f"At this load ({load}) FP16 meets the SLO for {_share(fp16)} of requests: there is nothing for a "
            "controller to do, and it does next to nothing. The paper's FP16 misses 12.7 %, so its requests "
            "were longer or denser than these; which they were it does not say."
        )
    mode = rows["morphserve default"]
    return (
        f"At this load ({load}) FP16 meets the SLO for {_share(fp16)} of requests, and the controller in its default "
        f"mode for {_share(mode)}, with {_share(mode, 'low_precision_share')} of layers below 16 bits on average."
    )


def _beside_paper(rows: Rows) -> str:
    lines = ["| | P95 TTFT, s | missed | paper: P95 TTFT, s | missed |", "|---|---:|---:|---:|---:|"]
    for label, row in rows.items():
        seconds, missed = PAPER.get(label, (None, None))
        theirs = f"{seconds:.2f} | {100 * missed:.1f} %" if seconds is not None and missed is not None else "- | -"
        ours = f"{_mean(row, 'ttft_s.p95'):.2f} | {100 * (1 - _mean(row, 'slo_attainment')):.1f} %"
        lines.append(f"| {label} | {ours} | {theirs} |")
    why = (
        "Why magnitudes differ: the requests are others (BurstGPT's windows and prompt lengths are not stated, the one "
        "segment that is public presses nothing here); the paper gives no parameters of its modes, and those used "
        "here, of an independent reproduction, let the default mode swap 8 layers and no more, where the paper's "
        "controller comes close to 16; the engine is not its own, and its prices are derived. In both, a controller "
        "that starts at FP16 pays for the seconds until it has swapped; a static W4 model never does."
    )
    return "\n".join(lines) + "\n\n" + why


def _kv_hole(rows: Rows) -> str:
    dense, hole, again = (rows[name] for name in ("dense", "new_requests", "recompute"))
    return (
        "`new_requests` lets running requests go on without the restored blocks: they cost quality "
        f"({_mean(hole, 'perplexity_ratio'):.2f} times the dense perplexity) and recompute "
        f"{_mean(hole, 'recomputed_tokens') / 1e3:.0f} thousand tokens, the ones that memory preempts. `recompute` "
        f"prefills {_mean(again, 'recomputed_tokens') / 1e3:.0f} thousand again and attains {_share(again)} instead of "
        f"{_share(hole)} (dense: {_share(dense)}). It does not even keep more of the model "
        f"({_share(again, 'kept_params_share')} against {_share(hole, 'kept_params_share')}): the backlog that "
        "work done twice makes keeps memory short for longer, as the picture shows. With this rule and this budget, "
        f"living with the hole attains more on {_better(hole, again)} seeds."
    )


def _figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key in KEPT}


def _values(row: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    found = []
    for value in row:
        for part in key.split("."):
            value = value[part]
        found.append(float(value))  # type: ignore[arg-type]
    return found


def _mean(row: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(_values(row, key))


def _share(row: Sequence[Mapping[str, Any]], key: str = "slo_attainment") -> str:
    return f"{100 * _mean(row, key):.1f} %"


def _better(row: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> str:
    pairs = list(zip(_values(row, "slo_attainment"), _values(other, "slo_attainment"), strict=True))
    return f"{sum(a > b for a, b in pairs)} of {len(pairs)}"


def _no_worse(row: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> str:
    pairs = list(zip(_values(row, "slo_attainment"), _values(other, "slo_attainment"), strict=True))
    return f"{sum(a >= b for a, b in pairs)} of {len(pairs)}"


def _read(results: Path, name: str) -> Mapping[str, Any]:
    path = results / f"{name}.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; make it with python -m sim.results measure=true only='[{name}]'")
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _keep_picture(drawn: Path, kept: Path) -> None:
    """Keep a picture with 128 colours: a third of the bytes, and none of its lines is lost."""
    from PIL import Image  # matplotlib brings it

    with Image.open(drawn) as image:
        small = image.convert("RGB").quantize(128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        write_whole(kept, lambda part: small.save(part, format="png", optimize=True))
