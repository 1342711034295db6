"""Settings that would make a run endless or exhaust its memory are refused at once, wherever they come from."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import sim.cluster.run
import sim.disaggregate.run
import sim.replay.__main__
from sim.errors import BudgetError, ConfigError
from sim.limits import check_count, check_ticks
from tests.commands import exit_status

REPLAY, CLUSTER, APART = (
    sim.replay.__main__.main,
    sim.cluster.run.cluster_command,
    sim.disaggregate.run.disaggregate_command,
)
ENDLESS = [
    (REPLAY, "policy=greedy_stop tick_s=1e-12", "tick_s is 1e-12; it must be at least 0.0001 seconds"),
    (REPLAY, "policy=greedy_stop tick_s=1e-4 trace.duration_s=5000 trace.rate_rps=0.1", "decisions until the last"),
    (REPLAY, "budget=random_walk budget.period_s=1e-9", "changes of the budget.*raise budget.period_s"),
    (REPLAY, "budget=cotenant budget.mean_away_s=1e-9 budget.mean_stay_s=1e-9", "changes of the budget"),
    (REPLAY, "workload=repeat_3 workload.steps.0.times=1000000000", "requests.*lower times"),
    (REPLAY, "workload=inject_burst workload.steps.0.start_s=0 workload.steps.0.rate_rps=1e12", "lower rate_rps"),
    (REPLAY, "engine.limits.max_running=1000000000000", "requests at a time.*lower max_running"),
    (REPLAY, "seeds=[0,1] workers=100000", "processes.*lower workers"),
    (CLUSTER, "policy=greedy_stop tick_s=1e-12", "tick_s is 1e-12"),
    (CLUSTER, "replicas.main.count=100000000", "replicas.*lower replicas.main.count"),
    (CLUSTER, "outages=failures outages.mean_up_s=1e-9 outages.mean_away_s=1e-9", "outages of each replica"),
    (CLUSTER, "autoscaler=by_requests autoscaler.period_s=1e-9", "autoscaler.period_s is 1e-09; it must be at least"),
    (APART, "decode_replicas=1000000000", "replicas.*lower prefill_replicas or decode_replicas"),
    (APART, "prefill_replicas=0 decode_replicas=1000000000", "replicas.*lower prefill_replicas or decode_replicas"),
]


@pytest.mark.parametrize(("main", "arguments", "words"), ENDLESS, ids=[f"{m.__module__} {a}" for m, a, _ in ENDLESS])
def test_a_command_refuses_what_would_never_end(
    main: Callable[[], None],
    arguments: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_status(main, "trace=poisson", "trace.duration_s=5", *arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(words, error), error
    assert not list(tmp_path.rglob("*.yaml"))


def test_what_just_fits_is_allowed() -> None:
    check_count(5, "requests", 5, "lower it")
    check_ticks(0.0001, 1000.0)
    with pytest.raises(ConfigError, match=r"^period_s is nan; it must be at least 0.0001 seconds$"):
        check_ticks(float("nan"), 1.0, "period_s")
    with pytest.raises(BudgetError, match=r"^that is 6 requests, more than the limit of 5; lower it$"):
        check_count(6, "requests", 5, "lower it", BudgetError)
