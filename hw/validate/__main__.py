"""Command: ``python -m hw.validate``; see hw/validate/suite.py."""

import sys

from hw.validate.suite import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
