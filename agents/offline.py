"""``python -m agents.offline``: record the episodes of a policy, to learn from (agents/training/offline.py)."""

from sim.config import start

if __name__ == "__main__":
    start("agents.training.offline:main")
else:  # imported, for its configuration's schema
    from agents.training.offline import main as main
