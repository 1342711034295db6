"""Supervised fits of an RLlib module: the actor to probabilities, the critic to returns, DQN's values to both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agents.training.modules import actor_logits, learner_module
from sim.types import Floats32

# Shapes: n rows, o entries of an observation, a actions.


def fit_actor(
    algorithm: Any, observations: Floats32, targets: Floats32, *, seed: int, epochs: int, batch: int, lr: float
) -> float:
    """Fit the actor by cross-entropy; return the last loss in nats.

    Args:
        algorithm: an RLlib algorithm whose module has action probabilities; its env runners get the new weights.
        observations: float32[n, o]. targets: float32[n, a], target probabilities of the actions.
        seed: of the order of rows. epochs, batch, lr: of Adam.
    """
    module = learner_module(algorithm)

    def loss_of(rows: NDArray[np.int64]) -> torch.Tensor:
        logits = actor_logits(module, torch.from_numpy(observations[rows]))
        # Illegal actions have the lowest float as their logit; the clamp keeps their log-probabilities in range.
        log_probabilities = torch.log_softmax(logits, dim=-1).clamp(min=-30.0)
        return -(torch.from_numpy(targets[rows]) * log_probabilities).sum(dim=-1).mean()

    return _minimize(algorithm, module.parameters(), loss_of, len(observations), seed, epochs, batch, lr)


def fit_critic(
    algorithm: Any, observations: Floats32, returns: Floats32, *, seed: int, epochs: int, batch: int, lr: float
) -> float:
    """Fit the critic by least squares; return the last mean squared error, in squared units of reward.

    Args:
        algorithm: an RLlib algorithm with a separate critic; its env runners get the new weights.
        observations: float32[n, o]. returns: float32[n], discounted returns.
        seed: of the order of rows. epochs, batch, lr: of Adam.
    """
    module = learner_module(algorithm)
    critic = [x for name, x in module.named_parameters() if name.startswith(("encoder.critic_encoder", "vf."))]

    def loss_of(rows: NDArray[np.int64]) -> torch.Tensor:
        values = module.compute_values({"obs": torch.from_numpy(observations[rows])})
        return torch.nn.functional.mse_loss(values, torch.from_numpy(returns[rows]))

    return _minimize(algorithm, critic, loss_of, len(observations), seed, epochs, batch, lr)


def fit_values(
    algorithm: Any,
    observations: Floats32,
    targets: Floats32,
    returns: Floats32,
    *,
    margin: float,
    seed: int,
    epochs: int,
    batch: int,
    lr: float,
) -> float:
    """Fit DQN's values to demonstrations with a large margin; return the last loss, in squared units of reward.

    Demonstrated actions are worth the return; the other legal ones at least ``margin`` less (as in DQfD, arXiv
    1704.03732, section 4, but with squares). The target network becomes the fitted one.

    Args:
        algorithm: an RLlib DQN; its env runners get the new weights.
        observations: float32[n, o]. targets: float32[n, a], above 0 for demonstrated actions. returns: float32[n].
        margin: in units of reward. seed: of the order of rows. epochs, batch, lr: of Adam.
    """
    module = learner_module(algorithm)

    def loss_of(rows: NDArray[np.int64]) -> torch.Tensor:
        values = actor_logits(module, torch.from_numpy(observations[rows]))
        shown, worth = torch.from_numpy(targets[rows] > 0.0), torch.from_numpy(returns[rows])[:, None]
        zero = torch.zeros(())
        above = torch.where(shown, zero, values - worth + margin).clamp(min=0.0)  # 0 for illegal actions
        missed = torch.where(shown, values - worth, zero)
        return (above**2).sum(dim=-1).mean() + (missed**2).sum(dim=-1).mean()

    networks = [network for network, _ in module.get_target_network_pairs()]
    parameters = [parameter for network in networks for parameter in network.parameters()]
    loss = _minimize(algorithm, parameters, loss_of, len(observations), seed, epochs, batch, lr)
    for network, target in module.get_target_network_pairs():
        target.load_state_dict(network.state_dict())
    return loss


def _minimize(
    algorithm: Any,
    parameters: Iterable[torch.nn.Parameter],
    loss_of: Callable[[NDArray[np.int64]], torch.Tensor],
    count: int,
    seed: int,
    epochs: int,
    batch: int,
    lr: float,
) -> float:
    """Minimize a loss over shuffled batches of row numbers, then send the weights to the env runners."""
    optimizer, rng = torch.optim.Adam(parameters, lr=lr), np.random.default_rng(seed)
    loss = torch.zeros(())
    for _ in range(epochs):
        for rows in np.array_split(rng.permutation(count), max(1, count // batch)):
            loss = loss_of(rows)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    algorithm.env_runner_group.sync_weights(from_worker_or_learner_group=algorithm.learner_group)
    return float(loss.detach())
