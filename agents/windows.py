"""``python -m agents.windows``: find the loads of the validation and test windows (agents/evaluation/windows.py)."""

from sim.config import start

if __name__ == "__main__":
    start("agents.evaluation.windows:main")
else:  # imported, for its configuration's schema
    from agents.evaluation.windows import main as main
