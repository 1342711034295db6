"""``python -m hw.replay`` takes the overrides of ``python -m sim.replay`` and writes the same files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import hw.elastic.checkpoint
import hw.engine.hw_engine
import hw.replay.run
import sim.replay.__main__
import sim.replay.run
from hw.engine.torch_executor import TorchExecutor
from sim.errors import ConfigError
from tests.hw.serving import flat_latency_content, save_checkpoint, tiny, torch

SMALL = ("trace=small", "trace.duration_s=6", "trace.lengths.max_prompt_tokens=60", "trace.lengths.max_output_tokens=9")
CHATS = (
    "trace=chats",
    "trace.arrivals.rate_rps=2",
    "trace.arrivals.duration_s=5",
    "trace.think_s=0.5",
    "trace.lengths.prompt_tokens_p50=8",
    "trace.lengths.output_tokens_p50=5",
    "trace.max_context_tokens=70",
)


class Tokenizer:
    eos_token_id = 0


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that runs a command in this process, with the overrides that both commands share."""
    tiny().config.save_pretrained(tmp_path)
    (tmp_path / "flat.json").write_text(json.dumps(flat_latency_content(fixed_us=1e4, token_us=10.0)))
    monkeypatch.setattr(hw.elastic.checkpoint, "load_checkpoint", lambda *_, **__: (tiny(), Tokenizer()))
    overrides = [
        "model=hf",
        f"model.config={tmp_path}",
        "+model.name=tiny",
        f"latency={tmp_path / 'flat.json'}",
        "engine=vllm_v1",
        "engine.kv_block_tokens=4",
        "budget=kv_blocks",
        "budget.blocks=40",
        "workspace_bytes=0",
        "gpu=l4_24gb",
        "iterations=true",
        "plot=true",
    ]

    def command(module: str, *more: str, name: str = "run", trace: Sequence[str] = SMALL) -> Path:
        folder = tmp_path / name
        mine = ["hw.text=null", "hw.skip_idle=true"] if module == "hw" else []
        monkeypatch.setattr(
            sys, "argv", [f"{module}.replay", *trace, *overrides, *mine, *more, f"hydra.run.dir={folder}"]
        )
        GlobalHydra.instance().clear()
        (hw.replay.run.main if module == "hw" else sim.replay.__main__.main)()
        return folder

    return command


def test_the_same_overrides_give_the_same_files_columns_and_requests_on_both_engines(run: Callable[..., Path]) -> None:
    real, simulated = run("hw", name="real"), run("sim", name="simulated")
    files = {path.name for path in simulated.iterdir()}
    assert {path.name for path in real.iterdir()} == files | {"hardware.json", "passes.parquet"}
    passes, iterations = (pd.read_parquet(real / f"{name}.parquet") for name in ("passes", "iterations"))
    for column in ("start_s", "end_s", "prefill_tokens"):
        assert passes[column].tolist() == iterations[column].tolist()
    assert passes["decode_batch"].tolist() == iterations["decode_requests"].tolist()
    assert (passes["forward_s"] <= passes["end_s"] - passes["start_s"]).all()
    assert set(passes["started"]) == {"operations"}
    for name in ("records.parquet", "iterations.parquet", "transitions.parquet", "kept_share.parquet"):
        ours, theirs = pd.read_parquet(real / name), pd.read_parquet(simulated / name)
        assert dict(ours.dtypes) == dict(theirs.dtypes)
    ours, theirs = (pd.read_parquet(folder / "records.parquet") for folder in (real, simulated))
    same = ["arrival_s", "prompt_tokens", "output_tokens", "produced_tokens", "status"]
    pd.testing.assert_frame_equal(ours[same], theirs[same])
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (real, simulated)]
    assert summaries[0].keys() == summaries[1].keys()


def test_sessions_have_the_same_turns_tokens_and_think_times_on_both_engines(run: Callable[..., Path]) -> None:
    real, simulated = (
        pd.read_parquet(run(kind, name=kind, trace=CHATS) / "records.parquet").sort_values(
            "trace_row", ignore_index=True
        )
        for kind in ("hw", "sim")
    )
    same = ["session", "turn", "trace_row", "prompt_tokens", "output_tokens", "produced_tokens", "status"]
    pd.testing.assert_frame_equal(real[same], simulated[same])
    assert real["turn"].max() >= 2
    assert (real["status"] == "finished").all()
    thought_s = []
    for records in (real, simulated):
        before = records.set_index(["session", "turn"])["finish_s"]
        later = records[records["turn"] > 0]
        ended_s = before.loc[list(zip(later["session"], later["turn"] - 1, strict=True))].to_numpy()
        thought_s.append(later["arrival_s"].to_numpy() - ended_s)
    assert len(thought_s[0]) >= 10
    assert min(thought_s[0]) >= 0.0
    assert max(abs(thought_s[0] - thought_s[1])) < 1e-9


def test_a_policy_that_decides_runs_unchanged_and_memory_is_what_was_counted(run: Callable[..., Path]) -> None:
    folder = run("hw", "policy=morphserve", "tick_s=0.2", "budget.blocks=20", "hw.clock=cpu")
    hardware = json.loads((folder / "hardware.json").read_text())
    assert hardware["largest_difference_bytes"] == 0
    assert hardware["peak_allocated_bytes"] > 0
    assert hardware["clock"] == "cpu"
    assert OmegaConf.load(folder / "config.yaml").policy._target_ == "sim.policies.morphserve.morphserve"
    assert (pd.read_parquet(folder / "records.parquet").status == "finished").all()


def test_ctrl_c_leaves_complete_records_of_the_run_so_far(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    end = hw.engine.hw_engine.HwEngine._end

    def stop_after_a_while(engine: hw.engine.hw_engine.HwEngine, under_way: Any) -> None:
        end(engine, under_way)
        if len(engine.iterations()) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(hw.engine.hw_engine.HwEngine, "_end", stop_after_a_while)
    with pytest.raises(SystemExit) as ended:
        run("hw", name="stopped")
    assert ended.value.code == 130
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert summary["interrupted"]
    assert summary["iterations"] == 5
    records, iterations = (pd.read_parquet(tmp_path / "stopped" / f"{n}.parquet") for n in ("records", "iterations"))
    assert len(iterations) == 5
    assert summary["requests"] == len(records)
    assert summary["not_arrived"] > 0
    answered = records[records.produced_tokens > 0]
    assert len(answered) > 0
    assert (answered.first_token_s <= iterations.end_s.max()).all()
    assert (records.finish_s.notna() == (records.status == "finished")).all()
    names = {path.name for path in (tmp_path / "stopped").iterdir()}
    assert {"transitions.parquet", "kept_share.parquet", "hardware.json"} <= names
    assert not [name for name in names if name.endswith(".part")]


def test_a_nan_in_a_layer_ends_the_command_with_block_and_plan_named(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tiny()
    broken.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    monkeypatch.setattr(hw.elastic.checkpoint, "load_checkpoint", lambda *_, **__: (broken, Tokenizer()))
    with pytest.raises(SystemExit) as ended:
        run("hw", "policy=fixed", "policy.drop_mha=[1]")
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "FFN2" in message
    assert "-MHA 1" in message


def test_memory_that_runs_out_is_caught_and_counted_in_hardware_json(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, failed = TorchExecutor.forward, []

    def starved(executor: TorchExecutor, iteration: Any) -> dict[int, int]:
        if len(iteration.batch.scheduled) > 1 and len(failed) < 3:
            failed.append(iteration)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(executor, iteration)

    monkeypatch.setattr(TorchExecutor, "forward", starved)
    # All at once, so that two run together however fast this machine is.
    folder = run("hw", "trace.on_rate_rps=1000", "trace.off_rate_rps=1000", "trace.duration_s=0.02")
    assert json.loads((folder / "hardware.json").read_text())["out_of_memory"] == 3
    assert (pd.read_parquet(folder / "records.parquet").status == "finished").all()
    assert json.loads((folder / "summary.json").read_text())["preemptions"] >= 3


@pytest.mark.parametrize(
    ("value", "says"),
    [("flash_atn", "did you mean 'flash_attn'?"), ("triton", "do not run on cpu; available here: auto, sdpa")],
)
def test_a_way_of_attention_that_is_not_there_is_one_line(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: str, says: str
) -> None:
    monkeypatch.setattr("hw.elastic.ops.have_triton", lambda: True)
    with pytest.raises(SystemExit) as ended:
        run("hw", f"hw.attention={value}", "hw.device=cpu")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "hw.attention is" in error
    assert says in error
    assert "Traceback" not in error


def test_processor_seconds_on_a_gpu_are_refused_before_the_model_loads(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hw.replay.run, "pick_device", lambda _: torch.device("cuda:0"))
    monkeypatch.setattr(hw.elastic.checkpoint, "load_checkpoint", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as ended:
        run("hw", "hw.clock=cpu")
    assert ended.value.code == 2
    assert "set the clock to wall" in capsys.readouterr().err


def test_a_policy_that_never_changes_its_plan_stores_no_weights(run: Callable[..., Path]) -> None:
    assert json.loads((run("hw", name="dense") / "hardware.json").read_text())["stored_weight_bytes"] == 0
    swaps = run("hw", "policy=morphserve", name="swaps")
    assert json.loads((swaps / "hardware.json").read_text())["stored_weight_bytes"] > 0


def test_a_checkpoint_that_is_not_the_described_model_is_refused(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hw.elastic.checkpoint, "load_checkpoint", lambda *_, **__: (tiny("qwen3"), Tokenizer()))
    with pytest.raises(SystemExit):
        run("hw")
    assert "describes" in capsys.readouterr().err


SHORT = [
    "trace=small",
    "trace.duration_s=3",
    "trace.lengths.max_prompt_tokens=40",
    "trace.lengths.max_output_tokens=5",
    "engine=vllm_v1",
    "budget=kv_blocks",
    "budget.blocks=40",
    "workspace_bytes=0",
]
CHECKPOINT_ONLY = ["hw.skip_idle=true", "hw.clock=cpu", "hw.device=cpu"]


def command(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], *overrides: str) -> None:
    monkeypatch.setattr(sys, "argv", ["replay", *SHORT, *overrides])
    GlobalHydra.instance().clear()
    main()


def test_any_checkpoint_runs_from_its_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_checkpoint(tmp_path / "mine-1.5")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 90}" for i in range(200)), encoding="utf-8")
    given = ["model=hf", f"model.config={folder}", f"hw.text={tmp_path / 'text.txt'}", *CHECKPOINT_ONLY]
    command(monkeypatch, hw.replay.run.main, *given, f"hydra.run.dir={tmp_path / 'run'}")
    assert "requests on mine-1.5" in capsys.readouterr().out
    assert (pd.read_parquet(tmp_path / "run" / "records.parquet").status == "finished").all()


def test_a_checkpoint_without_a_tokenizer_serves_random_ids_and_says_so_where_text_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_checkpoint(tmp_path / "bare", tokenizer=False)
    (tmp_path / "text.txt").write_text("any text", encoding="utf-8")
    given = ["model=hf", f"model.config={folder}", *CHECKPOINT_ONLY]
    command(monkeypatch, hw.replay.run.main, *given, "hw.text=null", f"hydra.run.dir={tmp_path / 'run'}")
    assert (tmp_path / "run" / "summary.json").is_file()
    with pytest.raises(SystemExit) as ended:
        command(
            monkeypatch,
            hw.replay.run.main,
            *given,
            f"hw.text={tmp_path / 'text.txt'}",
            f"hydra.run.dir={tmp_path / 'other'}",
        )
    assert ended.value.code == 2
    assert "has no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["seeds=[0,1]"]])
def test_the_simulator_names_a_model_that_has_its_name_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    folder = save_checkpoint(tmp_path / "tiny", tokenizer=False)
    (tmp_path / "flat.json").write_text(json.dumps(flat_latency_content(fixed_us=1e4, token_us=10.0)))
    given = ["model=hf", f"model.config={folder}", f"latency={tmp_path / 'flat.json'}", *more]
    command(monkeypatch, sim.replay.__main__.main, *given, f"hydra.run.dir={tmp_path / 'run'}")
    assert "on tiny" in " ".join(capsys.readouterr().out.split())


def test_a_tokenizer_of_another_model_is_refused_before_anything_runs() -> None:
    from hw.engine.prompts import read_prompts

    def tokenizer(*_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1, 2, 500])

    with pytest.raises(ConfigError, match="token 500"):
        read_prompts(__file__, tokenizer, 97, seed=0)


@pytest.mark.parametrize("rows", ["0,5,4", "0,5,4\n0,6,3", "0,5,4\n0.0001,6,3"])
def test_a_trace_whose_requests_arrive_at_once_is_replayed_to_its_end(tmp_path: Path, rows: str) -> None:
    import hw.replay.run
    from tests.commands import exit_status
    from tests.soak.tiny_checkpoint import overrides, write_checkpoint

    (tmp_path / "trace.csv").write_text(f"arrival_s,prompt_tokens,output_tokens\n{rows}\n")
    model = overrides(write_checkpoint(tmp_path / "checkpoint"))
    arguments = ["trace=file", f"trace.path={tmp_path / 'trace.csv'}", "hw.text=null", "budget.blocks=96", *model]
    assert exit_status(hw.replay.run.main, *arguments, f"hydra.run.dir={tmp_path / 'run'}") == 0
    assert (pd.read_parquet(tmp_path / "run" / "records.parquet").status == "finished").all()


def test_what_only_the_simulator_has_is_refused_before_a_model_is_loaded(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hw.replay.run, "load_elastic", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as ended:
        run("hw", "engine.copying=blocking")
    assert ended.value.code == 2
    assert "the real engine serves while it copies weights in" in capsys.readouterr().err
