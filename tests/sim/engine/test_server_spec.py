"""A server built from names, parts or configuration is the same, and builds the engine that replays use."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

import sim.engine.server_spec
from sim.config import build_option, compose_config, load_option, with_differences
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan
from sim.engine.protocol import Request
from sim.engine.server_spec import ServerSpec, find_calibration
from sim.errors import ConfigError
from sim.policies import PolicyContext
from sim.replay.loop import replay
from sim.replay.run import build_engine, build_trace, replay_with, server_spec
from sim.results.metrics import Slo, met_slo
from sim.types import GIB


def test_the_session_of_the_readme_runs() -> None:
    server = ServerSpec.from_names(model="llama2_7b", gpu="a100_80gb")
    trace = build_option("trace", "burst", {"duration_s": 20.0})
    policy = build_option("policy", "greedy_stop")(PolicyContext.of(server))
    engine = server.build_engine(policy.first_plan, 40 * GIB)
    replay(trace, engine, policy, tick_s=1.0)
    assert 0.0 <= met_slo(engine.records(), Slo(ttft_s=2.0)).mean() <= 1.0
    assert len(engine.records()) == len(trace)


def test_names_and_a_configuration_give_the_same_server_and_the_same_records() -> None:
    cfg = compose_config("replay", ["trace.duration_s=30", "budget=constant", "budget.budget_bytes=2e10"])
    named, configured = ServerSpec.from_names(model="llama2_7b", gpu="a100_80gb"), server_spec(cfg)
    assert dataclasses.replace(named, quality_nll=None) == dataclasses.replace(configured, quality_nll=None)
    trace = build_trace(cfg)
    mine = named.build_engine(dense_plan(named.model), 20_000_000_000)
    theirs, policy = build_engine(cfg)
    replay(trace, mine, policy)
    replay_with(cfg, trace, theirs, policy)
    np.testing.assert_array_equal(mine.records().finish_s, theirs.records().finish_s)


def test_without_a_calibration_only_building_the_simulated_engine_fails() -> None:
    server = ServerSpec.from_parts(
        build_option("model", "opt_13b"), build_option("gpu", "a100_80gb"), build_option("engine", "vllm_v1")
    )
    assert server.latency is None
    with pytest.raises(ConfigError, match="no calibration of opt_13b on a100_80gb"):
        server.build_engine(dense_plan(server.model), 80 * GIB)


def test_a_divided_model_is_served_by_what_one_gpu_holds_at_the_prices_of_its_degree() -> None:
    server = ServerSpec.from_names(model="llama3.1_70b", gpu="h100_80gb", tp=4)
    assert server.model == load_model("llama3.1_70b").shard(4)
    assert server.priced().name == "llama3.1_70b_h100_tp4"
    cfg = compose_config("replay", ["model=llama3.1_70b", "gpu=h100_80gb", "gpu.tp=4"])
    assert server_spec(cfg).model == server.model
    assert server_spec(cfg).priced().tp == 4
    with pytest.raises(ConfigError, match=r"no calibration of llama3.1_70b on h100_80gb; there are .*gpu.tp=2"):
        find_calibration("llama3.1_70b", "h100_80gb", 1)
    with pytest.raises(ConfigError, match=r"'llama3.1_70b_h100_tp4' was made for gpu.tp=4, not 2; set gpu.tp=4"):
        ServerSpec.from_names(model="llama3.1_70b", gpu="h100_80gb", tp=2, latency="llama3.1_70b_h100_tp4")
    with pytest.raises(ConfigError, match=r"tp is 3; .* must be one of 1, 2, 4, 8; set gpu.tp=1"):
        build_option("gpu", "h100_80gb", {"tp": 3})


def test_another_kind_of_gpu_keeps_how_many_there_are() -> None:
    cfg = compose_config("replay", ["model=llama3.1_8b", "gpu.tp=2"])
    kept = with_differences(cfg, {"gpu": "h100_80gb"}, "replicas.a")
    assert (kept.gpu.name, kept.gpu.tp, cfg.gpu.name) == ("h100_80gb", 2, "a100_80gb")
    for differences in ({"gpu": "h100_80gb", "gpu.tp": 4}, {"gpu.tp": 4, "gpu": "h100_80gb"}):
        assert with_differences(cfg, differences, "replicas.a").gpu.tp == 4


def test_how_a_model_is_divided_changes_nothing_but_bytes_and_prices() -> None:
    """At the prices of one GPU and as many KV blocks, each of two GPUs serves what one alone would."""
    whole = ServerSpec.from_names(model="llama3.1_8b", gpu="a100_80gb")
    half = dataclasses.replace(whole, model=whole.model.shard(2))
    trace = build_option("trace", "burst", {"duration_s": 60.0})
    found = []
    for server in (whole, half):
        plan = dense_plan(server.model)
        budget = budget_for_kv_blocks(server.model, plan, 900, server.workspace_bytes, server.config.kv_block_tokens)
        engine = server.build_engine(plan, budget)
        replay(trace, engine, build_option("policy", "dense")(PolicyContext.of(server)))
        found.append(engine.records())
    assert found[0].preemptions.sum() > 0
    for name in ("status", "preemptions", "first_token_s", "finish_s"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))


def test_a_calibration_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="was made for model 'llama2_7b', not 'llama3_8b'"):
        ServerSpec.from_names(model="llama3_8b", gpu="l4_24gb", latency="llama2_7b_l4")


def test_a_calibration_of_another_device_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    sim.engine.server_spec._say_other_device.cache_clear()
    for _ in range(2):
        ServerSpec.from_names(model="llama2_7b", gpu="h100_80gb", latency="llama2_7b_a100_trtllm")
    assert capsys.readouterr().err == (
        "latency: llama2_7b_a100_trtllm has the times of a100_80gb, and memory is that of gpu=h100_80gb\n"
    )
    ServerSpec.from_names(model="llama2_7b", gpu="a100_80gb", latency="llama2_7b_a100_trtllm")
    assert capsys.readouterr().err == ""


def test_a_calibration_measured_here_is_chosen_before_a_shipped_one_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(name: str, **more: object) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps({"model": "m", "device": "d", **more}))

    monkeypatch.setattr(sim.engine.server_spec, "CALIBRATIONS", tmp_path / "a")
    (tmp_path / "a").mkdir()
    tmp_path = tmp_path / "a"
    write("m", kind="composed")
    write("m_d_published", kind="measured")
    assert find_calibration("m", "d", 1) == "m_d_published"
    assert capsys.readouterr().err == ""
    write("m_d_at_another_speed", kind="derived", device_run={})
    write("m_device_full_name", kind="measured", device_run={})
    sim.engine.server_spec._calibrated_servers.cache_clear()
    sim.engine.server_spec._calibration_ranks.cache_clear()
    assert find_calibration("m", "d", 1) == "m_device_full_name"
    assert find_calibration("m", "d", 1) == "m_device_full_name"
    said = capsys.readouterr().err
    assert said.count("m_device_full_name") == 1
    assert "m_d_published" in said


def test_overrides_take_precedence_over_the_servers_own_arguments() -> None:
    server = ServerSpec.from_names(model="llama2_7b", gpu="a100_80gb")
    config = dataclasses.replace(server.config, kv_block_tokens=32)
    assert server.build_engine(dense_plan(server.model), 40 * GIB, config=config).config.kv_block_tokens == 32


def test_an_option_is_found_by_name_with_changed_keys_and_a_seed() -> None:
    assert load_option("trace", "burst", {"duration_s": 5.0}, seed=3).seed == 3
    assert load_option("trace", "burst", {"duration_s": 5.0}).duration_s == 5.0
    with pytest.raises(ConfigError, match="there is no gpu=a100; did you mean 'a100_80gb'"):
        load_option("gpu", "a100")
    with pytest.raises(ConfigError, match="takes no 'durations'"):
        build_option("trace", "burst", {"durations": 5.0})


@pytest.mark.parametrize("slowdown", [0.5, 1.0, 2.0])
def test_a_slower_machine_takes_longer_for_each_iteration_and_shows_by_how_much(slowdown: float) -> None:
    server = ServerSpec.from_names(model="llama2_7b", gpu="a100_80gb")
    engines = [
        one.build_engine(dense_plan(server.model), 60 * 10**9)
        for one in (server, dataclasses.replace(server, slowdown=slowdown))
    ]
    states = []
    for engine in engines:
        engine.submit([Request(request_id=0, arrival_s=0.0, prompt_tokens=500, output_tokens=50)])
        states.append(engine.run_until(math.inf))
    assert states[0].priced_s == states[0].busy_s
    assert states[1].priced_s == states[0].priced_s
    assert states[1].busy_s == slowdown * states[0].busy_s
    assert engines[1].records().ttft_s[0] == slowdown * engines[0].records().ttft_s[0]


@pytest.mark.parametrize("slowdown", [0.0, -1.0, math.nan, math.inf])
def test_a_slowdown_that_makes_no_sense_is_refused(slowdown: float) -> None:
    with pytest.raises(ConfigError, match="slowdown is"):
        dataclasses.replace(ServerSpec.from_names(model="llama2_7b", gpu="a100_80gb"), slowdown=slowdown)
