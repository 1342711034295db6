"""Command: ``python -m hw.client``; see hw/client/run.py."""

from sim.config import start

if __name__ == "__main__":
    start("hw.client.run:main")
