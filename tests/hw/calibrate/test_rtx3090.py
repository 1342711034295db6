"""The calibration of an RTX 3090: it gives the measured prefills and switches back, and the runs of its fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hw.calibrate import rtx3090
from hw.calibrate.published import SIMULATED
from sim.cost.latency import CALIBRATIONS, calibration_from_dict, load_calibration
from sim.cost.memory import layer_weight_bytes
from sim.cost.model_spec import load_model
from sim.errors import CalibrationError
from sim.paths import DATA_VARIABLE, data_dir

MODEL = load_model(rtx3090.MODEL)


@pytest.fixture(scope="module")
def made() -> rtx3090.Runs:
    """Return made-up measurements of the right form."""
    tokens = np.array([1024, 4096, 32768])
    arrivals = pd.DataFrame({"workload": "low", "arrival_s": np.repeat(np.arange(8) * 11.5, 2)})
    low, high = (16 * layer_weight_bytes(MODEL, bits) for bits in (4, 16))
    seconds = np.array([16 * 0.02 + low / 5e9, 16 * 0.02 + high / 5e9])
    return rtx3090.Runs(
        arrivals=arrivals,
        prefill=pd.DataFrame({"tokens": tokens, "fp16_ms": 30 + 0.23 * tokens, "w4_ms": 25 + 0.25 * tokens}),
        fixed=pd.DataFrame(),
        crossover=pd.DataFrame(),
        switches=pd.DataFrame({"direction": ["fp16_to_w4", "w4_to_fp16"], "total_ms": 1e3 * seconds, "h2d_gb": 0.0}),
    )


def test_the_tables_give_the_measured_prefills_of_both_plans_back(made: rtx3090.Runs) -> None:
    latency = calibration_from_dict(rtx3090.content_of(made, rtx3090.PRIOR))
    for mode, column in (("fp16", "fp16_ms"), ("w4", "w4_ms")):
        plan = rtx3090.plan_of(MODEL, mode)
        for count, wanted_ms in zip(made.prefill["tokens"], made.prefill[column], strict=True):
            prompts = [(1024, 0)] * (int(count) // 1024)
            seconds = latency.iteration_s(plan, prompts, 0, 0, len(prompts))
            assert 1e3 * seconds == pytest.approx(wanted_ms, rel=1e-3)


def test_the_speed_of_copies_is_found_again(made: rtx3090.Runs) -> None:
    speed = rtx3090.copy_speed_of(made)
    assert speed["copy_layer_s"] == pytest.approx(0.02, rel=1e-3)
    assert speed["host_to_device_bytes_per_s"] == pytest.approx(5e9, rel=1e-3)
    latency = calibration_from_dict(rtx3090.content_of(made, rtx3090.PRIOR))
    assert latency.copying is not None
    assert latency.copying.layer_s == speed["copy_layer_s"]


def test_requests_are_stretched_as_the_scale_says_and_an_unknown_workload_is_an_error(made: rtx3090.Runs) -> None:
    assert made.trace_at(11.5).arrival_s.tolist() == (2 * made.trace("low").arrival_s).tolist()
    with pytest.raises(CalibrationError, match="no workload 'middle'"):
        made.trace("middle")


def test_a_crossing_is_interpolated_and_absent_where_one_curve_stays_below() -> None:
    assert rtx3090.crossing_rps([1.0, 2.0], [1.0, 4.0], [2.0, 2.0]) == pytest.approx(1.5)
    assert rtx3090.crossing_rps([1.0, 2.0], [1.0, 1.5], [2.0, 2.0]) is None


def test_missing_files_and_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no .*arrivals.csv; set RAP_LAB_DATA"):
        rtx3090.Runs.read(tmp_path)
    (tmp_path / "arrivals.csv").write_text("workload,prompt_tokens,output_tokens\n")
    with pytest.raises(CalibrationError, match=r"arrivals.csv has no column arrival_s; it has workload"):
        rtx3090.Runs.read(tmp_path)
    (tmp_path / "arrivals.csv").write_text("")
    with pytest.raises(CalibrationError, match=r"arrivals.csv cannot be read"):
        rtx3090.Runs.read(tmp_path)
    (tmp_path / "arrivals.csv").write_text("workload,arrival_s,prompt_tokens,output_tokens\nlow,soon,1,1\n")
    with pytest.raises(CalibrationError, match=r"a value of arrival_s is not a number"):
        rtx3090.Runs.read(tmp_path)


def test_the_committed_calibration_reproduces_the_runs_of_its_fit() -> None:
    folder = data_dir() / "calibration" / "morphserve_rtx3090"
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set {DATA_VARIABLE}")
    runs, latency = rtx3090.Runs.read(folder), load_calibration(rtx3090.NAME)
    for (workload, mode), repeats in runs.fixed.groupby(["workload", "mode"]):
        figures = rtx3090.figures_of(rtx3090.served(latency, runs.trace(str(workload)), str(mode)))
        for name in ("tpot_mean_s", "duration_s", "forwards"):
            low, high = repeats[name].min(), repeats[name].max()
            assert 0.95 * low <= figures[name] <= 1.05 * high, (workload, mode, name)
    rows = rtx3090.crossover(runs, latency)
    crossing = rtx3090.crossing_rps(*([row[key] for row in rows] for key in ("rate_rps", "fp16", "w4")))
    assert crossing is not None
    assert 0.65 < crossing < 0.85


@pytest.mark.slow
def test_the_committed_calibration_comes_from_the_measurements() -> None:
    folder = data_dir() / "calibration"
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set {DATA_VARIABLE}")
    content = SIMULATED[rtx3090.NAME](folder)
    committed = json.loads((CALIBRATIONS / f"{rtx3090.NAME}.json").read_text(encoding="utf-8"))
    assert content["fixed_us"] == pytest.approx(committed["fixed_us"], rel=0.01)
    assert content["device_run"] == committed["device_run"]
