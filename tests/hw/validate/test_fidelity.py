"""The simulator against a real vLLM run."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hw.validate.fidelity import CALIBRATION, RUN, compare, counts, fit_fixed_s, missed, page, read_run, simulate
from sim.cost.latency import load_calibration
from sim.errors import CalibrationError
from sim.paths import RESULTS, find_data
from sim.results.records import Status
from tests.sim.pages.test_render import cells


def test_the_committed_comparison_meets_its_targets_and_the_code_reproduces_it(data: Path) -> None:
    committed = json.loads((RESULTS / "fidelity" / "fidelity.json").read_text())
    run = read_run(find_data(RUN))
    engine = simulate(
        run, load_calibration(CALIBRATION).with_fixed(committed["fixed_s"], "docs/results/fidelity/fidelity.json")
    )
    records = engine.records()
    assert np.all(records.status == Status.FINISHED)
    errors = compare(run, records)
    assert missed(errors) == []
    found = counts(run, records, len(engine.iterations()))
    assert found.pop("first_ttft_s") == pytest.approx(committed["counts"].pop("first_ttft_s"))
    assert found == committed["counts"]
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        for statistic in ("mean", "p50", "p95", "p99"):
            assert errors[name][statistic]["error"] == pytest.approx(
                committed["errors"][name][statistic]["error"], abs=1e-6
            )


def test_the_committed_page_is_what_the_committed_figures_give() -> None:
    content = json.loads((RESULTS / "fidelity" / "fidelity.json").read_text(encoding="utf-8"))
    text = (RESULTS / "fidelity" / "index.md").read_text(encoding="utf-8")
    assert page(content) == text
    row = next(row for row in cells(text) if row[0] == "TTFT")
    assert row[2:6] == [
        f"{100 * content['errors']['ttft_s'][s]['error']:+.1f} %" for s in ("mean", "p50", "p95", "p99")
    ]
    content["errors"]["tpot_s"]["p95"]["error"] = 0.2
    assert missed(content["errors"]) != []
    assert page(content) != text


def test_the_overhead_is_fitted_on_requests_that_finished_in_the_first_minute_only(data: Path) -> None:
    """What happens later cannot change the fit."""
    run = read_run(find_data(RUN))
    latency = load_calibration(CALIBRATION)
    later = run.finish_s > 60.0
    assert 0 < later.sum() < len(later)
    moved = np.where(later, run.finish_s * 3.0, run.finish_s)
    changed = replace(run, finish_s=moved)
    steps = (0.0, 5e-4, 2e-3)
    assert fit_fixed_s(run, latency, steps_s=steps) == fit_fixed_s(changed, latency, steps_s=steps)


def test_a_folder_without_a_run_is_an_error_that_says_where_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="RAP_LAB_DATA"):
        read_run(tmp_path)


def test_the_clocks_are_aligned_at_the_request_that_reached_the_queue_fastest(tmp_path: Path) -> None:
    rows = [
        {"arrival_time": 100.0 + i, "queued_ts": 5.0 + i + lag, "first_token_ts": 6.0 + i + lag}
        | {"last_token_ts": 8.0 + i + lag, "input_toks": 10, "output_toks": 3}
        for i, lag in enumerate((0.4, 0.1, 0.2))
    ]
    with gzip.open(tmp_path / "requests.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    scheduler = {"long_prefill_token_threshold": 0, "scheduler_reserve_full_isl": True}
    meta = {
        "engine_kwargs": {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 128},
        "kv_cache": {"block_size": 16, "num_gpu_blocks": 9, "enable_prefix_caching": False},
        "resolved_config": {"scheduler_config": scheduler},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    run = read_run(tmp_path)
    assert run.ttft_s == pytest.approx([1.3, 1.0, 1.1]), "a second to compute, and what the client lost on the way"
    assert run.kv_blocks == 8
