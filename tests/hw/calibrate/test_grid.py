"""Which points of a term are measured: a coarse complete grid, then those that say most."""

from __future__ import annotations

import math
from itertools import product

import pytest

from hw.calibrate.grid import ON_CPU, ON_GPU, Grid, Limits, Point, Term, coarse, counts, grid_of, most_informative
from sim.errors import ConfigError


def test_the_grids_of_a_cpu_and_of_a_gpu_reach_their_limits() -> None:
    assert Grid(ON_CPU).tokens == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
    large = Grid(ON_GPU)
    assert (large.tokens[-1], large.sequences[-1]) == (8192, 256)
    assert (256, 8192) in large.decodes
    assert (8192, 8192) in large.prefills


def test_a_limit_that_is_no_power_of_two_is_a_point_itself() -> None:
    assert counts(100)[-3:] == (64, 96, 100)


def test_the_coarse_grid_is_complete_and_reaches_every_edge() -> None:
    points = Grid(ON_GPU).decodes
    chosen = coarse(points)
    rows, columns = ({point[axis] for point in chosen} for axis in (0, 1))
    assert set(chosen) == set(product(rows, columns))
    assert {(1, 8), (1, 8192), (256, 8), (256, 8192)} <= set(chosen)
    assert len(chosen) < len(points) / 6


def test_a_grid_with_a_corner_cut_off_is_measured_up_to_the_cut() -> None:
    points = [point for point in Grid(ON_GPU).decodes if math.prod(point) <= 65_536]
    assert (8, 8192) in coarse([*points, (8, 8192)])
    assert max(context for batch, context in coarse(points) if batch == 256) == 256


def test_points_where_a_curve_bends_come_before_those_of_a_straight_one() -> None:
    """A power law is predicted exactly; a step is not."""

    def straight(point: Point) -> float:
        return 3.0 * point[0] ** 0.7

    def step(point: Point) -> float:
        return 10.0 if point[0] < 200 else 100.0

    functions = {"straight": straight, "step": step}
    terms = {name: Term(name, [(count,) for count in counts(8192)]) for name in functions}
    for name, term in terms.items():
        for point in coarse(term.points):
            term.add(point, functions[name](point))
    asked: list[tuple[str, Point]] = []
    for _ in range(14):
        best = most_informative(terms)
        assert best is not None
        asked.append(best)
        terms[best[0]].add(best[1], functions[best[0]](best[1]))
    of_step = [point[0] for name, point in asked if name == "step"]
    assert len(of_step) >= 10
    assert any(96 <= count <= 384 for count in of_step[:6])
    assert max(map(abs, terms["straight"].surprises.values())) < 1e-9


def test_all_points_are_measured_if_the_time_allows_and_each_once() -> None:
    terms = {"a": Term("a", list(product((1, 2, 4, 8, 16), (0, 32, 64))))}
    terms["a"].add((1, 0), 1.0)
    seen = []
    while (best := most_informative(terms)) is not None:
        seen.append(best[1])
        terms["a"].add(best[1], float(1 + sum(best[1])))
    assert len(seen) == len(set(seen)) == 14
    assert terms["a"].summary()["measured"] == 15


def test_of_two_equal_terms_the_one_that_matters_more_gets_its_points_first() -> None:
    points = [(count,) for count in counts(256)]
    terms = {"much": Term("much", points, 4.0), "little": Term("little", points)}
    for term in terms.values():
        for point in coarse(points):
            term.add(point, float(point[0]))
    asked = []
    for _ in range(4):
        best = most_informative(terms)
        assert best is not None
        asked.append(best[0])
        terms[best[0]].measured[best[1]] = float(best[1][0])
    assert asked.count("much") >= 3


def test_the_positions_of_a_model_end_its_grid_and_a_note_says_so() -> None:
    grid, fitting = grid_of(ON_GPU, 4096, lambda point: math.prod(point) <= 100_000)
    assert max(context for _, context in fitting) == 4095
    assert grid.tokens[-1] == 4096
    assert max(map(sum, grid.prefills)) <= 4096
    assert [word in " ".join(grid.notes) for word in ("4,096 positions", "memory of this device")] == [True, True]
    assert not grid_of(ON_CPU, 8192, lambda _: True)[0].notes


def test_limits_that_leave_no_grid_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"grid.batch is 1; it must be at least 4"):
        Limits(tokens=64, batch=1, context=64)


def test_a_device_without_memory_for_one_context_is_an_error_and_no_empty_table() -> None:
    with pytest.raises(ConfigError, match="no memory left"):
        grid_of(ON_GPU, 4096, lambda _: False)
