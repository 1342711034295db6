"""Every scenario composes from configuration, serves, and charges what it says."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from agents.envs.serve import ServeCore, ServeSetting
from agents.envs.serve_vector import ServeTraceVector
from agents.envs.serve_windows import Window
from agents.evaluation.static_plans import scenario_kwargs
from sim.config import load_option
from sim.cost.memory import weight_bytes
from sim.cost.plan import dense_plan
from sim.errors import ConfigError
from sim.results.metrics import met_slo
from sim.results.records import Status
from tests.agents.helpers import composed

GIGABYTES = {"roomy": (72, 24), "mid": (20, 12), "tight": (16, 6)}
COPIES = {"published": 0.0231, "measured": 0.298, "none": None}
NINE = list(product(GIGABYTES, COPIES))
WINDOW = Window(source="burst", start_s=300.0, rate=1.1, budget="steps", budget_seed=4)


def setting_of(scenario: str, copies: str, **changed: Any) -> ServeSetting:
    return ServeSetting(**(scenario_kwargs(scenario, copies) | changed))


@pytest.mark.parametrize(("scenario", "copies"), NINE)
def test_a_scenario_has_its_memory_its_copies_and_a_table_of_at_most_forty_plans(scenario: str, copies: str) -> None:
    setting = setting_of(scenario, copies)
    found = setting.budget.bytes_of(setting.server.budget_context(dense_plan(setting.model)))
    assert tuple(round(one / 1e9) for one in found) == GIGABYTES[scenario]
    assert setting.slo.ttft_s == 2.0
    assert setting.slo.tpot_s == 0.1
    assert len(setting.actions.plans) <= 40
    assert setting.actions.plans[0].weight_bits == (16,) * 32
    lowest = [
        plan for plan in setting.actions.plans if plan.weight_bits == (4,) * 32 and plan.decode.mha == (True,) * 32
    ]
    cost = COPIES[copies]
    assert bool(lowest) == (cost is not None)
    if cost is not None:
        assert setting.nll(lowest[0]) - setting.dense_nll == pytest.approx(cost, abs=1e-3)
    # In every scenario a plan's loss is known or bounded, and something fits the least memory wherever copies exist.
    assert all(math.isfinite(setting.nll(plan)) for plan in setting.actions.plans)
    least = min(setting.actions.weights_bytes) + setting.workspace_bytes
    assert (least <= found[1]) == (scenario != "tight" or cost is not None)


@pytest.mark.parametrize(("scenario", "copies"), NINE)
def test_a_short_episode_of_a_scenario_ends_with_every_request_settled(scenario: str, copies: str) -> None:
    setting = setting_of(scenario, copies)
    core, rng = ServeCore(setting), np.random.default_rng(0)
    core.begin(WINDOW)
    over, total = False, 0.0
    while not over:
        legal = np.flatnonzero(setting.actions.legal(core.state, core.choice))
        reward, over = core.step(int(rng.choice(legal)))
        total += reward
    records = core.engine.records()
    assert set(records.status.tolist()) <= {int(Status.FINISHED), int(Status.REJECTED)}
    assert total == pytest.approx(10.0 * (core.utility - 1.0))
    assert core.illegal == 0


@pytest.mark.parametrize("command", ["train", "clone"])
def test_commands_that_train_take_a_scenario(command: str) -> None:
    importlib.import_module(f"agents.{command}")
    cfg = composed(command, "env=serve_trace", "scenario=tight", "low_bits=none")
    assert cfg.env.kwargs.budget.low_share == 0.445
    assert list(cfg.env.kwargs.actions.low_layers) == [0]
    assert composed(command, "env=serve_trace", "scenario=tight").env.kwargs.quality == "llama2_7b_transferred"
    own = load_option("env", "serve_trace").kwargs  # what a scenario does not name stays
    assert cfg.env.kwargs.actions.dwell_s == own.actions.dwell_s


def test_an_unknown_scenario_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="roomy"):
        scenario_kwargs("romy", "none")
    with pytest.raises(ConfigError, match="published"):
        scenario_kwargs("roomy", "publishd")


def test_a_request_that_decodes_too_slowly_is_lost_when_it_finishes_in_both_engines() -> None:
    kwargs = scenario_kwargs("roomy", "published")
    setting = ServeSetting(**kwargs)
    core, vector = ServeCore(setting), ServeTraceVector(1, **kwargs)
    window = Window(source="burst", start_s=300.0, rate=1.3, budget="full", budget_seed=4)
    core.begin(window)
    vector.reset(seed=0, options={"windows": [window]})
    over = False
    start = setting.actions.start
    while not over:
        reward, over = core.step(start)
        _, rewards, *_ = vector.step(np.array([start]))
        assert rewards[0] == pytest.approx(reward, abs=1e-9)
    records = core.engine.records()
    in_time = (records.status == Status.FINISHED) & (records.ttft_s <= 2.0)
    slow = in_time & (records.tpot_s > 0.1)
    assert slow.any()  # otherwise this window shows nothing
    loss = setting.nll(setting.actions.plans[start]) - setting.dense_nll
    assert core.utility == pytest.approx((in_time & ~slow).mean() * np.exp(-loss))  # one plan runs all the time
    assert (met_slo(records, setting.slo) == (in_time & ~slow)).all()
    # Until it finishes, such a request may still be in time: it is lost at its end, not before.
    first_slow = int(np.flatnonzero(slow)[0])
    only = type(records)(**{name: getattr(records, name)[[first_slow]] for name in records.__dataclass_fields__})
    from agents.envs.reward import utility_lost

    finish_s = float(records.finish_s[first_slow])
    assert utility_lost(only, setting.slo, setting.dense_nll, finish_s, 1) == 1.0
    # Whoever looks ahead sees it lost as soon as its tokens come too slowly.
    running = replace(only, status=np.array([Status.RUNNING]), finish_s=np.array([np.nan]))
    certain = utility_lost(running, setting.slo, setting.dense_nll, finish_s, 1)
    assert certain < 0.5 < utility_lost(running, setting.slo, setting.dense_nll, finish_s, 1, ahead_s=1.0) == 1.0
    in_pace = replace(running, first_token_s=np.array([finish_s - 0.05 * (only.produced_tokens[0] - 1)]))
    in_pace = replace(in_pace, arrival_s=in_pace.first_token_s - 0.5)
    assert utility_lost(in_pace, setting.slo, setting.dense_nll, finish_s, 1, ahead_s=1.0) < 0.5


def test_the_dense_weights_are_what_the_shares_multiply() -> None:
    setting = setting_of("mid", "none")
    assert weight_bytes(setting.model, dense_plan(setting.model)) == 13_476_831_232
