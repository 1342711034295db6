"""Command: ``python -m hw.replay``; see hw/replay/run.py."""

from sim.config import start

if __name__ == "__main__":
    start("hw.replay.run:main")
