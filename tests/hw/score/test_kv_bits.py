"""The fitted costs of KV at 8 and 4 bits, on losses that are known and on those of a tiny random model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")

from hw.elastic.model import ElasticModel  # noqa: E402
from hw.score.kv_bits import RANDOM, fit_kv_bits, kv_plans  # noqa: E402
from hw.score.nll import measure_many  # noqa: E402
from hw.score.report import kv_bits  # noqa: E402
from sim.cost.plan import Plan, check_plan, dense_plan  # noqa: E402
from sim.cost.plan_json import plan_to_json  # noqa: E402
from tests.hw.serving import LAYERS, tiny, tiny_spec  # noqa: E402

ORDER = [3, 6, 1]
COST_4 = (0.04, 0.0, 0.01, 0.02)
COST_8 = tuple(cost / 20 for cost in COST_4)
Row = dict[str, Any]


def row(kind: str, plan: Plan, nll: float) -> Row:
    return {"kind": kind, "plan": plan_to_json(plan), "nll": {"test": nll}, "tokens": {"test": 60}}


def made_up(loss: Callable[[Plan], float]) -> list[Row]:
    """Return rows as they are measured, where fewer bits of weights and dropped blocks lose something too."""
    return [
        row(kind, plan, 3.0 + 0.1 * plan.weight_bits.count(4) + 0.2 * plan.decode.ffn.count(False) + loss(plan))
        for kind, plan in kv_plans(tiny_spec(), ORDER, seed=0)
    ]


def added_up(plan: Plan) -> float:
    costs = {16: (0.0,) * LAYERS, 8: COST_8, 4: COST_4}
    return sum(
        costs[bits][layer] for layer, (bits, runs) in enumerate(zip(plan.kv_bits, plan.decode.mha, strict=True)) if runs
    )


def test_the_measured_plans_are_legal_and_a_seed_gives_the_same_plans() -> None:
    plans = list(kv_plans(tiny_spec(), ORDER, seed=3))
    for _, plan in plans:
        check_plan(tiny_spec(), plan)
    assert plans == list(kv_plans(tiny_spec(), ORDER, seed=3))
    kinds = Counter(kind for kind, _ in plans)
    assert kinds["one layer"] == LAYERS
    assert kinds["random layers"] == RANDOM
    assert kinds["all layers"] == kinds["with 4-bit weights"] == kinds["pruned"] == 2


def test_costs_that_add_up_are_found_and_predict_every_plan() -> None:
    fit = fit_kv_bits(made_up(added_up), "test")
    assert fit["4"] == pytest.approx(COST_4)
    assert fit["8"] == pytest.approx(COST_8)
    assert fit["factor"] == pytest.approx(1.0)
    assert [error["count"] for error in fit["errors"]] == [RANDOM + RANDOM // 2, 2, 2]
    for error in fit["errors"]:
        assert error["worst_error"] == pytest.approx(0.0, abs=1e-12)
        assert error["mean_loss"] > 0.0


def test_layers_that_lose_less_together_than_alone_are_scaled_by_one_factor() -> None:
    def loss(plan: Plan) -> float:
        return added_up(plan) * (1.0 if sum(bits < 16 for bits in plan.kv_bits) == 1 else 0.8)

    fit = fit_kv_bits(made_up(loss), "test")
    # The prefix of one layer of four is layer 0 alone, which loses all of its cost.
    sums, losses = np.array([0.07, 0.04, 0.04]), np.array([0.8 * 0.07, 0.04, 0.8 * 0.04])
    factor = float(np.linalg.lstsq(sums[:, None], losses, rcond=None)[0][0])
    assert fit["factor"] == pytest.approx(factor)
    assert fit["4"] == pytest.approx([cost * factor for cost in COST_4])
    assert sum(fit["8"]) == pytest.approx(0.8 * sum(COST_8))  # 8 bits: what all layers lose, divided like 4 bits
    assert fit["8"][0] / sum(fit["8"]) == pytest.approx(COST_4[0] / sum(COST_4))


def test_a_loss_below_zero_is_noise_and_costs_nothing() -> None:
    def noisy(plan: Plan) -> float:
        return -0.001 if set(plan.kv_bits) == {8} else added_up(plan) - 0.005 * (plan.kv_bits == (16, 4, 16, 16))

    fit = fit_kv_bits(made_up(noisy), "test")
    assert fit["8"] == [0.0] * LAYERS
    assert fit["4"] == pytest.approx(COST_4)  # layer 1 alone seemed to gain 0.005


@pytest.mark.parametrize("all_layers", [0.0, 0.02, -0.01])
def test_if_no_layer_alone_loses_anything_all_cost_the_same(all_layers: float) -> None:
    def loss(plan: Plan) -> float:
        return all_layers * plan.kv_bits.count(4) / LAYERS if plan.kv_bits.count(4) > 1 else 0.0

    rows = [one for one in made_up(loss) if one["kind"] != "prefix"]
    assert fit_kv_bits(rows, "test")["4"] == pytest.approx([max(0.0, all_layers) / LAYERS] * LAYERS)


def test_a_model_that_loses_nothing_has_a_page_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hw.score.report.load_model", lambda name: {"tiny": tiny_spec()}[name])
    rows = made_up(lambda plan: 0.0)
    page = kv_bits({"model": "tiny", "commit": "abc", "plans": rows, "fits": {"test": fit_kv_bits(rows, "test")}})
    assert (page["share"], page["all"]) == (0.0, {8: pytest.approx(0.0), 4: pytest.approx(0.0)})


def test_the_fit_and_the_page_of_a_tiny_model_say_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    elastic = ElasticModel(tiny(), name="tiny")
    # The model's own likeliest tokens: any change of its KV makes them less likely.
    first = torch.arange(1, 4)[:, None]
    windows = tiny().generate(first, max_new_tokens=39, do_sample=False, pad_token_id=0)
    wanted = list(kv_plans(elastic.spec, ORDER, seed=0))
    found = measure_many(elastic, [plan for _, plan in wanted], windows)
    rows = [row(kind, plan, one.decode_mean) for (kind, plan), one in zip(wanted, found, strict=True)]
    fit = fit_kv_bits(rows, "test")
    nll = {plan: one.decode_mean for (_, plan), one in zip(wanted, found, strict=True)}
    dense = dense_plan(elastic.spec)
    alone = []
    for layer in range(LAYERS):
        bits = tuple(4 if i == layer else 16 for i in range(LAYERS))
        alone.append(max(0.0, nll[replace(dense, kv_bits=bits)] - nll[dense]))
    assert fit["factor"] > 0.0 < max(alone)
    assert fit["4"] == pytest.approx([fit["factor"] * one for one in alone])
    lost_at_8 = nll[replace(dense, kv_bits=(8,) * LAYERS)] - nll[dense]
    assert sum(fit["8"]) == pytest.approx(max(0.0, lost_at_8))

    monkeypatch.setattr("hw.score.report.load_model", lambda name: {"tiny": elastic.spec}[name])
    page = kv_bits({"model": "tiny", "commit": "abc", "plans": rows, "fits": {"test": fit}})
    assert page["all"] == {
        bits: pytest.approx(nll[replace(dense, kv_bits=(bits,) * LAYERS)] - nll[dense]) for bits in (8, 4)
    }
    assert (page["tokens"], page["commit"], page["factor"]) == (60, "abc", fit["factor"])
    costs = [one["nats"] for one in page["costly"]]
    assert costs == sorted(fit["4"], reverse=True)
    assert [fit["4"][one["layer"]] for one in page["costly"]] == costs
    assert page["share"] == pytest.approx(1.0)  # the five most costly of four layers
    for error in fit["errors"]:
        assert error["plans"] in page["table"]
