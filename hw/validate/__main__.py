"""Command: ``python -m hw.validate``; see hw/validate/run.py."""

from sim.config import start

if __name__ == "__main__":
    start("hw.validate.run:main")
