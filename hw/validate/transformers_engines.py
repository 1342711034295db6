"""The real engine against what a user would pick instead: Transformers' ``generate`` and its continuous batching.

    rows = compare(model, "cpu", batches=(1, 8, 32))

All serve the same prompts with the same model, one after another in each round, and each keeps the best of its rounds:
what else the machine does only makes a round slower. On a CPU, seconds are those of the process: others share the
machine. All prompts are equally long, which is the best case of ``generate``: it pads no row.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from hw.elastic.device import Accelerator, device_of
from hw.elastic.model import ElasticModel
from hw.engine.hw_engine import HwEngine
from sim.cost.memory import budget_for_kv_blocks, kv_blocks
from sim.cost.plan import dense_plan
from sim.engine.protocol import EngineConfig, Request
from sim.engine.scheduler import Limits
from sim.errors import ModelError
from sim.progress import progress

OURS, GENERATE, CONTINUOUS = "hw.engine", "generate", "generate_batch"
ENGINES = (OURS, GENERATE, CONTINUOUS)
KV_BLOCK_TOKENS = 16
TICK_S = 0.1
GPU_WORKSPACE_BYTES = 4_000_000_000
"""What a pass over all prompts takes besides weights and KV; on a CPU nothing counts it."""

Run = Callable[[list[list[int]]], "Served"]
"""Serves prompts, all submitted at once."""
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Served:
    """What a run of one engine gave: the tokens of each request, and the seconds from the start to each of them."""

    tokens: list[list[int]]
    token_s: list[list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One engine at one batch size, the best of its rounds.

    tokens_per_s: output tokens of all requests by the time of the last one, the prompts' time included.
    tpot_ms: mean time between the tokens of a request. ttft_ms: mean time to its first token.
    same_tokens: share of tokens up to the first one that differs from those of ``generate``.
    """

    engine: str
    batch: int
    tokens_per_s: float
    tpot_ms: float
    ttft_ms: float
    same_tokens: float


def compare(
    model: Any,
    device: str | torch.device,
    *,
    batches: Sequence[int] = (1, 8, 32),
    prompt_tokens: int = 128,
    output_tokens: int = 64,
    rounds: int = 3,
    seed: int = 0,
    engines: Sequence[str] = ENGINES,
) -> list[Row]:
    """Serve the same prompts with each engine; return one row for each batch size and engine.

    Args:
        model: a causal language model of transformers; it stays as it is, and the real engine gets a copy.
        device: where both run.
        batches: how many requests run at once. prompt_tokens, output_tokens: of each request.
        rounds: how often each engine serves them; the first of each also warms it up.
        seed: of the prompts. engines: some of ``ENGINES``.
    """
    place = torch.device(device)
    model = model.to(place).eval()
    generator = torch.Generator().manual_seed(seed)
    clock: Clock = time.process_time if place.type == "cpu" else time.perf_counter
    made: dict[str, Run] = {}
    if OURS in engines:
        elastic = ElasticModel(copy.deepcopy(model))
        made[OURS] = lambda prompts: _run_ours(elastic, prompts, output_tokens, clock)
    if GENERATE in engines:
        made[GENERATE] = lambda prompts: _run_generate(model, prompts, output_tokens, clock)
    if CONTINUOUS in engines:
        made[CONTINUOUS] = lambda prompts: _run_continuous(model, prompts, output_tokens, clock)
    rows = []
    with progress("comparing engines", len(batches) * rounds, "rounds") as report:
        for number, batch in enumerate(batches):
            prompts = torch.randint(3, model.config.vocab_size, (batch, prompt_tokens), generator=generator).tolist()
            served: dict[str, list[Served]] = {name: [] for name in made}
            for index in range(rounds):
                for name, run in made.items():
                    served[name].append(run(prompts))
                report(number * rounds + index + 1)
            reference = served.get(GENERATE, served[next(iter(made))])[0]
            rows += [_row(name, batch, runs, reference) for name, runs in served.items()]
    return rows


def _row(engine: str, batch: int, runs: Sequence[Served], reference: Served) -> Row:
    produced = sum(len(tokens) for tokens in runs[0].tokens)
    same = sum(
        next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
        for mine, other in zip(runs[0].tokens, reference.tokens, strict=True)
    )
    return Row(
        engine=engine,
        batch=batch,
        tokens_per_s=max(produced / max(times[-1] for times in run.token_s) for run in runs),
        tpot_ms=min(_mean((t[-1] - t[0]) / max(len(t) - 1, 1) for t in run.token_s) for run in runs) * 1e3,
        ttft_ms=min(_mean(t[0] for t in run.token_s) for run in runs) * 1e3,
        same_tokens=same / produced,
    )


def _mean(values: Any) -> float:
    found = list(values)
    return float(sum(found) / len(found))


def _run_ours(elastic: ElasticModel, prompts: list[list[int]], output_tokens: int, clock: Clock) -> Served:
    count, length = len(prompts), len(prompts[0])
    spec, plan = elastic.spec, dense_plan(elastic.spec)
    # As many tokens at once as the others take: all prompts.
    limits = Limits(max_batch_tokens=max(count * length, 2048), max_running=count)
    config = EngineConfig(scheduler="chunked", limits=limits, kv_block_tokens=KV_BLOCK_TOKENS)
    blocks = (count + 1) * kv_blocks(length + output_tokens + 1, KV_BLOCK_TOKENS)
    workspace_bytes = GPU_WORKSPACE_BYTES if isinstance(elastic.hardware, Accelerator) else 0
    token_s: list[list[float]] = [[] for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    start_s = 0.0

    def on_token(request_id: int, token: int | None, last: bool) -> None:
        assert token is not None
        tokens[request_id].append(token)
        token_s[request_id].append(clock() - start_s)

    engine = HwEngine(
        elastic=elastic,
        config=config,
        plan=plan,
        budget_bytes=budget_for_kv_blocks(spec, plan, blocks, workspace_bytes, KV_BLOCK_TOKENS),
        workspace_bytes=workspace_bytes,
        prompts=lambda request_id, _: prompts[request_id],
        on_token=on_token,
        plans=[plan],
    )
    try:
        start_s = clock()
        engine.submit(
            [
                Request(request_id=i, arrival_s=0.0, prompt_tokens=length, output_tokens=output_tokens)
                for i in range(count)
            ]
        )
        until_s = 0.0
        while not engine.drained:
            until_s += TICK_S  # an engine that is drained waits until then
            engine.run_until(until_s)
    finally:
        engine.close()
    return Served(tokens, token_s)


def _generation(output_tokens: int) -> Any:
    from transformers import GenerationConfig

    # No end of text: every request produces as many tokens.
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=output_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
    )


def _run_generate(model: Any, prompts: list[list[int]], output_tokens: int, clock: Clock) -> Served:
    from transformers import StoppingCriteriaList

    device = device_of(model.device)
    step_s: list[float] = []
    ids = torch.tensor(prompts, device=model.device)

    def after_a_token(ids: Any, scores: Any, **_: Any) -> Any:
        device.synchronize()
        step_s.append(clock() - start_s)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    start_s = clock()
    with torch.inference_mode():
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_generation(output_tokens),
            stopping_criteria=StoppingCriteriaList([after_a_token]),
        )
    return Served(made[:, ids.shape[1] :].tolist(), [step_s] * len(prompts))


def _run_continuous(model: Any, prompts: list[list[int]], output_tokens: int, clock: Clock) -> Served:
    requests: Any = import_module("transformers.generation.continuous_batching.requests")
    implementation = model.config._attn_implementation
    theirs = requests.time  # the module from which it takes the times of tokens
    requests.time = SimpleNamespace(perf_counter=clock, time=time.time, sleep=time.sleep)
    try:
        made = model.generate_batch(
            prompts,
            generation_config=_generation(output_tokens),
            continuous_batching_config=_continuous_batching(model, prompts, output_tokens),
            record_timestamps=True,
        )
    finally:
        requests.time = theirs
        model.set_attn_implementation(implementation)
    results = sorted(made.values(), key=lambda one: int("".join(filter(str.isdigit, one.request_id))))
    if failed := [str(one.error) for one in results if len(one.generated_tokens) != output_tokens]:
        raise ModelError(f"generate_batch of transformers failed: {' '.join(failed[0].split())[:300]}")
    start_s = min(one.lifespan[0] for one in results)  # when the first request is scheduled: without its warm-up
    return Served(
        [list(one.generated_tokens) for one in results],
        [[at_s - start_s for at_s in one.timestamps] for one in results],
    )


def _continuous_batching(model: Any, prompts: list[list[int]], output_tokens: int) -> Any:
    """Return its settings: its own on a GPU; on a CPU, where it would take all memory for its cache, what it needs."""
    if model.device.type != "cpu":
        return None
    from transformers import ContinuousBatchingConfig

    settings = ContinuousBatchingConfig()
    count, length = len(prompts), len(prompts[0])
    settings.num_blocks = count * (kv_blocks(length + output_tokens, settings.page_size) + 1)
    settings.max_batch_tokens = max(count * length, 256)
    return settings
