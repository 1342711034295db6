"""Hidden states in place of keys and values (Apt-Serve): bytes, price, loss, text and JSON, and who refuses them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from sim.cost.kv_format import kv_formats, stored_kv_bytes
from sim.cost.latency import LatencyModel, calibration_from_dict, load_calibration
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.model_spec import load_model
from sim.cost.plan import KVCompression, KVKeep, Plan, check_plan, dense_plan, describe
from sim.cost.plan_json import plan_from_json, plan_to_json
from sim.cost.plan_text import plan_from_text
from sim.cost.quality import load_quality
from sim.engine.protocol import EngineConfig, Limits
from sim.engine.sim_engine import SimEngine
from sim.errors import CalibrationError, PlanError
from sim.policies.fixed import static_plan
from tests.sim.engine.kernel_cases import linear_description, without_gqa
from tests.sim.engine.plain_engine import PlainEngine
from tests.sim.serving import TINY, linear_latency, requests

LLAMA = load_model("llama2_7b")
HIDDEN = replace(dense_plan(LLAMA), kv_hidden=True)
MODEL = without_gqa(TINY)
DENSE = dense_plan(MODEL)
MHA_S, LAST = 1e-3, 100
"""Seconds of a token in the products of an MHA block of the prices below, and the last point of their table."""


def engine(
    plan: Plan, latency: LatencyModel, kind: type[SimEngine] | type[PlainEngine] = SimEngine, kv_blocks: int = 100
) -> Any:
    return kind(
        model=MODEL,
        latency=latency,
        config=EngineConfig(limits=Limits(max_batch_tokens=512, max_running=8), kv_block_tokens=4),
        plan=plan,
        budget_bytes=budget_for_kv_blocks(MODEL, DENSE, kv_blocks, 0, 4),
    )


def products() -> LatencyModel:
    """Return prices in which an iteration takes a second, and only the products of MHA blocks take longer."""
    none, mha = [0.0, 0.0], [MHA_S * 1e6, LAST * MHA_S * 1e6]
    bits = {"mha": mha, "ffn": none}
    surface = {"context": [1.0, 4096.0], "us": [none, none]}
    tables = {
        "tokens": [1, LAST],
        "linear_us": {"16": bits, "8": bits, "4": bits},
        "token_us": none,
        "sequences": [1, LAST],
        "head_us": none,
        "prefill_attention": {"tokens": [1, LAST], **surface},
        "decode_attention": {"batch": [1, LAST], **surface},
    }
    return calibration_from_dict({**linear_description(1e6), "tables": tables})


# --- Bytes -----------------------------------------------------------------------------------------------------------


def test_hidden_states_take_half_the_bytes_of_keys_and_values() -> None:
    assert 2 * stored_kv_bytes(LLAMA, HIDDEN, 1000) == stored_kv_bytes(LLAMA, dense_plan(LLAMA), 1000)
    formats = kv_formats(LLAMA, HIDDEN, 16)
    assert formats is not None
    assert {form.block_tokens for form in formats} == {32}


def test_a_request_holds_full_kv_in_prefill_and_hidden_states_after_it_whatever_comes_later() -> None:
    served = engine(replace(DENSE, kv_hidden=True), linear_latency())
    served.submit(requests((0.0, 32, 40)))
    assert served.run_until(0.5).kv_used_layer_blocks == 3 * 8
    assert served.run_until(1.5).kv_used_layer_blocks == 3 * 5  # 33 tokens, 8 in a block
    served.apply(DENSE)
    assert served.run_until(20.5).kv_used_layer_blocks == 3 * 7  # 52 tokens
    served.run_until(1e9)
    assert served.records().output_tokens.tolist() == [40]


def test_twice_the_requests_run_in_the_same_memory() -> None:
    preempted = {}
    for hidden in (False, True):
        served = engine(replace(DENSE, kv_hidden=hidden), linear_latency())  # 300 KV blocks of one layer
        served.submit([replace(one, request_id=i) for i, one in enumerate(requests((0.0, 12, 80)) * 8)])
        served.run_until(1e9)
        preempted[hidden] = served.records().preemptions.sum()
    assert preempted[True] == 0 < preempted[False]


# --- Price and loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SimEngine, PlainEngine])
def test_a_decode_first_computes_the_keys_and_values_of_its_context(kind: type[SimEngine] | type[PlainEngine]) -> None:
    served = engine(replace(DENSE, kv_hidden=True), products(), kind)
    served.submit([replace(one, request_id=i) for i, one in enumerate(requests((0.0, 32, 3), (0.0, 20, 3)))])
    served.run_until(1e9)
    rows = served.iterations()
    layer_s = [52, *(2 + 0.5 * (tokens + 2) for tokens in (50, 52))]  # both prompts; two decodes and their contexts
    assert rows.end_s - rows.start_s == pytest.approx([1.0 + 3 * MHA_S * each for each in layer_s])


@pytest.mark.parametrize("kind", [SimEngine, PlainEngine])
def test_a_context_beyond_the_last_point_of_the_products_is_extrapolated(
    kind: type[SimEngine] | type[PlainEngine],
) -> None:
    """Each of two prompts is within the table, but keys and values of both are computed at once."""
    counts = []
    for hidden in (False, True):
        served = engine(replace(DENSE, kv_hidden=hidden), products(), kind)
        served.submit([replace(one, request_id=i) for i, one in enumerate(requests((0.0, 60, 3), (0.5, 60, 3)))])
        served.run_until(1e9)
        counts.append(served.iterations().extrapolated.tolist())
    assert counts == [[0, 0, 0, 0], [0, 0, 1, 0]]


def test_keys_and_values_of_40_000_tokens_take_a_third_of_a_second_to_compute_on_an_a100() -> None:
    """This is why hidden states lose where tokens are due soon: 40,000 tokens are 10.5 GB of hidden states."""
    latency = load_calibration("llama2_7b_a100_trtllm")
    each = latency.linear_s("mha", 16, 40_000) / 2
    flop = 2 * 40_000 * 2 * 4096 * 4096
    assert 32 * each == pytest.approx(0.35, rel=0.1)
    assert 0.5 < flop / each / 312e12 < 1.0  # of the peak of the data sheet


def test_hidden_states_lose_nothing() -> None:
    quality = load_quality("llama2_7b_transferred", LLAMA)
    assert quality.nll(HIDDEN) == quality.nll(dense_plan(LLAMA))


# --- The field -------------------------------------------------------------------------------------------------------


def test_a_plan_with_hidden_states_survives_its_line_and_its_json() -> None:
    check_plan(LLAMA, HIDDEN)
    assert describe(HIDDEN) == "hidden states"
    assert plan_from_text(describe(HIDDEN), LLAMA.num_layers) == HIDDEN
    assert plan_from_json(json.loads(json.dumps(plan_to_json(HIDDEN)))) == HIDDEN
    assert static_plan(LLAMA, kv_hidden=True) == HIDDEN
    with pytest.raises(CalibrationError, match="neither true nor false"):
        plan_from_json({**plan_to_json(HIDDEN), "kv_hidden": 1})


def test_hidden_states_need_a_model_without_gqa_on_one_gpu() -> None:
    for model, hidden, kv in ((load_model("llama3_8b"), 8192, 4096), (LLAMA.shard(2), 8192, 8192)):
        with pytest.raises(PlanError, match=f"{hidden} bytes a token .* which take {kv}; it needs half .*no GQA"):
            check_plan(model, replace(dense_plan(model), kv_hidden=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_bits": (8,) * 32},
        {"kv_keep": (KVKeep(first_tokens=4, last_tokens=60),) * 32},
        {"kv_compression": KVCompression(method="lorc", percent=60)},
    ],
)
def test_hidden_states_do_not_go_with_changes_of_keys_and_values(changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="of which it stores none; leave kv_hidden out, or those"):
        check_plan(LLAMA, replace(HIDDEN, **changes))


def test_whether_hidden_states_are_kept_is_true_or_false() -> None:
    with pytest.raises(PlanError, match=r"plan\.kv_hidden is 1; it must be true or false"):
        check_plan(LLAMA, replace(HIDDEN, kv_hidden=1))  # type: ignore[arg-type]
