"""Autoscalers: decide while a cluster serves how many replicas run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sim.cluster.cluster import ClusterState
from sim.errors import ConfigError


def none() -> None:
    """Return None: no autoscaler, every replica serves."""
    return


@dataclass(kw_only=True)
class ByRequests:
    """Runs enough replicas that each has at most ``requests_each`` requests on average; shrinks only after a while.

    first: replicas at the start. least, most: bounds. period_s: seconds between decisions.
    patience: consecutive decisions that must want fewer replicas before one is removed.
    """

    requests_each: float
    most: int
    first: int = 1
    least: int = 1
    period_s: float = 5.0
    patience: int = 6
    _calm: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.first <= self.most:
            raise ConfigError(
                f"autoscaler.least is {self.least}, first {self.first}, most {self.most}; they must ascend, "
                "from at least 1"
            )
        if not (self.requests_each > 0 and self.period_s > 0 and self.patience >= 1):
            raise ConfigError(
                f"autoscaler.requests_each is {self.requests_each} and period_s {self.period_s}, which must be above "
                f"0, and patience {self.patience}, which must be at least 1"
            )

    def __call__(self, state: ClusterState) -> int:
        """Return how many replicas should serve."""
        there = len(state.serving) + state.loading
        requests = state.held + sum(one.waiting + one.running for one in state.serving)
        wanted = min(self.most, max(self.least, math.ceil(requests / self.requests_each)))
        self._calm = self._calm + 1 if wanted < there else 0
        if wanted >= there:
            return wanted
        if self._calm < self.patience:
            return min(max(there, self.least), self.most)
        self._calm = 0
        return max(self.least, there - 1)
