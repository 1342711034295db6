"""Ids of prefix blocks of any kind, and their unit, from the file to the engine."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.engine.protocol import EngineConfig, check_hash_blocks
from sim.errors import ConfigError, TraceError
from sim.traces.readers.mooncake import read_mooncake
from sim.traces.readers.native import read_trace
from sim.traces.readers.qwen_bailian import read_qwen_bailian
from sim.traces.trace import Trace
from sim.traces.transforms import clip_lengths, inject_burst, merge, repeat

ids = st.integers(-(2**70), 2**70) | st.text(max_size=4)


def write(tmp_path, ids_of_rows, block_tokens=512):
    rows = [
        {"timestamp": i, "input_length": block_tokens * len(row), "output_length": 1, "hash_ids": row}
        for i, row in enumerate(ids_of_rows)
    ]
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@given(rows=st.lists(st.lists(ids, min_size=1, max_size=4), min_size=1, max_size=5))
def test_equal_ids_stay_equal_and_different_ones_different(tmp_path_factory, rows):
    trace = read_mooncake(write(tmp_path_factory.getbasetemp(), rows))
    before = [i for row in rows for i in row]
    after = np.concatenate(trace.hash_ids).tolist()
    assert len(set(zip(before, after, strict=True))) == len(set(before)) == len(set(after))
    if all(isinstance(i, int) and 0 <= i < 2**63 for i in before):
        assert after == before


@pytest.mark.parametrize("bad", [[1.5], [True], [None], [[1]], {"a": 1}, 7])
def test_what_is_no_id_is_named(tmp_path, bad):
    path = write(tmp_path, [[1]])
    more = {"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": bad}
    path.write_text(path.read_text() + json.dumps(more))
    with pytest.raises(TraceError, match="line 2, column 'hash_ids': not a list of ids"):
        read_mooncake(path)


def test_ids_in_csv_and_parquet_may_be_text_too(tmp_path):
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens,hash_ids\n0,9,1,ff 10\n1,9,1,10\n2,9,1,\n")
    assert [row.tolist() for row in read_trace(tmp_path / "t.csv").hash_ids] == [[0, 1], [1], []]
    table = {"arrival_s": [0.0, 1.0], "prompt_tokens": [9, 9], "output_tokens": [1, 1]}
    for column in ([["ff", "10"], ["10"]], pa.array([[2**64 - 1, 5], [5]], type=pa.list_(pa.uint64()))):
        pq.write_table(pa.table({**table, "hash_ids": column}), tmp_path / "t.parquet")
        assert [row.tolist() for row in read_trace(tmp_path / "t.parquet").hash_ids] == [[0, 1], [1]]


def test_a_file_without_ids_says_that_prefix_caching_needs_them(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 5, "output_length": 1}')
    trace = read_mooncake(path)
    assert trace.hash_ids is None
    assert any("engine.prefix_caching=true needs them" in step for step in trace.history)


def test_the_engine_refuses_ids_of_another_number_of_tokens_and_names_the_key(tmp_path):
    trace = read_qwen_bailian(write(tmp_path, [[1, 2], [1, 3]], block_tokens=16))
    assert trace.hash_block_tokens == 16
    with pytest.raises(ConfigError, match=r"one hash id for each 16 tokens.*set engine\.hash_block_tokens=16"):
        check_hash_blocks(EngineConfig(prefix_caching=True), trace)
    check_hash_blocks(EngineConfig(prefix_caching=True, hash_block_tokens=16), trace)
    check_hash_blocks(EngineConfig(prefix_caching=False), trace)


def a_trace(first_id=0, block_tokens=16):
    blocks = [[first_id, first_id + 1], [first_id]]
    return Trace(
        arrival_s=[0.0, 1.0],
        prompt_tokens=[2 * block_tokens, block_tokens],
        output_tokens=[1, 1],
        hash_ids=tuple(np.array(row, dtype=np.int64) for row in blocks),
        hash_block_tokens=block_tokens,
    )


def test_workload_steps_keep_the_unit_of_the_ids():
    trace = a_trace()
    assert [len(row) for row in clip_lengths(trace, max_prompt_tokens=17).hash_ids] == [2, 1]
    assert [len(row) for row in clip_lengths(trace, max_prompt_tokens=16).hash_ids] == [1, 1]
    burst = inject_burst(trace, start_s=0.0, duration_s=1.0, rate_rps=20.0, seed=1, prompt_tokens=64, output_tokens=1)
    assert {len(row) for row in burst.hash_ids} == {1, 2, 4}
    for step in (burst, merge([trace, trace]), repeat(trace, times=2), clip_lengths(trace, max_prompt_tokens=9)):
        assert step.hash_block_tokens == 16
    mixed = merge([trace, a_trace(block_tokens=512)])
    assert mixed.hash_ids is None
    assert "different numbers of tokens" in mixed.history[-1]


def test_workload_steps_keep_prefixes_of_ids_close_to_the_limit():
    trace = a_trace(first_id=2**63 - 2)
    for result in (merge([trace, trace]), repeat(trace, times=2)):
        rows = [row.tolist() for row in result.hash_ids]
        assert len({i for row in rows for i in row}) == 4  # two of each round
        assert min(map(min, rows)) >= 0
    shared = repeat(trace, times=2, share_prefixes=True)
    assert len({i for row in shared.hash_ids for i in row.tolist()}) == 2
