"""Command: ``python -m hw.reproduction``; see hw/reproduction/run.py."""

from sim.config import start

if __name__ == "__main__":
    start("hw.reproduction.run:main")
