"""Layers of ``kv_only`` on the real engine: logits of mixed batches, and losses, against a plain model gated alike."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from hw.elastic.forward import forward
from hw.elastic.kv import RequestKV
from hw.elastic.kv_storage import ArenaStorage
from hw.elastic.model import ElasticModel
from hw.elastic.paged_attention import Packed, PagedBatch
from hw.engine.hw_engine import arena_of
from hw.score.nll import measure, measure_many
from sim.cost.plan import Plan, dense_plan, drop, with_mask
from sim.engine.block_table import BlockTable
from sim.engine.kv_pool import KVPool
from sim.errors import PlanError
from tests.hw.elastic.test_model import close, gates, plain_logits, random_mask, some_tokens
from tests.hw.engine.runs import plain_tokens, serve, some_rows
from tests.hw.serving import LAYERS, engine_config, hw_engine, tiny, tiny_spec, torch
from tests.hw.tiny_models import FAMILIES, SHORT_TOKENS
from tests.sample import quick

EVERY = (True,) * LAYERS
BLOCKS = 400
EVERYWHERE = replace(dense_plan(tiny_spec()), kv_only=EVERY)


class Requests:
    """Requests over one paged pool, and the gates of a plain model that computes what their tokens ran."""

    def __init__(self, family: str = "llama") -> None:
        self.plain = tiny(family)
        self.elastic = ElasticModel(tiny(family), name="tiny")
        self.elastic.most_context_tokens = SHORT_TOKENS
        self._arena = arena_of(self.elastic, BLOCKS, block_tokens=4)
        self._pool = KVPool(BLOCKS, ArenaStorage(self._arena))
        self.tokens: list[list[int]] = []
        self._tables: list[BlockTable] = []
        self._done: list[int] = []
        self._gained: list[list[tuple[bool, ...]]] = []

    def add(self, tokens: list[int]) -> int:
        """Add a request; return its number."""
        self.tokens.append(tokens)
        self._tables.append(BlockTable(mha=frozenset(range(LAYERS)), block_tokens=4))
        self._done.append(0)
        self._gained.append([])
        return len(self.tokens) - 1

    def run(
        self, decodes: list[int], prompts: list[tuple[int, int, bool]], kv_only: tuple[bool, ...]
    ) -> list[torch.Tensor]:
        """Run the next token of some requests, and chunks (request, tokens, whether it ends) of others."""
        packed, wanted, row = [], list(range(len(decodes))), len(decodes)
        for request, count, ends in [*((request, 1, True) for request in decodes), *prompts]:
            start = self._done[request]
            self._tables[request].hold(self._pool, start + count)
            packed.append(Packed(self._tables[request], self.tokens[request][start : start + count], start))
            self._done[request] += count
            little = EVERY if request in decodes else tuple(not flag for flag in kv_only)
            self._gained[request] += [little] * (count - ends) + [EVERY] * ends
        for _, count, ends in prompts:
            row += count
            wanted += [row - 1] if ends else []
        split = len(decodes)
        batch = PagedBatch(self._arena, packed[:split], packed[split:], self.elastic.windows, wanted, kv_only=kv_only)
        keep = dense_plan(self.elastic.spec).decode
        return list(forward(self.elastic, batch, prefill=keep, decode=keep))

    def expected(self, request: int) -> torch.Tensor:
        """Return the logits of the last token of a request that has run, by the plain model."""
        gained = torch.tensor(self._gained[request]).float().T
        return plain_logits(self.plain, self.tokens[request][: self._done[request]], gained, gained)[-1]


@pytest.mark.parametrize("family", quick(FAMILIES, 4))
@pytest.mark.parametrize("seed", range(2))
def test_logits_of_mixed_batches_are_those_of_a_plain_model_gated_alike(family: str, seed: int) -> None:
    rng = random.Random(seed)
    served = Requests(family)
    waiting = [served.add(some_tokens(rng.randint(1, 30), seed=i)) for i in range(8)]
    left = {request: len(served.tokens[request]) for request in waiting}
    running: list[int] = []
    looked = 0
    while waiting or rng.random() < 0.7:
        kv_only = tuple(rng.random() < 0.5 for _ in range(LAYERS))
        decodes = rng.sample(running, rng.randint(0, min(3, len(running))))
        for request in decodes:
            served.tokens[request].append(rng.randint(1, 90))
        chunks = []
        for request in waiting[:2]:
            count = rng.randint(1, left[request])
            chunks.append((request, count, count == left[request]))
        if not decodes and not chunks:
            continue
        ended = [request for request, _, ends in chunks if ends]
        logits = served.run(decodes, chunks, kv_only)
        assert len(logits) == len(decodes) + len(ended)
        for request, found in zip([*decodes, *ended], logits, strict=True):
            close(found, served.expected(request))
            looked += 1
        for request, count, _ in chunks:
            left[request] -= count
        waiting = [request for request in waiting if left[request]]
        running += ended
    assert looked > 8


def test_the_field_off_changes_no_bit() -> None:
    found = []
    for kv_only in ((), (False,) * LAYERS):
        served = Requests()
        one, two = served.add(some_tokens(9, seed=1)), served.add(some_tokens(7, seed=2))
        first = served.run([], [(one, 8, True)], kv_only)
        found.append(torch.stack([*first, *served.run([one], [(two, 7, True)], kv_only)]))
    assert torch.equal(*found)


def test_a_prompt_of_one_token_gives_the_logits_of_the_full_model() -> None:
    found = []
    for kv_only in (EVERY, ()):
        served = Requests()
        prompts = [served.add([token]) for token in (5, 17, 80)]
        found.append(torch.stack(served.run([], [(prompt, 1, True) for prompt in prompts], kv_only)))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)
    rows = [(0.1 * i, 1, 1) for i in range(6)]
    assert serve(hw_engine(plan=EVERYWHERE), rows) == plain_tokens("llama", rows)


def test_decodes_next_to_such_prompts_are_those_of_the_full_model() -> None:
    found = []
    for kv_only in (EVERY, ()):
        served = Requests()
        decodes = [served.add(some_tokens(12, seed=i)) for i in range(3)]
        served.run([], [(request, 11, True) for request in decodes], ())
        prompt = served.add(some_tokens(20, seed=9))
        found.append(torch.stack(served.run(decodes, [(prompt, 20, True)], kv_only)))
    torch.testing.assert_close(found[0][:3], found[1][:3], rtol=0, atol=1e-5)
    assert not torch.allclose(found[0][3], found[1][3], atol=1e-3)


@pytest.mark.parametrize("scheduler", ["chunked", "prefill_first"])
def test_a_prompt_gives_the_same_tokens_in_chunks_and_at_once(scheduler: str) -> None:
    rows = some_rows(6, 8, longest_prompt=60)
    served = [
        serve(hw_engine(plan=EVERYWHERE, config=engine_config(scheduler, max_batch_tokens=tokens)), rows)
        for tokens in (7, 24, 200)
    ]
    assert served[0] == served[1] == served[2]
    assert served[0] != plain_tokens("llama", rows)


@pytest.mark.parametrize("family", quick(("llama", "gemma3", "opt", "qwen2"), 2))
def test_the_measured_loss_is_that_of_the_gated_model(family: str) -> None:
    elastic = ElasticModel(tiny(family), name="tiny")
    spec, rng, prompt, length = elastic.spec, random.Random(4), 9, 20
    plans: list[Plan] = []
    for _ in range(4):
        kv_only = tuple(rng.random() < 0.6 for _ in range(LAYERS))
        prefill, fewer = random_mask(rng, 0.8), random_mask(rng, 0.8)
        dropped = with_mask(dense_plan(spec), prefill)
        decode = replace(
            prefill,
            mha=tuple(a and b for a, b in zip(prefill.mha, fewer.mha, strict=True)),
            ffn=tuple(a and b for a, b in zip(prefill.ffn, fewer.ffn, strict=True)),
        )
        plans += [replace(dense_plan(spec), kv_only=kv_only), replace(dropped, decode=decode, kv_only=kv_only)]
    window = torch.tensor([some_tokens(length, seed=3)])
    found = measure_many(elastic, plans, window, prompt_tokens=prompt)
    for plan, nll in zip(plans, found, strict=True):
        before, after = gates(plan.prefill, prompt), gates(plan.decode, length - prompt)
        for stage in before:
            stage[list(plan.kv_only), : prompt - 1] = 0.0
        mha, ffn = (torch.cat(pair, dim=1) for pair in zip(before, after, strict=True))
        logits = plain_logits(tiny(family), window[0].tolist(), mha, ffn)
        losses = torch.nn.functional.cross_entropy(logits[:-1], window[0, 1:], reduction="none")
        assert nll.decode == pytest.approx(float(losses[prompt - 1 :].sum()), rel=1e-4)
        assert nll.total == pytest.approx(float(losses.sum()), rel=1e-4)
    assert measure(elastic, plans[0], window, prompt_tokens=prompt) == found[0]


def test_blocks_that_are_dropped_stay_dropped() -> None:
    """A layer of which prefill runs nothing is the same with the field and without."""
    spec, rows = tiny_spec(), some_rows(2, 6)
    dropped = with_mask(dense_plan(spec), drop(spec, mha=[1, 2], ffn=[1, 2]))
    kv_only = tuple(layer in (1, 2) for layer in range(LAYERS))
    plain, same = (serve(hw_engine(plan=plan), rows) for plan in (dropped, replace(dropped, kv_only=kv_only)))
    assert plain == same


def test_the_pass_by_modules_refuses_what_it_does_not_compute() -> None:
    elastic = ElasticModel(tiny(), name="tiny")
    elastic.apply(replace(dense_plan(elastic.spec), kv_only=EVERY))
    with pytest.raises(PlanError, match="'KV only 0-3' has layers that only write KV"):
        elastic.forward([[1, 2, 3]])
    kv = RequestKV()
    elastic.apply(dense_plan(elastic.spec))
    elastic.forward([[1, 2, 3]], [kv])
    elastic.apply(replace(dense_plan(elastic.spec), kv_only=EVERY))
    assert elastic.forward([[4]], [kv], "decode").shape[0] == 1
