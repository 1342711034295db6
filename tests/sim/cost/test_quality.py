"""The loss of plans: laws that predictions obey, coefficients that ship, and published points."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sim.cost.added_losses import AddedLosses
from sim.cost.kv_loss import KVLoss, read_kv_loss
from sim.cost.model_spec import load_model
from sim.cost.plan import KeepMask, KVKeep, Plan, dense_plan, drop, with_mask
from sim.cost.plan_features import unwarp, warp
from sim.cost.plan_json import plan_from_json, plan_to_json
from sim.cost.quality import FORMS, QUALITIES, FittedQuality, fitted_path, load_quality, read_fitted, read_published
from sim.errors import CalibrationError, PlanError

SPEC = load_model("smollm2_135m")
LAYERS = SPEC.num_layers


def shipped(form: str) -> FittedQuality:
    quality = load_quality("smollm2_135m", form)
    assert isinstance(quality, FittedQuality)
    return quality


@pytest.fixture(scope="module")
def fitted() -> FittedQuality:
    return shipped("warped_neighbours")


def without(removed: set[int]) -> Plan:
    mask = KeepMask(
        mha=tuple(2 * i not in removed for i in range(LAYERS)),
        ffn=tuple(2 * i + 1 not in removed for i in range(LAYERS)),
    )
    return with_mask(dense_plan(SPEC), mask)


def some_plan(rng: np.random.Generator) -> Plan:
    decode = set(rng.permutation(2 * LAYERS)[: rng.integers(0, 7)].tolist())
    prefill = {b for b in decode if rng.random() < 0.5}
    keep = tuple(
        KVKeep(first_tokens=int(rng.integers(0, 3)), last_tokens=8) if rng.random() < 0.3 else KVKeep()
        for _ in range(LAYERS)
    )
    bits, kv_bits = (tuple(int(rng.choice((16, 8, 4))) for _ in range(LAYERS)) for _ in range(2))
    return replace(without(decode), prefill=without(prefill).prefill, kv_keep=keep, weight_bits=bits, kv_bits=kv_bits)


# --- The range of a fit ----------------------------------------------------------------------------------------------


def measured() -> tuple[list[Plan], np.ndarray]:
    """Return the plans of the committed table that treat all tokens alike, and their measured losses."""
    rows = json.loads((QUALITIES / "smollm2_135m.json").read_text(encoding="utf-8"))["plans"]
    plans = [plan_from_json(row["plan"]) for row in rows]
    alike = [i for i, p in enumerate(plans) if p.prefill == p.decode and set(p.kv_keep) == {KVKeep()}]
    dense = next(row["nll_test"] for row in rows if "dense" in row["chosen_as"])
    return [plans[i] for i in alike], np.array([rows[i]["nll_test"] - dense for i in alike])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", ["test", "calibration"])
def test_a_shipped_fit_states_how_far_it_holds_and_on_how_many_held_out_plans(form: str, text: str) -> None:
    quality = load_quality("smollm2_135m", form, text)  # type: ignore[arg-type]
    assert isinstance(quality, FittedQuality)
    assert quality.range is not None
    assert 0.3 < quality.range.loss <= math.log(3.0)
    assert 1.0 < quality.range.factor < 4.0
    assert min(quality.range.inside, quality.range.outside) > 100
    assert quality.range.median_inside < 0.05
    assert (quality.range.kv_tokens is None) == (text == "calibration")  # which has no losses of cut KV
    assert "times the dense perplexity" in quality.summary()


def test_beyond_its_range_a_fit_charges_a_bound_above_nearly_every_measured_loss() -> None:
    quality = shipped("warped")
    plans, loss = measured()
    predicted = np.array([quality.predicted_loss(plan) for plan in plans])
    charged = np.array([quality.loss(plan) for plan in plans])
    inside = np.array([quality.in_range(plan) for plan in plans])
    assert quality.range is not None
    assert inside.tolist() == (predicted <= quality.range.loss).tolist()
    assert (charged[inside] == predicted[inside]).all()
    assert (charged[~inside] >= predicted[~inside]).all()
    assert (charged[~inside] >= loss[~inside] - 0.05).mean() > 0.99  # the predictions alone: fewer than half
    assert (predicted[~inside] >= loss[~inside]).mean() < 0.5


def test_a_deeper_cut_is_never_cheaper_than_a_cut_within_the_range() -> None:
    quality = shipped("warped")
    rng = np.random.default_rng(5)
    order = rng.permutation(2 * LAYERS).tolist()
    losses = [quality.loss(without(set(order[:n]))) for n in range(2 * LAYERS + 1)]
    assert losses == sorted(losses)
    assert losses[-1] <= quality.max_loss


def test_cut_kv_below_what_was_measured_is_charged_the_largest_loss() -> None:
    quality = shipped("warped")
    assert quality.range is not None
    for tokens, known in ((quality.range.kv_tokens, True), (quality.range.kv_tokens - 1, False)):  # type: ignore[operator]
        plan = replace(dense_plan(SPEC), kv_keep=(KVKeep(first_tokens=4, last_tokens=tokens - 4),) * LAYERS)
        assert quality.in_range(plan) is known
        assert (quality.loss(plan) == quality.max_loss) is not known
        assert quality.loss_many([plan])[0] == pytest.approx(quality.loss(plan))


def test_masks_in_arrays_are_charged_as_single_plans_are() -> None:
    surrogate = pytest.importorskip("agents.envs.surrogate")
    quality = shipped("warped")
    rng = np.random.default_rng(6)
    removed = rng.random((40, 2 * LAYERS)) < rng.random((40, 1)) / 2
    alone = [quality.loss(without(set(np.flatnonzero(row).tolist()))) for row in removed]
    np.testing.assert_allclose(surrogate.mask_losses(quality, removed), alone, rtol=1e-12)


def test_a_range_that_cannot_be_is_refused() -> None:
    quality = shipped("warped")
    assert quality.range is not None
    for change in ({"loss": math.nan}, {"loss": -1.0}, {"factor": 0.5}, {"factor": math.nan}):
        with pytest.raises(CalibrationError, match="range of a fit"):
            replace(quality.range, **change)


def test_a_plan_that_drops_more_than_any_published_mask_is_charged_a_random_guess() -> None:
    model = load_model("llama2_7b")
    quality = load_quality("llama2_7b_published")
    rap_60 = with_mask(
        dense_plan(model),
        drop(
            model,
            mha=[8, 10, 12, 13, 14, 18, 19, 21, 22, 23, 24, 25, 27, 28, 30],
            ffn=[7, 8, 9, 12, 13, 18, 20, 22, 24, 26, 27],
        ),
    )
    assert quality.in_range(rap_60)
    assert quality.perplexity(rap_60) < 40
    deeper = with_mask(rap_60, drop(model, mha=range(20), ffn=range(16)))
    assert not quality.in_range(deeper)
    assert quality.nll(deeper) == pytest.approx(math.log(model.vocab_size))


def test_an_unpublished_loss_is_refused_where_it_decides_and_unknown_where_it_is_only_reported() -> None:
    model = load_model("llama2_7b")
    quality = load_quality("llama2_7b_published")
    eight = replace(dense_plan(model), weight_bits=(8,) * model.num_layers)
    with pytest.raises(CalibrationError, match=r"unknown; leave weight_bits and compute_bits at 16 or 4.*hw\.score"):
        quality.nll(eight)
    assert math.isnan(quality.charge(eight))
    assert quality.charge(dense_plan(model)) == quality.nll(dense_plan(model))


# --- KV at 8 and 4 bits ----------------------------------------------------------------------------------------------


def test_quantized_kv_costs_what_its_layers_cost_beside_anything_else(fitted: FittedQuality) -> None:
    rng = np.random.default_rng(3)
    assert fitted.added.kv_bits is not None
    for _ in range(20):
        plan = some_plan(rng)
        full = replace(plan, kv_bits=())
        costs = {16: (0.0,) * LAYERS, 8: fitted.added.kv_bits.at_8, 4: fitted.added.kv_bits.at_4}
        own = sum(costs[bits][i] for i, bits in enumerate(plan.kv_bits) if plan.decode.mha[i])
        assert fitted.loss(plan) == pytest.approx(min(fitted.loss(full) + own, fitted.max_loss))
    assert sum(fitted.added.kv_bits.at_8) < sum(fitted.added.kv_bits.at_4)


def test_quantized_kv_that_was_not_measured_is_refused_and_charged_nothing_known(fitted: FittedQuality) -> None:
    unknown = replace(fitted, added=AddedLosses())
    quantized = replace(dense_plan(SPEC), kv_bits=(8,) * LAYERS)
    with pytest.raises(CalibrationError, match=r"of smollm2_135m; leave kv_bits at 16, or .*hw\.score kind=kv_bits"):
        unknown.nll(quantized)
    assert math.isnan(unknown.charge(quantized))
    nothing_left = replace(quantized, decode=KeepMask(mha=(False,) * LAYERS, ffn=quantized.decode.ffn))
    assert unknown.loss(nothing_left) == unknown.loss(replace(nothing_left, kv_bits=()))
    llama = dense_plan(load_model("llama2_7b"))
    eight = replace(llama, kv_bits=(8,) * 32)
    with pytest.raises(CalibrationError, match="KV at 8 and 4 bits costs is not known of llama2_7b"):
        load_quality("llama2_7b_published").nll(eight)
    assert math.isnan(load_quality("llama2_7b_published").charge(eight))


def test_a_transferred_cost_of_kv_is_the_same_at_the_same_depth(fitted: FittedQuality) -> None:
    llama, quality = dense_plan(load_model("llama2_7b")), load_quality("llama2_7b_transferred")
    assert fitted.added.kv_bits is not None
    found = quality.nll(replace(llama, kv_bits=(4,) * 32)) - quality.nll(llama)
    assert found == pytest.approx(sum(fitted.added.kv_bits.at_4))
    assert "KV at 8 and 4 bits" in quality.summary()


@pytest.mark.parametrize("layers", [1, 2, 5, 15, 29, 30, 31, 60, 80])
def test_a_transferred_cost_of_kv_has_the_same_total_up_to_any_depth(fitted: FittedQuality, layers: int) -> None:
    measured = fitted.added.kv_bits
    assert measured is not None
    resampled = measured.resampled(layers)
    for ours, theirs in ((resampled.at_8, measured.at_8), (resampled.at_4, measured.at_4)):
        assert len(ours) == layers
        assert min(ours) >= 0.0
        assert sum(ours) == pytest.approx(sum(theirs))
        for layer in range(layers + 1):
            depth = layer * LAYERS / layers
            part = sum(cost * min(max(depth - i, 0.0), 1.0) for i, cost in enumerate(theirs))
            assert sum(ours[:layer]) == pytest.approx(part, abs=1e-12)


def test_a_cost_of_kv_is_divided_among_more_layers_and_added_up_in_fewer() -> None:
    costs = KVLoss("made up", (0.0, 1.0, 0.0, 0.0), (1.0, 5.0, 2.0, 0.0))
    assert costs.resampled(4) == costs
    assert costs.resampled(2) == KVLoss("made up", (1.0, 0.0), (6.0, 2.0))
    assert costs.resampled(8).at_4 == (0.5, 0.5, 2.5, 2.5, 1.0, 1.0, 0.0, 0.0)
    assert costs.resampled(8).resampled(4) == costs


def written(folder: Path, **changed: object) -> Path:
    """Return a file of costs of KV of a model with one layer."""
    path = folder / "costs.json"
    content = {"model": "tiny", "fits": {"test": {"8": [0.0], "4": [0.5]}}, **changed}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("fit", "reason"),
    [
        ({}, "'8' is None"),
        ({"8": [0.0]}, "'4' is None"),
        (3, "fits.test is 3"),
        ({"8": [0.0], "4": ["x"]}, "layer 0 of '4' is 'x'"),
        ({"8": [0.0], "4": ["1"]}, "layer 0 of '4' is '1'"),
        ({"8": [True], "4": [0.0]}, "layer 0 of '8' is True"),
        ({"8": [-1.0], "4": [0.0]}, "layer 0 of '8' is -1.0"),
        ({"8": [math.nan], "4": [0.0]}, "layer 0 of '8' is nan"),
        ({"8": [0.0], "4": [10**400]}, "layer 0 of '4' is 1000"),
        ({"8": [0.0], "4": "1"}, "'4' is '1'"),
        ({"8": [0.0], "4": {"1": 2}}, "'4' is {'1': 2}"),
        ({"8": 1, "4": 1}, "'8' is 1"),
        ({"8": [], "4": []}, "'8' is a list of 0"),
        ({"8": [0.0], "4": [0.0, 0.0]}, "'4' is a list of 2"),
    ],
)
def test_malformed_costs_of_kv_are_an_error_that_says_what_is_allowed_and_names_the_command(
    tmp_path: Path, fit: object, reason: str
) -> None:
    path = written(tmp_path, fits={"test": fit})
    with pytest.raises(CalibrationError, match=r"no costs of KV at 8 and 4 bits .* hw\.score kind=kv_bits") as caught:
        read_kv_loss(path, "test", "tiny", 1)
    assert reason in str(caught.value)
    assert "must be a list of 1 numbers from 0 to 100, one per layer" in str(caught.value) or fit == 3


@pytest.mark.parametrize("fits", [None, [], {}, {"test": None}])
def test_a_file_without_costs_on_the_text_is_an_error_that_says_so(tmp_path: Path, fits: object) -> None:
    with pytest.raises(CalibrationError, match=r"fits\.test is None; it must be an object with the lists '8' and '4'"):
        read_kv_loss(written(tmp_path, fits=fits), "test", "tiny", 1)


@pytest.mark.parametrize("name", ["other", None, 3])
def test_costs_of_kv_of_another_model_are_refused(tmp_path: Path, name: object) -> None:
    assert read_kv_loss(written(tmp_path), "test", "tiny", 1) == KVLoss("tiny", (0.0,), (0.5,))
    message = rf"of the model {name!r}, but it must be 'tiny', .* put the file of tiny there, or remove it and measure"
    with pytest.raises(CalibrationError, match=message):
        read_kv_loss(written(tmp_path, model=name), "test", "tiny", 1)


def test_the_errors_of_a_fit_are_those_of_what_is_charged() -> None:
    path = QUALITIES / "kv_bits" / "smollm2_135m.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    costs = read_kv_loss(path, "test", "smollm2_135m", LAYERS)
    nll = {plan_from_json(row["plan"]): row["nll"]["test"] for row in content["plans"]}
    for kind, name in (("with 4-bit weights", "with 4-bit weights"), ("pruned", "with dropped blocks")):
        plans = [plan_from_json(row["plan"]) for row in content["plans"] if row["kind"] == kind]
        errors = [abs(costs.of(plan) - (nll[plan] - nll[replace(plan, kv_bits=())])) for plan in plans]
        (stated,) = (row for row in content["fits"]["test"]["errors"] if row["plans"] == name)
        assert stated["worst_error"] == pytest.approx(max(errors))
        assert stated["mean_error"] == pytest.approx(sum(errors) / len(errors))


# --- Predictions -----------------------------------------------------------------------------------------------------


def test_dense_costs_nothing(fitted: FittedQuality) -> None:
    assert fitted.nll(dense_plan(SPEC)) == fitted.dense_nll
    assert fitted.perplexity(dense_plan(SPEC)) == pytest.approx(math.exp(fitted.dense_nll))


@pytest.mark.parametrize("form", FORMS)
def test_removing_more_never_helps(form: str) -> None:
    model = shipped(form)
    rng = np.random.default_rng(1)
    for _ in range(200):
        removed = set(rng.permutation(2 * LAYERS)[: rng.integers(0, 7)].tolist())
        more = removed | {int(rng.integers(2 * LAYERS))}
        assert model.nll(without(more)) >= model.nll(without(removed)) - 1e-12
    dense = dense_plan(SPEC)
    bits = [model.nll(replace(dense, weight_bits=(4,) * n + (16,) * (LAYERS - n))) for n in range(LAYERS + 1)]
    assert bits == sorted(bits)


def test_keeping_a_block_in_prefill_never_hurts(fitted: FittedQuality) -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        removed = set(rng.permutation(2 * LAYERS)[:4].tolist())
        both = without(removed)
        assert fitted.nll(replace(both, prefill=dense_plan(SPEC).prefill)) <= fitted.nll(both) + 1e-12


def test_many_plans_at_once_give_what_each_gives_alone(fitted: FittedQuality) -> None:
    rng = np.random.default_rng(3)
    plans = [some_plan(rng) for _ in range(50)]
    np.testing.assert_allclose(fitted.loss_many(plans), [fitted.loss(plan) for plan in plans], rtol=1e-12)
    assert fitted.loss_many([]).size == 0


def test_an_absurd_plan_stays_finite(fitted: FittedQuality) -> None:
    nothing = with_mask(dense_plan(SPEC), drop(SPEC, mha=range(LAYERS), ffn=range(LAYERS)))
    assert math.isfinite(fitted.perplexity(nothing))


def test_a_plan_of_another_model_is_refused(fitted: FittedQuality) -> None:
    with pytest.raises(PlanError, match="a plan of 32 layers, but the quality of smollm2_135m was measured on 30"):
        fitted.nll(dense_plan(load_model("llama2_7b")))


@pytest.mark.parametrize("curve", [-0.1, 0.0, 0.1, 0.5])
def test_unwarping_undoes_warping_and_cannot_overflow(curve: float) -> None:
    loss = np.linspace(0.0, 5.0, 20)
    np.testing.assert_allclose(unwarp(warp(loss, curve), curve), loss, rtol=1e-12, atol=1e-14)
    assert np.isfinite(unwarp(np.array([1e9]), curve)).all()


# --- Coefficients that ship ------------------------------------------------------------------------------------------


def test_an_unknown_form_or_text_is_refused() -> None:
    with pytest.raises(CalibrationError, match="did you mean 'additive'"):
        load_quality("smollm2_135m", "aditive")
    with pytest.raises(CalibrationError, match="did you mean 'test'"):
        load_quality("smollm2_135m", text="tests")  # type: ignore[arg-type]


def test_coefficients_come_back_from_json_bit_for_bit(fitted: FittedQuality) -> None:
    again = FittedQuality.from_json(fitted.name, json.loads(json.dumps(fitted.to_json())))
    for name in ("blocks", "pairs", "others", "root"):
        np.testing.assert_array_equal(getattr(again, name), getattr(fitted, name))
    assert (again.kv, again.dense_nll, again.curve, again.stage_share, again.max_loss, again.note) == (
        fitted.kv,
        fitted.dense_nll,
        fitted.curve,
        fitted.stage_share,
        fitted.max_loss,
        fitted.note,
    )


def copy_of_shipped(folder: Path) -> Path:
    """Return a table in a folder of its own, with its coefficients."""
    table = folder / "smollm2_135m.json"
    fitted_path(table).parent.mkdir()
    for source, target in ((QUALITIES / table.name, table), (fitted_path(QUALITIES / table.name), fitted_path(table))):
        target.write_bytes(source.read_bytes())
    return table


def test_a_table_that_changed_since_the_fit_is_an_error_that_names_the_command(tmp_path: Path) -> None:
    table = copy_of_shipped(tmp_path)
    read_fitted(table)
    table.write_text(table.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"python -m hw\.score kind=fit model\.name=smollm2_135m"):
        read_fitted(table)


@pytest.mark.parametrize("content", [None, "", "[]", '{"model": "x", "table_sha256": "", "fits": []}'])
def test_missing_or_malformed_coefficients_are_an_error_that_names_the_command(
    tmp_path: Path, content: str | None
) -> None:
    table = copy_of_shipped(tmp_path)
    if content is None:
        fitted_path(table).unlink()
    else:
        fitted_path(table).write_text(content, encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"python -m hw\.score kind=fit"):
        read_fitted(table)


# --- Files -----------------------------------------------------------------------------------------------------------


def test_a_plan_reads_back_as_it_was_written() -> None:
    rng = np.random.default_rng(5)
    for _ in range(50):
        plan = some_plan(rng)
        assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan


@pytest.mark.parametrize(
    "change",
    [
        {"decode_drop": ["MHA99"]},
        {"decode_drop": "MHA1"},
        {"layers": "many"},
        {"layers": 2.0},
        {"layers": True},
        {"layers": 10**9},
        {"weight_bits": {"4": [77]}},
        {"weight_bits": {"4": [-1]}},
        {"weight_bits": {"4": [1.0]}},
        {"weight_bits": {"4": [True]}},
        {"weight_bits": {"5": [1]}},
        {"kv_bits": {"4": [77]}},
        {"kv_bits": {"2": [1]}},
        {"kv_bits": [8]},
        {"kv_keep": [{"layers": [0]}]},
        {"kv_keep": [{"layers": [0], "first_tokens": 2.0, "last_tokens": 3}]},
        {"kv_keep": [{"layers": [False], "first_tokens": 2, "last_tokens": 3}]},
        {"kv_keep": [{"layers": [-1], "first_tokens": 2, "last_tokens": 3}]},
    ],
    ids=repr,
)
def test_a_malformed_plan_is_an_error(change: dict[str, object]) -> None:
    with pytest.raises(CalibrationError, match="not a plan of a quality table"):
        plan_from_json({**plan_to_json(dense_plan(SPEC)), **change})


def test_an_unknown_quality_names_the_nearest() -> None:
    with pytest.raises(CalibrationError, match="did you mean 'llama2_7b_published'"):
        load_quality("llama2_7b_publishd")


# --- Published points ------------------------------------------------------------------------------------------------


def test_published_masks_of_llama2_7b_come_out_at_their_published_perplexity() -> None:
    quality = read_published(QUALITIES / "llama2_7b_published.yaml")
    dense = dense_plan(quality.model)
    assert quality.perplexity(dense) == pytest.approx(5.472)
    for point in quality.points:
        plan = with_mask(dense, drop(quality.model, mha=point.drop_mha, ffn=point.drop_ffn))
        assert quality.perplexity(plan) == pytest.approx(point.perplexity, rel=0.03), point.source


def test_blockpruners_seventeen_removals_are_the_share_of_parameters_that_it_states() -> None:
    quality = read_published(QUALITIES / "llama2_7b_published.yaml")
    point = next(p for p in quality.points if p.source.startswith("BlockPruner"))
    model = quality.model
    removed = len(point.drop_mha) * model.mha_params + len(point.drop_ffn) * model.ffn_params
    assert removed / model.total_params == pytest.approx(0.2199, abs=2e-4)


@pytest.mark.parametrize("name", ["llama2_7b_published", "llama3_8b_published"])
def test_published_w4_prefixes_are_exact_and_monotone_between(name: str) -> None:
    quality = read_published(QUALITIES / f"{name}.yaml")
    layers = quality.model.num_layers
    found = [
        quality.perplexity(replace(dense_plan(quality.model), weight_bits=(4,) * n + (16,) * (layers - n)))
        for n in range(layers + 1)
    ]
    assert found == sorted(found)
    for count, perplexity in zip(quality.w4_layers, quality.w4_perplexity, strict=True):
        assert found[count] == pytest.approx(perplexity)


def test_what_is_not_published_is_refused_and_the_summary_says_how_little_there_is() -> None:
    quality = read_published(QUALITIES / "llama3_8b_published.yaml")
    dense = dense_plan(quality.model)
    assert "0 pruned masks and 7 W4 prefixes" in quality.summary()
    with pytest.raises(CalibrationError, match="no pruned llama3_8b has a published perplexity"):
        quality.nll(with_mask(dense, drop(quality.model, mha=[3])))
    with pytest.raises(CalibrationError, match="nothing is published on layers or products at 8 bits"):
        quality.nll(replace(dense, weight_bits=(8,) * quality.model.num_layers))
    with pytest.raises(PlanError, match="a plan of 30 layers"):
        quality.nll(dense_plan(SPEC))
