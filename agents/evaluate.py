"""``python -m agents.evaluate``: compare policies on held-out loads and windows (agents/evaluation/evaluate.py)."""

from sim.config import start

if __name__ == "__main__":
    start("agents.evaluation.evaluate:main")
else:  # imported, for its configuration's schema
    from agents.evaluation.evaluate import main as main
