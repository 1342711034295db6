"""Command: ``python -m hw.checkup``; see hw/checkup/run.py."""

from sim.config import start

if __name__ == "__main__":
    start("hw.checkup.run:main")
