"""Command: ``python -m sim.replay``; see sim/replay/run.py."""

from sim.replay.run import replay_command

if __name__ == "__main__":
    replay_command()
