"""Rewards: plain functions of what a step changed, chosen by the YAML files of conf/reward.

The figure that counts is **utility**: the share of arrived requests that met their target, each weighted by the quality
that it kept. Quality kept is exp(-loss), the ratio of the dense model's perplexity to the plan's: 1 for dense, 0.5 for
twice the perplexity. When one load is pruned to a budget there is one request, and its target is that the plan fits.

Shaping adds ``discount * potential(after) - potential(before)``, with a potential of 0 once an episode has ended. Over
an episode this adds the same to every way of playing it, so the best policy stays the best (Ng, Harada and Russell,
ICML 1999, theorem 1; tests/agents/envs/test_reward.py checks it by exact search).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from sim.engine.protocol import EngineState
from sim.errors import ConfigError, nearest
from sim.results.metrics import Slo, met_slo
from sim.results.records import Records, Status
from sim.types import Bools, Floats, Ints

# Shapes: every array has one entry an environment [n].

F = TypeVar("F", float, Floats)


@dataclass(frozen=True, slots=True)
class PruneStep:
    """What a step of ``PruneToBudget`` changed.

    loss_before, loss_after: nats a token more than dense. fitting, failed: how many loads were settled by this step
    with a plan that fits, and with one that does not. ended: the episode is over. worst_loss: what a plan that does not
    fit is charged, in nats. draws: loads an episode.
    """

    loss_before: Floats
    loss_after: Floats
    fitting: Ints
    failed: Ints
    ended: Bools
    worst_loss: float
    draws: int | Ints


def kept_quality(loss: Floats) -> Floats:
    """Return the share of quality kept, exp(-loss); no more than 1."""
    return np.exp(-np.maximum(loss, 0.0))


def utility(step: PruneStep) -> Floats:
    """Return the quality kept by each settled plan that fits, over ``draws``: an episode sums to its utility."""
    return step.fitting * kept_quality(step.loss_after) / step.draws


def negative_loss(step: PruneStep) -> Floats:
    """Return minus the loss of each plan that was settled, minus ``worst_loss`` where it does not fit.

    For one load this orders plans as utility does, and its differences do not vanish where much has to go.
    """
    return -(step.fitting * np.maximum(step.loss_after, 0.0) + step.failed * step.worst_loss) / step.draws


def shaped(step: PruneStep, reward: Floats, before: Floats, after: Floats, discount: float) -> Floats:
    """Return ``reward`` plus the potential-based term; the potential after the end is 0."""
    return reward + discount * np.where(step.ended, 0.0, after) - before


@dataclass(frozen=True, slots=True)
class PruneReward:
    """A reward of ``PruneToBudget``. kind: ``utility`` or ``negative_loss``. shaping: with a potential of its kind."""

    kind: str = "negative_loss"
    shaping: bool = True
    discount: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"reward.kind {self.kind!r} is unknown; {nearest(self.kind, KINDS)}")
        if not 0.0 < self.discount <= 1.0:
            raise ConfigError(f"reward.discount is {self.discount}; it must be in (0, 1]")

    def __call__(self, step: PruneStep) -> Floats:
        """Return the reward of each environment."""
        if self.kind == "utility":
            reward = utility(step)
            if not self.shaping:
                return reward
            return shaped(step, reward, kept_quality(step.loss_before), kept_quality(step.loss_after), self.discount)
        reward = negative_loss(step)
        if not self.shaping:
            return reward
        before, after = -np.maximum(step.loss_before, 0.0), -np.maximum(step.loss_after, 0.0)
        return shaped(step, reward, before, after, self.discount)


KINDS = ("utility", "negative_loss")


@dataclass(frozen=True, slots=True)
class ServeReward:
    """The reward of ``ServeTrace``, times ``scale``. Over an episode both kinds add up to utility, but for a constant.

    earned: what a tick added to the window's utility; a request pays when it has finished.
    lost: minus the utility that a tick has put out of reach; a request costs when it is rejected, when its first token
        is late, and for each token that a lesser plan made. This says sooner which decision was wrong, and says
        nothing where nothing goes wrong: an episode adds up to utility - 1.
    late_weight: with it, the potential is minus this share of the requests that wait and are about to be late; shaped
        as above, so that the best policy stays the best.
    """

    kind: str = "lost"
    scale: float = 10.0
    late_weight: float = 0.0
    discount: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in SERVE_KINDS:
            raise ConfigError(f"reward.kind {self.kind!r} is unknown; {nearest(self.kind, SERVE_KINDS)}")
        if not (self.scale > 0 and self.late_weight >= 0 and 0 < self.discount <= 1):
            raise ConfigError(
                f"reward.scale is {self.scale}, late_weight {self.late_weight}, discount {self.discount}; above 0, at "
                "least 0, and in (0, 1] are allowed"
            )

    def potential(self, state: EngineState, requests: float, ttft_s: float | None) -> float:
        """Return the potential of a state."""
        return float(self.potentials(np.array([state.oldest_wait_s]), np.array([state.waiting]), [requests], ttft_s)[0])

    def potentials(self, oldest_wait_s: Floats, waiting: Floats, requests: ArrayLike, ttft_s: float | None) -> Floats:
        """Return the potential of many states, each in a window of so many requests; all float64[n]."""
        pressing = np.minimum(1.0, oldest_wait_s / (ttft_s or 1.0))
        return -self.late_weight * pressing * waiting / np.maximum(requests, 1)

    def __call__(self, gained: F, before: F, after: F) -> F:
        """Return the reward of a tick; before and after are potentials, after the end 0."""
        return self.scale * (gained + self.discount * after - before)


SERVE_KINDS = ("earned", "lost")


def utility_lost(records: Records, slo: Slo, dense_nll: float, now_s: float, requests: int) -> float:
    """Return the share of a window's utility that is out of reach at ``now_s``.

    Of each request that has arrived: all of it once it was rejected, or waits for its first token beyond the target, or
    got it late; else what its tokens so far have lost in quality. Of a window that has been served this is 1 - utility.
    """
    if not len(records):
        return 0.0
    first_s = np.where(np.isfinite(records.first_token_s), records.first_token_s, now_s)
    late = (
        first_s - records.arrival_s > slo.ttft_s if slo.ttft_s is not None else np.zeros(len(records), dtype=np.bool_)
    )
    gone = late | (records.status == Status.REJECTED)
    finished = records.status == Status.FINISHED
    if finished.any():
        gone |= finished & ~met_slo(records, slo)
    loss = np.nan_to_num(records.quality_nll - dense_nll, nan=0.0)
    return float(np.where(gone, 1.0, 1.0 - kept_quality(loss)).sum()) / requests
