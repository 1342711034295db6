"""Starts a Ray cluster that wants a token, prints its address, and keeps it until stdin closes; run by a test."""

from __future__ import annotations

import os
import sys

from ray.cluster_utils import Cluster


def main() -> None:
    assert os.environ["RAY_AUTH_MODE"] == "token"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
