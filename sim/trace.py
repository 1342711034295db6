"""``python -m sim.trace``: runs as a timeline for Perfetto (sim/report/timeline.py)."""

from sim.config import start

if __name__ == "__main__":
    start("sim.report.timeline:main")
