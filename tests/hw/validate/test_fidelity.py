"""The simulator against a real vLLM run."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import hw.fidelity
from hw.fit.error_page import error_page
from hw.fit.studies import every_study, judged
from hw.validate.fidelity import (
    CALIBRATION,
    RUN,
    check_calibration,
    compare,
    counts,
    described,
    fit_fixed_s,
    missed,
    page,
    read_run,
    simulate,
)
from sim.cost.latency import load_calibration
from sim.errors import CalibrationError
from sim.paths import RESULTS, find_data
from sim.results.records import Status
from tests.commands import exit_status
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
    figures = json.loads((RESULTS / "fidelity" / "errors.json").read_text(encoding="utf-8"))
    assert error_page(figures, page(content)) == text
    detail = text[text.index("## The simulator against a published run") :]
    row = next(row for row in cells(detail) if row[0] == "TTFT")
    assert row[2:6] == [
        f"{100 * content['errors']['ttft_s'][s]['error']:+.1f} %" for s in ("mean", "p50", "p95", "p99")
    ]
    content["errors"]["tpot_s"]["p95"]["error"] = 0.2
    assert missed(content["errors"]) != []
    assert page(content) not in text


def test_every_run_at_hand_gives_the_committed_errors_again(data: Path) -> None:
    committed = json.loads((RESULTS / "fidelity" / "errors.json").read_text(encoding="utf-8"))
    again = every_study()
    assert len(again["rows"]) == len(committed["rows"])
    for one, other in zip(again["rows"], committed["rows"], strict=True):
        assert (one["study"], one["part"], one["fitted_on"]) == (other["study"], other["part"], other["fitted_on"])
        for name, figures in one["errors"].items():
            for statistic, found in figures.items():
                near = pytest.approx(other["errors"][name][statistic]["error"], abs=0.02)
                assert found["error"] == near, (one["study"], one["part"], name, statistic)


def test_no_figure_of_a_fitted_part_is_judged() -> None:
    rows = json.loads((RESULTS / "fidelity" / "errors.json").read_text(encoding="utf-8"))["rows"]
    for one in judged(rows):
        assert one["part"] != one["fitted_on"]
        assert (one["study"], one["part"]) != ("RTX 4090", "all requests") or one["fitted_on"] == "nothing"


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
    write_run(tmp_path)
    run = read_run(tmp_path)
    assert run.ttft_s == pytest.approx([1.3, 1.0, 1.1]), "a second to compute, and what the client lost on the way"
    assert run.kv_blocks == 8
    assert not run.config.schedules_ahead


def test_a_run_with_asynchronous_scheduling_is_simulated_with_it(tmp_path: Path) -> None:
    scheduler = {"long_prefill_token_threshold": 0, "scheduler_reserve_full_isl": True, "async_scheduling": True}
    run = read_run(write_run(tmp_path, resolved_config={"scheduler_config": scheduler}))
    assert run.config.schedules_ahead
    assert described(run)["schedules_ahead"]


def write_run(folder: Path, **changed: object) -> Path:
    """Write a run of three requests; ``changed`` replaces keys of its meta.json, None removes one."""
    rows = [
        {"arrival_time": 100.0 + i, "queued_ts": 5.0 + i + lag, "first_token_ts": 6.0 + i + lag}
        | {"last_token_ts": 8.0 + i + lag, "input_toks": 10, "output_toks": 3}
        for i, lag in enumerate((0.4, 0.1, 0.2))
    ]
    with gzip.open(folder / "requests.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    scheduler = {"long_prefill_token_threshold": 0, "scheduler_reserve_full_isl": True}
    meta = {
        "engine_kwargs": {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 128},
        "kv_cache": {"block_size": 16, "num_gpu_blocks": 9, "enable_prefix_caching": False},
        "resolved_config": {"scheduler_config": scheduler},
    }
    meta |= {"vllm_version": "0.19.0", **changed}
    (folder / "meta.json").write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kv_cache": None}, "lacks 'kv_cache'"),
        ({"kv_cache": {}}, "lacks 'block_size'"),
        ({"kv_cache": 3}, "wrong type"),
        ({"engine_kwargs": {"max_num_seqs": "many"}}, "lacks 'max_num_batched_tokens'"),
        ({"resolved_config": None}, "lacks 'resolved_config'"),
        ({"hardware": [1]}, "wrong type"),
    ],
)
def test_a_run_that_lacks_a_setting_names_it(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_run(write_run(tmp_path, **changed))


@pytest.mark.parametrize(
    "content", [b"", b"no gzip", gzip.compress(b"[1]\n", mtime=0), gzip.compress(b"[" * 100_000, mtime=0)]
)
def test_requests_that_cannot_be_read_are_one_line(tmp_path: Path, content: bytes) -> None:
    (write_run(tmp_path) / "requests.jsonl.gz").write_bytes(content)
    with pytest.raises(CalibrationError, match=r"requests\.jsonl\.gz"):
        read_run(tmp_path)


def test_prices_of_another_model_or_device_than_the_run_are_refused(tmp_path: Path) -> None:
    latency = load_calibration(CALIBRATION)
    check_calibration(read_run(write_run(tmp_path)), latency)  # a run that states neither
    stated = {"model": "meta-llama/Llama-3.1-8B", "hardware": {"device_name": "NVIDIA GeForce RTX 4090"}}
    check_calibration(read_run(write_run(tmp_path, **stated)), latency)
    for wrong in ({"hardware": {"device_name": "NVIDIA H100 80GB HBM3"}}, {"model": "Qwen/Qwen2-7B"}):
        with pytest.raises(CalibrationError, match="set latency="):
            check_calibration(read_run(write_run(tmp_path, **stated | wrong)), latency)


def test_the_command_describes_the_run_that_it_read_and_repeats_without_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hw.fidelity, "fit_fixed_s", lambda *_: 1e-4)
    folder = tmp_path / "mine"
    folder.mkdir()
    given = [f"run={write_run(folder, model='meta-llama/Llama-3.1-8B')}"]
    assert exit_status(hw.fidelity.main, *given) == 0  # writes to a folder of its own
    (own,) = (tmp_path / "runs").glob("*/*_fidelity")
    text = (own / "index.md").read_text()
    assert "3 requests" in text
    assert "Llama-3.1-8B" in text
    assert "RTX 4090," not in text
    assert "waves" not in text  # what explains the published run's errors is not said of another
    assert exit_status(hw.fidelity.main, *given, "out=same") == 0
    content = json.loads((tmp_path / "same" / "fidelity.json").read_text())
    (tmp_path / "same" / "fidelity.json").write_text(json.dumps(content | {"commit": "an earlier one"}))
    assert exit_status(hw.fidelity.main, *given, "out=same") == 0
    assert json.loads((tmp_path / "same" / "fidelity.json").read_text())["commit"] == "an earlier one"
