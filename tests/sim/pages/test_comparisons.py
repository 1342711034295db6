"""The pages of sim show what the files next to them hold."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import OmegaConf

import sim.compare  # noqa: F401, which registers its schema
from sim.config import check_overrides
from sim.errors import ConfigError
from sim.pages import clusters, simulation
from sim.pages.comparison import Comparison, ResultsConfig, measure, wins, write_page
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


def test_a_comparison_that_fails_says_so_after_its_own_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"python -m sim\.compare polcy=1 failed, status 2; the lines above say why"):
        measure(["wrong"], {"wrong": Comparison(command="sim.compare polcy=1")}, tmp_path, 1)
    said = capfd.readouterr().err
    assert said.startswith("measuring: 0 of 1 comparisons, 0 s; next: wrong\n")
    assert "error: there is no key 'polcy'" in said
