"""Demonstrations of the knapsack: the returns are those of its episodes, and DQN's values follow them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents.baselines.prune import solver
from agents.envs.prune import PruneToBudget
from agents.envs.prune_loads import prune_loads
from agents.training.demonstrations import knapsack_demonstrations
from agents.training.fitting import fit_values
from agents.training.modules import actor_logits, learner_module
from agents.training.train import environment_kwargs
from tests.agents.helpers import composed
from tests.agents.training.test_train import SMALL_DQN, build_algorithm, small

KWARGS = environment_kwargs(composed("train", "env=prune_to_budget", "reward=utility_shaped"))


@pytest.mark.parametrize("discount", [1.0, 0.5])
def test_returns_are_the_discounted_rewards_of_an_episode_by_the_solver(discount: float) -> None:
    observations, targets, returns = knapsack_demonstrations(KWARGS, seed=3, loads=1, discount=discount)
    env = PruneToBudget(**KWARGS)
    load = prune_loads().sample(np.random.default_rng(3), "train")
    env.reset(options={"loads": [load]})
    solution = solver(env.setting.model, env.setting.quality.blocks)(load)
    assert len(observations) == len(targets) == len(returns) == solution.sum()
    np.testing.assert_array_equal(targets[0] > 0.0, solution)
    # The same blocks in the order of the demonstration: each row lacks one block of the row before.
    drops = [
        int(np.flatnonzero(before & ~after)[0]) for before, after in zip(targets > 0, targets[1:] > 0, strict=False)
    ]
    last = int(np.flatnonzero(targets[-1] > 0.0)[0])
    rewards = [env.step(action)[1] for action in (*drops, last)]
    expected = [sum(r * discount**k for k, r in enumerate(rewards[i:])) for i in range(len(rewards))]
    np.testing.assert_allclose(returns, expected, rtol=1e-5, atol=1e-6)
    assert env.fits


def test_fitted_values_are_the_returns_of_what_was_shown_and_less_for_the_rest(local_ray: None) -> None:
    algorithm = build_algorithm(small(*SMALL_DQN, "hidden=[64]", "reward=utility_shaped"))
    observations, targets, returns = knapsack_demonstrations(KWARGS, seed=0, loads=20)
    fit_values(algorithm, observations, targets, returns, margin=0.3, seed=0, epochs=200, batch=64, lr=3e-3)
    module = learner_module(algorithm)
    with torch.no_grad():
        values = actor_logits(module, torch.from_numpy(observations)).numpy()
    shown, legal = targets > 0.0, np.isfinite(values)
    worth = np.broadcast_to(returns[:, None], values.shape)
    assert np.abs(values - worth)[shown].mean() < 0.05
    assert (values - worth)[legal & ~shown].mean() < -0.2
    chosen = values.argmax(axis=1)
    assert shown[np.arange(len(chosen)), chosen].mean() > 0.95
    for network, target in module.get_target_network_pairs():
        for name, weight in network.state_dict().items():
            assert torch.equal(weight, target.state_dict()[name])
    algorithm.stop()
