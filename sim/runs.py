"""``python -m sim.runs``: the latest runs, with the command that made each (sim/table/list_runs.py)."""

from sim.config import start

if __name__ == "__main__":
    start("sim.table.list_runs:main")
