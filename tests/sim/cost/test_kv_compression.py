"""Plans that compress the KV of prompts: bytes, blocks, losses, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.cost.kv_compression_loss import KVCompressionLoss, read_kv_compression_loss
from sim.cost.kv_format import kv_formats, saved_tokens, stored_kv_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import KV_METHODS, KVCompression, KVKeep, Plan, check_plan, dense_plan, describe
from sim.cost.plan_json import plan_from_json, plan_to_json
from sim.cost.quality import QUALITIES, load_quality
from sim.engine.protocol import EngineConfig
from sim.engine.sim_engine import SimEngine
from sim.errors import CalibrationError, PlanError
from sim.policies.fixed import static_plan
from tests.sim.serving import TINY, linear_latency

LLAMA = load_model("llama2_7b")
SMOL = load_model("smollm2_135m")
DENSE = dense_plan(LLAMA)


def compressed(percent: int, method: str = "ada_kv", base: Plan = DENSE) -> Plan:
    return replace(base, kv_compression=KVCompression(method=method, percent=percent))


# --- The field -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", KV_METHODS)
def test_a_plan_is_described_and_comes_back_from_json(method: str) -> None:
    plan = compressed(70, method)
    check_plan(LLAMA, plan)
    assert describe(plan) == f"{method} 70%"
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan
    assert static_plan(LLAMA, kv_method=method, kv_percent=70) == plan


@pytest.mark.parametrize(
    ("method", "percent", "message"),
    [
        ("snapkv", 70, "there is no way 'snapkv' to compress KV; allowed are ada_kv, refree_kv, think, lorc"),
        ("ada_kv", 0, "it must be a whole number from 1 to 99"),
        ("lorc", 100, "it must be a whole number from 1 to 99"),
        ("lorc", 70.0, "it must be a whole number from 1 to 99"),
        ("think", 50, "compressed by think to 50 percent of its bytes; it must be a whole number from 51 to 99"),
    ],
)
def test_unknown_methods_and_impossible_shares_are_refused(method: str, percent: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        KVCompression(method=method, percent=percent)


def test_a_plan_does_not_choose_tokens_twice() -> None:
    plan = replace(compressed(70), kv_keep=(KVKeep(first_tokens=4, last_tokens=60), *(KVKeep(),) * 31))
    with pytest.raises(PlanError, match="compresses KV by ada_kv and drops tokens by kv_keep"):
        check_plan(LLAMA, plan)
    with pytest.raises(PlanError, match=r"plan\.kv_compression is 'think'; it must be a KVCompression, or None"):
        check_plan(LLAMA, replace(DENSE, kv_compression="think"))  # type: ignore[arg-type]
    for options in ({"kv_method": "lorc"}, {"kv_percent": 70}):
        with pytest.raises(PlanError, match="give both, such as ada_kv and 70, or neither"):
            static_plan(LLAMA, **options)  # type: ignore[arg-type]


# --- Bytes -----------------------------------------------------------------------------------------------------------


def test_a_prompt_stores_its_share_rounded_up_to_a_token() -> None:
    for tokens in (1, 7, 100, 1001):
        stored = tokens - saved_tokens(compressed(70), tokens)
        assert stored == math.ceil(tokens * 70 / 100)
        assert stored_kv_bytes(LLAMA, compressed(70), tokens) == 32 * stored * LLAMA.kv_bytes_per_token_layer
    assert saved_tokens(DENSE, 1000) == 0


def test_bits_of_kv_apply_to_what_is_stored() -> None:
    plan = replace(compressed(50), kv_bits=(8,) * 32)
    assert stored_kv_bytes(LLAMA, plan, 1000) == 32 * 500 * LLAMA.kv_bytes_per_token_layer_at(8)
    formats = kv_formats(LLAMA, plan, 16)
    assert formats is not None
    assert formats[0].blocks(1000 - saved_tokens(plan, 1000)) == math.ceil(500 / 31)


def test_a_simulated_request_frees_blocks_when_its_prefill_ends_and_stores_later_tokens_in_full() -> None:
    config = EngineConfig(kv_block_tokens=1)
    engine = SimEngine(
        model=TINY,
        latency=linear_latency(base_s=1.0),
        config=config,
        plan=compressed(40, base=dense_plan(TINY)),
        budget_bytes=10**9,
        host_to_device_bytes_per_s=1e9,
    )
    engine.submit_arrays(np.array([0.0]), np.array([50]), np.array([4]))
    used = [engine.run_until(time_s).kv_used_layer_blocks for time_s in (0.5, 1.5, 2.5, 3.5)]
    # The prompt; then its 40 percent and one token more in each iteration.
    assert used == [TINY.num_layers * count for count in (50, 21, 22, 23)]


# --- Loss ------------------------------------------------------------------------------------------------------------

COSTS = KVCompressionLoss("m", 1024, {"lorc": (1.0, 0.9, 0.5)}, {"lorc": (0.0, 0.4, 0.3)})


def test_a_loss_lies_between_the_nearest_measured_shares_and_never_falls() -> None:
    assert COSTS.of(DENSE) == 0.0
    assert COSTS.of(compressed(95, "lorc")) == pytest.approx(0.2)
    assert COSTS.of(compressed(90, "lorc")) == pytest.approx(0.4)
    assert COSTS.of(compressed(50, "lorc")) == pytest.approx(0.4)  # measured below: noise


def test_what_was_not_measured_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"by lorc to 49 % .* that method was measured from 0\.50 up"):
        COSTS.of(compressed(49, "lorc"))
    with pytest.raises(CalibrationError, match=r"by think to 70 % .* that method was not"):
        COSTS.of(compressed(70, "think"))


def test_the_measured_losses_are_charged() -> None:
    quality, spec = load_quality("smollm2_135m"), SMOL
    dense = quality.nll(dense_plan(spec))
    rows = json.loads((QUALITIES / "kv_compression" / "smollm2_135m.json").read_text())["variants"]
    (base,) = (row for row in rows if row["method"] == "full")
    for method, name in (("ada_kv", "Ada-KV"), ("lorc", "LoRC"), ("refree_kv", "ReFreeKV"), ("think", "ThinK")):
        (row,) = (row for row in rows if (row["method"], row["factor"]) == (name, 0.9))
        found = quality.nll(compressed(90, method, dense_plan(spec))) - dense
        measured = sum(row["nll"]["test"]) / len(row["nll"]["test"]) - sum(base["nll"]["test"]) / len(
            base["nll"]["test"]
        )
        assert found == pytest.approx(max(0.0, measured), abs=0.02)
    assert math.isnan(quality.charge(compressed(20, base=dense_plan(spec))))
    with pytest.raises(CalibrationError, match="by ada_kv to 20 %"):
        quality.nll(compressed(20, base=dense_plan(spec)))


def test_published_points_do_not_know_it() -> None:
    quality = load_quality("llama2_7b_published")
    assert math.isnan(quality.charge(compressed(90)))
    with pytest.raises(CalibrationError, match="what compressed KV costs is not known of llama2_7b"):
        quality.nll(compressed(90))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, "has costs of compressed KV of the model 'other'"),
        ({"variants": []}, "has no costs of compressed KV on the test text"),
        ({"variants": [{"method": "full", "factor": 1.0, "nll": {"test": ["x"]}}]}, "'x' is no number from 0 to 100"),
    ],
)
def test_a_malformed_file_is_an_error_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"model": "m", "prompt_tokens": 8, "variants": [], **change}))
    with pytest.raises(CalibrationError, match=message):
        read_kv_compression_loss(path, "test", "m")
