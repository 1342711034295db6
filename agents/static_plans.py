"""``python -m agents.static_plans``: what drops are worth in each scenario (agents/evaluation/static_plans.py)."""

from sim.config import start

if __name__ == "__main__":
    start("agents.evaluation.static_plans:main")
else:  # imported, for its configuration's schema
    from agents.evaluation.static_plans import main as main
