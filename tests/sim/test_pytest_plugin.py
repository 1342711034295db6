"""Fixtures for other people's tests: a simulated server at a stated use of its KV cache."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable

import pytest

from sim.cost.model_spec import load_model
from sim.engine.protocol import Request
from sim.errors import ConfigError
from sim.paths import REPOSITORY
from sim.policies.fixed import static_plan
from sim.pytest_plugin import ServerAt, make_server, server_at

__all__ = ["server_at"]  # the plug-in is not installed where the project runs from a folder

MakeServer = Callable[..., ServerAt]


def test_a_server_has_the_stated_use_queue_and_running_requests(server_at: MakeServer) -> None:
    rng = random.Random(0)
    for _ in range(10):
        share, waiting = rng.random(), rng.randrange(5)
        server = server_at(kv_share=share, waiting=waiting, prompt_tokens=rng.randrange(100, 2000))
        state = server.state
        assert server.kv_share == pytest.approx(share, abs=0.001)
        assert (state.waiting, state.preemptions, state.rejected) == (waiting, 0, 0)
        assert state.running > 0
    assert server_at(kv_share=0.4, running=30).state.running == 30
    assert server_at(kv_share=0.0).state.running == 0


def test_a_server_goes_on_from_there(server_at: MakeServer) -> None:
    server = server_at(kv_share=0.5, waiting=1)
    later = server.engine.run_until(1.0)
    assert later.produced_tokens > server.state.running
    assert later.kv_used_layer_blocks > server.state.kv_used_layer_blocks
    assert later.waiting == 1  # no more run at once than did
    server.engine.submit([Request(request_id=10_000, arrival_s=1.0, prompt_tokens=10, output_tokens=1)])
    assert server.engine.run_until(1.0).waiting == 2


def test_a_full_server_preempts(server_at: MakeServer) -> None:
    full = server_at(kv_share=1.0)
    assert full.engine.run_until(2.0).preemptions > 0
    assert server_at(kv_share=0.5).engine.run_until(2.0).preemptions == 0


def test_other_models_devices_and_plans_are_taken_by_name(server_at: MakeServer) -> None:
    plan = static_plan(load_model("llama2_7b"), drop_mha=[24, 25])
    server = server_at(kv_share=0.7, gpu="l4_24gb", engine="vllm_v0", plan=plan)
    assert server.kv_share == pytest.approx(0.7, abs=0.001)
    assert server.state.plan == plan


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kv_share": 1.5}, "from 0 to 1"),
        ({"waiting": -1}, "waiting is -1"),
        ({"running": 2}, "2 running requests cannot hold"),
        ({"running": 1}, "1 running request cannot hold"),
        ({"running": 10**9}, "1000000000 running requests cannot hold"),
        ({"running": 2.5}, "running is 2.5; it must be a whole number"),
        ({"waiting": True}, "waiting is True; it must be a whole number"),
        ({"waiting": 10**7}, "1e\\+07 waiting requests, more than the limit of 100,000"),
        ({"running": 50, "waiting": 1, "prompt_tokens": 5000}, "refuses a prompt of 5000 tokens"),
        ({"memory_bytes": 0}, "memory_bytes is 0"),
        ({"memory_bytes": float("inf")}, "memory_bytes is inf"),
        ({"kv_share": 0.0, "waiting": 2}, "none runs"),
        ({"gpu": "a100_80"}, "did you mean"),
    ],
)
def test_a_condition_that_cannot_be_is_an_error(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_server(**wrong)  # type: ignore[arg-type]


def test_pytest_finds_the_plug_in_where_the_project_is_installed() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"rap_lab": "sim.pytest_plugin"}
