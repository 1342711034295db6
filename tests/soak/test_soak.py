"""The harness itself: a few dozen inputs of each kind, and what it makes of runs that break."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="the real engine needs torch: pip install -e '.[hw]'")

from tests.soak import inputs
from tests.soak.kinds import Case, judge
from tests.soak.mutate import mutate_json, to_json
from tests.soak.page import input_table
from tests.soak.run_files import differences, half_written, results
from tests.soak.saturation import growth

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
