"""The harness itself: a few dozen inputs of each kind, and what it makes of runs that break."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="the real engine needs torch: pip install -e '.[hw]'")

from tests.soak import disk, figures, inputs, kills
from tests.soak.commands import replay_command
from tests.soak.kinds import Case, judge
from tests.soak.loopback import HOST, metrics
from tests.soak.mutate import mutate_json, to_json
from tests.soak.page import input_table
from tests.soak.run_files import differences, half_written, results
from tests.soak.saturation import LEAVE_SHARE, Load, growth, seen_of_the_server

IN_PROCESS = [kind for kind in inputs.SHARES if kind != "http"]
FEW = 40


@pytest.mark.parametrize("kind", IN_PROCESS)
def test_hostile_inputs_are_accepted_or_refused_with_one_line(kind: str, tmp_path: Path) -> None:
    made = inputs.build(kind, tmp_path)
    faults = {}
    for number in range(FEW):
        outcome = judge(made, inputs.case_of(made, number))
        if outcome.verdict == "fault":
            faults[number] = outcome
    made.close()
    assert faults == {}


@pytest.mark.parametrize("kind", IN_PROCESS)
def test_an_input_is_made_from_its_kind_and_number_alone(kind: str, tmp_path: Path) -> None:
    made = inputs.build(kind, tmp_path)
    cases = [inputs.case_of(made, number) for number in range(20)]
    assert cases == [inputs.case_of(made, number) for number in range(20)]
    made.close()


@given(st.integers(0, 10**6))
def test_a_changed_value_can_be_written_as_json_text(seed: int) -> None:
    rng = random.Random(seed)
    assert to_json(mutate_json({"a": [1, 2.5, "x", None, {"b": True}], "c": {}}, rng), rng)


def test_a_process_that_ends_is_one_fault_and_the_other_inputs_are_fed() -> None:
    tally = inputs.feed("ending_input:Ends", 0, 7, limited=False)
    assert tally.verdicts == {"accepted": 6, "fault": 1}
    assert list(tally.faults) == ["it: the process ended (status 9)"]
    assert tally.faults["it: the process ended (status 9)"]["number"] == 3


def test_a_slice_with_a_fault_is_played_again_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = []

    def fed(kind: str, first: int, count: int) -> inputs.Tally:
        played.append(first)
        tally = inputs.Tally()
        if first == 10:
            tally.add_fault("it: broke", 11, "", Case("it", b""))
        return tally

    monkeypatch.setattr(inputs, "feed", fed)
    for _ in range(2):
        content = inputs.run(30, 10, tmp_path / "inputs.json", kinds=["plans"], say=lambda _: None)
    assert played == [0, 10, 20, 10]
    assert "| plans" in input_table(content)
    inputs.run(25, 10, tmp_path / "inputs.json", kinds=["plans"], first=30, say=lambda _: None)
    assert played[4:] == [30, 40, 50]


def test_cut_files_are_half_written_and_equal_runs_have_equal_results(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        pa_parquet.write_table(pa.table({"a": [1, 2]}), tmp_path / name / "records.parquet")
        (tmp_path / name / "summary.json").write_text(json.dumps({"cpu_s": len(name), "finished": 2}))
    one, other = tmp_path / "one", tmp_path / "other"
    assert half_written(one) == []
    assert differences(results(one), results(other)) == {"summary.json:cpu_s"}
    content = (one / "records.parquet").read_bytes()
    (one / "records.parquet").write_bytes(content[:-3])
    (one / "summary.json").write_text("{")
    assert [line.split(":")[0] for line in half_written(one)] == ["records.parquet", "summary.json"]


def test_growth_is_the_slope_after_the_first_minutes() -> None:
    rows = [
        {"time_s": 10.0 * i, "resident_mb": 500 + max(0, 60 - i) + 0.01 * i, "arrived": 100.0 * i} for i in range(720)
    ]
    found = growth(rows, 7200.0)
    assert found["mb_per_hour"] == pytest.approx(3.6)
    assert found["bytes_per_request"] == pytest.approx(100.0)


def test_clients_leave_the_share_that_is_wanted_although_many_requests_are_refused() -> None:
    answered = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal answered
        answered += 1
        length = (await reader.readuntil(b"\r\n\r\n")).rpartition(b"content-length: ")[2]
        body = json.loads(await reader.readexactly(int(length)))
        if answered % 8 == 0:
            writer.write(b"HTTP/1.1 429 Too Many Requests\r\n\r\n")
        elif "stream" in body:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + b"data: 1\n\n" * 10 + b"data: [DONE]\n\n")
        else:
            await asyncio.sleep(0.3)
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n{}")
        writer.close()

    async def run() -> Load:
        server = await asyncio.start_server(answer, HOST, 0)
        load = Load(server.sockets[0].getsockname()[1], 1, duration_s=60.0)
        tasks = [asyncio.create_task(load.client()) for _ in range(20)]
        while load.sent < 400 and load.goes_on():
            await asyncio.sleep(0.01)
        load.end()
        await asyncio.gather(*tasks)
        server.close()
        return load

    load = asyncio.run(run())
    assert load.left.total() / load.sent == pytest.approx(LEAVE_SHARE, abs=0.08)
    assert load.left.keys() == {"streamed", "not streamed"}
    assert load.statuses[429] > 20
    assert load.left.total() + load.statuses.total() == load.sent
    assert load.unanswered == load.cut == 0
    assert load.until_s < load.start_s + 60.0


def test_metrics_are_added_over_the_labels_that_are_wanted() -> None:
    text = """# TYPE vllm:request_success counter
vllm:request_success_total{finished_reason="abort",model_name="a"} 2.0
vllm:request_success_total{finished_reason="stop",model_name="a"} 3.0
"""
    assert metrics(text) == {"vllm:request_success_total": 5.0}
    assert metrics(text, 'finished_reason="abort"') == {"vllm:request_success_total": 2.0}


def test_the_figures_of_a_server_count_what_it_accepted_by_how_it_ended() -> None:
    counts = {"stop": 1.0, "length": 2.0, "abort": 3.0, "error": 4.0}
    others = ("arrived", "tokens", "cpu_s", "running", "waiting", "kv_used", "file_descriptors", "threads")
    rows = [{"time_s": float(t), "resident_mb": 5.0, **dict.fromkeys(others, float(t)), **counts} for t in range(9)]
    found = seen_of_the_server(rows, 6.0)
    assert found["accepted"] == 10.0
    assert found["accepted_by_end"] == counts
    assert found["load_s"] == 6.0
    assert found["mean_running"] == 5.0  # of the samples from a third of the time on


def test_figures_of_one_command_are_added_to_those_of_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "disk.json"
    figures.add(path, "commands", "one", {"runs": 1, "faults": ["a", "b"]})
    content = figures.add(path, "commands", "other", {"runs": 2, "faults": ["c"]})
    assert content == figures.read(path)
    assert content["faults"] == 3
    assert content["commands"]["one"]["runs"] == 1
    assert content["commands"]["other"]["machine"]


def test_runs_with_other_weights_or_other_files_are_not_equal(tmp_path: Path) -> None:
    for name in ("one", "other"):
        for file in ("best/policy.safetensors", "checkpoint_000002/module_state.pkl", "checkpoint_000002/state.pkl"):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(b"same")
    one, other = tmp_path / "one", tmp_path / "other"
    (other / "checkpoint_000002/state.pkl").write_bytes(b"times")
    assert differences(results(one), results(other)) == set()
    (other / "best/policy.safetensors").write_bytes(b"else")
    (other / "checkpoint_000001").mkdir()
    (other / "checkpoint_000001/metadata.json").write_text('{"class": "a"}')
    expected = {"best/policy.safetensors", "checkpoint_000001/metadata.json:class"}
    assert differences(results(one), results(other)) == expected


def test_a_full_disk_must_leave_the_figures_unless_the_error_is_one_that_comes_before(tmp_path: Path) -> None:
    case = disk.Case(replay_command("trace=small"), "SLO_attainment", before="set TMPDIR")
    error = "error: a.json: File too large\n"
    outcomes = {
        "nothing": error,
        "figures": "SLO_attainment 57 %\n" + error,
        "earlier": "error: no room; set TMPDIR\n",
        "two lines": "SLO_attainment 57 %\n" + 2 * error,
        "traceback": "Traceback (most recent call last)\n" + error,
    }
    found = {name: disk.Found() for name in outcomes}
    for name, printed in outcomes.items():
        disk._judge(case, tmp_path, 64, 2, printed, found[name], set())
    assert {name: [fault["what"] for fault in one.faults] for name, one in found.items()} == {
        "nothing": ["figures are lost"],
        "figures": [],
        "earlier": [],
        "two lines": ["no error of one line"],
        "traceback": ["traceback"],
    }
    assert found["figures"].after_figures == found["earlier"].at_once == 1


def test_limits_of_a_full_disk_rise_from_nothing() -> None:
    limits = list(disk.limits())
    assert limits[:2] == [0, 1]
    assert limits == sorted(set(limits))
    assert limits[-1] > 2**33


@pytest.mark.parametrize(
    ("status", "printed", "taken", "complete"),
    [
        (0, "files: a\n", True, 0),
        (0, "job 0 (seed=0): skipped, a holds this run already\nfiles: b\n", True, 1),
        (2, "error: a already holds a run (summary.json); delete it\n", True, 1),
        (1, "error: job 0 (seed=0): a already holds a run (summary.json)\nerror: 1 of 3 jobs failed\n", False, 0),
        (2, "error: a is damaged\n", False, 0),
        (0, "Traceback (most recent call last):\n", False, 0),
    ],
    ids=["runs", "skips complete jobs", "refuses a complete run", "fails at complete jobs", "fails", "traceback"],
)
def test_a_killed_command_must_run_again_unless_it_was_complete(
    status: int, printed: str, taken: bool, complete: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = SimpleNamespace(wait=lambda: status, text=lambda: printed)
    monkeypatch.setattr(kills, "start", lambda *_: child)
    scenario, found = kills.Scenario("replay", replay_command("trace=small"), 1.0), kills.Count()
    assert kills._again(scenario, tmp_path, tmp_path / "printed", found) is taken
    assert found.complete_already == complete
    assert len(found.faults) == (not taken)
