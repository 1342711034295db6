"""The numbers of a report: laws between what is drawn and what the run recorded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sim.cost.plan_text import plan_from_text
from sim.report import series
from sim.report.run_data import RunData
from sim.report.series import Steps


def with_transitions(run: RunData, frame: pd.DataFrame) -> RunData:
    return replace(run, transitions=frame)


def at(steps: Steps, moments_s: np.ndarray) -> np.ndarray:
    """Return the value of steps at given times; 0 before the first."""
    index = np.searchsorted(steps.time_s, moments_s, side="right") - 1
    return np.where(index >= 0, steps.values[np.maximum(index, 0)], 0.0)


def test_slo_attainment_by_time_adds_up_to_that_of_the_summary(run: RunData) -> None:
    found = series.arrivals(run, run.end_s)
    assert found.arrived.sum() == run.summary["requests"]
    assert found.met.sum() / found.arrived.sum() == pytest.approx(run.summary["slo_attainment"])
    assert 0.0 < run.summary["slo_attainment"] < 1.0
    assert len(found.arrived) <= series.SLO_BINS


@pytest.mark.parametrize("name", ["ttft_s", "tpot_s", "e2e_s"])
def test_distributions_pass_through_the_percentiles_of_the_summary(run: RunData, name: str) -> None:
    values, shares = series.distribution(run.latency_s(name))
    for label, share in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99)):
        assert values[np.flatnonzero(np.isclose(shares, share))[0]] == pytest.approx(run.summary[name][label])
    assert values[-1] == run.summary[name]["max"]
    assert (np.diff(values) >= 0).all()


def test_without_iterations_running_and_waiting_are_those_of_the_records(run: RunData) -> None:
    """Between two preemptions, running requests are those that were admitted and have not ended."""
    bare = replace(run, iterations=None)
    assert run.iterations is not None
    before = run.iterations["preemptions"].cumsum() == 0
    moments_s = run.iterations["end_s"].to_numpy()[before][:-1]
    logged, counted = series.running(run), series.running(bare)
    inside = at(logged, moments_s + 1e-9), at(counted, moments_s + 1e-9)
    assert len(moments_s) > 100
    np.testing.assert_array_equal(*inside)
    assert series.kv_share(bare) is None
    assert at(series.waiting(bare), np.array([bare.end_s]))[0] == 0


def test_nothing_runs_or_waits_after_the_last_request(run: RunData) -> None:
    for steps in (series.running(run), series.waiting(run)):
        assert (steps.time_s[-1], steps.values[-1]) == (run.end_s, 0.0)
    kv = series.kv_share(run)
    assert kv is not None
    assert np.isnan(kv.values[-1])
    assert np.nanmax(kv.values) == run.summary["kv_peak_share"]


@given(arrays.arrays(np.float64, st.integers(0, 400), elements=st.floats(-9, 9) | st.just(np.nan)))
def test_a_thinned_line_keeps_the_extremes_of_every_bin_and_adds_no_value(values: np.ndarray) -> None:
    bins, end_s = 7, 10.0
    time_s = np.linspace(0, end_s, len(values))
    thin = Steps(time_s, values).thinned(end_s, bins)
    assert len(thin.time_s) <= max(4 * bins, len(values) if len(values) <= 4 * bins else 0)
    drawn, recorded = (
        set(zip(one.time_s.tolist(), np.nan_to_num(one.values, nan=99.0).tolist(), strict=True))
        for one in (thin, Steps(time_s, values))
    )
    assert drawn <= recorded
    for number in range(bins):
        inside, kept = (
            one.values[np.minimum(one.time_s / end_s * bins, bins - 1).astype(int) == number]
            for one in (Steps(time_s, values), thin)
        )
        if np.isfinite(inside).any():
            assert (np.nanmin(inside), np.nanmax(inside)) == (np.nanmin(kept), np.nanmax(kept))
        if len(inside):
            np.testing.assert_array_equal(inside[[0, -1]], kept[[0, -1]])


def test_the_map_of_plans_is_that_of_the_transitions(run: RunData) -> None:
    found = series.plan_map(run, run.end_s)
    assert found is not None
    assert found.exact
    assert run.transitions is not None
    assert len(run.transitions) > 3
    assert found.state.shape == (64, len(run.transitions) + 1)
    np.testing.assert_array_equal(found.edges_s[1:-1], run.transitions["time_s"])
    for column, text in enumerate([run.transitions["from"].iloc[0], *run.transitions["to"]]):
        plan = plan_from_text(text, 32)
        np.testing.assert_array_equal(found.state[:32, column] != series.DROPPED, plan.decode.mha)
        np.testing.assert_array_equal(found.state[32:, column] != series.DROPPED, plan.decode.ffn)
    assert (found.state == series.DROPPED).any()


def test_states_of_blocks_say_bits_and_what_only_prefill_keeps() -> None:
    plan = plan_from_text("prefill -MHA 0; decode -MHA 0,1; W8 2; W4 3", 4)
    states = series.block_states(plan).tolist()
    assert states[:4] == [series.DROPPED, series.PREFILL_ONLY, series.BITS_8, series.BITS_4]
    assert states[4:] == [series.BITS_16, series.BITS_16, series.BITS_8, series.BITS_4]
    streamed = series.block_states(plan_from_text("-MHA 0; W8 2; streamed 0-2", 4)).tolist()
    assert streamed[:4] == [series.DROPPED, series.STREAMED, series.STREAMED, series.BITS_16]
    writing = series.block_states(plan_from_text("-MHA 0; W8 2; KV only 0-2", 4)).tolist()
    assert writing[:5] == [series.DROPPED, series.KV_ONLY, series.KV_ONLY, series.BITS_16, series.KV_ONLY]
    lower = series.block_states(plan_from_text("-MHA 0; W8 2-3; compute8 0-1; compute4 2", 4)).tolist()
    assert lower[:4] == [series.DROPPED, series.NESTED, series.NESTED, series.BITS_8]
    narrow = series.block_states(plan_from_text("-FFN 0; W8 2; streamed 1; FFN6/8 0-2", 4)).tolist()
    assert narrow[:4] == [series.BITS_16, series.STREAMED, series.BITS_8, series.BITS_16]
    assert narrow[4:] == [series.DROPPED, series.STREAMED, series.NARROW, series.BITS_16]


def many_changes(run: RunData, number: int) -> RunData:
    assert run.transitions is not None
    texts = ["dense" if i % 2 else "-FFN 3" for i in range(number)]
    row = run.transitions.iloc[[0]]
    frame = pd.concat([row] * number, ignore_index=True)
    frame["time_s"] = np.linspace(0.1, run.end_s - 0.1, number)
    frame["ready_s"] = frame["time_s"] + 0.001
    frame["to"], frame["bytes_in"] = texts, 5
    return with_transitions(run, frame)


def test_many_plan_changes_share_marks_and_columns_and_none_is_lost(run: RunData) -> None:
    busy = many_changes(run, 5000)
    marks = series.changes(busy, busy.end_s)
    assert len(marks) <= series.PLAN_COLUMNS
    assert (sum(one.count for one in marks), sum(one.bytes_in for one in marks)) == (5000, 25000)
    found = series.plan_map(busy, busy.end_s)
    assert found is not None
    assert (found.exact, found.state.shape[1]) == (False, series.PLAN_COLUMNS)
    few = series.changes(run, run.end_s)
    assert [one.count for one in few] == [1] * run.summary["transitions"]


def test_bins_have_round_widths_and_cover_the_run() -> None:
    for end_s in (0.003, 1.0, 7.3, 59.9, 608.8, 86_400.0):
        width_s = series.bin_width_s(end_s, 100)
        assert end_s / 100 <= width_s <= end_s / 20
        assert f"{width_s:e}"[0] in "125"


def test_only_points_that_another_beats_are_dominated() -> None:
    points = np.array([[1.0, 5.0], [2.0, 4.0], [2.0, 5.0], [3.0, 3.0], [1.0, 5.0]])
    assert series.undominated(points).tolist() == [True, True, False, True, True]
