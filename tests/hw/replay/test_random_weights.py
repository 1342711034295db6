"""Random weights for any model description: served, measured and compared without a download, and said to be random."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx", reason="the server needs it: pip install -e '.[hw]'")
torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")

import hw.compare  # noqa: E402
import hw.replay.run  # noqa: E402
import sim.replay.__main__  # noqa: E402
from hw.elastic.checkpoint import load_weights  # noqa: E402
from hw.elastic.model import ElasticModel  # noqa: E402
from hw.elastic.random_weights import NumberTokenizer, random_model, seed_of  # noqa: E402
from sim.cost.model_spec import ModelSpec, load_model, model_from_hf_config, model_names  # noqa: E402
from sim.errors import ModelError  # noqa: E402
from sim.paths import REPOSITORY  # noqa: E402
from sim.serve.prompts import prompt_tokens  # noqa: E402
from tests.commands import exit_status  # noqa: E402
from tests.hw.serving import flat_latency_content, tiny  # noqa: E402
from tests.hw.tiny_models import FAMILIES, tiny_config  # noqa: E402

CPU = torch.device("cpu")


def small(name: str) -> ModelSpec:
    """Return a model of conf/model with its family's parts, but tiny."""
    spec = load_model(name)
    heads = 1 if spec.num_kv_heads == spec.num_heads else 2
    return replace(
        spec,
        num_layers=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        num_kv_heads=2 // heads,
        head_dim=8,
        vocab_size=50,
        max_context_tokens=64,
        learned_positions=66 if spec.learned_positions else 0,
    )


@pytest.mark.parametrize("name", model_names())
def test_every_model_of_the_configuration_can_have_random_weights(name: str) -> None:
    spec = small(name)
    dtype = torch.float32 if spec.weight_dtype_bytes == 4 else torch.bfloat16
    made = [random_model(spec, seed=seed, dtype=dtype, place=CPU) for seed in (1, 1, 2)]
    first, again, other = (next(model.parameters()).clone() for model in made)
    elastic = ElasticModel(made[0], name=spec.name)
    assert elastic.spec == spec
    assert elastic.end_tokens == frozenset()
    assert elastic.forward([[1, 2, 3]]).isfinite().all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_with_random_weights_is_a_model_of_its_own_class(tmp_path: Path, family: str) -> None:
    config = tiny_config(family)
    config.eos_token_id = 5
    config.save_pretrained(tmp_path)
    spec = model_from_hf_config(tmp_path, "tiny", keep_all_kv=True)
    for path in (tmp_path, tmp_path / "config.json"):
        elastic, _ = load_weights("random:3", spec, dtype="bfloat16", device="cpu", config=path)
        assert replace(elastic.spec, weight_dtype_bytes=spec.weight_dtype_bytes, kv_dtype_bytes=2) == replace(
            spec, kv_dtype_bytes=2
        )
        assert type(elastic._model).__name__ == type(tiny(family)).__name__
        assert elastic.end_tokens == frozenset()
        assert elastic.forward([[1, 2, 3]]).isfinite().all()


def test_a_config_that_transformers_cannot_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"no model config at .*; give a config.json, or its folder") as caught:
        load_weights("random:3", load_model("smollm2_135m"), dtype="float32", device="cpu", config=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_seed_is_a_whole_number() -> None:
    assert seed_of("random:7") == 7
    assert seed_of("some/folder") is None
    for wrong in ("random:", "random:x", "random:-1", "random:1.5", "random:99999999999999"):
        with pytest.raises(ModelError, match="random:SEED"):
            seed_of(wrong)


def test_texts_become_numbers_of_the_vocabulary_and_back() -> None:
    tokenizer = NumberTokenizer(50)
    tokens = prompt_tokens(tokenizer, "A lighthouse")
    assert len(tokens) == 12
    assert max(tokens) < 50
    assert tokenizer.decode([3, 41], skip_special_tokens=True) == " 3 41"


def test_a_replay_on_random_weights_says_so_in_every_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny().config.save_pretrained(tmp_path)
    (tmp_path / "flat.json").write_text(json.dumps(flat_latency_content(fixed_us=1e4, token_us=10.0)))
    shared = [
        "trace=small",
        "trace.duration_s=3",
        "trace.lengths.max_prompt_tokens=40",
        "trace.lengths.max_output_tokens=5",
        "model=hf",
        f"model.config={tmp_path}",
        "+model.name=tiny",
        f"latency={tmp_path / 'flat.json'}",
        "engine=vllm_v1",
        "budget=kv_blocks",
        "budget.blocks=40",
        "workspace_bytes=0",
        "gpu=cpu_epyc_1thread",
        "iterations=true",
    ]
    mine = ["hw.checkpoint=random:3", "hw.skip_idle=true", "hw.device=cpu"]
    assert exit_status(hw.replay.run.main, *shared, *mine, f"hydra.run.dir={tmp_path / 'real'}") == 0
    assert "weights are random (random:3)" in " ".join(capsys.readouterr().out.split())
    summary = json.loads((tmp_path / "real" / "summary.json").read_text())
    assert "weights are random" in summary["quality_note"]
    assert "weights are random" in json.loads((tmp_path / "real" / "hardware.json").read_text())["weights_note"]
    assert exit_status(sim.replay.__main__.main, *shared, f"hydra.run.dir={tmp_path / 'sim'}") == 0
    capsys.readouterr()
    exit_status(hw.compare.main, str(tmp_path / "sim"), str(tmp_path / "real"), f"out={tmp_path / 'compared'}")
    assert "weights are random" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "compared" / "compare.json").read_text())["weights_notes"]


def test_the_server_serves_random_weights_and_says_so(tmp_path: Path) -> None:
    tiny().config.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = ["model=hf", f"model.config={tmp_path}", "+model.name=tiny", "hw.checkpoint=random:4", "hw.device=cpu"]
    command = [sys.executable, "-m", "hw.serve", *model, "gpu=cpu_epyc_1thread", "budget=kv_blocks", "budget.blocks=40"]
    command += ["workspace_bytes=0", f"latency={tmp_path / 'flat.json'}", f"serve.port={port}"]
    (tmp_path / "flat.json").write_text(json.dumps(flat_latency_content(fixed_us=1e4, token_us=10.0)))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=environment
    )
    try:
        assert running.stdout is not None
        said = []
        for line in running.stdout:
            said.append(line)
            if "serving" in line:
                break
        assert "weights are random (random:4)" in "".join(said), said
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=60) as client:
            assert "random" in client.get("/models").json()["data"][0]["note"]
            answer = client.post("/completions", json={"model": "tiny", "prompt": "A lighthouse", "max_tokens": 3})
        assert answer.json()["usage"] == {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}
    finally:
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0
