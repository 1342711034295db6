"""Command: ``python -m hw.compare``; see hw/validate/compare.py."""

import sys

from hw.validate.compare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
