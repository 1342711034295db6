"""The plain loop of Gymnasium: legal random actions, and the utility of each episode.

python docs/examples/rl/gymnasium_loop.py
"""

import argparse

import gymnasium as gym

import agents  # noqa: F401 - registers the environments


def main() -> None:
    """Play some episodes of two environments."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--episodes", type=int, default=3)
    arguments = parser.parse_args()
    for name in ("PruneToBudget-v0", "ServeTrace-v0"):
        env = gym.make(name)
        for episode in range(arguments.episodes):
            _, info = env.reset(seed=episode)
            env.action_space.seed(episode)
            over, steps = False, 0
            while not over:
                action = env.action_space.sample(mask=info["action_mask"])
                _, _, terminated, truncated, info = env.step(action)
                over, steps = terminated or truncated, steps + 1
            print(f"{name} episode {episode}: {steps} steps, utility {info['utility']:.4f}")


if __name__ == "__main__":
    main()
