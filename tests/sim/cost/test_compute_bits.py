"""Products at fewer bits than the resident weights have: their prices, their loss, and plans that are refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.cost.latency import calibration_from_dict, load_calibration
from sim.cost.memory import weight_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import Plan, check_plan, dense_plan, describe, nested_bits
from sim.cost.plan_json import plan_from_json, plan_to_json
from sim.cost.plan_text import plan_from_text
from sim.cost.quality import load_quality
from sim.cost.quantization import Quantization
from sim.engine.transition import copies_between, joined, resident_of, running_plan, without_dropped
from sim.errors import CalibrationError, PlanError
from sim.policies.fixed import static_plan

LLAMA = load_model("llama2_7b")
DENSE = dense_plan(LLAMA)
NESTED = static_plan(LLAMA, compute_bits=8)


# --- The plan --------------------------------------------------------------------------------------------------------


def test_the_bits_of_products_are_those_of_the_weights_unless_the_plan_lowers_them() -> None:
    assert DENSE.compute_bits is None
    assert DENSE.product_bits == (16,) * 32
    assert static_plan(LLAMA, compute_bits=16) == DENSE
    assert NESTED.product_bits == (8,) * 32
    assert NESTED.nested == (True,) * 32
    mixed = static_plan(LLAMA, weight_bits=[16, 8, 8, *[4] * 29], compute_bits=[16, 8, 4, *[4] * 29])
    assert mixed.nested == (False, False, True, *[False] * 29)


def test_a_plan_says_its_bits_and_is_read_back() -> None:
    mixed = static_plan(LLAMA, weight_bits=[8] * 8 + [16] * 24, compute_bits=[4] * 4 + [8] * 4 + [16] * 23 + [8])
    assert describe(mixed) == "W8 0-7; compute8 31; compute4 0-3"
    for plan in (mixed, NESTED, DENSE):
        assert plan_from_text(describe(plan), 32) == plan
        assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan
    assert "compute_bits" not in plan_to_json(DENSE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compute_bits": (8,)}, r"plan\.compute_bits has 1 entries; .* 32 layers"),
        ({"compute_bits": (8,) * 31 + (3,)}, r"plan\.compute_bits of layer 31 is 3; allowed are 16, 8 and 4"),
        (
            {"weight_bits": (8,) * 32, "compute_bits": (8,) * 31 + (16,)},
            r"plan\.compute_bits of layer 31 is 16, but its weights have 8 bits; use at most those",
        ),
        (
            {"compute_bits": (4,) * 32},
            r"layer 0 is 4, but its weights have 16 bits, of which those stored first are weights of 8; use 8 or 16, "
            r"or set weight_bits to 8",
        ),
    ],
)
def test_bits_that_the_weights_do_not_hold_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_plan(LLAMA, replace(DENSE, **change))


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(PlanError, match="compute_bits is an empty list"):
        static_plan(LLAMA, compute_bits=[])


def test_a_quantized_checkpoint_holds_no_weights_of_fewer_bits() -> None:
    stored = replace(LLAMA, quantization=Quantization(method="gptq", bits=8, group_inputs=128))
    check_plan(stored, dense_plan(stored))
    with pytest.raises(PlanError, match=r"layer 0 is 4, but the checkpoint of llama2_7b stores gptq weights"):
        static_plan(stored, compute_bits=4)


def test_lower_products_keep_every_byte_and_need_no_copy() -> None:
    assert weight_bytes(LLAMA, NESTED) == weight_bytes(LLAMA, DENSE)
    for before, after in ((DENSE, NESTED), (NESTED, DENSE)):
        left = without_dropped(resident_of(before), after)
        assert left == resident_of(before)
        assert copies_between(LLAMA, left, after) == []
        assert running_plan(left, after) == after


def test_a_layer_at_another_precision_is_read_as_close_to_the_wanted_bits_as_its_weights_allow() -> None:
    assert [nested_bits(bits, 4) for bits in (16, 8, 4)] == [8, 4, 4]
    assert [nested_bits(bits, 8) for bits in (16, 8, 4)] == [8, 8, 4]
    assert [nested_bits(bits, 16) for bits in (16, 8, 4)] == [16, 8, 4]
    wanted = static_plan(LLAMA, weight_bits=8, compute_bits=[4] * 31 + [8])
    now = without_dropped(resident_of(DENSE), wanted)
    runs = running_plan(now, wanted)
    assert runs.weight_bits == (16,) * 32
    assert runs.product_bits == (8,) * 31 + (16,)
    check_plan(LLAMA, runs)
    for copy in copies_between(LLAMA, now, wanted):
        now = joined(now, copy)
        check_plan(LLAMA, running_plan(now, wanted))
    assert running_plan(now, wanted) == wanted


# --- The price -------------------------------------------------------------------------------------------------------


def saved_s(calibration: str, plan: Plan, high: int, low: int, tokens: int) -> tuple[float, float]:
    """Return the seconds that products at fewer bits save in a pass, as priced and by hand."""
    latency = load_calibration(calibration)
    full = replace(plan, compute_bits=None)
    load = [(tokens, 0)], 0, 0, 1
    priced = latency.iteration_s(full, *load) - latency.iteration_s(plan, *load)
    each = (latency.linear_s(kind, bits, tokens) for bits in (high, low) for kind in ("mha", "ffn"))
    mha, ffn, low_mha, low_ffn = each
    return priced, sum(plan.nested) * (mha + ffn - low_mha - low_ffn)


@pytest.mark.parametrize("tokens", [1, 64, 2048])
def test_a_pass_costs_what_products_of_these_bits_cost(tokens: int) -> None:
    for plan, high, low in (
        (NESTED, 16, 8),
        (static_plan(LLAMA, compute_bits=[8] * 5 + [16] * 27), 16, 8),
        (static_plan(LLAMA, weight_bits=8, compute_bits=4), 8, 4),
    ):
        priced, by_hand = saved_s("llama2_7b_a100_trtllm", plan, high, low, tokens)
        assert priced == pytest.approx(by_hand, rel=1e-9)
        assert tokens > 1 or priced > 0  # a weight-only kernel reads fewer bytes, but multiplies no faster


def test_fp8_is_priced_by_the_measured_products_and_the_rounding_of_their_inputs() -> None:
    content = json.loads(Path("conf/calibration/llama3.1_8b_h100.json").read_text())
    table, latency = content["tables"]["fp8_linear"], load_calibration("llama3.1_8b_h100")
    assert latency.bits == (16, 8)
    for kind in ("mha", "ffn"):
        for tokens in (1, 100, 5000):
            assert latency.linear_s(kind, 8, tokens) == pytest.approx(
                float(np.interp(tokens, table["tokens"], table[kind])) * 1e-6, rel=1e-9
            )
    # Half the bytes of a decode's weights, and twice the operations of a prompt's products a second, less the rounding.
    assert 1.3 < latency.linear_s("ffn", 16, 16) / latency.linear_s("ffn", 8, 16) < 2.0
    assert 1.2 < latency.linear_s("ffn", 16, 8192) / latency.linear_s("ffn", 8, 8192) < 2.0


def test_a_calibration_states_8_bits_once_and_to_the_same_end() -> None:
    content = json.loads(Path("conf/calibration/llama3.1_8b_h100.json").read_text())
    tables = content["tables"]
    twice = {**content, "tables": {**tables, "linear_us": {**tables["linear_us"], "8": tables["linear_us"]["16"]}}}
    fp8 = {**tables["fp8_linear"], "tokens": [*tables["fp8_linear"]["tokens"][:-1], 16000]}
    shorter = {**content, "tables": {**tables, "fp8_linear": fp8}}
    for wrong in (twice, shorter):
        with pytest.raises(CalibrationError, match="fp8_linear must end at the last of tokens, 16384, and linear_us"):
            calibration_from_dict(wrong)


def test_a_device_without_prices_of_these_bits_is_named_with_what_to_do() -> None:
    with pytest.raises(CalibrationError, match=r"'llama2_7b_a100' has no 8-bit times.*Limit weight_bits and compute"):
        load_calibration("llama2_7b_a100").check_bits(NESTED)
    resident = static_plan(LLAMA, weight_bits=8, compute_bits=4)
    with pytest.raises(CalibrationError, match="has no 4-bit times"):
        load_calibration("llama2_7b_h100").check_bits(resident)
    load_calibration("llama2_7b_h100").check_bits(NESTED)


# --- The loss --------------------------------------------------------------------------------------------------------


def test_products_cost_what_weights_of_their_bits_cost() -> None:
    model, quality = load_model("smollm2_135m"), load_quality("smollm2_135m")
    for resident, bits in ((16, 8), (8, 4)):
        nested = static_plan(model, weight_bits=resident, compute_bits=bits)
        assert quality.nll(nested) == quality.nll(static_plan(model, weight_bits=bits))
    published = load_quality("llama2_7b_published")
    assert math.isnan(published.charge(NESTED))
    four = static_plan(LLAMA, weight_bits=8, compute_bits=4)
    assert published.charge(four) == published.nll(static_plan(LLAMA, weight_bits=4))
