"""Packed prompts take the slots that the simulator counts, and attention reads what the methods store."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")

from hw.elastic.compressed_kv import ObservedQueries, _attended  # noqa: E402
from hw.elastic.kv_compression import ada_kv, think  # noqa: E402
from hw.elastic.kv_compression.lorc import Directions  # noqa: E402
from hw.elastic.kv_compression.packing import PackedTokens, check_compression, kept_directions, pack  # noqa: E402
from hw.elastic.kv_compression.prompt_kv import LayerKV, StoredKV  # noqa: E402
from sim.cost.kv_format import saved_tokens  # noqa: E402
from sim.cost.model_spec import load_model  # noqa: E402
from sim.cost.plan import KV_METHODS, KVCompression, dense_plan  # noqa: E402
from sim.errors import PlanError  # noqa: E402
from tests.hw.elastic.kv_compression.plain import plain_stored  # noqa: E402
from tests.hw.elastic.kv_compression.test_methods import rope  # noqa: E402

HEADS, HEAD_DIM, LATER = 2, 8, 3
SPEC = load_model("smollm2_135m")


def prompt(tokens: int, group: int = 3, window: int | None = None, seed: int = 0) -> LayerKV:
    """Return random KV of a prompt, some of whose tokens and channels matter more to one head than to the other."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    loud = 1 + 2 * torch.rand(HEADS, tokens, 1, generator=generator)
    return LayerKV(
        queries=drawn(HEADS * group, min(64, tokens), HEAD_DIM) * (1 + drawn(1, 1, HEAD_DIM).abs()),
        keys=drawn(HEADS, tokens, HEAD_DIM) * loud,
        values=drawn(HEADS, tokens, HEAD_DIM),
        scale=0.5,
        window=window,
    )


def directions(seed: int) -> Directions:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(HEADS * HEAD_DIM, *more, generator=generator) for more in ((20,), ()))
    return Directions.of(weight, bias)


def compressed(way: KVCompression, layer: LayerKV) -> tuple[Any, Any, Any, StoredKV]:
    """Return a packed prompt with what its slots hold, and what the method stores."""
    cos, sin = rope(layer.keys.shape[1])
    pair = directions(1), directions(2)
    rank = HEADS * HEAD_DIM * way.percent // 100
    cut = tuple(each.first(max(rank, 1)) for each in pair)
    packed, keys, values = pack(way, layer, (cut[0], cut[1]), lambda count: (cos[:count], sin[:count]))
    return packed, keys, values, plain_stored(way, replace(layer, cos=cos, sin=sin), pair)


def plain_attention(layer: LayerKV, stored: StoredKV, query: Any, later: tuple[Any, Any]) -> Any:
    """Return the attention of a query to what is stored and to later tokens, head by head and token by token."""
    tokens, made = layer.keys.shape[1], []
    for at, each in enumerate(query):
        head = at // (len(query) // HEADS)
        scores, values = [], []
        for token in range(tokens + LATER):
            if layer.window is not None and token <= tokens + LATER - 1 - layer.window:
                continue
            if token < tokens and stored.kept is not None and not stored.kept[head, token]:
                continue
            key, value = (stored.keys, stored.values) if token < tokens else later
            place = token if token < tokens else token - tokens
            scores.append(layer.scale * float(each @ key[head, place]))
            values.append(value[head, place])
        made.append((torch.tensor(scores).softmax(0)[:, None] * torch.stack(values)).sum(0))
    return torch.stack(made)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("window", [None, 9, 50])
@pytest.mark.parametrize(("tokens", "percent"), [(40, 70), (90, 55), (90, 95), (7, 60), (3, 51)])
@pytest.mark.parametrize("method", KV_METHODS)
def test_attention_reads_what_the_method_stores(
    method: str, tokens: int, percent: int, window: int | None, group: int
) -> None:
    way, layer = KVCompression(method=method, percent=percent), prompt(tokens, group, window)
    packed, keys, values, stored = compressed(way, layer)
    slots = tokens - way.saved_tokens(tokens)
    assert packed.slots == slots == math.ceil(tokens * percent / 100)
    assert keys.shape == values.shape == (slots, HEADS, HEAD_DIM)
    generator = torch.Generator().manual_seed(9)
    query = torch.randn(HEADS * group, HEAD_DIM, generator=generator)
    more = torch.randn(2, LATER, HEADS, HEAD_DIM, generator=generator)
    held = torch.cat((keys, more[0])), torch.cat((values, more[1]))
    found = _attended(query, held, packed, window or 0, layer.scale)
    later = more[0].transpose(0, 1), more[1].transpose(0, 1)
    torch.testing.assert_close(found, plain_attention(layer, stored, query, later), rtol=1e-4, atol=1e-5)


def test_heads_of_ada_kv_keep_different_numbers_of_tokens_and_fill_the_slots() -> None:
    layer = prompt(60)
    packed, keys, _, stored = compressed(KVCompression(method="ada_kv", percent=50), layer)
    assert isinstance(packed, PackedTokens)
    counts = packed.counts.flatten().tolist()
    assert counts[0] != counts[1]
    assert sum(counts) == 30 * HEADS == keys.numel() // HEAD_DIM
    assert stored.kept is not None
    assert counts == stored.kept.sum(1).tolist()


@pytest.mark.parametrize("method", KV_METHODS)
def test_what_lies_outside_of_the_slots_is_small(method: str) -> None:
    """16 bytes a head of token choosers, 4 more a token of each head with a window, and 8 a channel of ThinK."""
    for window in (None, 9):
        packed, keys, _, _ = compressed(KVCompression(method=method, percent=70), prompt(90, window=window))
        per_token = 0 if window is None else 4 * keys.shape[0] * HEADS
        if method == "lorc":
            assert packed.nbytes == 0
        elif method == "think":
            assert packed.nbytes == 8 * HEADS * packed.kept.shape[2] < 0.04 * keys.nbytes
        else:
            assert packed.nbytes == 16 * HEADS + per_token


def test_channels_of_think_always_fit_the_slots() -> None:
    for head_dim in (8, 64, 128):
        for percent in range(51, 100):
            way = KVCompression(method="think", percent=percent)
            for tokens in (*range(1, 80), 1024, 4097):
                stored = tokens - way.saved_tokens(tokens)
                if stored == tokens:
                    continue
                count, recent = think.channels_that_fit(tokens, stored, head_dim)
                takes = tokens * head_dim + recent * head_dim + (tokens - recent) * (head_dim - count)
                assert takes <= 2 * stored * head_dim
                assert 0 < count <= head_dim
                assert 0 <= recent <= think.RECENT
                one_less = takes + tokens - recent
                assert one_less > 2 * stored * head_dim, "one channel more would fit"


def test_tokens_of_ada_kv_always_fit_the_slots() -> None:
    for percent in range(1, 100):
        way = KVCompression(method="ada_kv", percent=percent)
        for tokens in (*range(1, 80), 1024):
            stored = tokens - way.saved_tokens(tokens)
            if stored == tokens:
                continue
            recent = ada_kv.observed_tokens(stored)
            kept = ada_kv.select(torch.rand(HEADS, tokens - recent), recent, stored * HEADS)
            assert int(kept.sum()) == stored * HEADS


def test_directions_of_lorc_always_fit_the_slots() -> None:
    numbers = SPEC.num_kv_heads * SPEC.head_dim
    for percent in range(1, 100):
        plan = replace(dense_plan(SPEC), kv_compression=KVCompression(method="lorc", percent=percent))
        assert plan.kv_compression is not None
        rank = kept_directions(SPEC, plan.kv_compression)
        assert rank == numbers * percent // 100
        for tokens in (2, 3, 7, 100, 1024):
            assert 2 * rank * tokens <= 2 * numbers * (tokens - saved_tokens(plan, tokens))


@pytest.mark.parametrize("again", [0, 2, 5])
def test_observed_queries_of_a_pass_that_is_run_again_replace_those_of_its_first_try(again: int) -> None:
    rows = torch.arange(24.0).view(12, 1, 2)
    observed = ObservedQueries()
    observed.note(3, 20, rows[:5] + 100 * (again > 0))
    if again:
        observed.note(3, 20, rows[:5])
        observed.note(3, 25, rows[5:] + 100)
        observed.note(3, 25, rows[5:])
    else:
        observed.note(3, 25, rows[5:])
    assert torch.equal(observed.of(3), rows.transpose(0, 1))
    observed.note(3, 40, rows[:2])  # tokens between them were not observed
    assert torch.equal(observed.of(3), rows[:2].transpose(0, 1))


def test_what_cannot_be_compressed_is_refused_with_what_to_do() -> None:
    def plan(method: str, percent: int = 70, bits: int = 16) -> Any:
        way = KVCompression(method=method, percent=percent)
        return replace(dense_plan(SPEC), kv_compression=way, kv_bits=(bits,) * SPEC.num_layers)

    for method in ("think", "lorc"):
        with pytest.raises(PlanError, match=f"cannot compress KV by {method} and store it at fewer.*leave kv_bits"):
            check_compression(SPEC, plan(method, bits=8), normed_keys=False)
    for method in ("ada_kv", "refree_kv"):
        check_compression(SPEC, plan(method, bits=8), normed_keys=True, directions=0)
    with pytest.raises(PlanError, match=r"smollm2_135m normalizes its keys.*compress by ada_kv, think or refree_kv"):
        check_compression(SPEC, plan("lorc"), normed_keys=True)
    tiny = replace(SPEC, num_kv_heads=1, head_dim=8)
    with pytest.raises(PlanError, match="keeps no direction of 8 at 12 percent; keep at least 13 percent"):
        check_compression(tiny, plan("lorc", percent=12), normed_keys=False)
    check_compression(tiny, plan("lorc", percent=13), normed_keys=False)
    with pytest.raises(
        PlanError, match=r"has found 0 directions.*70 percent take 134.*policy.kv_percent=70\), or simulate it"
    ):
        check_compression(SPEC, plan("lorc"), normed_keys=False, directions=0)
    check_compression(SPEC, plan("lorc"), normed_keys=False, directions=134)
