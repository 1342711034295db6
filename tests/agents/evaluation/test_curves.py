"""Training curves of an evaluation: which rows are written, and what the figure of serving draws of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from agents.evaluation.measure import write_curves
from agents.evaluation.serve_report import _plot_above, against
from agents.evaluation.tables import plot_by_source, plot_training


def progress(folder: Path, name: str, seeds: int, utility: float) -> str:
    for seed in range(seeds):
        path = folder / name / f"seed_{seed}" / "progress.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        steps = [1000 * (seed + 1), 2000 * (seed + 1)]
        pd.DataFrame({"env_steps": steps, "validation_utility": [utility, utility + 0.1]}).to_csv(path, index=False)
    return str(folder / name / "seed_*" / "progress.csv")


def drawn(axes: Any) -> list[tuple[list[float], list[float]]]:
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in axes.get_lines()]


def test_only_replaces_the_curves_of_the_policies_that_it_names(tmp_path: Path) -> None:
    path = tmp_path / "serve_training.parquet"
    globs = {name: progress(tmp_path, name, 2, utility) for name, utility in (("ours", 0.1), ("mine", 0.2))}
    write_curves(OmegaConf.create({"only": []}), path, OmegaConf.create(globs))
    before = pd.read_parquet(path)
    assert list(before["policy"]) == ["ours"] * 4 + ["mine"] * 4
    progress(tmp_path, "ours", 2, 0.7)  # changed too, but not asked for
    progress(tmp_path, "mine", 1, 0.9)
    (tmp_path / "mine" / "seed_1" / "progress.csv").unlink()
    write_curves(OmegaConf.create({"only": ["mine"]}), path, OmegaConf.create(globs))
    after = pd.read_parquet(path)
    pd.testing.assert_frame_equal(after[after["policy"] == "ours"], before[before["policy"] == "ours"])
    assert after[after["policy"] == "mine"]["validation_utility"].tolist() == [0.9, 1.0]


def test_only_without_curves_of_its_own_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "training.parquet"
    globs = {"ours": progress(tmp_path, "ours", 1, 0.1)}
    write_curves(OmegaConf.create({"only": []}), path, OmegaConf.create(globs))
    before = path.read_bytes()
    write_curves(OmegaConf.create({"only": ["dense"]}), path, OmegaConf.create(globs))
    assert path.read_bytes() == before


@pytest.fixture
def played() -> pd.DataFrame:
    """Return utilities of three policies on eight windows of two traces."""
    generator = np.random.default_rng(3)
    rows = [
        {"source": source, "scenario": "mid/none", "policy": policy, "seed": 0, "window": window, "block": window}
        | {"utility": round(base + generator.uniform(0.0, 0.1), 3)}
        for source, first in (("azure", 0), ("burst", 4))
        for window in range(first, first + 4)
        for policy, base in (("ours", 0.6), ("dense", 0.3), ("load_table", 0.5))
    ]
    return pd.DataFrame(rows)


def test_the_figure_draws_the_mean_utility_of_every_policy_by_trace(played: pd.DataFrame) -> None:
    names = ["ours", "load_table", "dense"]
    figure, axes = plt.subplots()
    plot_by_source(axes, played, names)
    means = played.groupby(["source", "policy"])["utility"].mean()
    expected = [([means[source, name] for name in names], [0, 1, 2]) for source in ("azure", "burst")]
    for (x, y), (want_x, want_y) in zip(drawn(axes), expected, strict=True):
        assert x == pytest.approx(want_x)
        assert y == want_y
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    plt.close(figure)


def test_the_figure_draws_how_far_ours_is_above_each_other_policy_with_its_interval(played: pd.DataFrame) -> None:
    names = ["ours", "load_table", "dense"]
    figure, axes = plt.subplots()
    _plot_above(axes, played, names, "ours")
    bars = axes.containers
    assert len(bars) == 2
    for bar, (row, name) in zip(bars, ((1, "load_table"), (2, "dense")), strict=True):
        found = against(played, "ours", name)
        points, _, (reach,) = bar.lines
        assert points.get_xdata()[0] == pytest.approx(found.mean)
        assert points.get_ydata()[0] == row
        assert reach.get_segments()[0][:, 0] == pytest.approx([found.low, found.high])
        both = played.pivot_table(index="window", columns="policy", values="utility")
        assert found.low <= (both["ours"] - both[name]).mean() <= found.high
    plt.close(figure)


def test_the_figure_draws_one_line_for_each_seed_of_a_training(tmp_path: Path) -> None:
    path = tmp_path / "training.parquet"
    globs = {"ours": progress(tmp_path, "ours", 2, 0.4), "mine": progress(tmp_path, "mine", 1, 0.2)}
    write_curves(OmegaConf.create({"only": []}), path, OmegaConf.create(globs))
    figure, axes = plt.subplots()
    plot_training(axes, pd.read_parquet(path))
    assert drawn(axes) == [([1.0, 2.0], [0.4, 0.5]), ([2.0, 4.0], [0.4, 0.5]), ([1.0, 2.0], [0.2, 0.30000000000000004])]
    plt.close(figure)
