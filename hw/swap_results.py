"""Command: ``python -m hw.swap_results``; see hw/validate/swapping.py."""

from sim.config import start

if __name__ == "__main__":
    start("hw.validate.swapping:main")
