"""PPO with masked actions in one file, in the manner of CleanRL, on PruneToBudget-v0.

    python docs/examples/rl/masked_ppo.py --steps 200000 --export mine.json

Many episodes run in one vector environment, in NumPy. The network can be exported, and then decides in every command:
``policy=learned_prune policy.path=mine.json``.
"""

import argparse
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical

import agents  # noqa: F401 - registers the environments
from agents.training.export import export_layers, next_command
from agents.training.validation import validation_utilities
from sim.policies.learned import Network, network_of

ENV = "PruneToBudget-v0"


def perceptron(inputs: int, hidden: int, outputs: int, last_std: float) -> nn.Sequential:
    """Return two hidden layers with orthogonal weights; a small last layer makes the first policy nearly uniform."""
    layers = [nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)]
    for layer, std in zip(layers, (2**0.5, 2**0.5, last_std), strict=True):
        nn.init.orthogonal_(layer.weight, std)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def masked(logits: torch.Tensor, legal: torch.Tensor) -> Categorical:
    """Return the distribution over legal actions."""
    return Categorical(logits=logits.masked_fill(~legal, -1e9))


def in_numpy(actor: nn.Sequential) -> Network:
    """Return the actor as a network of sim, which needs no torch."""
    linear = [layer for layer in actor if isinstance(layer, nn.Linear)]
    pairs = [(layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()) for layer in linear]
    return network_of(pairs, "tanh")


def validation_utility(actor: nn.Sequential) -> float:
    """Return the mean utility over the validation loads."""
    return float(validation_utilities(ENV, {}, in_numpy(actor)).mean())


def main() -> None:
    """Train, print the validation utility now and then, and export the network."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--envs", type=int, default=64)
    parser.add_argument("--horizon", type=int, default=64, help="steps of each environment between two updates")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--gae", type=float, default=0.95)
    parser.add_argument("--clip", type=float, default=0.2)
    parser.add_argument("--entropy", type=float, default=0.005)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=Path)
    a = parser.parse_args()
    if a.export is not None and a.export.suffix != ".json":
        parser.error(f"--export {a.export} must end in .json")
    if a.horizon < 2 or a.horizon * a.envs < 2 * a.minibatches:
        parser.error("--horizon must be at least 2, and --horizon times --envs twice --minibatches")

    torch.manual_seed(a.seed)
    torch.set_num_threads(1)
    envs = gym.make_vec(ENV, num_envs=a.envs, vectorization_mode="vector_entry_point")
    inputs, actions = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
    features = inputs - actions  # an observation ends with the flags of legal actions
    actor, critic = perceptron(features, a.hidden, actions, 0.01), perceptron(features, a.hidden, 1, 1.0)
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=a.lr)

    shape = a.horizon, a.envs
    seen, legal = torch.zeros(*shape, features), torch.zeros(*shape, actions, dtype=torch.bool)
    taken, log_probs = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    rewards, overs, values = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    played, resets = torch.zeros(shape, dtype=torch.bool), torch.zeros(a.envs, dtype=torch.bool)

    updates = max(1, a.steps // (a.horizon * a.envs))
    started_s = time.monotonic()
    observation, _ = envs.reset(seed=a.seed)
    for update in range(1, updates + 1):
        optimizer.param_groups[0]["lr"] = a.lr * (1.0 - (update - 1) / updates)
        with torch.no_grad():
            for t in range(a.horizon):
                now, played[t] = torch.from_numpy(observation), ~resets  # a step after an end only begins an episode
                seen[t], legal[t] = now[:, :features], now[:, features:] > 0.5
                chosen = masked(actor(seen[t]), legal[t])
                taken[t] = chosen.sample()
                log_probs[t], values[t] = chosen.log_prob(taken[t]), critic(seen[t]).flatten()
                observation, reward, terminated, truncated, _ = envs.step(taken[t].numpy())
                rewards[t] = torch.from_numpy(np.asarray(reward, dtype=np.float32))
                resets = torch.from_numpy(terminated | truncated)
                overs[t] = resets.float()
            after = critic(torch.from_numpy(observation)[:, :features]).flatten()
            advantages, carried = torch.zeros(shape), torch.zeros(a.envs)
            for t in reversed(range(a.horizon)):  # no discount: an episode has at most as many steps as blocks
                delta = rewards[t] + (1.0 - overs[t]) * after - values[t]
                carried = delta + a.gae * (1.0 - overs[t]) * carried
                advantages[t], after = carried, values[t]
            returns = advantages + values
        flat = [x[played] for x in (seen, legal, taken, log_probs, advantages, returns)]
        for _ in range(a.epochs):
            for rows in torch.randperm(int(played.sum())).chunk(a.minibatches):
                x, may, action, before, advantage, wanted = (one[rows] for one in flat)
                policy = masked(actor(x), may)
                ratio = (policy.log_prob(action) - before).exp()
                advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
                clipped = ratio.clamp(1.0 - a.clip, 1.0 + a.clip)
                loss = -torch.min(ratio * advantage, clipped * advantage).mean()
                loss = loss + 0.5 * (critic(x).flatten() - wanted).square().mean() - a.entropy * policy.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_([*actor.parameters(), *critic.parameters()], 0.5)
                optimizer.step()
        if update % 10 == 0 or update == updates:
            steps, seconds = update * a.horizon * a.envs, time.monotonic() - started_s
            print(f"{steps:9,d} steps {seconds:5.0f} s: validation utility {validation_utility(actor):.4f}", flush=True)
    if a.export is not None:
        export_layers(a.export, in_numpy(actor), ENV, label="masked_ppo", seed=a.seed)
        print(f"wrote {a.export}; run it:\n  {next_command(a.export)}")


if __name__ == "__main__":
    main()
