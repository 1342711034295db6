"""Command: ``python -m sim.cluster_results``; see sim/pages/clusters.py."""

from sim.pages.clusters import main

if __name__ == "__main__":
    main()
