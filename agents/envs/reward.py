"""Rewards as pure functions of what a step changed; the files of conf/reward choose one.

A reward of one's own is a subclass of ``PruneReward`` or ``ServeReward`` with its own ``__call__``, which an option
names as its ``_target_``.

Policies are evaluated by **utility**: the share of arrived requests that met their SLO, each weighted by the quality it
kept. Quality kept is exp(-loss), the ratio of the dense model's perplexity to the plan's: 1 for dense, 0.5 for twice
the perplexity. In ``PruneToBudget`` a load counts as one request, which meets its target if the plan fits the budget.

Shaping adds ``discount * potential(after) - potential(before)``, with a potential of 0 after the end of an episode.
Every policy then gains the same amount per episode, so the best policy does not change (Ng, Harada and Russell, ICML
1999, theorem 1; tests/agents/envs/test_reward.py checks it by exact search).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from omegaconf import OmegaConf

from sim.config import build
from sim.engine.protocol import EngineState
from sim.errors import ConfigError, nearest
from sim.results.metrics import Slo, behind_pace, met_slo
from sim.results.records import Records, Status
from sim.results.utility import kept_quality as kept_quality
from sim.types import Bools, Floats, Ints

# Shapes: every array is [n], one entry for each environment.

F = TypeVar("F", float, Floats)
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class PruneStep:
    """What a step of ``PruneToBudget`` changed.

    loss_before, loss_after: loss of the plan, in nats per token more than dense.
    fitting, failed: how many loads this step settled with a plan that fits, and with one that does not.
    ended: whether the episode is over.
    worst_loss: the loss charged for a plan that does not fit, in nats per token.
    loads: loads per episode.
    """

    loss_before: Floats
    loss_after: Floats
    fitting: Ints
    failed: Ints
    ended: Bools
    worst_loss: float
    loads: int | Ints


def utility(step: PruneStep) -> Floats:
    """Return the utility that this step adds: the quality kept by the settled plans that fit, divided by ``loads``."""
    return step.fitting * kept_quality(step.loss_after) / step.loads


def negative_loss(step: PruneStep) -> Floats:
    """Return minus the loss of each settled plan in nats per token, or minus ``worst_loss`` if it does not fit.

    For one load this ranks plans as utility does. Unlike exp(-loss), its differences stay large at high loss.
    """
    return -(step.fitting * np.maximum(step.loss_after, 0.0) + step.failed * step.worst_loss) / step.loads


def shaped(step: PruneStep, reward: Floats, before: Floats, after: Floats, discount: float) -> Floats:
    """Return ``reward`` plus potential-based shaping; the potential after the end of an episode is 0."""
    return reward + discount * np.where(step.ended, 0.0, after) - before


@dataclass(frozen=True, slots=True)
class PruneReward:
    """The reward of ``PruneToBudget``.

    kind: "utility" (share of quality kept, no unit) or "negative_loss" (nats per token).
    shaping: add potential-based shaping; the potential is the quality kept, or minus the loss.
    discount: the discount of the shaping term; use the algorithm's.
    """

    kind: str = "negative_loss"
    shaping: bool = True
    discount: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"reward.kind {self.kind!r} is unknown; {nearest(self.kind, KINDS)}")
        if not 0.0 < self.discount <= 1.0:
            raise ConfigError(f"reward.discount is {self.discount}; it must be in (0, 1], such as 1.0")

    def __call__(self, step: PruneStep) -> Floats:
        """Return the reward of each environment, float64[n]."""
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
    """The reward of ``ServeTrace`` and ``ServeCluster``: the change of utility in a tick, times ``scale``.

    kind: which change is paid. Over an episode, "earned" adds up to ``scale * utility`` and "lost" to
        ``scale * (utility - 1)``.
        earned: the utility that a tick added; a request pays when it finishes.
        lost: minus the utility that a tick put out of reach. A request costs when it is rejected, when its first token
        is late, and for each token that a pruned or quantized plan made. The cost comes soon after the decision that
        caused it.
    scale: factor on every reward, no unit.
    late_weight: weight of the shaping potential, which is minus the share of requests that wait, weighted by how close
        the oldest is to its TTFT target. 0 turns shaping off.
    discount: the discount of the shaping term; use the algorithm's.
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
                f"reward.scale is {self.scale}, late_weight {self.late_weight}, discount {self.discount}; scale must "
                "be above 0, late_weight at least 0, and discount in (0, 1]"
            )

    def potential(self, state: EngineState, requests: float, ttft_s: float | None) -> float:
        """Return the potential of a state, in a window with this number of requests."""
        return float(self.potentials(np.array([state.oldest_wait_s]), np.array([state.waiting]), [requests], ttft_s)[0])

    def potentials(self, oldest_wait_s: Floats, waiting: Floats, requests: ArrayLike, ttft_s: float | None) -> Floats:
        """Return the potential of many states, float64[n].

        Args:
            oldest_wait_s: float64[n], seconds that the oldest waiting request has waited. waiting: float64[n],
                requests.
            requests: number of requests in each window, [n]. ttft_s: the TTFT target; None counts as 1 s.
        """
        pressing = np.minimum(1.0, oldest_wait_s / (ttft_s or 1.0))
        return -self.late_weight * pressing * waiting / np.maximum(requests, 1)

    def __call__(self, gained: F, before: F, after: F) -> F:
        """Return the reward of a tick.

        Args:
            gained: change of utility. before, after: potentials; ``after`` must be 0 at the end of an episode.
        """
        return self.scale * (gained + self.discount * after - before)


SERVE_KINDS = ("earned", "lost")


def built_reward(reward: Any, kind: type[R]) -> R:
    """Return the reward of an environment.

    Args:
        reward: one, its fields, or a mapping with ``_target_``, which names a subclass of ``kind`` of one's own.
        kind: ``PruneReward`` or ``ServeReward``.
    Raises:
        ConfigError: for fields that the reward does not have, or a ``_target_`` that makes something else.
    """
    if isinstance(reward, kind):
        return reward
    fields = dict(reward or {})
    if "_target_" not in fields:
        return kind(**fields)
    made = build(OmegaConf.create(fields))
    if not isinstance(made, kind):
        raise ConfigError(
            f"reward: {fields['_target_']} makes a {type(made).__name__}; it must make an instance of a subclass of "
            f"agents.envs.reward.{kind.__name__}"
        )
    return made


def utility_lost(
    records: Records, slo: Slo, dense_nll: float, now_s: float, requests: int, *, ahead_s: float | None = None
) -> float:
    """Return the share of a window's utility that is out of reach at ``now_s``, in [0, 1].

    A request loses its full share once it is rejected, finishes outside the SLO, or misses the TTFT target (also while
    it still waits). Any other request that has arrived loses the quality that its tokens so far have lost. After the
    window has been served, this is 1 - utility: a request that never ended for lack of memory is lost, and so are the
    turns that never arrived because of it.

    Args:
        records: of the requests that have arrived. dense_nll: NLL of the dense model, in nats per token.
        now_s: seconds since the start of the window; ``inf`` after it has been served. requests: in the window.
        ahead_s: None counts what is certain. A number adds what is likely: a request that waits is late if it would be
            late after this many more seconds, and a running one is lost if its tokens so far are slower than the TPOT
            target.
    """
    never_arrived = requests - len(records) if math.isinf(now_s) else 0
    if not len(records):
        return never_arrived / requests
    first_s = np.where(np.isfinite(records.first_token_s), records.first_token_s, now_s + (ahead_s or 0.0))
    late = (
        first_s - records.arrival_s > slo.ttft_s if slo.ttft_s is not None else np.zeros(len(records), dtype=np.bool_)
    )
    gone = late | (records.status == Status.REJECTED)
    finished = records.status == Status.FINISHED
    if math.isinf(now_s):
        gone |= ~finished
    if finished.any():
        gone |= finished & ~met_slo(records, slo)
    if ahead_s is not None and slo.tpot_s is not None:
        gone |= ~finished & behind_pace(records, slo.tpot_s, now_s)
    loss = np.nan_to_num(records.quality_nll - dense_nll, nan=0.0)
    return float(np.where(gone, 1.0, 1.0 - kept_quality(loss)).sum() + never_arrived) / requests
