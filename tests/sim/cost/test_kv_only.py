"""Layers of ``kv_only`` (POP): their price, their loss, and plans that are refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.cost.added_losses import AddedLosses
from sim.cost.kv_only_loss import KVOnlyLoss, kv_only_layers, read_kv_only_loss
from sim.cost.latency import LatencyModel, load_calibration
from sim.cost.model_spec import load_model
from sim.cost.plan import KeepMask, check_plan, dense_plan, describe, drop, keep_all, with_mask
from sim.cost.plan_json import plan_from_json, plan_to_json
from sim.cost.quality import load_quality
from sim.errors import CalibrationError, PlanError
from sim.policies.fixed import static_plan

LLAMA = load_model("llama2_7b")
GROUPED = load_model("llama3.1_8b")
DENSE = dense_plan(LLAMA)
DEEP = tuple(range(22, 32))


def price(latency: LatencyModel, layers: tuple[int, ...], chunks: list[tuple[int, int]], *load: int) -> float:
    """Return the seconds of an iteration of Llama-2-7B with these layers of kv_only."""
    plan = static_plan(LLAMA, kv_only=layers)
    return latency.iteration_s(plan, chunks, *load, qkv_share=LLAMA.qkv_share)


def test_the_share_is_that_of_q_k_and_v_in_the_multiplications_of_an_mha_block() -> None:
    assert LLAMA.qkv_share == 3 / 4
    assert GROUPED.qkv_share == (4096 + 2 * 1024) / (4096 + 2 * 1024 + 4096)
    biased = replace(LLAMA, qkv_bias=True)
    assert biased.qkv_share == LLAMA.qkv_share


def test_a_layer_saves_its_ffn_block_its_output_projection_and_the_attention_of_prompts() -> None:
    latency = load_calibration("llama2_7b_a100")
    saved = price(latency, (), [(1024, 0)], 0, 0, 1) - price(latency, DEEP, [(1024, 0)], 0, 0, 1)
    mha, ffn = latency.linear_s("mha", 16, 1024), latency.linear_s("ffn", 16, 1024)
    one_mha, one_ffn = latency.linear_s("mha", 16, 1), latency.linear_s("ffn", 16, 1)
    each = mha / 4 - one_mha / 4 + ffn - one_ffn
    each += latency.prefill_attention_s(1024) - latency.decode_attention_s(1, 1024)
    assert saved == pytest.approx(10 * each)


def test_a_chunk_that_does_not_end_its_prompt_only_writes_kv() -> None:
    latency = load_calibration("llama2_7b_a100")
    saved = price(latency, (), [(512, 256)], 0, 0, 0) - price(latency, DEEP, [(512, 256)], 0, 0, 0)
    each = latency.linear_s("mha", 16, 512) / 4 + latency.linear_s("ffn", 16, 512)
    each += latency.prefill_attention_s(512, 256)
    assert saved == pytest.approx(10 * each)


def test_decodes_alone_cost_what_they_cost_without_it() -> None:
    latency = load_calibration("llama2_7b_a100")
    assert price(latency, DEEP, [], 16, 9000, 16) == price(latency, (), [], 16, 9000, 16)
    plan = static_plan(LLAMA, kv_only=DEEP)
    assert latency.iteration_s(plan, [], 16, 9000, 16) == latency.iteration_s(DENSE, [], 16, 9000, 16)


def test_a_one_token_prompt_costs_what_a_decode_costs() -> None:
    latency = load_calibration("llama2_7b_a100")
    every = tuple(range(32))
    assert price(latency, every, [(1, 99)], 3, 300, 4) == pytest.approx(price(latency, (), [], 4, 400, 4), rel=1e-12)


def test_an_all_reduce_is_that_of_the_tokens_that_pass_all_of_the_block() -> None:
    latency = load_calibration("llama2_7b_a100_tp2")
    shard = LLAMA.shard(2)
    plan = static_plan(shard, kv_only=DEEP)
    one, all_tokens = dense_plan(shard), 2048
    saved = latency.iteration_s(one, [(all_tokens, 0)], 0, 0, 1)
    saved -= latency.iteration_s(plan, [(all_tokens, 0)], 0, 0, 1, qkv_share=shard.qkv_share)
    content = json.loads(Path("conf/calibration/llama2_7b_a100_tp2.json").read_text())
    reduce = content["tables"]["allreduce"]

    def reduced_s(tokens: int) -> float:
        return float(np.interp(tokens, reduce["tokens"], reduce["us"])) * 1e-6

    mha = latency.linear_s("mha", 16, all_tokens) - reduced_s(all_tokens)
    one_mha = latency.linear_s("mha", 16, 1) - reduced_s(1)
    each = (1 - shard.qkv_share) * (mha - one_mha) + reduced_s(all_tokens) - reduced_s(1)
    each += latency.linear_s("ffn", 16, all_tokens) - latency.linear_s("ffn", 16, 1)
    each += latency.prefill_attention_s(all_tokens) - latency.decode_attention_s(1, all_tokens)
    assert saved == pytest.approx(10 * each)


def test_more_layers_never_cost_more_and_dropped_blocks_still_save() -> None:
    latency = load_calibration("llama2_7b_a100")
    rng = np.random.default_rng(5)
    for _ in range(50):
        chunks = [(int(rng.integers(300, 900)), int(rng.integers(0, 900))) for _ in range(int(rng.integers(1, 4)))]
        decodes = int(rng.integers(0, 30))
        load = decodes, 500 * decodes, decodes + int(rng.integers(0, len(chunks) + 1))
        order = rng.permutation(32).tolist()
        prices = [price(latency, tuple(order[:count]), chunks, *load) for count in range(0, 33, 4)]
        assert prices == sorted(prices, reverse=True)
        pruned = with_mask(DENSE, drop(LLAMA, mha=order[:3], ffn=order[2:6]))
        some = replace(pruned, kv_only=static_plan(LLAMA, kv_only=order[:8]).kv_only)
        assert latency.iteration_s(some, chunks, *load, qkv_share=LLAMA.qkv_share) < prices[2]


def test_a_plan_with_such_layers_is_not_priced_without_the_share() -> None:
    plan = static_plan(LLAMA, kv_only=[31])
    with pytest.raises(CalibrationError, match=r"'KV only 31'.*pass qkv_share"):
        load_calibration("llama2_7b_a100").iteration_s(plan, [(9, 0)], 0, 0, 1)


# --- The plan --------------------------------------------------------------------------------------------------------


def test_a_plan_names_its_layers_and_is_read_back_from_json() -> None:
    plan = static_plan(LLAMA, kv_only=[3, 30, 31], drop_ffn=[3])
    assert describe(plan) == "-FFN 3; KV only 3,30-31"
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan
    assert "kv_only" not in plan_to_json(DENSE)


def test_wrong_layers_are_refused() -> None:
    with pytest.raises(PlanError, match="kv_only: layer 32 does not exist"):
        static_plan(LLAMA, kv_only=[32])
    with pytest.raises(PlanError, match=r"plan\.kv_only has 2 entries"):
        check_plan(LLAMA, replace(DENSE, kv_only=(True, False)))
    with pytest.raises(PlanError, match=r"plan\.kv_only of layer 1 is 1; it must be true or false"):
        check_plan(LLAMA, replace(DENSE, kv_only=(True, 1, *[False] * 30)))


# --- The loss --------------------------------------------------------------------------------------------------------

SMALL = load_model("tiny")
COSTS = KVOnlyLoss("tiny", (2, 0, 1), (0.1, 0.05, 0.4))


def test_a_set_costs_what_the_smallest_measured_set_costs_that_contains_it() -> None:
    assert SMALL.num_layers >= 3
    small = replace(SMALL, num_layers=3)

    def cost(*layers: int) -> float:
        return COSTS.of(static_plan(small, kv_only=layers))

    assert cost() == 0.0
    assert cost(2) == cost(0) == cost(0, 2) == 0.1
    assert cost(1) == cost(0, 1, 2) == 0.4
    few = replace(COSTS, costs=(0.1,))
    with pytest.raises(CalibrationError, match=r"layers \[1\].*no set that was measured on tiny"):
        few.of(static_plan(small, kv_only=[1]))
    assert few.knows({2})
    assert not few.knows({0})


def test_a_layer_that_prefill_drops_costs_nothing() -> None:
    small = replace(SMALL, num_layers=3)
    nothing = KeepMask(mha=(True, False, True), ffn=(True, False, True))
    plan = replace(with_mask(dense_plan(small), nothing), kv_only=(False, True, False))
    assert kv_only_layers(plan) == set()
    assert COSTS.of(plan) == 0.0
    half = replace(plan, prefill=keep_all(small))
    assert kv_only_layers(half) == {1}


def test_what_was_not_measured_is_refused_and_charged_as_unknown() -> None:
    plan = static_plan(LLAMA, kv_only=DEEP)
    for name in ("llama2_7b_published", "llama2_7b_transferred"):
        quality = load_quality(name)
        with pytest.raises(CalibrationError, match="prompts only write KV is not known of llama2_7b"):
            quality.nll(plan)
        assert math.isnan(quality.charge(plan))
    measured = replace(load_quality("smollm2_135m"), added=AddedLosses())  # type: ignore[type-var]
    model = load_model("smollm2_135m")
    some = static_plan(model, kv_only=[29])
    with pytest.raises(CalibrationError, match=r"is not known of smollm2_135m; .*hw\.score kind=pop"):
        measured.nll(some)
    assert math.isnan(measured.charge(some))
    costs = KVOnlyLoss("smollm2_135m", tuple(range(29, -1, -1)), (0.25,))
    known = replace(measured, added=AddedLosses(kv_only=costs))  # type: ignore[type-var]
    dense = dense_plan(model)
    assert known.nll(some) == pytest.approx(measured.nll(dense) + 0.25)
    assert math.isnan(known.charge(static_plan(model, kv_only=[28])))
    assert known.charge(some) == known.nll(some)


def written(folder: Path, **changed: Any) -> Path:
    content = {"model": "tiny", "order": [2, 0, 1], "losses": {"test": [0.1, 0.2], "calibration": [0.0, -0.01]}}
    path = folder / "tiny.json"
    path.write_text(json.dumps({**content, **changed}))
    return path


def test_costs_are_read_from_a_file(tmp_path: Path) -> None:
    assert read_kv_only_loss(written(tmp_path), "test", "tiny", 3) == KVOnlyLoss("tiny", (2, 0, 1), (0.1, 0.2))
    assert read_kv_only_loss(written(tmp_path), "calibration", "tiny", 3).costs == (0.0, -0.01)


@pytest.mark.parametrize(
    "changed",
    [
        {"order": [2, 0, 0]},
        {"order": [2, 0, True]},
        {"order": "201"},
        {"losses": {"test": []}},
        {"losses": {"test": [1, 2, 3, 4]}},
        {"losses": {"test": [0.1, "x"]}},
        {"losses": {"test": [1e9]}},
        {"losses": {"calibration": [0.1]}},
        {"losses": []},
    ],
)
def test_a_malformed_file_of_costs_is_an_error(tmp_path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match="no costs of kv_only on the test text"):
        read_kv_only_loss(written(tmp_path, **changed), "test", "tiny", 3)


def test_costs_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="of the model 'tiny', but it must be 'other'"):
        read_kv_only_loss(written(tmp_path), "test", "other", 3)
