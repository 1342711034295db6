"""Command: ``python -m hw.calibrate``; see hw/calibrate/published.py."""

import sys

from hw.calibrate.published import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
