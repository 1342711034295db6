"""Command: ``python -m sim.results``; see sim/results/simulation_page.py."""

from sim.results.simulation_page import main

if __name__ == "__main__":
    main()
