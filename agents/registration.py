"""Registers the Gymnasium environments by name; ``import agents`` does it, and loads none of them."""

from __future__ import annotations

import gymnasium as gym

ENVIRONMENTS = {
    "PruneToBudget-v0": ("agents.envs.prune:PruneToBudget", "agents.envs.prune_vector:PruneToBudgetVector"),
    "ServeTrace-v0": ("agents.envs.serve:ServeTrace", "agents.envs.serve_vector:ServeTraceVector"),
    "ServeCluster-v0": ("agents.envs.cluster:ServeCluster", "agents.envs.cluster_vector:ServeReplicas"),
    "ServeRoles-v0": ("agents.envs.roles:ServeRoles", "agents.envs.roles_vector:ServeRolesVector"),
}
"""Environment id: (entry point, vector entry point).

The two views of ``ServeCluster`` differ: the plain one is a single agent for all replicas, the vector one has a row for
each replica.
"""


def register_environments() -> None:
    """Register every environment that is not registered yet."""
    for name, (entry_point, vector_entry_point) in ENVIRONMENTS.items():
        if name not in gym.registry:
            gym.register(name, entry_point=entry_point, vector_entry_point=vector_entry_point)
