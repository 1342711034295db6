"""``python -m agents.train``: train a policy with RLlib (agents/training/train.py)."""

from sim.config import start

if __name__ == "__main__":
    start("agents.training.train:main")
else:  # imported, for its configuration's schema
    from agents.training.train import main as main
