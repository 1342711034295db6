"""Factors on memory-bound and compute-bound times."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sim.cost.bounds import Factors, knee_of, ratio_at
from sim.cost.latency import CALIBRATIONS, calibration_names, load_calibration
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan
from sim.errors import CalibrationError


@pytest.mark.parametrize("name", calibration_names())
def test_equal_factors_scale_every_time_of_an_iteration_but_the_overhead(name: str) -> None:
    latency = load_calibration(name).with_fixed(0.0, "test")
    scaled = latency.with_factors(Factors(memory_bound=1.5, compute_bound=1.5))
    plan = dense_plan(load_model(latency.model))
    for chunks, batch, context in (([], 8, 4000), ([(700, 0)], 0, 0), ([(64, 300)], 20, 9000)):
        before = latency.iteration_s(plan, chunks, batch, context, batch + len(chunks))
        assert scaled.iteration_s(plan, chunks, batch, context, batch + len(chunks)) == pytest.approx(1.5 * before)


def test_a_decode_of_few_is_bound_by_memory_and_a_long_prompt_by_arithmetic() -> None:
    latency = load_calibration("llama3.1_8b_h100").with_fixed(0.0, "test")
    plan = dense_plan(load_model(latency.model))
    memory = latency.with_factors(Factors(memory_bound=1.3))
    compute = latency.with_factors(Factors(compute_bound=1.3))

    def ratio(scaled: object, *batch: object) -> float:
        return scaled.iteration_s(plan, *batch) / latency.iteration_s(plan, *batch)  # type: ignore[attr-defined]

    decode, prompt = ([], 8, 8000, 8), ([(8192, 0)], 0, 0, 1)
    assert ratio(memory, *decode) == pytest.approx(1.3, abs=0.01)
    assert ratio(compute, *decode) == pytest.approx(1.0, abs=0.01)
    assert ratio(memory, *prompt) < 1.05
    assert ratio(compute, *prompt) > 1.25


def test_no_factors_change_no_bit_of_a_calibration() -> None:
    latency = load_calibration("llama3.1_8b_rtx4090")
    assert latency.with_factors(Factors()) is latency


def test_the_knee_lies_where_reading_the_weights_takes_as_long_as_arithmetic() -> None:
    counts = np.arange(1, 2001, dtype=np.float64)
    roofline = (100.0**4 + counts**4) ** 0.25  # memory 100, one each token
    assert knee_of(roofline) == pytest.approx(100.0, rel=0.01)
    factors = Factors(memory_bound=2.0, compute_bound=3.0)
    assert ratio_at(counts, 100.0, factors) * roofline == pytest.approx((200.0**4 + (3 * counts) ** 4) ** 0.25)


def test_a_file_with_factors_prices_like_its_tables_with_them(tmp_path: Path) -> None:
    content = json.loads((CALIBRATIONS / "llama3.1_8b_a100.json").read_text())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content | {"factors": {"memory_bound": 1.1, "compute_bound": 1.44}, "kind": "fitted"}))
    plain = load_calibration("llama3.1_8b_a100").with_factors(Factors(memory_bound=1.1, compute_bound=1.44))
    assert np.array_equal(load_calibration(path).tables.data, plain.tables.data, equal_nan=True)


@pytest.mark.parametrize(
    "factors",
    [{"memory_bound": 0}, {"memory_bound": -1}, {"compute_bound": 1e9}, {"memory_bound": "fast"}, {"memory": 1.0}, 3,
     None, {"compute_bound": True}, {"compute_bound": float("nan")}],
)  # fmt: skip
def test_factors_that_are_none_are_an_error_of_one_line(tmp_path: Path, factors: object) -> None:
    content = json.loads((CALIBRATIONS / "llama3.1_8b_a100.json").read_text())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content | {"factors": factors}))
    with pytest.raises(CalibrationError):
        load_calibration(path)
