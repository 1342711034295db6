"""The loop on a tiny random model: predictions come first, runs that exist are kept, other settings are refused."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")

from hw.calibrate.calibration import calibration_content
from hw.loop.judged_runs import missing_runs
from hw.loop.predictions import predicted_utility
from hw.loop.run import _loop
from hw.loop.settings import run_config
from hw.validate.machine_speed import MachineFactors, machine_factors, run_speeds
from sim.config import compose_config
from sim.cost.latency import CALIBRATIONS, load_calibration
from sim.cost.model_spec import load_model
from sim.errors import ConfigError
from sim.replay.run import build_trace
from sim.results.run_folder import write_json

WINDOW = (
    "{trace: small, trace.duration_s: 1.5, trace.on_rate_rps: 20.0, trace.off_rate_rps: 20.0, seed: 7, "
    "trace.lengths.output_tokens_p50: 4, budget.kind: cotenant}"
)
LOW = "{policy: saber, policy.policy: {name: adaptive_precision, bits: 8}}"


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    content = json.loads((CALIBRATIONS / "smollm2_135m_cpu_epyc_1thread.json").read_text(encoding="utf-8"))
    write_json(tmp_path / "tiny.json", content | {"name": "tiny", "model": "tiny"})
    return [
        "~experiment",
        "model=tiny",
        "hw.checkpoint=random:0",
        "hw.device=cpu",
        "hw.clock=cpu",
        "hw.text=null",
        f"latency={tmp_path / 'tiny.json'}",
        "budget.high_share=8",
        "budget.low_share=6",
        "budget.pace=20",
        f"+windows.one={WINDOW}",
        "+policies.dense={policy: dense}",
        f"+policies.low={LOW}",
        "fixed=[dense]",
        "references=1",
        "rounds=1",
        "repeats=2",
        "least_requests=10",
        "measure=false",
        "slowdown=0.05",
        f"runs={tmp_path / 'runs'}",
        f"out={tmp_path / 'out'}",
    ]


def result(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "out" / "loop.json").read_text(encoding="utf-8"))


def test_predictions_are_written_before_the_first_judged_run_and_runs_that_exist_are_kept(
    settings: list[str], tmp_path: Path
) -> None:
    cfg = compose_config("hw_loop", settings)
    assert _loop(compose_config("hw_loop", [*settings, "page=predict"])) == 0
    path = tmp_path / "runs" / "round1" / "predictions.json"
    assert not (tmp_path / "runs" / "round1" / "real").exists()
    frozen = path.read_bytes()
    assert _loop(cfg) in (0, 1)
    assert path.read_bytes() == frozen
    content = result(tmp_path)
    assert content["rounds"][0]["predictions"]["sha256"] == hashlib.sha256(frozen).hexdigest()
    assert content["repeats"] == 2
    assert set(content["real"]["one"]) == {"dense", "low"}
    assert (tmp_path / "out" / "index.md").is_file()
    assert missing_runs(cfg, tmp_path / "runs" / "round1") == []
    summary = tmp_path / "runs" / "round1" / "real" / "one" / "dense" / "hw0" / "summary.json"
    kept = summary.stat().st_mtime_ns
    summary.parent.with_name("hw1").joinpath("summary.json").unlink()
    assert _loop(cfg) in (0, 1)
    assert summary.stat().st_mtime_ns == kept
    with pytest.raises(ConfigError, match="another windows"):
        _loop(compose_config("hw_loop", [*settings, "windows.one.seed=8", "page=judge"]))
    assert "No reference run measured the speed" in (tmp_path / "out" / "index.md").read_text(encoding="utf-8")
    changed = json.loads(frozen)
    changed["outcomes"]["one"]["dense"]["utility"] = 0.5
    write_json(path, changed)
    with pytest.raises(ConfigError, match="it was changed after them"):
        _loop(compose_config("hw_loop", [*settings, "page=judge"]))


def test_predictions_for_a_stated_speed_are_not_judged_as_measured_ones(settings: list[str], tmp_path: Path) -> None:
    assert _loop(compose_config("hw_loop", [*settings, "page=predict"])) == 0
    with pytest.raises(ConfigError, match=r"a stated slowdown of 0\.05, which no reference run measured"):
        _loop(compose_config("hw_loop", [*settings, "measure=true"]))
    assert not (tmp_path / "runs" / "round1" / "real").exists()


def test_reference_runs_before_the_predictions_set_the_speed_of_the_simulation(
    settings: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    assert _loop(compose_config("hw_loop", [*settings, "measure=true", "page=predict"])) == 0
    content = json.loads((tmp_path / "runs" / "round1" / "predictions.json").read_text(encoding="utf-8"))
    reference = content["references"][0]
    assert content["slowdown"] == pytest.approx(reference["measured_s"] / reference["priced_s"])
    assert [one["bits"] for one in content["references"]] == [16, 8, 4]
    machine = MachineFactors.from_pairs(content["slowdown"], content["factors"])
    plain = calibration_content(str(tmp_path / "tiny.json"))
    assert machine == machine_factors(content["references"], plain, load_model("tiny"))
    # Predictions and judged runs have the prices of this machine: those of the calibration, times the factors.
    usual = load_calibration(tmp_path / "tiny.json").with_factors(machine.factors, machine.block_factors)
    written = load_calibration(tmp_path / "runs" / "round1" / "calibration.json")
    for bits in (16, 8, 4):
        assert written.linear_s("ffn", bits, 7) == pytest.approx(usual.linear_s("ffn", bits, 7), rel=1e-9)
    # Each window is simulated at the speed of each reference run too.
    speeds, at_speeds = content["run_speeds"], content["utility_at_run_speeds"]["one"]
    assert speeds == run_speeds(content["references"], plain, load_model("tiny"), machine)
    assert len(speeds) == 3
    assert {policy: len(found) for policy, found in at_speeds.items()} == {"dense": 3, "low": 3}
    # The prediction is the mean of these; where there are none, the utility at the frozen speed.
    mean = sum(at_speeds["low"]) / 3
    assert predicted_utility(content, "one", "low") == pytest.approx(mean)
    frozen = content["outcomes"]["one"]["low"]["utility"]
    assert predicted_utility(content | {"utility_at_run_speeds": {}}, "one", "low") == frozen
    noted = [*settings, "measure=true", "repeats=1", "note='Others used the machine.'"]
    assert _loop(compose_config("hw_loop", noted)) in (0, 1)
    judged = json.loads((tmp_path / "out" / "loop.json").read_text(encoding="utf-8"))["verdict"]["level"]["cells"]
    assert [row["simulated"] for row in judged if row["policy"] == "low"] == [pytest.approx(mean)]
    for side in ("sim/one/low", "real/one/low/hw0"):
        config = OmegaConf.load(tmp_path / "runs" / "round1" / side / "config.yaml")
        assert config.latency == str(tmp_path / "runs" / "round1" / "calibration.json")
    text = (tmp_path / "out" / "index.md").read_text(encoding="utf-8")
    of_4 = machine.block_factors[4]
    assert re.search(rf"4 bits, factors before +\| *{of_4.memory_bound:.2f}, {of_4.compute_bound:.2f} ", text)
    assert all("passes" not in one for one in result(tmp_path)["rounds"][0]["predictions"]["references"])
    assert "- **Note.** Others used the machine." in text
    for cell in result(tmp_path)["verdict"]["level"]["cells"]:
        every = [*at_speeds[cell["policy"]], cell["simulated"]]
        assert (cell["least"], cell["most"]) == (min(every), max(every))
        assert cell["in_range"] == (min(every) <= cell["real"] <= max(every))
    assert re.search(r"the mean of the repeats lies in it in \d of 2 cells", text)
    assert result(tmp_path)["hindsight"] is None  # between so few judged runs, only one precision was measured


def test_each_round_is_predicted_at_the_speed_measured_before_it_and_then_served(
    settings: list[str], tmp_path: Path
) -> None:
    more = [*settings, "measure=true", "rounds=2", "repeats=1"]
    runs = tmp_path / "runs"
    assert _loop(compose_config("hw_loop", [*more, "rounds=1"])) in (0, 1)
    assert _loop(compose_config("hw_loop", [*more, "page=predict"])) == 0  # of the second; the first was served
    assert sorted(path.name for path in runs.iterdir()) == ["round1", "round2"]
    assert not (runs / "round2" / "real").exists()
    assert _loop(compose_config("hw_loop", [*more, "page=judge"])) in (0, 1)
    assert result(tmp_path)["repeats"] == 1  # the second has predictions alone
    before = json.loads((runs / "round1" / "judged_for.json").read_text(encoding="utf-8"))
    assert _loop(compose_config("hw_loop", more)) in (0, 1)
    assert json.loads((runs / "round1" / "judged_for.json").read_text(encoding="utf-8")) == before
    content = result(tmp_path)
    predictions = [
        json.loads((runs / name / "predictions.json").read_text(encoding="utf-8")) for name in ("round1", "round2")
    ]
    assert [one["speed"]["before"] for one in content["rounds"]] == [one["slowdown"] for one in predictions]
    for number, one in enumerate(predictions, start=1):
        config = OmegaConf.load(runs / f"round{number}" / "real" / "one" / "low" / "hw0" / "config.yaml")
        assert config.slowdown == one["slowdown"]
    for row in content["verdict"]["level"]["cells"]:
        each = [predicted_utility(one, "one", row["policy"]) for one in predictions]
        assert row["simulated"] == pytest.approx(sum(each) / 2)
        assert row["repeats"] == [one["utility"] for one in content["real"]["one"][row["policy"]]]
        assert len(row["repeats"]) == 2
    text = (tmp_path / "out" / "index.md").read_text(encoding="utf-8")
    assert all(one["predictions"]["sha256"][:16] in text for one in content["rounds"])
    with pytest.raises(ConfigError, match="has all runs of 2 rounds"):
        _loop(compose_config("hw_loop", [*more, "page=predict"]))


def test_windows_are_simulated_again_at_the_speed_of_the_judged_runs(settings: list[str], tmp_path: Path) -> None:
    more = [*settings, "measure=true", "repeats=1"]
    assert _loop(compose_config("hw_loop", more)) in (0, 1)
    before = json.loads((tmp_path / "runs" / "round1" / "before" / "machine_speed.json").read_text(encoding="utf-8"))

    def slower(factor: float) -> list[dict[str, Any]]:
        return [
            one
            | {"measured_s": factor * one["measured_s"]}
            | {"passes": [each | {"measured_s": factor * each["measured_s"]} for each in one["passes"]]}
            for one in before
        ]

    def judged_after(factor: float) -> dict[str, Any]:
        write_json(tmp_path / "runs" / "round1" / "during" / "machine_speed.json", slower(factor))
        assert _loop(compose_config("hw_loop", [*more, "page=judge"])) in (0, 1)
        return result(tmp_path)["hindsight"]

    predicted = {row["policy"]: row["simulated"] for row in result(tmp_path)["verdict"]["level"]["cells"]}
    same = judged_after(1.0)
    assert {row["policy"]: row["simulated"] for row in same["cells"]} == pytest.approx(predicted)
    assert "In hindsight" in (tmp_path / "out" / "index.md").read_text(encoding="utf-8")
    hundredfold = judged_after(100.0)
    assert hundredfold["speeds"][0] == pytest.approx([100 * speed for speed in same["speeds"][0]])
    assert all(row["simulated"] < predicted[row["policy"]] for row in hundredfold["cells"])


def test_requests_arrive_slower_by_the_slowdown_on_both_sides(settings: list[str]) -> None:
    cfg = compose_config("hw_loop", settings)
    usual, slow = (build_trace(run_config(cfg, "one", "dense", slowdown)) for slowdown in (1.0, 2.0))
    assert slow.arrival_s == pytest.approx(2.0 * usual.arrival_s)
    assert run_config(cfg, "one", "dense", 2.0).slowdown == 2.0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["page=later"], "page is 'later'"),
        (["~policies.low"], "two policies"),
        (["learner=learnt"], "no policy 'learnt'"),
        (["least_requests=1000"], "least_requests is 1000"),
        (["page=judge"], "has no round with a repeat"),
        (["rounds=0"], "rounds is 0"),
        (["policies.low.policy=unknown"], "there is no policy=unknown"),
    ],
)
def test_a_mistake_is_one_sentence_before_the_first_run(
    settings: list[str], tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _loop(compose_config("hw_loop", [*settings, *more]))
    assert not (tmp_path / "runs" / "round1" / "real").exists()
