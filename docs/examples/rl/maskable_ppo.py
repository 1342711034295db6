"""MaskablePPO of sb3-contrib on PruneToBudget-v0; it reads the legal actions from ``action_masks()``.

pip install sb3-contrib
python docs/examples/rl/maskable_ppo.py --steps 40000
"""

import argparse

import gymnasium as gym
import numpy as np
from sb3_contrib import MaskablePPO

import agents  # noqa: F401 - registers the environments


def mean_utility(model: MaskablePPO, episodes: int) -> float:
    """Return the mean utility of the most probable legal actions, over validation episodes."""
    env = gym.make("PruneToBudget-v0", split="validation")
    utilities = []
    for episode in range(episodes):
        observation, info = env.reset(seed=episode)
        over = False
        while not over:
            action, _ = model.predict(observation, action_masks=env.unwrapped.action_masks(), deterministic=True)
            observation, _, terminated, truncated, info = env.step(action)
            over = terminated or truncated
        utilities.append(info["utility"])
    return float(np.mean(utilities))


def main() -> None:
    """Train, and print the utility before and after."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    env = gym.make("PruneToBudget-v0")
    model = MaskablePPO("MlpPolicy", env, n_steps=1024, batch_size=256, seed=arguments.seed, device="cpu")
    print(f"before: utility {mean_utility(model, arguments.episodes):.4f}")
    model.learn(arguments.steps)
    print(f"after {model.num_timesteps} steps: utility {mean_utility(model, arguments.episodes):.4f}")


if __name__ == "__main__":
    main()
