"""``python -m sim.new policy NAME``: write the two files of a policy of one's own (sim/new/run.py)."""

from sim.config import start

if __name__ == "__main__":
    start("sim.new.run:main")
