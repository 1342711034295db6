"""Serves simulated tokens over HTTP like OpenAI: ``python -m sim.serve``, then ``curl 127.0.0.1:8000/v1/models``.

    POST /v1/completions        prompt: a text, token ids, or a list of these
    POST /v1/chat/completions   messages (role, content), each a line "role: content", then "assistant:"
    GET  /v1/models             the served model
    GET  /health                200 while the engine serves, 503 with the reason once it has stopped
    GET  /metrics               Prometheus metrics in simulated seconds, under vLLM's names
    GET  /plan, PUT /plan       read the plan, or set it with the options of policy=fixed; this ends the policy

No model computes: every token comes when the simulator says so, at ``serve.speed`` times the pace of the clock. Answers
are filler words of the requested length. The configuration is that of ``sim.replay``, plus ``serve.*``; the HTTP side
is that of ``hw.serve``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sim.config import ReplayConfig, build, name_of, one_thread, run_command
from sim.engine.priced_replica import PricedReplica
from sim.engine.protocol import Request
from sim.errors import ConfigError
from sim.replay.run import Parts, build_parts, build_trace
from sim.results.run_folder import begin_run, provenance
from sim.serve.recording import write_run
from sim.serve.run import serve_until_stopped
from sim.serve.settings import ServerConfig
from sim.serve.simulated_api import SimulatedApi
from sim.serve.simulated_thread import ScaledClock, SimulatedThread

LEAST_SPEED, MOST_SPEED = 1e-3, 1e6


@dataclass(kw_only=True)
class SimulatedServerConfig(ServerConfig):
    """Where to listen, who may ask, what to refuse, and how fast simulated time passes.

    speed: simulated seconds per real second. Clients then measure times that are shorter by this factor; the figures of
        /metrics and of the records are in simulated seconds.
    records: keep the records of all requests, and write the run folder when the server stops.
    """

    speed: float = 1.0
    records: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: for one that is not allowed.
        """
        super().__post_init__()
        if not LEAST_SPEED <= self.speed <= MOST_SPEED:
            raise ConfigError(
                f"serve.speed is {self.speed}; set it from {LEAST_SPEED:g} to {MOST_SPEED:g}; 1 is real time"
            )


@dataclass(kw_only=True)
class SimServeConfig(ReplayConfig):
    """The configuration of ``python -m sim.serve``."""

    serve: SimulatedServerConfig = field(default_factory=SimulatedServerConfig)


ConfigStore.instance().store(name="sim_serve_schema", node=SimServeConfig)


def build_api(cfg: DictConfig, config: SimulatedServerConfig) -> tuple[SimulatedApi, SimulatedThread]:
    """Build engine and HTTP side of a configuration; simulated time starts now."""
    parts, lengths = build_parts(cfg), build_trace(cfg).output_tokens

    def build(thread: SimulatedThread) -> PricedReplica:
        return parts.server.build_replica(
            parts.policy.first_plan, parts.budget, token_of=thread.token_of, on_token=thread.on_token
        )

    _compile(parts)
    clock = ScaledClock(config.speed)
    thread = SimulatedThread(build, parts.policy, clock, tick_s=float(cfg.tick_s), keep_records=config.records)
    return SimulatedApi(thread, parts.model, config, lengths, seed=int(cfg.seed)), thread


def _compile(parts: Parts) -> None:
    """Compile what prices an iteration, which takes seconds, before the clock runs."""
    trial = parts.server.build_replica(parts.policy.first_plan, parts.budget)
    trial.submit([Request(request_id=0, arrival_s=0.0, prompt_tokens=1, output_tokens=2)])
    trial.run_until(math.inf)


def run_server(cfg: DictConfig) -> None:
    """Serve until a signal comes and the answers under way are complete; then write the run folder, if it is wanted.

    Raises:
        ConfigError: for a value of ``serve`` that is not allowed, or a port in use.
    """
    config = SimulatedServerConfig.of(OmegaConf.to_container(cfg.serve, resolve=True))  # type: ignore[arg-type]
    folder, threads = Path(HydraConfig.get().runtime.output_dir), []
    if config.records:
        begin_run(folder, cfg, provenance(cfg.seed))

    def build_side() -> tuple[SimulatedApi, SimulatedThread]:
        api, thread = build_api(cfg, config)
        threads.append(thread)
        return api, thread

    serve_until_stopped(config, f"{name_of(cfg.model)} on a simulated {build(cfg.gpu).title}", build_side)
    if config.records:
        write_run(folder, cfg, threads[0].replica)


def main() -> None:
    """Run ``python -m sim.serve``."""
    one_thread()
    run_command(run_server, "sim_serve")
