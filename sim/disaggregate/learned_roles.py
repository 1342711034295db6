"""Roles by a network that was trained in ``ServeRoles``: how many replicas prefill, every ``period_s`` seconds."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sim.disaggregate.observation import RolesObserver, possible_flags, roles_table
from sim.disaggregate.roles import SystemState
from sim.errors import ConfigError
from sim.policies.learned import Network, check_tables, read_learned
from sim.policies.observation.cluster import shown_entries
from sim.types import Floats32


@dataclass(slots=True)
class LearnedRoles:
    """Chooses the possible number of prefill replicas with the highest value; each replay needs a new one.

    name: of the policy's file. model: name of the model of its training. replicas: of a system that it serves.
    shown: float32[entries], 0 for entries that were hidden in training, 1 for the others.
    """

    name: str
    model: str
    replicas: int
    network: Network
    shown: Floats32
    period_s: float
    observer: RolesObserver = field(default_factory=RolesObserver)

    def check_served(self, model: str, replicas: int) -> None:
        """Check that the policy was trained for a system.

        Raises:
            ConfigError: for another model, or another number of replicas.
        """
        if (model, replicas) != (self.model, self.replicas):
            raise ConfigError(
                f"{self.name} was trained for {self.replicas} replicas of {self.model}, not {replicas} of {model}; set "
                f"prefill_replicas and decode_replicas to {self.replicas} in all, or choose roles=by_load"
            )

    def __call__(self, state: SystemState) -> int:
        """Observe and choose."""
        features = self.observer(state) * self.shown
        return 1 + int(self.network.act(features, possible_flags(state)))


def learned_roles(*, path: str, period_s: float | None = None) -> LearnedRoles:
    """Build the policy from an exported file.

    Args:
        path: a JSON file of ``agents.export``, or the name of one in conf/policy.
        period_s: seconds between decisions; None takes those of its training.
    Raises:
        ConfigError: for a file of another environment, or with another table of observations.
    """
    learned = read_learned(path, "ServeRoles")
    table = roles_table(len(learned.about["actions"]) + 1)
    check_tables(learned, table)
    if period_s is None:
        if "tick_s" not in learned.about:
            raise ConfigError(f"{learned.path.name} has no tick_s; set roles.period_s, or export it again")
        period_s = float(learned.about["tick_s"])
    shown = shown_entries(table, learned.about.get("environment", {}).get("hide", ()))
    return LearnedRoles(
        name=learned.path.name,
        model=str(learned.about["model"]),
        replicas=len(table.actions) + 1,
        network=learned.network,
        shown=np.asarray(shown, dtype=np.float32),
        period_s=period_s,
    )
