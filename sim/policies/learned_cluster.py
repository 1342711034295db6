"""A policy trained in ``ServeCluster``, for every replica of a cluster; it observes the other replicas too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sim.cost.plan import Plan
from sim.engine.protocol import EngineState
from sim.policies.base import PolicyContext
from sim.policies.learned import read_learned
from sim.policies.learned_serve import LearnedServe, parts_of
from sim.policies.observation.cluster import cluster_table, replica_features, shown_entries
from sim.types import Floats32


@dataclass(slots=True)
class LearnedCluster(LearnedServe):
    """Chooses as ``LearnedServe`` does; each replica has its own instance, all with the same network.

    shown: float32[entries], 0 for entries that were hidden in training, 1 for the others.
    """

    shown: Floats32 = field(kw_only=True)

    def __call__(self, state: EngineState) -> Plan:
        """Choose without observing other replicas."""
        return self.among(state, ())

    def among(self, state: EngineState, others: Sequence[EngineState]) -> Plan:
        """Observe and choose."""
        compared = replica_features(state, others, self.observer.dense_bytes)
        return self.decided(state, np.concatenate((self.observer(state, self.choice), compared)) * self.shown)


def learned_cluster(served: PolicyContext, *, path: str, low_bits: bool = True) -> LearnedCluster:
    """Build the policy from an exported file; run it at the ``tick_s`` of its training, which is in the file.

    Args:
        served: what the policy knows of the server.
        path: a JSON file of ``agents.export``, or the name of one in conf/policy.
        low_bits: whether the server has low-precision copies of the weights, as in ``learned_serve``.
    Raises:
        ConfigError: for a file that was trained for another model, observation or table of plans.
    """
    learned = read_learned(path, "ServeCluster")
    parts = parts_of(learned, served, cluster_table, low_bits)
    hidden = learned.about.get("environment", {}).get("hide", ())
    return LearnedCluster(**parts, shown=shown_entries(cluster_table(parts["actions"]), hidden))
