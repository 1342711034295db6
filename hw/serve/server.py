"""Serves the engine over HTTP like OpenAI: ``python -m hw.serve``, then ``curl 127.0.0.1:8000/v1/models``.

    POST /v1/completions        prompt: a text, token ids, or a list of these
    POST /v1/chat/completions   messages (role, content), formatted by the tokenizer's chat template;
                                without one, a line "role: content" for each message, then "assistant:"
    GET  /v1/models             the served model, and how a chat is formatted
    GET  /health                200 while the engine serves, 503 with the reason once it has stopped
    GET  /metrics               Prometheus metrics, under vLLM's names where they mean the same
    GET  /plan, PUT /plan       read the plan, or set it with the options of policy=fixed; this ends the policy

Both take max_tokens, n, temperature, top_p, seed, stop, stream, stream_options and ignore_eos. Answers are greedy
unless a temperature or a top_p is given. sim/serve/requests.py says what is refused.

The configuration is that of ``hw.replay``, plus ``serve.*``: where to listen, who may ask and what to refuse. The
server listens on loopback by default. SIGTERM and Ctrl-C let it complete the answers under way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from hw.engine.clock import RealClock
from hw.engine.hw_engine import HwEngine, check_config, check_gpu
from hw.replay.channel_order import order_channels
from hw.replay.run import HwReplayConfig, load_elastic
from sim.config import name_of, one_thread, run_command
from sim.errors import ConfigError
from sim.replay.run import build_parts
from sim.serve.api import Api
from sim.serve.engine_thread import EngineThread
from sim.serve.run import serve_until_stopped
from sim.serve.settings import ServerConfig

__all__ = ["Api", "ServeConfig", "ServerConfig", "build_api", "main", "run_server"]


@dataclass(kw_only=True)
class ServeConfig(HwReplayConfig):
    """The configuration of ``python -m hw.serve``."""

    serve: ServerConfig = field(default_factory=ServerConfig)


ConfigStore.instance().store(name="serve_schema", node=ServeConfig)


def build_api(cfg: DictConfig, config: ServerConfig) -> tuple[Api, EngineThread]:
    """Build model, engine and HTTP side of a configuration."""
    parts = build_parts(cfg)
    check_config(parts.config)
    check_gpu(parts.gpu)
    elastic, tokenizer = load_elastic(parts.model, cfg.hw, cfg.model)
    order_channels(elastic, tokenizer, parts.policy, cfg.hw.channel_text)
    clock = RealClock("wall")

    def build(thread: EngineThread) -> HwEngine:
        return HwEngine(
            elastic=elastic,
            config=parts.config,
            plan=parts.policy.first_plan,
            budget_bytes=parts.budget,
            workspace_bytes=int(cfg.workspace_bytes),
            prompts=thread.prompt,
            clock=clock,
            ends=thread.ends,
            sampling=thread.sampling,
            on_token=thread.on_token,
            attention=cfg.hw.attention,
            cuda_graphs=bool(cfg.hw.cuda_graphs),
        )

    own = tokenizer.eos_token_id
    ends = elastic.end_tokens | ({own} if own is not None else set())
    thread = EngineThread(build, parts.policy, clock, eos=ends, tick_s=float(cfg.tick_s))
    return Api(thread, parts.model, tokenizer, config, note=elastic.note), thread


def run_server(cfg: DictConfig) -> None:
    """Serve until a signal comes and the answers under way are complete.

    Raises:
        ConfigError: for another clock than the wall's, a value of ``serve`` that is not allowed, or a port in use.
    """
    if cfg.hw.clock != "wall":
        raise ConfigError(f"hw.clock is {cfg.hw.clock!r}; a server answers in real time, so set hw.clock=wall")
    config = ServerConfig.of(OmegaConf.to_container(cfg.serve, resolve=True))  # type: ignore[arg-type]
    serve_until_stopped(config, name_of(cfg.model), lambda: build_api(cfg, config))


def main() -> None:
    """Run ``python -m hw.serve``."""
    one_thread()
    run_command(run_server, "serve")
