"""Behavior of sim/traces/readers: published formats, malformed files, and the project's own format."""

from __future__ import annotations

import gzip
import json
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sim.errors import TraceError
from sim.traces.generate import poisson_arrivals
from sim.traces.readers.azure import read_azure
from sim.traces.readers.burstgpt import read_burstgpt
from sim.traces.readers.lengths import read_lengths
from sim.traces.readers.mooncake import read_mooncake
from sim.traces.readers.native import read_trace, write_trace
from sim.traces.readers.servegen import read_client, read_client_lengths, read_servegen
from sim.traces.trace import Trace
from tests.sample import examples

AZURE = "traces/azure2023/AzureLLMInferenceTrace_{}.head_before_1900.csv.gz"
MOONCAKE = "traces/mooncake/conversation_trace.head_before_2400s.jsonl.gz"
BURSTGPT = "traces/burstgpt/burstgpt_segment_744286_744357.csv"
LENGTHS = "traces/lengths/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv.gz"
M_SMALL = "traces/servegen/language/m-small"
DEEPSEEK = "traces/servegen/reason/deepseek-r1"
OWN_HEADER = "arrival_s,prompt_tokens,output_tokens\n"
KINDS = ("csv", "csv.gz", "jsonl", "jsonl.gz", "parquet")

ten_per_second = partial(poisson_arrivals, rate_rps=10.0, duration_s=60.0)


def file_of(tmp_path, content, name="trace.csv"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def own(rows):
    return OWN_HEADER + "\n".join(rows) + "\n"


def azure(rows):
    return "TIMESTAMP,ContextTokens,GeneratedTokens\r\n" + "\r\n".join(rows)


def burstgpt(rows):
    return "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\r\n" + "\r\n".join(rows)


def p50_p95(values):
    return [int(value) for value in np.quantile(values, [0.5, 0.95])]


def busiest_rps(trace, window_s):
    """Most requests of any window that starts at a multiple of its length, a second: the README's peak."""
    return np.bincount((trace.arrival_s // window_s).astype(int)).max() / window_s


# Published files: the table of the data's README


@pytest.mark.parametrize(
    ("kind", "rows", "span_s", "rate_rps", "cv", "peak_rps", "prompts", "outputs"),
    [
        ("code", 7717, 2574.5, 2.998, 12.61, 10.53, [1463, 7154], [13, 88]),
        ("conv", 15606, 2653.3, 5.882, 1.074, 8.45, [1015, 4085], [115, 448]),
    ],
)
def test_azure_traces_have_their_published_statistics(
    data, kind, rows, span_s, rate_rps, cv, peak_rps, prompts, outputs
):
    trace = read_azure(data / AZURE.format(kind))
    assert len(trace) == rows
    assert trace.arrival_s[0] == 0.0
    assert trace.duration_s == pytest.approx(span_s, abs=0.05)
    assert trace.mean_rate_rps == pytest.approx(rate_rps, abs=0.0005)
    assert trace.interarrival_cv == pytest.approx(cv, rel=0.0005)
    assert busiest_rps(trace, 60) == pytest.approx(peak_rps, abs=0.005)
    assert p50_p95(trace.prompt_tokens) == pytest.approx(prompts, abs=1)
    assert p50_p95(trace.output_tokens) == outputs
    assert trace.time_quantum_s == 0.0


def test_the_mooncake_conversation_trace_has_its_published_statistics(data):
    trace = read_mooncake(data / MOONCAKE)
    assert len(trace) == 7851
    assert trace.mean_rate_rps == pytest.approx(3.275, abs=0.0005)
    assert trace.interarrival_cv == pytest.approx(2.971, abs=0.0005)
    assert p50_p95(trace.prompt_tokens) == [7284, 40369]
    assert p50_p95(trace.output_tokens) == [356, 712]
    assert (np.diff(trace.arrival_s) == 0).sum() == 7051
    assert trace.time_quantum_s == 3.0
    assert all(len(ids) == -(-tokens // 512) for ids, tokens in zip(trace.hash_ids, trace.prompt_tokens, strict=True))


def test_the_mooncake_synthetic_trace_has_its_published_statistics(data):
    trace = read_mooncake(data / "traces/mooncake/synthetic_trace.jsonl.gz", time_quantum_s=0.0)
    assert len(trace) == 3993
    assert trace.mean_rate_rps == pytest.approx(3.907, abs=0.0005)
    assert trace.interarrival_cv == pytest.approx(1.011, abs=0.0005)
    assert p50_p95(trace.prompt_tokens) == pytest.approx([11587, 48904], abs=1)


def test_burstgpt_drops_its_failed_request_and_says_so(data):
    trace = read_burstgpt(data / BURSTGPT)
    assert len(trace) == 105
    assert trace.duration_s == 71.0
    assert trace.time_quantum_s == 1.0
    assert p50_p95(trace.prompt_tokens)[0] == 97
    assert any("dropped 1 failed" in step for step in trace.history)
    with pytest.raises(TraceError, match=r"line 3, column 'Response tokens': zero: '0'"):
        read_burstgpt(data / BURSTGPT, failed="error")
    assert len(read_burstgpt(data / BURSTGPT, failed="error", on_bad_row="skip")) == 105


def test_burstgpt_can_be_filtered_by_model_and_log_type(data):
    both = read_burstgpt(data / BURSTGPT)
    one = read_burstgpt(data / BURSTGPT, model="GPT-4")
    assert 0 < len(one) < len(both)
    assert any("whose Model is not 'GPT-4'" in step for step in one.history)
    with pytest.raises(TraceError, match="did you mean 'GPT-4'"):
        read_burstgpt(data / BURSTGPT, model="GPT4")


def test_lengths_of_a_file_take_the_arrivals_of_a_process(data):
    trace = read_lengths(data / LENGTHS, arrivals=ten_per_second, seed=3)
    assert trace == read_lengths(data / LENGTHS, arrivals=ten_per_second, seed=3)
    assert trace != read_lengths(data / LENGTHS, arrivals=ten_per_second, seed=4)
    in_order = read_lengths(data / LENGTHS, arrivals=ten_per_second, seed=3, order="file")
    assert np.array_equal(in_order.arrival_s, trace.arrival_s)
    assert in_order.prompt_tokens[:2].tolist() == [3772, 2015]
    assert in_order.output_tokens[:2].tolist() == [54, 156]
    everything = partial(poisson_arrivals, rate_rps=27_500.0, duration_s=1.0)
    assert read_lengths(data / LENGTHS, arrivals=everything).prompt_tokens.mean() == pytest.approx(2588.1, rel=0.002)
    with pytest.raises(TraceError, match="28,257 usable rows but the arrival process generates"):
        read_lengths(data / LENGTHS, arrivals=partial(poisson_arrivals, rate_rps=1000.0, duration_s=60.0))


# ServeGen


@pytest.mark.parametrize(
    ("folder", "client", "windows", "rate_rps", "idle", "gamma", "prompt", "output"),
    [
        (M_SMALL, 12, 2016, 62.49, 37, 1934, 41, 1),
        (M_SMALL, 41, 2016, 12.71, 37, 1802, 602, 76),
        (DEEPSEEK, 35, 144, 4.58, 28, 64, 369, 2434),
        (DEEPSEEK, 66, 144, 0.48, 1, 69, 76, 8457),
    ],
)
def test_servegen_clients_have_their_published_statistics(
    data, folder, client, windows, rate_rps, idle, gamma, prompt, output
):
    described = read_client(data / folder, client)
    assert len(described.rate_rps) == windows
    assert described.rate_rps.mean() == pytest.approx(rate_rps, abs=0.005)
    assert (described.rate_rps == 0).sum() == idle
    assert described.pattern.count("Gamma") == gamma
    lengths = read_client_lengths(data / folder, client).values()
    middles = (np.arange(100_000) + 0.5) / 100_000
    # Mean over the non-empty 6 h windows, rounded in the README.
    assert np.mean([h[0].draw(middles).mean() for h in lengths]) == pytest.approx(prompt, abs=0.6)
    assert np.mean([h[1].draw(middles).mean() for h in lengths]) == pytest.approx(output, abs=0.6)


def test_servegen_sends_as_many_requests_a_window_as_described(data):
    described = read_client(data / DEEPSEEK, 35)
    trace = read_servegen(data / DEEPSEEK, clients=[35], duration_s=86_400.0)
    counts = np.bincount((trace.arrival_s // 600).astype(int), minlength=144)
    assert counts.tolist() == np.rint(described.rate_rps * 600).astype(int).tolist()


def test_servegen_gaps_have_the_described_burstiness(data):
    described = read_client(data / DEEPSEEK, 35)
    raw = [
        line.split(b",")
        for line in gzip.decompress((data / DEEPSEEK / "chunk-35-trace.csv.gz").read_bytes()).splitlines()
    ]
    described_cv = np.array([float(row[2]) for row in raw])
    trace = read_servegen(data / DEEPSEEK, clients=[35], duration_s=86_400.0, seed=1)
    window = (trace.arrival_s // 600).astype(int)
    drawn_cv = np.array(
        [
            np.diff(trace.arrival_s[window == w]).std() / np.diff(trace.arrival_s[window == w]).mean()
            if (window == w).sum() > 2000
            else np.nan
            for w in range(144)
        ]
    )
    smooth = (described_cv < 3) & ~np.isnan(drawn_cv) & (described.rate_rps > 0)
    assert smooth.sum() > 20
    # A CV estimated from a few thousand heavy-tailed gaps is itself noisy; most are near.
    assert np.median(np.abs(drawn_cv[smooth] / described_cv[smooth] - 1)) < 0.05


def test_servegen_parts_do_not_depend_on_what_else_is_drawn(data):
    stream = read_servegen(data / DEEPSEEK, clients=[35, 30], start_s=36_000.0, duration_s=1200.0, seed=5)
    part = read_servegen(data / DEEPSEEK, clients=[30, 35], start_s=36_600.0, duration_s=300.0, seed=5)
    inside = (stream.arrival_s >= 600.0) & (stream.arrival_s < 900.0)
    assert part.prompt_tokens.tolist() == stream.prompt_tokens[inside].tolist()
    assert np.allclose(part.arrival_s, stream.arrival_s[inside] - 600.0)
    assert part != read_servegen(data / DEEPSEEK, clients=[30, 35], start_s=36_600.0, duration_s=300.0, seed=6)


def test_servegen_rates_can_be_scaled_or_set(data):
    base = read_servegen(data / DEEPSEEK, start_s=36_000.0, duration_s=1200.0)
    double = read_servegen(data / DEEPSEEK, start_s=36_000.0, duration_s=1200.0, rate_scale=2.0)
    assert len(double) == pytest.approx(2 * len(base), rel=0.01)
    ten = read_servegen(data / DEEPSEEK, start_s=36_000.0, duration_s=1200.0, rate_rps=10.0)
    assert len(ten) == pytest.approx(12_000, rel=0.01)


def test_servegen_couples_lengths_as_its_code_does_unless_disabled(data):
    def rank_correlation(trace):
        ranks = [np.argsort(np.argsort(values)) for values in (trace.prompt_tokens, trace.output_tokens)]
        return np.corrcoef(*ranks)[0, 1]

    args = {"clients": [35], "start_s": 36_000.0, "duration_s": 600.0}
    assert rank_correlation(read_servegen(data / DEEPSEEK, **args)) > 0.95
    assert abs(rank_correlation(read_servegen(data / DEEPSEEK, **args, coupled_lengths=False))) < 0.1


def test_servegen_names_the_clients_it_leaves_out_and_those_it_knows(data):
    trace = read_servegen(data / M_SMALL, start_s=36_000.0, duration_s=60.0, rate_scale=0.01)
    assert trace.history[0] == "left out clients [5, 8, 11, 38]: they have no file with lengths"
    with pytest.raises(TraceError, match=r"client 38 does not have both files.*clients with both files, 12, 14"):
        read_servegen(data / M_SMALL, clients=[38])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"start_s": -1.0}, "start_s is -1.0"),
        ({"duration_s": 0.0}, "duration_s is 0.0"),
        ({"rate_scale": 0.0}, "rate_scale is 0.0"),
        ({"rate_rps": -1.0}, "rate_rps is -1.0"),
        ({"start_s": 86_000.0, "duration_s": 600.0}, "describes 0 to 86400 s"),
        ({"clients": [13], "duration_s": 600.0}, "send nothing from 0 s"),
        ({"clients": []}, "clients of .* is empty"),
    ],
)
def test_servegen_refuses_what_the_description_does_not_hold(data, args, message):
    with pytest.raises(TraceError, match=message):
        read_servegen(data / DEEPSEEK, **args)


GOOD_WINDOW = "0,1.0,1.0,Gamma,1.0,1.0\n"
GOOD_LENGTHS = {"0": {"input_tokens": "{5: 1.0}", "output_tokens": "{7: 1.0}"}}


def servegen_folder(tmp_path, *, windows=GOOD_WINDOW, lengths=GOOD_LENGTHS):
    file_of(tmp_path, windows, "chunk-1-trace.csv")
    file_of(tmp_path, lengths if isinstance(lengths, str) else json.dumps(lengths), "chunk-1-dataset.json")
    return tmp_path


def test_servegen_reads_plain_files_too(tmp_path):
    trace = read_servegen(servegen_folder(tmp_path))
    assert len(trace) == 600
    assert set(trace.prompt_tokens) == {5}
    assert set(trace.output_tokens) == {7}


@pytest.mark.parametrize("shape", ["0.01", "0.0001", "50"])
@pytest.mark.parametrize("pattern", ["Gamma", "Weibull"])
def test_servegen_draws_extreme_shapes_without_a_warning(tmp_path, pattern, shape):
    trace = read_servegen(servegen_folder(tmp_path, windows=f"0,1.0,1.0,{pattern},{shape},1.0\n"))
    assert len(trace) == 600
    assert trace.arrival_s[-1] < 600


def test_servegen_raises_lengths_of_zero_to_one_and_says_so(tmp_path):
    lengths = {"0": {"input_tokens": "{5: 1.0}", "output_tokens": "{0: 1.0}"}}
    trace = read_servegen(servegen_folder(tmp_path, lengths=lengths))
    assert set(trace.output_tokens) == {1}
    assert "raised 600 lengths of 0 tokens to 1" in trace.history


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": "0,1.0,1.0,Pareto,1.0,1.0\n"}, r"line 1, column 'pattern': unknown pattern: 'Pareto'; .*Weibull"),
        ({"windows": "0,1.0,1.0,Gamma,0,1.0\n"}, "column 'shape': not positive"),
        ({"windows": "0,x,1.0,Gamma,1.0,1.0\n"}, "column 'rate_rps': not a number: 'x'"),
        ({"windows": GOOD_WINDOW + "900,1.0,1.0,Gamma,1.0,1.0\n"}, "line 2, column 'window_start_s': gap between"),
        ({"windows": "0,1.0\n"}, "wrong number of values"),
        ({"lengths": "[1, 2]"}, "not a ServeGen dataset file"),
        ({"lengths": "{"}, "not a ServeGen dataset file"),
        ({"lengths": {"0": {"input_tokens": "{5: 1.0}"}}}, "not a ServeGen dataset file"),
        ({"lengths": {"0": {"input_tokens": "__import__('os')", "output_tokens": "{}"}}}, "not a histogram"),
        ({"lengths": {"0": {"input_tokens": "[5]", "output_tokens": "{}"}}}, "not a histogram"),
        ({"lengths": {"0": {"input_tokens": "{5: 0.5}", "output_tokens": "{}"}}}, "sum to 0.5"),
        ({"lengths": {"0": {"input_tokens": "{-5: 1.0}", "output_tokens": "{}"}}}, "token counts from -5"),
        ({"lengths": {"0": {"input_tokens": "{}", "output_tokens": "{}"}}}, "has no lengths for that 6 h"),
    ],
)
def test_servegen_names_what_is_wrong_in_its_files(tmp_path, changes, message):
    with pytest.raises(TraceError, match=message):
        read_servegen(servegen_folder(tmp_path, **changes))


# Published formats in small


def test_azure_times_are_exact_to_a_microsecond_over_midnight_with_crlf_and_no_last_line_end(tmp_path):
    rows = ["2023-11-16 23:59:59.9799601,10,1", "2023-11-17 00:00:00.0000000,20,2", "2023-11-17 00:00:01,30,3"]
    trace = read_azure(file_of(tmp_path, azure(rows)))
    assert trace.arrival_s.tolist() == pytest.approx([0.0, 0.0200399, 1.0200399], abs=1e-12)
    assert trace.prompt_tokens.tolist() == [10, 20, 30]


def test_azure_times_with_a_zone_are_understood(tmp_path):
    rows = ["2024-05-10 00:00:00.009930+00:00,10,1", "2024-05-10 02:00:01.009930+02:00,20,2"]
    assert read_azure(file_of(tmp_path, azure(rows))).arrival_s.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "value", ["2023-13-16 18:17:03", "2023-02-30 18:17:03", "4808", "", "nan", "9999-01-01 00:00:00"]
)
def test_a_time_that_is_none_is_named_with_its_line(tmp_path, value):
    rows = ["2023-11-16 18:17:03.9799600,10,1", f"{value},20,2"]
    with pytest.raises(TraceError, match=r"trace.csv, line 3, column 'TIMESTAMP'.*allowed: a time such as"):
        read_azure(file_of(tmp_path, azure(rows)))


def test_burstgpt_counts_failed_and_bad_rows_separately(tmp_path):
    rows = [
        "5,ChatGPT,10,0,10,API log",
        "6,ChatGPT,0,9,9,API log",
        "7,GPT-4,10,-1,9,API log",
        "8,GPT-4,10,4,14,API log",
    ]
    trace = read_burstgpt(file_of(tmp_path, burstgpt(rows)), on_bad_row="skip")
    assert len(trace) == 1
    assert trace.history[1:4] == (
        "skipped 1 bad row: negative in column 'Response tokens', first at line 4",
        "skipped 1 bad row: zero in column 'Request tokens', first at line 3",
        "dropped 1 failed requests (0 response tokens)",
    )


def test_burstgpt_refuses_an_unknown_choice(tmp_path):
    with pytest.raises(TraceError, match="failed is 'dropp'; did you mean 'drop'"):
        read_burstgpt(file_of(tmp_path, burstgpt([])), failed="dropp")


def test_mooncake_checks_that_ids_fit_the_prompt(tmp_path):
    row = {"timestamp": 0, "input_length": 513, "output_length": 5, "hash_ids": [1]}
    with pytest.raises(TraceError, match="line 1, column 'hash_ids': wrong number of ids"):
        read_mooncake(file_of(tmp_path, json.dumps(row), "trace.jsonl"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"timestamp": 0, "input_length": 5, "output_length": 5', "line 2, column 'all': not a JSON object"),
        ("[1, 2]", "not a JSON object"),
        ("", "blank line"),
        ('{"timestamp": 0, "input_length": 5, "hash_ids": [0]}', "column 'output_length': missing value"),
        (
            '{"timestamp": NaN, "input_length": 5, "output_length": 5, "hash_ids": [0]}',
            "'timestamp': not finite: 'nan'",
        ),
        ('{"timestamp": 0, "input_length": "5", "output_length": 5, "hash_ids": [0]}', "'input_length'"),
        ('{"timestamp": 0, "input_length": true, "output_length": 5, "hash_ids": [0]}', "'input_length': not a number"),
        ('{"timestamp": 0, "input_length": 5.5, "output_length": 5, "hash_ids": [0]}', "not a whole number: '5.5'"),
        ('{"timestamp": 0, "input_length": 1' + "0" * 400 + ', "output_length": 5, "hash_ids": [0]}', "too large"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [true]}', "not a list of ids"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": 7}', "'hash_ids': not a list of ids"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [[1]]}', "'hash_ids': not a list of ids"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": null}', "'hash_ids'"),
    ],
)
def test_a_bad_json_line_is_named_and_can_be_skipped(tmp_path, line, message):
    good = '{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [0]}'
    path = file_of(tmp_path, f"{good}\n{line}\n{good}\n", "trace.jsonl")
    with pytest.raises(TraceError, match="line 2, ") as caught:
        read_mooncake(path)
    assert message in str(caught.value)
    assert len(read_mooncake(path, on_bad_row="skip")) == 2


# Malformed files of the own format


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("x", "not a number"),
        ("1_000", "not a number"),
        ("0x10", "not a number"),
        ("", "missing value"),
        ("nan", "not finite"),
        ("-inf", "not finite"),
        ("-5", "negative"),
        ("0", "zero"),
        ("2.5", "not a whole number"),
        ("1e30", "too large"),
        ("1e999", "too large"),
        ("1000000001", "too large"),
    ],
)
@pytest.mark.parametrize("column", ["prompt_tokens", "output_tokens"])
def test_a_bad_cell_names_file_line_column_value_and_what_is_allowed_or_is_counted(
    tmp_path, caplog, value, kind, column
):
    cells = {"prompt_tokens": "10", "output_tokens": "20", column: value}
    bad = f"2.0,{cells['prompt_tokens']},{cells['output_tokens']}"
    path = file_of(tmp_path, own(["1.0,1,1", bad, "3.0,3,3"]))
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    message = str(caught.value)
    assert f"{path}, line 3, column '{column}': {kind}: '{value}'" in message
    assert "allowed: a whole number from 1 to 1,000,000,000" in message
    assert "on_bad_row=skip" in message
    trace = read_trace(path, on_bad_row="skip")
    assert trace.arrival_s.tolist() == [1.0, 3.0]
    counted = f"skipped 1 bad row: {kind} in column '{column}', first at line 3"
    assert counted in trace.history
    assert counted in caplog.text


@pytest.mark.parametrize(("value", "kind"), [("-1", "negative"), ("nan", "not finite"), ("1.7e9", "too large")])
def test_a_bad_arrival_is_named(tmp_path, value, kind):
    with pytest.raises(TraceError, match=f"line 2, column 'arrival_s': {kind}"):
        read_trace(file_of(tmp_path, own([f"{value},1,1"])))


@pytest.mark.parametrize("row", ["1.0,2", "1.0,2,3,4", ""])
def test_a_row_with_the_wrong_number_of_values_is_named_with_its_line(tmp_path, row):
    path = file_of(tmp_path, own(["1.0,1,1", row, "3.0,3,3", "x,1,1"]))
    with pytest.raises(TraceError, match="line 3, "):
        read_trace(path)
    trace = read_trace(path, on_bad_row="skip")
    assert len(trace) == 2
    assert any("first at line 5" in step for step in trace.history)


def test_a_row_that_is_bad_twice_counts_once_and_the_first_row_of_the_file_is_named(tmp_path):
    path = file_of(tmp_path, own(["1.0,1,1", "2.0,1,0", "x,y,z", "4.0,1,1"]))
    with pytest.raises(TraceError, match=r"line 3, column 'output_tokens': zero.*\(1 more rows are bad\)"):
        read_trace(path)
    assert [s for s in read_trace(path, on_bad_row="skip").history if "skipped" in s] == [
        "skipped 1 bad row: not a number in column 'arrival_s', first at line 4",
        "skipped 1 bad row: zero in column 'output_tokens', first at line 3",
    ]


def test_rows_out_of_order_are_an_error_unless_they_are_sorted(tmp_path):
    path = file_of(tmp_path, own(["5.0,1,1", "2.0,2,2", "5.0,3,3"]))
    for on_bad_row in ("error", "skip"):
        with pytest.raises(TraceError, match=r"line 3: arrives at 2 s, before .* \(5 s\).*sort=true"):
            read_trace(path, on_bad_row=on_bad_row)
    trace = read_trace(path, sort=True)
    assert trace.prompt_tokens.tolist() == [2, 1, 3]
    assert any("sorted by arrival (1 rows" in step for step in trace.history)


@pytest.mark.parametrize("content", [b"", b"\n\n", b" ", gzip.compress(b"", mtime=0)])
def test_an_empty_file_is_an_error(tmp_path, content):
    with pytest.raises(TraceError, match="is empty"):
        read_trace(file_of(tmp_path, content))


@pytest.mark.parametrize("content", [OWN_HEADER, OWN_HEADER + "\n\n"])
def test_a_header_without_rows_is_an_error(tmp_path, content):
    with pytest.raises(TraceError, match="no requests"):
        read_trace(file_of(tmp_path, content))


def test_a_file_whose_rows_are_all_bad_is_an_error_even_when_they_are_skipped(tmp_path):
    with pytest.raises(TraceError, match=r"no usable request.*skipped 2 bad rows"):
        read_trace(file_of(tmp_path, own(["x,1,1", "y,1,1"])), on_bad_row="skip")


@pytest.mark.parametrize("cut", [5, 30, -9, -1])
def test_a_truncated_or_damaged_gzip_is_an_error(tmp_path, cut):
    stream = gzip.compress(own([f"{i},1,1" for i in range(100)]).encode())
    with pytest.raises(TraceError, match="broken gzip"):
        read_trace(file_of(tmp_path, stream[:cut]))
    damaged = bytearray(stream)
    damaged[len(stream) // 2] ^= 0xFF
    with pytest.raises(TraceError, match="broken gzip"):
        read_trace(file_of(tmp_path, bytes(damaged)))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("arival_s,prompt_tokens,output_tokens", "no column 'arrival_s'.*for 'arival_s': did you mean 'arrival_s'"),
        ("arrival_s,prompt_token,output_tokens", "did you mean 'prompt_tokens'"),
        ("a,b,c", "no column 'arrival_s' in the header 'a,b,c'; allowed: arrival_s"),
        ("arrival_s", "add prompt_tokens, output_tokens"),
        ("arrival_s,arrival_s,prompt_tokens,output_tokens", "column 'arrival_s' appears twice"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens", r"this is Azure 2023 CSV \(trace=azure_conv"),
        ("1.0,10,20", "no column 'arrival_s', because '1.0,10,20' holds values.*write the header arrival_s,"),
    ],
)
def test_a_wrong_header_names_the_nearest_right_one(tmp_path, header, message):
    with pytest.raises(TraceError, match=message):
        read_trace(file_of(tmp_path, header + "\n1,2,3\n"))


def test_a_json_field_with_a_wrong_name_names_the_nearest_right_one(tmp_path):
    with pytest.raises(TraceError, match="for 'prompt_token': did you mean 'prompt_tokens'"):
        read_trace(file_of(tmp_path, '{"arrival_s": 1, "prompt_token": 2, "output_tokens": 3}', "t.jsonl"))


def test_bytes_that_are_not_utf8_are_named_or_cost_only_their_row(tmp_path):
    path = file_of(tmp_path, OWN_HEADER.encode() + b"1.0,1,1\n2.0,\xff,2\n3.0,3,3\n")
    with pytest.raises(TraceError, match="line 3, value 2: byte 0xff is not UTF-8"):
        read_trace(path)
    assert len(read_trace(path, on_bad_row="skip")) == 2


def test_binary_rubbish_is_a_trace_error(tmp_path):
    rng = np.random.default_rng(0)
    for size in (10, 1000, 100_000):
        for on_bad_row in ("error", "skip"):
            with pytest.raises(TraceError):
                read_trace(file_of(tmp_path, rng.bytes(size)), on_bad_row=on_bad_row)
            with pytest.raises(TraceError):
                read_trace(file_of(tmp_path, b"{" + rng.bytes(size)), on_bad_row=on_bad_row)
            with pytest.raises(TraceError):
                read_trace(file_of(tmp_path, b"PAR1" + rng.bytes(size)), on_bad_row=on_bad_row)


def test_a_missing_file_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(TraceError, match="does not exist"):
        read_trace(tmp_path / "absent.csv")
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path)


@pytest.mark.parametrize(
    ("read", "repository"),
    [
        (read_azure, "Azure/AzurePublicDataset"),
        (read_burstgpt, "HPMLL/BurstGPT"),
        (read_mooncake, "kvcache-ai/Mooncake"),
        (read_servegen, "alibaba/ServeGen"),
        (partial(read_lengths, arrivals=ten_per_second), "microsoft/vidur"),
    ],
)
def test_absent_published_data_names_the_repository_and_the_variable(monkeypatch, tmp_path, read, repository):
    monkeypatch.setenv("RAP_LAB_DATA", str(tmp_path))
    with pytest.raises(TraceError) as caught:
        read("traces/absent.csv")
    for expected in (repository, "RAP_LAB_DATA", "not part of this project", str(tmp_path), "trace=burst"):
        assert expected in str(caught.value)


def test_data_is_found_below_the_folder_that_the_variable_names(monkeypatch, tmp_path):
    (tmp_path / "traces").mkdir()
    file_of(tmp_path / "traces", own(["1.0,1,1"]), "mine.csv")
    monkeypatch.setenv("RAP_LAB_DATA", str(tmp_path))
    trace = read_trace("traces/mine.csv")
    assert trace.source == "traces/mine.csv"
    assert trace.name == "mine"


def test_an_unknown_on_bad_row_names_the_choices(tmp_path):
    with pytest.raises(TraceError, match="on_bad_row is 'skipp'; did you mean 'skip'"):
        read_trace(file_of(tmp_path, own(["1,1,1"])), on_bad_row="skipp")


# The own format, written and read back

traces = st.integers(1, 30).flatmap(
    lambda n: st.builds(
        lambda arrivals, prompts, outputs, ids: Trace(
            arrival_s=sorted(arrivals),
            prompt_tokens=prompts,
            output_tokens=outputs,
            hash_ids=None if ids is None else tuple(np.array(row, dtype=np.int64) for row in ids),
        ),
        st.lists(st.floats(0, 1e9), min_size=n, max_size=n),
        st.lists(st.integers(1, 10**9), min_size=n, max_size=n),
        st.lists(st.integers(1, 10**9), min_size=n, max_size=n),
        st.none() | st.lists(st.lists(st.integers(0, 2**53), max_size=4), min_size=n, max_size=n),
    )
)


@pytest.mark.parametrize("kind", KINDS)
@settings(examples(30), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trace=traces)
def test_writing_and_reading_gives_an_equal_trace_with_an_equal_hash(tmp_path, kind, trace):
    path = write_trace(trace, tmp_path / f"trace.{kind}")
    again = read_trace(path)
    assert again == trace
    assert again.content_hash() == trace.content_hash()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_traces_make_equal_files_and_leave_nothing_else(tmp_path, kind):
    trace = Trace(arrival_s=[0.1, 0.2], prompt_tokens=[1, 2], output_tokens=[3, 4])
    first = write_trace(trace, tmp_path / f"a.{kind}").read_bytes()
    assert write_trace(trace, tmp_path / f"b.{kind}").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{kind}", f"b.{kind}"]


@pytest.mark.parametrize("name", ["trace.txt", "trace", "trace.gz", "trace.parquet.gz"])
def test_an_unknown_ending_is_an_error_that_names_the_known_ones(tmp_path, name):
    trace = Trace(arrival_s=[0.0], prompt_tokens=[1], output_tokens=[1])
    with pytest.raises(TraceError, match=r"\.csv.*\.parquet"):
        write_trace(trace, tmp_path / name)


def test_a_real_trace_with_prefix_ids_survives_all_kinds_of_file(data, tmp_path):
    trace = read_mooncake(data / MOONCAKE)
    for kind in KINDS:
        assert read_trace(write_trace(trace, tmp_path / f"trace.{kind}")) == trace


def test_arrivals_of_the_own_format_keep_their_zero_unless_rebased(tmp_path):
    path = file_of(tmp_path, own(["5.0,1,1", "7.0,1,1"]))
    assert read_trace(path).arrival_s.tolist() == [5.0, 7.0]
    assert read_trace(path, rebase=True).arrival_s.tolist() == [0.0, 2.0]


def test_quoted_headers_a_byte_order_mark_and_other_columns_do_no_harm(tmp_path):
    content = b'\xef\xbb\xbf"output_tokens","note","arrival_s","prompt_tokens"\r\n3,"a,b", 1.5 ,2\r\n'
    trace = read_trace(file_of(tmp_path, content))
    assert (trace.arrival_s[0], trace.prompt_tokens[0], trace.output_tokens[0]) == (1.5, 2, 3)


def test_a_parquet_file_with_gaps_wrong_types_or_names_is_an_error_with_its_row(tmp_path):
    path = tmp_path / "trace.parquet"
    pq.write_table(pa.table({"arrival_s": [0.0, None], "prompt_tokens": [1, 2], "output_tokens": [1, 2]}), path)
    with pytest.raises(TraceError, match="row 2, column 'arrival_s': missing value"):
        read_trace(path)
    assert len(read_trace(path, on_bad_row="skip")) == 1
    pq.write_table(pa.table({"arrival_s": ["x"], "prompt_tokens": [[1]], "output_tokens": [1]}), path)
    with pytest.raises(TraceError, match="row 1, column 'arrival_s': not a number: 'x'"):
        read_trace(path)
    pq.write_table(pa.table({"arrival": [1.0], "prompt_tokens": [1], "output_tokens": [1]}), path)
    with pytest.raises(TraceError, match=r"no column 'arrival_s'.*did you mean 'arrival_s'"):
        read_trace(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TraceError, match="broken Parquet"):
        read_trace(path)


def test_a_parquet_file_is_recognized_by_its_content_not_its_name(tmp_path):
    trace = Trace(arrival_s=[0.5], prompt_tokens=[1], output_tokens=[1])
    path = write_trace(trace, tmp_path / "a.parquet").rename(tmp_path / "a.csv")
    assert read_trace(path) == trace


@given(
    content=st.binary(max_size=200) | st.text(alphabet="0123456789.,-\n\r\"'eExna{}:[] ", max_size=200).map(str.encode)
)
def test_whatever_follows_the_header_either_reads_or_is_a_trace_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(OWN_HEADER.encode() + content)
    for on_bad_row in ("error", "skip"):
        try:
            assert len(read_trace(path, on_bad_row=on_bad_row)) > 0
        except TraceError:
            continue
