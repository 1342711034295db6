"""The configuration of ``hw.score``, and one measurement: its model, its texts and the file it writes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console

from hw.elastic.checkpoint import SMOLLM2, SMOLLM2_NOTE, load_checkpoint
from hw.elastic.model import ElasticModel
from hw.elastic.text import Windows, differing, read_windows
from hw.score.block_numbers import block_number
from hw.score.score_lists import read_list
from sim.cost.model_spec import file_name
from sim.errors import ConfigError
from sim.json_file import read_json_object
from sim.paths import CHECKOUT, REPOSITORY
from sim.results.run_folder import commit, write_json

SCORES = REPOSITORY / "conf" / "score"
DEFAULT_SAMPLE = (1024, 0)
"""Tokens and seed of the default calibration sample; only other samples appear in the names of files."""


@dataclass(kw_only=True)
class ModelConfig:
    """The measured model.

    path: ``smollm2_135m``, a local folder or a hub id. name: used in file names; empty takes the last part of the path.
    dtype: float32, bfloat16 or float16. device: auto, cpu or cuda.
    """

    path: str = SMOLLM2
    name: str = ""
    dtype: str = "bfloat16"
    device: str = "auto"


@dataclass(kw_only=True)
class TextConfig:
    """A text and the part of it that is used; see ``hw.elastic.text.read_windows``."""

    path: str = ""
    tokens: int | None = None
    window: int = 256
    seed: int | None = None
    keep_newlines: bool = False


@dataclass(kw_only=True)
class GsiConfig:
    """Settings of kind=gsi.

    removals: how many blocks to remove; null removes all.
    compare_every: N; also run and time the naive algorithm in the first round and every N-th after it, from the same
        state. null never does.
    """

    removals: int | None = None
    compare_every: int | None = None


@dataclass(kw_only=True)
class LisConfig:
    """Settings of kind=lis. bits: of the swapped copies. tokens: of calibration; each step runs all layers on them."""

    bits: int = 4
    tokens: int = 128


@dataclass(kw_only=True)
class PdtrimConfig:
    """Settings of kind=cosine and kind=pdtrim.

    threshold: cosine that separates the pruning set from the distillation set.
    sizes: numbers of removals in prefill and in decode, one pair per search. steps: of each search.
    tokens: of calibration. removals: length of the redundancy order.
    """

    threshold: float = 0.95
    sizes: list[list[int]] = field(default_factory=lambda: [[2, 6], [4, 4], [4, 8], [6, 6], [8, 8]])
    steps: int = 40
    tokens: int = 512
    removals: int = 40


@dataclass(kw_only=True)
class AttentionConfig:
    """Settings of kind=attention.

    first_tokens, last_tokens: the tokens whose share of attention counts. threshold: share that makes a layer local.
    """

    first_tokens: int = 4
    last_tokens: int = 32
    threshold: float = 0.9


@dataclass(kw_only=True)
class GenerationConfig:
    """Settings of kind=generation.

    plans: how many plans of the quality table, evenly spread over those under ``times_dense`` times dense perplexity.
    prompt_tokens: length of each prompt. tokens: how many to decode.
    """

    plans: int = 40
    times_dense: float = 4.0
    prompt_tokens: int = 64
    tokens: int = 64


@dataclass(kw_only=True)
class OfflineConfig:
    """Settings of kind=offline_search.

    tokens, window: of each calibration sample, instead of those of ``calibration``.
    samples: the seed of each sample. removals: sizes of the masks that are searched, in ascending order.
    """

    tokens: int = 64
    window: int = 64
    samples: list[int] = field(default_factory=lambda: [0, 1, 2])
    removals: list[int] = field(default_factory=lambda: [4, 8, 12, 20, 30])


@dataclass(kw_only=True)
class CompressionConfig:
    """Settings of kind=kv_compression.

    prompt_tokens: of each window. scored_tokens: those after the prompt; together they replace the configured length.
    windows: of the test text. calibration_windows: of the calibration text, which sets the thresholds of ReFreeKV.
    factors: shares of the bytes of the prompt's KV, in descending order.
    ada_queries: of how many of the prompt's last tokens Ada-KV observes the queries. think_queries: the same of ThinK.
    """

    prompt_tokens: int = 1024
    scored_tokens: int = 128
    windows: int = 12
    calibration_windows: int = 4
    factors: list[float] = field(default_factory=lambda: [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    ada_queries: int = 64
    think_queries: int = 32


@dataclass(kw_only=True)
class WidthConfig:
    """Settings of kind=width.

    tokens: of calibration text that score channels. layers: numbers of layers that are cut, in ascending order.
    mixed: plans whose layers have random widths, which only judge the predicted losses.
    """

    tokens: int = 8192
    layers: list[int] = field(default_factory=lambda: [10, 20])
    mixed: int = 4


@dataclass(kw_only=True)
class ScoreConfig:
    """The configuration of ``python -m hw.score``.

    kind: what to measure. out: the file to write; empty names it by model and kind.
    full_plans: how many plans kind=full_test measures; null takes all of ``chosen_plans``.
    random_orders: how many orders kind=random writes.
    """

    kind: str
    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: TextConfig = field(default_factory=TextConfig)
    test: TextConfig = field(default_factory=TextConfig)
    gsi: GsiConfig = field(default_factory=GsiConfig)
    lis: LisConfig = field(default_factory=LisConfig)
    pdtrim: PdtrimConfig = field(default_factory=PdtrimConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    offline: OfflineConfig = field(default_factory=OfflineConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    width: WidthConfig = field(default_factory=WidthConfig)
    random_orders: int = 3
    full_plans: int | None = None
    out: str = ""
    seed: int = 0


ConfigStore.instance().store(name="score_schema", node=ScoreConfig)


class Job:
    """One measurement: the loaded model, its texts, the file to write, and messages on progress."""

    def __init__(self, cfg: DictConfig) -> None:
        """Load the model of a configuration."""
        self.cfg = cfg
        self.console = Console(stderr=True, highlight=False)
        self.name = model_name(cfg)
        model, self.tokenizer = load_checkpoint(cfg.model.path, dtype=cfg.model.dtype, device=cfg.model.device)
        self.elastic = ElasticModel(model, name=self.name)
        self.rng = np.random.default_rng(cfg.seed)
        self._started = time.perf_counter()
        self._started_cpu = time.process_time()

    def text(self, which: str, tokens: int | None = None, window: int | None = None) -> Windows:
        """Return the windows of the ``calibration`` or the ``test`` text.

        ``tokens``, of all windows, and ``window``, of one, replace the configured numbers.
        """
        text = self.cfg[which]
        try:
            windows = read_windows(
                text.path,
                self.tokenizer,
                tokens=tokens or text.tokens,
                window=window or text.window,
                seed=text.seed,
                keep_newlines=text.keep_newlines,
            )
        except ConfigError as error:
            raise ConfigError(f"{which} text: {error}") from error
        highest = int(windows.tokens.max())
        if highest >= self.elastic.spec.vocab_size:
            raise ConfigError(
                f"the tokenizer gives token {highest}, but {self.name} has {self.elastic.spec.vocab_size} tokens; "
                "save the model's own tokenizer into its checkpoint"
            )
        return windows

    def path(self, kind: str) -> Path:
        """Return the file for a score of this model; an order from another calibration sample has its own file."""
        tokens, seed = self.cfg.calibration.tokens, self.cfg.calibration.seed
        sampled = kind in ("gsi", "one_shot") and (tokens, seed) != DEFAULT_SAMPLE
        sample = f"_{tokens}_seed{seed}" if sampled else ""
        folder = SCORES if CHECKOUT else Path("score")
        return Path(self.cfg.out) if self.cfg.out else folder / f"{self.name}_{kind}{sample}.json"

    def described(self, windows: Windows | None) -> dict[str, Any]:
        """Return what a score was measured on: model, weights, device, text and seed."""
        cfg = self.cfg.model
        return {
            "model": self.name,
            "weights": SMOLLM2_NOTE if cfg.path == SMOLLM2 else cfg.path,
            "dtype": cfg.dtype,
            "device": str(self.elastic.device),
            "text": windows.source if windows is not None else None,
            "seed": self.cfg.seed,
        }

    def earlier(self, path: Path, windows: Windows | None) -> dict[str, Any] | None:
        """Return an unfinished result to continue, or None if there is no file yet.

        Raises:
            ConfigError: if the file was measured on something else.
        """
        if not path.is_file():
            return None
        old = read_json_object(path, ConfigError, "remove the file, or set out=")
        different, unstated = differing(self.described(windows), old)
        if different:
            raise ConfigError(
                f"{path} has the result of another run: {', '.join(different)} differ; remove the file, or set out="
            )
        if unstated:
            self.say(f"note: {path} states no hash of its token ids; it is continued as if they were these")
        return old

    def order(self, kind: str) -> list[int]:
        """Return the order of blocks that another kind has written.

        Raises:
            ConfigError: if it was not measured yet.
        """
        path = SCORES / f"{self.name}_{kind}.json"
        if not path.is_file():
            raise ConfigError(f"no {path.name} in conf/score; run python -m hw.score kind={kind} first")
        return [block_number(str(name)) for name in read_list(path, "order")]

    def write(self, path: Path, windows: Windows | None, source: str, result: Mapping[str, Any]) -> None:
        """Write a score with its source, what it was measured on, and what it cost."""
        spent = {
            "seconds": round(time.perf_counter() - self._started, 1),
            "cpu_seconds": round(time.process_time() - self._started_cpu, 1),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
        }
        write_json(path, {**self.described(windows), "source": source, **spent, **result})
        self.say(f"wrote {path}")

    def say(self, text: str) -> None:
        """Print a line of progress."""
        self.console.print(text, soft_wrap=True)


def model_name(cfg: DictConfig) -> str:
    """Return the name of the model in file names."""
    path = Path(cfg.model.path).expanduser()
    return file_name(cfg.model.name or (path.resolve() if path.is_dir() else path).name)
