"""``python -m sim.cluster_results``: write sim/CLUSTER.md from the files of sim/results; with ``--run``, replay first.

Every figure of the page comes from those files, which ``--run`` makes with the commands of ``RUNS``; ``--run NAME ...``
replays only these.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sim.cluster.run import CACHE_COLUMNS, CLUSTER_COLUMNS
from sim.disaggregate.run import STAGED_COLUMNS
from sim.errors import ConfigError
from sim.results.report import Columns, cells

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE / "CLUSTER.md"
RUNS: dict[str, tuple[str, Columns]] = {
    "cluster_scale": ("sim.cluster experiment=cluster_scale", CLUSTER_COLUMNS),
    "prefix_caching": ("sim.cluster experiment=prefix_caching", CACHE_COLUMNS),
    "spot_preemption": ("sim.cluster experiment=spot_preemption", CLUSTER_COLUMNS),
    "pd_disaggregation": ("sim.disaggregate experiment=pd_disaggregation", STAGED_COLUMNS),
    "pdtrim_transfer": ("sim.disaggregate experiment=pdtrim_transfer", STAGED_COLUMNS),
}
"""Name of a file of sim/results: the command that makes it, and the columns that the page shows."""
COUNTS = ("requests", "finished", "rejected", "unfinished", "moves", "plan", "reduction_at_mean_prompt")

Rows = Mapping[str, Sequence[Mapping[str, Any]]]


def replay(name: str, workers: int, folder: Path) -> dict[str, Any]:
    """Replay one experiment, its run folder inside ``folder``; return its figures."""
    words, _ = RUNS[name]
    run = folder / "run" / name
    command = [sys.executable, "-m", *words.split(), f"workers={workers}", f"hydra.run.dir={run}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"python -m {words} failed: {done.stderr.strip()}")
    return figures_of(name, run)


def figures_of(name: str, run: Path) -> dict[str, Any]:
    """Return what the page needs of a run folder of an experiment."""
    words, columns = RUNS[name]
    content: dict[str, Any] = json.loads((run / "compare.json").read_text(encoding="utf-8"))
    content["provenance"]["command"] = f"python -m {words}"  # workers and folder change nothing
    kept = {key.split(".")[0] for key, *_ in columns.values()} | set(COUNTS)
    content["summaries"] = {
        label: [{key: value for key, value in summary.items() if key in kept} for summary in row]
        for label, row in content["summaries"].items()
    }
    return content


def page(results: Path = RESULTS) -> str:
    """Return the page, in Markdown.

    Raises:
        ConfigError: for a result that is missing, with the command that makes it.
    """
    found = {name: _read(results, name) for name in RUNS}
    rows: dict[str, Rows] = {name: content["summaries"] for name, content in found.items()}
    parts = [
        "# Many replicas, and prefill and decode apart, in simulation",
        "Made by `python -m sim.cluster_results` from files of `sim/results`; with `--run` it replays them. Devices "
        "are simulated (`conf/gpu`, `conf/calibration`; those of the L4 are derived, not measured); the machine named "
        "below each table simulated them. Rows are means ± standard deviations over the seeds named. Requests that "
        "were rejected or not finished miss the SLO. Loads were chosen on seed 1, so that some variants are pressed; "
        "other seeds are reported.",
        "## Routers, on equal and on mixed replicas",
        _table(found["cluster_scale"], "cluster_scale"),
        _routers(rows["cluster_scale"]),
        "## Prompts that begin alike",
        _table(found["prefix_caching"], "prefix_caching"),
        _caching(rows["prefix_caching"]),
        "## Machines that are taken away",
        _table(found["spot_preemption"], "spot_preemption"),
        _spot(rows["spot_preemption"]),
        "## Prefill and decode apart",
        _table(found["pd_disaggregation"], "pd_disaggregation"),
        _apart(rows["pd_disaggregation"]),
        "## PDTrim's mechanisms, each alone and together",
        _table(found["pdtrim_transfer"], "pdtrim_transfer"),
        _pdtrim(rows["pdtrim_transfer"]),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(content: Mapping[str, Any], name: str) -> str:
    made, cases, columns = content["provenance"], content["cases"], RUNS[name][1]
    lines = ["| variant | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {label} | " + " | ".join(cells(row, columns)) + " |" for label, row in content["summaries"].items()]
    where = f"commit {made['commit'][:12]}{'-dirty' if made['commit'].endswith('dirty') else ''}, {made['machine']}"
    over = f"{cases[0]} to {cases[-1].split()[-1]}, {len(cases)} replays"
    return f"`{made['command']}`\n\n" + "\n".join(lines) + f"\n\n{over}; {made['written_at'][:10]}, {where}."


def _routers(rows: Rows) -> str:
    def best(prefix: str) -> str:
        labels = [label for label in rows if label.startswith(prefix) and "autoscaled" not in label]
        order = sorted(labels, key=lambda label: _mean(rows[label], "ttft_s.p95"))
        return ", ".join(f"{label.partition(', ')[2]} {_mean(rows[label], 'ttft_s.p95'):.2f}" for label in order)

    scaled, fixed = rows["12 A100, autoscaled"], rows["12 A100, least outstanding"]
    return (
        f"- TTFT P95 in seconds on mixed replicas: {best('mixed')}; on equal ones: {best('12 A100')}.\n"
        "- `shortest expected wait` counts prompts that wait, not answers that run: it is right about TTFT while "
        "memory lasts, and blind to a replica whose KV pool is full.\n"
        f"- Autoscaling from 6 machines attains {_percent(scaled)} with {_mean(scaled, 'replica_hours'):.2f} replica "
        f"hours where all twelve attain {_percent(fixed)} with {_mean(fixed, 'replica_hours'):.2f}."
    )


def _caching(rows: Rows) -> str:
    said = []
    for trace in ("conversation", "synthetic"):
        mine = {label.partition(", ")[2]: row for label, row in rows.items() if label.startswith(trace)}
        parts = []
        for label in (label.removesuffix(", on") for label in mine if label.endswith(", on")):
            on, off = mine[f"{label}, on"], mine[f"{label}, off"]
            parts.append(
                f"{label} finds {100 * _mean(on, 'cached_share'):.1f} % of the prompts' tokens; TTFT P50 "
                f"{_mean(off, 'ttft_s.p50'):.2f} to {_mean(on, 'ttft_s.p50'):.2f} s, P95 "
                f"{_mean(off, 'ttft_s.p95'):.2f} to {_mean(on, 'ttft_s.p95'):.2f} s, attained "
                f"{_percent(off)} to {_percent(on)}"
            )
        room = next(row for label, row in mine.items() if label.endswith("room for all"))
        parts.append(f"with room for all of it, {100 * _mean(room, 'cached_share'):.1f} %")
        best = max(
            (label for label in mine if label.endswith((", on", ", off"))),
            key=lambda label: _mean(mine[label], "slo_attainment"),
        )
        parts.append(
            f"{best.replace(', on', ' with a cache').replace(', off', ' without')} attains most of those that fit"
        )
        said.append(f"- The {trace} trace, from off to on: {'. '.join(parts)}.")
    return (
        "\n".join(said) + "\n"
        "- The cache is what running requests leave of the KV pool of one H100. Mooncake keeps KV in the memory of all "
        "hosts too, which is not modelled: `room for all` is the most that this could find under that router.\n"
        "- All conversations begin with one and the same id, so that affinity sends those that are new after the last "
        "one; on that trace it has to give way early."
    )


def _spot(rows: Rows) -> str:
    told, untold = rows["with notice"], rows["without notice"]
    worse = _mean(told, "slo_attainment") < _mean(untold, "slo_attainment")
    return (
        f"- No request is lost: {_total(rows, 'finished')} of {_total(rows, 'requests')} finish, "
        f"{_total(rows, 'moves')} times one was moved to another replica.\n"
        f"- A notice saves recomputation ({_mean(told, 'recomputed_tokens') / 1e3:.0f} thousand tokens against "
        f"{_mean(untold, 'recomputed_tokens') / 1e3:.0f}) and "
        f"{'costs' if worse else 'gains'} SLO attainment ({_percent(told)} against {_percent(untold)}): the replica "
        "accepts nothing more from the notice on, 30 s of a machine that are not used for new requests. SpotServe asks "
        "for the next machine at the notice and moves KV within it; neither is modelled here.\n"
        f"- RAP's mask loads and serves faster: {_percent(rows['with notice, rap_80'])} with notice. Starting in 60 s "
        f"in the place of 10: {_percent(rows['with notice, slow to start'])}. One more machine of the same kind: "
        f"{_percent(rows['one more machine'])}."
    )


def _apart(rows: Rows) -> str:
    together = rows["4 together"]
    apart = {label: row for label, row in rows.items() if label.endswith("100 Gbit/s")}
    best = max(apart, key=lambda label: _mean(apart[label], "slo_attainment"))
    slow, over = rows["2 + 2, 25 Gbit/s"], rows["2 + 2, 25 Gbit/s, overlap"]
    gains = _verdict(_mean(apart[best], "tpot_s.p95"), _mean(together, "tpot_s.p95"))
    return (
        f"- The best ratio of these is {best.partition(',')[0]} ({_percent(apart[best])}); together the four attain "
        f"{_percent(together)}. Is TPOT P95 shorter apart? **{gains}**: "
        f"{1e3 * _mean(apart[best], 'tpot_s.p95'):.0f} ms against {1e3 * _mean(together, 'tpot_s.p95'):.0f} ms. The "
        "engines cut prompts into chunks of at most 2,048 tokens, so that decode waits little for them where all do "
        "both; the load is one that four machines carry together.\n"
        f"- A prompt of this trace sends {_mean(slow, 'sent_bytes_mean') / 1e6:.0f} MB. On 25 Gbit/s KV is on its way "
        f"for {1e3 * _mean(slow, 'transfer_s.mean'):.0f} ms on average, in bursts that share a link; sending while the "
        f"prompt is computed changes E2E from {_mean(slow, 'e2e_s.mean'):.2f} to {_mean(over, 'e2e_s.mean'):.2f} s: "
        "what is short is bandwidth, not time in which to send."
    )


def _verdict(ours: float, theirs: float) -> str:
    """Say whether the first is smaller; within 2 % nothing is claimed."""
    return "no difference" if abs(ours / theirs - 1.0) < 0.02 else "yes" if ours < theirs else "no"


def _pdtrim(rows: Rows) -> str:
    def said(suffix: str) -> str:
        labels = [label for label in rows if label.endswith(suffix)]
        order = sorted(labels, key=lambda label: _mean(rows[label], "e2e_s.mean"))
        return "; ".join(
            f"{label.removesuffix(suffix)} {_mean(rows[label], 'e2e_s.mean'):.2f} s, "
            f"{_mean(rows[label], 'transfer_reduction'):.2f}x less, {_mean(rows[label], 'perplexity_ratio'):.2f}"
            for label in order
        )

    def of(what: str, target: str, key: str) -> float:
        return _mean(rows[f"{what}, {target}"], key)

    e2e, cost, less = "e2e_s.mean", "perplexity_ratio", "transfer_reduction"
    kv, blocks, both = "PDTrim KV", "PDTrim blocks", "PDTrim both"
    checks = {
        "cutting KV sends less than dropping blocks, at equal quality": _verdict(
            1 / of(kv, "quality", less), 1 / of(blocks, "quality", less)
        ),
        "cutting KV costs less quality than dropping blocks, at equal bytes": _verdict(
            of(kv, "bytes", cost), of(blocks, "bytes", cost)
        ),
        "nested blocks cost less quality than the same blocks in both stages, at equal bytes": _verdict(
            of(blocks, "bytes", cost), of("unified", "bytes", cost)
        ),
        "the sets that a search found are faster than the first blocks of the order, at 1.5 times dense": _verdict(
            of("PDTrim searched", "1.5", e2e), of(blocks, "1.5", e2e)
        ),
        "both mechanisms together are faster than each alone, at equal quality": _verdict(
            of(both, "quality", e2e), min(of(kv, "quality", e2e), of(blocks, "quality", e2e))
        ),
        "layers chosen by attention are faster than a window in all layers, at equal quality": _verdict(
            of(kv, "quality", e2e), of("windows", "quality", e2e)
        ),
        "layers chosen by attention cost less quality than a window in all layers, at equal bytes": _verdict(
            of(kv, "bytes", cost), of("windows", "bytes", cost)
        ),
    }
    claims = "\n".join(f"- {claim}: **{verdict}**" for claim, verdict in checks.items())
    off = max(abs(_mean(row, less) / _mean(row, "reduction_at_mean_prompt") - 1.0) for row in rows.values())
    plans = "\n".join(f"- {label}: {row[0]['plan']}" for label, row in rows.items())
    return (
        f"Mean E2E (dense {_mean(rows['dense'], e2e):.2f} s), KV sent, and perplexity over dense as the requests were "
        "charged, from the fastest to the slowest:\n\n"
        f"- at a plan of at most 1.25 times the dense perplexity: {said(', quality')}.\n"
        f"- at half of the dense KV bytes of a prompt of 128 tokens, or the next step below: {said(', bytes')}.\n\n"
        f"What PDTrim claims or its reviewers asked:\n\n{claims}\n\n"
        "Plans move in whole steps, so no kind meets a target exactly, and `both` has one step for its two mechanisms: "
        "its best mixture is not searched. The quality table was measured on windows of 128 tokens, and prompts here "
        "are about as long; a cut is charged in full even where a prompt is shorter than what stays. Sets are prefixes "
        "of the order that PDTrim's removal found, prefill taking half of decode's; *searched* is the strongest pair "
        "that its two-stage search found within that loss. Reductions of whole runs differ from L / (L - m - s + s r) "
        f"at the mean prompt by at most {100 * off:.1f} %. The paper's 4.95x and 20.56 % are of other models, lengths "
        "and links. POP, which skips layers in prefill that decode runs, is no legal plan: decode would find no KV.\n\n"
        f"The plans:\n\n{plans}"
    )


def _read(results: Path, name: str) -> Mapping[str, Any]:
    path = results / f"{name}.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; make it: python -m sim.cluster_results measure=true only='[{name}]'")
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _values(row: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    found = []
    for value in row:
        for part in key.split("."):
            value = value[part]
        found.append(float(value))  # type: ignore[arg-type]
    return found


def _mean(row: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(_values(row, key))


def _percent(row: Sequence[Mapping[str, Any]]) -> str:
    return f"{100 * _mean(row, 'slo_attainment'):.1f} %"


def _total(rows: Rows, key: str) -> str:
    return f"{sum(sum(_values(row, key)) for row in rows.values()):,.0f}"
