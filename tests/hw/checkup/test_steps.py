"""Each step of the check-up, on a tiny model with random weights, in this process."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pandas as pd
import pytest

import hw.calibrate.__main__  # registers the keys of hw.calibrate
import hw.checkup.calibration
import hw.checkup.kernels
import hw.checkup.own_tests
from hw.checkup.findings import Findings, Skip
from hw.checkup.policies import policies_for
from hw.checkup.schedule import STEPS
from hw.checkup.setup import SIZES, Setup
from sim.config import check_overrides
from sim.cost.model_spec import load_model
from tests.hw.fake_cuda import FakeCuda
from tests.hw.serving import flat_latency_content


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    overrides = ("gpu=cpu_epyc_1thread", "model=tiny", "hw.checkpoint=random:0")
    folder = str(tmp_path)
    return Setup(device="cpu", size="short", checkpoint="random:0", overrides=overrides, work=folder, out=folder)


def found_by(name: str, setup: Setup) -> dict[str, Any]:
    """Run a step; return what it found, all of it passed."""
    path = Path(setup.work) / f"{name}.json"
    resolve_name(next(step.run for step in STEPS if step.name == name))(setup, Findings(path))
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert [check for check in content["checks"] if not check["passed"]] == []
    return content


def test_weights_at_every_precision_have_the_predicted_bytes(setup: Setup) -> None:
    content = found_by("weights", setup)
    assert len([check for check in content["checks"] if check["name"].startswith("bytes of weights")]) == 6
    assert "random" in content["figures"]["weights"]


def test_a_budget_that_falls_and_an_allocation_beyond_it_lose_no_request(setup: Setup) -> None:
    figures = found_by("budgets", setup)["figures"]
    assert figures["out_of_memory"] >= 1
    assert figures["kv_bytes"][1] < figures["kv_bytes"][0] == figures["kv_bytes"][2]


@pytest.fixture
def on_fake_gpu(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Let the model be on a fake GPU, which counts every tensor and refuses those beyond its limit."""
    hardware = FakeCuda()
    monkeypatch.setattr("hw.elastic.model.device_of", lambda _: hardware)
    with hardware:
        yield hardware


def test_on_a_gpu_the_allocator_holds_the_weights_and_little_else(setup: Setup, on_fake_gpu: FakeCuda) -> None:
    figures = found_by("weights", setup)["figures"]
    assert figures["allocated_bytes"] >= 600_000
    assert figures["stored_bytes"] > 0


def test_on_a_gpu_an_allocation_beyond_the_limit_fails_and_the_limit_ends(setup: Setup, on_fake_gpu: FakeCuda) -> None:
    found_by("budgets", setup)
    assert on_fake_gpu.limits[-1] is None
    assert len({limit for limit in on_fake_gpu.limits if limit is not None}) >= 2


def test_policies_are_replayed_and_simulated_and_compared(setup: Setup) -> None:
    setup.calibration.write_text(json.dumps(flat_latency_content(1e3, 10.0) | {"name": "tiny_cpu_epyc_1thread"}))
    figures = found_by("policies", setup)["figures"]["policies"]
    assert set(figures) == {"dense", "fixed", "morphserve", "greedy_stop"}
    assert figures["dense"]["over_bound"] > 0
    passes = pd.read_parquet(Path(setup.out) / "passes.parquet")
    assert set(passes["policy"]) == set(figures)
    assert (passes["forward_s"] > 0).all()
    compared = found_by("simulation", setup)["figures"]["comparisons"]
    assert set(compared) == set(figures)
    assert compared["dense"]["judged"] > 5


def test_without_prices_the_simulation_is_skipped_with_the_reason(setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no prices of this device"):
        found_by("simulation", setup)


def test_streams_are_served_some_are_aborted_and_the_server_stops(setup: Setup) -> None:
    figures = found_by("serving", setup)["figures"]
    assert figures["answers"]["aborted"] == 3
    assert figures["answers"]["complete"] == SIZES["short"].streams - 3


def test_throughput_is_compared_with_transformers_and_a_peer_that_fails_is_left_out(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no continuous batching here")

    monkeypatch.setattr("hw.validate.transformers_engines._run_continuous", fails)
    figures = found_by("peers", setup)["figures"]
    assert set(figures["tokens_per_s"]) == {
        f"{name}, {batch}" for name in ("hw.engine", "generate") for batch in (1, 2)
    }
    assert figures["left out"]["engine"] == "generate_batch"
    assert "no continuous batching here" in figures["left out"]["traceback"]


def test_the_report_of_the_tests_names_each_that_failed(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="good"/><testcase classname="a" name="bad">'
        '<failure message="m">assert 1 == 2</failure></testcase><testcase classname="a" name="other"><skipped/>'
        "</testcase></testsuite></testsuites>"
    )
    counts, failures = hw.checkup.own_tests.read_report(report)
    assert counts == {"passed": 1, "failed": 1, "skipped": 1}
    assert failures == [{"test": "a.bad", "message": "assert 1 == 2"}]


@pytest.mark.parametrize("model", ["tiny", "smollm2_135m", "llama2_7b", "llama3.1_8b", "qwen2.5_7b"])
def test_the_policies_of_every_model_are_configurations_that_exist(model: str) -> None:
    for overrides in policies_for(load_model(model)).values():
        check_overrides([f"model={model}", *overrides], "hw_replay")


@pytest.mark.parametrize("size", SIZES)
def test_the_overrides_of_every_size_exist(size: str) -> None:
    check_overrides([*SIZES[size].trace, f"engine={SIZES[size].engine}"], "hw_replay")
    check_overrides(list(SIZES[size].calibration), "calibrate")


@pytest.mark.slow
def test_the_calibration_of_a_tiny_model_is_written_next_to_the_results(setup: Setup) -> None:
    found_by("calibration", setup)
    assert setup.calibration.is_file()
    shutil.rmtree(setup.work)


@pytest.mark.parametrize(
    ("line", "outcome"),
    [
        ("tests/hw/a.py::test_b[c-d] PASSED     [  3%]", ("tests/hw/a.py::test_b[c-d]", "passed")),
        ("[gw1] [ 12%] FAILED tests/hw/a.py::test_b ", ("tests/hw/a.py::test_b", "failed")),
        ("tests/hw/a.py::test_b SKIPPED (no CUDA)   [ 50%]", ("tests/hw/a.py::test_b", "skipped")),
        ("FAILED tests/hw/a.py::test_b - assert 1 == 2", None),
        ("tests/hw/a.py::test_b ", None),
        ("1 passed, 2 deselected in 3.00s", None),
    ],
)
def test_each_line_of_pytest_counts_as_it_comes(line: str, outcome: tuple[str, str] | None) -> None:
    assert hw.checkup.own_tests.outcome_of(line) == outcome


def test_every_row_of_the_benchmark_of_kernels_is_read(tmp_path: Path) -> None:
    lines = [
        "NVIDIA H100: a copy moves 2,900 GB/s, a BF16 product runs at 700 TFLOP/s\n",
        "\nllama2_7b                                 us  GB/s, TFLOP/s  of bound  PyTorch us\n",
        "decode of 64 x 1,024 tokens             412.5          2,610     90.0%      5210.0\n",
    ]
    rows = hw.checkup.kernels.follow(lines, Findings(tmp_path / "found.json"))
    wanted = {
        "kernel": "decode of 64 x 1,024 tokens",
        "us": 412.5,
        "speed": 2610.0,
        "of_bound": 90.0,
        "pytorch_us": 5210.0,
    }
    assert rows == [wanted]
    with pytest.raises(Skip, match="need a CUDA device"):
        hw.checkup.kernels.follow(
            ["nothing measured: the kernels need a CUDA device and triton\n"], Findings(tmp_path / "f")
        )


def test_the_calibration_computes_attention_as_the_other_steps_do(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(hw.checkup.calibration.subprocess, "run", run)
    chosen = replace(setup, overrides=(*setup.overrides, "hw.attention=sdpa", "hw.threads=2"), out=str(tmp_path))
    hw.checkup.calibration.run(chosen, Findings(tmp_path / "calibration.json"))
    assert {"attention=sdpa", "threads=2"} <= set(ran[0])
