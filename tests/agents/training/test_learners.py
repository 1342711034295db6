"""DQN's margin on demonstrations: the loss, the learner's state, and what it keeps while training goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from ray.rllib.algorithms.dqn.torch.dqn_torch_learner import DQNTorchLearner

from agents.training.demonstrations import knapsack_demonstrations
from agents.training.learners import KEPT, margin_loss
from agents.training.modules import actor_logits, learner_module
from agents.training.train import build_algorithm, environment_kwargs
from sim.config import build
from sim.errors import ConfigError
from tests.agents.training.test_train import SMALL_DQN, small

KNAPSACK = ["reward=utility_shaped", "imitate=knapsack", "imitate.loads=60", "imitate.margin=0.1", "hidden=[64]"]


def test_the_margin_loss_is_what_a_loop_over_rows_and_actions_finds() -> None:
    rng = np.random.default_rng(0)
    legal = rng.random((200, 7)) < 0.7
    legal[np.arange(200), rng.integers(0, 7, 200)] = True
    shown = legal & (rng.random((200, 7)) < 0.4)
    shown[np.arange(200), (legal * rng.random((200, 7))).argmax(axis=1)] = True
    values = np.where(legal, rng.normal(size=(200, 7)), -np.inf)
    expected = []
    for i in range(200):
        best = max(values[i, a] for a in range(7) if shown[i, a])
        others = [values[i, a] for a in range(7) if legal[i, a] and not shown[i, a]]
        expected.append(max(0.0, max(others) + 0.5 - best) if others else 0.0)
    assert 0.0 in expected
    found = float(margin_loss(torch.from_numpy(values), torch.from_numpy(shown), 0.5))
    assert abs(found - np.mean(expected)) < 1e-12


def test_a_row_whose_legal_actions_were_all_shown_has_no_gradient_and_no_loss() -> None:
    values = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True)
    loss = margin_loss(values, torch.tensor([[True, True, False]]), 0.5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0.0
    assert values.grad is not None
    assert not values.grad.any()


def imitated(cfg: DictConfig) -> Any:
    """The algorithm of a configuration after its imitation."""
    algorithm = build_algorithm(cfg)
    build(cfg.imitate)(algorithm, cfg.env.id, environment_kwargs(cfg), seed=0)
    return algorithm


def test_demonstrations_are_a_part_of_the_learners_state_but_not_of_its_weights(local_ray: None) -> None:
    algorithm = imitated(small(*SMALL_DQN, *KNAPSACK, "imitate.margin_weight=2"))
    learner = algorithm.learner_group._learner
    kept = learner.get_state()[KEPT]
    assert (kept["margin"], kept["weight"], kept["batch"]) == (0.1, 2.0, 512)
    assert KEPT not in learner.get_state(components="rl_module")
    algorithm.stop()
    other = imitated(small(*SMALL_DQN, *KNAPSACK, "imitate.margin_weight=0", "imitate.epochs=1"))
    learner = other.learner_group._learner
    assert KEPT in learner.get_state()
    assert learner.get_state()[KEPT] is None
    learner.set_state({KEPT: kept})
    assert torch.equal(learner.kept["observations"], kept["observations"])
    learner.set_state({})  # as an earlier version saved it
    assert learner.kept is not None
    other.stop()


def test_an_update_adds_the_weighted_margin_loss_of_a_batch_of_demonstrations(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = imitated(small(*SMALL_DQN, *KNAPSACK, "imitate.margin_weight=2", "imitate.epochs=1"))
    learner = algorithm.learner_group._learner
    kept: dict[str, Any] = learner.kept
    kept |= {"batch": 96, "margin": 0.7}
    monkeypatch.setattr(DQNTorchLearner, "compute_loss_for_module", lambda *_, **__: torch.tensor(0.25))
    update: dict[str, Any] = {"module_id": "default_policy", "config": None, "batch": {}, "fwd_out": {}}
    torch.manual_seed(3)
    found = learner.compute_loss_for_module(**update)
    torch.manual_seed(3)
    rows = torch.randint(len(kept["shown"]), (96,))
    values = actor_logits(learner_module(algorithm), kept["observations"][rows])
    missed = margin_loss(values, kept["shown"][rows], 0.7)
    assert missed.item() > 0.0
    torch.testing.assert_close(found, 0.25 + 2.0 * missed)
    learner.kept = None
    assert learner.compute_loss_for_module(**update).item() == 0.25
    algorithm.stop()


def test_a_learner_that_keeps_no_margin_is_an_error_that_says_what_to_do(local_ray: None) -> None:
    cfg = small(*SMALL_DQN, *KNAPSACK, "imitate.epochs=1")
    algorithm = build_algorithm(cfg)
    algorithm.learner_group._learner.__class__ = DQNTorchLearner
    with pytest.raises(ConfigError, match=r"learner is no agents.training.learners.KeepsMargin; make it one, or set"):
        build(cfg.imitate)(algorithm, cfg.env.id, environment_kwargs(cfg), seed=0)
    algorithm.stop()


def test_dqn_goes_on_to_choose_what_was_shown_only_with_the_margin(local_ray: None) -> None:
    shares = {}
    for weight in (0, 1):
        fast = ("algorithm.lr=1e-3", f"imitate.margin_weight={weight}", "imitate.epochs=150")
        cfg = small(*SMALL_DQN, *KNAPSACK, *fast)
        algorithm = imitated(cfg)
        observations, targets, _ = knapsack_demonstrations(environment_kwargs(cfg), seed=0, loads=60)
        for _ in range(60):
            algorithm.train()
        with torch.no_grad():
            values = actor_logits(learner_module(algorithm), torch.from_numpy(observations))
        chosen = values.argmax(dim=-1).numpy()
        shares[weight] = (targets[np.arange(len(chosen)), chosen] > 0.0).mean()
        algorithm.stop()
    assert shares[1] > 0.95
    assert shares[0] < shares[1] - 0.05
