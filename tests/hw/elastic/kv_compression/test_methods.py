"""Each published method against slow, plain algorithms and against what must hold of it, on small random tensors."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")

from hw.elastic.kv_compression import ada_kv, lorc, refree_kv, think  # noqa: E402
from hw.elastic.kv_compression.prompt_kv import LayerKV, attention  # noqa: E402
from hw.elastic.ops import rotate  # noqa: E402

QUERY_HEADS, HEADS, TOKENS, HEAD_DIM, OBSERVED = 6, 2, 40, 8, 7


def layer(seed: int = 0, window: int | None = None, **parts: Any) -> LayerKV:
    """Return a layer's KV of random numbers."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    made = {
        "queries": drawn(QUERY_HEADS, OBSERVED, HEAD_DIM),
        "keys": drawn(HEADS, TOKENS, HEAD_DIM),
        "values": drawn(HEADS, TOKENS, HEAD_DIM),
        "scale": 0.7,
        "window": window,
    }
    return LayerKV(**{**made, **parts})


def slow_attention(given: LayerKV, query_head: int, row: int) -> list[float]:
    """Return the attention of one of the observed tokens, number by number."""
    place = TOKENS - OBSERVED + row
    head = query_head // (QUERY_HEADS // HEADS)
    first = 0 if given.window is None else max(0, place - given.window + 1)
    query = given.queries[query_head, row].tolist()
    scores = {
        token: given.scale * sum(a * b for a, b in zip(query, given.keys[head, token].tolist(), strict=True))
        for token in range(first, place + 1)
    }
    top = max(scores.values())
    total = sum(math.exp(score - top) for score in scores.values())
    return [math.exp(scores[token] - top) / total if token in scores else 0.0 for token in range(TOKENS)]


@pytest.mark.parametrize("window", [None, 9])
def test_attention_is_that_of_a_plain_softmax(window: int | None) -> None:
    given = layer(window=window)
    found = attention(given, OBSERVED)
    for head in range(QUERY_HEADS):
        for row in range(OBSERVED):
            assert found[head, row].tolist() == pytest.approx(slow_attention(given, head, row), abs=1e-6)
    assert torch.equal(attention(given, 2), found[:, -2:])


def test_more_queries_than_were_observed_are_refused() -> None:
    with pytest.raises(ValueError, match="attention of 8 queries, but those of the last 7 tokens were observed"):
        attention(layer(), 8)


# --- Ada-KV ----------------------------------------------------------------------------------------------------------


def slow_select(scores: list[list[float]], recent: int, total: int) -> list[list[bool]]:
    """Ada-KV one token at a time: first each head's certain ones, then the best of all."""
    heads, earlier = len(scores), len(scores[0])
    kept = [[False] * earlier + [True] * recent for _ in range(heads)]
    certain = max(0, math.floor(0.20 * total / heads) - recent)
    for head in range(heads):
        for token in sorted(range(earlier), key=lambda token: -scores[head][token])[:certain]:
            kept[head][token] = True
    while sum(map(sum, kept)) < total:
        left = [(head, token) for head in range(heads) for token in range(earlier) if not kept[head][token]]
        head, token = max(left, key=lambda pair: (scores[pair[0]][pair[1]], -pair[0], -pair[1]))
        kept[head][token] = True
    return kept


def test_scores_are_the_mean_attention_pooled_over_five_neighbors() -> None:
    given = layer()
    earlier, group = TOKENS - OBSERVED, QUERY_HEADS // HEADS
    found = ada_kv.head_scores(given, OBSERVED)
    assert found.shape == (HEADS, earlier)
    for head in range(HEADS):
        rows = [slow_attention(given, head * group + q, row) for q in range(group) for row in range(OBSERVED)]
        mean = [sum(row[token] for row in rows) / len(rows) for token in range(earlier)]
        pooled = [sum(mean[max(0, token - 2) : token + 3]) / 5 for token in range(earlier)]
        assert found[head].tolist() == pytest.approx(pooled, abs=1e-6)


@pytest.mark.parametrize("total", [2 * OBSERVED, 30, 51, 79, 2 * TOKENS])
@pytest.mark.parametrize("recent", [OBSERVED, 1])
def test_selection_is_that_of_the_plain_algorithm_and_keeps_the_budget(total: int, recent: int) -> None:
    scores = torch.rand(HEADS, TOKENS - recent, generator=torch.Generator().manual_seed(total)) ** 3
    scores[1] *= 20  # one head would get everything, without the certain tokens of the other
    found = ada_kv.select(scores, recent, total)
    assert int(found.sum()) == total
    assert found[:, -recent:].all()
    assert found.tolist() == slow_select(scores.tolist(), recent, total)
    assert int(found.sum(1).min()) >= math.floor(0.20 * total / HEADS)


def test_heads_with_equal_scores_get_what_equal_budgets_give_them() -> None:
    one = torch.rand(TOKENS - OBSERVED, generator=torch.Generator().manual_seed(5))
    scores = one.expand(HEADS, -1)
    for total in range(HEADS * OBSERVED, HEADS * TOKENS + 1, HEADS):
        assert torch.equal(ada_kv.select(scores, OBSERVED, total), ada_kv.select_equal(scores, OBSERVED, total))


def test_equal_budgets_keep_the_best_of_each_head() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.2], [5.0, 4.0, 6.0, 7.0]])
    assert ada_kv.select_equal(scores, 1, 5).tolist() == [
        [False, True, True, False, True],
        [False, False, False, True, True],
    ]


@pytest.mark.parametrize("total", [2 * OBSERVED - 1, 2 * TOKENS + 1])
def test_a_budget_without_room_for_the_observed_tokens_or_above_all_is_refused(total: int) -> None:
    scores = torch.rand(HEADS, TOKENS - OBSERVED)
    for chosen in (ada_kv.select, ada_kv.select_equal):
        with pytest.raises(ValueError, match="it must be from 14 to 80: observe fewer"):
            chosen(scores, OBSERVED, total)


def test_ada_kv_stores_the_share_and_a_factor_of_one_keeps_all() -> None:
    given = layer()
    for factor in (0.9, 0.5, 0.25):
        for equal in (False, True):
            stored = ada_kv.compress(given, factor, OBSERVED, equal=equal)
            assert stored.kept is not None
            assert stored.share == pytest.approx(factor)
            assert int(stored.kept.sum()) == round(factor * HEADS * TOKENS)
    everything = ada_kv.compress(given, 1.0, OBSERVED)
    assert everything.kept is not None
    assert everything.kept.all()
    assert everything.keys is given.keys


# --- ThinK -----------------------------------------------------------------------------------------------------------


def test_channels_rank_as_by_the_norm_of_what_they_add_to_the_scores() -> None:
    given = layer(queries=torch.randn(HEADS, OBSERVED, HEAD_DIM, generator=torch.Generator().manual_seed(8)))
    found = think.channel_scores(given.queries, given.keys)
    for head in range(HEADS):
        added = [
            torch.linalg.norm(torch.outer(given.queries[head, :, c], given.keys[head, :, c])) for c in range(HEAD_DIM)
        ]
        squared = [float(norm**2) / (OBSERVED * TOKENS) for norm in added]
        assert found[head].tolist() == pytest.approx(squared, rel=1e-5)


def test_query_heads_of_a_group_count_alike() -> None:
    given = layer()
    group = QUERY_HEADS // HEADS
    each = [think.channel_scores(given.queries[q::group], given.keys) for q in range(group)]
    found = think.channel_scores(given.queries, given.keys)
    torch.testing.assert_close(found, torch.stack(each).mean(0))


def test_the_stated_channels_are_dropped_from_all_but_the_last_tokens() -> None:
    given = layer()
    loud = torch.ones(HEADS, 1, HEAD_DIM)
    loud[0, 0, [1, 4]] = 1e-3  # hardly any query can see these
    loud[1, 0, [0, 7]] = 1e-3
    given = layer(keys=given.keys * loud)
    factor = 1 - 2 * (TOKENS - 3) / (2 * HEAD_DIM * TOKENS)
    stored = think.compress(given, factor, OBSERVED, recent=3)
    assert stored.share == pytest.approx(factor)
    assert stored.kept is None
    assert stored.values is given.values
    for head, gone in enumerate(([1, 4], [0, 7])):
        others = [c for c in range(HEAD_DIM) if c not in gone]
        assert not stored.keys[head, : TOKENS - 3, gone].any()
        assert torch.equal(stored.keys[head][:, others], given.keys[head][:, others])
        assert torch.equal(stored.keys[head, TOKENS - 3 :], given.keys[head, TOKENS - 3 :])


def test_think_drops_no_channel_at_a_factor_of_one_and_cannot_reach_half() -> None:
    given = layer()
    whole = think.compress(given, 1.0, OBSERVED)
    assert torch.equal(whole.keys, given.keys)
    assert whole.share == 1.0
    with pytest.raises(ValueError, match=r"ThinK cannot store 0\.5 of the KV of 40 tokens.* 0\.54 are left"):
        think.compress(given, 0.5, OBSERVED, recent=3)
    with pytest.raises(ValueError, match=r"of 3 tokens.* 1\.00 are left"):
        think.channels_to_drop(0.9, 3, HEAD_DIM, recent=3)


def test_the_number_of_channels_is_the_nearest_to_the_factor() -> None:
    for factor in (0.95, 0.9, 0.8, 0.7, 0.6):
        count = think.channels_to_drop(factor, 1024, 64)
        errors = {other: abs(1 - other * 992 / (2 * 64 * 1024) - factor) for other in range(65)}
        assert errors[count] == min(errors.values())


# --- LoRC ------------------------------------------------------------------------------------------------------------


def rope(tokens: int, size: float = 1.0) -> tuple[Any, Any]:
    """Return cosines and sines of a rotation that also scales by ``size``."""
    angles = torch.arange(tokens)[:, None] * 10.0 ** -torch.arange(HEAD_DIM // 2)
    angles = torch.cat((angles, angles), 1)
    return angles.cos() * size, angles.sin() * size


@pytest.mark.parametrize("size", [1.0, 1.3])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rank", [1, 5, HEADS * HEAD_DIM - 1, HEADS * HEAD_DIM])
def test_what_is_read_is_the_product_with_truncated_weights(rank: int, biased: bool, size: float) -> None:
    generator = torch.Generator().manual_seed(rank)
    weight = torch.randn(HEADS * HEAD_DIM, 20, generator=generator)
    hidden = torch.randn(TOKENS, 20, generator=generator)
    bias = torch.randn(HEADS * HEAD_DIM, generator=generator) if biased else torch.zeros(HEADS * HEAD_DIM)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    low = u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank]
    cos, sin = rope(TOKENS, size)

    def made(matrix: Any) -> tuple[Any, Any]:
        flat = (hidden @ matrix.T + bias).view(TOKENS, HEADS, HEAD_DIM)
        return rotate(flat, cos, sin).transpose(0, 1), flat.transpose(0, 1)

    keys, values = made(weight)
    directions = lorc.Directions.of(weight, bias if biased else None)
    given = layer(keys=keys, values=values, cos=cos, sin=sin)
    stored = lorc.compress(given, directions, directions, rank)
    low_keys, low_values = made(low)
    torch.testing.assert_close(stored.keys, low_keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stored.values, low_values, rtol=1e-4, atol=1e-4)
    assert stored.share == rank / (HEADS * HEAD_DIM)
    assert directions.log_condition == pytest.approx(math.log(s[0] / s[-1]), rel=1e-4)
    if rank == HEADS * HEAD_DIM:
        assert torch.equal(stored.keys, keys)
        assert torch.equal(stored.values, values)


def test_ranks_fall_with_the_cumulative_condition_number_and_keep_the_budget() -> None:
    generator = torch.Generator().manual_seed(2)
    logs = (torch.rand(12, generator=generator) + 0.1).tolist()
    for factor in (0.95, 0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.1):
        ranks = lorc.layer_ranks(logs, 192, factor)
        assert sum(ranks) == round(12 * 192 * factor)
        assert ranks == sorted(ranks, reverse=True)
        assert 1 <= ranks[-1] < ranks[0] <= 192
        assert ranks[-1] >= math.floor(192 * factor / 2)
    assert lorc.layer_ranks(logs, 192, 0.9)[0] == 192
    assert lorc.layer_ranks(logs, 192, 1.0) == [192] * 12


def test_a_worse_layer_takes_a_larger_step_of_the_ranks() -> None:
    ranks = lorc.layer_ranks([1.0, 9.0, 1.0, 1.0], 1000, 0.7)
    steps = [a - b for a, b in pairwise(ranks)]
    assert steps[1] == pytest.approx(9 * steps[0], abs=12)  # the step after a layer is that layer's own
    assert lorc.layer_ranks([0.0] * 4, 10, 0.55) == [6, 6, 5, 5]


# --- ReFreeKV --------------------------------------------------------------------------------------------------------


def slow_lost(found: Any, evicted: int, first: int) -> float:
    """Return the share of the norm that is lost, with the evicted columns set to zero."""
    left = found.clone()
    left[:, :, first : first + evicted] = 0.0
    before, after = (sum(float(torch.linalg.norm(head)) for head in each) for each in (found, left))
    return (before - after) / before


@pytest.mark.parametrize("rows", [1, 3])
def test_the_lost_norm_is_that_of_attention_with_columns_set_to_zero(rows: int) -> None:
    found = attention(layer(), rows)
    lost = refree_kv.lost_norm(found)
    assert len(lost) == TOKENS - refree_kv.FIRST
    expected = [slow_lost(found.double(), count, refree_kv.FIRST) for count in range(len(lost))]
    assert lost.tolist() == pytest.approx(expected, abs=1e-12)
    assert lost.tolist() == sorted(lost.tolist())


def test_a_threshold_evicts_as_long_as_less_than_it_is_lost() -> None:
    lost = torch.tensor([0.0, 0.0, 0.01, 0.02, 0.5], dtype=torch.float64)
    assert [refree_kv.evicted_tokens(lost, x) for x in (0.0, 0.005, 0.01, 0.015, 0.02, 1.0)] == [0, 1, 1, 2, 2, 4]


def test_a_threshold_of_zero_keeps_all_and_one_of_one_keeps_the_ends() -> None:
    given = layer()
    everything = refree_kv.compress(given, 0.0)
    assert everything.kept is not None
    assert everything.kept.all()
    assert everything.share == 1.0
    ends = refree_kv.compress(given, 1.0)
    assert ends.kept is not None
    at = ends.kept[0].nonzero().flatten().tolist()
    assert at == [0, 1, 2, 3, TOKENS - 1]
    assert torch.equal(ends.kept[0], ends.kept[1])


def test_the_places_that_stay_are_the_first_and_the_last() -> None:
    assert refree_kv.kept_places(8, 2, first=3).tolist() == [True, True, True, False, False, True, True, True]


def test_the_threshold_of_a_share_is_the_largest_that_keeps_as_much() -> None:
    curves = [refree_kv.curve(layer(seed)) for seed in range(6)]
    for share in (0.9, 0.7, 0.5, 0.3):
        threshold = refree_kv.threshold_for(curves, share)
        assert refree_kv.mean_share(curves, threshold) >= share > refree_kv.mean_share(curves, threshold + 1e-6) - 0.02
        assert refree_kv.mean_share(curves, threshold) - share < 0.02
