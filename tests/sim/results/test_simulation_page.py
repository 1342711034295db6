"""sim/RESULTS.md is what the files of sim/results say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import sim.compare  # noqa: F401, which registers its schema
from sim.config import check_overrides
from sim.errors import ConfigError
from sim.results.simulation_page import PAGE, RESULTS, RUNS, page


def test_the_page_is_the_one_that_its_files_make() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_result_states_the_command_that_makes_it_today() -> None:
    for name, words in RUNS.items():
        content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        assert content["provenance"]["command"] == f"python -m sim.compare {words}"
        assert len({len(row) for row in content["summaries"].values()} | {len(content["cases"])}) == 1
        check_overrides(words.split(), "compare")


def test_no_result_lost_a_request() -> None:
    for name in RUNS:
        for row in json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["summaries"].values():
            for summary in row:
                ended = summary["finished"] + summary["rejected"] + summary["unfinished"]
                assert summary["requests"] == ended > 0


def test_other_figures_make_another_page_and_a_missing_file_names_its_command(tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path / "results")
    path = tmp_path / "results" / "kv_hole.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for summary in content["summaries"]["recompute"]:
        summary["slo_attainment"] = 0.123
    path.write_text(json.dumps(content), encoding="utf-8")
    assert "attains 12.3 %" in page(tmp_path / "results")
    path.unlink()
    with pytest.raises(ConfigError, match="kv_hole"):
        page(tmp_path / "results")
