"""Command: ``python -m hw.disaggregate_results``; see hw/disaggregate/results.py."""

from sim.config import start

if __name__ == "__main__":
    start("hw.disaggregate.results:main")
