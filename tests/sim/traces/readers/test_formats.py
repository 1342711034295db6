"""A short file of each format: read by its option of conf/trace, recognized by trace=file, its rows checked."""

from __future__ import annotations

import gzip
import json

import pytest
from omegaconf import OmegaConf

from sim.config import build_option, load_option, option_names
from sim.errors import TraceError
from sim.traces.readers.any_format import READERS
from sim.traces.readers.formats import FORMATS

IDS_OF_16 = list(range(700, 733))


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def aiperf_record(start_ns, *, output=7, error=None, phase="profiling", end_ns=None):
    metrics = {
        "input_sequence_length": {"value": 31, "unit": "tokens"},
        "output_sequence_length": {"value": output, "unit": "tokens"},
        "time_to_first_token": {"value": 12.5, "unit": "ms"},
    }
    metadata = {
        "benchmark_phase": phase,
        "request_start_ns": start_ns,
        "request_end_ns": start_ns + 10**9 if end_ns is None else end_ns,
        "was_cancelled": False,
    }
    return {"metadata": metadata, "metrics": {} if error else metrics, "error": error}


VLLM = {
    "backend": "vllm",
    "duration": 9.5,
    "completed": 2,
    "input_lens": [11, 21, 31],
    "output_lens": [6, 7, 0],
    "ttfts": [0.2, 0.1, 0.0],
    "itls": [[0.05] * 5, [0.04] * 6, []],
    "start_times": [501.5, 500.0, 502.0],
    "errors": ["", "", "Bad Gateway"],
}
GUIDELLM = {
    "metadata": {"version": 1},
    "benchmarks": [
        {
            "requests": {
                "successful": [
                    {"request_start_time": 1_800_000_001.5, "prompt_tokens": 21, "output_tokens": 7},
                    {"request_start_time": 1_800_000_000.0, "prompt_tokens": 11, "output_tokens": 6},
                ],
                "errored": [{"request_start_time": 1_800_000_003.0}],
            }
        }
    ],
}

# option -> content, arrivals, prompts, outputs
FILES = {
    "azure_2024": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-12 23:59:59.500000+00:00,11,6\n2024-05-13 00:00:01+00:00,21,7\n2024-05-13 00:00:02+00:00,5,0\n",
        [0.0, 1.5],
    ),
    "azure_multimodal": (
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n"
        "2024-10-15 08:00:00.5000000,3,11,6\n2024-10-15 08:00:02.0000000,0,21,7\n",
        [0.0, 1.5],
    ),
    "vidur": (
        ",arrived_at,num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n0,2.5,11,6,17,1.83\n1,4.0,21,7,28,3.0\n",
        [0.0, 1.5],
    ),
    "splitwise": (
        "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"
        "0,2,0,0.25,1,11,6\n1,2,0,1.75,1,21,7\n",
        [0.0, 1.5],
    ),
    "inference_sim": (
        "request_id,input_tokens,output_tokens,arrival_time_us,send_time_us,first_chunk_time_us,last_chunk_time_us,status\n"
        "0,11,6,500000,500010,600000,700000,ok\n1,21,7,2000000,0,0,0,\n2,9,0,2100000,2100001,0,0,timeout\n",
        [0.0, 1.5],
    ),
    "llmservingsim": (
        lines(
            {"index": 0, "arrival_time_ns": 10**9, "input_toks": 11, "output_toks": 6, "input_tok_ids": [5, 6]},
            {"index": 1, "arrival_time_ns": 25 * 10**8, "input_toks": 21, "output_toks": 7, "input_tok_ids": [5]},
        ),
        [0.0, 1.5],
    ),
    "qwen_bailian": (
        lines(
            {
                "chat_id": 3,
                "parent_chat_id": -1,
                "timestamp": 20.5,
                "input_length": 11,
                "output_length": 6,
                "turn": 1,
                "hash_ids": [9],
            },
            {
                "chat_id": 4,
                "parent_chat_id": 3,
                "timestamp": 22.0,
                "input_length": 21,
                "output_length": 7,
                "turn": 2,
                "hash_ids": [9, 4],
            },
        ),
        [0.0, 1.5],
    ),
    "mooncake": (
        lines(
            {"timestamp": 1_800_000_000_250, "input_length": 11, "output_length": 6},
            {"timestamp": 1_800_000_001_750, "input_length": 21, "output_length": 7},
        ),
        [0.0, 1.5],
    ),
    "vllm_bench": (json.dumps({**VLLM, "input_lens": [21, 11, 31], "output_lens": [7, 6, 0]}), [0.0, 1.5]),
    "guidellm": (json.dumps(GUIDELLM, indent=1), [0.0, 1.5]),
    "aiperf": (
        lines(
            {"timestamp": 250, "text_input": "x" * 44, "output_length": 6},
            {"timestamp": 1750, "text_input": "é" * 84, "output_length": 7},
        ),
        [0.0, 1.5],
    ),
    "burstgpt": (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "40.5,a-1,3.5,GPT-4,11,6,17,API log\n42.0,,,ChatGPT,21,7,28,API log\n43.0,,0,GPT-4,9,0,9,API log\n",
        [0.0, 1.5],
    ),
    "azure_conv": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 18:00:00.5000000,11,6\r\n2023-11-16 18:00:02.0000000,21,7",
        [0.0, 1.5],
    ),
    "file": ("arrival_s,prompt_tokens,output_tokens\n0,11,6\n1.5,21,7\n", [0.0, 1.5]),
}


def write(tmp_path, content, name="trace.any"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(option, path, **changed):
    return build_option("trace", option, {"path": str(path), **changed})


@pytest.mark.parametrize("option", FILES)
def test_each_format_is_read_by_its_option(tmp_path, option):
    content, arrivals = FILES[option]
    trace = read(option, write(tmp_path, content))
    assert trace.arrival_s.tolist() == arrivals
    assert trace.prompt_tokens.tolist() == [11, 21]
    assert trace.output_tokens.tolist() == [6, 7]
    assert read(option, write(tmp_path, gzip.compress(content.encode()))) == trace


@pytest.mark.parametrize("option", FILES)
def test_trace_file_recognizes_each_format(tmp_path, option):
    path = write(tmp_path, FILES[option][0])
    trace = read("file", path)
    assert trace == read(option, path)
    assert trace.name == "trace"
    if option != "file":
        assert "recognized as" in trace.history[-1]


def test_every_option_that_needs_a_file_of_the_user_is_tried_here():
    needs = {name for name in option_names("trace") if OmegaConf.is_missing(load_option("trace", name), "path")}
    assert needs <= set(FILES)
    assert {known.option for known in FORMATS} - {"file", "arxiv_lengths"} == set(READERS)
    assert set(READERS) <= set(option_names("trace"))


# Rows whose fields do not fit each other

MISFITS = {
    "vidur": (
        ",arrived_at,num_prefill_tokens,num_decode_tokens,num_total_tokens\n0,0,11,6,17\n1,1,21,7,29\n",
        3,
        "num_total",
    ),
    "burstgpt": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n1,GPT-4,11,6,17,x\n2,GPT-4,21,7,21,x\n",
        3,
        "Total tokens",
    ),
    "splitwise": ("arrival_timestamp,batch_size,prompt_size,token_size\n0,1,11,6\n1,4,21,7\n", 3, "batch_size"),
    "inference_sim": (
        "input_tokens,output_tokens,arrival_time_us,send_time_us,first_chunk_time_us,last_chunk_time_us\n"
        "11,6,0,5,9,9\n21,7,10,15,30,25\n",
        3,
        "last_chunk_time_us",
    ),
    "llmservingsim": (
        lines(
            {"arrival_time_ns": 0, "input_toks": 11, "output_toks": 6},
            {"arrival_time_ns": 1, "input_toks": 1, "output_toks": 7, "input_tok_ids": [1, 2]},
        ),
        2,
        "input_tok_ids",
    ),
    "qwen_bailian": (
        lines(
            {"timestamp": 0, "input_length": 521, "output_length": 6, "hash_ids": IDS_OF_16},
            {"timestamp": 1, "input_length": 21, "output_length": 7, "hash_ids": [1]},
        ),
        2,
        "hash_ids",
    ),
    "mooncake": (
        lines(
            {"timestamp": 0, "input_length": 512, "output_length": 6, "hash_ids": ["ff"]},
            {"timestamp": 1, "input_length": 513, "output_length": 7, "hash_ids": ["ff"]},
        ),
        2,
        "hash_ids",
    ),
    "aiperf": (lines(aiperf_record(10**18), aiperf_record(10**18 + 5, end_ns=10**18 - 10**6)), 2, "request_end_ns"),
    "guidellm": (
        json.dumps(
            {
                "benchmarks": [
                    {
                        "requests": {
                            "successful": [
                                {"start_time": 5.0, "end_time": 6.0, "prompt_tokens": 1, "output_tokens": 1},
                                {"start_time": 5.0, "end_time": 4.0, "prompt_tokens": 1, "output_tokens": 1},
                            ]
                        }
                    }
                ]
            }
        ),
        2,
        "end_time",
    ),
    "vllm_bench": (json.dumps({**VLLM, "duration": 1.0, "start_times": [500.0, 506.5, 500.0]}), 2, "ttfts"),
    "azure_2024": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-12 10:00:00+00:00,11,6\n2024-05-12 10:00:00.000,21,7\n",
        3,
        "TIMESTAMP",
    ),
    "azure_multimodal": (
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 08:00:00,0,11,6\n2024-10-15 08:00:01,-1,21,7\n",
        3,
        "NumImages",
    ),
}


@pytest.mark.parametrize("option", MISFITS)
def test_a_row_whose_fields_do_not_fit_is_named_or_left_out_and_counted(tmp_path, option):
    content, line, column = MISFITS[option]
    path = write(tmp_path, content)
    with pytest.raises(TraceError, match=rf"{path}, (line|entry) {line}, column '{column}.*trace\.on_bad_row=skip"):
        read(option, path)
    trace = read(option, path, on_bad_row="skip")
    assert len(trace) == 1
    assert any("skipped 1 bad row" in step and column in step for step in trace.history)


# What each format leaves out


def test_requests_without_an_answer_are_dropped_and_counted_or_are_bad_rows(tmp_path):
    for option in ("azure_2024", "burstgpt", "inference_sim", "vllm_bench"):
        path = write(tmp_path, FILES[option][0])
        assert any("dropped 1 failed requests" in step for step in read(option, path).history)
        with pytest.raises(TraceError, match=r"trace\.on_bad_row=skip"):
            read(option, path, failed="error")
        with pytest.raises(TraceError, match=r"trace\.failed is 'dorp'; did you mean 'drop'"):
            read(option, path, failed="dorp")


def test_a_result_of_aiperf_has_the_lengths_really_seen_without_warm_up_and_failures(tmp_path):
    start = 1_763_066_701_865_462_000
    records = [
        aiperf_record(start - 5, phase="warmup"),
        aiperf_record(start + 1_500_000_001),
        aiperf_record(start, output=9),
        aiperf_record(start + 7, error={"message": "timeout"}),
    ]
    trace = read("aiperf", write(tmp_path, lines(*records)))
    assert trace.arrival_s.tolist() == [0.0, 1.500000001]  # exact, although the times have 19 digits
    assert trace.output_tokens.tolist() == [9, 7]
    assert trace.prompt_tokens.tolist() == [31, 31]
    assert sum("left out 1 " in step for step in trace.history) == 2


def test_text_prompts_are_estimated_with_a_warning_that_counts_them(tmp_path, caplog):
    rows = lines(
        {"timestamp": 0, "text_input": "hello world", "output_length": 5},
        {"timestamp": 1, "text_input": "hi", "input_length": 9, "output_length": 5},
    )
    trace = read("aiperf", write(tmp_path, rows))
    assert trace.prompt_tokens.tolist() == [3, 9]
    assert "1 prompts are text without input_length" in caplog.text
    assert read("aiperf", write(tmp_path, rows), characters_per_token=1).prompt_tokens.tolist() == [11, 9]
    with pytest.raises(TraceError, match=r"trace\.characters_per_token"):
        read("aiperf", write(tmp_path, rows), characters_per_token=0)


def test_a_guidellm_file_with_several_benchmarks_asks_which(tmp_path):
    two = {"benchmarks": [GUIDELLM["benchmarks"][0], {"requests": {"successful": []}}]}
    path = write(tmp_path, json.dumps(two))
    with pytest.raises(TraceError, match=r"2 benchmarks.*trace\.benchmark to one of 0 to 1"):
        read("guidellm", path)
    assert "left out 1 errored requests" in read("guidellm", path, benchmark=0).history
    for place, message in ((1, "no successful request"), (2, "benchmarks 0 to 1"), ("x", "benchmarks 0 to 1")):
        with pytest.raises(TraceError, match=message):
            read("guidellm", path, benchmark=place)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_times": None}, "no start_times.*--save-detailed"),
        ({"input_lens": None}, "no input_lens"),
        ({"input_lens": [1]}, "lists of different length"),
        ({"input_lens": 5}, "lists of different length"),
        (
            {"input_lens": [], "output_lens": [], "start_times": [], "errors": [], "itls": [], "ttfts": []},
            "no requests",
        ),
    ],
)
def test_an_incomplete_result_of_vllm_says_what_is_missing(tmp_path, changes, message):
    result = {key: value for key, value in {**VLLM, **changes}.items() if value is not None}
    with pytest.raises(TraceError, match=message):
        read("vllm_bench", write(tmp_path, json.dumps(result)))


def test_several_results_of_vllm_in_one_file_ask_for_one(tmp_path):
    with pytest.raises(TraceError, match=r"line 2.*--append-result wrote, keep one"):
        read("vllm_bench", write(tmp_path, f"{json.dumps(VLLM)}\n{json.dumps(VLLM)}\n"))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("trace_version: 1", "trace_version is 1; allowed: 2, 3"),
        ("trace_version: [3]", "trace_version is .3.; allowed"),
        ("trace_version: 3\nsession_context_growth: Accumulate", "session_context_growth is 'Accumulate'"),
        ("trace_version: 3\nsession_context_growth: accumulate", "no column 'session_id'"),
        ("[", "is not YAML"),
        ("trace_version: 2\ntime_unit: seconds", "time_unit is 'seconds'"),
    ],
)
def test_the_header_of_a_tracev2_is_checked(tmp_path, header, message):
    path = write(tmp_path, FILES["inference_sim"][0], "t.csv")
    write(tmp_path, header, "t.yaml")
    with pytest.raises(TraceError, match=message):
        read("inference_sim", path)
    other = write(tmp_path, "trace_version: 2", "other.yml")
    assert any("version 2 by" in step for step in read("inference_sim", path, header=str(other)).history)
    with pytest.raises(TraceError, match=r"trace\.header"):
        read("inference_sim", other)


def tracev2(*rows: dict[str, object]) -> str:
    """Return rows of a TraceV2; what a row does not state is as inference-sim writes it where there is nothing."""
    names = "session_id,round_index,prefix_group,prefix_length,input_tokens,output_tokens,server_input_tokens"
    empty = dict.fromkeys((*names.split(","), "input_tokens_reset"), 0) | {"session_id": "", "prefix_group": ""}
    cells = [{"arrival_time_us": i, **empty, "output_tokens": 5, **row} for i, row in enumerate(rows)]
    return "\n".join(",".join(map(str, line)) for line in (cells[0], *(row.values() for row in cells))) + "\n"


def test_the_prompt_of_a_tracev2_has_its_prefix_or_the_tokens_that_the_server_counted(tmp_path):
    rows = tracev2(
        {"prefix_group": "system", "prefix_length": 50, "input_tokens": 100},
        {"prefix_length": 50, "input_tokens": 100},  # of no group
        {"input_tokens": 30, "server_input_tokens": 37},  # with the template of the chat
        {"prefix_group": "system", "prefix_length": 50, "input_tokens": 0},
    )
    trace = read("inference_sim", write(tmp_path, rows, "t.csv"))
    assert trace.prompt_tokens.tolist() == [150, 100, 37, 50]
    huge = tracev2({"prefix_group": "system", "prefix_length": 10**9, "input_tokens": 10**9})
    with pytest.raises(TraceError, match=r"line 2, column 'input_tokens': too large with its prefix"):
        read("inference_sim", write(tmp_path, huge, "huge.csv"))


def test_later_rounds_of_a_tracev2_that_accumulates_begin_with_the_rounds_before(tmp_path):
    rows = tracev2(
        {"session_id": "a", "input_tokens": 100, "output_tokens": 50},
        {"session_id": "b", "input_tokens": 60, "prefix_group": "system", "prefix_length": 7},
        {"session_id": "a", "round_index": 1, "input_tokens": 30, "output_tokens": 40},
        {"session_id": "b", "round_index": 1, "input_tokens": 0},
        {"session_id": "a", "round_index": 2, "input_tokens": 0, "input_tokens_reset": 25},
        {"session_id": "a", "round_index": 3, "input_tokens": 1},
        {"input_tokens": 9},  # of no session
    )
    path = write(tmp_path, rows, "t.csv")
    write(tmp_path, "trace_version: 3\nsession_context_growth: accumulate", "t.yaml")
    assert read("inference_sim", path).prompt_tokens.tolist() == [100, 67, 180, 72, 25, 31, 9]
    gap = tracev2({"session_id": "a", "input_tokens": 1}, {"session_id": "a", "round_index": 2, "input_tokens": 1})
    with pytest.raises(TraceError, match=r"line 3, column 'round_index': the round before is missing"):
        read("inference_sim", write(tmp_path, gap, "t.csv"))


def test_seconds_in_a_file_of_milliseconds_are_not_read_as_milliseconds(tmp_path):
    rows = [{"timestamp": t, "input_length": 5, "output_length": 5, "hash_ids": [0]} for t in (0.0, 0.25)]
    path = write(tmp_path, lines(*rows))
    for option in ("mooncake", "mooncake_conversation", "aiperf", "file"):
        with pytest.raises(TraceError, match=r"line 2, column 'timestamp': 0.25 .*trace\.time_unit=s"):
            read(option, path)
        assert read(option, path, time_unit="s").arrival_s.tolist() == [0.0, 0.25]
        assert read(option, path, time_unit="ms").arrival_s.tolist() == [0.0, 0.00025]


def test_a_key_that_a_recognized_format_does_not_take_is_refused(tmp_path):
    with pytest.raises(TraceError, match=r"Vidur CSV \(trace=vidur\), which takes no trace\.time_unit"):
        read("file", write(tmp_path, FILES["vidur"][0]), time_unit="ms")


def test_the_reader_of_another_format_names_the_right_one(tmp_path):
    with pytest.raises(
        TraceError, match=r"this is Splitwise CSV \(trace=splitwise\).*use trace=splitwise trace\.path="
    ):
        read("vidur", write(tmp_path, FILES["splitwise"][0]))


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("file", "sort", "abc"),
        ("file", "rebase", 3),
        ("file", "time_quantum_s", "abc"),
        ("file", "time_quantum_s", -1),
        ("file", "columns", "abc"),
        ("file", "time_unit", 5),
        ("file", "on_bad_row", None),
        ("file", "max_rows", "abc"),
        ("vidur", "max_bytes", 1e9),
        ("vidur", "sort", "yes"),
        ("qwen_bailian", "block_tokens", 0),
        ("qwen_bailian", "block_tokens", "abc"),
        ("mooncake", "time_quantum_s", "abc"),
        ("aiperf", "characters_per_token", "abc"),
        ("azure_2024", "failed", None),
        ("inference_sim", "header", 5),
        ("vidur", "path", 5),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_under_its_key(tmp_path, option, key, value):
    path = write(tmp_path, FILES[option][0])
    with pytest.raises(TraceError, match=rf"trace\.{key} is {value!r}|trace\.columns="):
        build_option("trace", option, {"path": str(path), key: value})
