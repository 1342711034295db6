"""Known numbers are found again, and a fit that predicts nothing is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hw.fit.fitting import Case, fit_and_judge
from hw.fit.parameters import PRIORS, Point, check_free, far_values, point_of, priced, server_at
from hw.fit.server import simulate
from sim.errors import ConfigError
from tests.hw.fit.truth import a_server, requests, served

TRUTHS = (
    (8.0, 600.0, {"front_s": 0.009, "memory_bound": 1.08}),
    (5.0, 600.0, {"front_s": 0.002, "memory_bound": 1.20}),
    (8.0, 1500.0, {"front_s": 0.009, "memory_bound": 1.08, "compute_bound": 1.3}),
    (8.0, 1500.0, {"front_s": 0.004, "memory_bound": 0.93, "compute_bound": 1.2}),
)


@pytest.mark.parametrize(("rate", "prompt", "values"), TRUTHS)
def test_known_numbers_are_found_again_within_their_ranges(
    rate: float, prompt: float, values: dict[str, float]
) -> None:
    server = a_server(schedules_ahead=True)
    run = served(server, requests(rate_rps=rate, prompt=prompt), **values)
    fitted = fit_and_judge([Case(run=run, server=server)], list(values))
    assert fitted.accepted
    for name, true in values.items():
        low, high = fitted.ranges[name]
        slack = 0.1 * PRIORS[name].deviation  # of the range itself, which has a noise
        assert low - slack <= true <= high + slack, (name, fitted.point[name], low, high)
    assert fitted.point["memory_bound"] == pytest.approx(values["memory_bound"], rel=0.02)


def test_a_fit_to_a_low_load_predicts_a_higher_one() -> None:
    """What the fit is for: ITL and E2E within 2 %, TTFT within 6 % at rates that it has not seen."""
    server, values = a_server(schedules_ahead=True), {"front_s": 0.007, "memory_bound": 1.12}
    fitted = fit_and_judge([Case(run=served(server, requests(rate_rps=4.0), **values), server=server)], list(values))
    other = requests(rate_rps=12.0, seed=7)
    real = served(server, other, noise=0.0, **values)
    done = simulate(server_at(server, fitted.point), other)
    for name, near in (("tpot_s", 0.02), ("e2e_s", 0.02), ("ttft_s", 0.06)):
        assert np.mean(getattr(done, name)) == pytest.approx(np.mean(getattr(real, name)), rel=near)


def test_a_fit_that_does_not_beat_nothing_on_the_last_third_is_refused() -> None:
    """The server of the last third is the described one, and the first two thirds were slow for another reason."""
    server = a_server(schedules_ahead=True)
    wanted = requests(rate_rps=2.0)
    slow, right = (served(server, wanted, memory_bound=factor, front_s=0.006) for factor in (1.3, 1.0))
    case = Case(run=right, server=server)
    mixed = np.arange(len(right)) < case.cut
    run = Case(
        run=type(right)(
            **{
                name: getattr(right, name)
                for name in ("arrival_s", "prompt_tokens", "produced_tokens", "name", "source", "kind")
            },
            first_token_s=np.where(mixed, slow.first_token_s, right.first_token_s),
            finish_s=np.where(mixed, slow.finish_s, right.finish_s),
        ),
        server=server,
    )
    fitted = fit_and_judge([run], ["front_s", "memory_bound"])
    assert fitted.point["memory_bound"] > 1.1
    assert not fitted.accepted


@pytest.mark.parametrize("name", ["fixed_s", "host_floor_s"])
def test_two_rates_tell_an_overhead_and_one_does_not(name: str) -> None:
    check_free([name], [2.0, 8.0], engine_side=False)
    with pytest.raises(ConfigError, match=f"{name}, but one load .* two rates"):
        check_free(["memory_bound", name], [8.0, 9.0], engine_side=False)


def two_rates(values: dict[str, float], slow_rps: float, fast_rps: float) -> list[Case]:
    """Return runs of a server at two rates."""
    server = a_server()
    wanted = (requests(count=count, rate_rps=rate) for count, rate in ((80, slow_rps), (200, fast_rps)))
    return [Case(run=served(server, one, **values), server=server) for one in wanted]


@pytest.mark.parametrize(
    ("floor_s", "slow_rps", "fast_rps"), [(0.012, 1.0, 12.0), (0.025, 1.0, 12.0), (0.5, 0.02, 0.06)]
)
def test_the_least_time_of_an_iteration_is_found_again(floor_s: float, slow_rps: float, fast_rps: float) -> None:
    """Iterations of the described server take about 7 ms at the low rate."""
    values = {"memory_bound": 1.1, "host_floor_s": floor_s}
    fitted = fit_and_judge(two_rates(values, slow_rps, fast_rps), list(values))
    assert fitted.accepted
    assert fitted.point["host_floor_s"] == pytest.approx(floor_s, rel=0.02)
    low, high = fitted.ranges["host_floor_s"]
    assert 0.99 * low <= floor_s <= 1.01 * high


@pytest.mark.parametrize("others", [["memory_bound"], []])
def test_a_server_without_a_least_time_of_an_iteration_gets_none(others: list[str]) -> None:
    true = dict.fromkeys(others, 1.1)
    cases = two_rates(true, 1.0, 12.0)
    fitted = fit_and_judge(cases, [*others, "host_floor_s"])
    assert fitted.accepted == bool(others)
    assert {name: fitted.point[name] for name in others} == pytest.approx(true, rel=0.03)
    assert fitted.point["host_floor_s"] == 0.0
    assert fitted.ranges["host_floor_s"][0] == 0.0
    assert 0.005 < fitted.ranges["host_floor_s"][1] < 0.010  # no gap says what lies below
    assert any(
        one == "host_floor_s is 0: these runs show no least time of an iteration" for one in far_values(fitted.point)
    )
    assert priced(cases[0].server.spec.priced(), fitted.point).host_floor_s == 0.0


def test_a_least_time_that_the_description_states_is_kept() -> None:
    values = {"memory_bound": 1.0, "host_floor_s": 0.2}
    cases = two_rates(values, 0.05, 0.15)
    server = cases[0].server.with_latency(cases[0].server.spec.priced().with_host_floor(0.2))
    fitted = fit_and_judge([replace(case, server=server) for case in cases], list(values))
    assert fitted.point["host_floor_s"] == pytest.approx(0.2, rel=0.01)
    assert fitted.fitted < 1.5 * fitted.nothing


@pytest.mark.parametrize(
    ("free", "engine_side", "says"),
    [(["memory"], False, "did you mean 'memory_bound'"), (["front_s", "front_s"], False, "twice"),
     (["front_s"], True, "front end")],
)  # fmt: skip
def test_numbers_that_cannot_be_fitted_are_named(free: list[str], engine_side: bool, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_free(free, [1.0], engine_side)


def test_a_factor_far_from_1_is_a_message_about_the_description() -> None:
    assert far_values(Point(values={"memory_bound": 1.1, "compute_bound": 1.44, "front_s": 0.012})) == []
    (said,) = far_values(Point(values={"memory_bound": 1.6, "front_s": 0.006}))
    assert "memory_bound is 1.600" in said
    assert "gpu=" in said
    (said,) = far_values(Point(values={"compute_bound": 0.4}))
    assert "engine.prefix_caching" in said


def test_points_stay_within_their_bounds() -> None:
    point = point_of(["front_s", "memory_bound"], np.array([-9.0, 99.0]))
    assert point["front_s"] == 0.0
    assert point["memory_bound"] == PRIORS["memory_bound"].most


def test_requests_before_the_warm_up_and_the_last_third_are_not_fitted() -> None:
    server = a_server()
    case = Case(run=served(server, requests(count=100)), server=server, first=10)
    assert case.fitted[[0, -1]].tolist() == [10, 69]
    assert case.held_out[[0, -1]].tolist() == [70, 99]
