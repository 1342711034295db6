"""Verdicts on made-up runs, and the suite's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the suite needs the real engine: pip install -e '.[hw]'")

import hw.compare
from hw.compare import compare, read_run
from hw.validate import WORKLOADS, Arguments, configuration, page, policies, ranking, slower
from sim.command import build_parts, build_trace
from sim.errors import ConfigError
from sim.latency import CALIBRATIONS, calibration_from_dict
from sim.metrics import Slo, records_frame, summarise, transitions_frame
from sim.model import load_model
from sim.plan import dense_plan
from sim.records import Iterations, Records, TokenGaps, Transitions
from sim.runs import write_json, write_parquet


def run_folder(
    folder: Path, *, slower: float = 1.0, changes: int = 0, exact: bool = True, requests: int = 40, seed: int = 0
) -> Path:
    """Write a run whose latencies are ``slower`` times those of a plain one."""
    rng = np.random.default_rng(seed)
    arrival_s = np.sort(rng.random(requests)) * 20
    first_s = arrival_s + slower * (0.2 + 0.1 * np.arange(requests) / requests)
    finish_s = first_s + slower * 1.5
    whole = np.full(requests, 10, dtype=np.int64)
    records = Records(
        arrival_s=arrival_s,
        prompt_tokens=whole * 3,
        output_tokens=whole,
        produced_tokens=whole,
        admitted_s=arrival_s + 0.01,
        first_token_s=first_s,
        finish_s=finish_s,
        preemptions=whole * 0,
        status=whole * 0 + 2,
        kept_params_share=np.ones(requests),
        quality_nll=np.full(requests, np.nan),
    )
    one, zero = np.array([finish_s.max()]), np.array([0])
    iterations = Iterations(
        start_s=np.zeros(1),
        end_s=one,
        prefill_tokens=zero,
        decode_requests=zero,
        running=zero,
        waiting=zero,
        kv_used_share=np.zeros(1),
        preemptions=zero,
        extrapolated=np.zeros(1, dtype=np.bool_),
    )
    many = np.zeros(changes, dtype=np.int64)
    transitions = Transitions(
        time_s=np.arange(changes, dtype=np.float64),
        from_plan=("dense",) * changes,
        to_plan=("dense",) * changes,
        bytes_in=many,
        bytes_freed=many,
        ready_s=np.arange(changes, dtype=np.float64),
        preempted=many,
        recomputed_tokens=many,
        kv_blocks_before=many,
        kv_blocks_after=many,
    )
    gaps = TokenGaps(itl_s=np.array([0.1]), count=np.array([9 * requests]))
    folder.mkdir(parents=True)
    write_parquet(folder / "records.parquet", records_frame(records, Slo()))
    write_parquet(folder / "transitions.parquet", transitions_frame(transitions))
    write_json(folder / "summary.json", summarise(records, iterations, gaps, Slo(), transitions=changes))
    write_json(
        folder / "hardware.json",
        {"peak_predicted_bytes": 100, "peak_allocated_bytes": 100, "largest_difference_bytes": 0 if exact else 1},
    )
    return folder


def result_of(tmp_path: Path, sim: dict[str, Any], *real: dict[str, Any]) -> dict[str, Any]:
    folders = [run_folder(tmp_path / str(i), **words) for i, words in enumerate((sim, *real))]
    return compare(read_run(folders[0]), [read_run(folder) for folder in folders[1:]])


def test_equal_runs_have_no_error_and_every_verdict_holds(tmp_path: Path) -> None:
    result = result_of(tmp_path, {}, {})
    assert result["held"]
    assert all(f["error"] == 0 for f in result["figures"].values())
    assert result["requests_one_by_one"]["admission_order_tau"] == pytest.approx(1.0)


def test_an_error_beyond_its_tolerance_is_missed_and_named(tmp_path: Path) -> None:
    result = result_of(tmp_path, {"slower": 1.07}, {})
    verdicts = {name: f["verdict"] for name, f in result["figures"].items()}
    assert verdicts["ttft_s.mean"] == "missed"  # 7 % against 5 %
    assert verdicts["ttft_s.p50"] == "held"  # against 10 %
    assert verdicts["ttft_s.p99"] is None
    assert not result["held"]


def test_plans_that_change_are_given_twelve_percent(tmp_path: Path) -> None:
    assert result_of(tmp_path, {"slower": 1.07, "changes": 2}, {"changes": 2})["held"]


def test_an_error_below_the_noise_of_the_hardware_is_told_apart_from_a_miss(tmp_path: Path) -> None:
    result = result_of(tmp_path, {"slower": 1.2}, {"slower": 0.7}, {"slower": 1.0}, {"slower": 1.3})
    assert result["figures"]["ttft_s.mean"]["verdict"] == "within noise"
    assert result["figures"]["ttft_s.mean"]["noise"] == pytest.approx(0.3, abs=0.01)


def test_bytes_that_are_not_exact_fail_whatever_the_latencies(tmp_path: Path) -> None:
    assert not result_of(tmp_path, {}, {"exact": False})["held"]


def test_runs_of_other_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the same"):
        result_of(tmp_path, {}, {"seed": 1})


def test_the_command_ends_with_its_verdict_and_writes_json_and_picture(tmp_path: Path) -> None:
    sim, good, bad = (run_folder(tmp_path / name, slower=s) for name, s in (("s", 1.0), ("g", 1.01), ("b", 2.0)))
    assert hw.compare.main([str(sim), str(good)]) == 0
    assert hw.compare.main([str(sim), str(bad), f"out={tmp_path / 'out'}"]) == 1
    assert hw.compare.main([str(sim), str(tmp_path / "nothing")]) == 2
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert written["figures"]["makespan_s"]["verdict"] in ("held", "missed")
    assert (good / "compare.png").stat().st_size > 10_000


def test_ranking_counts_only_pairs_beyond_the_noise_and_prices_a_wrong_choice() -> None:
    def cell(simulated: float, real: float) -> dict[str, Any]:
        figure = {"simulated": simulated, "real": real, "noise": 0.05}
        return {"figures": {"ttft_s.mean": figure, "e2e_s.mean": figure}}

    found = ranking({"burst": {"a": cell(1.0, 1.2), "b": cell(1.1, 1.0), "c": cell(3.0, 3.0), "d": cell(3.1, 3.05)}})
    row = found["burst"]["ttft_s.mean"]
    assert row["pairs_beyond_noise"] == 5  # c and d differ by less than their noise
    assert row["agreed"] == 4
    assert row["regret"] == pytest.approx(0.2)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_run_of_the_suite_can_be_built(workload: str) -> None:
    for policy in policies() if workload == "budget_walks" else ["dense"]:
        cfg = configuration(workload, policy, Arguments())
        assert 3 <= len(build_trace(cfg)) <= 60
        parts = build_parts(cfg)
        assert parts.budget.budget_bytes[0] > 0


def test_the_committed_page_is_what_the_committed_results_give() -> None:
    from hw.validate import PAGE, RESULT

    if not RESULT.is_file():
        pytest.skip("the suite has not been run yet: python -m hw.validate")
    content = json.loads(RESULT.read_text(encoding="utf-8"))
    assert page(content) == PAGE.read_text(encoding="utf-8")
    assert len(content["words"]["policies"]) >= 4
    assert len(content["words"]["workloads"]) >= 6


def test_a_slower_calibration_prices_every_iteration_so_much_higher() -> None:
    content = json.loads((CALIBRATIONS / "smollm2_135m_cpu_epyc_1thread.json").read_text(encoding="utf-8"))
    plain, slow = calibration_from_dict(content), calibration_from_dict(slower(content, 1.7))
    plan = dense_plan(load_model("smollm2_135m"))
    for shape in (([], 4, 300, 4), ([(60, 0), (20, 30)], 3, 250, 5), ([(128, 0)], 0, 0, 1)):
        assert slow.iteration_s(plan, *shape) == pytest.approx(1.7 * plain.iteration_s(plan, *shape))
