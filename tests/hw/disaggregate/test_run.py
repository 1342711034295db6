"""``python -m hw.disaggregate``: two real processes, one run folder, and what remains when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

import hw.disaggregate.run as command
from hw.disaggregate.kv_link import Channel, LinkError
from hw.disaggregate.pair import Pair, check_config
from hw.disaggregate.processes import LOOPBACK, STOP, accept_peer
from sim.config import CONF_DIR
from sim.cost.kv_format import stored_kv_bytes
from sim.disaggregate.run import disaggregate_command, plan_of
from sim.errors import ConfigError
from sim.results.records import Status
from tests.hw.serving import flat_latency_content, tiny, tiny_spec, transformers

PRUNED = [
    "policy=fixed",
    "policy.drop_mha=[2]",
    "policy.prefill_drop_mha=[]",
    "policy.kv_first_tokens=2",
    "policy.kv_last_tokens=6",
    "policy.kv_layers=[1]",
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the overrides that both commands share; the model is a tiny random one on disk."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"w0": 0}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    tiny().save_pretrained(folder)
    (folder / "flat.json").write_text(json.dumps(flat_latency_content(fixed_us=1e3, token_us=10.0)))
    return [
        "trace=small",
        "workload=none",
        "trace.duration_s=1",
        "trace.on_rate_rps=6",
        "trace.off_rate_rps=6",
        "trace.lengths.max_prompt_tokens=60",
        "trace.lengths.max_output_tokens=9",
        "model=hf",
        f"model.config={folder}",
        "+model.name=tiny",
        f"latency={folder / 'flat.json'}",
        "engine=vllm_v1",
        "engine.kv_block_tokens=4",
        "budget=kv_blocks",
        "budget.blocks=60",
        "workspace_bytes=0",
        "gpu=l4_24gb",
        "slo=ttft_2s",
        "link_bytes_per_s=1e6",
        "link_latency_s=0",
    ]


def mine(shared: list[str], *more: str) -> list[str]:
    """Return the overrides of the real command."""
    return [*shared, f"hw.checkpoint={shared[8].partition('=')[2]}", "hw.text=null", "hw.device=cpu", *more]


def config(shared: list[str], *more: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("hw_disaggregate", overrides=mine(shared, *more))


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Start both processes once for all tests: importing torch takes them seconds."""
    with Pair() as both:
        yield both


@pytest.fixture
def run(pair: Pair, shared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that runs a command in this process; the real command uses the running pair."""

    class Same:
        def __enter__(self) -> Pair:
            return pair

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(command, "Pair", Same)

    def call(module: str, *more: str) -> Path:
        folder = tmp_path / module
        own = mine(shared, *more) if module == "hw" else [*shared, "prefill_replicas=1", "decode_replicas=1", *more]
        monkeypatch.setattr(sys, "argv", [f"{module}.disaggregate", *own, f"hydra.run.dir={folder}"])
        GlobalHydra.instance().clear()
        (command.disaggregate_command if module == "hw" else disaggregate_command)()
        return folder

    return call


def test_the_same_configuration_gives_the_same_columns_requests_and_bytes_as_in_simulation(
    run: Callable[..., Path], shared: list[str]
) -> None:
    real, simulated = run("hw", *PRUNED, "plot=true"), run("sim", *PRUNED)
    files = {"config.yaml", "provenance.json", "records.parquet", "summary.json"}
    assert files <= {path.name for path in simulated.iterdir()}
    more = {"hardware.json", "transfers.parquet", "iterations.parquet", "replay.png"}
    assert files | more <= {path.name for path in real.iterdir()}
    ours, theirs = (pd.read_parquet(folder / "records.parquet") for folder in (real, simulated))
    assert dict(ours.dtypes) == dict(theirs.dtypes)
    same = ["arrival_s", "prompt_tokens", "output_tokens", "produced_tokens", "status", "prefill_replica"]
    same += ["decode_replica", "sent_bytes", "kept_params_share"]
    pd.testing.assert_frame_equal(ours[same], theirs[same])
    assert (ours.status == "finished").all()
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (real, simulated)]
    assert summaries[0].keys() - summaries[1].keys() == {"interrupted", "failure"}
    assert summaries[0]["transfer_reduction"] == summaries[1]["transfer_reduction"] > 1
    hardware = json.loads((real / "hardware.json").read_text())
    assert hardware["largest_difference_bytes"] == 0
    transfers = pd.read_parquet(real / "transfers.parquet")
    plan = plan_of(config(shared, *PRUNED))
    for row in transfers.itertuples():
        assert row.sent_bytes == stored_kv_bytes(tiny_spec(), plan, int(ours.prompt_tokens[row.request_id]))
        assert row.sent_s - row.send_s >= row.sent_bytes / 1e6  # never faster than the link
        assert row.released_s >= row.sent_s


def test_one_pair_serves_one_plan_after_another(pair: Pair, shared: list[str]) -> None:
    sent = {}
    for name, policy in (("dense", []), ("pruned", PRUNED), ("dense again", [])):
        outcome = pair.serve(config(shared, *policy))
        assert outcome.failure is None
        assert (outcome.records.status == Status.FINISHED).all()
        sent[name] = int(outcome.records.sent_bytes.sum())
    assert sent["dense"] == sent["dense again"] > sent["pruned"] > 0


@pytest.fixture
def once_joined(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Return a function that runs an action in the parent once the KV of two requests has joined."""

    def arrange(act: Callable[[], None]) -> None:
        receive, done = Pair._receive, []

        def received(self: Pair, reports: Any) -> None:
            receive(self, reports)
            if len(reports.transfers) >= 2 and reports.rows["decode"] and not done:
                done.append(True)
                act()

        monkeypatch.setattr(Pair, "_receive", received)

    return arrange


def test_random_weights_are_named_in_the_summary(run: Callable[..., Path]) -> None:
    folder = run("hw", "hw.checkpoint=random:2")
    assert "weights are random (random:2)" in json.loads((folder / "summary.json").read_text())["quality_note"]


def test_ctrl_c_keeps_what_is_known_and_the_processes_serve_on(
    pair: Pair,
    shared: list[str],
    run: Callable[..., Path],
    once_joined: Callable[[Callable[[], None]], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    once_joined(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        run("hw", "trace.duration_s=30")
    assert ended.value.code == 130
    summary = json.loads((tmp_path / "hw" / "summary.json").read_text())
    records = pd.read_parquet(tmp_path / "hw" / "records.parquet")
    assert summary["interrupted"]
    assert 0 < len(records) == summary["requests"] < summary["requests"] + summary["not_arrived"]
    assert (records.status == "finished").any()
    assert "interrupted: kept the records" in capsys.readouterr().out
    assert pair.serve(config(shared)).failure is None


def test_a_budget_that_is_too_small_is_a_clear_error_and_the_processes_serve_on(pair: Pair, shared: list[str]) -> None:
    outcome = pair.serve(config(shared, "engine.kv_block_tokens=1", "budget.blocks=1"))
    assert outcome.failure is not None
    assert "the decode process: weights" in outcome.failure
    assert len(outcome.records) == 0
    assert pair.serve(config(shared)).failure is None


def test_a_process_that_is_killed_is_named_and_the_records_so_far_are_written(
    pair: Pair,
    run: Callable[..., Path],
    once_joined: Callable[[Callable[[], None]], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def kill() -> None:
        pid = pair.processes["decode"].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    once_joined(kill)
    with pytest.raises(SystemExit) as ended:
        run("hw", "trace.duration_s=30")
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "the decode process: it exited with code -9" in message
    assert "the prefill process: the decode process has gone" in message
    summary = json.loads((tmp_path / "hw" / "summary.json").read_text())
    records = pd.read_parquet(tmp_path / "hw" / "records.parquet")
    assert summary["failure"] is not None
    assert summary["finished"] == (records.status == "finished").sum() > 0  # reported before it was killed
    assert (records.decode_replica[records.status == "finished"] == 0).any()


# --- Without processes -----------------------------------------------------------------------------------------------


def test_a_connection_without_the_key_is_closed() -> None:
    ours, theirs = Pipe()
    with socket.create_server((LOOPBACK, 0)) as server:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(accept_peer(server, "secret", theirs)))
        thread.start()
        stranger, friend = (socket.create_connection(server.getsockname()) for _ in range(2))
        Channel(stranger, "it").send({"kind": "hello", "key": "wrong"})
        Channel(friend, "it").send({"kind": "hello", "key": "secret"})
        thread.join(10)
        with pytest.raises(LinkError, match="has gone"):
            Channel(stranger, "it").receive()
        found[0].send({"kind": "welcome"})
        assert Channel(friend, "it").receive()["kind"] == "welcome"
        ours.send(STOP)
        assert accept_peer(server, "secret", theirs) is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy=morphserve", "choose a fixed policy"),
        ("link_bytes_per_s=0", "must be above 0"),
        ("hw.clock=cpu", "share only the wall clock"),
        ("budget=steps", "need a constant budget"),
        ("policy=fixed policy.kv_hidden=true model=llama2_7b", "cannot send the other"),
        ("policy=fixed policy.kv_method=ada_kv policy.kv_percent=70", "does not send the other how a prompt is packed"),
    ],
)
def test_what_two_processes_cannot_serve_is_refused_before_they_get_it(override: str, message: str) -> None:
    more = ["budget.rows=[[0,0.06],[1,0.05]]"] if override == "budget=steps" else []
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("hw_disaggregate", overrides=[*override.split(), *more])
    with pytest.raises(ConfigError, match=message):
        check_config(cfg)
