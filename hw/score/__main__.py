"""Command: ``python -m hw.score``; see hw/score/run.py."""

from sim.config import start

if __name__ == "__main__":
    start("hw.score.run:main")
