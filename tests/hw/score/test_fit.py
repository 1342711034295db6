"""The fit of the quality model: to tables whose truth is known, and to the table that ships."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hw.score.fit import (
    QualityTable,
    choose,
    cross_validate,
    errors_of,
    fit,
    held_out,
    held_out_kind,
    measured_range,
    read_table,
    write_fits,
)
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KeepMask, KVKeep, Plan, dense_plan, with_mask
from sim.cost.plan_json import plan_to_json
from sim.cost.quality import FORMS, QUALITIES, fitted_path, read_fitted
from sim.errors import CalibrationError

LAYERS = 6
SPEC = ModelSpec(
    name="six",
    num_layers=LAYERS,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=100,
)


def without(removed: set[int]) -> Plan:
    mask = KeepMask(
        mha=tuple(2 * i not in removed for i in range(LAYERS)),
        ffn=tuple(2 * i + 1 not in removed for i in range(LAYERS)),
    )
    return with_mask(dense_plan(SPEC), mask)


def truth(removed: set[int], costs: np.ndarray) -> float:
    """Return a loss that compounds, and more so for neighbors."""
    score = sum(costs[b] for b in removed) + sum(0.05 for b in removed if b + 2 in removed)
    return math.expm1(0.5 * score) / 0.5


def table(count: int = 150, seed: int = 0) -> QualityTable:
    rng = np.random.default_rng(seed)
    costs = rng.uniform(0.01, 0.25, 2 * LAYERS)
    chosen: list[tuple[str, set[int]]] = [("dense", set())]
    chosen += [("single removal", {b}) for b in range(2 * LAYERS)]
    chosen += [("random mask", set(rng.permutation(2 * LAYERS)[: rng.integers(2, 8)].tolist())) for _ in range(count)]
    plans = [without(removed) for _, removed in chosen]
    kinds = [(kind,) for kind, _ in chosen]
    loss = [truth(removed, costs) for _, removed in chosen]
    for bits, cost in ((4, 0.02), (8, 0.001)):
        for number in range(1, LAYERS + 1):
            plans.append(replace(dense_plan(SPEC), weight_bits=(bits,) * number + (16,) * (LAYERS - number)))
            kinds.append((f"W{bits} prefix of front_to_back",))
            loss.append(cost * number)
    return QualityTable(name="six", dense_nll=3.0, plans=tuple(plans), kinds=tuple(kinds), loss=np.array(loss))


def test_held_out_plans_are_predicted_within_the_target_where_the_truth_has_that_form() -> None:
    errors = {error.kind: error for error in cross_validate(table(), "warped_neighbours")}
    assert errors["random mask"].median < 0.05
    assert errors["random mask"].p90 < 0.15
    assert errors["random mask"].spearman > 0.95


def test_what_is_chosen_within_folds_predicts_plans_that_no_fold_saw() -> None:
    known, forms = table(), ("additive", "warped_neighbours")
    predicted = held_out(known, forms, folds=3)
    alone = [i for i, kinds in enumerate(known.kinds) if kinds[0] in ("dense", "single removal")]
    assert np.isnan(predicted[alone]).all()
    assert np.isfinite(np.delete(predicted, alone)).all()
    chosen = {error.kind: error for error in cross_validate(known, forms, folds=3)}
    assert chosen["random mask"].median < 0.05
    # Held out at once, and only they, are the plans of the kind.
    kind = held_out_kind(known, "random mask", forms)
    assert set(np.flatnonzero(np.isfinite(kind))) == {i for i, k in enumerate(known.kinds) if k == ("random mask",)}


def test_a_held_out_plan_has_no_say_in_what_predicts_it() -> None:
    known, forms = table(), ("additive", "neighbours")
    row = next(i for i, kinds in enumerate(known.kinds) if kinds == ("random mask",))
    loss = known.loss.copy()
    loss[row] += 0.5
    assert held_out(replace(known, loss=loss), forms)[row] == held_out(known, forms)[row]


def test_the_form_that_made_a_table_is_the_one_chosen() -> None:
    assert choose(table(80), ("singles", "additive", "warped_neighbours"))[0] == "warped_neighbours"


def test_cut_kv_costs_what_was_measured_of_each_layer_alone() -> None:
    known, dense = table(), dense_plan(SPEC)
    cut = KVKeep(first_tokens=4, last_tokens=32)
    costs = [0.01, 0.2, 0.05, 0.02, 0.1, 0.03]
    plans = [replace(dense, kv_keep=tuple(cut if i == j else KVKeep() for i in range(LAYERS))) for j in range(LAYERS)]
    model = fit(
        replace(
            known,
            plans=(*known.plans, *plans),
            kinds=(*known.kinds, *(("single layer of cut KV",) for _ in plans)),
            loss=np.append(known.loss, costs),
        )
    )
    assert [model.loss(plan) for plan in plans] == pytest.approx(costs, rel=0.1)
    both = replace(dense, kv_keep=(KVKeep(), cut, KVKeep(), KVKeep(), cut, KVKeep()))
    assert model.loss(both) == pytest.approx(0.3, rel=0.1)
    half = KVKeep(first_tokens=4, last_tokens=14)
    tighter = replace(dense, kv_keep=(KVKeep(), half, *(KVKeep() for _ in range(LAYERS - 2))))
    assert model.loss(tighter) == pytest.approx(0.4, rel=0.1)


def test_a_form_that_knows_compounding_beats_the_sum_of_single_costs() -> None:
    median = {form: cross_validate(table(), form)[0].median for form in ("singles", "warped_neighbours")}
    assert median["warped_neighbours"] < median["singles"] / 2


@pytest.mark.parametrize("form", FORMS)
def test_removing_more_never_helps(form: str) -> None:
    model = fit(table(), form)
    rng = np.random.default_rng(1)
    for _ in range(200):
        removed = set(rng.permutation(2 * LAYERS)[: rng.integers(0, 7)].tolist())
        more = removed | {int(rng.integers(2 * LAYERS))}
        assert model.nll(without(more)) >= model.nll(without(removed)) - 1e-12
    dense = dense_plan(SPEC)
    bits = [model.nll(replace(dense, weight_bits=(4,) * n + (16,) * (LAYERS - n))) for n in range(LAYERS + 1)]
    assert bits == sorted(bits)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(CalibrationError, match="did you mean 'additive'"):
        fit(table(), "aditive")


# --- Files -----------------------------------------------------------------------------------------------------------


def rows(plans: list[tuple[Plan, float]]) -> list[dict[str, object]]:
    return [
        {
            "plan": plan_to_json(plan),
            "chosen_as": ["dense" if plan == dense_plan(SPEC) else "random mask"],
            "nll_test": nll,
            "nll_test_decode": nll - 0.5,
            "tokens": {"test": 100},
        }
        for plan, nll in plans
    ]


def test_a_table_is_read_as_losses_against_dense(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    value = {"model": "six", "weights": "none", "plans": rows([(dense_plan(SPEC), 3.0), (without({1}), 3.25)])}
    path.write_text(json.dumps(value), encoding="utf-8")
    found = read_table(path)
    assert found.dense_nll == 3.0
    assert found.loss.tolist() == [0.0, 0.25]


@pytest.mark.parametrize("content", ["", "[]", '{"plans": []}', '{"model": "x", "plans": [{"plan": {}}]}'])
def test_a_malformed_table_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CalibrationError):
        read_table(path)


def test_a_table_without_the_calibration_losses_of_dense_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    value = {"model": "six", "weights": "none", "plans": rows([(dense_plan(SPEC), 3.0)])}
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(CalibrationError, match="nll_calibration"):
        read_table(path, "calibration")


def test_the_two_texts_of_a_table_agree_on_the_order_of_plans_but_not_on_their_losses() -> None:
    calibration, test = (read_table(QUALITIES / "smollm2_135m.json", text) for text in ("calibration", "test"))
    losses = dict(zip(test.plans, test.loss, strict=True))
    shared = [losses[plan] for plan in calibration.plans]
    assert np.corrcoef(shared, calibration.loss)[0, 1] > 0.9
    assert not np.allclose(shared, calibration.loss)
    assert calibration.dense_nll != test.dense_nll


# --- Coefficients that ship ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["calibration", "test"])
@pytest.mark.parametrize("form", FORMS)
def test_fitting_again_gives_the_coefficients_that_ship(form: str, text: str) -> None:
    path = QUALITIES / "smollm2_135m.json"
    shipped, again = read_fitted(path, form, text), fit(read_table(path, text), form)
    for name in ("blocks", "pairs", "others", "root", "kv", "dense_nll", "max_loss"):
        # nnls may round differently with another BLAS; here the two are equal bit for bit.
        np.testing.assert_allclose(getattr(shipped, name), getattr(again, name), rtol=1e-9, atol=1e-12, err_msg=name)
    for name in ("name", "form", "curve", "stage_share", "note"):
        assert getattr(shipped, name) == getattr(again, name)


def test_written_coefficients_read_back_bit_for_bit_with_their_held_out_errors(tmp_path: Path) -> None:
    path = tmp_path / "six.json"
    known = table(20)
    measured = [
        {
            "plan": plan_to_json(plan),
            "chosen_as": list(kinds),
            "nll_test": 3.0 + loss,
            "nll_test_decode": 3.0 + loss,
            "nll_calibration": 3.1 + loss,
            "tokens": {"test": 100},
        }
        for plan, kinds, loss in zip(known.plans, known.kinds, known.loss.tolist(), strict=True)
    ]
    path.write_text(json.dumps({"model": "six", "weights": "none", "plans": measured}), encoding="utf-8")
    written = json.loads(write_fits(path).read_text(encoding="utf-8"))
    assert fitted_path(path).exists()
    for form in FORMS:
        again, read = fit(read_table(path), form), read_fitted(path, form)
        for name in ("blocks", "pairs", "others", "root"):
            np.testing.assert_array_equal(getattr(read, name), getattr(again, name))
        assert (read.kv, read.dense_nll, read.max_loss) == (again.kv, again.dense_nll, again.max_loss)
    stated = next(f for f in written["fits"] if (f["text"], f["form"]) == ("test", "warped"))["held_out_errors"]
    found = errors_of(read_table(path), held_out(read_table(path), ("warped",)), "warped")
    assert [(e["kind"], e["median"]) for e in stated] == [(e.kind, e.median) for e in found]


def test_the_range_ends_where_held_out_plans_lose_more_than_predicted() -> None:
    plans = tuple(without({i % (2 * LAYERS)}) for i in range(200))
    predicted = np.linspace(0.0, 2.0, 200)
    loss = np.where(predicted < 0.8, predicted, 1.5 * predicted)
    made = QualityTable(name="six", dense_nll=1.0, plans=plans, kinds=(("any",),) * 200, loss=loss)
    found = measured_range(made, "warped", predicted)
    assert found.loss == pytest.approx(0.8, abs=0.02)
    assert found.factor == pytest.approx(1.5, abs=0.002)
    assert found.inside + found.outside == 200
    assert found.median_inside < 0.01
    assert found.kv_tokens is None
    perfect = measured_range(replace(made, loss=predicted), "warped", predicted)
    assert perfect.loss == pytest.approx(math.log(3.0), abs=0.002)  # never beyond what errors are reported for


def test_the_calibration_text_says_nothing_of_plans_that_change_only_what_follows_the_prompt() -> None:
    made = read_table(QUALITIES / "smollm2_135m.json", "calibration")
    assert all(plan.prefill == plan.decode and set(plan.kv_keep) == {KVKeep()} for plan in made.plans)
    quality = read_fitted(QUALITIES / "smollm2_135m.json", text="calibration")
    cut = replace(made.plans[0], kv_keep=(KVKeep(first_tokens=4, last_tokens=64),) * len(made.plans[0].kv_keep))
    assert not quality.in_range(cut)
    assert quality.loss(cut) == quality.max_loss
