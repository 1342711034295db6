"""Real transfers of KV against simulated ones: what ``python -m hw.disaggregate_results measure=true`` measures.

A prefill and a decode process of SmolLM2-135M, one thread each, first calibrate their link on separate requests. They
then serve one small workload under every plan of ``VARIANTS``, ``repeats`` times in random order. Between repeats,
other requests measure how fast the two processes run next to each other. ``sim.disaggregate`` replays each variant with
the committed calibration of the device and the measured link. This needs two idle cores for about seven minutes; it
records how much other programs used them.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from scipy.optimize import nnls

from hw.calibrate.calibration import slower
from hw.disaggregate.pair import Outcome, Pair
from hw.disaggregate.processes import STAGES
from hw.disaggregate.run import figures
from sim.config import CONF_DIR, build
from sim.cost.kv_format import stored_kv_bytes
from sim.cost.latency import CALIBRATIONS, load_calibration
from sim.cost.plan import describe
from sim.disaggregate.disaggregate import StagedRecords
from sim.disaggregate.run import build_system, plan_of
from sim.errors import ConfigError
from sim.progress import progress
from sim.results.metrics import distribution, merged_iterations
from sim.results.records import Status
from sim.results.run_folder import provenance

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
"""Name -> the sender's limit in bytes per second; None: whatever the loopback socket carries."""
LONE = (
    "trace.on_rate_rps=0.7",
    "trace.off_rate_rps=0.7",
    "trace.duration_s=15",
    "trace.lengths.prompt_sigma=0.8",
    "trace.lengths.max_output_tokens=2",
    "seed=20",
)
"""How a link is measured: separate prompts of many lengths."""
BUSY = ("seed=22",)
"""How the speed of each process next to the other is measured: the same load, dense, other requests."""
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
"""Label -> link, kind of ``policy=pdtrim``: the first plan of that kind that sends half of the bytes, or dense."""


def configuration(name: str, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of a command."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return hydra.compose(name, overrides=[*COMMON, *overrides])


def policy_overrides(kind: str) -> tuple[str, ...]:
    """Return the overrides that choose the plan of a kind."""
    if kind == "dense":
        return ("policy=dense",)
    return ("policy=pdtrim", f"policy.kind={kind}", "policy.most_perplexity=null", "policy.most_sent=0.5")


# --- Measured --------------------------------------------------------------------------------------------------------


def run(pair: Pair, overrides: Sequence[str], link: str) -> tuple[Outcome, DictConfig]:
    """Serve one configuration on the two processes.

    Raises:
        KeyboardInterrupt: if the run was interrupted.
        ConfigError: if it failed.
    """
    rate = LINKS[link]
    cfg = configuration("hw_disaggregate", [*overrides, f"link_bytes_per_s={'null' if rate is None else rate}"])
    outcome = pair.serve(cfg)
    if outcome.interrupted:
        raise KeyboardInterrupt
    if outcome.failure is not None:
        raise ConfigError(f"{outcome.failure}; nothing was written")
    return outcome, cfg


def fit_link(records: StagedRecords) -> dict[str, Any]:
    """Return bandwidth and latency of a link, fitted on transfers that shared it with no other.

    A transfer lasts from the first token, when its KV is offered, until the KV is in the other pool. The time to
    request room, gather, send and write it counts as the link's latency. Both values are at least 0.

    Raises:
        ConfigError: if fewer than four transfers had the link alone.
    """
    begun_s, ended_s, size = records.first_token_s, records.sent_s, records.sent_bytes.astype(np.float64)
    shipped = np.flatnonzero(np.isfinite(ended_s))
    alone = [i for i in shipped if all(i == j or ended_s[j] <= begun_s[i] or begun_s[j] >= ended_s[i] for j in shipped)]
    if len(alone) < 4:
        raise ConfigError(
            f"only {len(alone)} transfers had the link alone, and a fit needs at least 4; is the machine idle?"
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
"""Bandwidth of a link whose larger transfers took no longer than small ones: practically no limit."""


def slowdown(outcome: Outcome) -> dict[str, float]:
    """Return, for each side, its iteration time over what the committed calibration predicts."""
    latency, found = load_calibration(CALIBRATION), {}
    for stage, log in outcome.logs.items():
        taken_s = float((log.iterations.end_s - log.iterations.start_s).sum())
        priced_s = sum(
            latency.iteration_s(s.plan, s.chunks, s.decode_batch, s.decode_context_sum, s.sequences) for s in log.shapes
        )
        found[stage] = taken_s / priced_s
    return found


def read_figures(records: StagedRecords, makespan_s: float) -> dict[str, Any]:
    """Return the figures by which runs are compared, real or simulated."""
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
    """Return whether every request sent exactly the bytes that its plan implies; one-token answers send none."""
    model, plan = build(cfg.model), plan_of(cfg)
    planned = [stored_kv_bytes(model, plan, int(prompt)) for prompt in records.prompt_tokens]
    return bool((records.sent_bytes == np.where(records.output_tokens > 1, planned, 0)).all())


@contextmanager
def others(pair: Pair) -> Iterator[list[float]]:
    """Append the number of cores that other programs kept busy on average; append nothing if it is unknown."""
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


def simulate(
    overrides: Sequence[str], link: Mapping[str, Any], times: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Return the figures of the simulated run of a configuration.

    Args:
        overrides: of the configuration, after ``COMMON``.
        link: its ``bytes_per_s`` and ``latency_s``. times: stage -> factor on all its latencies.
    """
    system_of = ["prefill_replicas=1", "decode_replicas=1", f"link_bytes_per_s={link['bytes_per_s']}"]
    cfg = configuration("disaggregate", [*overrides, *system_of, f"link_latency_s={link['latency_s']}"])
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
    """Calibrate the links, run and simulate every variant; return the content of transfer.json."""
    load = os.getloadavg()[0]
    served, runs = itertools.count(1), len(LINKS) + repeats * len(VARIANTS) + repeats + 1
    with Pair() as pair, progress("serving", runs, "runs") as report:
        links = {}
        for link in LINKS:
            outcome, _ = run(pair, [*policy_overrides("dense"), *LONE], link)
            report(next(served))
            links[link] = fit_link(outcome.records)
            print(f"link {link}: {links[link]}", flush=True)
        busy, speeds, difference_bytes = [], [], 0
        real: dict[str, list[dict[str, Any]]] = {label: [] for label in VARIANTS}
        header_bytes: dict[str, int] = {}
        for repeat in range(repeats + 1):
            # The machine's speed drifts, so it is measured before, between and after the reported runs.
            speeds.append(slowdown(run(pair, [*policy_overrides("dense"), *BUSY], "10 MB/s")[0]))
            report(next(served))
            print(f"iteration time over its prediction, both processes busy: {speeds[-1]}", flush=True)
            labels = list(VARIANTS) if repeat < repeats else []
            random.Random(repeat).shuffle(labels)  # spreads busy spells of the machine over the plans
            for label in labels:
                link, kind = VARIANTS[label]
                with others(pair) as cores:
                    outcome, cfg = run(pair, policy_overrides(kind), link)
                report(next(served))
                busy += cores
                row = read_figures(outcome.records, figures(cfg, outcome)["makespan_s"])
                real[label].append({**row, "as_planned": as_planned(outcome.records, cfg)})
                header_bytes[label] = sum(log.header_bytes for log in outcome.logs.values())
                difference_bytes = max(difference_bytes, *(log.difference_bytes for log in outcome.logs.values()))
                print(f"repeat {repeat}, {label}: others kept {cores} cores busy", flush=True)
    times = {stage: float(np.median([speed[stage] for speed in speeds])) for stage in STAGES}
    variants = {}
    for label, (link, kind) in VARIANTS.items():
        overrides = policy_overrides(kind)
        variants[label] = {
            "link": link,
            "words": list(overrides),
            "plan": describe(plan_of(configuration("disaggregate", overrides))),
            "header_bytes": header_bytes[label],
            "real": real[label],
            "simulated": simulate(overrides, links[link]),
            "at_speed": simulate(overrides, links[link], times),
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
