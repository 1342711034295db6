"""``python -m agents.knobs``: what each way to free memory is worth (agents/evaluation/knobs.py)."""

from sim.config import start

if __name__ == "__main__":
    start("agents.evaluation.knobs:main")
else:  # imported, for its configuration's schema
    from agents.evaluation.knobs import main as main
