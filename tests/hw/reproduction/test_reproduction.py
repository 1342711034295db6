"""``python -m hw.reproduction``: rows one by one, the page from their files, and what it says without data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hw.reproduction import memory, rtx3090, splitwise, watermark
from hw.reproduction.page import page
from hw.reproduction.run import ROWS, main
from hw.reproduction.tensor_parallel import Step, fitted, scaled
from sim.cost.latency import load_calibration
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan
from sim.errors import CalibrationError
from sim.paths import RESULTS
from sim.traces.trace import Trace
from tests.commands import exit_status

FOLDER = RESULTS / "reproduction"


def committed() -> dict[str, Any]:
    return {name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in ROWS}


def test_the_committed_page_is_that_of_the_committed_figures_and_has_every_row() -> None:
    assert page(committed()) == (FOLDER / "index.md").read_text(encoding="utf-8")
    for content in committed().values():
        assert content["command"] in (FOLDER / "index.md").read_text(encoding="utf-8")


def test_one_row_is_written_and_printed_and_the_page_keeps_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(main, "row=rap_memory", f"out={tmp_path}") == 0
    assert "22.07" in capsys.readouterr().out
    (tmp_path / "vllm_watermark.json").write_text((FOLDER / "vllm_watermark.json").read_text())
    before = (tmp_path / "rap_memory.json").stat().st_mtime_ns
    assert exit_status(main, "row=[rap_memory]", f"out={tmp_path}") == 0
    assert "watermark" not in capsys.readouterr().out
    assert "watermark" in (tmp_path / "index.md").read_text()
    assert (tmp_path / "rap_memory.json").stat().st_mtime_ns == before  # the same figures: the file stays


def test_a_row_whose_data_is_not_here_is_left_out_and_the_others_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(main, "row=[distserve,rap_memory]", "data=/nowhere", f"out={tmp_path}") == 1
    said = capsys.readouterr()
    assert "row distserve is left out: " in said.err
    assert "22.07" in said.out
    assert [path.name for path in sorted(tmp_path.glob("*.json"))] == ["rap_memory.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("row=rap", "there is no row 'rap'"),
        ("row=5", "row is 5; it must be a text"),
        ("row=null", "row is empty"),
        ("row=[rap_memory,distsrve]", "did you mean 'distserve'"),
        ("workers=0 row=rap_memory", "workers is 0; it must be at least 1"),
        ("row=distserve data=/nowhere", "RAP_LAB_DATA"),
        ("row=splitwise data=/nowhere", "RAP_LAB_DATA"),
        ("row=morphserve_rtx3090 data=/nowhere", "RAP_LAB_DATA"),
        ("row=llmservingsim data=/nowhere", "RAP_LAB_DATA"),
    ],
)
def test_what_cannot_be_reproduced_is_one_line(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(main, *words.split(), f"out={tmp_path / 'out'}") == 2
    error = capsys.readouterr().err
    assert message in error
    assert sum(line.startswith("error:") for line in error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_memory_of_raps_masks_is_the_published_one() -> None:
    content = memory.rap()
    assert max(abs(row["difference"]) for row in content["rows"]) < 0.01
    assert max(abs(row["share of dense"] - row["expected"]) for row in content["shares"]) < 5e-4
    assert abs(memory.kv_blocks()["llama3_blocks_here"] - 2599) <= 1


def test_a_capacity_table_without_the_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="RAP_LAB_DATA"):
        memory.distserve(tmp_path / "no.csv")


def test_a_watermark_lowers_preemptions_on_a_smaller_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watermark, "REQUESTS", 60)
    monkeypatch.setattr(watermark, "USERS", 24)
    monkeypatch.setattr(watermark, "KV_TOKENS", 29_952)
    monkeypatch.setattr(watermark, "OUTPUT_TOKENS", 1000)
    counts = [watermark.figures(watermark.served(share, 1e-3, 0))[0] for share in (0.0, 0.05, 0.15)]
    assert counts[0] > counts[1] >= counts[2]


def test_the_rule_of_the_rtx_3090_switches_all_layers_at_once_and_back_when_the_load_ends() -> None:
    """A burst fills the KV of FP16; later only one request comes now and then."""
    arrivals = np.concatenate([np.repeat(np.arange(6) * 2.0, 4), 120 + 10.0 * np.arange(6)])
    trace = Trace(arrival_s=arrivals, prompt_tokens=np.full(30, 1024), output_tokens=np.full(30, 512))
    engine, figures = rtx3090.dynamic(load_calibration("llama3.1_8b_rtx3090"), trace, 0.2)
    assert len(figures["to_w4_s"]) == len(figures["to_fp16_s"]) == 1
    (down_s, down_ready_s), (up_s, up_ready_s) = figures["to_w4_s"][0], figures["to_fp16_s"][0]
    assert 0 < down_s < 30
    assert up_s > down_ready_s
    # The copies of 16 layers, and at most the iteration under way when it was decided.
    assert 0.66 <= down_ready_s - down_s < 3.5
    assert 1.52 <= up_ready_s - up_s < 1.7
    assert {round(share, 3) for _, share in engine.kept_share()} >= {1.0}


def test_two_numbers_are_found_again_from_steps_they_made_and_judged_where_they_were_not_fitted() -> None:
    model = load_model("llama2_70b")
    plan = dense_plan(model)
    models = {tp: load_calibration(f"llama2_70b_h100_tp{tp}") for tp in (2, 4, 8)}
    steps = []
    for tp, latency in models.items():
        slow = scaled(latency, 1.4, 22.0)
        for step in (
            *(Step(kind="decode", tp=tp, ms=1.0, decodes=n, context_sum=600 * n) for n in (1, 16, 64)),
            *(Step(kind="one prompt", tp=tp, ms=1.0, chunks=(n,)) for n in (128, 512, 2048)),
        ):
            wrong = 2.0 if tp == 4 and step.kind == "decode" else 1.0  # at a degree that the fit does not see
            steps.append(replace(step, ms=wrong * step.predicted_ms(slow, plan)))
    found = fitted(models, plan, steps)
    assert found["factor"] == pytest.approx(1.4, rel=0.01)
    assert found["floor_ms"] == pytest.approx(22.0, rel=0.01)
    assert found["seen"] == [2, 8]
    for row in found["rows"]:
        wrong = row["GPUs"] == 4 and row["step"] == "decode"
        assert row["seen by the fit"] == (row["GPUs"] != 4)
        assert row["largest"] == pytest.approx(0.5 if wrong else 0.0, abs=0.01)


def test_measured_batches_that_did_not_do_what_they_state_are_left_out() -> None:
    rows = [
        (1, 128, 100.0, 50.0, 100 + 127 * 50.0),
        (2, 128, 210.0, 50.0, 210 + 127 * 50.0),
        (4, 128, 120.0, 50.0, 9000.0),  # the time of a part of its prompts
        (1, 1024, 100.0, 50.0, 100 + 900 * 50.0),  # ended after 901 of 1,024 tokens
    ]
    names = ["batch_size", "token_size", "prompt_time", "token_time", "e2e_time"]
    table = pd.DataFrame(rows, columns=names).assign(tensor_parallel=2, prompt_size=512)
    assert splitwise._consistent(table.sample(frac=1.0, random_state=3)).sort_index().tolist() == [
        True,
        True,
        False,
        False,
    ]
