"""Command: ``python -m tests.soak PART``; see ``make soak``."""

from __future__ import annotations

import sys

from tests.soak.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
