"""``python -m sim.table``: one table of the runs of a sweep, or of any folder (sim/table/run.py)."""

from sim.config import start

if __name__ == "__main__":
    start("sim.table.run:main")
