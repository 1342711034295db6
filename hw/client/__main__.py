"""Command: ``python -m hw.client``; see hw/client/client.py."""

from sim.config import start

if __name__ == "__main__":
    start("hw.client.client:main")
