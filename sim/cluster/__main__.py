"""Command: ``python -m sim.cluster``; see sim/cluster/run.py."""

from sim.cluster.run import cluster_command

if __name__ == "__main__":
    cluster_command()
