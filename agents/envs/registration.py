"""The Gymnasium environments by name: ``gymnasium.make("agents.envs.registration:PruneToBudget-v0")`` registers and builds one."""

from __future__ import annotations

import gymnasium as gym

ENVIRONMENTS = {
    "PruneToBudget-v0": ("agents.envs.prune:PruneToBudget", "agents.envs.prune:PruneToBudgetVector"),
    "ServeTrace-v0": ("agents.envs.serve:ServeTrace", "agents.envs.serve_vector:ServeTraceVector"),
    "ServeCluster-v0": ("agents.envs.cluster:ServeCluster", "agents.envs.cluster_vector:ServeReplicas"),
}
"""Name: entry point, vector entry point. Those of ``ServeCluster`` differ: one agent for all, and one for each."""


def register_environments() -> None:
    """Register every environment that is not registered yet."""
    for name, (entry_point, vector_entry_point) in ENVIRONMENTS.items():
        if name not in gym.registry:
            gym.register(name, entry_point=entry_point, vector_entry_point=vector_entry_point)


register_environments()
