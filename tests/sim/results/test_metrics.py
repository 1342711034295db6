"""Figures from records, against values that can be checked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.errors import ConfigError
from sim.results.metrics import Slo, behind_pace, distribution, gap_distribution, met_slo, records_frame, summarise
from sim.results.records import Records, TokenGaps
from tests.sim.serving import requests, tiny_engine


def served(*rows: tuple[float, int, int], **engine: object) -> tuple[Records, dict[str, object]]:
    unit = tiny_engine(**engine)  # type: ignore[arg-type]
    unit.submit(requests(*rows))
    unit.run_until(math.inf)
    return unit.records(), summarise(unit.records(), unit.iterations(), unit.token_gaps(), Slo(ttft_s=2.0), cpu_s=0.5)


def test_slo_attainment_counts_rejected_requests_as_misses() -> None:
    _, summary = served((0.0, 8, 1), (0.0, 3000, 1), kv_blocks=5)
    assert summary["rejected"] == 1
    assert summary["slo_attainment"] == 0.5


def test_goodput_is_good_requests_over_the_makespan() -> None:
    _, summary = served((0.0, 4, 2), (10.0, 4, 2))
    assert summary["makespan_s"] == 12.0
    assert summary["goodput_rps"] == 2 / 12
    assert summary["output_tokens_per_s"] == 4 / 12
    assert summary["requests_per_cpu_s"] == 4.0


def test_a_request_of_one_token_has_no_tpot_and_cannot_miss_it() -> None:
    records, _ = served((0.0, 4, 1))
    assert math.isnan(records.tpot_s[0])
    assert met_slo(records, Slo(ttft_s=None, tpot_s=1e-9)).tolist() == [True]


def test_every_target_of_an_slo_must_be_met() -> None:
    records, _ = served((0.0, 4, 5))  # ttft 1 s, tpot 1 s, e2e 5 s
    assert met_slo(records, Slo(ttft_s=1.0, tpot_s=1.0, e2e_s=5.0)).tolist() == [True]
    for slo in (Slo(ttft_s=0.9), Slo(tpot_s=0.9), Slo(ttft_s=None, e2e_s=4.9)):
        assert met_slo(records, slo).tolist() == [False]


def test_a_pace_counts_from_the_first_token_until_now() -> None:
    unit = tiny_engine()
    unit.submit(requests((0.0, 4, 3), (0.0, 4, 9), (0.0, 4, 1)))
    unit.run_until(6.0)  # a first token each after 1 s, then one a second
    records = unit.records()
    assert records.produced_tokens.tolist() == [3, 6, 1]
    assert behind_pace(records, 1.0, 6.0).tolist() == [False, False, False]
    assert behind_pace(records, 0.9, 6.0).tolist() == [True, True, False]
    assert behind_pace(records, 1.0, 6.5).tolist() == [False, True, False]  # what has finished does not grow older


def test_a_request_without_a_first_token_is_not_behind() -> None:
    unit = tiny_engine()
    unit.submit(requests((0.0, 4, 3)))
    unit.run_until(0.5)
    assert behind_pace(unit.records(), 1e-9, 100.0).tolist() == [False]


def test_a_request_with_one_token_so_far_is_not_behind_before_a_second_is_due() -> None:
    unit = tiny_engine()
    unit.submit(requests((0.0, 4, 3)))
    unit.run_until(1.5)
    records = unit.records()
    assert records.produced_tokens.tolist() == [1]
    assert behind_pace(records, 1.0, 1.5).tolist() == [False]


def test_an_slo_of_zero_seconds_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"slo\.ttft_s is 0"):
        Slo(ttft_s=0)


def test_figures_of_nothing_are_none_and_not_nan() -> None:
    assert set(distribution(np.array([math.nan])).values()) == {None}
    assert set(gap_distribution(TokenGaps(itl_s=np.array([]), count=np.array([], dtype=np.int64))).values()) == {None}
    _, summary = served()
    assert summary["requests"] == 0
    assert summary["slo_attainment"] is None


@given(st.lists(st.tuples(st.floats(0.001, 10), st.integers(1, 9)), min_size=1, max_size=30))
def test_counted_gaps_give_the_quantiles_of_the_gaps_written_out(rows: list[tuple[float, int]]) -> None:
    itl_s, count = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    figures = gap_distribution(TokenGaps(itl_s=itl_s, count=count))
    written_out = np.repeat(itl_s, count)
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99)):
        assert figures[name] == np.quantile(written_out, q, method="inverted_cdf")
    assert figures["mean"] == pytest.approx(written_out.mean())
    assert figures["max"] == written_out.max()


def test_the_records_table_has_the_columns_that_users_read() -> None:
    records, _ = served((0.0, 4, 2))
    frame = records_frame(records, Slo())
    assert list(frame.columns) == [
        "request_id", "arrival_s", "prompt_tokens", "output_tokens", "produced_tokens", "admitted_s", "first_token_s",
        "finish_s", "ttft_s", "tpot_s", "e2e_s", "preemptions", "status", "met_slo", "kept_params_share",
        "quality_nll", "cached_tokens",
    ]  # fmt: skip
    assert frame.loc[0, "status"] == "finished"
