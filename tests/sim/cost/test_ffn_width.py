"""Plans whose FFN blocks run at fewer channels: bytes, parameters, prices, losses, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sim.cost.added_losses import AddedLosses
from sim.cost.ffn_width import FFN_WIDTHS, ffn_channels, ffn_params, narrowed
from sim.cost.ffn_width_loss import FFNWidthLoss, read_ffn_width_loss
from sim.cost.latency import load_calibration, plan_rows
from sim.cost.memory import ffn_weight_bytes, weight_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import Plan, check_plan, dense_plan, describe, drop, with_mask
from sim.cost.plan_json import plan_from_json, plan_to_json
from sim.cost.quality import load_quality
from sim.errors import CalibrationError, PlanError
from sim.policies.fixed import static_plan
from sim.types import Ints

LLAMA, OPT, SMOL = load_model("llama2_7b"), load_model("opt_13b"), load_model("smollm2_135m")
DENSE = dense_plan(LLAMA)


def cut(width: int, layers: int = 32, base: Plan = DENSE) -> Plan:
    """Return the plan whose first layers have FFN blocks of a width."""
    return replace(base, ffn_width=(width,) * layers + base.ffn_width[layers:])


# --- The field -------------------------------------------------------------------------------------------------------


def test_a_plan_is_described_and_comes_back_from_json() -> None:
    plan = replace(DENSE, ffn_width=(7, 7, 5, *(8,) * 28, 6))
    check_plan(LLAMA, plan)
    assert describe(plan) == "FFN7/8 0-1; FFN6/8 31; FFN5/8 2"
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan
    assert plan_to_json(plan)["ffn_width"] == {"7": [0, 1], "6": [31], "5": [2]}
    assert "ffn_width" not in plan_to_json(DENSE)
    assert static_plan(LLAMA, ffn_width=plan.ffn_width) == plan
    assert static_plan(LLAMA, ffn_width=6) == cut(6)
    assert static_plan(LLAMA) == DENSE


@pytest.mark.parametrize("width", [4, 9, 7.0, True, None])
def test_other_widths_are_refused(width: Any) -> None:
    with pytest.raises(PlanError, match=r"plan\.ffn_width of layer 1 is .*; allowed are 8, 7, 6, 5 eighths of its"):
        check_plan(LLAMA, replace(DENSE, ffn_width=(8, width, *(8,) * 30)))


def test_one_width_is_needed_for_each_layer() -> None:
    with pytest.raises(PlanError, match=r"plan\.ffn_width has 2 entries; llama2_7b has 32 layers"):
        check_plan(LLAMA, replace(DENSE, ffn_width=(8, 7)))
    with pytest.raises(PlanError, match="ffn_width is an empty list"):
        static_plan(LLAMA, ffn_width=[])


def test_blocks_of_few_channels_are_not_cut() -> None:
    small = replace(LLAMA, intermediate_size=511)
    check_plan(small, DENSE)
    with pytest.raises(
        PlanError, match="which have 511 channels on a GPU; blocks of fewer than 512 are not cut: leave ffn_width"
    ):
        check_plan(small, cut(7))
    for size in range(512, 1600, 3):
        assert len({ffn_channels(size, width) for width in FFN_WIDTHS}) == 4


def test_the_width_of_a_block_that_does_not_run_cuts_nothing() -> None:
    plan = with_mask(cut(5, 1), drop(LLAMA, ffn=[0]))
    assert cut(5, 1).cuts_ffn
    assert not plan.cuts_ffn
    assert weight_bytes(LLAMA, plan) == weight_bytes(LLAMA, with_mask(DENSE, drop(LLAMA, ffn=[0])))


# --- Bytes -----------------------------------------------------------------------------------------------------------


def test_bytes_of_a_cut_block_by_hand() -> None:
    channels = 9664  # 7/8 of 11,008 are 9,632
    assert ffn_channels(11008, 7) == channels
    # Three matrices, the norm, and the constant that replaces the removed channels.
    assert ffn_weight_bytes(LLAMA, width=7) == 2 * (3 * 4096 * channels + 4096 + 4096)
    assert ffn_weight_bytes(LLAMA) == 2 * (3 * 4096 * 11008 + 4096)
    groups = math.ceil(channels / 128)
    gate_and_up = 2 * (4096 * channels + 2 * 32 * channels)
    down = 4096 * channels + 2 * groups * 4096
    assert ffn_weight_bytes(LLAMA, 8, 7) == gate_and_up + down + 2 * (4096 + 4096)


def test_a_block_with_a_bias_adds_the_constant_to_it() -> None:
    assert OPT.ffn_bias
    size, channels = OPT.hidden_size, ffn_channels(OPT.intermediate_size, 6)
    lost = 2 * size * (OPT.intermediate_size - channels) + (OPT.intermediate_size - channels)
    assert ffn_weight_bytes(OPT) - ffn_weight_bytes(OPT, width=6) == 2 * lost


def test_a_plan_holds_the_channels_of_each_layer_at_its_bits() -> None:
    plan = replace(cut(5, 2), weight_bits=(16, 4, *(16,) * 30))
    dense = weight_bytes(LLAMA, replace(DENSE, weight_bits=plan.weight_bits))
    freed = sum(ffn_weight_bytes(LLAMA, bits) - ffn_weight_bytes(LLAMA, bits, 5) for bits in (16, 4))
    assert weight_bytes(LLAMA, plan) == dense - freed


def test_channels_that_round_up_to_all_change_nothing() -> None:
    small = replace(SMOL, intermediate_size=128)
    assert narrowed(small, 5) is small
    assert ffn_weight_bytes(small, width=5) == ffn_weight_bytes(small)


def test_parameters_that_run_fall_with_the_channels() -> None:
    widths = (8, 5, 8, 5)
    narrow = 3 * SMOL.hidden_size * 960 + SMOL.hidden_size
    assert ffn_params(SMOL, widths, (True, True, False, True)) == SMOL.ffn_params + 2 * narrow


# --- Prices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", FFN_WIDTHS)
def test_a_cut_block_takes_its_share_of_the_time(width: int) -> None:
    latency = load_calibration("llama2_7b_a100")
    for chunks, decodes, contexts in (([], 8, 4096), ([(512, 0)], 0, 0), ([(100, 7)], 3, 900)):
        tokens = sum(tokens for tokens, _ in chunks) + decodes
        dense_s = latency.iteration_s(DENSE, chunks, decodes, contexts, decodes)
        saved_s = 10 * latency.linear_s("ffn", 16, tokens) * (8 - width) / 8
        found_s = latency.iteration_s(cut(width, 10), chunks, decodes, contexts, decodes)
        assert found_s == pytest.approx(dense_s - saved_s, rel=1e-9)


def test_an_all_reduce_takes_its_full_time() -> None:
    latency, spec = load_calibration("llama2_70b_h100_tp4"), load_model("llama2_70b")
    dense = dense_plan(spec)
    whole_s = latency.iteration_s(dense, [], 16, 8192, 16)
    half_s, quarter_s = (latency.iteration_s(replace(dense, ffn_width=(w,) * 80), [], 16, 8192, 16) for w in (6, 7))
    per_eighth_s = whole_s - quarter_s
    assert whole_s - half_s == pytest.approx(2 * per_eighth_s)
    assert 8 * per_eighth_s < 80 * latency.linear_s("ffn", 16, 16)  # the rest of it is the all-reduce


def test_rows_of_layers_name_what_is_cut() -> None:
    from sim.cost.latency import PromptLoad

    rows: Ints = plan_rows(cut(5, 1), PromptLoad(4, 10, 1, 4), 0, 0)
    assert rows[:, 8].tolist() == [3, *(0,) * 31]


# --- Loss ------------------------------------------------------------------------------------------------------------

COSTS = FFNWidthLoss("m", {7: (0.1, 0.2), 6: (0.3, 0.4), 5: (0.5, 0.6)})


def test_a_loss_is_the_sum_over_the_blocks_that_run() -> None:
    two = replace(SMOL, num_layers=2)
    plan = replace(dense_plan(two), ffn_width=(7, 5))
    assert COSTS.of(plan) == pytest.approx(0.7)
    assert COSTS.of(with_mask(plan, drop(two, ffn=[0]))) == pytest.approx(0.6)
    assert COSTS.of(replace(plan, decode=drop(two, ffn=[0]))) == pytest.approx(0.7)  # prefill runs it
    assert COSTS.of(dense_plan(two)) == 0.0


def test_another_number_of_layers_costs_the_same_in_total() -> None:
    more = COSTS.resampled(4)
    assert more.costs[7] == pytest.approx((0.05, 0.05, 0.1, 0.1))
    assert sum(more.costs[5]) == pytest.approx(1.1)


def file(tmp_path: Path, **change: Any) -> Path:
    fit = {"7": [0.1, 0.2], "6": [0.3, 0.4], "5": [0.5, 0.6]}
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"model": "m", "fits": {"test": fit}, **change}))
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    assert read_ffn_width_loss(file(tmp_path), "test", "m", 2) == COSTS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, "has costs of FFN blocks at fewer channels of the model 'other'"),
        ({"fits": []}, "fits.test is None; it must be an object"),
        ({"fits": {"test": {"7": [0.1]}}}, "'7' is a list of 1; '7' must be a list of 2 numbers"),
        ({"fits": {"test": {"7": [0.1, -1]}}}, "layer 1 of '7' is -1"),
    ],
)
def test_a_malformed_file_is_an_error_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as error:
        read_ffn_width_loss(file(tmp_path, **change), "test", "m", 2)
    assert "\n" not in str(error.value)
    assert "python -m hw.score kind=width" in str(error.value)


def test_the_measured_losses_are_charged_and_transferred() -> None:
    quality, spec = load_quality("smollm2_135m"), SMOL
    dense = dense_plan(spec)
    losses = [quality.nll(replace(dense, ffn_width=(width,) * 30)) - quality.nll(dense) for width in FFN_WIDTHS]
    assert losses[0] == 0.0
    assert losses == sorted(losses)
    assert losses[-1] > 0.5
    (alone,) = (quality.nll(replace(dense, ffn_width=(5, *(8,) * 29))) - quality.nll(dense),)
    assert 0 < alone < losses[-1]
    assumed = load_quality("llama2_7b_transferred")
    assert assumed.nll(cut(5)) - assumed.nll(DENSE) == pytest.approx(losses[-1])
    assert "what FFN blocks at fewer channels cost is assumed to be that of smollm2_135m" in assumed.summary()


def test_what_was_not_measured_is_refused() -> None:
    published = load_quality("llama2_7b_published")
    assert math.isnan(published.charge(cut(7)))
    with pytest.raises(CalibrationError, match="what FFN blocks at fewer channels cost is not known of llama2_7b"):
        published.nll(cut(7))
    without = replace(load_quality("smollm2_135m"), added=AddedLosses())  # type: ignore[arg-type]
    plan = replace(dense_plan(SMOL), ffn_width=(7,) * 30)
    assert math.isnan(without.charge(plan))
    with pytest.raises(CalibrationError, match="is not known of smollm2_135m; leave ffn_width at 8"):
        without.nll(plan)
