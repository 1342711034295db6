"""trace=file: names of columns, units of time, delimiters, JSON lists, and hash ids of another size."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.errors import TraceError
from sim.traces.readers.any_format import read_any
from sim.traces.readers.native import read_trace, write_trace
from sim.traces.trace import Trace

COLUMNS = {"arrival": "ts", "prompt": "in_tokens", "output": "out_tokens"}
UNITS = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}


def write(tmp_path, content, name="trace.any"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("unit", UNITS)
def test_names_and_unit_of_time_can_be_stated_for_every_kind_of_file(tmp_path, kind, unit):
    times = [UNITS[unit] // 2 * 2, UNITS[unit] * 3]
    rows = [
        {"out_tokens": o, "ts": t, "note": "x", "in_tokens": p} for t, p, o in zip(times, (5, 6), (7, 8), strict=True)
    ]
    if kind == "parquet":
        path = tmp_path / "t.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        as_csv = "out_tokens,ts,note,in_tokens\n" + "".join(",".join(map(str, r.values())) + "\n" for r in rows)
        as_lines = "".join(json.dumps(row) + "\n" for row in rows)
        path = write(tmp_path, {"csv": as_csv, "jsonl": as_lines, "json": json.dumps(rows, indent=2)}[kind])
    trace = read_any(path, columns=COLUMNS, time_unit=unit)
    assert trace.arrival_s.tolist() == [times[0] / UNITS[unit], 3.0]
    assert trace.prompt_tokens.tolist() == [5, 6]
    assert trace.output_tokens.tolist() == [7, 8]


@given(
    start=st.integers(10**9 + 1, 4 * 10**9),
    gaps=st.lists(st.integers(0, 10**12), min_size=1, max_size=5),
    unit=st.sampled_from(sorted(UNITS)),
)
def test_whole_unix_times_are_rebased_exactly(tmp_path_factory, start, gaps, unit):
    gaps = [gap % (UNITS[unit] * 10**6) for gap in gaps]
    times = np.cumsum([start * UNITS[unit], *gaps]).tolist()
    rows = "".join(f"{t},1,1\n" for t in times)
    path = write(tmp_path_factory.getbasetemp(), f"arrival_s,prompt_tokens,output_tokens\n{rows}")
    arrivals = read_trace(path, time_unit=unit, rebase=True).arrival_s.tolist()
    assert arrivals == [(t - times[0]) / UNITS[unit] for t in times]
    rows = "".join(json.dumps({"arrival_s": t, "prompt_tokens": 1, "output_tokens": 1}) + "\n" for t in times)
    assert read_trace(write(path.parent, rows), time_unit=unit, rebase=True).arrival_s.tolist() == arrivals
    with pytest.raises(TraceError, match=r"too large.*set trace\.rebase=true"):
        read_trace(path, time_unit=unit)


@given(
    start=st.datetimes(datetime(1971, 1, 1), datetime(2090, 1, 1)),
    gaps_us=st.lists(st.integers(0, 10**10), max_size=4),
    mark=st.sampled_from(["", "Z", "+02:00", "-0530"]),
    separator=st.sampled_from("T "),
    name=st.sampled_from([None, "iso"]),
)
def test_dates_are_recognized_and_count_from_the_first(tmp_path_factory, start, gaps_us, mark, separator, name):
    ends = np.cumsum([0, *gaps_us]).tolist()
    rows = [f"{(start + timedelta(microseconds=gap)).isoformat(separator)}{mark},1,1\n" for gap in ends]
    path = write(tmp_path_factory.getbasetemp(), "arrival_s,prompt_tokens,output_tokens\n" + "".join(rows))
    assert read_trace(path, time_unit=name or "s").arrival_s.tolist() == [gap / 10**6 for gap in ends]


def test_decimals_of_parquet_are_numbers(tmp_path):
    times = pa.array([Decimal("0.5"), Decimal("1.25")], type=pa.decimal128(18, 6))
    counts = pa.array([Decimal(7), Decimal(8)], type=pa.decimal128(18, 0))
    table = pa.table({"arrival_s": times, "prompt_tokens": counts, "output_tokens": counts})
    pq.write_table(table, tmp_path / "decimals.parquet")
    trace = read_trace(tmp_path / "decimals.parquet")
    assert trace.arrival_s.tolist() == [0.5, 1.25]
    assert trace.prompt_tokens.tolist() == [7, 8]


def test_dates_of_parquet_and_with_different_zones_are_one_clock(tmp_path):
    times = [datetime(2026, 5, 1, 12, tzinfo=UTC), datetime(2026, 5, 1, 12, 0, 1, 500_000, tzinfo=UTC)]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"arrival_s": times, "prompt_tokens": [1, 1], "output_tokens": [1, 1]}), path)
    assert read_trace(path).arrival_s.tolist() == [0.0, 1.5]
    rows = "2026-05-01T14:00:00+02:00,1,1\n2026-05-01T12:00:01.5Z,1,1\n"
    path = write(tmp_path, "arrival_s,prompt_tokens,output_tokens\n" + rows)
    assert read_trace(path).arrival_s.tolist() == [0.0, 1.5]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"arival": "ts"}, r"trace\.columns has 'arival'; did you mean 'arrival'"),
        ({"arrival": ""}, r"trace\.columns\.arrival is ''"),
        ({"arrival": 3}, r"trace\.columns\.arrival is 3"),
        ({"arrival": "prompt_tokens"}, "'prompt_tokens' for two columns"),
        ("ts", r"trace\.columns=\{arrival: NAME"),
        ({"arrival": "time"}, "no column 'time' in the header"),
        ({"hash_ids": "ids"}, "no column 'ids' in the header"),
    ],
)
def test_wrong_names_of_columns_are_refused(tmp_path, columns, message):
    path = write(tmp_path, "arrival_s,prompt_tokens,output_tokens\n0,1,1\n")
    with pytest.raises(TraceError, match=message):
        read_trace(path, columns=columns)


def test_an_unknown_unit_of_time_names_the_known_ones(tmp_path):
    with pytest.raises(TraceError, match=r"trace\.time_unit is 'msec'; did you mean 'ms'"):
        read_trace(write(tmp_path, "arrival_s,prompt_tokens,output_tokens\n0,1,1\n"), time_unit="msec")


@pytest.mark.parametrize(
    "content",
    [
        "output_tokens,arrival_s,prompt_tokens\n5,1.5,10\n",
        "arrival_s;prompt_tokens;output_tokens\n1.5;10;5\n",
        "arrival_s\tprompt_tokens\toutput_tokens\n1.5\t10\t5\n",
        "arrival_s|prompt_tokens|output_tokens\n1.5|10|5\n",
        "Arrival_S, PROMPT_TOKENS ,Output_tokens\n1.5,10,5\n",
        '"arrival_s","prompt_tokens","output_tokens"\n"1.5","10","5"\n',
        "arrival_s,prompt_tokens,output_tokens\n1.5,10.0,5.00\n\n\n",
        "arrival_s,prompt_tokens,output_tokens,\n1.5,10,5,\n",
        "id,arrival_s,note,prompt_tokens,note,output_tokens\n7,1.5,a,10,b,5",
        "arrival_s\tprompt_tokens\toutput_tokens\tnote\n1.5\t10\t5\t",
        '{"Arrival_s": 1.5, "prompt_tokens": 10.0, "output_tokens": 5, "x": {"y": []}}',
        '\n[{"arrival_s": 1.5,\n"prompt_tokens": 10, "output_tokens": 5}]\n',
    ],
)
def test_layouts_that_mean_the_same_read_the_same(tmp_path, content):
    trace = read_trace(write(tmp_path, content))
    assert (trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([1.5], [10], [5])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('arrival_s,prompt_tokens,output_tokens\n0,"1,000",5\n', "not a number: '1,000'"),
        ("arrival_s;prompt_tokens;output_tokens\n0,5;10;5\n", "not a number: '0,5'"),
        ("arrival_s,prompt_tokens,output_tokens\n0,10,5,\n", "wrong number of values"),
        ("arrival_s,ARRIVAL_S ,prompt_tokens,output_tokens\n0,0,10,5\n", None),
        ("Arrival_s,ARRIVAL_S,prompt_tokens,output_tokens\n0,0,10,5\n", "'arrival_s' appears twice"),
        ("arrival_s,prompt_tokens,output_tokens\n0,\u0661,5\n", "not a number"),
        (f"arrival_s,prompt_tokens,output_tokens\n0,{'1' * 200_000}x,5\n", "not a number"),
        ('[{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1}, 7]', "entry 2, column 'all': not a JSON object"),
        ('[{"arrival_s": 0}', r"not one JSON document \(line 1, character 18"),
        ("[" * 100_000, "not one JSON document"),
        ('{"a":' * 100_000, "line 1, column 'all': not a JSON object"),
        ("null", "no column"),
        ('{\n"arrival_s": 0,\n"prompt_tokens": 1,\n"output_tokens": 1\n}', "line 1, column 'all': not a JSON object"),
        ('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1' + "0" * 5000 + "}", "column 'all'"),
    ],
)
def test_what_cannot_be_meant_is_named(tmp_path, content, message):
    path = write(tmp_path, content)
    if message is None:
        assert len(read_trace(path)) == 1
        return
    with pytest.raises(TraceError, match=message) as caught:
        read_trace(path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_hash_ids_of_other_than_512_tokens_survive_writing(tmp_path, kind):
    ids = (np.array([1, 2], dtype=np.int64), np.array([1], dtype=np.int64))
    trace = Trace(arrival_s=[0.0, 1.0], prompt_tokens=[20, 5], output_tokens=[1, 1], hash_ids=ids, hash_block_tokens=16)
    path = write_trace(trace, tmp_path / f"t.{kind}")
    again = read_any(path)
    assert again == trace
    assert again.content_hash() == trace.content_hash()
    assert again.hash_block_tokens == 16
    assert trace != Trace(arrival_s=[0.0, 1.0], prompt_tokens=[20, 5], output_tokens=[1, 1], hash_ids=ids)


def test_rows_that_state_different_sizes_of_ids_do_not_fit(tmp_path):
    rows = "arrival_s,prompt_tokens,output_tokens,hash_ids,hash_block_tokens\n0,1,1,3,16\n1,1,1,3,32\n"
    with pytest.raises(TraceError, match="line 3, column 'hash_block_tokens': not that of the other rows"):
        read_trace(write(tmp_path, rows))


@given(
    content=st.binary(max_size=300)
    | st.text(alphabet='0123456789.,;\t-\n\r"eEnaulb{}:[] ', max_size=300).map(str.encode),
    start=st.sampled_from(["", "{", "[", '[{"', "null", "arrival_s,prompt_tokens,output_tokens\n", "\ufeff", "PAR1"]),
)
def test_any_file_is_read_or_gives_one_short_line_of_error(tmp_path_factory, content, start):
    path = write(tmp_path_factory.getbasetemp(), start.encode() + content, "any.file")
    for on_bad_row in ("error", "skip"):
        try:
            assert len(read_any(path, on_bad_row=on_bad_row)) > 0
        except TraceError as error:
            text = str(error)
            assert len(text.splitlines()) == 1, text
            assert len(text) < 1500, text


def test_a_missing_column_names_the_key_that_states_other_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("ts,in_tokens,out_tokens\n0,10,5\n")
    with pytest.raises(TraceError, match=r"no column 'arrival_s' in .*'trace\.columns=\{arrival: NAME, "):
        read_trace(tmp_path / "a.csv")
