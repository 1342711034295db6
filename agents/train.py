"""``python -m agents.train``: train a policy with RLlib (agents/training/train.py)."""

from sim.config import start

if __name__ == "__main__":
    start("agents.training.train:main")
