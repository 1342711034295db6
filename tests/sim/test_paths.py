"""Where commands write results."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.paths import REPOSITORY, results_folder


def test_results_go_to_the_published_folder_or_where_the_user_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out in ("", "docs/results/agents"):
        assert results_folder(out, "docs/results/agents") == REPOSITORY / "docs/results/agents"
    assert results_folder("mine", "docs/results/agents").absolute() == tmp_path / "mine"
    monkeypatch.setattr("sim.paths.CHECKOUT", False)
    assert results_folder("", "docs/results/agents").absolute() == tmp_path / "docs/results/agents"
