"""Trains on a Ray cluster of two nodes, kills an env runner and then a node, and prints the healthy runners each time.

A test runs it in its own process: the tests share one local Ray, but this needs a cluster.
"""

from __future__ import annotations

import json
import os
import signal
import time

import hydra
import ray
import torch
from ray.cluster_utils import Cluster

from agents.training.train import build_algorithm, start_ray
from sim.config import CONF_DIR


def main() -> None:
    torch.set_num_threads(1)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=2)
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        small = ["num_envs=4", "hidden=[16]", "algorithm.steps_an_iteration=256", "algorithm.minibatch=128"]
        cfg = hydra.compose("train", overrides=["experiment=ppo_prune", "ray.runners=2", *small])
    cfg.ray.address = cluster.address
    start_ray(cfg)
    nodes = sum(node["Alive"] for node in ray.nodes())
    algorithm = build_algorithm(cfg)

    def healthy_after(until: int, seconds: float) -> dict[str, int]:
        """Train until this many runners are healthy or the time is over; return their number and the steps so far."""
        limit_s = time.monotonic() + seconds
        while True:
            result = algorithm.train()
            healthy = int(result["fault_tolerance"]["num_healthy_workers"])
            if healthy == until or time.monotonic() > limit_s:
                return {"healthy": healthy, "steps": int(result["num_env_steps_sampled_lifetime"])}

    measured = {"nodes": {"alive": nodes}, "start": healthy_after(2, 60)}
    pids = algorithm.env_runner_group.foreach_env_runner(lambda _: os.getpid(), local_env_runner=False)
    os.kill(pids[0], signal.SIGKILL)
    measured["runner_killed"] = healthy_after(1, 30)
    measured["runner_back"] = healthy_after(2, 90)
    cluster.remove_node(second, allow_graceful=False)
    measured["node_killed"] = healthy_after(0, 60)
    cluster.add_node(num_cpus=2)
    measured["node_back"] = healthy_after(2, 120)
    print(json.dumps(measured))
    algorithm.stop()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
