from __future__ import annotations

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hw.calibrate import measurements as m
from hw.calibrate import published
from hw.calibrate.__main__ import main as command
from hw.calibrate.calibration import calibrate, slower
from hw.calibrate.writing import write_calibration
from sim.cost.gpu import Gpu
from sim.cost.latency import CALIBRATIONS, calibration_from_dict, calibration_names
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan
from sim.errors import CalibrationError, ConfigError
from sim.paths import DATA_VARIABLE, data_dir
from tests.commands import exit_status

GPU = Gpu(
    name="toy",
    memory_bytes=1e10,
    memory_bandwidth_bytes_per_s=1e12,
    dense_fp16_flop_per_s=1e14,
    host_to_device_bytes_per_s=1e10,
)


@pytest.fixture(scope="module")
def measured() -> Path:
    folder = data_dir() / "calibration"
    if not folder.is_dir():
        pytest.skip(f"no measurements at {folder}; set {DATA_VARIABLE} to a folder that holds calibration/")
    return folder


def test_an_unknown_target_names_the_nearest_right_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'llama2_7b_a100'"):
        published.from_measurements(["llama2_7b_a10"], tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("taget=all", "did you mean 'target'"),
        ("source=measurement", "did you mean 'measurements'"),
        ("data=/nowhere", "RAP_LAB_DATA"),
        ("gpu=a100", "did you mean 'a100_80gb'"),
    ],
)
def test_the_command_reports_errors_in_one_line(argument: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(command, argument) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_every_committed_calibration_is_a_target() -> None:
    assert set(published.TARGETS) | set(published.DERIVED) <= set(calibration_names())


def test_calibrating_from_measurements_needs_no_torch() -> None:
    code = "import hw.calibrate.__main__, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CALIBRATIONS.parent.parent)


@pytest.mark.parametrize("name", ["llama3.1_8b_rtx4090", "llama2_7b_a100", "llama2_70b_h100_tp4"])
def test_the_committed_file_and_its_stated_errors_come_from_the_measurements(name: str, measured: Path) -> None:
    content = calibrate(published.TARGETS[name], measured, published.fixed_overhead(measured))
    committed = json.loads((CALIBRATIONS / f"{name}.json").read_text(encoding="utf-8"))
    assert content["fixed_us"] == pytest.approx(committed["fixed_us"], abs=0.2)
    for term, error in committed["errors"].items():
        assert content["errors"][term]["points"] == error["points"]
        assert content["errors"][term]["median"] == pytest.approx(error["median"], rel=0.02, abs=1e-4)
        assert content["errors"][term]["p95"] == pytest.approx(error["p95"], rel=0.02, abs=1e-4)
    for key in ("prefill_attention", "decode_attention"):
        np.testing.assert_allclose(content["tables"][key]["us"], committed["tables"][key]["us"], rtol=1e-3)
    assert content["tables"]["linear_us"] == committed["tables"]["linear_us"]


def test_a_derived_calibration_is_its_source_times_the_data_sheets_ratios(measured: Path) -> None:
    source = json.loads((CALIBRATIONS / "llama2_7b_l40s.json").read_text(encoding="utf-8"))
    derived = published.derive("llama2_7b_l4", source, "l4_24gb")
    assert derived["kind"] == "derived"
    assert derived["notes"][0].startswith("DERIVED, not measured")
    near, far = calibration_from_dict(source), calibration_from_dict(derived)
    assert far.decode_attention_s(8, 8000) / near.decode_attention_s(8, 8000) == pytest.approx(864 / 300, rel=1e-3)
    assert far.linear_s("ffn", 16, 8192) / near.linear_s("ffn", 16, 8192) == pytest.approx(362 / 121, rel=0.01)


def test_the_full_layer_takes_as_long_as_the_readers_own_sum(measured: Path) -> None:
    terms = published.TARGETS["llama2_7b_a100"].read(measured)
    # calibration/README.md: one layer without attention, sum of medians, at one token 0.290 ms, KV save not counted.
    one = sum(float(curve.us[curve.x == 1][0]) for curve in terms.linear[16].values())
    assert one == pytest.approx(290, abs=8)


def test_a_missing_file_or_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no measurements at"):
        m.read_table(tmp_path / "none.csv", ("a",))
    with gzip.open(tmp_path / "one.csv.gz", "wt") as file:
        file.write("a,b\n1,2\n")
    with pytest.raises(CalibrationError, match="lacks column c; it has a, b"):
        m.read_table(tmp_path / "one.csv.gz", ("a", "c"))
    (tmp_path / "cut.csv.gz").write_bytes((tmp_path / "one.csv.gz").read_bytes()[:20])
    with pytest.raises(CalibrationError, match="cannot be read"):
        m.read_table(tmp_path / "cut.csv.gz", ("a",))


def test_a_surface_that_is_bilinear_is_found_again_where_cells_are_missing() -> None:
    rows, columns = np.array([1.0, 2, 4, 8, 16]), np.array([10.0, 100, 200, 400, 800])
    x, y = (axis.ravel() for axis in np.meshgrid(rows, columns, indexing="ij"))
    us = 3.0 * x * y
    known = np.ones(len(us), dtype=bool)
    known[[7, 12, 18]] = False
    fitted = m.fit_surface(m.Surface(x[known], y[known], us[known]), rows, columns)
    np.testing.assert_allclose(fitted.ravel(), us, rtol=0.02)


def test_noise_is_cleaned_into_a_price_that_never_falls() -> None:
    noisy = np.array([1.0, 3.0, 2.0, 5.0, 4.9, 6.0])
    clean = m.rising(noisy)
    assert np.all(np.diff(clean) >= 0)
    assert clean[[0, 5]].tolist() == pytest.approx([1.0, 6.0])
    assert clean[1] == clean[2] == pytest.approx(np.sqrt(6.0))
    surface = m.rising_surface(np.exp(np.random.default_rng(0).normal(size=(6, 7))))
    assert np.all(np.diff(surface, axis=0) >= 0)
    assert np.all(np.diff(surface, axis=1) >= 0)


def test_every_inner_point_is_held_out_exactly_once_and_never_seen() -> None:
    inside = np.arange(20) % 19 != 0
    seen = np.zeros(20, dtype=int)

    def fit_and_predict(train: np.ndarray) -> np.ndarray:
        seen[~train] += 1
        return np.where(train, np.nan, 1.0)

    predicted = m.held_out(20, inside, fit_and_predict)
    assert seen.tolist() == inside.astype(int).tolist()
    assert np.isnan(predicted).tolist() == (~inside).tolist()


def test_decode_attention_out_of_the_cache_is_raised_to_what_memory_delivers() -> None:
    surface = m.Surface(np.array([1.0, 64.0]), np.array([16.0, 4096.0]), np.array([5.0, 10.0]))
    raised = m.raise_to_bandwidth(surface, 4096, GPU)
    assert raised.us[0] == 5.0
    assert raised.us[1] == pytest.approx(64 * 4096 * 4096 / (m.ACHIEVED * 1e12) * 1e6)


def test_a_product_between_measured_shapes_lies_on_their_line(tmp_path: Path) -> None:
    shapes = [(n, 4096) for n in (2048, 4096, 8192, 16384)] + [(4096, k) for k in (2048, 8192, 16384)]
    rows = [("bfloat16", tokens, n, k, tokens * n * k * 1e-9) for tokens in (1, 8) for n, k in shapes]
    gemm = pd.DataFrame(rows, columns=["gemm_dtype", "m", "n", "k", "latency"])
    gemm.to_csv(tmp_path / "gemm_perf.csv.gz", index=False)
    names = ["batch_size", "isl", "step", "num_heads", "num_key_value_heads", "kv_cache_dtype", "latency"]
    for kind in ("context", "generation"):
        pd.DataFrame(columns=names).to_csv(tmp_path / f"{kind}_attention_perf.csv.gz", index=False)
    kernels = m.Kernels(tmp_path)
    for n, k in ((11008, 4096), (4096, 11008), (32000, 4096), (8192, 4096)):
        np.testing.assert_allclose(kernels.product("bfloat16", n, k).us, np.array([1, 8]) * n * k * 1e-6)
    np.testing.assert_allclose(kernels.product("bfloat16", 8192, 4096, leave_out=True).us, [33.554432, 268.435456])
    with pytest.raises(CalibrationError, match="no int4_wo products"):
        kernels.product("int4_wo", 4096, 4096)
    with pytest.raises(CalibrationError, match="no attention with 32 heads over 8"):
        kernels.decode(32, 8)


def test_all_reduces_are_read_in_elements_as_a_graph_launches_them(tmp_path: Path) -> None:
    names = ["kernel_source", "allreduce_dtype", "num_gpus", "message_size", "latency"]
    rows = [
        ["vLLM_custom_graph", "bfloat16", 2, 128, 0.004],
        ["vLLM_custom_graph", "bfloat16", 2, 4096, 0.006],
        ["vLLM_custom_graph", "bfloat16", 2, 4096, 0.008],
        ["vLLM_custom_eager", "bfloat16", 2, 4096, 0.100],
        ["vLLM_custom_graph", "bfloat16", 4, 4096, 0.050],
    ]
    path = tmp_path / "one.csv.gz"
    pd.DataFrame(rows, columns=names).to_csv(path, index=False)
    curve = m.read_allreduce(path, 2)
    assert (curve.x.tolist(), curve.us.tolist()) == ([128.0, 4096.0], [4.0, 7.0])
    with pytest.raises(CalibrationError, match="no all-reduce among 8 GPUs"):
        m.read_allreduce(path, 8)


def test_a_divided_model_is_composed_of_the_kernels_of_one_gpu_and_all_reduces(measured: Path) -> None:
    model, gpu = load_model("llama3.1_70b"), published.gpu_named("a100_80gb")
    kernels = m.Kernels(measured / "aiconfigurator/a100_sxm/trtllm-1.0.0")
    terms = published.composed_terms(measured, model, replace(gpu, tp=8), "a100_sxm", "trtllm/1.0.0")
    # One of eight GPUs computes 7,168 of gate and up, both measured shapes, from 8,192 hidden features.
    up, down = kernels.product("bfloat16", 7168, 8192), kernels.product("bfloat16", 8192, 3584)
    at = 16.0
    us = sum(float(each.us[each.x == at][0]) for each in (up, down))
    elementwise = sum(m.elementwise_us(np.array([at]), size, gpu)[0] for size in (8 * 8192, 6 * 3584))
    assert terms.linear[16]["ffn"].us[terms.linear[16]["ffn"].x == at] == pytest.approx(us + elementwise)
    assert terms.decode.us.size == kernels.decode(8, 1).us.size
    assert terms.allreduce is not None
    # 16 tokens of 8,192 features are 131,072 elements: 17.1 us among eight A100.
    assert np.interp(at, terms.allreduce.x, terms.allreduce.us) == pytest.approx(17.1, abs=0.05)
    alone = m.compose(kernels, load_model("llama3.1_8b"), gpu, m.read_sampler(measured / published.SAMPLER))
    assert alone.allreduce is None


def test_heads_that_were_not_measured_are_the_nearest_of_the_same_grouping_over_more_rows(measured: Path) -> None:
    kernels = m.Kernels(measured / "aiconfigurator/a100_sxm/trtllm-1.0.0")
    assert kernels.measured_heads(kernels.generation, 64, 8) == (32, 4)
    assert kernels.measured_heads(kernels.generation, 20, 20) == (16, 16)
    half, wanted = kernels.decode(32, 4), kernels.decode(64, 8)
    assert wanted.us.size == (half.x >= 2).sum() > 100
    for batch, context, us in zip(wanted.x, wanted.y, wanted.us, strict=True):
        assert us == half.us[(half.x == 2 * batch) & (half.y == context)][0]
    with pytest.raises(CalibrationError, match="no attention with 36 heads over 12 KV heads"):
        kernels.decode(36, 12)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_large_all_reduces_agree_with_another_measurement_of_the_same_machine(tp: int, measured: Path) -> None:
    for gpu in ("a100", "h100"):
        error = json.loads((CALIBRATIONS / f"llama2_70b_{gpu}_tp{tp}.json").read_text(encoding="utf-8"))["errors"]
        assert error["allreduce_nccl"]["median"] < 0.16  # in bytes instead of elements it would be near 0.5


def test_a_slower_machine_takes_longer_for_all_reduces_too() -> None:
    content = json.loads((CALIBRATIONS / "llama2_70b_h100_tp4.json").read_text(encoding="utf-8"))
    fast, slow = (calibration_from_dict(each) for each in (content, slower(content, 2.0)))
    plan = dense_plan(load_model("llama2_70b"))
    for chunks, decodes in (([], 8), ([(700, 0)], 3)):
        one, two = (each.iteration_s(plan, chunks, decodes, 100 * decodes, 1) for each in (fast, slow))
        assert two == pytest.approx(2.0 * one, rel=1e-3)


def test_a_calibration_is_written_completely_and_reads_back_the_same(tmp_path: Path) -> None:
    content = json.loads((CALIBRATIONS / "llama3.1_8b_h100.json").read_text(encoding="utf-8"))
    path = tmp_path / "copy.json"
    write_calibration(content, path)
    assert json.loads(path.read_text(encoding="utf-8")) == content
    assert list(tmp_path.iterdir()) == [path]
