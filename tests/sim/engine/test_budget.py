"""Budgets over time: laws that hold for each of them, and malformed files."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.cost.gpu import Gpu
from sim.cost.memory import kv_pool_layer_blocks, peak_bytes, weight_bytes
from sim.cost.plan import dense_plan, keep_all
from sim.engine.budget import (
    KINDS,
    Budget,
    BudgetContext,
    BudgetMeter,
    cotenant,
    dense_shares,
    from_csv,
    kv_blocks,
    random_walk,
    relative,
    steps,
)
from sim.errors import BudgetError
from tests.sim.serving import TINY

CONTEXT = BudgetContext(
    model=TINY,
    gpu=Gpu(
        name="small",
        memory_bytes=1e9,
        memory_bandwidth_bytes_per_s=1e9,
        dense_fp16_flop_per_s=1e9,
        host_to_device_bytes_per_s=1e9,
    ),
    plan=dense_plan(TINY),
    workspace_bytes=1000,
    kv_block_tokens=4,
)


def tenant(seed: int, mean_away_s: float = 10.0, mean_stay_s: float = 30.0, horizon_s: float = 40_000.0) -> Budget:
    return cotenant(
        CONTEXT,
        share=0.9,
        cotenant_bytes=5e8,
        mean_away_s=mean_away_s,
        mean_stay_s=mean_stay_s,
        horizon_s=horizon_s,
        seed=seed,
    )


def walk(seed: int) -> Budget:
    return random_walk(
        CONTEXT, low_share=0.4, high_share=0.9, step_share=0.1, period_s=20.0, horizon_s=2000.0, seed=seed
    )


def test_steps_are_shares_of_the_device_memory_and_keep_their_notice() -> None:
    budget = steps(CONTEXT, rows=[[0, 0.9], [10, 0.5], [20, 0.5], [30, 0.9]], notice_s=2.0)
    assert budget == Budget((0.0, 10.0, 30.0), (900_000_000, 500_000_000, 900_000_000), 2.0)


def test_steps_are_bytes_where_that_is_said_and_never_more_than_the_device_has() -> None:
    rows = [[0, 9e8], [10, 2.5e8]]
    assert steps(CONTEXT, rows=rows, unit="bytes") == Budget((0.0, 10.0), (900_000_000, 250_000_000))
    for unit, wrong in (("bytes", [[0, 1.1e9]]), ("bytes", [[0, 0.9]]), ("share", rows), ("byte", rows)):
        with pytest.raises(BudgetError):
            steps(CONTEXT, rows=wrong, unit=unit)


UNREADABLE: list[Any] = [[[0, 0.9], [5, 0.9], [3, 0.8]], [[0, 0.9], [math.nan, 0.9]], [[0, 0.9, 1]], [[0, None]], [3]]


@pytest.mark.parametrize("rows", [[[5, 0.9]], [[0, 0.9], [10, 1.5]], [[0, 0.9], [10, 0.5], [10, 0.9]], [], *UNREADABLE])
def test_steps_that_no_device_could_follow_are_refused(rows: list[list[float]]) -> None:
    with pytest.raises(BudgetError):
        steps(CONTEXT, rows=rows)


@pytest.mark.parametrize("make", [tenant, walk])
def test_a_random_budget_is_its_seed_and_another_seed_is_another_budget(make: type[Budget]) -> None:
    assert make(1) == make(1)
    assert make(1) != make(2)


def test_a_co_tenant_is_there_as_long_as_its_mean_times_say() -> None:
    budget = tenant(3)
    ends_s = (*budget.change_s[1:], budget.change_s[-1])
    there_s = sum(
        end_s - start_s
        for start_s, end_s, value in zip(budget.change_s, ends_s, budget.budget_bytes, strict=True)
        if value < 900_000_000
    )
    assert there_s / 40_000.0 == pytest.approx(30.0 / (30.0 + 10.0), abs=0.03)


def test_a_co_tenant_leaves_two_levels_and_is_gone_at_both_ends() -> None:
    budget = tenant(3)
    assert set(budget.budget_bytes) == {900_000_000, 400_000_000}
    assert budget.budget_bytes[0] == budget.budget_bytes[-1] == 900_000_000


def test_a_co_tenant_that_takes_everything_is_refused() -> None:
    with pytest.raises(BudgetError, match="cotenant_bytes"):
        cotenant(CONTEXT, share=0.5, cotenant_bytes=6e8, mean_away_s=1.0, mean_stay_s=1.0, horizon_s=9.0, seed=0)


def test_a_random_walk_stays_within_its_bounds_and_moves_by_its_step() -> None:
    values = walk(5).budget_bytes
    assert 400_000_000 <= min(values) <= max(values) <= 900_000_000
    assert all(abs(b - a) <= 100_000_000 for a, b in pairwise(values[:-1]))


def test_a_relative_budget_is_the_share_of_the_dense_peak_plus_the_workspace() -> None:
    dense_peak = peak_bytes(TINY, keep_all(TINY), 8, 2048)
    for share in (0.6, 0.8, 1.0):
        (value,) = relative(CONTEXT, share=share, batch=8, sequence_tokens=2048).budget_bytes
        assert value - 1000 == int(share * dense_peak)


def test_a_csv_budget_is_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "budget.csv"
    path.write_text("time_s,budget_bytes\n0,900\n1.5,4e2\n")
    assert from_csv(CONTEXT, path=str(path)) == Budget((0.0, 1.5), (900, 400))


@pytest.mark.parametrize("row", ["1.5", "1.5,many", "1.5,inf", "1.5,nan", "1,2,3", ""])
def test_a_malformed_row_is_named_by_file_and_line(row: str, tmp_path: Path) -> None:
    path = tmp_path / "budget.csv"
    path.write_text(f"time_s,budget_bytes\n0,900\n{row}\n2,800\n")
    with pytest.raises(BudgetError, match=r"budget\.csv, line 3"):
        from_csv(CONTEXT, path=str(path))


def test_a_csv_with_other_columns_or_none_at_all_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "budget.csv"
    path.write_text("seconds,bytes\n0,900\n")
    with pytest.raises(BudgetError, match="line 1"):
        from_csv(CONTEXT, path=str(path))
    with pytest.raises(BudgetError, match="cannot be read"):
        from_csv(CONTEXT, path=str(tmp_path / "missing.csv"))


def test_a_budget_of_kv_blocks_gives_a_pool_of_that_many() -> None:
    budget = kv_blocks(CONTEXT, blocks=77)
    pool = kv_pool_layer_blocks(
        TINY, CONTEXT.plan, budget.budget_bytes[0], CONTEXT.workspace_bytes, CONTEXT.kv_block_tokens
    )
    assert pool == 77 * TINY.num_layers
    with pytest.raises(BudgetError, match=r"budget\.blocks is 0"):
        kv_blocks(CONTEXT, blocks=0)


@given(
    values=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    looks=st.lists(st.tuples(st.floats(0.0, 4.0), st.integers(0, 10)), min_size=1, max_size=12),
    notice_s=st.sampled_from([0.0, 0.5]),
)
def test_a_budget_meter_counts_the_seconds_in_which_more_was_held(
    values: list[int], looks: list[tuple[float, int]], notice_s: float
) -> None:
    budget = Budget(tuple(float(i) for i in range(len(values))), tuple(values), notice_s)
    meter, now_s, expected_s = BudgetMeter(budget), 0.0, 0.0
    for later_s, held_bytes in looks:
        start_s, now_s = now_s, now_s + later_s
        edges = [start_s, *(t for t in budget.change_s if start_s < t < now_s), now_s]
        for begin_s, end_s in pairwise(edges):
            step = int(np.searchsorted(budget.change_s, begin_s, side="right")) - 1
            expected_s += (end_s - begin_s) * (held_bytes > values[step])
        meter.follow(now_s, held_bytes)
        assert meter.violation_s == pytest.approx(expected_s)
        step = int(np.searchsorted(budget.change_s, now_s, side="right")) - 1
        assert meter.now_bytes == values[step]
        after = [t for t in budget.change_s if t > now_s]
        assert meter.next_s == (after[0] if after else np.inf)
        known = bool(after) and after[0] - notice_s <= now_s
        assert meter.announced(now_s) == ((values[step + 1], after[0]) if known else (values[step], np.inf))


def test_shares_of_the_dense_weights_move_between_two_amounts_of_any_model() -> None:
    dense_bytes = weight_bytes(CONTEXT.model, dense_plan(CONTEXT.model))
    for kind in KINDS:
        found = dense_shares(roomy_device(), kind=kind, high_share=3.0, low_share=2.0, horizon_s=300.0, seed=1)
        assert found.budget_bytes[0] == found.budget_bytes[-1] == 3 * dense_bytes
        assert min(found.budget_bytes) >= 2 * dense_bytes
        assert (len(found.budget_bytes) == 1) == (kind == "full")
    capped = dense_shares(CONTEXT, kind="steps", high_share=1e6, low_share=1e5, horizon_s=9.0, seed=1)
    assert capped.budget_bytes == (int(0.9 * CONTEXT.gpu.memory_bytes),)
    with pytest.raises(BudgetError, match=r"low_share is 2\.0.*at most high_share"):
        dense_shares(CONTEXT, kind="full", high_share=1.0, low_share=2.0, horizon_s=9.0, seed=1)
    with pytest.raises(BudgetError, match=r"budget\.kind is 'step'.*steps"):
        dense_shares(CONTEXT, kind="step", high_share=1.0, low_share=0.5, horizon_s=9.0, seed=1)
    with pytest.raises(BudgetError, match="horizon_s is 0"):
        dense_shares(CONTEXT, kind="full", high_share=1.0, low_share=0.5, horizon_s=0.0, seed=1)


@pytest.mark.parametrize("kind", ["cotenant", "random_walk"])
def test_a_budget_at_twice_the_pace_reaches_the_same_amounts_in_half_the_time(kind: str) -> None:
    def moves(pace: float, horizon_s: float) -> Budget:
        return dense_shares(
            roomy_device(), kind=kind, high_share=3.0, low_share=2.0, horizon_s=horizon_s, seed=1, pace=pace
        )

    usual, fast = moves(1.0, 600.0), moves(2.0, 300.0)
    assert fast.budget_bytes == usual.budget_bytes
    assert np.array(fast.change_s) == pytest.approx(np.array(usual.change_s) / 2)
    with pytest.raises(BudgetError, match="pace is 0"):
        moves(0.0, 300.0)


def roomy_device() -> BudgetContext:
    dense_bytes = weight_bytes(CONTEXT.model, dense_plan(CONTEXT.model))
    return replace(CONTEXT, gpu=replace(CONTEXT.gpu, memory_bytes=10.0 * dense_bytes))
