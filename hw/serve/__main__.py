"""Command: ``python -m hw.serve``; see hw/serve/server.py."""

from sim.config import start

if __name__ == "__main__":
    start("hw.serve.server:main")
