"""Command: ``python -m sim.cluster_results``; see sim/results/cluster_page.py."""

from sim.results.cluster_page import main

if __name__ == "__main__":
    main()
