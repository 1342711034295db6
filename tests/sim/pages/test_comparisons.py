"""The pages of sim show what the files next to them hold."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

import sim.compare  # noqa: F401, which registers its schema
from sim.config import check_overrides
from sim.errors import ConfigError
from sim.pages import clusters, simulation
from sim.pages.comparison import Comparison, ResultsConfig, means, replay, wins, write_page
from sim.results.report import SUMMARY_COLUMNS
from tests.sim.pages.test_render import cells

PAGES = [simulation, clusters]


@pytest.mark.parametrize("module", PAGES)
def test_the_committed_page_is_the_one_that_its_files_make(module: ModuleType) -> None:
    assert (module.FOLDER / "index.md").read_text(encoding="utf-8") == module.page()


@pytest.mark.parametrize("module", PAGES)
def test_every_result_states_the_command_that_makes_it_today(module: ModuleType) -> None:
    for name, comparison in module.COMPARISONS.items():
        content = json.loads((module.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        assert content["provenance"]["command"] == f"python -m {comparison.command}"
        assert len({len(row) for row in content["summaries"].values()} | {len(content["cases"])}) == 1
        program, *overrides = comparison.command.split()
        check_overrides(overrides, program.removeprefix("sim."))


@pytest.mark.parametrize("module", PAGES)
def test_no_result_lost_a_request(module: ModuleType) -> None:
    for name in module.COMPARISONS:
        content = json.loads((module.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        for row in content["summaries"].values():
            for summary in row:
                ended = summary["finished"] + summary["rejected"] + summary["unfinished"]
                assert summary["requests"] == ended > 0


@pytest.mark.parametrize("module", PAGES)
def test_tables_hold_the_means_and_standard_deviations_of_the_files(module: ModuleType) -> None:
    found = cells(module.page())
    for name in module.COMPARISONS:
        content = json.loads((module.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        if len(content["cases"]) == 1:
            continue
        for label, row in content["summaries"].items():
            seconds = [summary["ttft_s"]["p95"] for summary in row]
            shown = f"{statistics.fmean(seconds):,.2f} ± {statistics.stdev(seconds):,.2f}"
            assert any(line[0] == label and shown in line for line in found), (name, label)


def test_other_figures_make_another_table_and_a_missing_file_names_its_command(tmp_path: Path) -> None:
    shutil.copytree(simulation.FOLDER, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "kv_hole.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for summary in content["summaries"]["recompute"]:
        summary["slo_attainment"] = 0.123
    path.write_text(json.dumps(content), encoding="utf-8")
    row = next(line for line in cells(simulation.page(tmp_path)) if line[0] == "recompute")
    assert row[1 + list(SUMMARY_COLUMNS).index("SLO attainment")] == "12.3 ± 0.0 %"
    better = sum(summary["slo_attainment"] > 0.123 for summary in content["summaries"]["dense"])
    assert wins(content, "dense", "recompute") == f"{better} of 5"
    assert wins(content, "recompute", "recompute") == "0 of 5"
    assert wins(content, "recompute", "recompute", ties=True) == "5 of 5"
    path.unlink()
    with pytest.raises(ConfigError, match="kv_hole"):
        simulation.page(tmp_path)
    with pytest.raises(ConfigError, match="cluster_scale"):
        clusters.page(tmp_path)


def test_a_claim_within_two_percent_is_no_difference() -> None:
    assert [clusters.verdict(ours, 1.0) for ours in (0.9, 0.99, 1.01, 1.1)] == [
        "yes",
        "no difference",
        "no difference",
        "no",
    ]


def test_two_upper_bounds_of_quality_do_not_say_which_plan_loses_more() -> None:
    content = json.loads((clusters.FOLDER / "pdtrim_transfer.json").read_text(encoding="utf-8"))
    rows = means(content)
    nested, single, kv = rows["PDTrim blocks, bytes"], rows["unified, bytes"], rows["PDTrim KV, bytes"]
    nested |= {"perplexity_ratio": 14.0, "quality_outside_share": 1.0}
    single |= {"perplexity_ratio": 20.0, "quality_outside_share": 1.0}
    kv |= {"perplexity_ratio": 1.5, "quality_outside_share": 0.0}
    claims = clusters.pdtrim_claims(rows)
    assert claims["nested_costs_less"] == "unknown"
    assert claims["kv_costs_less"] == "yes"
    single["quality_outside_share"] = 0.0
    assert clusters.pdtrim_claims(rows)["nested_costs_less"] == "yes"


def test_a_page_command_replays_the_chosen_results_and_refuses_an_unknown_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in simulation.COMPARISONS:
        shutil.copy(simulation.FOLDER / f"{name}.json", tmp_path)

    def replay(name: str, _: Comparison, workers: int, folder: Path) -> None:
        assert workers == 3
        (folder / f"{name}.json").write_text(f"made {name}", encoding="utf-8")

    monkeypatch.setattr("sim.pages.comparison.replay", replay)
    cfg = OmegaConf.structured(ResultsConfig(measure=True, only=["kv_hole"], workers=3))
    write_page(cfg, simulation.COMPARISONS, tmp_path, lambda: "the page")
    assert (tmp_path / "kv_hole.json").read_text(encoding="utf-8") == "made kv_hole"
    assert (tmp_path / "index.md").read_text(encoding="utf-8") == "the page"
    assert (tmp_path / "moving_budget.json").read_bytes() == (simulation.FOLDER / "moving_budget.json").read_bytes()
    cfg.only = ["kv_hall"]
    with pytest.raises(ConfigError, match="kv_hole"):
        write_page(cfg, simulation.COMPARISONS, tmp_path, lambda: "the page")


def test_a_comparison_that_fails_is_one_line_with_the_error_of_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "compiling the engine\nwarning: prices are extrapolated\nerror: tick_s is -1\n"

    def fails(*_: Any, env: dict[str, str], **__: Any) -> subprocess.CompletedProcess[str]:
        assert env["RAP_LAB_PROGRESS"] == "0"
        return subprocess.CompletedProcess([], 2, "", said)

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(ConfigError) as caught:
        replay("kv_hole", Comparison(command="sim.compare"), 1, tmp_path)
    assert str(caught.value) == "python -m sim.compare failed: error: tick_s is -1"
    assert list(tmp_path.iterdir()) == []
