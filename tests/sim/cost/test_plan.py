"""What runs: masks, plans, and which plans are legal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.cost.model_spec import load_model
from sim.cost.plan import KeepMask, KVKeep, check_layers, check_plan, dense_plan, drop, keep_all, with_mask
from sim.errors import PlanError
from sim.policies.base import PolicyContext
from sim.policies.fixed import static_plan, static_w4_prefix

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
        ({"kv_bits": (8,)}, r"plan\.kv_bits has 1 entries; .* 30 layers"),
        ({"kv_bits": (8,) * 29 + (2,)}, r"kv_bits of layer 29 is 2; allowed are 16, 8 and 4"),
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


def test_kv_that_fewer_bits_do_not_make_smaller_is_refused():
    fp8 = replace(MODEL, kv_dtype_bytes=1)
    eight, four = (replace(DENSE, kv_bits=(16,) * 7 + (bits,) * 23) for bits in (8, 4))
    with pytest.raises(PlanError, match=r"kv_bits of layer 7 is 8, .* takes 408 bytes a token, .* takes 384 as it is"):
        check_plan(fp8, eight)
    check_plan(fp8, four)
    for plan in (eight, four):
        check_plan(MODEL, plan)


def test_an_empty_list_of_bits_of_kv_is_refused():
    with pytest.raises(PlanError, match="kv_bits is an empty list; give one number, such as 8"):
        static_plan(MODEL, kv_bits=[])


def test_a_plan_that_names_no_bits_of_kv_is_the_plan_at_16():
    assert DENSE.kv_bits == (16,) * 30
    assert replace(DENSE, kv_bits=(16,) * 30) == DENSE == replace(DENSE, kv_bits=())


def test_plans_are_values_that_hash_and_compare():
    assert dense_plan(MODEL) == DENSE
    assert hash(dense_plan(MODEL)) == hash(DENSE)
    assert len({DENSE, with_mask(DENSE, drop(MODEL, ffn=[3])), dense_plan(MODEL)}) == 2


NO_COUNTS = [1.0, 1.5, True, "1", float("nan"), float("inf"), 2**31, -1, [1], {}, b"2"]


@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
@pytest.mark.parametrize("field", ["max_running", "max_waiting"])
def test_a_limit_of_requests_is_a_whole_number_or_none(field: str, value: Any):
    with pytest.raises(PlanError, match=f"plan.{field} is .*whole number"):
        check_plan(MODEL, replace(DENSE, **{field: value}))


@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
def test_kept_tokens_are_whole_numbers(value: Any):
    with pytest.raises(PlanError, match="whole numbers of tokens"):
        KVKeep(first_tokens=value, last_tokens=2)
    with pytest.raises(PlanError, match="whole numbers of tokens"):
        KVKeep(first_tokens=2, last_tokens=value)


@pytest.mark.parametrize("value", [16.0, True, "16", 15, None, [16]], ids=repr)
def test_bits_are_one_of_three_whole_numbers(value: Any):
    with pytest.raises(PlanError, match=r"weight_bits of layer 1 is .*allowed are 16, 8 and 4"):
        check_plan(MODEL, replace(DENSE, weight_bits=(16, value, *(16,) * (MODEL.num_layers - 2))))


@pytest.mark.parametrize("value", [1, 0, "False", None])
def test_a_mask_is_made_of_true_and_false(value: Any):
    mask = replace(DENSE.decode, ffn=(*DENSE.decode.ffn[:-1], value))
    with pytest.raises(PlanError, match=r"plan\.decode\.ffn of layer 29 is"):
        check_plan(MODEL, replace(DENSE, decode=mask))


def test_what_each_layer_keeps_is_a_kv_keep():
    with pytest.raises(PlanError, match=r"kv_keep of layer 0 is \(1, 2\)"):
        check_plan(MODEL, replace(DENSE, kv_keep=((1, 2), *DENSE.kv_keep[1:])))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [[1.0], [True], ["1"], [None], "12", 3, None, {1: 2}], ids=repr)
@pytest.mark.parametrize("option", ["drop_mha", "drop_ffn", "prefill_drop_mha", "prefill_drop_ffn", "kv_layers"])
def test_layers_of_a_static_plan_are_a_list_of_whole_numbers(option: str, value: Any):
    if value is None and option not in ("drop_mha", "drop_ffn"):
        return  # the others may be left out
    kept = {"kv_first_tokens": 1, "kv_last_tokens": 2} if option == "kv_layers" else {}
    with pytest.raises(PlanError, match=f"{option} are .*list the numbers of layers"):
        static_plan(MODEL, **{**kept, option: value})


@pytest.mark.parametrize("value", [8.0, True, "8", {"a": 1}], ids=repr)
def test_the_bits_of_a_static_plan_are_whole_numbers(value: Any):
    with pytest.raises(PlanError, match="allowed are 16, 8 and 4"):
        static_plan(MODEL, weight_bits=value)


@pytest.mark.parametrize("value", [2.0, True, "2", None])
def test_the_layers_at_low_precision_are_a_whole_number(value: Any):
    with pytest.raises(PlanError, match=r"policy\.layers is"):
        static_w4_prefix(PolicyContext(model=MODEL), layers=value)


def test_whole_numbers_of_numpy_are_whole_numbers():
    plan = static_plan(MODEL, drop_mha=np.array([1, 2]), weight_bits=np.int64(8), max_running=np.int64(3))  # type: ignore[arg-type]
    assert plan.decode == drop(MODEL, mha=[1, 2])
