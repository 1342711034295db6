"""Measuring a device: what is measured is resumed, fitted and loadable; on a tiny model, in a second."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import hw.calibrate.device as d
import hw.calibrate.engine_runs
import hw.calibrate.plan_changes
import hw.calibrate.this_device
from hw.calibrate.__main__ import main as command
from hw.calibrate.calibration import times
from hw.calibrate.engine_runs import CPU_LOAD, Iterations, latency_of, line_over_terms, load_of, run_engine
from hw.calibrate.grid import Limits
from hw.calibrate.plan_changes import POOL_BLOCKS, Changes
from hw.elastic.model import ElasticModel
from hw.engine.iteration_log import Shape
from sim.config import build_option
from sim.cost.latency import CALIBRATIONS, load_calibration
from sim.cost.memory import layer_weight_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan, drop, with_mask
from sim.errors import ConfigError
from tests.commands import exit_status
from tests.hw.fake_cuda import FakeCuda
from tests.hw.serving import tiny, tiny_spec

LIMITS = Limits(tokens=64, batch=4, context=64)
SETTINGS = d.DeviceSettings(model="tiny", device="cpu_epyc_1thread", clock="cpu", seconds=60.0, seed=0, limits=LIMITS)
LOAD = replace(CPU_LOAD, run_s=2.0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time every cell twice."""
    for name, values in {"LEAST_REPEATS": {"cpu": 2, "cuda": 2}, "MOST_REPEATS": {"cpu": 2, "cuda": 2}}.items():
        monkeypatch.setattr(d, name, values)
    monkeypatch.setattr(hw.calibrate.plan_changes, "REPEATS", 4)


SHORT = ("seconds=20", "grid.tokens=64", "grid.batch=4", "grid.context=64")


def samples_at(path: Path) -> d.Samples:
    return d.Samples(path, {"model": "tiny"})


def test_every_cell_is_measured_and_a_stopped_run_continues_where_it_was(quick: None, tmp_path: Path) -> None:
    bench = d.Bench(ElasticModel(tiny(), name="tiny"), SETTINGS)
    first = samples_at(tmp_path / "samples.json")
    runs, survey = d.measure(bench, first, SETTINGS, LOAD)
    grid = bench.grid
    tokens = len(grid.tokens)
    assert len(first.of) == 3 * 2 * tokens + tokens + len(grid.sequences) + len(grid.decodes) + len(grid.prefills)
    assert len(runs) == 4
    assert all(term.summary()["measured"] == term.summary()["of"] for term in survey.terms.values())
    assert bench.pool.layer_blocks == 0
    assert min(map(len, first.of.values())) >= 2
    assert min(min(values) for values in first.of.values()) > 0
    again = samples_at(tmp_path / "samples.json")
    assert again.of == first.of
    assert d.Samples(tmp_path / "samples.json", {"model": "another"}).of == {}


def test_the_median_of_steady_samples_is_known_sooner_than_that_of_wild_ones() -> None:
    assert d.spread([1.0, 1.001, 1.0, 0.999]) < d.WANTED_SPREAD
    assert d.spread([1.0, 2.0, 0.5, 1.5]) > d.WANTED_SPREAD
    values = np.random.default_rng(0).normal(10.0, 1.0, size=4000).tolist()
    assert d.spread(values) == pytest.approx(1.2533 * 0.1 / math.sqrt(4000), rel=0.1)


def test_iterations_are_a_line_over_their_terms_despite_a_few_outliers() -> None:
    plan = dense_plan(load_model("smollm2_135m"))
    file = CALIBRATIONS / "smollm2_135m_cpu_epyc_1thread.json"
    content = json.loads(file.read_text(encoding="utf-8")) | {"fixed_us": 0.0}
    rng = np.random.default_rng(0)
    shapes = [
        Shape(plan, ((int(rng.integers(1, 90)), 0),) * int(rng.integers(0, 3)), batch, 60 * batch, batch + 1, 0.0)
        for batch in range(1, 60)
    ]
    run = Iterations(np.zeros(len(shapes)), tuple(shapes))
    took_s = run.priced_s(latency_of(times(content, 1.07, 1.4))) + 0.05
    took_s[::10] *= 2.0  # a busy spell
    found = line_over_terms([Iterations(took_s, run.shapes)], content)
    assert found.factor == pytest.approx(1.07, rel=0.01)
    assert found.prefill_attention_factor == pytest.approx(1.4, rel=0.08)
    assert found.fixed_s == pytest.approx(0.05, rel=0.1)
    assert found.off < 0.01


def test_the_command_writes_a_calibration_that_the_simulator_loads_and_prices_any_plan_with(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tiny_spec()
    monkeypatch.setattr(hw.calibrate.this_device, "REPOSITORY", tmp_path)
    tiny().config.save_pretrained(tmp_path)
    model = ["model=hf", f"model.config={tmp_path / 'config.json'}", "+model.name=tiny"]
    assert exit_status(command, "source=device", *model, "checkpoint=random:5", *SHORT, f"out={tmp_path}") == 0
    latency = load_calibration(tmp_path / "tiny_cpu_epyc_1thread.json")
    assert latency.bits == (16, 8, 4)
    assert (tmp_path / "tiny_cpu_epyc_1thread.png").stat().st_size > 10_000
    dense = dense_plan(spec)
    pruned = with_mask(dense, drop(spec, mha=[1], ffn=[0, 2]))
    assert 0 < latency.iteration_s(pruned, [(30, 0)], 4, 200, 5) < latency.iteration_s(dense, [(30, 0)], 4, 200, 5)
    content = json.loads((tmp_path / "tiny_cpu_epyc_1thread.json").read_text())
    assert set(content["errors"]) >= {"mha_linear_16", "ffn_linear_4", "decode_attention", "iteration"}
    assert content["fixed_us"] >= 0
    assert any("weights are random (random:5)" in note for note in content["notes"])
    assert content["device_run"]["samples"] >= content["device_run"]["cells"] * 2
    changes = content["device_run"]["plan_changes"]
    assert set(changes["layer_copies"]) == {"16", "8", "4"}
    assert latency.copying is not None
    assert latency.copying.host_to_device_bytes_per_s == content["device_run"]["host_to_device_bytes_per_s"]
    before = content["tables"]
    assert exit_status(command, "source=device", *model, "checkpoint=random:5", "only=changes", f"out={tmp_path}") == 0
    again = json.loads((tmp_path / "tiny_cpu_epyc_1thread.json").read_text())
    assert again["tables"] == before
    assert again["device_run"]["plan_changes"] != changes  # measured again
    assert "iteration" in capsys.readouterr().out


def test_what_a_plan_change_costs_is_measured_and_leaves_the_model_and_the_pool_as_they_were(quick: None) -> None:
    elastic = ElasticModel(tiny(), name="tiny")
    changes, held = Changes(d.Bench(elastic, replace(SETTINGS, clock="wall"))), elastic.bytes()
    found = changes.measure()
    assert (changes._pool.layer_blocks, changes._pool.used_layer_blocks) == (POOL_BLOCKS, 0)
    assert elastic.bytes() == held
    assert elastic.plan == dense_plan(elastic.spec)
    rows = found["plan_changes"]["layer_copies"]
    for bits, row in rows.items():
        assert row["bytes"] == layer_weight_bytes(elastic.spec, int(bits))
        assert min(row.values()) > 0
    rates = [row["bytes_per_s_while_serving"] for row in rows.values()]
    assert min(rates) <= found["host_to_device_bytes_per_s"] <= max(rates)
    assert found["copy_slowdown"] >= 0
    pool = found["plan_changes"]["kv_pool"]
    assert pool.pop("freed_bytes")["by the pool"] == pool["resized_by"] * pool["block_bytes"]
    assert min(pool.values()) > 0
    blocks_of = found["plan_changes"]["blocks"]
    assert blocks_of["ffn"]["bytes"] == elastic.blocks["ffn"][1].nbytes


def test_only_changes_needs_an_existing_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(command, "source=device", "only=changes", f"out={tmp_path}") == 2
    assert "measure all first" in capsys.readouterr().err
    assert exit_status(command, "source=device", "only=change") == 2
    assert "changes" in capsys.readouterr().err


def test_processor_seconds_on_a_gpu_are_refused_and_wall_is_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exit_status(command, "source=device", "gpu=h100_80gb", "clock=cpu") == 2
    assert "set the clock to wall" in capsys.readouterr().err
    clocks: list[str] = []
    monkeypatch.setattr(hw.calibrate.this_device, "load", lambda *_: None)
    monkeypatch.setattr(
        hw.calibrate.this_device, "measure_all", lambda _, settings, *__: clocks.append(settings.clock) or sys.exit(3)
    )
    for gpu in ("h100_80gb", "cpu_epyc_1thread"):
        assert exit_status(command, "source=device", f"gpu={gpu}") == 3
    assert clocks == ["wall", "cpu"]


def test_an_unknown_clock_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(command, "source=device", "clock=sun") == 2
    assert "cpu" in capsys.readouterr().err


# --- A GPU, or what stands for one


def on_gpu(memory_bytes: float = 1e9) -> tuple[d.Bench, FakeCuda]:
    """Return a bench over a tiny model on a fake GPU with this much memory for the grid and all else."""
    hardware = FakeCuda()
    elastic = ElasticModel(tiny(), name="tiny", hardware=hardware)
    workspace = d.WORKSPACE_BYTES["cuda"]
    settings = replace(SETTINGS, clock="wall", memory_bytes=(memory_bytes + workspace) / d.USED_SHARE)
    return d.Bench(elastic, settings), hardware


def test_on_a_gpu_all_layers_run_in_a_row_and_the_host_gets_ahead_from_the_second_time_on() -> None:
    bench, hardware = on_gpu()
    cell = bench.linear(16, [8])[8,]
    with d.torch.inference_mode():
        for _ in range(2):
            bench.time(cell)
    assert len(hardware.timings) == 2 * 2  # the MHA blocks of all layers in a row, then the FFN blocks; not one a block
    assert hardware.timings[:2] == [0.0, 0.0]
    assert min(hardware.timings[2:]) > 0
    assert set(bench.host_us()) == {"mha_16/8", "ffn_16/8"}


def test_the_grid_ends_where_the_memory_of_the_device_does_and_the_file_says_so() -> None:
    bench, _ = on_gpu()
    assert bench.fitting == list(bench.grid.decodes)
    assert not bench.grid.notes
    block_bytes = bench.arena.block_bytes
    small, _ = on_gpu(block_bytes * 8)
    assert 0 < len(small.fitting) < len(bench.fitting)
    assert max(map(d._blocks, small.fitting)) <= 8
    assert any("the memory of this device does not hold the 256" in note for note in small.grid.notes)


def test_layers_share_blocks_where_the_pool_is_too_small_for_the_kv_of_all() -> None:
    bench, _ = on_gpu()
    layers = frozenset(range(bench.elastic.spec.num_layers))
    bench.hold(8)
    made, taken = bench._requests([(31, 1), (31, 1)], layers)
    assert len(taken) == len(set(taken)) == 2 * 2 * 2  # two requests of two blocks, for two of the layers
    assert made[0].table.blocks[0] == made[0].table.blocks[2] != made[0].table.blocks[1]
    assert made[0].table.mha == layers
    bench.pool.release(taken)
    assert bench.pool.used_layer_blocks == 0


def test_the_engine_between_the_measurements_computes_attention_as_it_is_timed() -> None:
    with pytest.raises(ConfigError, match="none_such"):
        run_engine(ElasticModel(tiny(), name="tiny"), "cpu", 0, replace(LOAD, attention="none_such"), 4.0)


def test_the_load_of_a_gpu_follows_its_bandwidth_and_its_memory() -> None:
    elastic = ElasticModel(tiny(), name="tiny", hardware=FakeCuda())
    bytes_per_s = 10.0 * elastic.bytes()
    slow, fast = (load_of(elastic, 480.0, 80e9, bandwidth) for bandwidth in (bytes_per_s, 2 * bytes_per_s))
    assert fast.rates_rps[0] == pytest.approx(2 * slow.rates_rps[0])
    assert load_of(elastic, 480.0, 80e9, 1e15).rates_rps[0] == pytest.approx(5.0)  # a small model: the host's limit
    assert load_of(elastic, 48.0, 80e9, 1e12).run_s < slow.run_s == CPU_LOAD.run_s
    assert load_of(ElasticModel(tiny(), name="tiny"), 480.0, 8e9, 1e10) == CPU_LOAD


def test_a_complete_calibration_runs_on_a_gpu_with_its_grids_its_load_and_its_notes(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hw.calibrate.this_device, "REPOSITORY", tmp_path)
    gpu = replace(build_option("gpu", "h100_80gb"), memory_bandwidth_bytes_per_s=5e7)
    monkeypatch.setattr(hw.calibrate.engine_runs, "LEAST_REQUESTS", 3)
    elastic = ElasticModel(tiny(), name="tiny", hardware=FakeCuda())
    settings = replace(SETTINGS, device=gpu.name, clock="wall", seconds=8.0, memory_bytes=gpu.memory_bytes)
    content = hw.calibrate.this_device.measure_all(elastic, settings, gpu, tmp_path)
    run = content["device_run"]
    assert set(run["host_us_per_layer"]) == {"mha_16", "ffn_16"}
    assert run["points"]["decode"]["measured"] > 0
    assert run["processor"] == "a fake GPU"
    assert load_calibration(tmp_path / "tiny_h100_80gb.json").bits == (16, 8, 4)
