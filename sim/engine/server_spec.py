"""A server as a value: model, device, configuration and prices; it builds the simulated engine.

Replays, policies that try plans out, environments and comparisons with real runs all build their engine here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from sim.config import build_option
from sim.cost.bounds import Factors
from sim.cost.gpu import Gpu
from sim.cost.latency import CALIBRATIONS, CopySpeed, LatencyModel, copy_speed, load_calibration
from sim.cost.model_spec import ModelSpec, file_name, load_model
from sim.cost.plan import Plan
from sim.cost.quality import QUALITIES, FittedQuality, PublishedQuality, load_quality
from sim.engine.budget import Budget, BudgetContext
from sim.engine.priced_replica import PricedReplica
from sim.engine.protocol import EngineConfig
from sim.engine.sim_engine import SimEngine
from sim.errors import CalibrationError, ConfigError
from sim.json_file import read_json_object
from sim.limits import check_slowdown

WORKSPACE_BYTES = 1_240_000_000
"""Default memory for activations, CUDA graphs and the like (sim.config.ReplayConfig says where it was measured)."""


def find_calibration(model: str, gpu: str, tp: int) -> str:
    """Return the name of the calibration of ``model`` on ``tp`` GPUs of the kind ``gpu``.

    Of several, one that ``hw.calibrate source=device`` measured comes first, then one from published measurements of
    this pair, then others, those that ``hw.fit`` fitted to one server last; of equal ones that with the shortest name.
    A choice of the first kind is said on stderr.

    Raises:
        ConfigError: if there is none, naming those of this model and of others.
    """
    known = _calibrated_servers(CALIBRATIONS)
    found = [name for name, made_for in known.items() if made_for == (model, gpu, tp)]
    if not found:
        of_model = sorted((name, made_for) for name, made_for in known.items() if made_for[0] == model)
        devices = [f"{name} ({_choice_of(made_for)})" for name, made_for in of_model]
        models = sorted({made_for[0] for made_for in known.values()})
        raise ConfigError(
            f"no calibration of {model} on {gpu}{f' with gpu.tp={tp}' if tp > 1 else ''}; "
            + (f"there are {', '.join(devices)}" if devices else f"calibrated models are {', '.join(models)}")
            + "; choose one of these, set latency= to a file of your own, or make one with hw.calibrate"
        )
    ranks = _calibration_ranks(CALIBRATIONS)
    first, *others = sorted(found, key=lambda name: (ranks[name], len(name), name))
    if others and not ranks[first]:
        _say_chosen(first, ", ".join(others))
    return first


@cache
def _say_chosen(name: str, others: str) -> None:
    print(f"latency: {name}, measured by hw.calibrate, not {others}; latency=NAME chooses another", file=sys.stderr)


@cache
def _say_other_device(name: str, device: str, gpu: str) -> None:
    print(f"latency: {name} has the times of {device}, and memory is that of gpu={gpu}", file=sys.stderr)


@cache
def _calibration_ranks(folder: Path) -> dict[str, int]:
    """Return how good each calibration is: 0 measured by ``hw.calibrate``, 1 published, 2 composed, 3 fitted.

    One that was fitted to the run of one server is the last choice: another server of that model may differ.
    """
    ranks = {}
    for path in folder.glob("*.json"):
        content = read_json_object(path, CalibrationError, "write it again with hw.calibrate, or remove it")
        kind = content.get("kind")
        ranks[path.stem] = (0 if "device_run" in content else 1) if kind == "measured" else 3 if kind == "fitted" else 2
    return ranks


@cache
def _calibrated_servers(folder: Path) -> dict[str, tuple[str, str, int]]:
    """Return (model, device, degree of tensor parallelism) of every calibration in a folder, by its name."""
    known = {}
    for path in sorted(folder.glob("*.json")):
        content = read_json_object(path, CalibrationError, "write it again with hw.calibrate, or remove it")
        known[path.stem] = (str(content.get("model")), str(content.get("device")), content.get("tp", 1))
    return known


def _choice_of(made_for: tuple[str, str, int]) -> str:
    """Return the keys that choose a calibrated device."""
    _, gpu, tp = made_for
    return f"gpu={gpu}" if tp == 1 else f"gpu={gpu} gpu.tp={tp}"


def find_quality(model: str) -> str | None:
    """Return the name of a model's quality table, a measured one before a published one; None if it has none."""
    known = {path.stem for path in QUALITIES.glob("*")}
    return next((name for name in (model, file_name(model), f"{model}_published") if name in known), None)


@cache
def named_calibration(name: str) -> LatencyModel:
    """Return a calibration of conf/calibration by name; each is read once."""
    return load_calibration(name)


@cache
def named_quality(name: str) -> FittedQuality | PublishedQuality:
    """Return a quality model of conf/quality by name; each is built once."""
    return load_quality(name)


def qualities_that_know(model: str, plans: Sequence[Plan]) -> list[str]:
    """Return the names of the tables in conf/quality that were made for a model and know the loss of every plan."""
    found = []
    for name in sorted(path.stem for path in QUALITIES.glob("*.*")):
        table = named_quality(name)
        made_for = table.name if isinstance(table, FittedQuality) else table.model.name
        if file_name(made_for) == file_name(model) and not any(math.isnan(table.charge(plan)) for plan in plans):
            found.append(name)
    return found


def which_quality(model: str, plans: Sequence[Plan]) -> str:
    """Return what a message says of the tables that know the loss of every plan."""
    known = qualities_that_know(model, plans)
    if not known:
        return "no table of conf/quality knows all of them; python -m hw.score kind=table measures one"
    return f"set quality_table= to one that knows all of them: {', '.join(known)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """A server without its requests and its budget.

    model: what each GPU holds of the served model: all of it, or its share among ``gpu.tp`` GPUs
        (``sim.cost.model_spec.ModelSpec.shard``, which ``from_names`` and ``from_parts`` apply). Bytes are those of one
        GPU throughout: budget, weights, KV and copies.
    gpu: the device. config: how the engine schedules requests and keeps KV.
    workspace_bytes: memory that neither weights nor KV can use.
    latency: durations of the model on the device; None if there is no calibration (only a real engine runs without).
    quality_nll: nats per token that a plan costs, charged to requests: NaN for a plan whose loss is unknown; None
        charges nothing.
    slowdown: an iteration takes this times as long as ``latency`` says: how much slower than the measured machine this
        one is.
    """

    model: ModelSpec
    gpu: Gpu
    config: EngineConfig
    workspace_bytes: int = WORKSPACE_BYTES
    latency: LatencyModel | None = None
    quality_nll: Callable[[Plan], float] | None = None
    slowdown: float = 1.0

    def __post_init__(self) -> None:
        if self.latency is not None and self.latency.model != self.model.name:
            raise ConfigError(
                f"calibration {self.latency.name!r} was made for model {self.latency.model!r}, not "
                f"{self.model.name!r}; set latency= to one made for it, or model={self.latency.model}"
            )
        if self.latency is not None and self.latency.tp != self.gpu.tp:
            raise ConfigError(
                f"calibration {self.latency.name!r} was made for gpu.tp={self.latency.tp}, not {self.gpu.tp}; set "
                f"gpu.tp={self.latency.tp}, or latency= to one made for gpu.tp={self.gpu.tp}"
            )
        check_slowdown(self.slowdown)

    @classmethod
    def from_names(
        cls,
        *,
        model: str,
        gpu: str,
        engine: str = "vllm_v1",
        latency: str | None = None,
        quality: str | None = None,
        workspace_bytes: float = WORKSPACE_BYTES,
        tp: int = 1,
    ) -> ServerSpec:
        """Build a server from options of conf/ by name: ``ServerSpec.from_names(model="llama2_7b", gpu="a100_80gb")``.

        Args:
            tp: GPUs among which the model is divided.
            latency: a calibration by name or path; None takes the one of this model on this GPU.
            quality: a quality table by name; None takes the one of this model, where there is one.
        Raises:
            RapLabError: for an unknown name, with the nearest one; without a calibration of the model on the GPU.
        """
        return cls.from_parts(
            load_model(model),
            replace(build_option("gpu", gpu), tp=tp),
            build_option("engine", engine),
            latency=latency or find_calibration(model, gpu, tp),
            quality=quality,
            workspace_bytes=workspace_bytes,
        )

    @classmethod
    def from_parts(
        cls,
        model: ModelSpec,
        gpu: Gpu,
        config: EngineConfig,
        *,
        latency: str | None = None,
        quality: str | None = None,
        workspace_bytes: float = WORKSPACE_BYTES,
        fixed_s: float | None = None,
        host_floor_s: float | None = None,
        nested_overhead: float = 0.0,
        slowdown: float = 1.0,
    ) -> ServerSpec:
        """Build a server from a model, a device and a configuration, with prices by name.

        Args:
            model: all of it; the server holds its share among ``gpu.tp`` GPUs.
            latency, quality: as ``from_names``, except that a missing calibration leaves ``latency`` None.
            fixed_s, host_floor_s: overhead and least time of an iteration, in place of the calibration's; None keeps
                those.
            nested_overhead: how much longer products at the bits of the checkpoint take, as a share.
            slowdown: as in the class.
        """
        if latency is None:
            made_for = model.name, gpu.name, gpu.tp
            calibrated = made_for in _calibrated_servers(CALIBRATIONS).values()
            latency = find_calibration(*made_for) if calibrated else None
        priced = None
        if latency is not None:
            # A file named by its path may have been written again since, so it is read each time.
            priced = load_calibration(latency) if latency.endswith(".json") else named_calibration(latency)
            if priced.device != gpu.name:
                _say_other_device(priced.name, priced.device, gpu.name)
            if fixed_s is not None:
                priced = priced.with_fixed(fixed_s, "fixed_s of the configuration")
            if host_floor_s is not None:
                priced = priced.with_host_floor(host_floor_s)
            if nested_overhead:
                longer = Factors(memory_bound=1.0 + nested_overhead, compute_bound=1.0 + nested_overhead)
                priced = priced.with_factors(Factors(), {model.weight_bits: longer})
        table = quality or find_quality(model.name)
        return cls(
            model=model.shard(gpu.tp),
            gpu=gpu,
            config=config,
            workspace_bytes=int(workspace_bytes),
            latency=priced,
            quality_nll=named_quality(table).charge if table is not None else None,
            slowdown=slowdown,
        )

    def copying(self) -> CopySpeed:
        """Return how fast weights are copied in: measured by the calibration, or from the device's data sheet."""
        return copy_speed(self.priced(), self.gpu)

    def priced(self) -> LatencyModel:
        """Return the latency model.

        Raises:
            ConfigError: if there is none; the message names the existing calibrations.
        """
        return self.latency or named_calibration(find_calibration(self.model.name, self.gpu.name, self.gpu.tp))

    def budget_context(self, plan: Plan) -> BudgetContext:
        """Return what a budget of this server is computed from; ``plan`` is the first plan."""
        return BudgetContext(
            model=self.model,
            gpu=self.gpu,
            plan=plan,
            workspace_bytes=self.workspace_bytes,
            kv_block_tokens=self.config.kv_block_tokens,
        )

    def build_engine(self, plan: Plan, budget: int | Budget, **overrides: Any) -> SimEngine:
        """Build an idle simulated engine.

        Args:
            plan: what runs first.
            budget: bytes that weights, workspace and KV may hold together, constant or over time.
            overrides: further arguments of ``SimEngine``, such as ``env`` or ``keep_iterations``; they take precedence
                over the server's own.
        Raises:
            ConfigError: without a calibration.
            BudgetError: when the budget cannot hold the weights and one request.
        """
        return SimEngine(plan=plan, budget_bytes=budget, **{**self._engine_arguments(), **overrides})

    def build_replica(self, plan: Plan, budget: int | Budget, **overrides: Any) -> PricedReplica:
        """Build an idle simulated replica in plain Python, which leaves the records of ``build_engine``'s engine.

        Args:
            plan, budget: as ``build_engine``.
            overrides: further arguments of ``PricedReplica``; they take precedence over the server's own.
        Raises:
            ConfigError, BudgetError: as ``build_engine``.
        """
        arguments = self._engine_arguments()
        if self.quality_nll is not None:  # plans recur, and evaluating a quality model may take longer than a token
            arguments["quality_nll"] = lru_cache(maxsize=4096)(self.quality_nll)
        return PricedReplica(plan=plan, budget_bytes=budget, **{**arguments, **overrides})

    def _engine_arguments(self) -> dict[str, Any]:
        """Return what both simulated engines are built with, besides a plan and a budget."""
        copying = self.copying()
        return {
            "model": self.model,
            "latency": self.priced(),
            "config": self.config,
            "workspace_bytes": self.workspace_bytes,
            "host_to_device_bytes_per_s": copying.host_to_device_bytes_per_s,
            "slowdown": self.slowdown,
            "copy_slowdown": copying.slowdown,
            "copy_layer_s": copying.layer_s,
            "quality_nll": self.quality_nll,
        }
