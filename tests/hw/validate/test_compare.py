"""Verdicts on made-up runs, and the overrides of the validation suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("torch", reason="the suite needs the real engine: pip install -e '.[hw]'")

import hw.compare
from hw.calibrate.calibration import slower
from hw.validate.compare import compare, read_run, verdicts
from hw.validate.suite import PAGE, RESULT, WORKLOADS, ValidateConfig, configuration, policies, ranking
from hw.validate.suite_page import events_table, heading, not_held_table, page
from hw.validate.timeline import timeline
from sim.cost.front_end import NO_FRONT_END, FrontEnd
from sim.cost.latency import CALIBRATIONS, calibration_from_dict, load_calibration
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan
from sim.errors import ConfigError
from sim.replay.run import build_parts, build_trace
from sim.results.metrics import Slo, iterations_frame, kept_share_frame, records_frame, summarise, transitions_frame
from sim.results.records import Iterations, Records, TokenGaps, Transitions
from sim.results.run_folder import write_json, write_parquet
from tests.commands import exit_status
from tests.sim.pages.test_render import cells


def run_folder(
    folder: Path,
    *,
    slower: float = 1.0,
    changes: int = 0,
    preempted: int = 0,
    late_s: float = 0.0,
    kept: float = 1.0,
    exact: bool = True,
    requests: int = 40,
    seed: int = 0,
    front: FrontEnd = NO_FRONT_END,
) -> Path:
    """Write a run whose latencies are ``slower`` times those of a plain one, as clients see it through a front end.

    Its plan changes at 0, 1, 2 ... and its preemptions at 4, 5, 6 ... come ``late_s`` later.
    """
    rng = np.random.default_rng(seed)
    arrival_s = np.sort(rng.random(requests)) * 20
    first_s = arrival_s + slower * (0.2 + 0.1 * np.arange(requests) / requests)
    finish_s = first_s + slower * 1.5
    counts = np.full(requests, 10, dtype=np.int64)
    first_s, finish_s = first_s - front.back_s, finish_s - front.back_s
    records = Records(
        arrival_s=arrival_s + front.way_in_s(counts * 3),
        prompt_tokens=counts * 3,
        output_tokens=counts,
        produced_tokens=counts,
        admitted_s=arrival_s + 0.01,
        first_token_s=first_s,
        finish_s=finish_s,
        preemptions=(np.arange(requests) < preempted).astype(np.int64),
        status=counts * 0 + 2,
        kept_params_share=np.ones(requests),
        quality_nll=np.full(requests, np.nan),
        cached_tokens=counts * 0,
    )
    start_s = np.concatenate([[0.0], 4.0 + late_s + np.arange(12.0)])
    zero = np.zeros(len(start_s), dtype=np.int64)
    iterations = Iterations(
        start_s=start_s,
        end_s=np.append(start_s[1:], max(float(finish_s.max()), start_s[-1] + 1.0)),
        prefill_tokens=zero,
        decode_requests=zero,
        running=zero + 3,
        waiting=zero,
        kv_used_share=zero * 0.5,
        preemptions=np.append(0, np.arange(12) < preempted).astype(np.int64),
        extrapolated=zero.astype(np.bool_),
    )
    many = np.zeros(changes, dtype=np.int64)
    transitions = Transitions(
        time_s=np.arange(changes, dtype=np.float64) + late_s,
        from_plan=("dense",) * changes,
        to_plan=tuple("ab"[i % 2] for i in range(changes)),
        bytes_in=many,
        bytes_freed=many,
        ready_s=np.arange(changes, dtype=np.float64) + 2 * late_s,
        preempted=many,
        recomputed_tokens=many,
        kv_blocks_before=many,
        kv_blocks_after=many,
    )
    gaps = TokenGaps(itl_s=np.array([0.1]), count=np.array([9 * requests]))
    folder.mkdir(parents=True)
    write_parquet(folder / "records.parquet", records_frame(records, Slo(), front))
    write_parquet(folder / "transitions.parquet", transitions_frame(transitions))
    write_parquet(folder / "iterations.parquet", iterations_frame(iterations))
    write_parquet(folder / "kept_share.parquet", kept_share_frame([(0.0, 1.0), (1.0, kept)]))
    write_json(
        folder / "summary.json", summarise(records, iterations, gaps, Slo(), transitions=changes, front_end=front)
    )
    write_json(
        folder / "hardware.json",
        {"peak_predicted_bytes": 100, "peak_allocated_bytes": 100, "largest_difference_bytes": 0 if exact else 1},
    )
    return folder


def result_of(tmp_path: Path, sim: dict[str, Any], *real: dict[str, Any]) -> dict[str, Any]:
    folders = [run_folder(tmp_path / str(i), **changed) for i, changed in enumerate((sim, *real))]
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


def test_plans_that_change_have_a_tolerance_of_twelve_percent(tmp_path: Path) -> None:
    assert result_of(tmp_path, {"slower": 1.07, "changes": 2}, {"changes": 2})["held"]


def test_an_error_below_the_noise_of_the_hardware_is_no_miss(tmp_path: Path) -> None:
    result = result_of(tmp_path, {"slower": 1.2}, {"slower": 0.7}, {"slower": 1.0}, {"slower": 1.3})
    assert result["figures"]["ttft_s.mean"]["verdict"] == "within noise"
    assert result["figures"]["ttft_s.mean"]["noise"] == pytest.approx(0.3, abs=0.01)


def test_preemptions_and_plan_changes_are_compared_in_number_and_in_time(tmp_path: Path) -> None:
    events = result_of(tmp_path, {"changes": 3, "preempted": 4, "late_s": 0.5}, {"changes": 2, "preempted": 4})[
        "events"
    ]
    assert events["preemptions"]["simulated"] == 4
    assert events["preemptions"]["verdict"] == "held"
    assert events["preemptions"]["paired"] == [4]
    assert events["preemptions"]["time_error_s"] == pytest.approx(0.5)
    assert events["preemptions"]["time_verdict"] == "held"  # against 12 % of about 20 s
    assert events["transitions"]["verdict"] == "missed"  # 3 against 2
    assert events["transitions"]["paired"] == [2]  # to a and to b; the second one to a happened on one side only
    assert events["transitions"]["time_error_s"] == pytest.approx(0.5)
    assert events["transitions"]["ready_after_s"] == {"simulated": pytest.approx(0.5), "real": [0.0]}
    ours, theirs = (events["preemptions"]["times_s"][side] for side in ("simulated", "real"))
    assert np.abs(np.subtract(ours, theirs[0])).mean() == pytest.approx(events["preemptions"]["time_error_s"])


def test_times_too_different_are_missed_unless_the_hardware_itself_spreads_so_far(tmp_path: Path) -> None:
    sim = {"changes": 2, "late_s": 9.0}
    alone = result_of(tmp_path / "alone", sim, {"changes": 2})
    assert verdicts(alone)["transitions.times"] == "missed"
    assert not alone["held"]
    spread = result_of(tmp_path / "spread", sim, {"changes": 2}, {"changes": 2, "late_s": 18.5})
    assert spread["events"]["transitions"]["time_noise_s"] == pytest.approx(18.5)
    assert verdicts(spread)["transitions.times"] == "within noise"


def test_a_number_of_preemptions_that_some_repeat_had_too_lies_within_the_noise(tmp_path: Path) -> None:
    result = result_of(tmp_path, {"preempted": 1}, {"preempted": 0}, {"preempted": 0}, {"preempted": 1})
    assert verdicts(result)["preemptions.number"] == "within noise"


def test_timelines_are_those_of_the_iterations_and_differ_where_the_runs_do(tmp_path: Path) -> None:
    run = read_run(run_folder(tmp_path / "run", kept=0.8))
    at_s = np.array([0.5, 2.0, 4.5, 1e6])
    assert timeline(run.logs, "running", at_s).tolist() == [3.0, 3.0, 3.0, 0.0]
    assert timeline(run.logs, "kept_share", at_s).tolist() == [1.0, 0.8, 0.8, 0.8]
    arrived = np.searchsorted(run.records["arrival_s"], at_s, "right")
    ended = np.searchsorted(np.sort(run.records["finish_s"]), at_s, "right")
    expected = np.maximum(arrived - ended - np.array([3, 3, 3, 0]), 0)
    assert timeline(run.logs, "waiting", at_s).tolist() == expected.tolist()
    lines = result_of(tmp_path, {"kept": 0.8}, {"kept": 1.0})["timelines"]
    end_s = run.logs.end_s
    assert lines["kept_share"]["difference"] == pytest.approx(0.2 * (end_s - 1) / end_s, rel=1e-2)
    assert lines["running"]["difference"] == 0.0
    assert lines["running"]["noise"] is None  # a single run has none


def test_a_run_without_iterations_is_still_compared_without_times_of_preemptions(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / name, preempted=2, changes=1) for name in ("sim", "real")]
    for name in ("iterations.parquet", "kept_share.parquet"):
        (folders[1] / name).unlink()
    simulated, real = (read_run(folder) for folder in folders)
    result = compare(simulated, [real])
    assert result["events"]["preemptions"]["verdict"] == "held"
    assert result["events"]["preemptions"]["time_error_s"] is None
    assert result["events"]["transitions"]["time_error_s"] == 0.0
    assert set(result["timelines"].values()) == {None}
    assert result["held"]


def test_a_run_of_the_client_says_nothing_of_preemptions_and_plan_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [run_folder(tmp_path / "sim", preempted=5, changes=2), run_folder(tmp_path / "client")]
    for name in ("iterations.parquet", "kept_share.parquet", "hardware.json"):
        (folders[1] / name).unlink()
    write_json(folders[1] / "client.json", {})
    (folders[0] / "hardware.json").unlink()
    assert exit_status(hw.compare.main, *map(str, folders), f"out={tmp_path / 'out'}") == 0
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["events"] == {}
    assert "a client sees none" in capsys.readouterr().out


@pytest.mark.parametrize(("counted", "status"), [(32, 0), (36, 2)])
def test_a_run_of_the_client_may_have_counted_a_few_more_prompt_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], counted: int, status: int
) -> None:
    folders = [run_folder(tmp_path / "sim"), run_folder(tmp_path / "client")]
    for name in ("iterations.parquet", "kept_share.parquet", "hardware.json"):
        (folders[1] / name).unlink()
    write_json(folders[1] / "client.json", {})
    records = pd.read_parquet(folders[1] / "records.parquet")
    records["prompt_tokens"] = counted
    records.to_parquet(folders[1] / "records.parquet", index=False)
    assert exit_status(hw.compare.main, *map(str, folders)) == status
    assert ("counted 1,440 prompt tokens" in capsys.readouterr().err) == (status == 2)


def as_client(folder: Path) -> Path:
    """Leave of a run what hw.client writes."""
    for name in ("iterations.parquet", "kept_share.parquet", "hardware.json"):
        (folder / name).unlink()
    write_json(folder / "client.json", {})
    return folder


FRONT = FrontEnd(front_s=0.05, front_token_s=1e-4, back_s=0.01)


def test_a_run_of_the_client_is_compared_with_what_simulated_clients_see(tmp_path: Path) -> None:
    simulated, client = run_folder(tmp_path / "sim", front=FRONT), as_client(run_folder(tmp_path / "client"))
    (simulated / "config.yaml").write_text(
        "frontend: {_target_: x, front_s: 0.05, front_token_s: 0.0001, back_s: 0.01}\n"
    )
    (simulated / "hardware.json").unlink()
    assert exit_status(hw.compare.main, str(simulated), str(client), f"out={tmp_path / 'out'}") == 0
    figures = json.loads((tmp_path / "out" / "compare.json").read_text())["figures"]
    for name in ("ttft_s.mean", "ttft_s.p99", "e2e_s.mean", "tpot_s.mean"):
        assert figures[name]["error"] == pytest.approx(0.0, abs=1e-9), name
    # In the engine the first token comes after 63 ms less, of about 250.
    assert read_run(simulated).summary["ttft_s"]["mean"] < 0.8 * figures["ttft_s.mean"]["real"]


def test_clients_and_engines_are_not_compared_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulated, client = run_folder(tmp_path / "sim", front=FRONT), as_client(run_folder(tmp_path / "client"))
    (simulated / "config.yaml").write_text("frontend: {front_s: 0.05, front_token_s: 0.0001, back_s: 0.01}\n")
    (simulated / "hardware.json").unlink()
    engine = run_folder(tmp_path / "engine")
    assert exit_status(hw.compare.main, str(simulated), str(client), str(engine)) == 2
    assert "one after the other" in capsys.readouterr().err
    (simulated / "config.yaml").write_text("frontend: {front_s: soon}\n")
    assert exit_status(hw.compare.main, str(simulated), str(client)) == 2
    assert "must hold seconds" in capsys.readouterr().err


def test_bytes_that_are_not_exact_fail_whatever_the_latencies(tmp_path: Path) -> None:
    assert not result_of(tmp_path, {}, {"exact": False})["held"]


def test_runs_of_other_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the same"):
        result_of(tmp_path, {}, {"seed": 1})


def test_the_command_ends_with_its_verdict_and_writes_json_and_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sim, good, bad = (run_folder(tmp_path / name, slower=s) for name, s in (("s", 1.0), ("g", 1.01), ("b", 2.0)))
    before = {path: path.stat().st_mtime_ns for path in good.iterdir()}
    assert exit_status(hw.compare.main, str(sim), str(good)) == 0
    assert {path: path.stat().st_mtime_ns for path in good.iterdir()} == before  # the run's folder stays as it was
    assert exit_status(hw.compare.main, str(sim), str(bad), f"out={tmp_path / 'out'}") == 1
    assert exit_status(hw.compare.main, str(sim), str(tmp_path / "nothing")) == 2
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert written["figures"]["makespan_s"]["verdict"] in ("held", "missed")
    assert written["events"]["transitions"]["time_error_s"] is None  # none happened
    assert written["timelines"]["kept_share"]["simulated"] == 1.0
    (own,) = (tmp_path / "runs").glob("*/*_compare")
    assert (own / "compare.png").stat().st_size > 10_000


def as_side(folder: Path, side: str, **hardware: Any) -> Path:
    """Turn a made-up run into one of the simulator or of the real model."""
    write_json(folder / "provenance.json", {"command": f"python -m {side}.replay trace=small"})
    (folder / "hardware.json").unlink()
    if side == "hw":
        content = {"peak_predicted_bytes": 1, "peak_allocated_bytes": 1, "largest_difference_bytes": 0}
        write_json(folder / "hardware.json", content | hardware)
    return folder


def test_folders_in_the_wrong_order_or_twice_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sims = [as_side(run_folder(tmp_path / name), "sim") for name in ("sim_a", "sim_b")]
    real = [as_side(run_folder(tmp_path / name), "hw", device="x86_64 CPU") for name in ("hw_a", "hw_b")]
    for given, message in (
        ([real[0], sims[0]], "the first must be simulated"),
        ([real[0], real[1]], "the first must be simulated"),
        ([sims[0], sims[1]], "all after the first must be real"),
        ([sims[0], real[0], sims[1]], "all after the first must be real"),
        ([sims[0], real[0], real[0]], "listed twice"),
        ([sims[0]], "one simulated run and of one or more real ones"),
    ):
        assert exit_status(hw.compare.main, *map(str, given), f"out={tmp_path / 'out'}") == 2
        assert message in capsys.readouterr().err
    (sims[0] / "provenance.json").unlink()  # a folder without it is known by its other files
    assert exit_status(hw.compare.main, str(sims[0]), str(real[0]), f"out={tmp_path / 'out'}") == 0
    assert exit_status(hw.compare.main, str(real[0]), str(sims[0]), f"out={tmp_path / 'out'}") == 2


def test_times_of_another_machine_are_named_as_such_and_its_speed_is_offered_as_a_calibration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sim = as_side(run_folder(tmp_path / "sim"), "sim")
    real = as_side(run_folder(tmp_path / "hw", slower=1.6), "hw", device="x86_64 CPU", processor="Another CPU")
    name = "smollm2_135m_cpu_epyc_1thread"
    (sim / "config.yaml").write_text("model: {name: smollm2_135m}\ngpu: {name: cpu_epyc_1thread}\nlatency: null\n")
    for folder, factor in ((sim, 1.0), (real, 1.6)):
        frame = pd.read_parquet(folder / "iterations.parquet")
        frame["decode_requests"] = [1 + i % 3 for i in range(len(frame))]
        frame["end_s"] = frame["start_s"] + factor * 0.01 * frame["decode_requests"]
        write_parquet(folder / "iterations.parquet", frame)
    assert exit_status(hw.compare.main, str(sim), str(real), f"out={tmp_path / 'out'}") == 1
    shown = capsys.readouterr().out
    assert "1.60 times as long" in shown
    assert "Another CPU" in shown
    assert "hw.calibrate source=device" in shown
    assert "{'" not in shown  # no raw dict
    assert "median error of TTFT" in shown
    plain, scaled = load_calibration(name), load_calibration(tmp_path / "out" / f"{name}_x1.60.json")
    plan = dense_plan(load_model("smollm2_135m"))
    ratio = scaled.iteration_s(plan, [(60, 0)], 3, 250, 4) / plain.iteration_s(plan, [(60, 0)], 3, 250, 4)
    assert ratio == pytest.approx(1.6, rel=1e-3)
    assert (
        exit_status(
            hw.compare.main, str(sim), str(as_side(run_folder(tmp_path / "good"), "hw")), f"out={tmp_path / 'good_out'}"
        )
        == 0
    )
    assert "another machine" not in capsys.readouterr().out


def test_requests_that_differ_are_named(tmp_path: Path) -> None:
    simulated = read_run(run_folder(tmp_path / "a"))
    fewer = read_run(run_folder(tmp_path / "b", requests=39))
    with pytest.raises(ConfigError, match=r"has 40, .*39; run both with the same trace"):
        compare(simulated, [fewer])
    frame = pd.read_parquet(tmp_path / "a" / "records.parquet")
    frame.loc[3, "output_tokens"] += 1
    write_parquet(run_folder(tmp_path / "c") / "records.parquet", frame)
    with pytest.raises(ConfigError, match=r"output_tokens of request 3 is 10 .* and 11"):
        compare(simulated, [read_run(tmp_path / "c")])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("records.parquet", b"no parquet", "is no Parquet file"),
        ("summary.json", b"[" * 100_000, "nests too deep"),
        ("summary.json", b"[]", "not a JSON object"),
        ("summary.json", b"{}", "lacks ttft_s"),
        ("hardware.json", b"\xff", "not valid JSON"),
    ],
)
def test_a_folder_with_a_broken_file_is_one_line(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / file).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_run(folder)


def test_settings_that_differ_are_noted(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / name) for name in ("sim", "hw")]
    for folder, bits in zip(folders, (16, 8), strict=True):
        (folder / "config.yaml").write_text(f"policy: {{weight_bits: {bits}}}\nengine: {{a: 1}}\n")
    simulated, real = map(read_run, folders)
    assert compare(simulated, [real])["different_settings"] == ["policy differs"]


def test_the_page_shows_preemptions_and_plan_changes_of_the_cells_that_have_any(tmp_path: Path) -> None:
    quiet = result_of(tmp_path / "quiet", {}, {})
    busy = result_of(tmp_path / "busy", {"preempted": 3, "changes": 1, "late_s": 0.5}, {"changes": 1}, {"changes": 1})
    rows = cells(events_table([("quiet", "dense", quiet), ("burst", "morphserve", busy), ("old", "dense", {})]))[1:]
    assert rows == [["burst", "morphserve", "**3 / 0, 0**", "- / -", "1 / 1, 1", "0.5 s / 0 s", "0.5 s / 0 s"]]
    assert events_table([("quiet", "dense", quiet)]) == ""


def test_the_table_of_checks_that_do_not_hold_has_those_alone() -> None:
    figure = {"simulated": 1.1, "real": 1.0, "error": 0.1, "noise": 0.02}
    figures = {"ttft_s.p95": figure | {"verdict": "missed"}, "e2e_s.mean": figure | {"verdict": "held"}}
    rows = cells(not_held_table([("burst", "dense", {"figures": figures})]))[1:]
    assert rows == [["burst", "dense", "TTFT P95", "+10.0 %", "2.0 %", "missed"]]
    assert not_held_table([("burst", "dense", {"figures": {"e2e_s.mean": figures["e2e_s.mean"]}})]) == ""
    assert [heading(name) for name in ("tpot_s.mean", "makespan_s")] == ["TPOT mean", "makespan"]


def test_ranking_counts_only_pairs_beyond_the_noise_and_prices_a_wrong_choice() -> None:
    def cell(simulated: float, real: float) -> dict[str, Any]:
        figure = {"simulated": simulated, "real": real, "noise": 0.05}
        return {"figures": {"ttft_s.mean": figure, "e2e_s.mean": figure}}

    found = ranking({"burst": {"a": cell(1.0, 1.2), "b": cell(1.1, 1.0), "c": cell(3.0, 3.0), "d": cell(3.1, 3.05)}})
    assert found["burst"]["ttft_s.mean"]["tied"] == 0
    same = ranking({"burst": {"a": cell(1.0, 1.0), "b": cell(1.0, 1.2)}})["burst"]["e2e_s.mean"]
    assert (same["pairs_beyond_noise"], same["agreed"], same["tied"]) == (1, 0, 1)
    row = found["burst"]["ttft_s.mean"]
    assert row["pairs_beyond_noise"] == 5  # c and d differ by less than their noise
    assert row["agreed"] == 4
    assert row["regret"] == pytest.approx(0.2)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_run_of_the_suite_can_be_built(workload: str) -> None:
    for policy in policies() if workload == "budget_walks" else ["dense"]:
        cfg = configuration(workload, policy, ValidateConfig())
        assert 3 <= len(build_trace(cfg)) <= 60
        parts = build_parts(cfg)
        assert parts.budget.budget_bytes[0] > 0


def test_the_committed_page_is_what_the_committed_results_give() -> None:
    content = json.loads(RESULT.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    assert page(content) == text
    assert len(content["words"]["policies"]) >= 4
    assert len(content["words"]["workloads"]) >= 6
    figure = content["results"]["burst"]["dense"]["figures"]["ttft_s.mean"]
    row = next(row for row in cells(text) if row[:2] == ["burst", "dense"] and len(row) == 11)
    assert row[3] == f"{100 * figure['error']:+.1f} % / {100 * figure['noise']:.1f} %"


def test_a_slower_calibration_prices_every_iteration_so_much_higher() -> None:
    content = json.loads((CALIBRATIONS / "smollm2_135m_cpu_epyc_1thread.json").read_text(encoding="utf-8"))
    plain, slow = calibration_from_dict(content), calibration_from_dict(slower(content, 1.7))
    plan = dense_plan(load_model("smollm2_135m"))
    for shape in (([], 4, 300, 4), ([(60, 0), (20, 30)], 3, 250, 5), ([(128, 0)], 0, 0, 1)):
        assert slow.iteration_s(plan, *shape) == pytest.approx(1.7 * plain.iteration_s(plan, *shape), rel=1e-4)
