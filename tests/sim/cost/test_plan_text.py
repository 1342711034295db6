"""Plans read back from the line that describes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.cost.ffn_width import FFN_WIDTHS
from sim.cost.plan import KV_KEEP_ALL, KV_METHODS, KeepMask, KVCompression, KVKeep, Plan, describe, nested_bits
from sim.cost.plan_text import most_layer, plan_from_text
from sim.errors import PlanError

LAYERS = 12


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    def flags() -> tuple[bool, ...]:
        return tuple(draw(st.lists(st.booleans(), min_size=LAYERS, max_size=LAYERS)))

    prefill = KeepMask(mha=flags(), ffn=flags())
    narrower = KeepMask(
        mha=tuple(a and b for a, b in zip(prefill.mha, flags(), strict=True)),
        ffn=tuple(a and b for a, b in zip(prefill.ffn, flags(), strict=True)),
    )
    kept = st.one_of(
        st.just(KV_KEEP_ALL),
        st.builds(KVKeep, first_tokens=st.integers(0, 9), last_tokens=st.integers(1, 9)),
    )
    weight_bits = tuple(draw(st.lists(st.sampled_from([16, 8, 4]), min_size=LAYERS, max_size=LAYERS)))
    return Plan(
        prefill=prefill,
        decode=draw(st.sampled_from([prefill, narrower])),
        weight_bits=weight_bits,
        compute_bits=tuple(nested_bits(bits, draw(st.sampled_from([16, 8, 4]))) for bits in weight_bits),
        kv_keep=tuple(draw(st.lists(kept, min_size=LAYERS, max_size=LAYERS))),
        kv_bits=tuple(draw(st.lists(st.sampled_from([16, 8, 4]), min_size=LAYERS, max_size=LAYERS))),
        streamed=tuple(draw(st.lists(st.booleans(), min_size=LAYERS, max_size=LAYERS))),
        kv_only=tuple(draw(st.lists(st.booleans(), min_size=LAYERS, max_size=LAYERS))),
        ffn_width=tuple(draw(st.lists(st.sampled_from(FFN_WIDTHS), min_size=LAYERS, max_size=LAYERS))),
        kv_compression=draw(
            st.none() | st.builds(KVCompression, method=st.sampled_from(KV_METHODS), percent=st.integers(51, 99))
        ),
        max_running=draw(st.none() | st.integers(1, 1000)),
        max_waiting=draw(st.none() | st.integers(0, 1000)),
        max_wait_s=draw(st.none() | st.floats(1e-3, 1e6)),
    )


@given(plans())
def test_a_described_plan_is_read_back_as_it_was(plan: Plan) -> None:
    assert plan_from_text(describe(plan), LAYERS) == plan


@given(plans())
def test_the_highest_layer_of_a_description_is_found(plan: Plan) -> None:
    differs = [
        layer
        for layer in range(LAYERS)
        if not (plan.prefill.mha[layer] and plan.prefill.ffn[layer] and plan.decode.mha[layer])
        or not plan.decode.ffn[layer]
        or plan.weight_bits[layer] != 16
        or plan.nested[layer]
        or plan.kv_keep[layer] != KV_KEEP_ALL
        or plan.kv_bits[layer] != 16
        or plan.streamed[layer]
        or plan.kv_only[layer]
        or plan.ffn_width[layer] != 8
    ]
    assert most_layer(describe(plan)) == max(differs, default=-1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-MHA 12", "the model has layers 0 to 11"),
        ("-MHA 5-3", "the model has layers"),
        ("KV16 0", "describes no part of a plan"),
        ("W16 0", "describes no part of a plan"),
        ("", "describes no part of a plan"),
        ("-MHA 1; <b>", "describes no part of a plan"),
        ("max_wait_s soon", "'soon' is no number"),
    ],
)
def test_a_line_that_describes_no_plan_is_an_error(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_from_text(text, LAYERS)
