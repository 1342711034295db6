"""``python -m hw.disaggregate_results``: write hw/TRANSFER.md from hw/transfer.json; with ``--run``, measure first.

With ``--run``: a prefill and a decode process of SmolLM2-135M, one thread each, first calibrate their link, on requests
of their own; then they serve one small workload under every plan of ``VARIANTS``, ``--repeats`` times each in random
order, and in between measure their speed beside each other, on other requests again. ``sim.disaggregate`` replays each
beside that, with the committed calibration of the device and the link as measured. It wants two idle cores for some
seven minutes, and says how busy others kept them.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from scipy.optimize import nnls

from hw.disaggregate.run import STAGES, Outcome, Pair, figures
from hw.validate.compare import judged_figure, percent
from hw.validate.machine_speed import slower
from hw.validate.suite import ranking
from sim.config import build, compose_config
from sim.cost.latency import CALIBRATIONS, load_calibration
from sim.cost.plan import describe
from sim.disaggregate.disaggregate import StagedRecords, kv_bytes_sent
from sim.disaggregate.run import build_system, plan_of
from sim.errors import ConfigError
from sim.paths import REPOSITORY
from sim.results.metrics import distribution, merged_iterations
from sim.results.records import Status
from sim.results.run_folder import provenance

RESULT, PAGE = (REPOSITORY / "hw" / name for name in ("transfer.json", "TRANSFER.md"))
CALIBRATION = "smollm2_135m_cpu_epyc_1thread"
COMMON = (
    "trace=small",
    "workload=none",
    "model=smollm2_135m",
    "gpu=cpu_epyc_1thread",
    "engine=small",
    "budget=small",
    "slo=ttft_2s",
    "workspace_bytes=1e8",
    f"latency={CALIBRATION}",
    "trace.on_rate_rps=2.5",
    "trace.off_rate_rps=1.5",
    "trace.mean_on_s=3",
    "trace.mean_off_s=3",
    "trace.duration_s=10",
    "trace.lengths.prompt_tokens_p50=128",
    "trace.lengths.prompt_sigma=0.3",
    "trace.lengths.output_tokens_p50=16",
    "seed=12",
)
LINKS = {"10 MB/s": 1e7, "as it goes": None}
"""Name -> what the sender keeps to, bytes a second; None: whatever the loopback socket carries."""
LONE = (
    "trace.on_rate_rps=0.7",
    "trace.off_rate_rps=0.7",
    "trace.duration_s=15",
    "trace.lengths.prompt_sigma=0.8",
    "trace.lengths.max_output_tokens=2",
    "seed=20",
)
"""How a link is measured: a prompt now and then, of many lengths."""
BUSY = ("seed=22",)
"""How the speed of each process beside the other is measured: the same load, dense, other requests."""
VARIANTS: dict[str, tuple[str, str]] = {
    "dense": ("10 MB/s", "dense"),
    "unified": ("10 MB/s", "unified"),
    "PDTrim blocks": ("10 MB/s", "blocks"),
    "PDTrim KV": ("10 MB/s", "kv"),
    "PDTrim both": ("10 MB/s", "both"),
    "windows": ("10 MB/s", "streaming"),
    "dense, no limit": ("as it goes", "dense"),
    "PDTrim KV, no limit": ("as it goes", "kv"),
}
"""Label -> link, and kind of ``policy=pdtrim``; but for dense the first plan of a kind that sends half of the bytes."""
SHOWN = {
    "way_s.mean": "KV on its way",
    "ttft_s.mean": "TTFT",
    "tpot_s.mean": "TPOT",
    "e2e_s.mean": "E2E",
    "makespan_s": "makespan",
}


CROWDED_CORES = 0.2
CROWDED = (
    "**The machine was not idle: of what follows the bytes hold, the times do not.** They say as much of the other "
    "programs as of this one; measured on two idle cores, `python -m hw.disaggregate_results --run` replaces them."
)


def configuration(name: str, words: Sequence[str]) -> DictConfig:
    """Return the configuration of a command."""
    return compose_config(name, [*COMMON, *words])


def policy_words(kind: str) -> tuple[str, ...]:
    """Return the words that choose the plan of a kind."""
    if kind == "dense":
        return ("policy=dense",)
    return ("policy=pdtrim", f"policy.kind={kind}", "policy.most_perplexity=null", "policy.most_sent=0.5")


# --- Measured --------------------------------------------------------------------------------------------------------


def run(pair: Pair, words: Sequence[str], link: str) -> tuple[Outcome, DictConfig]:
    """Serve one configuration for real.

    Raises:
        KeyboardInterrupt: when that was interrupted.
        ConfigError: when it failed.
    """
    rate = LINKS[link]
    cfg = configuration("hw_disaggregate", [*words, f"link_bytes_per_s={'null' if rate is None else rate}"])
    outcome = pair.serve(cfg)
    if outcome.interrupted:
        raise KeyboardInterrupt
    if outcome.failure is not None:
        raise ConfigError(f"{outcome.failure}; nothing was written")
    return outcome, cfg


def fit_link(records: StagedRecords) -> dict[str, Any]:
    """Return bandwidth and latency of a link, from transfers that had it for themselves.

    A transfer counts from the first token, when its KV is offered, to the moment at which it lies in the other pool:
    asking for room, gathering, sending and putting it there are the link's latency. Neither is taken to be below 0.
    """
    begun_s, ended_s, size = records.first_token_s, records.sent_s, records.sent_bytes.astype(np.float64)
    shipped = np.flatnonzero(np.isfinite(ended_s))
    alone = [i for i in shipped if all(i == j or ended_s[j] <= begun_s[i] or begun_s[j] >= ended_s[i] for j in shipped)]
    if len(alone) < 4:
        raise ConfigError(
            f"only {len(alone)} transfers had the link for themselves, and a fit needs 4; is the machine idle?"
        )
    taken_s = (ended_s - begun_s)[alone]
    (latency_s, byte_s), _ = nnls(np.stack([np.ones(len(alone)), size[alone]], axis=1), taken_s)
    off = np.abs(latency_s + byte_s * size[alone] - taken_s)
    return {
        "transfers": len(alone),
        "bytes_per_s": float(1 / byte_s) if byte_s > 0 else MOST_BYTES_PER_S,
        "latency_s": float(latency_s),
        "median_error_s": float(np.median(off)),
    }


MOST_BYTES_PER_S = 1e12
"""For a link whose transfers took no longer the more they carried: as good as none."""


def slowdown(outcome: Outcome) -> dict[str, float]:
    """Return, for each side, how many times its iterations took what the committed calibration says."""
    latency, found = load_calibration(CALIBRATION), {}
    for stage, log in outcome.logs.items():
        taken_s = float((log.iterations.end_s - log.iterations.start_s).sum())
        priced_s = sum(
            latency.iteration_s(s.plan, s.chunks, s.decode_batch, s.decode_context_sum, s.sequences) for s in log.shapes
        )
        found[stage] = taken_s / priced_s
    return found


def read_figures(records: StagedRecords, makespan_s: float) -> dict[str, Any]:
    """Return what one run, real or simulated, is compared by."""
    return {
        "finished": int((records.status == Status.FINISHED).sum()),
        "preemptions": int(records.preemptions.sum()),
        "sent_bytes": int(records.sent_bytes.sum()),
        "way_s": distribution(records.sent_s - records.first_token_s),
        "ttft_s": distribution(records.ttft_s),
        "tpot_s": distribution(records.tpot_s),
        "e2e_s": distribution(records.e2e_s),
        "makespan_s": makespan_s,
    }


def as_planned(records: StagedRecords, cfg: DictConfig) -> bool:
    """Return whether every request sent exactly the bytes that the plan says, and those of one token none."""
    model, plan = build(cfg.model), plan_of(cfg)
    told = [kv_bytes_sent(model, plan, int(prompt)) for prompt in records.prompt_tokens]
    return bool((records.sent_bytes == np.where(records.output_tokens > 1, told, 0)).all())


@contextmanager
def others(pair: Pair) -> Iterator[list[float]]:
    """Put into the list how many cores other programs kept busy on average meanwhile; nothing where that is unknown."""
    found: list[float] = []
    before = _processor_s(pair)
    yield found
    after = _processor_s(pair)
    if before is not None and after is not None:
        (busy_s, ours_s, at_s), (busy_before_s, ours_before_s, began_s) = after, before
        found.append(max(0.0, busy_s - busy_before_s - (ours_s - ours_before_s)) / (at_s - began_s))


def _processor_s(pair: Pair) -> tuple[float, float, float] | None:
    """Return the processor seconds of all programs, those of this process and its two, and the time."""
    ticks = os.sysconf("SC_CLK_TCK")
    try:
        columns = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        all_s = sum(int(columns[i]) for i in (0, 1, 2, 5, 6, 7)) / ticks  # idle and waiting for disks left out
        pids = [os.getpid(), *(process.pid for process in pair.processes.values())]
        rows = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    except OSError:
        return None
    return all_s, sum(int(row[11]) + int(row[12]) for row in rows) / ticks, time.monotonic()


# --- Simulated -------------------------------------------------------------------------------------------------------


def simulate(words: Sequence[str], link: Mapping[str, Any], times: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Return the figures of the simulated run of a configuration.

    Args:
        link: its ``bytes_per_s`` and ``latency_s``. times: stage -> by what all prices are multiplied.
    """
    told = ["prefill_replicas=1", "decode_replicas=1", f"link_bytes_per_s={link['bytes_per_s']}"]
    cfg = configuration("disaggregate", [*words, *told, f"link_latency_s={link['latency_s']}"])
    content = json.loads((CALIBRATIONS / f"{CALIBRATION}.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="rap-lab-transfer-") as folder:
        sides = [cfg.copy(), cfg.copy()]
        for side, (stage, factor) in zip(sides, (times or {}).items(), strict=False):
            path = Path(folder) / f"{stage}.json"
            path.write_text(json.dumps(slower(content, factor)), encoding="utf-8")
            side.latency = str(path)
        system = build_system(*sides)
    system.run()
    engines = [side.engine for side in (*system.prefill, *system.decode)]
    iterations = merged_iterations([engine.iterations() for engine in engines])
    records = system.records()
    return read_figures(records, float(iterations.end_s[-1] - records.arrival_s[0]))


def measure(repeats: int) -> dict[str, Any]:
    """Calibrate, run every variant, simulate it; return what hw/transfer.json holds."""
    load = os.getloadavg()[0]
    with Pair() as pair:
        links = {}
        for link in LINKS:
            outcome, _ = run(pair, [*policy_words("dense"), *LONE], link)
            links[link] = fit_link(outcome.records)
            print(f"link {link}: {links[link]}", flush=True)
        busy, speeds, difference_bytes = [], [], 0
        real: dict[str, list[dict[str, Any]]] = {label: [] for label in VARIANTS}
        header_bytes: dict[str, int] = {}
        for repeat in range(repeats + 1):
            # The speed of the machine moves: it is measured before, between and after what is reported.
            speeds.append(slowdown(run(pair, [*policy_words("dense"), *BUSY], "10 MB/s")[0]))
            print(f"beside each other iterations take so many times what they are priced at: {speeds[-1]}", flush=True)
            labels = list(VARIANTS) if repeat < repeats else []
            random.Random(repeat).shuffle(labels)  # so that a busy spell of the machine does not meet one plan alone
            for label in labels:
                link, kind = VARIANTS[label]
                with others(pair) as cores:
                    outcome, cfg = run(pair, policy_words(kind), link)
                busy += cores
                row = read_figures(outcome.records, figures(cfg, outcome)["makespan_s"])
                real[label].append({**row, "as_planned": as_planned(outcome.records, cfg)})
                header_bytes[label] = sum(log.header_bytes for log in outcome.logs.values())
                difference_bytes = max(difference_bytes, *(log.difference_bytes for log in outcome.logs.values()))
                print(f"repeat {repeat}, {label}: others kept {cores} cores busy", flush=True)
    times = {stage: float(np.median([speed[stage] for speed in speeds])) for stage in STAGES}
    variants = {}
    for label, (link, kind) in VARIANTS.items():
        words = policy_words(kind)
        variants[label] = {
            "link": link,
            "words": list(words),
            "plan": describe(plan_of(configuration("disaggregate", words))),
            "header_bytes": header_bytes[label],
            "real": real[label],
            "simulated": simulate(words, links[link]),
            "at_speed": simulate(words, links[link], times),
        }
    return {
        "provenance": provenance(12),
        "calibration": CALIBRATION,
        "repeats": repeats,
        "words": {"common": list(COMMON), "lone": list(LONE), "busy": list(BUSY)},
        "load_before": load,
        "others_busy_cores": busy,
        "links": links,
        "times": times,
        "speeds": speeds,
        "difference_bytes": difference_bytes,
        "variants": variants,
    }


# --- The page --------------------------------------------------------------------------------------------------------


def of(row: Mapping[str, Any], name: str) -> float | None:
    """Return the figure of a dotted name."""
    value: Any = row
    for part in name.split("."):
        value = value[part]
    return None if value is None else float(value)


def compared(variant: Mapping[str, Any], which: str) -> dict[str, dict[str, Any]]:
    """Return the figures of a simulation beside those of the real runs."""
    real = variant["real"]
    return {name: judged_figure(of(variant[which], name), [of(row, name) for row in real], None) for name in SHOWN}


def page(content: Mapping[str, Any]) -> str:
    """Return the page, in Markdown."""
    made, variants, repeats = content["provenance"], content["variants"], content["repeats"]
    commit = made["commit"][:12] + ("-dirty" if made["commit"].endswith("dirty") else "")
    busy = content["others_busy_cores"]
    cores = f"{np.median(busy):.2f} cores in the median run, {max(busy):.2f} at most" if busy else "unknown"
    times = ", ".join(
        f"{stage} {factor:.2f} ({min(each):.2f} to {max(each):.2f})"
        for stage, factor in content["times"].items()
        for each in [[speed[stage] for speed in content["speeds"]]]
    )
    parts = [
        "# Prefill and decode of the real model in two processes",
        f"Made by `python -m hw.disaggregate_results` from `hw/transfer.json`, which `--run` measures. SmolLM2-135M in "
        f"bfloat16, a prefill and a decode process of one thread each on {made['machine']}; {made['written_at'][:10]}, "
        f"commit {commit}. The KV of every prompt is gathered from one paged pool, sent over a loopback TCP socket and "
        f"put into the other; the sender keeps to 10 MB/s where that is said, which is as slow beside this prefill as "
        f"25 Gbit/s is beside an A100 with Llama-2-7B. Times are those of one clock that both processes read "
        f"(CLOCK_MONOTONIC), {'of one run each' if repeats == 1 else f'the medians of {repeats} repeats'}, in random "
        f"order; **noise** is the farthest repeat from the median (- for a single run). **Other programs kept busy "
        f"meanwhile: {cores}**; the load before was {content['load_before']:.2f}.",
        CROWDED if busy and np.median(busy) > CROWDED_CORES else "",
        "## Bytes",
        _bytes_table(variants, content["difference_bytes"]),
        "## Times, as the simulator is",
        "`sim.disaggregate` with the committed calibration of one such process alone on the machine "
        f"(`{content['calibration']}`) and the link as it was measured below. Real, error of the simulator / noise. "
        "KV on its way: from the first token until the KV lies in the other pool, waiting for room included.",
        _times_table(variants, "simulated"),
        "## Times, at the speed of two processes beside each other",
        "The same with the prices of each side times one number: how many times its iterations took what they are "
        "priced at in runs of other requests, dense, before, between and after the repeats, their median (and range): "
        f"{times}.",
        _times_table(variants, "at_speed"),
        _errors(variants),
        "## The links, as calibrated",
        _links_table(content["links"]),
        "On prompts that had the link for themselves, of other requests than those reported: from the first token "
        "until the KV lies in the other pool, the best bandwidth and latency, neither below 0. Latency is asking for "
        "room, gathering, waking threads and writing into the pool.",
        "## What was found",
        _findings(variants),
        "## Words",
        f"`python -m hw.disaggregate {' '.join(content['words']['common'])}` and `link_bytes_per_s=1e7` or `null`, "
        "and, but for dense, `policy=pdtrim policy.most_perplexity=null policy.most_sent=0.5 policy.kind=...`. The "
        f"links: `{' '.join(content['words']['lone'])}`; the speeds: `{' '.join(content['words']['busy'])}`, dense.",
        "\n".join(f"- {label}: {variant['plan']}" for label, variant in variants.items()),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _bytes_table(variants: Mapping[str, Any], difference_bytes: int) -> str:
    dense = variants["dense"]["real"][0]["sent_bytes"]
    lines = [
        "| variant | KV sent, bytes | as the plan says | less than dense | beside the KV | finished | preemptions |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for label, variant in variants.items():
        real, simulated = variant["real"], variant["simulated"]
        sent = real[0]["sent_bytes"]
        same = all(row["as_planned"] and row["sent_bytes"] == simulated["sent_bytes"] for row in real)
        counts = [", ".join(sorted({str(row[name]) for row in real})) for name in ("finished", "preemptions")]
        lines.append(
            f"| {label} | {sent:,} | {'equal' if same else '**differs**'} | {dense / sent:.2f}x | "
            f"{percent(variant['header_bytes'] / sent)} | {counts[0]} | {counts[1]} |"
        )
    return (
        "\n".join(lines) + "\n\nAs the plan says: every request of every repeat sent the bytes of "
        "`sim.disaggregate.disaggregate.kv_bytes_sent`, and all together those of the simulated run. Beside the KV: headers, offers "
        "with the prompt's token ids, and answers. Weights and KV pools differ from the memory model by at most "
        f"{difference_bytes:,} bytes."
    )


def _times_table(variants: Mapping[str, Any], which: str) -> str:
    lines = ["| variant | " + " | ".join(SHOWN.values()) + " |", "|---|" + "---:|" * len(SHOWN)]
    for label, variant in variants.items():
        cells = [
            f"{_time(figure['real'])}, {_signed(figure['error'])} / {percent(figure['noise'])}"
            for figure in compared(variant, which).values()
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _time(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f} %"


def _errors(variants: Mapping[str, Any]) -> str:
    found = []
    for name, shown in SHOWN.items():
        pairs = [[compared(v, which)[name]["error"] for v in variants.values()] for which in ("simulated", "at_speed")]
        before, after = (float(np.median(np.abs([e for e in errors if e is not None]))) for errors in pairs)
        found.append(f"{shown} {percent(before)} and {percent(after)}")
    return f"Median absolute error over the variants, as the simulator is and at that speed: {'; '.join(found)}."


def _links_table(links: Mapping[str, Any]) -> str:
    lines = ["| link | transfers | bandwidth, MB/s | latency, ms | median error, ms |", "|---|---:|---:|---:|---:|"]
    for name, link in links.items():
        rate = f"{1e-6 * link['bytes_per_s']:,.1f}" if link["bytes_per_s"] < MOST_BYTES_PER_S else "not to be told"
        lines.append(
            f"| {name} | {link['transfers']} | {rate} | {1e3 * link['latency_s']:.1f} | "
            f"{1e3 * link['median_error_s']:.1f} |"
        )
    return "\n".join(lines)


def _findings(variants: Mapping[str, Any]) -> str:
    limited = {label: variant for label, variant in variants.items() if variant["link"] == "10 MB/s"}
    real = {
        label: {name: judged_figure(0.0, [of(row, name) for row in v["real"]], None)["real"] for name in SHOWN}
        for label, v in limited.items()
    }
    dense = real.pop("dense")
    gains = "; ".join(
        f"{label} {' and '.join(f'{dense[name] / row[name]:.2f}' for name in ('way_s.mean', 'e2e_s.mean'))}"
        for label, row in real.items()
    )
    lines = [f"- Over 10 MB/s, times that dense needs for the KV's way, and for E2E: {gains}."]
    repeated = all(len(variant["real"]) > 1 for variant in variants.values())  # else nobody knows the noise
    for which, said in (("simulated", "As it is"), ("at_speed", "At the speed of two processes")) if repeated else ():
        told = ranking({"all": {label: {"figures": compared(v, which)} for label, v in limited.items()}})["all"]
        agreed = ", ".join(
            f"{name.removesuffix('_s.mean').upper()} {row['agreed']} of {row['pairs_beyond_noise']} (regret "
            f"{percent(row['regret'])})"
            for name, row in told.items()
        )
        lines.append(
            f"- {said}, the simulator orders pairs of these plans as the real runs do, of those that differ by more "
            f"than their noise: {agreed}. Regret: how much worse its best plan is for real than the best there is."
        )
    ways = ", ".join(
        f"{label} {_time(compared(v, 'simulated')['way_s.mean']['real'])}"
        for label, v in variants.items()
        if v["link"] != "10 MB/s"
    )
    lines.append(f"- Without a limit the KV of a prompt is on its way for: {ways}.")
    return "\n".join(lines)
