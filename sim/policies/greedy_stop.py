"""Greedy order and stop: drop blocks in a fixed order until memory suffices; restore them when there is enough again.

The baseline without learning that RAP's reviewers requested. The order is computed offline (RAP's Greedy Sequential
Importance, arXiv 2505.17138, or BlockPruner's, arXiv 2406.10594); at run time only the stopping point moves. RAP drops
until peak(mask; B, S) meets the budget for the current batch and lengths; here the load is the KV that the engine holds
and, optionally, the queue. No paper states headroom and patience; the values are our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sim.cost.memory import weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan, dense_plan, drop, with_mask
from sim.engine.protocol import EngineState
from sim.errors import ConfigError, PlanError
from sim.policies.base import PolicyContext
from sim.policies.orders import check_made_for


@dataclass(slots=True)
class GreedyStop:
    """Runs the model without the first ``dropped`` blocks of an order.

    plans, weights_bytes, mha_blocks: of every stopping point, from none dropped to the full order.
    headroom: factor on the KV demand when deciding to drop blocks. restore_headroom: the same when deciding to restore.
    waiting_share: share of the queue's tokens that counts as demand.
    waiting_most: cap on the queue's demand, as a share of the budget, because no plan can hold a very long queue and
        dropping everything would not help.
    patience: consecutive decisions that must agree before blocks are restored; dropping is immediate.
    """

    plans: tuple[Plan, ...]
    weights_bytes: tuple[int, ...]
    mha_blocks: tuple[int, ...]
    kv_bytes_per_token_layer: int
    workspace_bytes: int
    headroom: float
    restore_headroom: float
    waiting_share: float
    waiting_most: float
    patience: int
    dropped: int = 0
    calm: int = field(default=0)

    @property
    def first_plan(self) -> Plan:
        """Dense."""
        return self.plans[0]

    def __call__(self, state: EngineState) -> Plan:
        """Drop blocks at once if memory is short; restore them if it has sufficed for ``patience`` decisions."""
        needed = self._stop(state, self.headroom)
        if needed > self.dropped:
            self.dropped, self.calm = needed, 0
            return self.plans[self.dropped]
        relaxed = self._stop(state, self.restore_headroom)
        self.calm = self.calm + 1 if relaxed < self.dropped else 0
        if self.calm >= self.patience:
            self.dropped, self.calm = relaxed, 0
        return self.plans[self.dropped]

    def _stop(self, state: EngineState, headroom: float) -> int:
        """Return the first stopping point at which weights and KV demand fit; the last if none does."""
        # An announced decrease of the budget counts now; an announced increase does not count yet.
        budget_bytes = min(state.budget_bytes, state.next_budget_bytes) - self.workspace_bytes
        dense_bytes_per_token = self.mha_blocks[0] * self.kv_bytes_per_token_layer
        most_tokens = self.waiting_most * max(budget_bytes, 0) / dense_bytes_per_token
        tokens = state.running_tokens + min(self.waiting_share * state.waiting_tokens, most_tokens)
        for point, (weights, mha) in enumerate(zip(self.weights_bytes, self.mha_blocks, strict=True)):
            if weights + headroom * tokens * mha * self.kv_bytes_per_token_layer <= budget_bytes:
                return point
        return len(self.plans) - 1


def greedy_stop(
    served: PolicyContext,
    *,
    order: Sequence[str],
    made_for: str | None = None,
    headroom: float = 1.1,
    restore_headroom: float = 1.3,
    waiting_share: float = 0.0,
    waiting_most: float = 0.25,
    patience: int = 5,
) -> GreedyStop:
    """Build the policy from an order of blocks such as ``MHA25, FFN7``.

    Args:
        served: what the policy knows of the server.
        order: blocks in the order of dropping.
        made_for: the model on which the order was measured; None accepts any model.
        headroom, restore_headroom, waiting_share, waiting_most, patience: as in ``GreedyStop``.
    Raises:
        PlanError: for a block that the model does not have, one named twice, or an order made for another model.
        ConfigError: for a headroom below 1, a restore_headroom below headroom, a patience below 1, or a share out of
            range.
    """
    plans = dropping(served.model, order, made_for)
    return stop_over(served, plans, headroom, restore_headroom, waiting_share, waiting_most, patience)


def dropping(model: ModelSpec, order: Sequence[str], made_for: str | None = None) -> list[Plan]:
    """Return the plans without the first 0, 1, 2, ... blocks of an order.

    Raises:
        PlanError: for a block that the model does not have, one named twice, or an order made for another model.
    """
    check_made_for(model, made_for, "policy")
    dense = dense_plan(model)
    plans = [dense]
    mha: list[int] = []
    ffn: list[int] = []
    for kind, layer in map(block_of, order):
        (mha if kind == "MHA" else ffn).append(layer)
        if len(set(mha)) + len(set(ffn)) != len(plans):
            raise PlanError(f"policy.order names {kind}{layer} twice; each block can be dropped once")
        plans.append(with_mask(dense, drop(model, mha=mha, ffn=ffn)))
    return plans


def stop_over(
    served: PolicyContext,
    plans: Sequence[Plan],
    headroom: float,
    restore_headroom: float,
    waiting_share: float,
    waiting_most: float,
    patience: int,
) -> GreedyStop:
    """Return the policy over plans of falling size, the first being dense; the numbers are those of ``GreedyStop``.

    Raises:
        ConfigError: for a headroom below 1, a restore_headroom below headroom, a patience below 1, or a share out of
            range.
    """
    if not 1.0 <= headroom <= restore_headroom:
        raise ConfigError(
            f"policy.headroom is {headroom} and restore_headroom {restore_headroom}; they must be at least 1, and the "
            "second at least the first; otherwise blocks would be dropped and restored at every decision"
        )
    if patience < 1 or not waiting_share >= 0.0 or not 0.0 <= waiting_most <= 1.0:
        raise ConfigError(
            f"policy.patience is {patience}, waiting_share {waiting_share}, waiting_most {waiting_most}; they must "
            "be at least 1, at least 0, and from 0 to 1"
        )
    model = served.model
    return GreedyStop(
        plans=tuple(plans),
        weights_bytes=tuple(weight_bytes(model, plan) for plan in plans),
        mha_blocks=tuple(sum(plan.prefill.mha) for plan in plans),
        kv_bytes_per_token_layer=model.kv_bytes_per_token_layer,
        workspace_bytes=served.workspace_bytes,
        headroom=headroom,
        restore_headroom=restore_headroom,
        waiting_share=waiting_share,
        waiting_most=waiting_most,
        patience=patience,
    )


@dataclass(slots=True)
class RandomStop:
    """Greedy order and stop over a random order, with a new order each time all blocks are restored.

    draw: builds the policy over a new random order, with fresh state.
    """

    draw: Callable[[], GreedyStop]
    current: GreedyStop

    @property
    def first_plan(self) -> Plan:
        """Dense."""
        return self.current.first_plan

    def __call__(self, state: EngineState) -> Plan:
        """Follow the current order; take a new one when all blocks are restored."""
        was_dropped = self.current.dropped
        plan = self.current(state)
        if was_dropped and not self.current.dropped:
            self.current = self.draw()
        return plan


def random_stop(
    served: PolicyContext,
    *,
    seed: int,
    max_dropped: int = 20,
    headroom: float = 1.1,
    restore_headroom: float = 1.3,
    waiting_share: float = 0.0,
    waiting_most: float = 0.25,
    patience: int = 5,
) -> RandomStop:
    """Build ``greedy_stop`` over seeded random orders: the baseline that shows the value of a good order.

    The first and last layer are never dropped: without them the model produces no useful text, so the comparison would
    be meaningless.
    """
    blocks = inner_blocks(served.model)
    if not 1 <= max_dropped <= len(blocks):
        raise ConfigError(f"policy.max_dropped is {max_dropped}; it must be between 1 and {len(blocks)}")
    rng = np.random.default_rng(seed)

    def draw() -> GreedyStop:
        return greedy_stop(
            served,
            order=[blocks[i] for i in rng.permutation(len(blocks))[:max_dropped]],
            headroom=headroom,
            restore_headroom=restore_headroom,
            waiting_share=waiting_share,
            waiting_most=waiting_most,
            patience=patience,
        )

    return RandomStop(draw, draw())


def inner_blocks(model: ModelSpec) -> list[str]:
    """Return the names of all blocks except those of the first and last layer."""
    return [f"{kind}{layer}" for layer in range(1, model.num_layers - 1) for kind in ("MHA", "FFN")]


def block_of(name: str) -> tuple[str, int]:
    """Return ``("MHA", 25)`` for ``MHA25``.

    Raises:
        PlanError: if the name is not MHA or FFN followed by a layer number.
    """
    kind, number = (name[:3], name[3:]) if isinstance(name, str) else ("", "")
    if kind not in ("MHA", "FFN") or not number.isdigit():
        raise PlanError(f"{name!r} is not a block; write blocks as MHA0, FFN0, MHA1, ...")
    return kind, int(number)
