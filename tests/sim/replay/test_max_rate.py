"""The maximum rate: all requests at once. A trace that offers 90 % of it or more is warned about."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from sim.cluster import run as cluster_command
from sim.compare import variants
from sim.config import CONF_DIR
from sim.cost.plan import dense_plan
from sim.disaggregate import run as disaggregate_command
from sim.policies import Fixed
from sim.policies.fixed import static_plan
from sim.replay.max_rate import all_at_once, is_measured, rate_figures, without_queue_limit
from sim.replay.run import build_engine, build_trace, measured_rate, replay_with
from sim.replay.sweep import replay_case
from sim.results.report import columns_of, print_summary, warn_if_near_maximum
from sim.traces.trace import Trace
from tests.sim.serving import TINY, tiny_engine

QUICK = ("trace=poisson", "trace.duration_s=30", "workload=only_4096")
FIXED = Fixed(dense_plan(TINY))


def composed(command: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(command, overrides=[*QUICK, *overrides])


def one_second_each(count: int) -> Trace:
    return Trace(
        arrival_s=2.0 * np.arange(count),
        prompt_tokens=np.full(count, 4, dtype=np.int64),
        output_tokens=np.ones(count, dtype=np.int64),
    )


def rushed(trace: Trace, **settings: Any) -> Any:
    engine = tiny_engine(**settings)
    engine.submit_trace(all_at_once(trace))
    engine.run_until(math.inf)
    return engine.records()


def test_a_server_that_takes_a_second_for_each_request_finishes_one_per_second() -> None:
    figures = rate_figures(rushed(one_second_each(9), max_running=1), {"request_rate_rps": 0.5})
    assert figures == {"max_rate_rps": 1.0, "utilization": 0.5}


def test_the_maximum_rate_does_not_depend_on_the_rate_of_the_trace() -> None:
    slow, fast = (composed("replay", f"workload={name}") for name in ("half_rate", "double_rate"))
    rates = [
        measured_rate(cfg, build_trace(cfg), {"request_rate_rps": 1.0}, FIXED)["max_rate_rps"] for cfg in (slow, fast)
    ]
    assert rates[0] == rates[1]


def test_a_server_that_finishes_nothing_and_a_trace_without_a_rate_have_no_figure() -> None:
    nothing = rate_figures(rushed(one_second_each(2), kv_blocks=5, max_context_tokens=4), {"request_rate_rps": 0.5})
    assert nothing == {"max_rate_rps": None, "utilization": None}
    assert rate_figures(rushed(one_second_each(9), max_running=1), {"request_rate_rps": None})["utilization"] is None


def test_too_few_requests_to_fill_a_server_have_no_utilization() -> None:
    trace = Trace(arrival_s=np.arange(3.0), prompt_tokens=np.full(3, 4), output_tokens=np.full(3, 20))
    figures = rate_figures(rushed(trace, max_running=8), {"request_rate_rps": 1.0})
    assert figures == {"max_rate_rps": 3 / 20, "utilization": None}
    assert rate_figures(rushed(trace, max_running=1), {"request_rate_rps": 1.0})["utilization"] == 20.0


def test_all_requests_at_once_keep_their_order_and_lengths() -> None:
    trace = build_trace(composed("replay"))
    at_once = all_at_once(trace)
    assert at_once.arrival_s.tolist() == [0.0] * len(trace)
    assert at_once.prompt_tokens.tolist() == trace.prompt_tokens.tolist()
    assert at_once.output_tokens.tolist() == trace.output_tokens.tolist()


def test_a_limit_of_the_queue_does_not_count_against_a_server() -> None:
    plan = static_plan(TINY, max_waiting=1, max_running=3)
    assert without_queue_limit(Fixed(plan)) == Fixed(static_plan(TINY, max_running=3))
    limited = composed("replay", "policy=fixed", "policy.max_waiting=1")
    rates = [
        measured_rate(cfg, build_trace(cfg), {"request_rate_rps": 1.0}, FIXED) for cfg in (limited, composed("replay"))
    ]
    assert rates[0] == rates[1]


@pytest.mark.parametrize(
    ("key", "single", "several"), [("null", True, False), ("true", True, True), ("false", False, False)]
)
def test_a_single_replay_of_a_fixed_plan_measures_it_unless_the_key_says_otherwise(
    key: str, single: bool, several: bool
) -> None:
    cfg = composed("replay", f"max_rate={key}")
    assert (is_measured(cfg, FIXED), is_measured(cfg)) == (single, several)
    assert is_measured(cfg, build_engine(composed("replay", "policy=greedy_stop"))[1]) == (key == "true")
    assert not is_measured(OmegaConf.create({"trace": "small"}), FIXED)  # a real engine


def test_measuring_changes_no_record() -> None:
    cfg = composed("replay", "max_rate=true")
    outcome, (engine, policy) = replay_case(cfg), build_engine(cfg)
    replay_with(cfg, build_trace(cfg), engine, policy)
    assert np.array_equal(outcome.records.finish_s, engine.records().finish_s, equal_nan=True)
    assert outcome.summary["utilization"] == outcome.summary["request_rate_rps"] / outcome.summary["max_rate_rps"]


@pytest.mark.parametrize(("command", "run"), [
    ("cluster", cluster_command.run_figures), ("disaggregate", disaggregate_command.run_figures),
])  # fmt: skip
def test_several_replicas_have_a_maximum_rate_as_well(command: str, run: Any) -> None:
    assert run(composed(command))["max_rate_rps"] is None
    two = run(composed(command, "max_rate=true", "trace.rate_rps=30"))
    assert two["utilization"] == two["request_rate_rps"] / two["max_rate_rps"]


def test_two_replicas_finish_more_than_one() -> None:
    one, two = (
        cluster_command.run_figures(
            composed("cluster", f"replicas.main.count={count}", "max_rate=true", "trace.duration_s=60")
        )
        for count in (1, 2)
    )
    assert 1.2 < two["max_rate_rps"] / one["max_rate_rps"] <= 2.1


def test_a_table_has_the_rate_if_it_was_measured() -> None:
    cfg = next(iter(variants(composed("compare", "max_rate=true", "only=[dense]")).values()))
    summary = replay_case(cfg).summary
    assert {"maximum rate (req/s)", "utilization"} <= set(columns_of({"dense": [summary]}))
    assert "utilization" not in columns_of({"dense": [summary | {"max_rate_rps": None, "utilization": None}]})


@pytest.mark.parametrize(("utilization", "warns"), [(None, False), (0.899, False), (0.9, True), (1.2, True)])
def test_from_90_percent_of_the_maximum_rate_on_a_run_warns(
    utilization: float | None, warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"utilization": utilization, "request_rate_rps": 9.0, "max_rate_rps": 10.0}]
    warn_if_near_maximum(rows)
    said = capsys.readouterr().err
    assert bool(said) == warns
    assert not warns or ("maximum rate" in said and "compare max_rate_rps, not TTFT" in said)


def test_a_summary_shows_the_rate_only_if_it_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    summary = replay_case(composed("replay", "max_rate=true")).summary
    print_summary(summary, "measured")
    print_summary({**summary, "max_rate_rps": None, "utilization": None}, "not measured")
    measured, _, not_measured = capsys.readouterr().out.partition("not measured")
    assert "max_rate_rps " in measured
    assert "utilization" in measured
    assert "utilization" not in not_measured
