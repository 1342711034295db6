"""``python -m sim.capacity`` on small servers: its bracket is that of replays, and what has no answer is an error."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.capacity.run import main, were_alone
from sim.config import compose_config
from sim.replay.run import build_engine, build_trace, replay_with
from sim.results.metrics import Slo, met_slo, missed_targets
from sim.traces.transforms import scale_rate
from tests.commands import exit_status

SMALL = [
    *("trace=poisson", "trace.duration_s=60", "trace.rate_rps=2", "model=smollm2_135m", "gpu=cpu_epyc_1thread"),
    *("engine=small", "budget=small", "workspace_bytes=1e8", "precision=0.05"),
    "workload.steps=[{_target_: sim.traces.transforms.drop_long, _partial_: true, max_total_tokens: 800}]",
]


def run(tmp_path: Path, *more: str) -> dict[str, Any]:
    assert exit_status(main, *SMALL, *more, f"hydra.run.dir={tmp_path / 'run'}") == 0
    assert (tmp_path / "run" / "capacity.png").stat().st_size > 5_000
    content: dict[str, Any] = json.loads((tmp_path / "run" / "capacity.json").read_text())
    return content


def test_the_ends_of_the_bracket_are_replays_that_meet_and_miss_the_target(tmp_path: Path) -> None:
    row = run(tmp_path)["rows"][0]
    replayed = row["replays"][0]
    assert row["interval"] == "bracket of the search"
    cfg = compose_config("replay", [word for word in SMALL if not word.startswith("precision")])
    trace = build_trace(cfg)
    rate_rps = (len(trace) - 1) / float(trace.arrival_s[-1] - trace.arrival_s[0])
    for end, met in (("met_rps", True), ("missed_rps", False)):
        engine, policy = build_engine(cfg)
        replay_with(cfg, scale_rate(trace, factor=replayed[end] / rate_rps), engine, policy)
        share = float(met_slo(engine.records(), Slo()).mean())
        assert (share >= 0.9) == met
        assert share == pytest.approx(replayed["attainment"][replayed["rate_rps"].index(replayed[end])])


def test_several_seeds_give_an_interval_for_each_policy(tmp_path: Path) -> None:
    content = run(tmp_path, "seeds=[0,1,2]", "policies=[dense,int8]")
    assert [row["policy"] for row in content["rows"]] == ["dense", "int8"]
    row = content["rows"][0]
    low, high = row["interval_rps"]
    assert low < row["capacity_rps"] < high
    assert len(row["replays"]) == 3


def test_seeds_that_change_nothing_are_counted_once(tmp_path: Path) -> None:
    row = run(tmp_path, "trace.seed=5", "seeds=[0,1]")["rows"][0]
    assert len(row["replays"]) == 1


def test_a_delay_of_the_front_end_counts_for_clients_and_does_not_stretch_with_the_trace(tmp_path: Path) -> None:
    near = run(tmp_path, "slo.ttft_s=4")["rows"][0]["capacity_rps"]
    far = run(tmp_path / "far", "slo.ttft_s=4", "slo.side=client", "frontend.front_s=2")["rows"][0]["capacity_rps"]
    engine = run(tmp_path / "engine", "slo.ttft_s=4", "frontend.front_s=2")["rows"][0]["capacity_rps"]
    assert far < near
    assert engine == pytest.approx(near, rel=0.06)


def test_a_row_without_a_capacity_says_why_next_to_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = run(tmp_path, "gpus=[cpu_epyc_1thread,a100_80gb]")
    assert "no calibration of smollm2_135m on a100_80gb" in content["rows"][1]["error"]
    assert "no calibration" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("slo.tpot_s=0.00001", "even at 0.166 req/s only .* of the requests meet the SLO.*TPOT above 1e-05 s in"),
        ("workload.steps=[] trace.duration_s=0.1 trace.rate_rps=4", "has one request"),
        ("target=1.5", "target is 1.5; it must be a share"),
        ("precision=0", "precision is 0.0; it must be in"),
        ("least_rps=0", "least_rps is 0.0; it must be a rate above 0"),
        ("slo.ttft_s=null", "the SLO has no target"),
        ("policies=[dense,dens]", "did you mean 'dense'"),
        ("policies=[dense,dense]", "name each once"),
        ("latency=smollm2_135m_cpu_epyc_1thread gpus=[cpu_epyc_1thread,a100_80gb]", "remove latency="),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(main, *SMALL, *words.split(), f"hydra.run.dir={tmp_path / 'run'}") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines
    assert not (tmp_path / "run").exists()


def test_missed_targets_name_what_each_request_missed() -> None:
    cfg = compose_config("replay", [word for word in SMALL if not word.startswith("precision")])
    engine, policy = build_engine(cfg)
    replay_with(cfg, build_trace(cfg), engine, policy)
    records, slo = engine.records(), Slo(ttft_s=0.5, tpot_s=0.05)
    missed = missed_targets(records, slo)
    assert set(missed) == {"finished", "ttft_s", "tpot_s"}
    assert (missed["ttft_s"] == (records.ttft_s > 0.5)).all()
    assert (met_slo(records, slo) == ~(missed["finished"] | missed["ttft_s"] | missed["tpot_s"])).all()


def test_a_trace_that_ends_before_a_queue_grows_gives_no_number_above_what_the_server_sustains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = run(tmp_path, "slo.ttft_s=60", "target=0.5")["rows"][0]
    assert row["too_short"]
    said = capsys.readouterr().out
    assert f"above {row['max_rate_rps']:.3g} " in said
    assert "take a longer one" in said


def test_an_unreachable_target_of_a_deciding_policy_stops_once_requests_alone_miss_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "policy=adaptive_precision", "slo.ttft_s=0.0001", "least_rps=0.000001"]
    assert exit_status(main, *words, f"hydra.run.dir={tmp_path / 'run'}") == 2
    message = capsys.readouterr().err
    assert "have the server to themselves and miss it, so no lower rate meets it" in message
    assert float(re.search(r"even at (\S+) req/s", message)[1]) > 0.001  # type: ignore[index]


def test_a_request_was_alone_if_no_other_was_in_the_engine() -> None:
    cfg = compose_config("replay", [word for word in SMALL if not word.startswith("precision")])
    trace = build_trace(cfg).take([0, 1, 2, 3])
    served = []
    for arrival_s in ([0.0, 1000.0, 1000.1, 5000.0], [0.0, 0.0, 0.0, 0.0]):
        engine, policy = build_engine(cfg)
        replay_with(cfg, replace(trace, arrival_s=np.array(arrival_s)), engine, policy)
        served.append(were_alone(engine.records()).tolist())
    assert served == [[True, False, False, True], [False] * 4]
