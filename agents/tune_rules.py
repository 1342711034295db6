"""``python -m agents.tune_rules``: search the parameters of rules (agents/evaluation/tuning.py)."""

from sim.config import start

if __name__ == "__main__":
    start("agents.evaluation.tuning:main")
else:  # imported, for its configuration's schema
    from agents.evaluation.tuning import main as main
