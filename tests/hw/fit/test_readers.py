"""Every format gives the same run; files that are wrong give one line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hw.fit.measured import MeasuredRun
from hw.fit.readers import read_run
from hw.fit.readers.columns import Naming
from sim.errors import ConfigError
from tests.hw.fit.truth import a_server, gaps_of, ms, requests, served, write_vllm_bench

PLAIN = Naming(columns={})


@pytest.fixture(scope="module")
def real() -> MeasuredRun:
    return served(a_server(), requests(count=30))


def write_guidellm(path: Path, run: MeasuredRun) -> Path:
    rows = [
        {
            "request_start_time": 1.7e9 + sent,
            "request_end_time": 1.7e9 + end,
            "prompt_tokens": int(prompt),
            "output_tokens": int(output),
            "time_to_first_token_ms": ttft,
            "inter_token_latency_ms": gap,
        }
        for sent, end, prompt, output, ttft, gap in zip(
            run.arrival_s, run.finish_s, run.prompt_tokens, run.produced_tokens, ms(run.ttft_s), ms(run.tpot_s)
        , strict=True)
    ]  # fmt: skip
    path.write_text(json.dumps({"benchmarks": [{"requests": {"successful": rows, "errored": [], "incomplete": []}}]}))
    return path


def write_aiperf(path: Path, run: MeasuredRun) -> Path:
    lines = [
        {
            "metadata": {"request_start_ns": int(1e18 + 1e9 * sent), "benchmark_phase": "profiling"},
            "metrics": {
                "time_to_first_token": {"value": ttft, "unit": "ms"},
                "request_latency": {"value": e2e, "unit": "ms"},
                "input_sequence_length": {"value": int(prompt), "unit": "tokens"},
                "output_sequence_length": {"value": int(output), "unit": "tokens"},
            },
            "error": None,
        }
        for sent, ttft, e2e, prompt, output in zip(
            run.arrival_s, ms(run.ttft_s), ms(run.e2e_s), run.prompt_tokens, run.produced_tokens, strict=True
        )
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def write_inference_perf(path: Path, run: MeasuredRun) -> Path:
    rows = [
        {
            "start_time": 50.0 + sent,
            "end_time": 50.0 + end,
            "request": json.dumps({"prompt": f"text {i % 7}"}),
            "info": {
                "input_tokens": int(prompt),
                "output_tokens": int(output),
                "output_token_times": np.linspace(50.0 + first, 50.0 + end, int(output)).tolist(),
            },
            "error": None,
        }
        for i, (sent, first, end, prompt, output) in enumerate(
            zip(run.arrival_s, run.first_token_s, run.finish_s, run.prompt_tokens, run.produced_tokens, strict=True)
        )
    ]
    path.write_text(json.dumps(rows))
    return path


def write_aibrix(path: Path, run: MeasuredRun) -> Path:
    """Rows are in order of completion."""
    frame = pd.DataFrame(
        {
            "prompt_tokens": run.prompt_tokens.astype(float),
            "generation_tokens": run.produced_tokens.astype(float),
            "ttft": run.ttft_s,
            "generation_time": run.finish_s - run.first_token_s,
            "launch_time": 1.7474e9 + run.arrival_s,
            "finish_time": 1.7474e9 + run.finish_s,
        }
    )
    frame.sort_values("finish_time").to_csv(path, index=False)
    return path


def write_inference_sim(path: Path, run: MeasuredRun) -> Path:
    pd.DataFrame(
        {
            "request_id": np.arange(len(run)),
            "input_tokens": run.prompt_tokens,
            "output_tokens": run.produced_tokens,
            "arrival_time_us": np.round(1e6 * run.arrival_s),
            "send_time_us": np.round(1e6 * run.arrival_s),
            "first_chunk_time_us": np.round(1e6 * run.first_token_s),
            "last_chunk_time_us": np.round(1e6 * run.finish_s),
            "status": "ok",
        }
    ).to_csv(path, index=False)
    return path


def write_client(folder: Path, run: MeasuredRun) -> Path:
    folder.mkdir()
    pd.DataFrame(
        {
            "arrival_s": run.arrival_s,
            "admitted_s": run.arrival_s,
            "first_token_s": run.first_token_s,
            "finish_s": run.finish_s,
            "prompt_tokens": run.prompt_tokens,
            "produced_tokens": run.produced_tokens,
            "status": "finished",
        }
    ).to_parquet(folder / "records.parquet")
    (folder / "client.json").write_text("{}")
    return folder


def write_own(path: Path, run: MeasuredRun) -> Path:
    pd.DataFrame(
        {
            "start": pd.Timestamp("2026-01-01T00:00:00Z") + pd.to_timedelta(run.arrival_s, unit="s"),
            "in": run.prompt_tokens,
            "out": run.produced_tokens,
            "first": 1e3 * run.ttft_s,
            "all": 1e3 * run.e2e_s,
        }
    ).to_csv(path, index=False, sep=";")
    return path


OWN = Naming(columns={"sent": "start", "prompt": "in", "output": "out", "ttft": "first", "e2e": "all"}, unit="ms")
FORMATS: dict[str, tuple[str, Callable[[Path, MeasuredRun], Path], str]] = {
    "hw.client": ("client", write_client, "hw.client"),
    "vllm bench": ("result.json", write_vllm_bench, "vllm bench serve"),
    "guidellm": ("guidellm.json", write_guidellm, "guidellm"),
    "aiperf": ("profile_export.jsonl", write_aiperf, "aiperf"),
    "inference-perf": ("per_request_lifecycle_metrics.json", write_inference_perf, "inference-perf"),
    "AIBrix": ("naive.csv", write_aibrix, "table"),
    "inference-sim": ("trace.csv", write_inference_sim, "table"),
    "own": ("own.csv", write_own, "table"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_run_that_was_written(tmp_path: Path, real: MeasuredRun, name: str) -> None:
    file, write, kind = FORMATS[name]
    run = read_run(write(tmp_path / file, real), OWN if name == "own" else PLAIN)
    assert run.kind == kind
    assert run.side == "client"
    assert run.prompt_tokens.tolist() == real.prompt_tokens.tolist()
    assert run.produced_tokens.tolist() == real.produced_tokens.tolist()
    for figure in ("arrival_s", "ttft_s", "tpot_s", "e2e_s"):
        assert getattr(run, figure) == pytest.approx(getattr(real, figure), abs=2e-6 if name != "AIBrix" else 1e-5)


def test_texts_of_prompts_show_which_ones_repeat(tmp_path: Path, real: MeasuredRun) -> None:
    run = read_run(write_inference_perf(tmp_path / "metrics.json", real), PLAIN)
    assert run.prompts is not None
    assert len(np.unique(run.prompts)) == 7
    assert run.itl_s is not None
    assert len(run.itl_s) == int((real.produced_tokens - 1).sum())


def test_llmservingsim_states_its_settings(data: Path) -> None:
    run = read_run("calibration/llmservingsim_e2e/RTX4090/Llama-3.1-8B", PLAIN)
    assert run.side == "engine"
    assert run.kv_blocks == 2587
    assert run.config is not None
    assert run.config.limits.max_running == 256


def test_a_packed_file_is_read(tmp_path: Path, real: MeasuredRun) -> None:
    plain = write_aibrix(tmp_path / "a.csv", real)
    packed = tmp_path / "a.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert len(read_run(packed, PLAIN)) == len(real)


def test_failed_requests_are_left_out_and_counted(tmp_path: Path, real: MeasuredRun) -> None:
    errors = ["timeout" if i < 3 else "" for i in range(len(real))]
    ttfts = real.ttft_s.tolist()
    ttfts[5] = None
    run = read_run(write_vllm_bench(tmp_path / "r.json", real, errors=errors, ttfts=ttfts), PLAIN)
    assert len(run) == len(real) - 4
    assert [phrase.split(" (")[0] for phrase in run.left_out] == [
        "3 requests: failed",
        "1 requests: no time of the first token",
    ]


def test_of_several_benchmarks_one_is_chosen(tmp_path: Path, real: MeasuredRun) -> None:
    path = write_guidellm(tmp_path / "g.json", real)
    one = json.loads(path.read_text())["benchmarks"][0]
    path.write_text(json.dumps({"benchmarks": [one, one]}))
    assert len(read_run(path, PLAIN, benchmark=1)) == len(real)
    for wrong in (None, 2, -1):
        with pytest.raises(ConfigError, match="benchmark"):
            read_run(path, PLAIN, benchmark=wrong)
    lines = tmp_path / "appended.json"
    text = write_vllm_bench(tmp_path / "v.json", real).read_text()
    lines.write_text(f"{text}\n{text}\n")
    assert len(read_run(lines, PLAIN, benchmark=0)) == len(real)
    with pytest.raises(ConfigError, match="benchmark="):
        read_run(lines, PLAIN)


def hostile(real: MeasuredRun) -> dict[str, Any]:
    """Return contents that are no run, by name."""
    rows = {"launch_time": 1, "prompt_tokens": 5, "generation_tokens": 5, "ttft": 1, "generation_time": 1}
    header = ",".join(rows)
    return {
        "empty": b"",
        "zeros": bytes(1000),
        "text": b"hello, this is no run\n",
        "json null": b"null",
        "json list": b"[]",
        "json list of numbers": b"[1, 2, 3]",
        "json list of lists": b"[[1], [2]]",
        "json object": b"{}",
        "deep": b"[" * 100_000,
        "half": b'{"input_lens": [1, 2',
        "vllm without lists": b'{"input_lens": 3, "output_lens": 4, "ttfts": 5, "itls": 6, "start_times": 7}',
        "vllm of different lengths": json.dumps(
            {"input_lens": [3], "output_lens": [], "ttfts": [], "itls": [], "start_times": []}
        ).encode(),
        "vllm of texts": json.dumps(
            {name: ["x"] * 20 for name in ("input_lens", "output_lens", "ttfts", "itls", "start_times")}
        ).encode(),
        "vllm of objects": json.dumps(
            {name: [{}] * 20 for name in ("input_lens", "output_lens", "ttfts", "itls", "start_times", "errors")}
        ).encode(),
        "vllm of huge numbers": json.dumps(
            {name: [1e308] * 20 for name in ("input_lens", "output_lens", "ttfts", "start_times")}
            | {"itls": [[1e308] * 9] * 20}
        ).encode(),
        "vllm of NaN": b'{"input_lens": [NaN], "output_lens": [1], "ttfts": [1], "itls": [[1]], "start_times": [7]}',
        "guidellm without benchmarks": b'{"benchmarks": []}',
        "guidellm of numbers": b'{"benchmarks": [3]}',
        "guidellm without requests": b'{"benchmarks": [{"requests": 3}]}',
        "guidellm of nulls": b'{"benchmarks": [{"requests": {"successful": [null, null]}}]}',
        "inference-perf of nothing": json.dumps([{"start_time": 1, "info": {}}] * 20).encode(),
        "inference-perf of numbers": json.dumps([{"start_time": 1, "info": {"output_token_times": 3}}] * 20).encode(),
        "aiperf of nothing": b'{"metadata": {}, "metrics": 3}\n' * 20,
        "header alone": header.encode(),
        "too few rows": f"{header}\n1,5,5,1,1\n".encode(),
        "negative": f"{header}\n".encode() + b"1,5,5,-1,1\n" * 20,
        "fractions of tokens": f"{header}\n".encode() + b"1,5.5,5,1,1\n" * 20,
        "no numbers": f"{header}\n".encode() + b"a,b,c,d,e\n" * 20,
        "mostly wrong": f"{header}\n".encode() + b"1,5,5,1,1\n" * 12 + b"a,b,c,d,e\n" * 20,
        "columns of others": b"a,b,c\n" + b"1,2,3\n" * 20,
        "twice the same column": b"ttft,ttft,prompt_tokens\n" + b"1,2,3\n" * 20,
        "parquet that is none": b"PAR1 and nothing else",
        "a zip": b"PK\x03\x04" + bytes(100),
    }


@pytest.mark.parametrize("name", hostile(None))  # type: ignore[arg-type]
def test_a_file_that_is_no_run_is_an_error_of_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run"
    path.write_bytes(hostile(None)[name])  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as error:
        read_run(path, PLAIN)
    assert "\n" not in str(error.value)
    assert "trace." not in str(error.value)


def test_folders_that_are_no_run_are_errors(tmp_path: Path, real: MeasuredRun) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_run(tmp_path / "missing", PLAIN)
    with pytest.raises(ConfigError, match="holds no run"):
        read_run(tmp_path, PLAIN)
    folder = write_client(tmp_path / "client", real)
    frame = pd.read_parquet(folder / "records.parquet")
    frame.drop(columns="finish_s").to_parquet(folder / "records.parquet")
    with pytest.raises(ConfigError, match="finish_s"):
        read_run(folder, PLAIN)
    (folder / "records.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="no Parquet file"):
        read_run(folder, PLAIN)


@pytest.mark.parametrize(
    ("naming", "says"),
    [({"columns": {"arrival": "x"}}, "columns.arrival"), ({"columns": {"ttft": 3}}, "columns.ttft"),
     ({"columns": {}, "unit": "minutes"}, "unit is 'minutes'")],
)  # fmt: skip
def test_names_of_columns_are_checked(naming: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Naming(**naming)


def test_a_missing_column_is_named_with_what_the_file_has(tmp_path: Path, real: MeasuredRun) -> None:
    path = write_aibrix(tmp_path / "a.csv", real)
    with pytest.raises(ConfigError, match=r"no column 'x' .*launch_time"):
        read_run(path, Naming(columns={"ttft": "x"}))


def test_gaps_of_the_benchmark_are_kept(tmp_path: Path, real: MeasuredRun) -> None:
    run = read_run(write_vllm_bench(tmp_path / "r.json", real), PLAIN)
    assert run.itl_s is not None
    assert len(run.itl_s) == sum(len(row) for row in gaps_of(real))
