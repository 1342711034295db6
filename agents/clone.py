"""``python -m agents.clone``: train a policy to imitate a planner that looks ahead (agents/training/clone.py)."""

from sim.config import start

if __name__ == "__main__":
    start("agents.training.clone:main")
else:  # imported, for its configuration's schema
    from agents.training.clone import main as main
