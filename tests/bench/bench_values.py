"""Why DQN gets worse while it trains: errors of its values against the differences between actions.

    python tests/bench/bench_values.py [OVERRIDE ...]       # imitate.margin_weight=0 algorithm.steps_an_update=64 ...

Trains ``experiment=dqn_knapsack`` for 400 iterations and plays the validation loads after every 50: always the action
with the largest value. Prints the mean utility and, over the decisions, in units of reward: by how much the value of
the chosen action is above the return that follows (mean, and mean absolute), and the median difference between the two
largest values.
"""

from __future__ import annotations

import os
import sys
import warnings

import numpy as np
import torch
from omegaconf import DictConfig

from agents.envs.prune_vector import PruneToBudgetVector
from agents.training.modules import actor_logits, learner_module
from agents.training.train import build_algorithm, environment_kwargs, start_ray
from agents.training.validation import validation_episodes
from sim.config import build, compose_config
from sim.types import Floats

ITERATIONS, EVERY = 400, 50


def played(algorithm: object, cfg: DictConfig) -> tuple[float, Floats, Floats]:
    """Play the validation loads.

    Returns:
        The mean utility; for each decision, float64[n], the value of the action minus the return, and the difference
        between the two largest values.
    """
    episodes, module = validation_episodes(1), learner_module(algorithm)
    vector = PruneToBudgetVector(len(episodes), **environment_kwargs(cfg))
    observed, _ = vector.reset(seed=0, options={"loads": episodes})
    over, utility = np.zeros(len(episodes), dtype=np.bool_), np.zeros(len(episodes))
    largest, rewards, active = [], [], []
    while not over.all():
        with torch.no_grad():
            values = actor_logits(module, torch.from_numpy(observed))
        largest.append(values.topk(2, dim=-1).values.double().numpy())
        active.append(~over)
        observed, reward, terminated, truncated, _ = vector.step(values.argmax(dim=-1).numpy())
        rewards.append(np.where(over, 0.0, reward))
        ended = (terminated | truncated) & ~over
        utility[ended] = vector.utility[ended]
        over |= ended
    returns = np.cumsum(rewards[::-1], axis=0)[::-1]
    best, second = np.moveaxis(np.array(largest), -1, 0)
    decisions = np.array(active) & np.isfinite(second)
    return float(utility.mean()), (best - returns)[decisions], (best - second)[decisions]


def main() -> None:
    """Train and print a table."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    torch.set_num_threads(1)
    cfg = compose_config("train", ["experiment=dqn_knapsack", *sys.argv[1:]])
    start_ray(cfg)
    algorithm, steps = build_algorithm(cfg), 0
    if cfg.imitate is not None:
        build(cfg.imitate)(algorithm, cfg.env.id, dict(algorithm.config.env_config), seed=cfg.seed)
    print("  steps   utility   value - return   |value - return|   best - second value")
    for iteration in range(ITERATIONS + 1):
        if iteration % EVERY == 0:
            utility, errors, gaps = played(algorithm, cfg)
            print(
                f"{steps:7,d}   {utility:7.4f}   {errors.mean():+14.4f}   {np.abs(errors).mean():16.4f}   "
                f"{np.median(gaps):19.4f}",
                flush=True,
            )
        if iteration < ITERATIONS:
            steps = int(algorithm.train()["num_env_steps_sampled_lifetime"])
    algorithm.stop()


if __name__ == "__main__":
    main()
