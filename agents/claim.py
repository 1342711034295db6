"""``python -m agents.claim``: state what the test windows will be played with (agents/evaluation/claim.py)."""

from sim.config import start

if __name__ == "__main__":
    start("agents.evaluation.make_claim:main")
else:  # imported, for its configuration's schema
    from agents.evaluation.make_claim import main as main
