"""Oneiros: pressure asks for streamed layers, computing allows them, and a budget below the weights overrules both."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sim.cost.plan import check_plan
from sim.engine.budget import constant_budget
from sim.engine.protocol import EngineState
from sim.engine.server_spec import ServerSpec
from sim.errors import ConfigError
from sim.policies.base import PolicyContext
from sim.policies.oneiros import Oneiros, oneiros
from sim.replay.loop import replay
from sim.results.records import Status
from sim.traces.trace import Trace
from tests.sim.serving import TINY, tiny_engine

SLOW = ServerSpec.from_names(model="llama2_7b", gpu="a100_80gb", latency="llama2_7b_a100_trtllm")
FAST = replace(SLOW, gpu=replace(SLOW.gpu, host_to_device_bytes_per_s=450e9))
STATE = tiny_engine().run_until(0.0)
ROOMY = 80_000_000_000


def seen(used: int, running: int = 64, budget: int = ROOMY, **changed: Any) -> EngineState:
    """Return a state with a share of the KV pool in use, in percent."""
    counts = {"running": running, "running_tokens": 512 * running, "budget_bytes": budget, "next_budget_bytes": budget}
    return dataclasses.replace(STATE, kv_layer_blocks=100, kv_used_layer_blocks=used, **{**counts, **changed})


def policy(server: ServerSpec, **options: Any) -> Oneiros:
    return oneiros(PolicyContext.of(server), **{"calm": 0.5, "smoothing": 1.0, "layers": [4, 8, 16], **options})


def test_more_layers_are_streamed_under_pressure_and_none_after_calm() -> None:
    made = policy(FAST)
    assert sum(made.first_plan.streamed) == 16
    counts = [sum(made(seen(used)).streamed) for used in (0, 60, 80, 100, 60, 0, 0)]
    assert counts == [0, 4, 8, 16, 4, 0, 0]


def test_layers_are_streamed_only_as_far_as_computing_hides_their_copies() -> None:
    # Over PCIe 4.0 four layers of 405 MB take 65 ms, and 64 decodes about 20 ms.
    assert not any(policy(SLOW)(seen(100)).streamed)
    assert sum(policy(SLOW, most_stretch=5.0)(seen(100)).streamed) == 4
    # At 450 GB/s sixteen layers take 14 ms: more than the 11 ms of 8 decodes.
    assert sum(policy(FAST)(seen(100, running=8)).streamed) == 8
    assert sum(policy(FAST)(seen(100, running=64)).streamed) == 16


def test_a_level_that_computing_has_not_allowed_is_not_kept_for_later() -> None:
    made = policy(SLOW)
    assert [sum(made(seen(used)).streamed) for used in (100, 100, 0)] == [0, 0, 0]


def test_a_budget_below_the_weights_streams_without_load_and_over_any_link() -> None:
    # 13.5 GB hold neither the dense weights and the workspace nor all but two layers of them.
    assert sum(policy(SLOW)(seen(0, budget=13_500_000_000)).streamed) == 8
    announced = seen(0, next_budget_bytes=13_500_000_000)
    assert sum(policy(SLOW)(announced).streamed) == 8


def test_layers_come_back_only_where_their_copies_fit_too() -> None:
    made = policy(SLOW)
    dense = made.weights_bytes[0]
    assert made.peaks[1][0] > dense
    assert sum(made(seen(0, budget=dense)).streamed) == 4  # dense would fit, but not the way there
    assert sum(made(seen(0, budget=made.peaks[1][0])).streamed) == 0


def test_steps_are_nested_and_legal() -> None:
    made = policy(FAST)
    for fewer, more in zip(made.plans, made.plans[1:], strict=False):
        check_plan(SLOW.model, more)
        assert all(there for here, there in zip(fewer.streamed, more.streamed, strict=True) if here)
    assert [i for i, streamed in enumerate(made.plans[1].streamed) if streamed] == [0, 8, 16, 24]


def test_a_server_below_its_dense_weights_serves_within_its_budget() -> None:
    budget = 13_000_000_000
    made = policy(FAST)
    engine = FAST.build_engine(made.first_plan, constant_budget(budget))
    trace = Trace(arrival_s=np.arange(40) / 2, prompt_tokens=np.full(40, 200), output_tokens=np.full(40, 50))
    replay(trace, engine, made)
    assert engine.budget_violation_s == 0.0
    assert (engine.records().status == Status.FINISHED).all()


def test_bad_options_are_refused() -> None:
    for wrong in ([2, 4], [8, 4], [], [33]):
        with pytest.raises(ConfigError, match=r"policy\.layers is .* must ascend and lie between 3 and 32"):
            policy(FAST, layers=wrong)
    for stretch in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"policy\.most_stretch is .* a finite number above 0"):
            policy(FAST, most_stretch=stretch)
    with pytest.raises(ConfigError, match="needs a server with a calibration"):
        oneiros(PolicyContext(model=TINY), layers=[3])
