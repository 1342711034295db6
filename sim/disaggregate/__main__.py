"""Command: ``python -m sim.disaggregate``; see sim/disaggregate/run.py."""

from sim.disaggregate.run import disaggregate_command

if __name__ == "__main__":
    disaggregate_command()
