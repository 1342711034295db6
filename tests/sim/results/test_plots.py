"""Figures of runs: what they show, read from the figure itself."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sim.engine.sim_engine import SimEngine
from sim.results import plots
from sim.results.metrics import Slo
from sim.results.plots import (
    Line,
    ReplicaLine,
    most_per_bin,
    plot_comparison,
    plot_replay,
    plot_replicas,
    under_way,
    worst_per_bin,
)
from tests.sim.serving import requests, tiny_engine

MOVING = ((0.0, 2 * 10**9), (3.0, 10**9))


def served(*rows: tuple[float, int, int]) -> SimEngine:
    engine = tiny_engine(kv_blocks=5)
    engine.submit(requests(*rows))
    engine.run_until(math.inf)
    return engine


def legends_over_data(figure: Any) -> list[str]:
    """Return the text of every legend that overlaps a panel."""
    figure.canvas.draw()
    panels = [axis.get_window_extent() for axis in figure.axes]
    found = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
    return [
        text.get_text()
        for legend in found
        if any(legend.get_window_extent().shrunk(0.98, 0.9).overlaps(panel) for panel in panels)
        for text in legend.get_texts()
    ]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that collects every figure as it is written."""
    seen: list[Any] = []
    original = plots.figure_file

    def watching(*args: Any, **kwargs: Any) -> Any:
        class Watched:
            def __enter__(self) -> Any:
                self.inner = original(*args, **kwargs)
                made = self.inner.__enter__()
                seen.append(made[0])
                return made

            def __exit__(self, *error: Any) -> Any:
                return self.inner.__exit__(*error)

        return Watched()

    monkeypatch.setattr(plots, "figure_file", watching)
    return seen


def test_a_replay_labels_the_slo_draws_a_moving_budget_and_keeps_legends_off_the_data(
    tmp_path: Path, figures: list[Any]
) -> None:
    engine = served((0.0, 8, 4), (1.0, 8, 4), (2.0, 3000, 1))  # the last is rejected
    arguments = (engine.records(), engine.iterations(), Slo(ttft_s=2.0), "three requests")
    plot_replay(tmp_path / "constant.png", *arguments, budget=MOVING[:1])
    plot_replay(tmp_path / "moving.png", *arguments, budget=MOVING)
    constant, moving = figures
    assert [len(figure.axes) for figure in figures] == [4, 5]
    assert {"SLO: 2 s", "rejected"} <= set(constant.axes[3].get_legend_handles_labels()[1])
    assert moving.axes[4].get_ylabel() == "budget [GB]"
    assert moving.axes[4].lines[0].get_ydata()[:2].tolist() == [2.0, 1.0]
    assert [legends_over_data(figure) for figure in figures] == [[], []]
    with Image.open(tmp_path / "moving.png") as image:
        assert image.format == "PNG"


def test_a_comparison_has_a_color_and_dash_of_its_own_for_each_of_many_policies(
    tmp_path: Path, figures: list[Any]
) -> None:
    engine = served((0.0, 8, 4), (1.0, 8, 4))
    line = Line(engine.records(), engine.iterations(), [(0.0, 1.0), (2.0, 0.5)])
    plot_comparison(tmp_path / "many.png", {f"policy_{n}": line for n in range(15)}, Slo(ttft_s=2.0), "many", [MOVING])
    (figure,) = figures
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.axes[1].lines}
    assert len(styles) == 15
    assert len(figure.axes) == 4
    assert legends_over_data(figure) == []


def test_a_comparison_shows_every_budget_that_moves_and_how_low_each_gets(tmp_path: Path, figures: list[Any]) -> None:
    engine = served((0.0, 8, 4), (1.0, 8, 4), (9.0, 8, 4))
    line = Line(engine.records(), engine.iterations(), [(0.0, 1.0)])
    tighter = ((0.0, 2 * 10**9), (3.0, 5 * 10**8))
    budgets = [MOVING, ((0.0, 10**9),), tighter]
    plot_comparison(tmp_path / "two.png", {"a": line, "b": line, "c": line}, Slo(ttft_s=2.0), "two", budgets)
    (figure,) = figures
    assert [drawn.get_ydata()[1] for drawn in figure.axes[3].lines] == [1.0, 0.5]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"budget, lowest 1.0 GB", "budget, lowest 0.5 GB"} <= set(shown)
    assert legends_over_data(figure) == []


def test_a_run_that_served_nothing_still_gets_its_figures(tmp_path: Path) -> None:
    engine = served()
    plot_replay(tmp_path / "replay.png", engine.records(), engine.iterations(), Slo(ttft_s=2.0), "none")
    line = Line(engine.records(), engine.iterations(), [(0.0, 1.0)])
    plot_comparison(tmp_path / "compare.png", {"dense": line}, Slo(), "none")
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_a_figure_that_cannot_be_drawn_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), plots.figure_file(tmp_path / "broken.png", size=(2, 2)):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_a_first_figure_says_nothing_of_the_fonts_it_looks_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with plots.figure_file(tmp_path / "first.png", size=(2, 2)):
        logging.getLogger("matplotlib.font_manager").info("generated new fontManager")
    assert caplog.messages == []


def test_the_figure_shows_the_worst_value_of_each_bin_and_none_where_there_is_none() -> None:
    starts_s, worst = worst_per_bin(np.array([0.5, 3.0, 0.1, 9.9]), np.array([1, 5, 2, 4]), 2.0)
    assert (starts_s.tolist(), worst.tolist()) == ([0.0, 2.0, 8.0], [2.0, 5.0, 4.0])
    assert all(len(column) == 0 for column in worst_per_bin(np.empty(0), np.empty(0), 2.0))


def test_a_replica_without_iterations_in_a_bin_has_no_requests_there() -> None:
    starts_s, most = most_per_bin(np.array([0.5, 1.0, 7.0]), np.array([3, 5, 2]), 2.0)
    assert (starts_s.tolist(), most.tolist()) == ([0.0, 2.0, 4.0, 6.0, 8.0], [5.0, 0.0, 0.0, 2.0, 0.0])
    assert all(len(column) == 0 for column in most_per_bin(np.empty(0), np.empty(0), 2.0))


def test_spans_under_way_are_counted_between_their_ends() -> None:
    spans_s = np.array([[0.0, 2.0], [1.0, 3.0], [2.5, 2.5], [2.0, math.nan]])
    times_s, number = under_way(spans_s)
    assert (times_s.tolist(), number.tolist()) == ([0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 1.0, 0.0])


def test_the_figure_of_replicas_shades_when_one_is_away_and_counts_transfers(
    tmp_path: Path, figures: list[Any]
) -> None:
    engine = served((0.0, 8, 4), (1.0, 8, 4))
    replicas = {
        "a": ReplicaLine(engine.iterations(), [(2.0, math.inf)]),
        "b": ReplicaLine(served().iterations()),
    }
    arguments = (engine.records(), replicas, Slo(ttft_s=2.0), "two replicas")
    plot_replicas(tmp_path / "cluster.png", *arguments)
    plot_replicas(tmp_path / "disaggregate.png", *arguments, [(np.array([[0.0, 3.0]]), "under way")])
    assert [len(figure.axes) for figure in figures] == [3, 4]
    assert len(figures[0].axes[0].patches) == 1
    assert figures[1].axes[3].lines[0].get_ydata().max() == 1.0
    assert [legends_over_data(figure) for figure in figures] == [[], []]
