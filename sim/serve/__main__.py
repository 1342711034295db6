"""Command: ``python -m sim.serve``; see sim/serve/server.py."""

from sim.config import start

if __name__ == "__main__":
    start("sim.serve.server:main")
