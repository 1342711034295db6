"""Random requests, plans and budgets for tests of the real engine, and what plain models answer to the requests."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import numpy as np

from hw.elastic.copies import LayerCopier
from hw.elastic.model import ElasticModel
from hw.engine.hw_engine import HwEngine
from hw.engine.prompts import RandomPrompts
from hw.engine.torch_executor import TorchExecutor
from sim.cost.ffn_width import FFN_WIDTHS
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.plan import KeepMask, KVKeep, check_plan, dense_plan
from sim.engine.budget import Budget
from sim.engine.executor import Iteration
from sim.engine.transition import LayerCopy
from sim.policies.schedule import Schedule
from sim.traces.trace import Trace
from tests.hw.elastic.test_model import plain_logits
from tests.hw.serving import LAYERS, VOCABULARY, requests, tiny, tiny_spec, torch, transformers

Rows = list[tuple[float, int, int]]
"""Arrival, prompt and output tokens of each request."""
RESTORES = ("new_requests", "recompute")


def some_rows(seed: int, count: int, longest_prompt: int = 40, longest_output: int = 12) -> Rows:
    rng = random.Random(seed)
    at_s = 0.0
    rows = []
    for _ in range(count):
        at_s += rng.choice((0.0, 0.0, 0.4, 2.0))
        rows.append((at_s, rng.randint(1, longest_prompt), rng.randint(1, longest_output)))
    return rows


def serve(engine: HwEngine, rows: Rows) -> list[list[int]]:
    """Serve until nothing is left; check after every iteration that all memory is accounted for."""
    engine.submit(requests(rows))
    looks = 0
    while not engine.drained:
        looks += 1
        state = engine.run_until(0.7 * looks)
        engine.check()
        assert state.kv_used_layer_blocks <= state.kv_layer_blocks
    return [engine.tokens(i) for i in range(len(rows))]


def plain_tokens(family: str, rows: Rows) -> list[list[int]]:
    """Return what ``generate`` of the plain model gives for each request alone."""
    return [list(tokens) for tokens in _plain_tokens(family, tuple(rows))]


@cache
def _plain_tokens(family: str, rows: tuple[tuple[float, int, int], ...]) -> list[list[int]]:
    model, prompts = tiny(family), RandomPrompts(VOCABULARY)
    made = []
    for i, (_, prompt, output) in enumerate(rows):
        ids = torch.tensor([prompts(i, prompt)])
        config = transformers.GenerationConfig(
            max_new_tokens=output, min_new_tokens=output, do_sample=False, pad_token_id=0
        )
        with torch.inference_mode():
            generated = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        made.append(generated[0, prompt:].tolist())
    return made


def trace_of(rows: Rows) -> Trace:
    arrival_s, prompt, output = (np.array(column) for column in zip(*rows, strict=True))
    return Trace(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)


class AuditedExecutor(TorchExecutor):
    """An executor that compares every other token with a plain model, gated position by position as the request ran.

    The gates of the plain model say which MHA and FFN blocks each position ran; attention then reads earlier keys as
    they were made. That states the KV hole, stage-wise masks and recomputation without any cache.
    """

    audited = 0

    def forward(self, iteration: Iteration) -> dict[int, int]:
        self._seen: dict[int, list[tuple[frozenset[int], tuple[bool, ...]]]] = getattr(self, "_seen", {})
        chosen = super().forward(iteration)
        plan = iteration.plan
        work = [(live, 1, plan.decode.ffn) for live in iteration.decodes]
        work += [(live, tokens, plan.prefill.ffn) for live, tokens in iteration.prefills]
        for live, tokens, ffn in work:
            seen = self._seen.setdefault(live.request_id, [])
            del seen[live.computed_tokens :]
            # In a layer of kv_only the keys of all are made, but only the last token of a prompt gains anything.
            writes = frozenset(layer for layer, flag in enumerate(plan.kv_only) if flag and not live.decoding)
            whole = live.computed_tokens + tokens == live.target_tokens
            little = live.mha - writes, tuple(runs and layer not in writes for layer, runs in enumerate(ffn))
            seen += [little] * (tokens - whole) + [(live.mha, ffn)] * whole
            token = chosen.get(live.request_id)
            if token is None or live.produced_tokens % 2:  # every other token: plain passes are slow
                continue
            mha_gates = torch.tensor([[float(layer in mha) for mha, _ in seen] for layer in range(LAYERS)])
            ffn_gates = torch.tensor([[float(ffn[layer]) for _, ffn in seen] for layer in range(LAYERS)])
            # A block counts for a later token's KV hole too: what a request lost, none of its tokens runs again.
            logits = plain_logits(Audited.plain, self.tokens_of(live)[: len(seen)], mha_gates, ffn_gates)
            assert logits[-1, token] >= logits[-1].max() - 1e-3
            self.audited += 1
        return chosen


class Audited(HwEngine):
    executor_type = AuditedExecutor


def plan_schedule(
    seed: int,
    steps: int,
    *,
    period_s: float = 2.0,
    bits: bool = False,
    kv: bool = False,
    streams: bool = False,
    writes: bool = False,
    cuts: bool = False,
) -> Schedule:
    rng, spec, crossing = random.Random(seed), tiny_spec(), random.Random(-seed - 1)
    writing, cutting = random.Random(-seed - 2), random.Random(-seed - 3)
    plans = [dense_plan(spec)]
    while len(plans) < steps:
        prefill = KeepMask(
            mha=tuple(rng.random() < 0.75 for _ in range(LAYERS)), ffn=tuple(rng.random() < 0.75 for _ in range(LAYERS))
        )
        decode = KeepMask(
            mha=tuple(k and rng.random() < 0.8 for k in prefill.mha),
            ffn=tuple(k and rng.random() < 0.8 for k in prefill.ffn),
        )
        plan = replace(dense_plan(spec), prefill=prefill, decode=decode)
        if bits:
            plan = replace(plan, weight_bits=tuple(rng.choice((16, 8, 4)) for _ in range(LAYERS)))
        if kv:
            keeps = (KVKeep(), KVKeep(first_tokens=2, last_tokens=5), KVKeep(first_tokens=0, last_tokens=9))
            kv_bits = tuple(rng.choice((16, 16, 8, 4)) for _ in range(LAYERS))
            plan = replace(plan, kv_keep=tuple(rng.choice(keeps) for _ in range(LAYERS)), kv_bits=kv_bits)
        if rng.random() < 0.3:
            plan = replace(plan, max_running=3)
        if streams and crossing.random() < 0.6:
            layers = crossing.sample(range(LAYERS), crossing.choice((3, LAYERS)))
            plan = replace(plan, streamed=tuple(layer in layers for layer in range(LAYERS)))
        if writes and writing.random() < 0.7:
            plan = replace(plan, kv_only=tuple(writing.random() < 0.5 for _ in range(LAYERS)))
        if cuts:
            plan = replace(plan, ffn_width=tuple(cutting.choice(FFN_WIDTHS) for _ in range(LAYERS)))
        check_plan(spec, plan)
        plans.append(plan)
    return Schedule(tuple(period_s * i for i in range(steps)), tuple(plans))


def moving_budget(seed: int, kv_blocks: int, *, steps: int = 5) -> Budget:
    rng, spec = random.Random(seed), tiny_spec()
    most = budget_for_kv_blocks(spec, dense_plan(spec), kv_blocks, 0, 4)
    low = budget_for_kv_blocks(spec, dense_plan(spec), kv_blocks // 2, 0, 4)
    values = [most] + [rng.choice((low, low - 40_000, (most + low) // 2, most)) for _ in range(steps)] + [most]
    kept = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
    return Budget(tuple(3.0 * i for i in kept), tuple(values[i] for i in kept), notice_s=1.0)


class HoldingCopier(LayerCopier):
    """Copies that are complete only after ``polls`` checks, as on a GPU: iterations run meanwhile.

    The blocks hold the tensors of the copy from the start, as with a CUDA copy.
    """

    def __init__(self, elastic: ElasticModel, polls: int) -> None:
        super().__init__(elastic)
        self._polls, self._left = polls, 0

    def start(self, copy: LayerCopy) -> None:
        super().start(copy)
        assert self._future is not None
        self._future.result()
        self._left = self._polls

    def complete(self) -> bool:
        self._left -= 1
        return self._left < 0

    def wait(self, timeout_s: float) -> float:
        return 0.0


def assert_blocks_are_as_counted(engine: HwEngine) -> None:
    """Check that every block has the bits that the engine counts, and that a copy under way is still there."""
    resident, copy = engine._changes.resident, engine._changes.copy
    for kind, bits, copied in (
        ("mha", resident.mha_bits, copy.mha_bits if copy is not None else 0),
        ("ffn", resident.ffn_bits, copy.ffn_bits if copy is not None else 0),
    ):
        for layer, (block, counted) in enumerate(zip(engine.elastic.blocks[kind], bits, strict=True)):
            assert block.bits == (0 if resident.streamed[layer] else counted), f"{kind} block {layer}"
            # A copy that the device has refused waits to start again, with nothing pending.
            under_way = engine._changes.copying and copy is not None and copy.layer == layer and copied
            assert (block.pending is not None) == bool(under_way), f"{kind} block {layer}"
