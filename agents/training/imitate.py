"""Imitation before reinforcement learning: start from a solver, a plan, recorded episodes or a trained policy.

A file of conf/imitate names one of these functions. Each changes the module of an RLlib algorithm and returns the last
loss of its fit. All share these arguments: ``algorithm``, the RLlib algorithm; ``env``, the environment's id;
``env_kwargs``, its arguments; ``seed``; and ``epochs``, ``batch`` and ``lr`` of the fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from agents.envs.cluster import ClusterSetting
from agents.envs.cluster_vector import ServeReplicas
from agents.envs.serve_vector import ServeTraceVector
from agents.training.demonstrations import (
    knapsack_demonstrations,
    phase_demonstrations,
    plan_demonstrations,
    starting_policy,
)
from agents.training.episodes import FILE, read_episodes
from agents.training.fitting import fit_actor, fit_critic, fit_values
from agents.training.learners import KeepsMargin
from agents.training.modules import MaskedDQN, actor_layers, actor_logits, learner_module
from sim.errors import ConfigError
from sim.paths import REPOSITORY
from sim.policies.learned import Network
from sim.types import Floats32

NO_PROBABILITIES = "imitate=offline fits action probabilities, which DQN does not have; use algorithm=ppo"


def imitate_knapsack(
    algorithm: Any,
    env: str,
    env_kwargs: Mapping[str, Any],
    *,
    seed: int,
    loads: int,
    margin: float,
    margin_weight: float,
    epochs: int,
    batch: int,
    lr: float,
) -> float:
    """Clone the knapsack's plans for ``loads`` training loads; return the last loss of the fit.

    Args:
        algorithm, env, env_kwargs, seed, epochs, batch, lr: see the module's docstring. loads: number of them.
        margin: how much less the values of DQN are for actions outside of the solution, in units of reward.
        margin_weight: of the loss that keeps the margin in DQN's updates after the fit (``KeepsMargin``); 0 ends it
            with the fit. Algorithms with action probabilities use neither.
    Raises:
        ConfigError: for an environment in which the solution is not a sequence of drops, or a learner of one's own that
            keeps no margin.
    """
    if env != "PruneToBudget-v0" or env_kwargs.get("restore") or env_kwargs.get("sequence", 1) != 1:
        raise ConfigError(
            "imitate=knapsack needs env=prune_to_budget with env.kwargs.restore=false and env.kwargs.sequence=1"
        )
    discount = float(algorithm.config.gamma)
    shown = knapsack_demonstrations(env_kwargs, seed=seed, loads=loads, discount=discount)
    fit: Any = {"seed": seed, "epochs": epochs, "batch": batch, "lr": lr}
    if not isinstance(algorithm.get_module(), MaskedDQN):
        return fit_actor(algorithm, *shown[:2], **fit)
    loss = fit_values(algorithm, *shown, margin=margin, **fit)
    if margin_weight > 0.0:
        learner = algorithm.learner_group._learner
        if not isinstance(learner, KeepsMargin):
            raise ConfigError(
                f"imitate.margin_weight is {margin_weight}, but this algorithm's learner is no "
                "agents.training.learners.KeepsMargin; make it one, or set imitate.margin_weight=0"
            )
        learner.keep(shown[0], shown[1] > 0.0, margin=margin, weight=margin_weight, batch=batch)
    return loss


def imitate_nothing(algorithm: Any, env: str, env_kwargs: Mapping[str, Any], *, seed: int) -> None:
    """Leave the module as it is: the option ``none``, by which a training drops the imitation of its experiment."""


def imitate_plan(
    algorithm: Any,
    env: str,
    env_kwargs: Mapping[str, Any],
    *,
    seed: int,
    plan: str,
    share: float,
    windows: int,
    epochs: int,
    batch: int,
    lr: float,
) -> float:
    """Start with one plan of ``ServeTrace`` at probability ``share``; return the last cross-entropy in nats.

    A random network changes weights at every tick at which that is legal, and training learns little from such
    episodes.

    Raises:
        ConfigError: for another environment, DQN, or a plan that the table does not have.
    """
    if isinstance(algorithm.get_module(), MaskedDQN) or env != "ServeTrace-v0":
        raise ConfigError("imitate=plan needs env=serve_trace and an algorithm with action probabilities, such as ppo")
    observations, targets = plan_demonstrations(env_kwargs, seed=seed, plan=plan, share=share, windows=windows)
    return fit_actor(algorithm, observations, targets, seed=seed, epochs=epochs, batch=batch, lr=lr)


def imitate_phases(
    algorithm: Any,
    env: str,
    env_kwargs: Mapping[str, Any],
    *,
    seed: int,
    counts: Mapping[str, int],
    share: float,
    episodes: int,
    epochs: int,
    batch: int,
    lr: float,
) -> float:
    """Clone a teacher of ``ServeRoles`` that knows which source plays now; return the last cross-entropy in nats.

    The critic is fitted to the teacher's returns.

    Args:
        algorithm, env, env_kwargs, seed, epochs, batch, lr: see the module's docstring.
        counts: the teacher's number of prefill replicas while a source plays. share: the probability that the clone
            gives to it. episodes: training episodes that the teacher plays.
    Raises:
        ConfigError: for another environment, DQN, or a source without a count that a system can have.
    """
    if isinstance(algorithm.get_module(), MaskedDQN) or env != "ServeRoles-v0":
        raise ConfigError(
            "imitate=phases needs env=serve_roles and an algorithm with action probabilities, such as ppo"
        )
    observations, targets, returns = phase_demonstrations(
        env_kwargs,
        seed=seed,
        counts=counts,
        share=share,
        episodes=episodes,
        discount=float(algorithm.config.gamma),
    )
    fit: Any = {"seed": seed, "epochs": epochs, "batch": batch, "lr": lr}
    fit_critic(algorithm, observations, returns, **fit)
    return fit_actor(algorithm, observations, targets, **fit)


def imitate_offline(
    algorithm: Any, env: str, env_kwargs: Mapping[str, Any], *, seed: int, data: str, epochs: int, batch: int, lr: float
) -> float:
    """Clone the actions of recorded episodes (``agents.offline``) in folder ``data``; return the last cross-entropy.

    Raises:
        ConfigError: for DQN, or a folder without episodes of this environment.
    """
    module = algorithm.get_module()
    if isinstance(module, MaskedDQN):
        raise ConfigError(NO_PROBABILITIES)
    count = int(module.action_space.n)
    observations, actions = read_episodes(REPOSITORY / data / FILE, module.observation_space.shape, count)
    targets = np.eye(count, dtype=np.float32)[actions]
    return fit_actor(algorithm, observations, targets, seed=seed, epochs=epochs, batch=batch, lr=lr)


def imitate_policy(
    algorithm: Any,
    env: str,
    env_kwargs: Mapping[str, Any],
    *,
    seed: int,
    path: str,
    temperature: float,
    windows: int,
    epochs: int,
    batch: int,
    lr: float,
    member: int | None = None,
) -> float:
    """Start with the network of an exported policy and a critic fitted to its returns; return the last squared error.

    In ``ServeCluster``, every replica starts as a policy of ``ServeTrace``; the entries that this policy does not know
    start with weight 0.

    Args:
        algorithm, env, env_kwargs, seed, epochs, batch, lr: see the module's docstring; the fit is the critic's.
        path: the policy's JSON file in the repository, or the name of a shipped policy.
        temperature: the network's outputs divided by this become the logits of the actions.
        windows: episodes (in a cluster: clusters) played at once for the critic.
        member: which network of a policy that averages several, the first being 0.
    Raises:
        ConfigError: for another environment, DQN, a network of another size, or a member that is not there.
    """
    if isinstance(algorithm.get_module(), MaskedDQN) or env not in ("ServeTrace-v0", "ServeCluster-v0"):
        raise ConfigError(
            "imitate=policy needs env=serve_trace or serve_cluster, and an algorithm with an actor and a critic, such "
            "as ppo"
        )
    vector: ServeTraceVector | ServeReplicas
    if env == "ServeTrace-v0":
        vector = ServeTraceVector(windows, **env_kwargs)
    else:
        vector = ServeReplicas(windows * ClusterSetting(**env_kwargs).replicas, **env_kwargs)
    _, network = starting_policy(path, member)
    module = learner_module(algorithm)
    _load_actor(module, widen_inputs(network, vector.setting.table.features), temperature)
    observations, returns = _play_for_returns(module, vector, float(algorithm.config.gamma), seed)
    return fit_critic(algorithm, observations, returns, seed=seed, epochs=epochs, batch=batch, lr=lr)


def widen_inputs(network: Network, count: int) -> Network:
    """Return the network with at least ``count`` inputs; the additional ones have weight 0."""
    first, *rest = network.weights
    more = np.zeros((first.shape[0], max(0, count - first.shape[1])), dtype=np.float32)
    return replace(network, weights=(np.concatenate((first, more), axis=1), *rest))


def _load_actor(module: Any, network: Network, temperature: float) -> None:
    """Copy a network into the actor of a module, its outputs divided by ``temperature``."""
    state = module.state_dict()
    names = actor_layers(state)
    sizes = [tuple(state[f"{name}.weight"].shape) for name in names]
    if sizes != [weight.shape for weight in network.weights]:
        raise ConfigError(
            f"imitate.path: its layers are {[w.shape for w in network.weights]}, but this training has {sizes}; set "
            "hidden to the sizes of its hidden layers"
        )
    for name, weight, bias in zip(names, network.weights, network.biases, strict=True):
        scale = np.float32(1.0 / temperature if name == names[-1] else 1.0)
        state[f"{name}.weight"], state[f"{name}.bias"] = (torch.from_numpy(x * scale) for x in (weight, bias))
    module.load_state_dict(state)


def _play_for_returns(
    module: Any, vector: ServeTraceVector | ServeReplicas, discount: float, seed: int
) -> tuple[Floats32, Floats32]:
    """Play one episode in every environment by the module's actor; return observations [n, o] and returns [n]."""
    torch_rng = torch.Generator().manual_seed(seed)
    observed, _ = vector.reset(seed=seed)
    observations, rewards = [], []
    for _ in range(vector.setting.ticks - 1):
        with torch.no_grad():
            probabilities = torch.softmax(actor_logits(module, torch.from_numpy(observed)), dim=-1)
        observations.append(observed)
        observed, reward, *_ = vector.step(torch.multinomial(probabilities, 1, generator=torch_rng)[:, 0].numpy())
        rewards.append(reward)
    value, returns = np.zeros(vector.num_envs), []
    for reward in reversed(rewards):
        value = reward + discount * value
        returns.append(value)
    return np.concatenate(observations), np.concatenate(returns[::-1]).astype(np.float32)
