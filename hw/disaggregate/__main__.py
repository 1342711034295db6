"""Command: ``python -m hw.disaggregate``; see hw/disaggregate/run.py."""

from sim.config import start

if __name__ == "__main__":
    start("hw.disaggregate.run:disaggregate_command")
