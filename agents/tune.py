"""``python -m agents.tune``: search over the keys of a training (agents/training/tune.py)."""

from sim.config import start

if __name__ == "__main__":
    start("agents.training.tune:main")
else:  # imported, for its configuration's schema
    from agents.training.tune import main as main
