"""Command ``python -m sim.capacity``: how many requests per second can a server take?

The answer is the highest rate at which SLO attainment stays at or above a target. Every rate replays the same requests
in the same order, with only their arrival times stretched (common random numbers), so two rates, policies or devices
differ by what is compared and not by chance. Several seeds or windows say how far the answer depends on the requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from numpy.typing import NDArray
from omegaconf import DictConfig

from sim.capacity.search import Bracket, Curve, bracket_of, scan_rates
from sim.capacity.table import Row, notes, plot_rows, table_of
from sim.config import SweepConfig, build, name_of, one_thread, run_command, with_differences
from sim.cost.front_end import into_queue
from sim.engine.protocol import refuse_sessions
from sim.errors import ConfigError, RapLabError
from sim.policies import Policy, PolicyContext, checked_policy
from sim.replay.max_rate import all_at_once, rate_figures, without_queue_limit
from sim.replay.run import front_end_of, replay_with, sent_trace, server_spec
from sim.replay.sweep import Case, Executor, cases_of, config_of
from sim.results.metrics import Slo, missed_targets
from sim.results.records import Records, Status
from sim.results.run_folder import begin_run, provenance, write_begun, write_json, write_text
from sim.traces.trace import Trace
from sim.traces.transforms import scale_rate


@dataclass(kw_only=True)
class CapacityConfig(SweepConfig):
    """A replay at many rates, under several policies and on several devices.

    target: share of the requests that must meet the SLO, in (0, 1].
    policies, gpus: options of conf/policy and conf/gpu to compare; ``policy`` and ``gpu`` alone when empty.
    precision: width of the bracket around the answer, relative to it.
    least_rps: the lowest rate to try, requests/s.
    """

    target: float = 0.9
    policies: list[str] = field(default_factory=list)
    gpus: list[str] = field(default_factory=list)
    precision: float = 0.02
    least_rps: float = 0.01


ConfigStore.instance().store(name="capacity_schema", node=CapacityConfig)


def main() -> None:
    """Run the command."""
    one_thread()
    run_command(_capacity, "capacity")


@dataclass(slots=True)
class Server:
    """One server that replays one trace at any rate.

    misses: rate -> target -> share of the requests that missed it.
    alone_misses: rate -> share of the requests that missed one though they had the server to themselves. At lower rates
        they have so too, so they miss it again.
    """

    cfg: DictConfig
    trace: Trace
    misses: dict[float, dict[str, float]] = field(default_factory=dict)
    alone_misses: dict[float, float] = field(default_factory=dict)

    @property
    def trace_rps(self) -> float:
        """The rate of the trace as it is."""
        span_s = float(self.trace.arrival_s[-1] - self.trace.arrival_s[0])
        if len(self.trace) < 2:
            raise ConfigError(
                f"{self.trace.name} has one request, so there is no rate to change; choose a longer trace"
            )
        if not span_s > 0:
            raise ConfigError(
                f"the {len(self.trace)} requests of {self.trace.name} arrive all at once, so there is no rate to "
                "change; choose a trace with arrival times, e.g. trace=poisson, or a longer window"
            )
        return (len(self.trace) - 1) / span_s

    def attainment(self, rate_rps: float) -> float:
        """Replay the trace at a rate; return the share of its requests that meet the SLO."""
        front_end, slo = front_end_of(self.cfg), build(self.cfg.slo)
        stretched = scale_rate(self.trace, factor=rate_rps / self.trace_rps)
        engine = self._replay(into_queue(stretched, front_end), lambda policy: policy)
        records = engine.records()
        missed = missed_targets(records, slo, front_end)
        self.misses[rate_rps] = {name: float(which.mean()) for name, which in missed.items()}
        met = ~missed.pop("finished")
        for which in missed.values():
            met &= ~which
        alone = were_alone(records) & (records.arrival_s >= engine.budget.change_s[-1])
        self.alone_misses[rate_rps] = float((~met & alone).mean())
        return float(met.mean())

    def most_below(self, rate_rps: float) -> float:
        """Return the most that the attainment can be at rates below a measured one."""
        return 1.0 - self.alone_misses[rate_rps]

    def max_rate_rps(self) -> float | None:
        """Return the maximum rate: what the server finishes per second when all requests come at once."""
        trace = into_queue(all_at_once(self.trace), front_end_of(self.cfg))
        engine = self._replay(all_at_once(trace), without_queue_limit)
        return rate_figures(engine.records(), {"request_rate_rps": None})["max_rate_rps"]

    def _replay(self, trace: Trace, change: Callable[[Policy], Policy]) -> Any:
        server = server_spec(self.cfg)
        policy = change(checked_policy(build(self.cfg.policy)(PolicyContext.of(server))))
        budget = build(self.cfg.budget)(server.budget_context(policy.first_plan))
        engine = server.build_engine(policy.first_plan, budget, keep_iterations=False)
        replay_with(self.cfg, trace, engine, policy)
        return engine


def were_alone(records: Records) -> NDArray[np.bool_]:
    """Return which requests had no other one in the engine from their arrival to their end."""
    end_s = np.where(records.status == Status.REJECTED, records.arrival_s, records.finish_s)
    end_s = np.where(np.isfinite(end_s), end_s, np.inf)
    latest_s = np.maximum.accumulate(end_s)
    after_others = np.concatenate(([True], records.arrival_s[1:] >= latest_s[:-1]))
    before_others = np.concatenate((end_s[:-1] <= records.arrival_s[1:], [True]))
    return np.asarray(after_others & before_others, dtype=np.bool_)


def measured_row(job: tuple[str, str, Sequence[DictConfig]]) -> Row:
    """Return the capacity of one policy on one device, over all replays; the error instead if it cannot be served."""
    policy, gpu, configs = job
    try:
        return _row(policy, gpu, configs)
    except RapLabError as error:
        return Row(policy=policy, gpu=gpu, error=str(error), kind=type(error).__name__)


def _row(policy: str, gpu: str, configs: Sequence[DictConfig]) -> Row:
    first = configs[0]
    servers = [Server(one, sent_trace(one)) for one in configs]
    for server in servers:
        refuse_sessions(server.trace, "a search over rates")
    curves = [Curve(server.attainment, most_below=server.most_below) for server in servers]
    max_rps = servers[0].max_rate_rps()
    rates = scan_rates(curves, first.target, max_rps or servers[0].trace_rps, first.least_rps)
    brackets = []
    for server, curve in zip(servers, curves, strict=True):
        bracket = bracket_of(curve, first.target, first.precision)
        if not bracket.met_rps:
            raise ConfigError(_unreachable(first.target, build(first.slo), server, curve, bracket))
        brackets.append(bracket)
    if len(curves) > 1 and all(curve.points == curves[0].points for curve in curves):
        curves, brackets, servers = curves[:1], brackets[:1], servers[:1]
    limits = [_most_missed(server, bracket) for server, bracket in zip(servers, brackets, strict=True)]
    return Row(
        policy=policy,
        gpu=gpu,
        brackets=brackets,
        rates=rates,
        curves=[dict(sorted(curve.points.items())) for curve in curves],
        max_rate_rps=max_rps,
        requests=[len(server.trace) for server in servers],
        limited_by=max(set(limits), key=limits.count),
    )


NAMES = {
    "finished": "rejected or not finished (a prompt above the context limit is rejected)",
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "e2e_s": "E2E",
}
"""Target -> how people say that it was missed."""


def _most_missed(server: Server, bracket: Bracket) -> str:
    """Return the target that more requests miss just above the capacity than at the lowest rate measured."""
    misses, least = server.misses.get(bracket.missed_rps), server.misses[min(server.misses)]
    return "" if misses is None else NAMES[max(misses, key=lambda name: misses[name] - least[name])]


def _unreachable(target: float, slo: Slo, server: Server, curve: Curve, bracket: Bracket) -> str:
    """Say that not even the lowest rate meets the target, and which metric fails."""
    rate_rps = bracket.missed_rps
    parts = []
    for name, share in sorted(server.misses[rate_rps].items(), key=lambda item: -item[1]):
        if share > 0:
            limit = getattr(slo, name, None)
            above = f"{NAMES[name]} above {limit:g} s" if limit is not None else NAMES[name]
            parts.append(f"{above} in {100 * share:.1f} %")
    alone = server.alone_misses[rate_rps]
    higher = ""
    if alone > 1.0 - target:
        higher = f"; {100 * alone:.1f} % have the server to themselves and miss it, so no lower rate meets it"
    if bracket.met_again_rps:
        higher += f"; higher rates meet it, {bracket.met_again_rps[0]:.3g} to {bracket.met_again_rps[-1]:.3g} req/s"
    return (
        f"even at {rate_rps:.3g} req/s only {100 * curve(rate_rps):.1f} % of the requests meet the SLO, and the target "
        f"is {100 * target:g} %: {', '.join(parts)}{higher}; loosen what fails (slo.KEY=SECONDS) or target=, or choose "
        "another gpu=, policy= or trace with shorter requests (workload=only_4096)"
    )


def _check(cfg: DictConfig) -> None:
    if not 0 < cfg.target <= 1:
        raise ConfigError(f"target is {cfg.target}; it must be a share in (0, 1], e.g. 0.9 for 90 % of the requests")
    if not 0.001 <= cfg.precision < 1:
        raise ConfigError(f"precision is {cfg.precision}; it must be in [0.001, 1), e.g. 0.02 for 2 %")
    if not (cfg.least_rps > 0 and math.isfinite(cfg.least_rps)):
        raise ConfigError(f"least_rps is {cfg.least_rps}; it must be a rate above 0, in requests per second")
    slo = build(cfg.slo)
    if slo.ttft_s is None and slo.tpot_s is None and slo.e2e_s is None:
        raise ConfigError("the SLO has no target, so any rate meets it; set slo.ttft_s=, slo.tpot_s= or slo.e2e_s=")
    for key in ("policies", "gpus"):
        if len(set(cfg[key])) != len(cfg[key]):
            raise ConfigError(f"{key} is {list(cfg[key])}; name each once")
    if cfg.latency is not None and len(cfg.gpus) > 1:
        raise ConfigError(
            f"latency={cfg.latency} is the calibration of one device, but gpus names {len(cfg.gpus)}; remove latency= "
            "to take the calibration of each"
        )


def jobs_of(cfg: DictConfig, cases: Sequence[Case]) -> list[tuple[str, str, list[DictConfig]]]:
    """Return (policy, device, one configuration per case) of every row.

    Raises:
        ConfigError: for a policy or device that does not exist.
    """
    choices = HydraConfig.get().runtime.choices
    found = []
    for gpu in cfg.gpus or [None]:
        for policy in cfg.policies or [None]:
            chosen = {key: name for key, name in (("gpu", gpu), ("policy", policy)) if name is not None}
            one = with_differences(cfg, chosen, "policies" if gpu is None else "gpus")
            label = policy or str(choices["policy"])
            found.append((label, build(one.gpu).title, [config_of(one, case) for case in cases]))
    return found


def _capacity(cfg: DictConfig) -> None:
    _check(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    jobs, made_by = jobs_of(cfg, cases_of(cfg)), provenance(cfg.seed)
    executor: Executor = build(cfg.executor)
    begin_run(folder, cfg, made_by)
    rows = executor(measured_row, jobs)
    if all(row.error for row in rows):
        raise ConfigError(rows[0].error)
    label = cfg.label or str(HydraConfig.get().runtime.choices["trace"])
    title = f"{label} on {name_of(cfg.model)}: highest rate at which {100 * cfg.target:g} % of requests meet the SLO"
    try:
        write_begun(folder, cfg, made_by)
        write_text(folder / "capacity.md", f"{title}\n\n{table_of(rows)}\n" + "".join(f"{n}\n" for n in notes(rows)))
        plot_rows(folder / "capacity.png", rows, cfg.target, title)
        content: Mapping[str, Any] = {
            "provenance": made_by,
            "title": title,
            "target": cfg.target,
            "rows": [row.content() for row in rows],
        }
        write_json(folder / "capacity.json", content)  # last: a folder with this file is complete
    finally:  # a full disk loses the files, not the figures
        print(title, table_of(rows), sep="\n\n")
        for note in notes(rows):
            print(f"note: {note}")
    print(f"files: {folder}")
