"""A replay on the real model, with the configuration and the files of ``sim.replay``.

It takes every key of the simulator, so one command line serves both; keys under ``hw`` are those that only a real run
needs. It also writes ``hardware.json``: clock, device, allocated and used memory; and ``passes.parquet``: what each
iteration computed, in how many seconds.
"""

from __future__ import annotations

import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from hw.elastic.attention_choice import check_attention
from hw.elastic.checkpoint import checkpoint_of, config_of, load_weights, pick_device
from hw.elastic.device import Accelerator
from hw.elastic.model import ElasticModel
from hw.engine.clock import RealClock, check_clock
from hw.engine.hw_engine import HwEngine, check_config, check_gpu
from hw.engine.iteration_log import passes_table
from hw.engine.prompts import DEFAULT_TEXT, read_prompts
from hw.replay.channel_order import CHANNEL_TEXT, order_channels
from sim.config import ReplayConfig, build, one_thread, run_command
from sim.cost.model_spec import ModelSpec
from sim.engine.pricing_executor import PricingExecutor
from sim.engine.server_spec import ServerSpec
from sim.errors import ModelError
from sim.policies import Policy, plans_of
from sim.replay.run import build_parts, run_replay
from sim.results.run_folder import write_json, write_parquet


@dataclass(kw_only=True)
class HardwareConfig:
    """Keys that only a real run needs.

    checkpoint: weights and tokenizer: a local folder in Hugging Face's format, a hub id, or smollm2_135m; null takes
        the folder of model.config for model=hf, and the model's name for all others. random:SEED makes random weights
        for any model: times and memory are real, tokens and quality mean nothing. The model sets the type of the
        weights: bfloat16 for 2 bytes per weight, float32 for 4.
    device: cpu, cuda, cuda:N or auto. threads: of PyTorch on a CPU.
    attention: which code computes attention: auto, flashinfer, flash_attn, triton or sdpa (PyTorch's own).
    cuda_graphs: record decode passes that recur on a GPU, and replay them.
    clock: wall, or cpu for processor seconds on a shared machine without a GPU (idle time is then always skipped).
    skip_idle: let the clock jump over time in which nothing runs.
    text: the file that prompts are cut from, a path or one under RAP_LAB_DATA; null samples random token ids.
    channel_text: the text that puts the channels of FFN blocks in order of importance, if the first plan or one that
        the policy lists cuts them; null keeps the order of the checkpoint and a bias of zeros, as random weights do.
    to_eos: end a request at the model's end of text instead of the trace's length.
    """

    checkpoint: str | None = None
    device: str = "auto"
    threads: int = 1
    attention: str = "auto"
    cuda_graphs: bool = True
    clock: str = "wall"
    skip_idle: bool = False
    text: str | None = DEFAULT_TEXT
    channel_text: str | None = CHANNEL_TEXT
    to_eos: bool = False


@dataclass(kw_only=True)
class HwReplayConfig(ReplayConfig):
    """A replay on the real model."""

    hw: HardwareConfig = field(default_factory=HardwareConfig)


ConfigStore.instance().store(name="hw_replay_schema", node=HwReplayConfig)


def load_elastic(model: ModelSpec, hw: Any, node: Any = None) -> tuple[ElasticModel, Any]:
    """Load the checkpoint of a model description in the type it states; return the model and its tokenizer.

    Args:
        model: the description. hw: a HardwareConfig. node: the ``model`` of the configuration (``checkpoint_of``).
    Raises:
        ModelError: when the shape of the checkpoint differs from the description.
        ConfigError: for a clock that cannot time the device, or an unknown way to compute attention.
    """
    dtype = "float32" if model.weight_dtype_bytes == 4 else "bfloat16"
    torch.set_num_threads(int(hw.threads))
    check_clock(hw.clock, pick_device(hw.device).type)
    check_attention(hw.attention)
    checkpoint = checkpoint_of(node, hw.checkpoint, model.name)
    elastic, tokenizer = load_weights(checkpoint, model, dtype=dtype, device=hw.device, config=config_of(node))
    found = replace(elastic.spec, max_context_tokens=model.max_context_tokens)
    if found != model:
        raise ModelError(
            f"the checkpoint {checkpoint} is {found}, but model= describes {model}; choose the "
            "model that describes it, or hw.checkpoint= of that model"
        )
    return elastic, tokenizer


def build_hw_engine(cfg: DictConfig) -> tuple[HwEngine, Policy]:
    """Load the model of a configuration; build the real engine and the policy."""
    check_config(build(cfg.engine))
    check_gpu(build(cfg.gpu))
    return engine_over(cfg, *load_elastic(build(cfg.model), cfg.hw, cfg.model))


def engine_over(
    cfg: DictConfig, elastic: ElasticModel, tokenizer: Any, *, quality_by_table: bool = False
) -> tuple[HwEngine, Policy]:
    """Build the real engine of a configuration over a model that ``load_elastic`` loaded, and the policy.

    quality_by_table: charge requests what the table says even where the weights are random.
    """
    parts = build_parts(cfg)
    check_gpu(parts.gpu)
    order_channels(elastic, tokenizer, parts.policy, cfg.hw.channel_text)
    stop = tokenizer.eos_token_id if cfg.hw.to_eos else None
    engine = HwEngine(
        elastic=elastic,
        config=parts.config,
        plan=parts.policy.first_plan,
        budget_bytes=parts.budget,
        workspace_bytes=int(cfg.workspace_bytes),
        prompts=read_prompts(cfg.hw.text, tokenizer, parts.model.vocab_size, cfg.seed),
        clock=RealClock(cfg.hw.clock, skip_idle=cfg.hw.skip_idle),
        ends=None if stop is None else lambda _, token: token == stop,
        quality_nll=parts.server.quality_nll if quality_by_table or not elastic.note else None,
        plans=plans_of(parts.policy),
        attention=cfg.hw.attention,
        cuda_graphs=bool(cfg.hw.cuda_graphs),
        prices=prices_of(parts.server),
    )
    return engine, parts.policy


def prices_of(server: ServerSpec) -> PricingExecutor | None:
    """Return what the calibration of a server expects of iterations; None without a calibration."""
    if server.latency is None:
        return None
    copying = server.copying()
    return PricingExecutor(
        server.latency,
        copying.slowdown,
        copying.host_to_device_bytes_per_s,
        model=server.model,
        copy_layer_s=copying.layer_s,
    )


def hardware(engine: HwEngine, cfg: DictConfig) -> dict[str, Any]:
    """Return the content of ``hardware.json``: device, clock, and memory as predicted, allocated and used."""
    rows, device = engine.memory_rows(), engine.elastic.hardware
    on_cpu = f"{platform.machine()} CPU, {cfg.hw.threads} thread(s)"
    return {
        "device": device.name if isinstance(device, Accelerator) else on_cpu,
        "processor": device.name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "clock": cfg.hw.clock,
        "skip_idle": bool(cfg.hw.skip_idle or cfg.hw.clock == "cpu"),
        "attention": engine.attention.name,
        "notes": engine.notes,
        "out_of_memory": engine.out_of_memory,
        "peak_predicted_bytes": max((row.predicted_bytes for row in rows), default=0),
        "peak_allocated_bytes": max((row.allocated_bytes for row in rows), default=0),
        "busy_s": engine.busy_s,
        "priced_s": engine.priced_s,
        "largest_difference_bytes": max((abs(row.allocated_bytes - row.predicted_bytes) for row in rows), default=0),
        "weights_note": engine.elastic.note or None,
        "stored_weight_bytes": engine.elastic.stored_bytes,
        "in_use_at_start_bytes": engine.memory.start_bytes,
        "peak_in_use_bytes": engine.memory.peak_bytes,
    }


def write_hardware(folder: Path, engine: HwEngine, cfg: DictConfig) -> None:
    """Write what only a run of the real engine leaves: ``hardware.json`` and ``passes.parquet``."""
    write_json(folder / "hardware.json", hardware(engine, cfg))
    write_parquet(folder / "passes.parquet", passes_table(engine.shapes(), engine.iterations()))


@contextmanager
def interrupt_between_iterations(engine: HwEngine) -> Iterator[None]:
    """Let Ctrl-C end a run between two iterations; a second Ctrl-C ends it at once."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        engine.interrupt()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_hw_replay(cfg: DictConfig) -> dict[str, Any]:
    """Replay on the real model, write the run folder, print the table; return the summary."""
    engine, policy = build_hw_engine(cfg)
    try:
        with interrupt_between_iterations(engine):
            return run_replay(
                cfg,
                lambda _: (engine, policy),
                progress_steps=lambda requests: min(requests, 200),
                note=engine.elastic.note,
            )
    finally:
        try:
            write_hardware(Path(HydraConfig.get().runtime.output_dir), engine, cfg)
        finally:
            engine.close()


def main() -> None:
    """Run ``python -m hw.replay``."""
    one_thread()
    run_command(run_hw_replay, "hw_replay")
