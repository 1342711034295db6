"""Command: ``python -m hw.loop``; see hw/loop/run.py."""

from sim.config import start

if __name__ == "__main__":
    start("hw.loop.run:main")
