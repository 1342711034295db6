"""Knapsack: of all sets of blocks that free enough bytes, drop the set with the smallest summed loss.

All blocks of one kind free the same bytes, and there are two kinds. So the knapsack is solved exactly by trying every
number n of MHA blocks: drop the n cheapest, and the fewest cheapest FFN blocks that free the rest. The result is
optimal under an additive surrogate of the loss, and under any surrogate that increases with such a sum (the
``additive`` and ``warped`` forms of ``sim.cost.quality``), but not if the loss depends on neighboring blocks. It
answers the question of RAP's reviewers how a solver compares with an agent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sim.cost.memory import ffn_weight_bytes, mha_weight_bytes, weight_bytes
from sim.cost.plan import KeepMask, Plan, dense_plan, with_mask
from sim.cost.quality import FittedQuality, load_quality
from sim.engine.protocol import EngineState
from sim.errors import ConfigError, PlanError
from sim.policies.base import PolicyContext
from sim.policies.observation.prune import mask_of
from sim.types import Floats


@dataclass(frozen=True, slots=True)
class Costs:
    """The loss of each block in the surrogate's sum, sorted once for many solutions.

    mha_order, ffn_order: layers, cheapest first. mha_sums, ffn_sums: float64[layers + 1], the cost of the first n.
    """

    mha_order: tuple[int, ...]
    ffn_order: tuple[int, ...]
    mha_sums: Floats
    ffn_sums: Floats


def sorted_costs(costs: Floats) -> Costs:
    """Sort costs, float64[b] in the order MHA0, FFN0, MHA1, ...; of equal costs, the last layer comes first."""
    orders, sums = [], []
    for kind in (costs[0::2], costs[1::2]):
        order = sorted(range(len(kind)), key=lambda layer: (kind[layer], -layer))
        orders.append(tuple(order))
        sums.append(np.concatenate(([0.0], np.cumsum(kind[list(order)]))))
    return Costs(orders[0], orders[1], sums[0], sums[1])


def cheapest_drop(costs: Costs, needed_bytes: int, mha_bytes: int, ffn_bytes: int) -> tuple[int, int]:
    """Return how many of the cheapest MHA and FFN blocks to drop to free ``needed_bytes`` at the least cost.

    All blocks if even that does not suffice. Of equally cheap answers, the one that drops fewer MHA blocks.
    """
    layers = len(costs.mha_order)
    mha = np.arange(layers + 1)
    # -(-x // y) rounds up: the fewest FFN blocks that free what n MHA blocks leave, for every n at once.
    ffn = np.maximum(0, -((mha * mha_bytes - needed_bytes) // ffn_bytes))
    possible = ffn <= layers
    if not possible.any():
        return layers, layers
    total = np.where(possible, costs.mha_sums + costs.ffn_sums[np.minimum(ffn, layers)], np.inf)
    best = int(total.argmin())
    return best, int(ffn[best])


def cheapest_mask(costs: Costs, needed_bytes: int, mha_bytes: int, ffn_bytes: int) -> KeepMask:
    """Return the mask that frees ``needed_bytes`` at the least summed cost."""
    mha, ffn = cheapest_drop(costs, needed_bytes, mha_bytes, ffn_bytes)
    removed = np.zeros(2 * len(costs.mha_order), dtype=np.bool_)
    removed[[2 * layer for layer in costs.mha_order[:mha]]] = True
    removed[[2 * layer + 1 for layer in costs.ffn_order[:ffn]]] = True
    return mask_of(removed)


@dataclass(slots=True)
class Knapsack:
    """Runs the cheapest mask for the KV that the engine holds; restores blocks after ``patience`` decisions that agree.

    headroom: factor on the KV demand. waiting_share: share of the queue's tokens that counts as demand.
    """

    dense: Plan
    costs: Costs
    dense_bytes: int
    block_bytes: tuple[int, int]
    kv_bytes_per_token_layer: int
    workspace_bytes: int
    headroom: float
    waiting_share: float
    patience: int
    running: Plan | None = None
    calm: int = field(default=0)

    @property
    def first_plan(self) -> Plan:
        """Dense."""
        return self.dense

    def __call__(self, state: EngineState) -> Plan:
        """Solve for the current demand; change at once if memory is short, otherwise after ``patience`` decisions."""
        present = self.running or self.dense
        tokens = self.headroom * (state.running_tokens + self.waiting_share * state.waiting_tokens)
        budget_bytes = min(state.budget_bytes, state.next_budget_bytes) - self.workspace_bytes
        kv_layer = round(tokens * self.kv_bytes_per_token_layer)
        dense_peak = self.dense_bytes + kv_layer * len(present.decode.mha)
        mha_bytes, ffn_bytes = self.block_bytes[0] + kv_layer, self.block_bytes[1]
        mask = present.decode
        held = dense_peak - mask.mha.count(False) * mha_bytes - mask.ffn.count(False) * ffn_bytes
        solved = cheapest_mask(self.costs, max(0, dense_peak - budget_bytes), mha_bytes, ffn_bytes)
        if held > budget_bytes:
            self.running, self.calm = with_mask(self.dense, solved), 0
            return self.running
        self.calm = self.calm + 1 if solved != mask else 0
        if self.calm >= self.patience:
            self.running, self.calm = with_mask(self.dense, solved), 0
        return self.running or self.dense


def knapsack(
    served: PolicyContext,
    *,
    quality: str | None = None,
    costs: Sequence[float] | None = None,
    headroom: float = 1.1,
    waiting_share: float = 0.0,
    patience: int = 5,
) -> Knapsack:
    """Build the policy.

    Args:
        served: what the policy knows of the server.
        quality: a measured table of conf/quality; None takes the one named like the model.
        costs: the loss of every block in the order MHA0, FFN0, MHA1, ..., instead of a table.
        headroom, waiting_share, patience: as in ``Knapsack``.
    Raises:
        ConfigError: for a headroom or patience below 1, or a quality table without a loss for each block.
        PlanError: if the number of costs is not that of the model's blocks.
    """
    model = served.model
    if not headroom >= 1.0 or patience < 1 or not waiting_share >= 0.0:
        raise ConfigError(
            f"policy.headroom is {headroom}, patience {patience}, waiting_share {waiting_share}; they must "
            "be at least 1, 1 and 0"
        )
    if costs is None:
        fitted = load_quality(quality or model.name)
        if not isinstance(fitted, FittedQuality):
            raise ConfigError(
                f"policy.quality: {fitted.summary()}, so it has no loss for each block; "
                "set policy.costs, or measure a table: python -m hw.score kind=table"
            )
        costs = fitted.blocks.tolist()
    if len(costs) != 2 * model.num_layers:
        raise PlanError(
            f"policy.costs has {len(costs)} entries; {model.name} has {2 * model.num_layers} blocks; give one each"
        )
    dense = dense_plan(model)
    return Knapsack(
        dense=dense,
        costs=sorted_costs(np.asarray(costs, dtype=np.float64)),
        dense_bytes=weight_bytes(model, dense),
        block_bytes=(mha_weight_bytes(model), ffn_weight_bytes(model)),
        kv_bytes_per_token_layer=model.kv_bytes_per_token_layer,
        workspace_bytes=served.workspace_bytes,
        headroom=headroom,
        waiting_share=waiting_share,
        patience=patience,
    )
