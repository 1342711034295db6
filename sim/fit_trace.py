"""Command: ``python -m sim.fit_trace``; see sim/traces/fit.py."""

import sys

from sim.traces.fit import main

if __name__ == "__main__":
    sys.exit(main())
