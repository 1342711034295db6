"""What a step of the check-up works with: the device, the model, how much to do, and where files go."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sim.config import build, compose_config
from sim.cost.memory import budget_for_kv_blocks, kv_blocks
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import dense_plan
from sim.results.run_folder import write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much each step does.

    copied_bytes: of the arrays whose copies are timed. workspace_bytes: of the engine.
    trace, engine: overrides of the replays. kv_tokens: that the budget of a replay holds at first and at the end, and
    in the middle third.
    requests: of the step that shrinks the budget. streams: requests to the server.
    calibration: overrides of ``hw.calibrate``. tests: arguments of pytest. long: whether to run the largest shapes.
    """

    copied_bytes: int
    workspace_bytes: int
    trace: tuple[str, ...]
    engine: str
    kv_tokens: tuple[int, int]
    requests: int
    prompt_tokens: int
    output_tokens: int
    streams: int
    calibration: tuple[str, ...]
    tests: tuple[str, ...]


GPU = Size(
    copied_bytes=1 << 30,
    workspace_bytes=2_000_000_000,
    trace=("trace=burst", "trace.duration_s=10", "trace.rate_rps=5"),
    engine="vllm_v1",
    kv_tokens=(40_000, 6_000),
    requests=48,
    prompt_tokens=512,
    output_tokens=96,
    streams=200,
    calibration=(),
    tests=("-m", "gpu", "tests/hw/engine", "tests/hw"),
)
CPU = Size(
    copied_bytes=64 << 20,
    workspace_bytes=100_000_000,
    trace=(
        "trace=small",
        "trace.duration_s=8",
        "trace.on_rate_rps=15",
        "trace.lengths.prompt_tokens_p50=64",
        "trace.lengths.output_tokens_p50=10",
    ),
    engine="small",
    kv_tokens=(1_536, 320),
    requests=12,
    prompt_tokens=48,
    output_tokens=12,
    streams=40,
    calibration=(),
    tests=("-m", "not gpu and not slow", "tests/hw/engine/test_on_devices.py"),
)
SHORT = Size(
    copied_bytes=1 << 20,
    workspace_bytes=1_000_000,
    trace=("trace=small", "trace.duration_s=2", "trace.on_rate_rps=4", "trace.lengths.output_tokens_p50=6"),
    engine="small",
    kv_tokens=(1_536, 400),
    requests=6,
    prompt_tokens=24,
    output_tokens=8,
    streams=10,
    calibration=("grid.tokens=32", "grid.batch=4", "grid.context=64"),
    tests=("-m", "not gpu and not slow", "tests/hw/engine/test_on_devices.py", "-k", "bf16"),
)
SIZES = {"gpu": GPU, "cpu": CPU, "short": SHORT}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every step gets.

    device: a name of torch. size: a key of ``SIZES``. overrides: of model, GPU and hardware, as all commands take them.
    checkpoint: of the weights. work: where steps leave their files. out: where results go. limit_s: of the step.
    """

    device: str
    size: str
    checkpoint: str
    overrides: tuple[str, ...]
    work: str
    out: str
    seed: int = 0
    limit_s: float = 60.0

    @classmethod
    def read(cls, path: Path) -> Setup:
        """Read what ``write`` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(**content | {"overrides": tuple(content["overrides"])})

    def write(self, path: Path) -> None:
        """Write it for the process of a step."""
        write_json(path, asdict(self))

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    @property
    def amounts(self) -> Size:
        """How much to do."""
        return SIZES[self.size]

    def folder(self, name: str) -> Path:
        """Return a folder for the files of a step."""
        return Path(self.work) / name

    def config(self, command: str = "hw_replay", *more: str) -> DictConfig:
        """Return the configuration of a command of the real engine, with further overrides."""
        import hw.replay.run  # noqa: F401 - registers the keys; late, as only a step's process has torch

        clock = "wall" if self.on_gpu else "cpu"  # a CPU may be shared
        hardware = [f"hw.device={self.device}", "hw.text=null", "hw.skip_idle=true", f"hw.clock={clock}"]
        common = [f"engine={self.amounts.engine}", f"workspace_bytes={self.amounts.workspace_bytes}"]
        return compose_config(command, [*hardware, *common, *self.overrides, f"seed={self.seed}", *more])

    @cached_property
    def model(self) -> ModelSpec:
        """The served model."""
        spec: ModelSpec = build(self.config().model)
        return spec

    @cached_property
    def gpu(self) -> Any:
        """The device's description."""
        return build(self.config().gpu)

    def budget_bytes(self, kv_tokens: int) -> int:
        """Return the bytes of dense weights, the workspace, and the KV of ``kv_tokens`` tokens."""
        spec, block_tokens = self.model, build(self.config().engine).kv_block_tokens
        blocks = kv_blocks(kv_tokens, block_tokens)
        return budget_for_kv_blocks(spec, dense_plan(spec), blocks, self.amounts.workspace_bytes, block_tokens)

    def loaded(self) -> tuple[Any, Any]:
        """Load the model onto the device; return it and its tokenizer."""
        from hw.replay.run import load_elastic

        cfg = self.config()
        return load_elastic(self.model, cfg.hw, cfg.model)

    @property
    def calibration(self) -> Path:
        """Where the step that calibrates writes its file."""
        return Path(self.out) / f"{self.model.name}_{self.gpu.name}.json"
