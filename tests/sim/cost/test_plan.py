"""What runs: masks, plans, and which plans are legal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.cost.model_spec import load_model
from sim.cost.plan import KeepMask, KVKeep, check_layers, check_plan, dense_plan, drop, keep_all, with_mask
from sim.errors import PlanError

MODEL = load_model("smollm2_135m")
DENSE = dense_plan(MODEL)


def masks(layers: int = 4) -> st.SearchStrategy[KeepMask]:
    kept = st.tuples(*[st.booleans()] * layers)
    return st.builds(KeepMask, mha=kept, ffn=kept)


def test_the_dense_plan_is_legal_and_keeps_every_block_at_full_precision():
    check_plan(MODEL, DENSE)
    assert DENSE.decode == DENSE.prefill == keep_all(MODEL)
    assert set(DENSE.weight_bits) == {16}
    assert all(keep.tokens(1000) == 1000 for keep in DENSE.kv_keep)


def test_drop_removes_exactly_the_named_blocks():
    mask = drop(MODEL, mha=[3, 5], ffn=[29])
    assert [layer for layer, kept in enumerate(mask.mha) if not kept] == [3, 5]
    assert [layer for layer, kept in enumerate(mask.ffn) if not kept] == [29]


@pytest.mark.parametrize(("dropped", "name"), [({"mha": [30]}, "MHA30"), ({"ffn": [-1]}, "FFN-1")])
def test_dropping_a_layer_that_does_not_exist_names_it_and_the_layers_there_are(dropped: dict[str, Any], name: str):
    with pytest.raises(PlanError, match=f"{name} does not exist: smollm2_135m has layers 0 to 29"):
        drop(MODEL, **dropped)


@given(a=masks(), b=masks())
def test_a_union_contains_both_and_nothing_that_neither_keeps(a: KeepMask, b: KeepMask):
    union = a.union(b)
    assert union == b.union(a)
    assert union.contains(a)
    assert union.contains(b)
    assert a.contains(b) == (union == a)


def test_masks_of_unequal_length_are_not_compared_by_accident():
    short, long = KeepMask(mha=(True,), ffn=(True,) * 3), KeepMask(mha=(True,) * 2, ffn=(True,) * 2)
    with pytest.raises(ValueError, match="zip"):
        short.contains(long)
    with pytest.raises(PlanError, match=r"mask\.mha has 1 entries; smollm2_135m has 30 layers"):
        check_layers(MODEL, short)


def test_a_plan_whose_prefill_keeps_more_than_decode_is_legal():
    check_plan(MODEL, replace(DENSE, decode=drop(MODEL, mha=[1], ffn=[2])))
    check_plan(MODEL, with_mask(DENSE, drop(MODEL, mha=[1], ffn=[2])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefill": drop(MODEL, mha=[7])}, "decode keeps MHA7 but prefill drops it; .* decode reads the KV"),
        ({"prefill": drop(MODEL, ffn=[9])}, "decode keeps FFN9 but prefill drops it"),
        ({"decode": KeepMask(mha=(True,), ffn=(True,) * 30)}, r"plan\.decode\.mha has 1 entries; .* 30 layers"),
        ({"prefill": KeepMask(mha=(True,) * 30, ffn=())}, r"plan\.prefill\.ffn has 0 entries"),
        ({"weight_bits": (16,)}, r"plan\.weight_bits has 1 entries"),
        ({"kv_keep": ()}, r"plan\.kv_keep has 0 entries"),
        ({"weight_bits": (16,) * 12 + (3,) + (16,) * 17}, "layer 12 is 3; allowed are 16, 8 and 4"),
        ({"max_running": 0}, r"plan\.max_running is 0; it must be at least 1"),
        ({"max_waiting": -1}, r"plan\.max_waiting is -1; it must be at least 0"),
    ],
)
def test_an_illegal_plan_names_the_block_or_field_and_what_is_allowed(change: dict[str, Any], message: str):
    with pytest.raises(PlanError, match=message):
        check_plan(MODEL, replace(DENSE, **change))


@given(first=st.integers(0, 100), last=st.integers(1, 100), context=st.integers(0, 1000))
def test_kv_keep_never_keeps_more_than_there_is_and_all_of_a_short_context(first: int, last: int, context: int):
    kept = KVKeep(first_tokens=first, last_tokens=last).tokens(context)
    assert kept <= context
    assert kept == context or kept == first + last < context


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first_tokens": 4}, "both first_tokens and last_tokens, or neither"),
        ({"last_tokens": 4}, "both first_tokens and last_tokens, or neither"),
        ({"first_tokens": -1, "last_tokens": 4}, "first_tokens must be at least 0"),
        ({"first_tokens": 4, "last_tokens": 0}, "last_tokens at least 1"),
    ],
)
def test_kv_keep_needs_both_runs_or_neither(fields: dict[str, int], message: str):
    with pytest.raises(PlanError, match=message):
        KVKeep(**fields)


def test_plans_are_values_that_hash_and_compare():
    assert dense_plan(MODEL) == DENSE
    assert hash(dense_plan(MODEL)) == hash(DENSE)
    assert len({DENSE, with_mask(DENSE, drop(MODEL, ffn=[3])), dense_plan(MODEL)}) == 2
