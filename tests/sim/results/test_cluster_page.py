"""sim/CLUSTER.md is what the files of sim/results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sim.config import check_overrides
from sim.errors import ConfigError
from sim.results.cluster_page import PAGE, RESULTS, RUNS, page


def test_the_page_is_the_one_that_its_files_make() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_result_states_the_command_that_makes_it_today() -> None:
    for name, (words, _) in RUNS.items():
        content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        assert content["provenance"]["command"] == f"python -m {words}"
        assert len({len(row) for row in content["summaries"].values()} | {len(content["cases"])}) == 1
        module, *overrides = words.split()
        check_overrides(overrides, module.removeprefix("sim."))


def test_no_result_lost_a_request() -> None:
    for name in RUNS:
        for row in json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["summaries"].values():
            for summary in row:
                assert summary["requests"] == summary["finished"] + summary["rejected"] + summary["unfinished"] > 0


def test_a_missing_file_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cluster_scale"):
        page(tmp_path)
