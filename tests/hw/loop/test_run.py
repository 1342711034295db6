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
from hw.loop.predictions import check_same_settings, predicted_utility
from hw.loop.run import Part, _check_alike, _loop
from hw.loop.settings import parts_of, run_config
from hw.validate.machine_speed import MachineFactors, machine_factors, run_speeds
from sim.atomic import sole_writer
from sim.config import check_overrides, compose_config
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
        "predict_each=window",
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
    path = tmp_path / "runs" / "round1" / "one" / "predictions.json"
    assert not (tmp_path / "runs" / "round1" / "one" / "real").exists()
    frozen = path.read_bytes()
    assert _loop(cfg) in (0, 1)
    assert path.read_bytes() == frozen
    content = result(tmp_path)
    assert content["rounds"][0]["predictions"]["sha256"] == hashlib.sha256(frozen).hexdigest()
    assert content["repeats"] == 2
    assert set(content["real"]["one"]) == {"dense", "low"}
    assert (tmp_path / "out" / "index.md").is_file()
    assert missing_runs(cfg, tmp_path / "runs" / "round1" / "one") == []
    summary = tmp_path / "runs" / "round1" / "one" / "real" / "one" / "dense" / "hw0" / "summary.json"
    kept = summary.stat().st_mtime_ns
    summary.parent.with_name("hw1").joinpath("summary.json").unlink()
    assert _loop(cfg) in (0, 1)
    assert summary.stat().st_mtime_ns == kept
    for key, value in (("windows.one.seed", 8), ("points", 0.2), ("least_changes", 1), ("least_requests", 9)):
        with pytest.raises(ConfigError, match=rf"made with other settings \({key.partition('.')[0]}\)"):
            _loop(compose_config("hw_loop", [*settings, f"{key}={value}", "page=judge"]))
    old = json.loads(frozen)
    del old["description"]["points"]
    with pytest.raises(ConfigError, match="of an earlier version"):
        check_same_settings(old, cfg, tmp_path)
    noted = path.with_name("judged_for.json")
    content = noted.read_bytes()
    noted.unlink()
    with pytest.raises(ConfigError, match=r"has judged runs, but no judged_for\.json"):
        _loop(compose_config("hw_loop", [*settings, "page=judge"]))
    noted.write_bytes(content)
    changed = json.loads(frozen)
    changed["outcomes"]["one"]["dense"]["utility"] = 0.5
    write_json(path, changed)
    with pytest.raises(ConfigError, match="it was changed after them"):
        _loop(compose_config("hw_loop", [*settings, "page=judge"]))


def test_predictions_for_a_stated_speed_are_not_judged_as_measured_ones(settings: list[str], tmp_path: Path) -> None:
    assert _loop(compose_config("hw_loop", [*settings, "page=predict"])) == 0
    with pytest.raises(ConfigError, match=r"a stated slowdown of 0\.05, which no reference run measured"):
        _loop(compose_config("hw_loop", [*settings, "measure=true"]))
    assert not (tmp_path / "runs" / "round1" / "one" / "real").exists()


def test_reference_runs_before_the_predictions_set_the_speed_of_the_simulation(
    settings: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    assert _loop(compose_config("hw_loop", [*settings, "measure=true", "page=predict"])) == 0
    content = json.loads((tmp_path / "runs" / "round1" / "one" / "predictions.json").read_text(encoding="utf-8"))
    reference = content["references"][0]
    assert content["slowdown"] == pytest.approx(reference["measured_s"] / reference["priced_s"])
    assert [one["bits"] for one in content["references"]] == [16, 8, 4]
    machine = MachineFactors.from_pairs(content["slowdown"], content["factors"])
    plain = calibration_content(str(tmp_path / "tiny.json"))
    assert machine == machine_factors(content["references"], plain, load_model("tiny"))
    # Predictions and judged runs have the prices of this machine: those of the calibration, times the factors.
    usual = load_calibration(tmp_path / "tiny.json").with_factors(machine.factors, machine.block_factors)
    written = load_calibration(tmp_path / "runs" / "round1" / "one" / "calibration.json")
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
    # No run had begun for these predictions, so the speed was measured again right before the first one.
    first = content
    content = json.loads((tmp_path / "runs" / "round1" / "one" / "predictions.json").read_text(encoding="utf-8"))
    assert content["slowdown"] != first["slowdown"]
    assert len(content["references"]) == 3
    at_speeds = content["utility_at_run_speeds"]["one"]
    mean = sum(at_speeds["low"]) / 3
    judged = json.loads((tmp_path / "out" / "loop.json").read_text(encoding="utf-8"))["verdict"]["level"]["cells"]
    assert [row["simulated"] for row in judged if row["policy"] == "low"] == [pytest.approx(mean)]
    for side in ("sim/one/low", "real/one/low/hw0"):
        config = OmegaConf.load(tmp_path / "runs" / "round1" / "one" / side / "config.yaml")
        assert config.latency == str(tmp_path / "runs" / "round1" / "one" / "calibration.json")
    text = (tmp_path / "out" / "index.md").read_text(encoding="utf-8")
    of_4 = next(one["measured_s"] / one["priced_s"] for one in content["references"] if one["bits"] == 4)
    assert re.search(rf"\| one .*\| +{content['slowdown']:.2f} \|.*\| +{of_4:.2f} \|", text)
    assert all("passes" not in one for one in result(tmp_path)["rounds"][0]["predictions"]["references"])
    assert "Others used the machine." in text
    for cell in result(tmp_path)["verdict"]["level"]["cells"]:
        every = [*at_speeds[cell["policy"]], cell["simulated"]]
        assert (cell["least"], cell["most"]) == (min(every), max(every))
        assert cell["in_range"] == (min(every) <= cell["real"] <= max(every))
    assert re.search(r"the mean of the repeats lies in it in \d of 2 cells", text)


def test_each_window_is_predicted_in_each_round_at_the_speed_measured_then(settings: list[str], tmp_path: Path) -> None:
    more = [*settings, "measure=true", "rounds=2", "repeats=1", f"+windows.two={WINDOW}", "windows.two.seed=9"]
    runs = tmp_path / "runs"
    assert _loop(compose_config("hw_loop", [*more, "page=predict"])) == 0
    assert sorted(path.parent.parent.name for path in runs.glob("*/*/predictions.json")) == ["round1", "round1"]
    assert not list(runs.rglob("real"))
    with pytest.raises(ConfigError, match="has no round in which every window"):
        _loop(compose_config("hw_loop", [*more, "page=judge"]))
    assert _loop(compose_config("hw_loop", [*more, "rounds=1"])) in (0, 1)
    first = (runs / "round1" / "two" / "judged_for.json").read_bytes()
    assert _loop(compose_config("hw_loop", more)) in (0, 1)
    assert (runs / "round1" / "two" / "judged_for.json").read_bytes() == first
    content = result(tmp_path)
    assert (content["repeats"], sorted(content["real"])) == (2, ["one", "two"])
    predictions = {
        (one["round"], one["window"]): json.loads(
            (runs / f"round{one['round']}" / one["window"] / "predictions.json").read_text(encoding="utf-8")
        )
        for one in content["rounds"]
    }
    assert len({one["slowdown"] for one in predictions.values()}) == 4  # two windows in two rounds
    for (number, window), one in predictions.items():
        config = OmegaConf.load(runs / f"round{number}" / window / "real" / window / "low" / "hw0" / "config.yaml")
        assert config.slowdown == one["slowdown"]
    for row in content["verdict"]["level"]["cells"]:
        each = [
            predicted_utility(one, row["window"], row["policy"])
            for (_, window), one in predictions.items()
            if window == row["window"]
        ]
        assert row["simulated"] == pytest.approx(sum(each) / 2)
        assert row["repeats"] == [run["utility"] for run in content["real"][row["window"]][row["policy"]]]
        assert len(row["repeats"]) == 2
    text = (tmp_path / "out" / "index.md").read_text(encoding="utf-8")
    assert all(one["predictions"]["sha256"][:8] in text for one in content["rounds"])
    (runs / "round1" / "two" / "real" / "two" / "low" / "hw0" / "summary.json").unlink()
    assert _loop(compose_config("hw_loop", [*more, "page=judge"])) in (0, 1)
    assert result(tmp_path)["repeats"] == 1  # the first round lacks a run
    assert {one["round"] for one in result(tmp_path)["rounds"]} == {2}
    assert result(tmp_path)["left_out"] == [1]


def test_each_run_is_predicted_right_before_it_and_two_processes_may_share_the_rounds(
    settings: list[str], tmp_path: Path
) -> None:
    more = [*settings, "measure=true", "predict_each=run", "reference_bits=[16, 4]", "repeats=1", "rounds=2"]
    runs = tmp_path / "runs"
    assert _loop(compose_config("hw_loop", [*more, "first_round=2", "page=serve"])) == 0
    assert not (tmp_path / "out").exists()
    assert {path.parts[-4] for path in runs.glob("*/*/*/predictions.json")} == {"round2"}
    assert _loop(compose_config("hw_loop", [*more, "rounds=1", "page=serve"])) == 0
    assert _loop(compose_config("hw_loop", [*more, "page=judge"])) in (0, 1)
    content = result(tmp_path)
    assert content["repeats"] == 2
    assert [one["round"] for one in content["rounds"]] == [1, 1, 2, 2]
    assert len({one["predictions"]["slowdown"] for one in content["rounds"]}) == 4  # each run has its own
    for number in (1, 2):  # no prediction is written before the run that precedes it has ended
        folders = [folder for _, folder in parts_of(compose_config("hw_loop", more), number)]
        ended = [next(folder.rglob("hw0/summary.json")).stat().st_mtime_ns for folder in folders]
        written = [(folder / "predictions.json").stat().st_mtime_ns for folder in folders]
        assert all(before < after for before, after in zip(ended, written[1:], strict=False))
        assert all(before < after for before, after in zip(written, ended, strict=True))
    text = (tmp_path / "out" / "index.md").read_text(encoding="utf-8")
    for one in content["rounds"]:
        ((policy, _),) = one["predictions"]["outcomes"]["one"].items()
        folder = runs / f"round{one['round']}" / "one" / policy
        assert one["predictions"]["sha256"] == hashlib.sha256((folder / "predictions.json").read_bytes()).hexdigest()
        assert one["predictions"]["sha256"][:8] in text
        assert [each["bits"] for each in one["predictions"]["references"]] == [16, 4]
        config = OmegaConf.load(folder / "real" / "one" / policy / "hw0" / "config.yaml")
        assert config.slowdown == one["predictions"]["slowdown"]
        assert config.latency == str(folder / "calibration.json")
    for row in content["verdict"]["level"]["cells"]:
        each = [
            predicted_utility(one["predictions"], "one", row["policy"])
            for one in content["rounds"]
            if row["policy"] in one["predictions"]["outcomes"]["one"]
        ]
        assert row["simulated"] == pytest.approx(sum(each) / 2)
        assert row["repeats"] == [run["utility"] for run in content["real"]["one"][row["policy"]]]
    for change, message in (
        ("~policies.low", r"has runs of policies\.low, which this configuration lacks"),
        ("predict_each=window", "was made with predict_each=run"),
    ):
        with pytest.raises(ConfigError, match=message):
            _loop(compose_config("hw_loop", [*more, "page=judge", "+policies.other={policy: dense}", change]))
    of_round = list((runs / "round2" / "one").rglob("predictions.json"))
    changed = json.loads(of_round[0].read_text(encoding="utf-8"))
    began = next(of_round[0].parent.rglob("hw0/provenance.json"))
    kept = began.read_text(encoding="utf-8")
    write_json(began, json.loads(kept) | {"written_at": "2000-01-01T00:00:00+00:00"})
    with pytest.raises(ConfigError, match="before its predictions were written"):
        _loop(compose_config("hw_loop", [*more, "page=judge"]))
    began.write_text(kept, encoding="utf-8")
    config = next(of_round[0].parent.rglob("hw0/config.yaml"))
    kept = config.read_text(encoding="utf-8")
    config.write_text(kept.replace(f"slowdown: {changed['slowdown']}", "slowdown: 3.5"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"was served at a slowdown of 3\.5"):
        _loop(compose_config("hw_loop", [*more, "page=judge"]))
    config.write_text(kept, encoding="utf-8")
    with (
        sole_writer(runs / "round2"),
        pytest.raises(ConfigError, match=r"another process is writing into .*round2; serve other rounds"),
    ):
        _loop(compose_config("hw_loop", [*more, "page=serve"]))
    # A round in which one policy is missing does not count.
    (runs / "round2" / "one" / "low" / "real" / "one" / "low" / "hw0" / "summary.json").unlink()
    assert _loop(compose_config("hw_loop", [*more, "page=judge"])) in (0, 1)
    assert {one["round"] for one in result(tmp_path)["rounds"]} == {1}
    assert result(tmp_path)["left_out"] == [2]


def test_a_round_serves_every_window_under_every_policy_once_in_an_order_of_its_own(settings: list[str]) -> None:
    more = [f"+windows.w{number}={WINDOW}" for number in range(4)]
    for each, parts in (("run", 10), ("window", 5)):
        cfg = compose_config("hw_loop", [*settings, *more, f"predict_each={each}"])
        orders = [[(*one.windows, *one.policies) for one, _ in parts_of(cfg, number)] for number in (1, 2, 3, 1)]
        assert orders[0] == orders[3]
        assert orders[0] != orders[1] != orders[2] != orders[0]
        assert all(len(set(order)) == len(order) == parts for order in orders)
        windows = [label for label, *_ in orders[0]]
        assert windows == sorted(windows, key=windows.index)  # the runs of a window follow each other
        assert len({folder for _, folder in parts_of(cfg, 1)}) == parts


def test_reference_runs_of_two_kinds_are_not_mixed(settings: list[str]) -> None:
    cfg = compose_config("hw_loop", settings)
    predictions = {"references": [{"bits": 16}, {"bits": 4}], "run_speeds": [1.0, 1.0]}
    other = predictions | {"references": [{"bits": 16}]}
    parts = [
        Part(number=number, cfg=cfg, folder=Path(), predictions=made, real={})
        for number, made in ((1, predictions), (2, other))
    ]
    _check_alike(parts[:1])
    with pytest.raises(ConfigError, match="another number of reference runs"):
        _check_alike(parts)


def test_windows_are_simulated_again_at_the_speed_of_each_judged_run(settings: list[str], tmp_path: Path) -> None:
    more = [*settings, "measure=true", "repeats=1"]
    assert _loop(compose_config("hw_loop", more)) in (0, 1)
    first = result(tmp_path)
    path = tmp_path / "runs" / "round1" / "one" / "real" / "one" / "low" / "hw0" / "hardware.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    slowdown = first["rounds"][0]["predictions"]["slowdown"]
    assert first["real"]["one"]["low"][0]["slower"] == pytest.approx(found["busy_s"] / found["priced_s"] / slowdown)

    def judged_as(slower: float) -> dict[str, Any]:
        write_json(path, found | {"busy_s": slower * slowdown * found["priced_s"]})
        assert _loop(compose_config("hw_loop", [*more, "page=judge"])) in (0, 1)
        return result(tmp_path)

    def known(content: dict[str, Any]) -> dict[str, float]:
        return {row["policy"]: row["simulated"] for row in content["hindsight"]}

    predicted = {row["policy"]: row["simulated"] for row in first["verdict"]["level"]["cells"]}
    same, hundredfold = judged_as(1.0), judged_as(100.0)
    assert same["real"]["one"]["low"][0]["slower"] == pytest.approx(1.0)
    assert known(same)["low"] == pytest.approx(predicted["low"])
    assert known(hundredfold)["low"] < predicted["low"]
    assert known(hundredfold)["dense"] == known(same)["dense"]
    assert hundredfold["verdict"] == same["verdict"]  # no claim depends on it
    text = (tmp_path / "out" / "index.md").read_text(encoding="utf-8")
    assert "to 100.00 times their predicted seconds" in text
    del found["busy_s"]
    write_json(path, found)
    with pytest.raises(ConfigError, match="is of an earlier version"):
        _loop(compose_config("hw_loop", [*more, "page=judge"]))


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
        (["page=judge"], "has no round in which every window"),
        (["rounds=0"], "rounds is 0"),
        (["+policies.real={policy: dense}"], "'real' cannot be the label"),
        (["+policies={a/b: {policy: dense}}"], "'a/b' cannot be the label"),
        (["first_round=2"], "first_round is 2; it must be from 1 to the number of rounds, 1"),
        (["predict_each=policy"], "predict_each is 'policy'"),
        (["measure=true", "reference_bits=[8, 4]"], r"reference_bits is \[8, 4\]; it must hold 16"),
        (["measure=false", "reference_bits=[8]"], r"reference_bits is \[8\]; it must hold 16"),
        (["measure=true", "reference_bits=[16, 3]"], "nothing but precisions that the calibration has: 16, 8, 4"),
        (["reference_s=0"], "reference_s is 0"),
        (["policies.low.policy=unknown"], "there is no policy=unknown"),
        (["+policies.bad=5"], "policies.bad is 5; it must be a mapping, such as {policy: dense}"),
        (["+windows.bad=3"], "windows.bad is 3; it must be a mapping"),
    ],
)
def test_a_mistake_is_one_sentence_before_the_first_run(
    settings: list[str], tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _loop(compose_config("hw_loop", [*settings, *more]))
    assert not list((tmp_path / "runs").rglob("real"))


def test_a_key_that_holds_dots_is_named_with_the_way_to_change_it() -> None:
    message = "trace.duration_s is one key of windows.bursts; to change it and keep the others: "
    with pytest.raises(ConfigError, match=re.escape(message + "'windows.bursts={trace.duration_s: 8}'")):
        check_overrides(["windows.bursts.trace.duration_s=8"], "hw_loop")
    check_overrides(["windows.bursts={trace.duration_s: 8}"], "hw_loop")


def test_a_file_that_holds_no_results_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"loop\.json holds no results of the loop; delete it"):
        _loop(compose_config("hw_loop", ["page=only", f"out={tmp_path}"]))
