"""Command: ``python -m sim.results``; see sim/pages/simulation.py."""

from sim.pages.simulation import main

if __name__ == "__main__":
    main()
