"""Files that once ended a reader with another error than a TraceError, or the process itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sim.errors import TraceError
from sim.traces.readers import table
from sim.traces.readers.aiperf import read_aiperf
from sim.traces.readers.azure import read_azure
from sim.traces.readers.mooncake import read_mooncake
from sim.traces.readers.native import read_trace
from sim.traces.readers.vllm_bench import read_vllm_bench

AZURE = b"TIMESTAMP,ContextTokens,GeneratedTokens\n"
BENCH: dict[str, Any] = {
    "duration": 3.0,
    "start_times": [100.0, 101.0],
    "input_lens": [10, 20],
    "output_lens": [5, 6],
    "ttfts": [0.1, 0.2],
    "itls": [[0.01], [0.02]],
}


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize(
    ("read", "content"),
    [
        (read_mooncake, b"null"),
        (read_mooncake, b'null\n"'),
        (read_mooncake, b"[" * 100_000),
        (read_aiperf, b'{"timestamp": 0, "text_input": "two words", "output_length": 5;6}\n'),
        (read_aiperf, b'{"timestamp": \xed\xa0\xbd, "text_input": "two words", "output_length": 5}\n'),
        (read_azure, AZURE + b"2024-05-10 00:00:01,480\x1f,10\n"),
        (read_azure, AZURE + b"2024-05-10 00:00:01,480,\x1d10\n"),
        (read_azure, b"Time,\rodel,Req\x00,490"),
        (read_trace, b"PAR1" + b"\x15" * 200),
    ],
)
def test_a_hostile_file_is_a_trace_error_of_one_line(
    tmp_path: Path, read: Callable[..., Any], content: bytes, on_bad_row: str
) -> None:
    (tmp_path / "hostile").write_bytes(content)
    with pytest.raises(TraceError) as refused:
        read(tmp_path / "hostile", on_bad_row=on_bad_row)
    assert "\n" not in str(refused.value)


def test_half_a_pair_of_surrogates_that_json_escapes_is_text_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({**BENCH, "errors": ["\ud83d", ""]}))
    assert len(read_vllm_bench(path)) == 1  # the request with an error is left out
    assert table.cell_text({"\ud83d": 1}) == "{'\\ud83d': 1}"
    assert table.cell_text("a\ud83db \U0001f600") == "a?b \U0001f600"
    path.write_text(json.dumps({**BENCH, "input_lens": ["\ud83d", 20]}))
    with pytest.raises(TraceError, match="input_lens"):
        read_vllm_bench(path)


def test_a_row_with_neither_text_nor_length_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"timestamp": 0, "output_length": 5}\n{"timestamp": 0, "text_input": }\n')
    with pytest.raises(TraceError, match="neither input_length nor text_input"):
        read_aiperf(path)


def test_the_characters_of_deeply_nested_texts_are_counted(tmp_path: Path) -> None:
    deep: Any = "four"
    for _ in range(700):
        deep = [deep]
    (tmp_path / "deep.jsonl").write_text(json.dumps({"timestamp": 0, "text_input": deep, "output_length": 5}))
    assert read_aiperf(tmp_path / "deep.jsonl").prompt_tokens.tolist() == [1]


@pytest.mark.parametrize("duration", [10**400, True, "3", None])
def test_a_benchmark_with_a_duration_that_is_no_time_is_read_without_it(tmp_path: Path, duration: Any) -> None:
    (tmp_path / "bench.json").write_text(json.dumps({**BENCH, "duration": duration}))
    assert len(read_vllm_bench(tmp_path / "bench.json")) == 2


def test_latencies_beyond_any_float_end_after_the_benchmark(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps({**BENCH, "itls": [[0.5, 10**400], [0.02]]}))
    with pytest.raises(TraceError, match="ends after the benchmark"):
        read_vllm_bench(tmp_path / "bench.json")


def test_one_object_of_many_fields_is_a_bad_row(tmp_path: Path) -> None:
    good = {"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1}
    wide = json.dumps(good | {f"field {i}": i for i in range(10_000)})
    (tmp_path / "wide.jsonl").write_text(f"{json.dumps(good)}\n{wide}\n")
    with pytest.raises(TraceError, match=r"line 2.*'10,003 fields'; allowed: at most 10,000 fields"):
        read_trace(tmp_path / "wide.jsonl")
    assert len(read_trace(tmp_path / "wide.jsonl", on_bad_row="skip")) == 1


def test_rows_of_many_different_fields_are_not_kept_together(tmp_path: Path) -> None:
    good = {"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1}
    rows = [good | {f"{row} {i}": 0 for i in range(5_000)} for row in range(45)]
    (tmp_path / "fields.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(read_trace(tmp_path / "fields.jsonl")) == 45


def test_lines_of_more_values_than_can_be_parsed_soon_are_refused_before_parsing(tmp_path: Path) -> None:
    row = {"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1, "unused": [[]] * 200}
    (tmp_path / "values.jsonl").write_text(json.dumps(row))
    with pytest.raises(TraceError, match=r"about 202 values, more than 16 times trace\.max_rows=10"):
        read_trace(tmp_path / "values.jsonl", max_rows=10)
    assert len(read_trace(tmp_path / "values.jsonl", max_rows=20)) == 1


def test_few_of_many_names_are_compared_with_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    nearest = table.nearest
    monkeypatch.setattr(table, "nearest", lambda name, known: compared.append(name) or nearest(name, known))
    (tmp_path / "names.jsonl").write_text(json.dumps({f"name {i}": i for i in range(9_000)}))
    with pytest.raises(TraceError, match="no column 'arrival_s'"):
        read_trace(tmp_path / "names.jsonl")
    assert len(compared) < 200
