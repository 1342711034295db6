"""A policy trained in ``ServeCluster``, for every replica of a cluster; it observes the other replicas too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sim.cost.memory import kv_block_layer_bytes
from sim.cost.plan import Plan
from sim.engine.protocol import EngineState
from sim.policies.base import PolicyContext
from sim.policies.learned import Network, read_learned
from sim.policies.learned_serve import trained_actions
from sim.policies.observation.cluster import cluster_table, replica_features, shown_entries
from sim.policies.observation.serve import SERVER_ENTRIES, Choice, ServeActions, ServeObserver
from sim.types import Floats32


@dataclass(slots=True)
class LearnedCluster:
    """Chooses the legal plan with the highest value; each replica has its own instance, all with the same network.

    shown: float32[entries], 0 for entries that were hidden in training, 1 for the others.
    """

    network: Network
    actions: ServeActions
    observer: ServeObserver
    shown: Floats32
    choice: Choice = field(init=False)

    def __post_init__(self) -> None:
        self.choice = Choice(self.actions.start)

    @property
    def first_plan(self) -> Plan:
        """The plan that training started with."""
        return self.actions.plans[self.actions.start]

    def __call__(self, state: EngineState) -> Plan:
        """Choose without observing other replicas."""
        return self.among(state, ())

    def among(self, state: EngineState, others: Sequence[EngineState]) -> Plan:
        """Observe and choose."""
        own = self.observer(state, self.choice)[: len(SERVER_ENTRIES)]
        features = np.concatenate((own, replica_features(state, others, self.observer.dense_bytes))) * self.shown
        action = int(self.network.act(features, self.actions.legal(state, self.choice)))
        self.choice = self.actions.chosen(state, self.choice, action)
        return self.actions.plans[action]


def learned_cluster(served: PolicyContext, *, path: str) -> LearnedCluster:
    """Build the policy from an exported file; run it at the ``tick_s`` of its training, which is in the file.

    Args:
        served: what the policy knows of the server.
        path: a JSON file of ``agents.export``, or the name of one in conf/policy.
    Raises:
        ConfigError: for a file that was trained for another model, observation or table of plans.
    """
    learned = read_learned(path, "ServeCluster")
    actions = trained_actions(learned, served, cluster_table)
    block_bytes = kv_block_layer_bytes(served.model, served.kv_block_tokens)
    shown = shown_entries(cluster_table(actions), learned.about.get("environment", {}).get("hide", ()))
    return LearnedCluster(learned.network, actions, ServeObserver(served.model, actions, block_bytes), shown)
