from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.cost import latency
from sim.cost.bounds import Factors
from sim.cost.gpu import Gpu
from sim.cost.latency import (
    LatencyModel,
    calibration_from_dict,
    calibration_names,
    chunk_context_sum,
    copy_speed,
    load_calibration,
    plan_layers,
)
from sim.cost.latency_tables import interp1, interp2, interpolated
from sim.cost.model_spec import load_model
from sim.cost.plan import Plan, dense_plan, drop, with_mask
from sim.errors import CalibrationError

COMMITTED = calibration_names()
TOY: dict[str, Any] = {
    "schema": 1,
    "name": "toy",
    "model": "llama2_7b",
    "device": "a100_80gb",
    "kind": "measured",
    "fixed_us": 10.0,
    "fixed_source": "made up",
    "validation": "none",
    "sources": [],
    "notes": [],
    "errors": {},
    "tables": {
        "tokens": [1, 16, 64],
        "linear_us": {"16": {"mha": [10.0, 16.0, 40.0], "ffn": [20.0, 30.0, 90.0]}},
        "token_us": [1.0, 1.0, 2.0],
        "sequences": [1, 8],
        "head_us": [100.0, 107.0],
        "prefill_attention": {"tokens": [16, 64], "context": [8.5, 100.0], "us": [[5.0, 9.0], [8.0, 30.0]]},
        "decode_attention": {"batch": [1, 8], "context": [16, 128], "us": [[4.0, 8.0], [6.0, 50.0]]},
    },
}


def toy(**changes: Any) -> LatencyModel:
    content = deepcopy(TOY)
    content["tables"].update(changes)
    return calibration_from_dict(content)


@pytest.fixture(scope="module", params=COMMITTED)
def committed(request: pytest.FixtureRequest) -> LatencyModel:
    return load_calibration(request.param)


def test_a_price_at_a_measured_point_is_the_measurement() -> None:
    model = toy()
    assert model.linear_s("mha", 16, 16) == pytest.approx(16e-6, rel=1e-12)
    assert model.head_s(8) == pytest.approx(107e-6, rel=1e-12)
    assert model.decode_attention_s(8, 8 * 128) == pytest.approx(50e-6, rel=1e-12)
    # A chunk of 16 tokens without prefix attends to 8.5 tokens on average.
    assert model.prefill_attention_s(16, 0) == pytest.approx(5e-6, rel=1e-12)


def test_above_its_last_point_a_price_goes_on_with_the_last_slope() -> None:
    model = toy()
    assert model.linear_s("mha", 16, 64 + 48) == pytest.approx((40 + 24) * 1e-6, rel=1e-12)
    assert model.head_s(15) == pytest.approx((107 + 7) * 1e-6, rel=1e-12)
    assert model.decode_attention_s(8, 8 * (128 + 112)) == pytest.approx((50 + 44) * 1e-6, rel=1e-12)


def test_below_its_first_point_a_price_is_held() -> None:
    model = toy()
    assert model.decode_attention_s(1, 2) == model.decode_attention_s(1, 16)
    assert model.prefill_attention_s(1, 0) == model.prefill_attention_s(16, 0)


def test_an_iteration_is_the_sum_of_its_parts() -> None:
    model, plan = toy(), dense_plan(load_model("llama2_7b"))
    blocks = model.linear_s("mha", 16, 20) + model.linear_s("ffn", 16, 20) + model.attention_s([(16, 0)], 4, 100)
    expected = 10e-6 + model.token_s(20) + model.head_s(5) + 32 * blocks
    assert model.iteration_s(plan, [(16, 0)], 4, 100, 5) == pytest.approx(expected, rel=1e-12)


def test_factors_of_blocks_at_one_precision_change_those_blocks_alone() -> None:
    linear = {bits: {"mha": [10.0, 16.0, 40.0], "ffn": [20.0, 30.0, 90.0]} for bits in ("16", "4")}
    model, dense = toy(linear_us=linear), dense_plan(load_model("llama2_7b"))
    some = replace(dense, weight_bits=(16,) * 12 + (4,) * 20)
    faster = model.with_factors(Factors(), {4: Factors(memory_bound=0.75, compute_bound=0.75)})
    for tokens in (1, 16, 20, 64, 112, 5000):  # also between and beyond the points
        shape = ([(tokens - 1, 0)] if tokens > 1 else [], 1, 100, 1)
        blocks = model.linear_s("mha", 4, tokens) + model.linear_s("ffn", 4, tokens)
        saved = model.iteration_s(some, *shape) - faster.iteration_s(some, *shape)
        assert saved == pytest.approx(0.25 * 20 * blocks, rel=1e-9)
        assert faster.iteration_s(dense, *shape) == model.iteration_s(dense, *shape)
    assert model.linear_s("mha", 4, 16) == pytest.approx(16e-6, rel=1e-12)  # the model itself stays


def test_a_file_may_have_factors_of_blocks_at_the_precisions_that_it_has() -> None:
    content = deepcopy(TOY)
    content["tables"]["linear_us"]["4"] = {"mha": [12.0, 19.0, 50.0], "ffn": [25.0, 35.0, 95.0]}
    pairs = {"factors": {"memory_bound": 1.2}, "block_factors": {"4": {"memory_bound": 2.0, "compute_bound": 1.5}}}
    read = calibration_from_dict({**content, **pairs})
    expected = calibration_from_dict(content).with_factors(
        Factors(memory_bound=1.2), {4: Factors(memory_bound=2.0, compute_bound=1.5)}
    )
    for tokens in (1, 20, 300):
        for bits in (16, 4):
            assert read.linear_s("ffn", bits, tokens) == expected.linear_s("ffn", bits, tokens)
    assert read.linear_s("ffn", 4, 1) == pytest.approx(2.0 * 25e-6, rel=1e-3)
    assert read.token_s(1) == pytest.approx(1.2 * 1e-6)
    with pytest.raises(CalibrationError, match="block_factors has '8'; the tables have 16, 4 bits"):
        calibration_from_dict({**content, "block_factors": {"8": {"memory_bound": 2.0}}})
    with pytest.raises(CalibrationError, match="memory_bound is 0"):
        calibration_from_dict({**content, "block_factors": {"4": {"memory_bound": 0}}})


def test_a_block_kept_only_for_prefill_sees_only_prompt_tokens() -> None:
    model, spec = toy(), load_model("llama2_7b")
    dense = dense_plan(spec)
    plan = replace(dense, decode=drop(spec, mha=[3], ffn=[5]))
    both = model.linear_s("mha", 16, 20) + model.attention_s([(16, 0)], 4, 100) + model.linear_s("ffn", 16, 20)
    only = model.linear_s("mha", 16, 16) + model.prefill_attention_s(16) + model.linear_s("ffn", 16, 16)
    saved = model.iteration_s(dense, [(16, 0)], 4, 100, 5) - model.iteration_s(plan, [(16, 0)], 4, 100, 5)
    assert saved == pytest.approx(both - only, rel=1e-9)
    assert model.iteration_s(plan, [(16, 0)], 0, 0, 1) == model.iteration_s(dense, [(16, 0)], 0, 0, 1)
    decode_only = with_mask(dense, plan.decode)
    assert model.iteration_s(plan, [], 4, 100, 4) == model.iteration_s(decode_only, [], 4, 100, 4)


def test_a_plan_counts_its_blocks_by_precision_and_stage() -> None:
    spec = load_model("llama2_7b")
    plan = replace(dense_plan(spec), weight_bits=(4, 8) + (16,) * 30, decode=drop(spec, mha=[0, 9], ffn=[1]))
    assert plan_layers(plan).tolist() == [[29, 1, 30, 0], [1, 0, 0, 1], [0, 1, 1, 0]]


def test_an_iteration_takes_no_less_than_a_slow_host_needs_to_launch_it() -> None:
    plan, fast = dense_plan(load_model("llama2_7b")), toy()
    slow = fast.with_host_floor(2e-3)
    assert (slow.host_floor_s, fast.host_floor_s) == (2e-3, 0.0)
    few, much = ([], 1, 16, 1), ([(64, 0)], 8, 8 * 128, 8)
    assert fast.iteration_s(plan, *few) < 2e-3 < fast.iteration_s(plan, *much)
    assert slow.iteration_s(plan, *few) == 2e-3
    assert slow.iteration_s(plan, *much) == fast.iteration_s(plan, *much)
    rows = np.array([[32, 0, 0, 0, 1, 16, 1, 0, 0, 0]])
    assert slow.layered_iteration_s(rows, 1, 1) == 2e-3 > fast.layered_iteration_s(rows, 1, 1)
    with pytest.raises(CalibrationError, match="rows of 9 columns; they need 10"):
        fast.layered_iteration_s(rows[:, :9], 1, 1)
    written = calibration_from_dict(deepcopy(TOY) | {"host_floor_us": 2000.0})
    assert written.iteration_s(plan, *few) == 2e-3
    with pytest.raises(CalibrationError, match="host_floor_s is nan"):
        fast.with_host_floor(float("nan"))
    for wrong, message in ((-1.0, "host_floor_us must hold"), ("5", "host_floor_us is '5'"), ({}, "host_floor_us is")):
        with pytest.raises(CalibrationError, match=message):
            calibration_from_dict(deepcopy(TOY) | {"host_floor_us": wrong})


ALLREDUCE: dict[str, Any] = {"tokens": [0.5, 8.0, 128.0], "us": [5.0, 8.0, 128.0]}


def divided(**tables: Any) -> LatencyModel:
    content = deepcopy(TOY) | {"tp": 4}
    content["tables"] |= {"allreduce": ALLREDUCE, **tables}
    return calibration_from_dict(content)


@pytest.mark.parametrize(("tokens", "us"), [(1, 5.2), (8, 8.0), (20, 20.0), (64, 64.0), (128, 128.0), (300, 300.0)])
def test_every_block_of_a_divided_model_ends_with_an_all_reduce(tokens: int, us: float) -> None:
    model, alone = divided(), toy()
    assert (model.tp, alone.tp) == (4, 1)
    for kind in ("mha", "ffn"):
        added = model.linear_s(kind, 16, tokens) - alone.linear_s(kind, 16, tokens)
        assert added == pytest.approx(us * 1e-6, rel=1e-9)


def test_a_dropped_block_saves_its_all_reduce() -> None:
    llama, model, alone = load_model("llama2_7b"), divided(), toy()
    dense, pruned = dense_plan(llama), with_mask(dense_plan(llama), drop(llama, mha=[3, 4], ffn=[5]))
    for chunks, decodes in (([], 8), ([(16, 0)], 0), ([(16, 0)], 4)):
        tokens = sum(chunk for chunk, _ in chunks) + decodes
        work = chunks, decodes, 10 * decodes, 1
        saved, saved_alone = (one.iteration_s(dense, *work) - one.iteration_s(pruned, *work) for one in (model, alone))
        us = float(interpolated(np.array(ALLREDUCE["tokens"]), np.array(ALLREDUCE["us"]), np.array([float(tokens)]))[0])
        assert saved - saved_alone == pytest.approx(3 * us * 1e-6, rel=1e-6)


def test_factors_split_products_at_their_own_knee_and_scale_all_reduces_as_memory() -> None:
    slow = {"tokens": [1.0, 8.0, 1e6], "us": [5_000.0, 6_000.0, 9e7]}  # far above the products
    model, alone = divided(allreduce=slow), toy()
    factors = Factors(memory_bound=1.5, compute_bound=3.0)
    for kind in ("mha", "ffn"):
        for tokens in (1, 16, 64, 500):
            allreduce_s = model.linear_s(kind, 16, tokens) - alone.linear_s(kind, 16, tokens)
            scaled_s = alone.with_factors(factors).linear_s(kind, 16, tokens) + 1.5 * allreduce_s
            assert model.with_factors(factors).linear_s(kind, 16, tokens) == pytest.approx(scaled_s, rel=1e-9)
    twice = model.with_factors(factors).with_factors(Factors(memory_bound=2.0, compute_bound=2.0))
    assert twice.linear_s("ffn", 16, 30) == pytest.approx(2 * model.with_factors(factors).linear_s("ffn", 16, 30))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"tokens": [1.0, 2.0], "us": [1.0, 2.0]}, "must reach beyond the last of tokens, 64"),
        ({"tokens": [1.0, 128.0], "us": [5.0, 1.0]}, "us must not fall"),
        ({}, r"tables.allreduce is \{\}; it must hold tokens and us"),
        (None, "tables.allreduce is None; it must hold tokens and us"),
    ],
)
def test_all_reduces_that_would_make_prices_negative_or_are_no_table_are_refused(table: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        divided(allreduce=table)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tp": 4}, "tables.allreduce must be there with a tp above 1"),
        ({"tp": 3}, "tp is 3; allowed are 1, 2, 4, 8"),
        ({"tp": True}, "tp is True; allowed are"),
        ({"tp": [2]}, "tp is"),
    ],
)
def test_a_degree_without_its_all_reduces_is_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibration_from_dict(deepcopy(TOY) | content)


def test_all_reduces_of_a_model_on_one_gpu_are_refused() -> None:
    content = deepcopy(TOY)
    content["tables"]["allreduce"] = ALLREDUCE
    with pytest.raises(CalibrationError, match=r"tp is 1; tables.allreduce must be there with a tp above 1, and only"):
        calibration_from_dict(content)
    with pytest.raises(CalibrationError, match=r"allreduce.us must hold 3 microseconds"):
        divided(allreduce={"tokens": [1.0, 2.0, 3.0], "us": [1.0, 2.0]})


@pytest.mark.parametrize("name", [name for name in COMMITTED if "_tp" in name])
def test_more_gpus_take_less_time_but_more_than_their_share_of_what_fewer_take(name: str) -> None:
    model, stem = load_calibration(name), name.rsplit("_tp", 1)[0]
    alone = {"llama2_7b_a100": "llama2_7b_a100_trtllm"}.get(stem, stem)  # of the same kernels
    others = [other for other in COMMITTED if other == alone or other.startswith(f"{stem}_tp")]
    fewer = {load_calibration(other).tp: other for other in others}
    tp = max((degree for degree in fewer if degree < model.tp), default=0)
    if not tp:
        pytest.skip("no calibration of fewer GPUs")
    before, plan = load_calibration(fewer[tp]), dense_plan(load_model(model.model))
    for chunks, decodes in (([], 1), ([], 64), ([(512, 0)], 0), ([(2048, 0)], 32)):
        fewer_s, more_s = (one.iteration_s(plan, chunks, decodes, 500 * decodes, 1) for one in (before, model))
        if "l40s" not in name:  # over PCIe the all-reduces of long prompts take longer than the products they save
            assert more_s < fewer_s
        assert more_s > 0.98 * fewer_s * tp / model.tp


def test_a_precision_that_was_not_measured_is_refused_by_name() -> None:
    model, plan = toy(), replace(dense_plan(load_model("llama2_7b")), weight_bits=(4,) * 32)
    with pytest.raises(CalibrationError, match=r"no 4-bit times; it has 16\..*llama2_7b_a100_trtllm") as refused:
        model.iteration_s(plan, [], 1, 10, 1)
    assert "qwen" not in str(refused.value)  # which a calibration of another model would not help
    with pytest.raises(CalibrationError, match="did you mean 'mha'"):
        model.linear_s("mhaa", 16, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [1, 1, 64]}, "ascending"),
        ({"token_us": [1.0, 2.0]}, "token_us must hold 3"),
        ({"head_us": [1.0, float("nan")]}, "head_us"),
        ({"head_us": [1.0, -1.0]}, "head_us"),
        ({"decode_attention": {"batch": [1, 8], "context": [1, 2]}}, "us"),
    ],
)
def test_a_malformed_calibration_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        toy(**change)


def test_an_unknown_calibration_offers_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"did you mean 'llama3\.1_8b_rtx4090'"):
        load_calibration("llama3.1_8b_rtx4080")
    with pytest.raises(CalibrationError, match="no calibration file"):
        load_calibration(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"tables": ', encoding="utf-8")
    with pytest.raises(CalibrationError, match="is not valid JSON"):
        load_calibration(tmp_path / "half.json")
    (tmp_path / "old.json").write_text(json.dumps(TOY | {"schema": 0}), encoding="utf-8")
    with pytest.raises(CalibrationError, match="schema is 0"):
        load_calibration(tmp_path / "old.json")


def test_the_overhead_of_an_iteration_can_be_replaced_and_says_so() -> None:
    model, plan = toy(), dense_plan(load_model("llama2_7b"))
    other = model.with_fixed(1e-3, "a trial")
    assert (other.fixed_s, other.fixed_source, model.fixed_s) == (1e-3, "a trial", pytest.approx(1e-5))
    more = other.iteration_s(plan, [], 2, 64, 2) - model.iteration_s(plan, [], 2, 64, 2)
    assert more == pytest.approx(1e-3 - 1e-5, rel=1e-9)
    with pytest.raises(CalibrationError, match="at least 0"):
        model.with_fixed(-1.0, "wrong")


def test_weights_come_as_fast_as_measured_and_else_as_the_data_sheet_says() -> None:
    gpu = Gpu(
        name="card",
        memory_bytes=1e10,
        memory_bandwidth_bytes_per_s=1e12,
        dense_fp16_flop_per_s=1e14,
        host_to_device_bytes_per_s=2e10,
    )
    stated = copy_speed(toy(), gpu)
    assert (stated.host_to_device_bytes_per_s, stated.slowdown) == (2e10, 0.02)
    assert "not measured" in stated.source
    run = {"device_run": {"host_to_device_bytes_per_s": 3e9, "copy_slowdown": 0.1}}
    measured = copy_speed(calibration_from_dict(deepcopy(TOY) | run), gpu)
    assert (measured.host_to_device_bytes_per_s, measured.slowdown) == (3e9, 0.1)
    run["device_run"]["copy_slowdown"] = -0.1
    with pytest.raises(CalibrationError, match="at least 0"):
        calibration_from_dict(deepcopy(TOY) | run)


def test_extrapolation_is_reported_for_every_axis() -> None:
    model = toy()
    assert model.in_range([(16, 50)], 8, 8 * 128, 8)
    assert not model.in_range([], 9, 9, 8)
    assert not model.in_range([], 8, 8 * 128 + 1, 8)
    assert not model.in_range([(65, 0)], 0, 0, 1)
    assert not model.in_range([(16, 100)], 0, 0, 1)
    assert not model.in_range([(1, 0)], 0, 0, 9)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(0, 500))
def test_cutting_a_prompt_into_chunks_keeps_the_context_it_attends_to(chunks: list[int], prefix: int) -> None:
    start, total = prefix, 0
    for chunk in chunks:
        total += chunk_context_sum(chunk, start)
        start += chunk
    assert total == chunk_context_sum(sum(chunks), prefix)


def test_committed_calibrations_cover_the_models_and_devices_of_the_readme() -> None:
    wanted = {f"{model}_{gpu}" for model in ("llama2_7b", "llama3.1_8b") for gpu in ("a100", "h100", "h200", "l40s")}
    wanted |= {"llama3.1_8b_rtx4090", "llama3.1_8b_rtx_pro_6000", "llama3.1_8b_a6000", "qwen2_7b_a30"}
    wanted |= {"llama2_7b_l4", "llama3_8b_l4"}
    assert wanted <= set(COMMITTED)


def test_a_committed_calibration_is_small_and_states_model_sources_and_errors(committed: LatencyModel) -> None:
    assert (latency.CALIBRATIONS / f"{committed.name}.json").stat().st_size < 200_000
    assert load_model(committed.model).num_layers > 0
    assert (latency.REPOSITORY / "conf" / "gpu" / f"{committed.device}.yaml").is_file()
    assert all(source["commit"] for source in committed.sources)
    measured_here = any("hw.calibrate source=device" in source.get("path", "") for source in committed.sources)
    assert measured_here or all(source["repository"] and source["licence"] for source in committed.sources)
    terms = {f"{kind}_linear_{bits}" for kind in ("mha", "ffn") for bits in committed.bits}
    terms |= {"token", "head", "prefill_attention", "decode_attention"}
    by_simulation = "simulating the runs" in committed.fixed_source  # then the errors are those of a run's figures
    assert committed.errors if by_simulation else terms <= set(committed.errors)
    for error in committed.errors.values():
        assert error.points > 0
        assert 0 <= error.median <= error.p95
        assert (error.median < 0.03 and error.p95 < 0.12) or error.note
    assert by_simulation or ("runs of hw.engine" if measured_here else "first 60 s") in committed.fixed_source
    assert (committed.kind == "derived") == ("DERIVED" in " ".join(committed.notes))


def test_every_price_grows_with_tokens_batch_and_context(committed: LatencyModel) -> None:
    counts = [1, 2, 7, 16, 17, 33, 64, 100, 129, 256, 300, 513, 1024, 2048, 5000, 20000]
    for bits in committed.bits:
        for kind in ("mha", "ffn"):
            prices = [committed.linear_s(kind, bits, count) for count in counts]
            assert prices == sorted(prices)
    for prices in (
        [committed.head_s(count) for count in counts],
        [committed.token_s(count) for count in counts],
        [committed.prefill_attention_s(count, 100) for count in counts],
        [committed.prefill_attention_s(64, count) for count in counts],
        [committed.decode_attention_s(count, 700 * count) for count in counts],
        [committed.decode_attention_s(32, 32 * count) for count in counts],
    ):
        assert prices == sorted(prices)
        assert prices[0] > 0


def test_dropping_a_block_never_raises_the_price(committed: LatencyModel) -> None:
    spec = load_model(committed.model)
    plan = dense_plan(spec)
    loads: list[tuple[list[tuple[int, int]], int, int, int]] = [
        ([], 16, 16 * 500, 16),
        ([(512, 0)], 0, 0, 1),
        ([(200, 100), (50, 0)], 30, 30 * 700, 31),
    ]
    for load in loads:
        price = committed.iteration_s(plan, *load)
        for mask in (drop(spec, mha=[3]), drop(spec, ffn=[3])):
            assert committed.iteration_s(with_mask(plan, mask), *load) < price
            assert committed.iteration_s(replace(plan, decode=mask), *load) <= price * (1 + 1e-12)
    nothing = with_mask(plan, drop(spec, mha=range(spec.num_layers), ffn=range(spec.num_layers)))
    expected = committed.fixed_s + committed.token_s(16) + committed.head_s(16)
    assert committed.iteration_s(nothing, *loads[0]) == pytest.approx(expected, rel=1e-12)


def test_decodes_in_the_same_iteration_never_make_prompts_cheaper(committed: LatencyModel) -> None:
    for batch in (1, 4, 32, 128):
        for context in (20, 300, 3000):
            for chunks in ([(16, 0)], [(512, 2000)], [(2048, 0)], [(64, 0)] * 8):
                assert committed.attention_s(chunks, batch, batch * context) >= committed.attention_s(chunks, 0, 0)


@pytest.mark.parametrize("name", ["llama2_7b_a100_trtllm", "llama3.1_8b_a100"])
def test_four_bits_are_faster_than_sixteen_at_few_tokens_and_slower_at_many_on_a100(name: str) -> None:
    model = load_calibration(name)
    for kind in ("mha", "ffn"):
        assert model.linear_s(kind, 4, 1) < 0.75 * model.linear_s(kind, 16, 1)
        assert model.linear_s(kind, 4, 2048) > model.linear_s(kind, 16, 2048)


def test_decode_attention_never_reads_kv_faster_than_memory_can(committed: LatencyModel) -> None:
    from omegaconf import OmegaConf

    gpu = OmegaConf.load(latency.REPOSITORY / "conf" / "gpu" / f"{committed.device}.yaml")
    kv_bytes = load_model(committed.model).shard(committed.tp).kv_bytes_per_token_layer
    for batch in (4, 32, 128):
        for context in (512, 1024, 4096):
            if not committed.in_range([], batch, batch * context, 1):
                continue
            least_s = batch * context * kv_bytes / float(gpu.memory_bandwidth_bytes_per_s)
            assert committed.decode_attention_s(batch, batch * context) > least_s


@given(st.floats(0, 300), st.floats(0, 5000))
def test_compiled_and_plain_interpolation_give_the_same_bits(x: float, y: float) -> None:
    rng = np.random.default_rng(3)
    rows, columns = np.array([1.0, 4.0, 9.0, 200.0]), np.array([16.0, 100.0, 4000.0])
    data = np.concatenate([rows, columns, rng.random(12)])
    assert interp1(data, 0, 4, 7, x) == interp1.py_func(data, 0, 4, 7, x)
    assert interp2(data, 0, 4, 4, 3, 7, x, y) == interp2.py_func(data, 0, 4, 4, 3, 7, x, y)
    points = np.array([x, 1.0, 4.0, 200.0, 201.0])
    assert interpolated(rows, data[7:11], points).tolist() == [interp1(data, 0, 4, 7, each) for each in points]


def prices_of_many_iterations(name: str) -> list[str]:
    """Return the exact prices of random iterations and plans, as hexadecimal text."""
    model = load_calibration(name)
    spec = load_model(model.model)
    rng = np.random.default_rng(7)
    prices = []
    for _ in range(200):
        chunks = [(int(rng.integers(1, 3000)), int(rng.integers(0, 9000))) for _ in range(int(rng.integers(0, 4)))]
        batch = int(rng.integers(0, 400))
        mask = drop(spec, mha=rng.integers(0, 28, 3).tolist(), ffn=rng.integers(0, 28, 3).tolist())
        plan: Plan = replace(
            dense_plan(spec), decode=mask, weight_bits=tuple(rng.choice(model.bits, spec.num_layers).tolist())
        )
        price = model.iteration_s(plan, chunks, batch, batch * int(rng.integers(1, 20000)), batch + len(chunks))
        prices.append(price.hex())
    return prices


@pytest.mark.parametrize("name", ["llama3.1_8b_rtx4090", "llama2_7b_a100_trtllm"])
def test_compiled_and_plain_python_price_every_iteration_to_the_same_bit(name: str) -> None:
    call = f"m['prices_of_many_iterations']({name!r})"
    script = f"import runpy, json; m = runpy.run_path({__file__!r}); print(json.dumps({call}))"
    plain = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=True,
        cwd=latency.REPOSITORY,
    )
    assert json.loads(plain.stdout) == prices_of_many_iterations(name)


def test_two_loads_of_a_calibration_price_alike() -> None:
    assert prices_of_many_iterations("llama3.1_8b_a100") == prices_of_many_iterations("llama3.1_8b_a100")
