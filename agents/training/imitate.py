"""Begin with imitation: fit the network to what a baseline does, before reinforcement learning takes over.

Behaviour cloning by cross-entropy on the actions of a solver. A solver names a set of blocks, not an order; every block
of the set that is still kept is an equally good action, so the target is uniform over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from agents.envs.cluster import ClusterSetting
from agents.envs.cluster_vector import ServeReplicas
from agents.envs.prune import PruneToBudgetVector
from agents.envs.prune_loads import prune_draws
from agents.envs.serve_vector import ServeTraceVector
from agents.evaluation.prune import solver
from agents.training.episodes import FILE, read_episodes
from agents.training.modules import MaskedDQN, actor_layers, actor_logits
from sim.errors import ConfigError, nearest
from sim.paths import REPOSITORY
from sim.policies.learned import Network, read_learned
from sim.types import Floats32


def imitate_knapsack(
    algorithm: Any, env: str, words: Mapping[str, Any], *, seed: int, draws: int, epochs: int, batch: int, lr: float
) -> float:
    """Clone the knapsack's plans of ``draws`` training loads into the module of an algorithm; return the last loss.

    Raises:
        ConfigError: for an environment in which a solver's plan is no sequence of drops.
    """
    if isinstance(algorithm.get_module(), MaskedDQN):
        raise ConfigError("imitation fits action probabilities, which DQN does not have; use algorithm=ppo")
    if env != "PruneToBudget-v0" or words.get("restore") or words.get("sequence", 1) != 1:
        raise ConfigError("imitate=knapsack knows PruneToBudget with one load an episode and no restoring")
    observations, targets = knapsack_demonstrations(words, seed=seed, draws=draws)
    return _fit(algorithm, observations, targets, seed=seed, epochs=epochs, batch=batch, lr=lr)


def imitate_plan(
    algorithm: Any,
    env: str,
    words: Mapping[str, Any],
    *,
    seed: int,
    plan: str,
    share: float,
    windows: int,
    epochs: int,
    batch: int,
    lr: float,
) -> float:
    """Begin with one plan of ``ServeTrace``'s table at ``share``, the other legal ones alike; return the last loss.

    A network that begins at random changes weights at every tick that it may, and learns little from what follows.

    Raises:
        ConfigError: for another environment, an algorithm without action probabilities, or a plan that is not there.
    """
    if isinstance(algorithm.get_module(), MaskedDQN) or env != "ServeTrace-v0":
        raise ConfigError("imitate=plan needs ServeTrace and an algorithm with action probabilities, such as ppo")
    vector = ServeTraceVector(windows, **words)
    names = vector.setting.actions.names
    if plan not in names:
        raise ConfigError(f"imitate.plan: there is no {plan!r}; {nearest(plan, names)}")
    chosen, features = names.index(plan), vector.setting.table.features
    rng = np.random.default_rng(seed)
    seen, _ = vector.reset(seed=seed)
    observations, targets = [], []
    for _ in range(vector.setting.ticks - 1):
        legal = seen[:, features:]
        target = (1.0 - share) * legal / legal.sum(axis=1, keepdims=True)
        target[:, chosen] += share * legal[:, chosen]
        observations.append(seen)
        targets.append((target / target.sum(axis=1, keepdims=True)).astype(np.float32))
        stray = (rng.random(legal.shape) * legal).argmax(axis=1)
        seen, *_ = vector.step(np.where((rng.random(windows) < share) & (legal[:, chosen] > 0.5), chosen, stray))
    shown, wanted = np.concatenate(observations), np.concatenate(targets)
    return _fit(algorithm, shown, wanted, seed=seed, epochs=epochs, batch=batch, lr=lr)


def imitate_offline(
    algorithm: Any, env: str, words: Mapping[str, Any], *, seed: int, data: str, epochs: int, batch: int, lr: float
) -> float:
    """Clone what episodes show that anybody wrote (``agents.offline``); return the last loss.

    Raises:
        ConfigError: for an algorithm without action probabilities, or a folder without episodes of this environment.
    """
    if isinstance(algorithm.get_module(), MaskedDQN):
        raise ConfigError("imitation fits action probabilities, which DQN does not have; use algorithm=ppo")
    module = algorithm.get_module()
    observations, actions = read_episodes(REPOSITORY / data / FILE, module.observation_space.shape)
    done = np.eye(int(module.action_space.n), dtype=np.float32)[actions]
    return _fit(
        algorithm,
        observations,
        done,
        seed=seed,
        epochs=epochs,
        batch=batch,
        lr=lr,
    )


def imitate_policy(
    algorithm: Any,
    env: str,
    words: Mapping[str, Any],
    *,
    seed: int,
    path: str,
    temperature: float,
    windows: int,
    epochs: int,
    batch: int,
    lr: float,
) -> float:
    """Begin with the network of an exported policy, and with a critic fitted to what that policy earns.

    In ``ServeCluster`` every replica begins with what a policy of ``ServeTrace`` does; what it shows beside weighs
    nothing at first.

    Args:
        algorithm, env, words, seed: as for all that imitate. path: the policy's JSON, inside the project or shipped.
        temperature: its outputs are divided by this before they become the logarithms of shares.
        windows: episodes played for the critic, at once. epochs, batch, lr: of the critic's fit.
    Raises:
        ConfigError: for another environment or algorithm, or a network of another size.
    """
    import torch

    if isinstance(algorithm.get_module(), MaskedDQN) or env not in ("ServeTrace-v0", "ServeCluster-v0"):
        raise ConfigError(
            "imitate=policy needs ServeTrace or ServeCluster and an algorithm with an actor and a critic, such as ppo"
        )
    vector: ServeTraceVector | ServeReplicas
    if env == "ServeTrace-v0":
        vector = ServeTraceVector(windows, **words)
    else:
        vector = ServeReplicas(windows * ClusterSetting(**words).replicas, **words)
    network = read_learned(REPOSITORY / path if path.endswith(".json") else path, "ServeTrace").network
    network = with_inputs(network, vector.setting.table.features)
    module = _module(algorithm)
    state = module.state_dict()
    names = actor_layers(state)
    sizes = [tuple(state[f"{name}.weight"].shape) for name in names]
    if sizes != [weight.shape for weight in network.weights]:
        raise ConfigError(f"imitate.path: its layers are {[w.shape for w in network.weights]}, here they are {sizes}")
    for name, weight, bias in zip(names, network.weights, network.biases, strict=True):
        scale = 1.0 / temperature if name == names[-1] else 1.0
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            torch.from_numpy(x * np.float32(scale)) for x in (weight, bias)
        )
    module.load_state_dict(state)
    torch_rng = torch.Generator().manual_seed(seed)
    seen, _ = vector.reset(seed=seed)
    rows, rewards = [], []
    for _ in range(vector.setting.ticks - 1):
        with torch.no_grad():
            shares = torch.softmax(actor_logits(module, torch.from_numpy(seen)), dim=-1)
        rows.append(seen)
        seen, reward, *_ = vector.step(torch.multinomial(shares, 1, generator=torch_rng)[:, 0].numpy())
        rewards.append(reward)
    earned, returns = np.zeros(vector.num_envs), []
    for reward in reversed(rewards):
        earned = reward + float(algorithm.config.gamma) * earned
        returns.append(earned)
    targets = np.concatenate(returns[::-1]).astype(np.float32)
    return _fit_critic(algorithm, np.concatenate(rows), targets, seed=seed, epochs=epochs, batch=batch, lr=lr)


def with_inputs(network: Network, count: int) -> Network:
    """Return a network that reads so many features: those beyond its own, if any, change nothing."""
    first, *rest = network.weights
    more = np.zeros((first.shape[0], max(0, count - first.shape[1])), dtype=np.float32)
    return replace(network, weights=(np.concatenate((first, more), axis=1), *rest))


def _fit_critic(
    algorithm: Any,
    observations: Floats32,
    targets: Floats32,
    *,
    seed: int,
    epochs: int,
    batch: int,
    lr: float,
) -> float:
    """Fit the critic of an algorithm to returns by least squares; return the last mean squared error."""
    import torch

    module, rng = _module(algorithm), np.random.default_rng(seed)
    critic = [x for name, x in module.named_parameters() if name.startswith(("encoder.critic_encoder", "vf."))]
    optimiser = torch.optim.Adam(critic, lr=lr)
    loss = torch.zeros(())
    for _ in range(epochs):
        for chosen in np.array_split(rng.permutation(len(observations)), max(1, len(observations) // batch)):
            values = module.compute_values({"obs": torch.from_numpy(observations[chosen])})
            loss = torch.nn.functional.mse_loss(values, torch.from_numpy(targets[chosen]))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    algorithm.env_runner_group.sync_weights(from_worker_or_learner_group=algorithm.learner_group)
    return float(loss.detach())


def _module(algorithm: Any) -> Any:
    """Return the module that an algorithm learns."""
    module = algorithm.learner_group._learner.module["default_policy"]
    return module.unwrapped() if hasattr(module, "unwrapped") else module


def _fit(
    algorithm: Any,
    observations: np.ndarray[Any, np.dtype[np.float32]],
    targets: np.ndarray[Any, np.dtype[np.float32]],
    *,
    seed: int,
    epochs: int,
    batch: int,
    lr: float,
) -> float:
    """Fit the policy of an algorithm to target shares of actions by cross-entropy."""
    import torch

    module = _module(algorithm)
    optimiser = torch.optim.Adam(module.parameters(), lr=lr)
    rng = np.random.default_rng(seed)
    loss = torch.zeros(())
    for _ in range(epochs):
        for chosen in np.array_split(rng.permutation(len(observations)), max(1, len(observations) // batch)):
            logits = actor_logits(module, torch.from_numpy(observations[chosen]))
            wanted = torch.from_numpy(targets[chosen])
            loss = -(wanted * torch.log_softmax(logits, dim=-1).clamp(min=-30.0)).sum(dim=-1).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    algorithm.env_runner_group.sync_weights(from_worker_or_learner_group=algorithm.learner_group)
    return float(loss.detach())


def knapsack_demonstrations(
    words: Mapping[str, Any], *, seed: int, draws: int
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.float32]]]:
    """Return observations and target shares of actions, along one random order of each solution."""
    rng = np.random.default_rng(seed)
    split = prune_draws()
    loads = [split.sample(rng, "train") for _ in range(draws)]
    vector = PruneToBudgetVector(draws, **words)
    solve = solver(vector.setting.model, vector.setting.quality.blocks)
    wanted = np.stack([solve(draw) for draw in loads])
    seen, _ = vector.reset(options={"draws": [[draw] for draw in loads]})
    over = np.zeros(draws, dtype=np.bool_)
    observations, targets = [], []
    while not over.all():
        left = wanted & ~vector.removed
        going = ~over & left.any(axis=1)
        observations.append(seen[going])
        targets.append((left[going] / left[going].sum(axis=1, keepdims=True)).astype(np.float32))
        actions = np.where(left, rng.random(left.shape), -1.0).argmax(axis=1)
        seen, _, terminated, truncated, _ = vector.step(actions)
        over |= terminated | truncated | ~going
    return np.concatenate(observations), np.concatenate(targets)
