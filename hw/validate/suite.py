"""The validation suite: every workload under every policy, in simulation and on the real model of this machine.

Real runs are repeated, in random order. Run folders are kept as sim.replay and hw.replay write them, and a run that
already has its folder is skipped. Reference runs in between measure the machine's speed
(``hw.validate.machine_speed``).
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from scipy.stats import kendalltau

from hw.calibrate.calibration import calibration_content, slower
from hw.elastic.model import ElasticModel
from hw.engine.clock import RealClock
from hw.engine.hw_engine import HwEngine
from hw.engine.prompts import read_prompts
from hw.replay.run import load_elastic, write_hardware
from hw.validate.compare import Run, compare, read_run
from hw.validate.machine_speed import RUNS_BETWEEN, MachineFactors, MachineSpeed, machine_factors, without_passes
from hw.validate.suite_page import AT_SPEED
from sim.config import CONF_DIR, build, compose_config
from sim.cost.latency import LatencyModel, copy_speed, load_calibration
from sim.errors import ConfigError, nearest
from sim.paths import REPOSITORY, RESULTS
from sim.policies import Policy
from sim.progress import progress
from sim.replay.run import (
    RecordingEngine,
    build_engine,
    build_parts,
    build_trace,
    figures,
    replay_with,
    server_spec,
    write_tables,
)
from sim.results.run_folder import provenance, write_json, write_text

RESULT, PAGE, PLOT = (RESULTS / "validation" / name for name in ("validation.json", "index.md", "validation.png"))
CALIBRATION = "smollm2_135m_cpu_epyc_1thread"
TICK = "tick_s=0.5"

# Shares of the 8e9 bytes of cpu_epyc_1thread: 0.0505 holds dense weights, workspace and 94 KV blocks; 0.0468 only 14.
WORKLOADS: dict[str, tuple[str, ...]] = {
    "quiet": ("trace.on_rate_rps=0.9", "trace.off_rate_rps=0.9", "trace.duration_s=10"),
    "burst": ("trace.on_rate_rps=7", "trace.off_rate_rps=0.4", "trace.mean_on_s=1", "trace.mean_off_s=2"),
    "long_prompts": ("trace.lengths.prompt_tokens_p50=200", "trace.lengths.output_tokens_p50=6"),
    "kv_bound": ("budget=kv_blocks", "budget.blocks=20", "trace.lengths.output_tokens_p50=16"),
    "budget_shrinks": ("budget=steps", "budget.rows=[[0,0.0505],[2,0.0468],[5,0.0505]]"),
    "budget_walks": (
        "budget=random_walk",
        "budget.low_share=0.0466",
        "budget.high_share=0.0505",
        "budget.step_share=0.001",
        "budget.period_s=1",
        "budget.horizon_s=10",
    ),
}
COMMON = (
    "trace=small",
    "trace.duration_s=6",
    "trace.on_rate_rps=1.8",
    "trace.off_rate_rps=1.8",
    "trace.lengths.prompt_tokens_p50=56",
    "trace.lengths.output_tokens_p50=10",
    "seed=12",
    TICK,
)


def policies() -> dict[str, tuple[str, ...]]:
    """Return the overrides of each policy; greedy stop follows the order that was measured on the served model."""
    measured = json.loads((CONF_DIR / "score" / "smollm2_135m_gsi.json").read_text(encoding="utf-8"))
    order = ",".join(measured["order"][:20])
    return {
        "dense": ("policy=dense",),
        "greedy_stop": (
            "policy=greedy_stop",
            f"policy.order=[{order}]",
            "policy.made_for=smollm2_135m",
            "policy.headroom=1.5",
            "policy.restore_headroom=1.8",
            "policy.patience=2",
        ),
        "morphserve": ("policy=morphserve", "policy.mode=accuracy"),
        "learned_prune": ("policy=learned_prune",),
        # Changes that come whatever the load is: blocks out and in, 8 bits and back.
        "schedule": (
            "policy=schedule",
            "policy.steps=[{at_s:0},{at_s:1.5,drop_mha:[18,7,6],drop_ffn:[17]},{at_s:3,drop_ffn:[17,25],weight_bits:8},"
            "{at_s:4.5},{at_s:6,drop_mha:[18,7,6,8],weight_bits:8},{at_s:7.5}]",
        ),
    }


@dataclass(kw_only=True)
class ValidateConfig:
    """What to run and to judge.

    runs: the folder of run folders. repeats: real runs of each cell. clock: cpu or wall, as in hw.replay.
    latency: a file of conf/calibration by name, or a path. only: workloads to run; all when empty.
    page: also (run what is missing, judge, write the page), judge (run nothing), or only (write the page again).
    """

    runs: str = str(REPOSITORY / "runs" / "validation")
    repeats: int = 3
    clock: str = "cpu"
    latency: str = CALIBRATION
    only: list[str] = field(default_factory=list)
    page: str = "also"


ConfigStore.instance().store(name="hw_validate_schema", node=ValidateConfig)
PAGES = ("also", "judge", "only")
PRECISIONS = (16, 8)
"""Bits of the weights in the plans of the suite, at which the reference runs measure the machine's speed."""


def configuration(workload: str, policy: str, settings: ValidateConfig) -> DictConfig:
    """Return the configuration of one run, which sim.replay and hw.replay share."""
    overrides = [*COMMON, *WORKLOADS[workload], *policies()[policy], f"latency={settings.latency}"]
    overrides += [f"hw.clock={settings.clock}", "hw.skip_idle=true", "hw.device=cpu"]
    return compose_config("hw_replay", overrides)


class Hardware:
    """The real model, loaded once for all runs of the suite."""

    def __init__(self, cfg: DictConfig) -> None:
        """Load what the configuration names."""
        self._elastic, self._tokenizer = load_elastic(build(cfg.model), cfg.hw)
        self._prompts = read_prompts(cfg.hw.text, self._tokenizer, self._elastic.spec.vocab_size, cfg.seed)

    @property
    def elastic(self) -> ElasticModel:
        """The model."""
        return self._elastic

    def engine(self, cfg: DictConfig) -> tuple[HwEngine, Policy]:
        """Return a new engine over the loaded model, and the policy of the configuration."""
        parts = build_parts(cfg)
        engine = HwEngine(
            elastic=self._elastic,
            config=parts.config,
            plan=parts.policy.first_plan,
            budget_bytes=parts.budget,
            workspace_bytes=int(cfg.workspace_bytes),
            prompts=self._prompts,
            clock=RealClock(cfg.hw.clock, skip_idle=cfg.hw.skip_idle),
            attention=cfg.hw.attention,
            cuda_graphs=bool(cfg.hw.cuda_graphs),
        )
        return engine, parts.policy


def serve(folder: Path, cfg: DictConfig, engine: RecordingEngine, policy: Policy) -> None:
    """Replay one configuration and write its run folder."""
    trace, slo = build_trace(cfg), build(cfg.slo)
    replay_with(cfg, trace, engine, policy)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_tables(folder, slo, engine.records(), engine.transitions(), engine.kept_share(), engine.iterations())
    if isinstance(engine, HwEngine):
        write_hardware(folder, engine, cfg)
        engine.close()
    write_json(folder / "summary.json", figures(engine, slo))  # last: a folder with a summary is complete


def run_suite(settings: ValidateConfig, console: Console) -> dict[str, Any]:
    """Run what is missing, compare, and return the content of the results file.

    Raises:
        ConfigError: for an unknown workload, or a cell without a real run.
    """
    workloads = settings.only or list(WORKLOADS)
    for name in workloads:
        if name not in WORKLOADS:
            raise ConfigError(f"there is no workload {name!r}; {nearest(name, WORKLOADS)}")
    if settings.repeats < 1:
        raise ConfigError(f"repeats is {settings.repeats}; it must be at least 1")
    base, latency = Path(settings.runs), load_calibration(settings.latency)
    cells = [(workload, policy) for workload in workloads for policy in policies()]
    speed = MachineSpeed(base)
    if settings.page != "judge":
        run_missing(cells, settings, speed, latency, console)
    spec = server_spec(configuration(*cells[0], settings)).model
    machine = machine_factors(speed.references, calibration_content(settings.latency), spec)
    results = judge_cells(cells, settings, machine)
    return {
        "provenance": provenance(12),
        "device": latency.device,
        "copying": asdict(copy_speed(latency, build(configuration(*cells[0], settings).gpu))),
        "calibration": settings.latency,
        "machine_speed": {
            "factor": machine.slowdown,
            "factors": machine.pairs(),
            "references": [without_passes(one) for one in speed.references],
        },
        "clock": settings.clock,
        "repeats": sorted({len(result["real"]) for by in results.values() for result in by.values()}),
        "words": {
            "common": list(COMMON),
            "workloads": {name: list(WORKLOADS[name]) for name in workloads},
            "policies": {name: list(overrides) for name, overrides in policies().items()},
        },
        "results": results,
        "ranking": ranking(results),
    }


def run_missing(
    cells: Sequence[tuple[str, str]],
    settings: ValidateConfig,
    speed: MachineSpeed,
    latency: LatencyModel,
    console: Console,
) -> None:
    """Serve every cell (workload, policy) for real, ``repeats`` times; keep run folders that exist."""
    base = Path(settings.runs)
    todo = []
    for repeat in range(settings.repeats):
        jobs = [(*cell, repeat) for cell in cells]
        random.Random(repeat).shuffle(jobs)  # so that a busy spell of the machine does not hit one workload only
        todo += [job for job in jobs if not (base / job[0] / job[1] / f"hw{job[2]}" / "summary.json").is_file()]
    loaded: Hardware | None = None
    with progress("serving", len(todo), "runs") as report:
        for number, (workload, policy, repeat) in enumerate(todo, start=1):
            cfg = configuration(workload, policy, settings)
            loaded = loaded or Hardware(cfg)
            if number % RUNS_BETWEEN == 1:
                speed.measure(loaded.elastic, settings.clock, latency, precisions=PRECISIONS)
            serve(base / workload / policy / f"hw{repeat}", cfg, *loaded.engine(cfg))
            console.print(f"{number} of {len(todo)}: {workload}, {policy}, repeat {repeat}", highlight=False)
            report(number)


def judge_cells(
    cells: Sequence[tuple[str, str]], settings: ValidateConfig, machine: MachineFactors
) -> dict[str, dict[str, Any]]:
    """Simulate every cell at the measured speed of the machine; return workload -> policy -> comparison.

    Raises:
        ConfigError: for a cell without a real run.
    """
    base = Path(settings.runs)
    at_its_speed = replace(settings, latency=str(base / "calibration.json"))
    content = slower(machine.over(calibration_content(settings.latency)), machine.slowdown)
    write_json(Path(at_its_speed.latency), content)
    results: dict[str, dict[str, Any]] = {}
    for workload, policy in cells:
        folder = base / workload / policy
        cfg = configuration(workload, policy, at_its_speed)
        serve(folder / "sim", cfg, *build_engine(cfg))
        done = [folder / f"hw{repeat}" for repeat in range(settings.repeats)]
        real = [read_run(path) for path in done if (path / "summary.json").is_file()]
        if not real:
            raise ConfigError(f"there is no real run of {workload} under {policy} in {folder}; run without page=judge")
        result = judged(read_run(folder / "sim"), real, base)
        result["at_the_speed_of_the_run"] = at_speed(cfg, real)
        results.setdefault(workload, {})[policy] = result
    return results


def judged(simulated: Run, real: Sequence[Run], base: Path) -> dict[str, Any]:
    """Return a comparison whose folders are named relative to the folder of the suite."""
    result = compare(simulated, real)
    result["simulated"] = simulated.folder.relative_to(base).as_posix()
    result["real"] = [run.folder.relative_to(base).as_posix() for run in real]
    return result


def at_speed(cfg: DictConfig, real: Sequence[Run]) -> dict[str, Any]:
    """Return errors with the machine's speed removed: the part of each error that is not a common factor of all prices.

    A shared machine is faster in one run and slower in the next. For each repeat, all prices are multiplied by the
    number that makes the mean TPOT agree; the other figures of that simulation are then compared with that repeat.
    """
    content = calibration_content(cfg.latency)
    slo, trace = build(cfg.slo), build_trace(cfg)
    errors: dict[str, list[float]] = {}
    factors = []
    with tempfile.TemporaryDirectory(prefix="rap-lab-validate-") as folder:
        scaled = Path(folder) / "scaled.json"

        def simulate(factor: float) -> dict[str, Any]:
            scaled.write_text(json.dumps(slower(content, factor)), encoding="utf-8")
            one = cfg.copy()
            one.latency = str(scaled)
            engine, policy = build_engine(one)
            replay_with(one, trace, engine, policy)
            return figures(engine, slo)

        for run in real:
            factor, wanted = 1.0, run.summary["tpot_s"]["mean"]
            summary = simulate(factor)
            for _ in range(4):
                factor *= wanted / summary["tpot_s"]["mean"]
                summary = simulate(factor)
            factors.append(factor)
            for name in AT_SPEED:
                ours, theirs = (_of(side, name) for side in (summary, run.summary))
                if ours is not None and theirs:
                    errors.setdefault(name, []).append(ours / theirs - 1)
    return {"factors": factors, "errors": {name: float(np.median(values)) for name, values in errors.items()}}


def _of(summary: Mapping[str, Any], name: str) -> float | None:
    value: Any = summary
    for part in name.split("."):
        value = value[part]
    return None if value is None else float(value)


def ranking(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return whether both sides order the policies alike by mean TTFT and E2E, and the simulator's regret.

    Two policies differ if their real means differ by more than the noise of both. The regret is how much worse the
    simulator's best policy is on the hardware than the best policy there. Policies with equal decisions are
    tied in simulation, and there is nothing to order.
    """
    found: dict[str, Any] = {}
    for workload, by_policy in results.items():
        for metric in ("ttft_s.mean", "e2e_s.mean"):
            figures_of = {name: result["figures"][metric] for name, result in by_policy.items()}
            known = {name: f for name, f in figures_of.items() if f["real"] is not None and f["simulated"] is not None}
            if len(known) < 2:
                continue
            sides = [[f[side] for f in known.values()] for side in ("simulated", "real")]
            pairs, agreed, tied = 0, 0, 0
            for one, other in combinations(known.values(), 2):
                gap = one["real"] - other["real"]
                noise = (one["noise"] or 0.0) * one["real"] + (other["noise"] or 0.0) * other["real"]
                if abs(gap) > noise:
                    pairs += 1
                    agreed += (one["simulated"] - other["simulated"]) * gap > 0
                    tied += one["simulated"] == other["simulated"]
            best = min(known, key=lambda name: known[name]["simulated"])
            tau = kendalltau(*sides).statistic
            found.setdefault(workload, {})[metric] = {
                "tau": float(tau) if np.isfinite(tau) else None,
                "pairs_beyond_noise": pairs,
                "agreed": agreed,
                "tied": tied,
                "regret": known[best]["real"] / min(f["real"] for f in known.values()) - 1,
            }
    return found
