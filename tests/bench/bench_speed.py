"""How fast the simulator is: a table, and as the last line one JSON object.

python tests/bench/bench_speed.py [TRACE [ROUNDS]]

TRACE: a trace that `sim.traces.readers` can read; the default is the Azure conversation trace of RAP_LAB_DATA (CC-BY
    4.0, cite Patel et al., Splitwise, ISCA 2024), and without that folder a made-up one of as many requests.
ROUNDS: every figure is the best of this many; ours and DynoSim's runs alternate. Figures are CPU seconds of one process
    with one thread.

DynoSim (NVIDIA; `pip install ".[bench]"`, or DYNOSIM_PYTHON names an interpreter with ai-dynamo-runtime 1.6.1) runs on
the same requests with the same memory and limits, and its own built-in prices. Without it, its figures are null.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sim.config import one_thread
from sim.cost.latency import load_calibration
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.model_spec import load_model
from sim.cost.plan import Plan, dense_plan, drop, with_mask
from sim.engine.protocol import EngineConfig, EngineState
from sim.engine.scheduler import Limits
from sim.engine.sim_engine import SimEngine
from sim.paths import find_data
from sim.policies.schedule import Schedule
from sim.replay.loop import replay
from sim.traces.readers.azure import read_azure
from sim.traces.readers.native import read_trace
from sim.traces.trace import Trace

KV_BLOCKS, MAX_RUNNING, MAX_BATCH_TOKENS, MAX_CONTEXT_TOKENS = 7300, 128, 2048, 16384
AZURE = Path("traces/azure2023/AzureLLMInferenceTrace_conv.head_before_1900.csv.gz")
MODEL = load_model("llama2_7b")
LATENCY = load_calibration("llama2_7b_a100")
DENSE = dense_plan(MODEL)
PRUNED = with_mask(DENSE, drop(MODEL, mha=[25], ffn=[27]))


@dataclass
class Always:
    """A policy that observes and keeps its plan."""

    first_plan: Plan = DENSE

    def __call__(self, state: EngineState) -> Plan:
        return self.first_plan


@dataclass
class Alternating:
    """A policy that changes the plan at every decision: one layer is dropped and restored."""

    first_plan: Plan = DENSE
    pruned: bool = False

    def __call__(self, state: EngineState) -> Plan:
        self.pruned = not self.pruned
        return PRUNED if self.pruned else DENSE


def engine(keep_iterations: bool = True) -> SimEngine:
    """Return the engine that every measurement uses."""
    return SimEngine(
        model=MODEL,
        latency=LATENCY,
        config=EngineConfig(
            limits=Limits(max_running=MAX_RUNNING, max_batch_tokens=MAX_BATCH_TOKENS),
            max_context_tokens=MAX_CONTEXT_TOKENS,
        ),
        plan=DENSE,
        budget_bytes=budget_for_kv_blocks(MODEL, DENSE, KV_BLOCKS, 0, 16),
        host_to_device_bytes_per_s=25e9,
        keep_iterations=keep_iterations,
    )


def one_run(trace: Trace, policy: Any, tick_s: float | None) -> tuple[float, SimEngine]:
    """Return the CPU seconds of one replay, from building the engine to its records, and the engine."""
    start_s = time.process_time()
    served = engine()
    replay(trace, served, policy, tick_s=tick_s)
    served.records()
    return time.process_time() - start_s, served


def made_up(requests: int, seed: int = 0) -> Trace:
    """Return a trace as loaded as the published one: 5.9 requests/s, about 1,150 tokens in and 210 out."""
    rng = np.random.default_rng(seed)
    return Trace(
        arrival_s=np.cumsum(rng.exponential(1 / 5.9, requests)),
        prompt_tokens=np.clip(rng.lognormal(6.5, 1.0, requests), 1, 8000).astype(np.int64),
        output_tokens=np.clip(rng.lognormal(5.0, 0.8, requests), 1, 1500).astype(np.int64),
    )


def dynosim(trace: Trace) -> Callable[[], float] | None:
    """Return a function that runs DynoSim once on a trace and returns its CPU seconds; None if it is not installed."""
    python = os.environ.get("DYNOSIM_PYTHON", sys.executable)
    program = Path(__file__).with_name("dynosim_once.py")
    if subprocess.run([python, str(program), "--version"], capture_output=True, check=False).returncode:
        return None
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", delete=False) as file:
        for row in zip(
            trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True
        ):
            file.write(json.dumps(row) + "\n")

    def run() -> float:
        done = subprocess.run([python, str(program), file.name], capture_output=True, text=True, check=True)
        return float(json.loads(done.stdout.splitlines()[-1])["cpu_s"])

    return run


START = """
import os, sim.replay.run, sim.replay.__main__
serve = sim.replay.run.replay_with
sim.replay.run.replay_with = lambda *arguments: (serve(*arguments), os._exit(0))
sim.replay.__main__.main()
"""


def start_s(cache: Path) -> tuple[float, float]:
    """Return the seconds, wall and CPU, from starting Python to the end of the first simulated second of a replay."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", START, "trace.duration_s=1", f"hydra.run.dir={cache / 'run'}"]
    begin_s, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    wall_s, after = time.perf_counter() - begin_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def growth(largest: int) -> list[tuple[int, float, float, int]]:
    """Return (requests, CPU seconds, requests a CPU second, peak bytes a request beyond the trace and records)."""
    rows = []
    for power in range(3, int(math.log10(largest)) + 1):
        done = subprocess.run(
            [sys.executable, __file__, "--grow", str(10**power)], capture_output=True, text=True, check=True
        )
        rows.append(tuple(json.loads(done.stdout.splitlines()[-1])))
    return rows


def grow(requests: int) -> None:
    """Replay made-up requests in this process; print a row of `growth`."""
    one_thread()
    warm = engine()
    replay(made_up(10), warm, Always())
    trace = made_up(requests)
    served = engine(keep_iterations=False)
    begin_s, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    replay(trace, served, Always())
    seconds, peak = time.process_time() - begin_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    records = served.records()
    columns = sum(getattr(records, name).nbytes // requests for name in records.__dataclass_fields__)
    known = columns - 3 * 8  # arrival, prompt and output are the trace's, which is there before
    print(json.dumps([requests, seconds, requests / seconds, max(0, int((peak - before) / requests) - known)]))


def main(path: str | None, rounds: int) -> None:
    """Measure everything, print the table, then the JSON line."""
    one_thread()
    azure = find_data(AZURE) if path is None else None
    trace = read_trace(path) if path is not None else read_azure(azure) if azure is not None else made_up(15_606)
    with tempfile.TemporaryDirectory() as folder:
        cold_s, cold_cpu_s = start_s(Path(folder))
        warm_s, warm_cpu_s = min(start_s(Path(folder)) for _ in range(5))
    one_run(trace, Always(), None)
    other = dynosim(trace)
    moments = range(int(trace.duration_s) + 600)
    known = Schedule(tuple(map(float, moments)), tuple(PRUNED if t % 2 else DENSE for t in moments))
    fixed_s = ticks_s = changes_s = known_s = dynosim_s = math.inf
    for _ in range(rounds):
        if other is not None:
            dynosim_s = min(dynosim_s, other())
        for _ in range(5):
            fixed_s = min(fixed_s, (run := one_run(trace, Always(), None))[0])
            ticks_s = min(ticks_s, one_run(trace, Always(), 1.0)[0])
            changes_s = min(changes_s, (changed := one_run(trace, Alternating(), 1.0))[0])
            known_s = min(known_s, one_run(trace, known, 1.0)[0])
    state = run[1].run_until(math.inf)
    ticks = int(state.time_s)
    figures = {
        "requests_per_cpu_s": len(trace) / fixed_s,
        "iterations_per_cpu_s": state.iterations / fixed_s,
        "output_tokens_per_cpu_s": state.produced_tokens / fixed_s,
        "ticks_per_cpu_s": ticks / ticks_s,
        "dynosim_requests_per_cpu_s": len(trace) / dynosim_s if math.isfinite(dynosim_s) else None,
        "ratio_to_dynosim": dynosim_s / fixed_s if math.isfinite(dynosim_s) else None,
        "cold_start_s": cold_s,
        "warm_start_s": warm_s,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(
        f"{trace.source or 'made up'}: {len(trace):,} requests, {state.iterations:,} iterations, {ticks:,} s simulated"
    )
    rows = [
        ("fixed plan", fixed_s, f"{figures['requests_per_cpu_s']:,.0f} requests/s"),
        ("control tick each second", ticks_s, f"{figures['ticks_per_cpu_s']:,.0f} ticks/s"),
        (
            f"plan change each second ({len(changed[1].transitions()):,})",
            known_s,
            f"{known_s / fixed_s:.1f} x the fixed plan's time, {len(trace) / known_s:,.0f} requests/s",
        ),
        (
            "the same, each decided by a policy",
            changes_s,
            f"{changes_s / fixed_s:.1f} x the fixed plan's time, {len(trace) / changes_s:,.0f} requests/s",
        ),
        ("an iteration of the fixed plan", fixed_s / state.iterations, f"{figures['iterations_per_cpu_s']:,.0f} /s"),
    ]
    if figures["ratio_to_dynosim"] is not None:
        rows.append(("DynoSim, the same requests", dynosim_s, f"1/{figures['ratio_to_dynosim']:,.0f} of ours"))
    for name, seconds, text in rows:
        print(f"{name:40} {1e3 * seconds:12.4f} ms CPU   {text}")
    print(
        f"from `python -m sim.replay` to the first simulated second: cold {cold_s:.1f} s ({cold_cpu_s:.1f} s CPU), "
        f"warm {warm_s:.2f} s ({warm_cpu_s:.2f} s CPU)"
    )
    print(f"{'requests':>12} {'CPU s':>10} {'requests/s':>12} {'bytes/request beyond trace and records':>40}")
    for requests, seconds, speed, bytes_ in growth(10_000_000):
        print(f"{requests:12,} {seconds:10.3f} {speed:12,.0f} {bytes_:40,}")
    print(json.dumps(figures))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--grow"]:
        grow(int(sys.argv[2]))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else None, int(sys.argv[2]) if len(sys.argv) > 2 else 5)
