"""Cloning a planner that looks ahead: trials leave the engine unchanged, and their losses are those of a replay."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from omegaconf import OmegaConf

from agents.baselines.serve import conf_policy, policy_context
from agents.envs.serve import ServeCore, ServeSetting
from agents.envs.serve_lists import scenario_kwargs
from agents.envs.serve_sources import sources_with
from agents.envs.serve_windows import Window
from agents.training.clone import LookaheadClone, clone, demonstrations, fit, look_ahead, rule_for
from sim.cost.plan import Plan
from sim.engine.protocol import EngineState
from sim.errors import ConfigError
from sim.policies.base import Policy
from sim.policies.learned import read_learned
from sim.policies.learned_serve import LearnedServe
from tests.agents.helpers import composed

WINDOW = Window(source="burst", start_s=300.0, rate=1.2, budget="cotenant", budget_seed=4)
HOW = LookaheadClone(
    windows=1, every=30, horizon_s=8.0, grace_s=1.0, stray=0.3, epochs=20, batch=8, lr=1e-2, weight_decay=0.0
)


def test_looking_ahead_changes_no_record_of_the_engine() -> None:
    setting = ServeSetting()
    plain, looking = ServeCore(setting), ServeCore(setting)
    for core in (plain, looking):
        core.begin(WINDOW)
    for tick in range(1, 40):
        if tick % 10 == 0:
            look_ahead(looking, 10.0, 1.0)
        action = 2 + 8 * (tick // 20)
        assert plain.step(action) == looking.step(action)
        np.testing.assert_array_equal(plain.observe(), looking.observe())
    ours, theirs = plain.engine.records(), looking.engine.records()
    for field in dataclasses.fields(ours):
        np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name))


def test_the_loss_of_a_plan_is_what_a_replay_that_keeps_the_plan_loses() -> None:
    setting = ServeSetting()
    core = ServeCore(setting)
    core.begin(WINDOW)
    for _ in range(30):
        core.step(0)
    start_s = core.state.time_s
    lost = look_ahead(core, 10.0, 0.0)
    legal = setting.actions.legal(core.state, core.choice)
    assert (np.isfinite(lost) == legal).all()
    action = int(np.flatnonzero(legal)[-1])
    for _ in range(10):
        core.step(action)
    assert core.state.time_s == start_s + 10.0
    assert setting.lost(core.engine, 1, core.state.time_s) == pytest.approx(lost[action])


def figures(rule: Policy) -> tuple[float, ...]:
    """Return what MorphServe remembers."""
    inside = rule.policy  # type: ignore[attr-defined]
    return inside.swapped, inside.kv_share, inside.delay_s, inside.pressed, inside.relaxed


def test_the_loss_of_a_plan_with_a_rule_after_it_is_what_a_replay_of_both_loses() -> None:
    setting = ServeSetting()
    core = ServeCore(setting)
    core.begin(WINDOW)
    rule = conf_policy("saber", policy={"name": "morphserve"})(policy_context(setting))
    for _ in range(30):
        rule(core.state)
        core.step(0)
    start_s, seen = core.state.time_s, copy.deepcopy(rule)
    few = np.zeros(len(setting.actions.plans), dtype=np.bool_)
    few[np.flatnonzero(core.actions.legal(core.state, core.choice))[[0, -2, -1]]] = True
    lost = look_ahead(core, 10.0, 0.0, few, rule, 3.0)
    assert figures(rule) == figures(seen)  # only copies decided
    action = int(np.flatnonzero(np.isfinite(lost))[-1])
    core.engine.apply(setting.actions.plans[action])
    for second in range(1, 10):
        plan = rule(core.engine.run_until(start_s + second * setting.tick_s))
        if second >= 3:
            core.engine.apply(plan)
    core.engine.run_until(start_s + 10.0)
    assert setting.lost(core.engine, 1, start_s + 10.0) == pytest.approx(lost[action])
    kept = look_ahead(core, 10.0, 0.0, few)
    assert not np.array_equal(kept, lost)


@pytest.mark.parametrize("wrong", [{"then": "dense"}, {"hold_s": 1.0}, {"then": "dense", "hold_s": 9.0}], ids=str)
def test_a_rule_and_the_seconds_before_it_belong_together(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="hold_s"):
        replace(HOW, **wrong)


def test_between_two_looks_the_plans_of_the_rule_run(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = ServeSetting()
    number = len(setting.actions.plans) - 1
    taken: list[int] = []

    class Recording(ServeCore):
        def step(self, action: int) -> tuple[float, bool]:
            taken.append(action)
            return super().step(action)

    class Constant:
        first_plan = setting.actions.plans[number]

        def __call__(self, _: EngineState) -> Plan:
            return self.first_plan

    monkeypatch.setattr("agents.training.clone.ServeCore", Recording)
    monkeypatch.setattr(
        "agents.training.clone.look_ahead", lambda core, *_: np.arange(len(setting.actions.plans)) * 1.0
    )
    how = replace(HOW, stray=0.0, then=lambda _: Constant(), hold_s=2.0)
    demonstrations(setting, how, seed=1)
    assert set(taken) == {0, number}  # 0: the best of a look, and as long as the weights may not be changed again
    assert taken.count(number) > 0.8 * len(taken)


def test_a_learned_rule_decides_for_the_server_of_its_window() -> None:
    setting = ServeSetting(**scenario_kwargs("mid/measured"))
    window = replace(WINDOW, low_bits=False, low_bit_cost=16.0, slowdown=2.0)
    rule = rule_for({"name": "learned_serve"}, setting, window)
    assert isinstance(rule, LearnedServe)
    assert not rule.actions.low_bits
    assert rule.observer.terms.low_loss == pytest.approx(setting.low_loss(16.0))
    copied = copy.deepcopy(rule)
    assert copied.network is rule.network  # a look makes hundreds of copies: what never changes is shared
    core = ServeCore(setting)
    core.begin(window)
    before = rule.observer.counters
    copied(core.state)
    assert copied.observer.counters != before
    assert rule.observer.counters == before


def test_on_an_idle_server_no_plan_is_better_than_dense() -> None:
    setting = ServeSetting()
    core = ServeCore(setting)
    core.begin(replace(WINDOW, rate=0.4, budget="full"))
    for _ in range(40):  # a server starts at low precision; the requests of that time finish
        core.step(0)
    lost = look_ahead(core, 6.0, 0.0) - setting.lost(core.engine, 1, core.state.time_s)
    assert lost[0] == pytest.approx(np.nanmin(lost), abs=1e-9)
    assert lost[0] == pytest.approx(0.0, abs=1e-9)
    assert lost[setting.actions.names.index("drop 10, W4 32, queue any, wait 1.5 s")] > 0.0


def test_losses_are_shares_of_their_window(monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[int] = []

    def looked(core: ServeCore, *_: object) -> NDArray[np.float64]:
        played.append(core.requests)
        return np.where(core.actions.legal(core.state, core.choice), 3.0, np.nan)

    monkeypatch.setattr("agents.training.clone.look_ahead", looked)
    _, losses = demonstrations(ServeSetting(), replace(HOW, windows=3), seed=1)
    assert len(set(played)) > 1  # windows of other sizes
    assert np.nanmax(losses, axis=1) == pytest.approx([3.0 * 600 / requests for requests in played])


def test_equal_seeds_give_equal_demonstrations() -> None:
    setting = ServeSetting()
    (features, losses), (again, same) = (demonstrations(setting, HOW, seed=1) for _ in range(2))
    np.testing.assert_array_equal(features, again)
    np.testing.assert_array_equal(losses, same)
    assert features.shape == (len(losses), setting.table.features)
    assert len(losses) >= 3


def test_a_fit_learns_from_an_entry_that_hardly_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of two plans is better depends on the first entry, which lies within .01 of .1; the others are noise."""
    later_is_better = itertools.count()
    monkeypatch.setattr("agents.training.clone.validation_utilities", lambda *_: np.array([next(later_is_better)]))
    rng = np.random.default_rng(3)
    features = rng.uniform(0.0, 1.0, (800, 8)).astype(np.float32)
    features[:, 0] = 0.1 + rng.uniform(-0.01, 0.01, 800)
    losses = np.stack([features[:, 0] > 0.1, features[:, 0] < 0.1], axis=1).astype(np.float64)
    cfg = OmegaConf.create({"seed": 0, "hidden": [16], "env": {"id": "ServeTrace-v0"}})
    how = replace(HOW, epochs=60, batch=32, lr=1e-3)
    network, _, _ = fit(features[:600], losses[:600], how, cfg, {})
    unseen, best = features[600:], losses[600:].argmin(axis=1)
    assert (network(unseen).argmax(axis=1) == best).mean() > 0.9


@pytest.mark.skipif("azure_conv" not in sources_with("train")[0], reason="needs published traces: set RAP_LAB_DATA")
def test_a_clone_is_exported_as_a_policy_that_sim_can_run(tmp_path: Path) -> None:
    small = [f"algorithm.{name}={getattr(HOW, name)}" for name in ("every", "epochs", "batch")]
    small += ["env.kwargs.pool.size=6", "env.kwargs.pool.validation=3"]
    cfg = composed("clone", "experiment=clone_serve", "algorithm.windows=2", "hidden=[8]", *small)
    other = composed("train", "experiment=ppo_serve")
    utility = clone(cfg, tmp_path)
    learned = read_learned(tmp_path / "best" / "policy.json", "ServeTrace")
    assert learned.about["training"]["validation_utility"] == pytest.approx(utility, abs=1e-6)
    assert 0.3 < utility <= 1.0
    with pytest.raises(ConfigError, match="lookahead_clone"):
        clone(other, tmp_path)
