"""Command: ``python -m sim.report``; see sim/report/run.py."""

from sim.config import start

if __name__ == "__main__":
    start("sim.report.run:main")
