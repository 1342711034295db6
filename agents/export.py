"""``python -m agents.export``: write a trained policy as files that NumPy runs (agents/training/export.py)."""

from sim.config import start

if __name__ == "__main__":
    start("agents.training.export:main")
else:  # imported, for its configuration's schema
    from agents.training.export import main as main
