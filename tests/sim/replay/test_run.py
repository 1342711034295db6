"""``python -m sim.replay`` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sim.atomic import write_whole
from sim.config import CONF_DIR, build, check_overrides
from sim.engine.server_spec import find_calibration
from sim.errors import ConfigError, TraceError
from sim.paths import REPOSITORY
from sim.replay import run as replay_run
from sim.replay.__main__ import main
from sim.replay.loop import replay
from sim.replay.run import build_engine, build_trace, figures
from sim.results.metrics import records_frame
from tests.commands import exit_status

QUICK = ("trace=poisson", "trace.duration_s=60", "trace.rate_rps=2")


Run = Callable[..., subprocess.CompletedProcess[str]]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sim.replay", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return `run` in this process: to start Python and import everything takes longer than most runs."""

    def call(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        status = exit_status(main, *arguments)
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return call


def composed(*overrides: str) -> object:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("replay", overrides=list(overrides))


def test_a_run_leaves_a_complete_folder_and_equal_runs_leave_equal_records(tmp_path: Path, run_here: Run) -> None:
    """Law 5: the same seed and configuration write the same bytes, in any process."""
    for name, start in (("a", run), ("b", run_here)):
        done = start(*QUICK, "seed=7", "iterations=true", "plot=true", f"hydra.run.dir={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "slo_attainment" in done.stdout.lower()
    a, b = tmp_path / "a", tmp_path / "b"
    names = {"records.parquet", "iterations.parquet", "summary.json", "config.yaml", "provenance.json", "replay.png"}
    assert names <= {path.name for path in a.iterdir()}
    assert (a / "records.parquet").read_bytes() == (b / "records.parquet").read_bytes()
    assert (a / "iterations.parquet").read_bytes() == (b / "iterations.parquet").read_bytes()
    summary = json.loads((a / "summary.json").read_text())
    frame = pd.read_parquet(a / "records.parquet")
    assert summary["requests"] == len(frame) == summary["finished"] + summary["rejected"] + summary["unfinished"]
    provenance = json.loads((a / "provenance.json").read_text())
    assert provenance["seed"] == 7
    assert provenance["command"].startswith("python -m sim.replay trace=poisson")
    assert len(provenance["trace"]["sha256"]) == 64
    assert OmegaConf.load(a / "config.yaml").seed == 7


def test_the_records_of_sessions_say_which_turn_each_is(tmp_path: Path, run_here: Run) -> None:
    quick = ("trace=chat_users", "trace.users=4", "trace.sessions_per_user=2", "trace.think_s=1", "trace.ramp_up_s=2")
    for folder, arguments in (("a", ()), ("b", ("seeds=[0,1]",))):
        done = run_here(*quick, *arguments, f"hydra.run.dir={folder}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        frame = pd.read_parquet(next((tmp_path / folder).rglob("records.parquet")))
        assert frame.session.nunique() == 8
        assert sorted(frame.trace_row) == list(range(len(frame)))
        for _, turns in frame.groupby("session"):
            assert turns.turn.tolist() == list(range(len(turns)))
            assert (turns.arrival_s.to_numpy()[1:] >= turns.finish_s.to_numpy()[:-1]).all()


def test_a_run_with_a_front_end_shows_both_sides(tmp_path: Path, run_here: Run) -> None:
    done = run_here(
        *QUICK, "frontend=vllm", "frontend.front_s=0.25", "slo.side=client", "hydra.run.dir=a", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "\nclient_ttft_s mean=" in done.stdout
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    frame = pd.read_parquet(tmp_path / "a" / "records.parquet")
    assert np.allclose(frame.client_ttft_s, frame.ttft_s + 0.25, equal_nan=True)
    assert summary["client_ttft_s"]["max"] == frame.client_ttft_s.max()
    assert summary["slo_attainment"] == (frame.client_ttft_s <= 2.0).mean()


def test_runs_do_not_appear_in_the_current_folder_itself(tmp_path: Path, run_here: Run) -> None:
    assert run_here(*QUICK, cwd=tmp_path).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_another_seed_gives_another_trace(tmp_path: Path) -> None:
    traces = [build_trace(composed(*QUICK, f"seed={seed}")) for seed in (1, 2)]  # type: ignore[arg-type]
    assert traces[0] != traces[1]


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("tracee=burst", "did you mean 'trace'"),
        ("trace=azure_cov", "did you mean 'azure_conv'"),
        ("engine.limits.max_runing=3", "did you mean 'engine.limits.max_running'"),
        ("engine.schedular=chunked", "did you mean 'engine.scheduler'"),
        ("seeed=3", "did you mean 'seed'"),
    ],
)
def test_a_misspelt_word_names_the_nearest_right_one(argument: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_overrides([argument], "replay")
    assert hint in str(raised.value)


def test_a_misspelt_word_ends_the_command_with_status_2_and_one_line(tmp_path: Path, run_here: Run) -> None:
    done = run_here("polcy=dense", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no key 'polcy'; did you mean 'policy'")
    assert "Traceback" not in done.stderr


def test_sweeps_and_added_keys_pass_the_check() -> None:
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    check_overrides(["latency=llama2_7b_a100_trtllm"], "replay")
    check_overrides(["policy=dense,int8", "seed=range(3)", "+engine.kv_watermark_share=0.1", *joblib, *QUICK], "replay")


def test_a_key_that_a_target_does_not_take_names_the_nearest_one() -> None:
    node = OmegaConf.create({"_target_": "sim.results.metrics.Slo", "ttfts": 2.0})
    with pytest.raises(ConfigError, match="did you mean 'ttft_s'"):
        build(node)


def test_a_value_left_open_is_named() -> None:
    with pytest.raises(ConfigError, match=r"budget\.blocks"):
        build(composed("budget=kv_blocks").budget)  # type: ignore[attr-defined]


def test_a_value_of_the_wrong_type_is_refused(tmp_path: Path, run_here: Run) -> None:
    done = run_here("seed=abc", cwd=tmp_path)
    assert done.returncode == 2
    assert "seed" in done.stderr


def test_a_mistake_inside_a_group_is_one_clear_message(tmp_path: Path, run_here: Run) -> None:
    done = run_here(*QUICK, "policy=fixed", "policy.drop_mha=[99]", cwd=tmp_path)
    assert done.returncode == 2
    assert "MHA99 does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_shows_commands_groups_and_keys(tmp_path: Path, run_here: Run) -> None:
    shown = run_here("--help", cwd=tmp_path).stdout
    parts = ("python -m sim.replay trace=azure_conv", "policy: adaptive_precision", "max_batch_tokens", "RAP_LAB_DATA")
    assert all(part in shown for part in parts)


def test_multirun_sweeps_any_group(tmp_path: Path, run_here: Run) -> None:
    done = run_here(*QUICK, "--multirun", "policy=dense,rap_80", "engine=vllm_v1,vllm_v0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summaries = list((tmp_path / "runs").rglob("summary.json"))
    assert len(summaries) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_keep_what_there_is_and_say_so(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sim.replay", "trace=poisson", "trace.rate_rps=5", "trace.duration_s=400000"]
    process = subprocess.Popen(
        [*command, "hydra.run.dir=kept"],
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while not (line := process.stderr.readline()).startswith("replaying: "):
        assert line, "the replay ended without a line of progress"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted: kept the records" in out
    summary = json.loads((tmp_path / "kept" / "summary.json").read_text())
    frame = pd.read_parquet(tmp_path / "kept" / "records.parquet")
    assert summary["interrupted"] is True
    assert summary["requests"] == len(frame) < summary["requests"] + summary["not_arrived"]


@pytest.mark.parametrize("at", ["figures", "write_begun", "write_tables", "print_summary"])
def test_an_interrupt_while_results_are_written_loses_none(
    at: str, tmp_path: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = getattr(replay_run, at)

    def interrupted(*arguments: object, **more: object) -> object:
        signal.raise_signal(signal.SIGTERM)
        return written(*arguments, **more)

    monkeypatch.setattr(replay_run, at, interrupted)
    done = run_here(*QUICK, "hydra.run.dir=kept", cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "interrupted")
    summary = json.loads((tmp_path / "kept" / "summary.json").read_text())
    assert summary["interrupted"] is False
    assert len(pd.read_parquet(tmp_path / "kept" / "records.parquet")) == summary["requests"] > 0


def test_a_killed_write_leaves_the_old_file_and_no_half_one(tmp_path: Path) -> None:
    """Law 9, for a result file."""
    path = tmp_path / "summary.json"
    path.write_text("old")

    def dies(part: Path) -> None:
        part.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, dies)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_without_calibration_is_an_error_that_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="calibrated models are"):
        find_calibration("opt_13b", "a100_80gb", 1)
    with pytest.raises(ConfigError, match="gpu=rtx4090_24gb"):
        find_calibration("llama3.1_8b", "gtx1080", 1)


GROUPS = ("trace", "workload", "model", "gpu", "engine", "budget", "policy", "slo")
OPEN = {"budget.budget_bytes": "30e9", "budget.blocks": "2000"}


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, path.stem) for group in GROUPS for path in sorted((CONF_DIR / group).glob("*.yaml"))],
)
def test_every_option_of_every_group_composes_and_builds(group: str, option: str, tmp_path: Path) -> None:
    overrides = [f"{group}={option}"]
    if option == "csv":
        (tmp_path / "budget.csv").write_text("time_s,budget_bytes\n0,30000000000\n")
        overrides.append(f"budget.path={tmp_path / 'budget.csv'}")
    if option == "kv_blocks":
        overrides.append("budget.blocks=2000")
    if option == "constant":
        overrides.append("budget.budget_bytes=30e9")
    if option == "file":
        (tmp_path / "mine.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0.0,10,5\n")
        overrides.append(f"trace.path={tmp_path / 'mine.csv'}")
    if option == "hf":
        config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
        config |= {"intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 64}
        (tmp_path / "config.json").write_text(json.dumps(config))
        overrides.append(f"model.config={tmp_path / 'config.json'}")
    cfg = composed(*overrides)
    if group == "trace" and OmegaConf.is_missing(cfg.trace, "path"):  # type: ignore[attr-defined]
        pytest.skip("it reads a file of the user's; tests/sim/traces/readers/test_formats.py reads one with each")
    if group == "workload":
        steps = [build(step) for step in cfg.workload.steps]  # type: ignore[attr-defined]
        assert all(callable(step) for step in steps)
        return
    try:
        built = build(cfg[group])  # type: ignore[index]
    except TraceError as error:
        if "RAP_LAB_DATA" not in str(error):
            raise
        pytest.skip(str(error))  # published traces are not part of the project
    assert built is not None


def test_looking_for_progress_changes_no_record() -> None:
    cfg = composed(*QUICK, "trace.rate_rps=4")
    frames = []
    for on_progress in (None, lambda time_s, done: None):
        engine, policy = build_engine(cfg)  # type: ignore[arg-type]
        replay(build_trace(cfg), engine, policy, on_progress=on_progress)  # type: ignore[arg-type]
        frames.append(records_frame(engine.records(), build(cfg.slo)))  # type: ignore[attr-defined]
    pd.testing.assert_frame_equal(*frames)


def test_a_policy_decides_at_multiples_of_its_period() -> None:
    cfg = composed(*QUICK)
    engine, policy = build_engine(cfg)  # type: ignore[arg-type]
    decided_s: list[float] = []

    def watching(state: object) -> object:
        decided_s.append(state.time_s)  # type: ignore[attr-defined]
        return policy(state)

    replay(build_trace(cfg), engine, watching, tick_s=0.7)  # type: ignore[arg-type]
    assert np.array_equal(decided_s, [0.7 * (k + 1) for k in range(len(decided_s))])
    assert len(decided_s) > 50


def test_a_learned_policy_that_decides_at_another_period_than_in_training_says_so(
    tmp_path: Path, run_here: Run
) -> None:
    usual = ["policy=learned_serve", "trace.duration_s=5", "latency=llama2_7b_a100_trtllm"]
    assert "in training" not in run_here(*usual, "hydra.run.dir=usual", cwd=tmp_path).stderr
    often = run_here(*usual, "tick_s=0.5", "hydra.run.dir=often", cwd=tmp_path)
    assert "the policy decided every 1 s in training, and every 0.5 s here: tick_s=1" in often.stderr


def test_compilation_does_not_count_as_the_time_of_a_replay() -> None:
    from numba import njit

    from sim.compiled import cpu_clock

    with cpu_clock() as cpu_s:
        started_s = time.process_time()
        njit(lambda x: x * 2.0 + 1.0)(1.0)
        compiled_s = time.process_time() - started_s
        assert cpu_s() < 0.5 * compiled_s


def test_loading_compiled_code_does_not_count_as_the_time_of_a_replay() -> None:
    from sim.compiled import _as_compilation, cpu_clock
    from sim.engine.kernel import loop

    def busy() -> None:
        while time.process_time() < until_s:
            pass

    with cpu_clock() as cpu_s:
        until_s = time.process_time() + 0.05
        _as_compilation(busy)()
        assert cpu_s() < 0.025
    assert loop.advance._cache.load_overload.__qualname__.startswith("_as_compilation")  # type: ignore[attr-defined]


EIGHT = ("latency=llama2_7b_a100_trtllm", "trace=poisson", "trace.duration_s=10", "trace.rate_rps=2")


def test_a_plan_of_unknown_quality_runs_and_says_what_is_unknown(tmp_path: Path, run_here: Run) -> None:
    done = run_here(*EIGHT, "--multirun", "policy=dense,int8", "hydra.sweep.dir=jobs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("note: quality unknown") == 1
    dense, eight = (json.loads(path.read_text()) for path in sorted((tmp_path / "jobs").glob("*/summary.json")))
    assert dense["quality_nll"] > 0
    assert dense["quality_note"] is None
    assert eight["quality_nll"] is None
    assert eight["slo_attainment"] > 0
    sweep = run_here(*EIGHT, "policy=int8", "seeds=[0,1]", "hydra.run.dir=sweep", cwd=tmp_path)
    assert "unknown" in sweep.stdout
    assert sweep.returncode == 0, sweep.stderr


def test_a_mean_over_requests_of_known_quality_alone_is_no_mean() -> None:
    cfg = composed(*EIGHT, "policy=schedule", "policy.steps=[{at_s:0},{at_s:4,weight_bits:8}]")
    engine, policy = build_engine(cfg)  # type: ignore[arg-type]
    replay(build_trace(cfg), engine, policy, tick_s=1.0)  # type: ignore[arg-type]
    nll = engine.records().quality_nll
    assert 0 < np.isfinite(nll).sum() < len(nll)
    assert figures(engine, build(cfg.slo))["quality_nll"] is None  # type: ignore[attr-defined]


def test_a_report_states_the_share_of_tokens_outside_the_fitted_range(tmp_path: Path, run_here: Run) -> None:
    deep = "{at_s:5,drop_ffn:[3,4,5,6,7,13,22,24,27],drop_mha:[3,4,5,6]}"
    given = ["model=smollm2_135m", "gpu=cpu_epyc_1thread", "engine=small", "budget=small", "workspace_bytes=1e8"]
    given += ["trace=small", "trace.duration_s=15", "policy=schedule", f"policy.steps=[{{at_s:0}},{deep}]"]
    done = run_here(*given, "hydra.run.dir=run", cwd=tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0.2 < summary["quality_outside_share"] < 0.95
    assert f"{100 * summary['quality_outside_share']:.1f} % of tokens" in done.stdout
