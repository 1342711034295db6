"""The validation suite: every workload under every policy, in simulation and on the real model of this machine.

Real runs are repeated, in random order. Run folders are kept as sim.replay and hw.replay write them, and a run that
exists is not repeated. Reference runs in between measure the machine's speed (``hw.validate.machine_speed``).
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

from hw.elastic.model import ElasticModel
from hw.engine.clock import RealClock
from hw.engine.hw_engine import HwEngine
from hw.engine.prompts import read_prompts
from hw.replay.run import hardware, load_elastic
from hw.validate.compare import Run, compare, percent, read_run, seconds, verdicts
from hw.validate.machine_speed import RUNS_BETWEEN, MachineSpeed, factor_of, slower
from sim.atomic import write_whole
from sim.config import CONF_DIR, build, compose_config
from sim.cost.latency import CALIBRATIONS, LatencyModel, copy_speed, load_calibration
from sim.errors import ConfigError, nearest
from sim.paths import REPOSITORY
from sim.policies import Policy
from sim.replay.run import RecordingEngine, build_engine, build_parts, build_trace, figures, replay_with, write_tables
from sim.results.run_folder import provenance, write_json, write_text

RESULT, PAGE, PICTURE = (REPOSITORY / "hw" / name for name in ("validation.json", "VALIDATION.md", "validation.png"))
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
    calibration: a file of conf/calibration by name, or a path. only: workloads to run; all when empty.
    page: also (run what is missing, judge, write the page), judge (run nothing), or only (write the page again).
    """

    runs: str = str(REPOSITORY / "runs" / "validation")
    repeats: int = 3
    clock: str = "cpu"
    calibration: str = CALIBRATION
    only: list[str] = field(default_factory=list)
    page: str = "also"


ConfigStore.instance().store(name="hw_validate_schema", node=ValidateConfig)
PAGES = ("also", "judge", "only")


def configuration(workload: str, policy: str, settings: ValidateConfig) -> DictConfig:
    """Return the configuration of one run, which sim.replay and hw.replay share."""
    overrides = [*COMMON, *WORKLOADS[workload], *policies()[policy], f"latency={settings.calibration}"]
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
        )
        return engine, parts.policy


def serve(folder: Path, cfg: DictConfig, engine: RecordingEngine, policy: Policy) -> None:
    """Replay one configuration and write its run folder."""
    trace, slo = build_trace(cfg), build(cfg.slo)
    replay_with(cfg, trace, engine, policy)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_tables(folder, slo, engine.records(), engine.transitions(), engine.kept_share(), engine.iterations())
    if isinstance(engine, HwEngine):
        write_json(folder / "hardware.json", hardware(engine, cfg))
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
    base, latency = Path(settings.runs), load_calibration(settings.calibration)
    cells = [(workload, policy) for workload in workloads for policy in policies()]
    speed = MachineSpeed(base)
    if settings.page != "judge":
        run_missing(cells, settings, speed, latency, console)
    results = judge_cells(cells, settings, speed)
    return {
        "provenance": provenance(12),
        "device": latency.device,
        "copying": asdict(copy_speed(latency, build(configuration(*cells[0], settings).gpu))),
        "calibration": settings.calibration,
        "machine_speed": {"factor": factor_of(speed.references), "references": speed.references},
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
    for number, (workload, policy, repeat) in enumerate(todo, start=1):
        cfg = configuration(workload, policy, settings)
        loaded = loaded or Hardware(cfg)
        if number % RUNS_BETWEEN == 1:
            speed.measure(loaded.elastic, settings.clock, latency)
        serve(base / workload / policy / f"hw{repeat}", cfg, *loaded.engine(cfg))
        console.print(f"{number} of {len(todo)}: {workload}, {policy}, repeat {repeat}", highlight=False)


def judge_cells(
    cells: Sequence[tuple[str, str]], settings: ValidateConfig, speed: MachineSpeed
) -> dict[str, dict[str, Any]]:
    """Simulate every cell at the measured speed of the machine; return workload -> policy -> comparison.

    Raises:
        ConfigError: for a cell without a real run.
    """
    base = Path(settings.runs)
    at_its_speed = replace(settings, calibration=str(base / "calibration.json"))
    scaled = slower(calibration_content(settings.calibration), factor_of(speed.references))
    write_json(Path(at_its_speed.calibration), scaled)
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
    """Return errors without the speed of the machine: the part of each error that is no common factor of all prices.

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


def calibration_content(name: str) -> dict[str, Any]:
    """Return the content of a calibration file, by path or by its name in conf/calibration."""
    path = Path(name) if Path(name).suffix == ".json" else CALIBRATIONS / f"{name}.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _of(summary: Mapping[str, Any], name: str) -> float | None:
    value: Any = summary
    for part in name.split("."):
        value = value[part]
    return None if value is None else float(value)


def ranking(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return whether both sides order the policies alike by mean TTFT and E2E, and the simulator's regret.

    Two policies differ when their real means are farther apart than the noise of both together. The regret is how much
    worse the simulator's best policy is on the hardware than the best policy there. Policies with equal decisions are
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


# --- The page --------------------------------------------------------------------------------------------------------

AT_SPEED = (
    "ttft_s.mean",
    "ttft_s.p50",
    "ttft_s.p95",
    "tpot_s.p50",
    "tpot_s.p95",
    "e2e_s.mean",
    "e2e_s.p95",
    "makespan_s",
)
SHOWN = ("ttft_s.mean", "ttft_s.p50", "ttft_s.p95", "tpot_s.mean", "tpot_s.p50", "tpot_s.p95", "makespan_s")


def page(content: Mapping[str, Any]) -> str:
    """Return the page of validation in Markdown."""
    told = content["provenance"]
    every = [(workload, policy, result) for workload, by in content["results"].items() for policy, result in by.items()]
    given = [verdict for _, _, result in every for verdict in verdicts(result).values()]
    exact = [result["memory"].get("exact") for _, _, result in every]
    lines = [
        "# The simulator beside the real model",
        "",
        f"Written by `python -m hw.validate page=only` from `hw/validation.json`. SmolLM2-135M in bfloat16 on "
        f"{content['device']}, {told['written_at'][:10]}, commit `{told['commit'][:12]}`; calibration "
        f"`{content['calibration']}`, made on other requests.",
        "",
        "Traces are scaled to what a processor core can serve: 6 to 10 seconds of arrivals, about ten requests, "
        "prompts around 56 tokens, answers around 10; P95 is nearly the slowest request. Every run was made "
        f"{' to '.join(map(str, content['repeats']))} times; **noise** is the farthest repeat from the median (- for a "
        "single run), and no simulator can be better than that. The machine was shared with other work"
        + (
            ", so time is the processor's seconds of the serving thread, not the wall's, and idle time is skipped."
            if content["clock"] == "cpu"
            else "; time is the wall's."
        ),
        "",
        *_speed(content.get("machine_speed", {}).get("references", ())),
        *_copying(content.get("copying")),
        "Tolerance: with one plan 5 % at the mean and 10 % at P50 and P95, with plans that change 12 %. "
        "An error beyond it but below the noise is no miss, and counted apart.",
        "",
        f"**Of {len(given)} verdicts {given.count('held')} held, {given.count('within noise')} lie within the "
        f"noise, {given.count('missed')} missed. Weights and KV allocated equal the predicted bytes in every "
        f"iteration of {sum(e is True for e in exact)} of {len(exact)} cells.**",
        "",
        "## Errors, and the noise beside them",
        "",
        "Error of the simulator against the median repeat / noise; **bold** is a miss.",
        "",
        "| workload | policy | changes | " + " | ".join(SHOWN) + " | order |",
        "|---|---|---:|" + "---:|" * (len(SHOWN) + 1),
    ]
    for workload, policy, result in every:
        cells = []
        for name in SHOWN:
            figure = result["figures"][name]
            cell = f"{_signed(figure['error'])} / {percent(figure['noise'])}"
            cells.append(f"**{cell}**" if figure["verdict"] == "missed" else cell)
        changes = result["counts"]["transitions"]
        tau = result["requests_one_by_one"]["admission_order_tau"]
        lines.append(
            f"| {workload} | {policy} | {changes['simulated']} / {'-'.join(map(str, sorted(changes['real'])))} | "
            + " | ".join(cells)
            + f" | {'-' if tau is None else f'{tau:.2f}'} |"
        )
    lines += [
        "",
        "`changes`: plan changes in simulation / in each repeat, sorted. `order`: Kendall's tau of the order of "
        "admission, of the worst repeat. TTFT and TPOT in seconds of the clock named above.",
        "",
        *preemptions_and_changes(every),
        "## The same with the machine's speed taken out",
        "",
        "The speed of this machine for one and the same pass moved by a factor of two with what others did on it. Here "
        "every repeat is simulated anew with all prices times one number, found so that the mean TPOT agrees (the "
        "range of that number over the repeats is shown); the other figures are then compared with that repeat, and "
        "the median error of the repeats stands here. One number a run is fitted, so this shows what is wrong beside a "
        "common factor, and is no verdict.",
        "",
        "| workload | policy | factor | " + " | ".join(AT_SPEED) + " |",
        "|---|---|---:|" + "---:|" * len(AT_SPEED),
        *(
            f"| {workload} | {policy} | {min(one['factors']):.2f} to {max(one['factors']):.2f} | "
            + " | ".join(_signed(one["errors"].get(name)) for name in AT_SPEED)
            + " |"
            for workload, policy, one in ((w, p, r["at_the_speed_of_the_run"]) for w, p, r in every)
        ),
        "",
        _median_line(every),
        "",
        "## Do both sides rank the policies alike?",
        "",
        "Pairs of policies whose real means differ by more than their noise, and how many of them the simulator orders "
        "alike; *the same*: pairs that do exactly the same in simulation, so that what the hardware sees between them "
        "is noise that the repeats did not show; regret: how much worse its best policy is on the hardware than the "
        "best there is.",
        "",
        "| workload | figure | tau | pairs beyond noise | ordered alike | the same | regret |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for workload, by_metric in content["ranking"].items():
        for metric, row in by_metric.items():
            tau = "-" if row["tau"] is None else f"{row['tau']:.2f}"
            lines.append(
                f"| {workload} | {metric} | {tau} | {row['pairs_beyond_noise']} | {row['agreed']} | "
                f"{row['tied']} | {percent(row['regret'])} |"
            )
    lines += ["", "![Mean TTFT and TPOT, simulated against real](validation.png)", "", "## The words of every run", ""]
    words = content["words"]
    lines.append(f"`python -m hw.replay {' '.join(words['common'])} hw.clock={content['clock']}` and:")
    lines += ["", "| workload | words |", "|---|---|"]
    lines += [f"| {name} | `{' '.join(some)}` |" for name, some in words["workloads"].items()]
    lines += ["", "| policy | words |", "|---|---|"]
    lines += [f"| {name} | `{' '.join(some)}` |" for name, some in words["policies"].items()]
    return "\n".join(lines) + "\n"


def _speed(references: Sequence[Mapping[str, float]]) -> list[str]:
    if not references:  # a suite of before there were any
        return []
    each = [factor_of([one]) for one in references]
    return [
        f"All prices of the simulations are multiplied by {factor_of(references):.3f}: what {len(references)} "
        "reference runs between the runs judged here took, of other requests on the dense model, over what the "
        f"calibration says of them ({min(each):.2f} to {max(each):.2f} each; the machine's speed moves).",
        "",
    ]


def _copying(copying: Mapping[str, Any] | None) -> list[str]:
    if copying is None:  # a suite of before that was noted
        return []
    return [
        f"In the simulation, weights that a plan brings back come at {copying['host_to_device_bytes_per_s']:.3g} "
        f"bytes/s, and an iteration that starts while they come takes {percent(copying['slowdown'])} longer: "
        f"{copying['source']}. What dropping a block and the pool's growing cost the host (`plan_changes` in a "
        "calibration of this device) has no place in the simulator and is not used.",
        "",
    ]


def preemptions_and_changes(every: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[str]:
    """Return the section on preemptions and plan changes, of the cells that have any; none for results without."""
    rows = []
    for workload, policy, result in every:
        cells, busy = [], False
        for event in result.get("events", {}).values():
            busy = busy or bool(event["simulated"] or any(event["real"]))
            cell = f"{event['simulated']} / {', '.join(map(str, event['real']))}"
            cells.append(f"**{cell}**" if event["verdict"] == "missed" else cell)
            cell = f"{seconds(event['time_error_s'])} / {seconds(event['time_noise_s'])}"
            cells.append(f"**{cell}**" if event["time_verdict"] == "missed" else cell)
        if busy:
            ready_s = result["events"]["transitions"]["ready_after_s"]
            real_s = [value for value in ready_s["real"] if value is not None]
            middle_s = float(np.median(real_s)) if real_s else None
            cells.append(f"{seconds(ready_s['simulated'])} / {seconds(middle_s)}")
            rows.append(f"| {workload} | {policy} | {' | '.join(cells)} |")
    if not rows:
        return []
    return [
        "## Preemptions and plan changes: how many, and when",
        "",
        "Numbers: simulated / every repeat. Times: mean error of those that happened on both sides / mean distance of "
        "the farthest two repeats. `ready`: from the decision of a plan to all of it running, mean, simulated / real.",
        "",
        "| workload | policy | preemptions | their times | plan changes | their times | ready |",
        "|---|---|---:|---:|---:|---:|---:|",
        *rows,
        "",
    ]


def _median_line(every: Sequence[tuple[str, str, Mapping[str, Any]]]) -> str:
    cells = []
    for name in AT_SPEED:
        errors = [abs(r["at_the_speed_of_the_run"]["errors"].get(name, np.nan)) for _, _, r in every]
        cells.append(f"{name} {percent(float(np.nanmedian(errors)))}")
    factors = [factor for _, _, r in every for factor in r["at_the_speed_of_the_run"]["factors"]]
    return (
        f"**Median absolute error over the cells: {', '.join(cells)}.** The median factor is {np.median(factors):.2f}: "
        "below 1, the machine was faster in these runs than the prices say, and that alone makes most of the errors "
        "of the table before this one."
    )


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f} %"


def plot(path: Path, content: Mapping[str, Any]) -> None:
    """Write one PNG: every cell's means, simulated against real, with the noise as bars."""
    import matplotlib as mpl  # drawing is rare and its import slow

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    names = list(content["words"]["policies"])
    for axis, metric in zip(axes, ("ttft_s.mean", "tpot_s.mean"), strict=True):
        most = 0.0
        for policy in names:
            cells = [by[policy]["figures"][metric] for by in content["results"].values()]
            cells = [cell for cell in cells if cell["real"] is not None and cell["simulated"] is not None]
            real = [cell["real"] for cell in cells]
            noise = [cell["real"] * (cell["noise"] or 0.0) for cell in cells]
            simulated = [cell["simulated"] for cell in cells]
            axis.errorbar(real, simulated, xerr=noise, fmt="o", markersize=4, label=policy)
            most = max([most, *real, *simulated])
        axis.plot([0, most], [0, most], color="black", linewidth=0.8)
        axis.set(xlabel=f"{metric}, real", ylabel=f"{metric}, simulated")
        axis.legend()
    write_whole(path, lambda part: figure.savefig(part, format="png", dpi=100))
    plt.close(figure)
