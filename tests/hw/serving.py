"""Small real engines for tests: a tiny random model, and a clock that gives every iteration the simulator's price."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the real engine needs torch: pip install -e '.[hw]'")
transformers = pytest.importorskip("transformers", reason="the real engine needs transformers: pip install -e '.[hw]'")

from hw.elastic.copies import LayerCopier  # noqa: E402
from hw.elastic.model import ElasticModel  # noqa: E402
from hw.engine.hw_engine import HwEngine  # noqa: E402
from hw.engine.prompts import Prompts, RandomPrompts  # noqa: E402
from sim.cost.latency import LatencyModel, calibration_from_dict  # noqa: E402
from sim.cost.memory import budget_for_kv_blocks  # noqa: E402
from sim.cost.model_spec import ModelSpec  # noqa: E402
from sim.cost.plan import Plan, dense_plan  # noqa: E402
from sim.engine.budget import Budget  # noqa: E402
from sim.engine.protocol import EngineConfig, Request  # noqa: E402
from sim.engine.scheduler import Limits  # noqa: E402
from sim.engine.transition import LayerCopy  # noqa: E402
from tests.hw.tiny_models import LAYERS, VOCABULARY, tiny  # noqa: E402, F401 - tests import them from here too

torch.set_num_threads(1)

HOST_TO_DEVICE_BYTES_PER_S = 1e5


def save_checkpoint(folder: Path, family: str = "llama", *, tokenizer: bool = True) -> Path:
    """Write a tiny random model as a checkpoint folder, with a tokenizer of the words ``w0``, ``w1``, ..."""
    tiny(family).save_pretrained(folder)
    if tokenizer:
        tokenizers = pytest.importorskip("tokenizers")
        vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


@lru_cache
def tiny_spec() -> ModelSpec:
    return ElasticModel(tiny(), name="tiny").spec


@lru_cache
def flat_latency(fixed_us: float = 1e6, token_us: float = 3e4) -> LatencyModel:
    """Return prices that depend on the tokens of an iteration alone: ``fixed + token * tokens``."""
    return calibration_from_dict(flat_latency_content(fixed_us, token_us))


def flat_latency_content(fixed_us: float, token_us: float) -> dict[str, Any]:
    """Return the calibration file of ``flat_latency``."""
    zeros = [0.0, 0.0]
    surface = {"context": [1, 2], "us": [zeros, zeros]}
    return {
        "schema": 1,
        "name": "flat",
        "model": "tiny",
        "device": "none",
        "kind": "measured",
        "fixed_us": fixed_us,
        "fixed_source": "a test",
        "errors": {},
        "validation": "",
        "sources": [],
        "notes": [],
        "tables": {
            "tokens": [1, 4096],
            "linear_us": {str(bits): {"mha": zeros, "ffn": zeros} for bits in (16, 8, 4)},
            "token_us": [token_us, 4096 * token_us],
            "sequences": [1, 2],
            "head_us": zeros,
            "prefill_attention": {"tokens": [1, 2], **surface},
            "decode_attention": {"batch": [1, 2], **surface},
        },
    }


class PricedClock:
    """A clock that advances only by waiting and by the price of each iteration."""

    def __init__(self, latency: LatencyModel, plan: Plan) -> None:
        self.time_s = 0.0
        self.source = lambda: 0.0  # copies take no time of a thread; a copier says how long they take
        self._latency, self._plan = latency, plan

    def now_s(self) -> float:
        return self.time_s

    def wait_until(self, time_s: float) -> None:
        self.time_s = max(self.time_s, time_s)

    def ran(self, prefill_tokens: int, decodes: int, contexts: int) -> None:
        chunks = [(prefill_tokens, 0)] if prefill_tokens else []
        self.time_s += self._latency.iteration_s(self._plan, chunks, decodes, contexts, 1, qkv_share=1.0)


class TimedCopier(LayerCopier):
    """Copies that take as long as in the simulator."""

    def __init__(self, elastic: ElasticModel, clock: PricedClock) -> None:
        super().__init__(elastic)
        self._priced, self._end_s = clock, 0.0

    def start(self, copy: LayerCopy) -> None:
        super().start(copy)
        self._end_s = self._priced.now_s() + copy.copied_bytes / HOST_TO_DEVICE_BYTES_PER_S

    def complete(self) -> bool:
        return self._priced.now_s() >= self._end_s

    def wait(self, timeout_s: float) -> float:
        self._priced.wait_until(min(self._end_s, self._priced.now_s() + timeout_s))
        return 0.0  # the clock stands where it should


def engine_config(
    scheduler: str = "chunked",
    *,
    max_batch_tokens: int = 24,
    max_running: int = 6,
    kv_block_tokens: int = 4,
    restore: str = "new_requests",
    **more: Any,
) -> EngineConfig:
    limits = {k: more.pop(k) for k in ("long_prefill_tokens", "reserve_full_prompt") if k in more}
    return EngineConfig(
        scheduler=scheduler,  # type: ignore[arg-type]
        limits=Limits(max_batch_tokens=max_batch_tokens, max_running=max_running, **limits),
        kv_block_tokens=kv_block_tokens,
        restore=restore,  # type: ignore[arg-type]
        **more,
    )


def hw_engine(
    *,
    family: str = "llama",
    config: EngineConfig | None = None,
    plan: Plan | None = None,
    kv_blocks: int = 200,
    budget: Budget | None = None,
    timed: bool = True,
    kind: type[HwEngine] = HwEngine,
    own_prompts: Prompts | None = None,
    copies: Callable[[ElasticModel], LayerCopier] | None = None,
    ordered: bool = False,
    **more: Any,
) -> HwEngine:
    """Return an engine over a tiny model, on the priced clock if ``timed``; ``copies`` makes its copier.

    ordered: whether its plans may cut FFN blocks, whose channels keep the order of the checkpoint.
    """
    elastic = ElasticModel(tiny(family), name="tiny")
    if ordered:
        elastic.order_channels()
    config = config or engine_config()
    plan = plan or dense_plan(elastic.spec)
    if timed:
        clock = PricedClock(flat_latency(), plan)
        more |= {"clock": clock, "copier": TimedCopier(elastic, clock)}
    if copies is not None:
        more["copier"] = copies(elastic)
    return kind(
        elastic=elastic,
        config=config,
        plan=plan,
        budget_bytes=budget or budget_for_kv_blocks(elastic.spec, plan, kv_blocks, 0, config.kv_block_tokens),
        prompts=own_prompts or RandomPrompts(VOCABULARY),
        **more,
    )


def requests(rows: Sequence[tuple[float, int, int]]) -> list[Request]:
    """``(arrival_s, prompt_tokens, output_tokens)`` rows as requests."""
    return [
        Request(request_id=i, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
        for i, (arrival_s, prompt, output) in enumerate(rows)
    ]
