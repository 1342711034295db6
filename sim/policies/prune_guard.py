"""The guard of a pruning policy: greedy_stop's plan runs unless the network's plan is clearly better.

A network may drop a set of blocks that loses more than greedy_stop would. The guard predicts the loss of both plans by
the fit to the calibration text, on which the network was trained too. It keeps the network's plan only if it loses less
by more than ``margin_nats``, the median error of this fit on plans that were held out: a smaller difference says
nothing about the true losses, while greedy_stop's order was measured on the model step by step.

The guard is part of the policy: NAME.json states it under ``guard``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sim.cost.model_spec import ModelSpec
from sim.cost.plan import dense_plan, with_mask
from sim.cost.quality import FittedQuality, load_quality
from sim.errors import ConfigError
from sim.policies.observation.prune import block_names, mask_of
from sim.policies.orders import own_order
from sim.types import Bools

TEXT: Literal["calibration"] = "calibration"


@dataclass(frozen=True, slots=True)
class PruneGuard:
    """Chooses between the plan of a network and that of greedy_stop.

    order: numbers of the blocks in the order of dropping. quality: predicts losses. margin_nats: see the module.
    """

    model: ModelSpec
    order: tuple[int, ...]
    quality: FittedQuality
    margin_nats: float

    def __call__(self, chosen: Bools, peak: int, budget_bytes: int, freed: tuple[int, int]) -> Bools:
        """Return which blocks to drop, bool[b].

        Args:
            chosen: bool[b], by the network. peak: of the dense model. freed: by dropping one MHA and one FFN block.
        """
        greedy = first_that_fit(self.order, peak, budget_bytes, freed, chosen.size)
        better = self.loss(chosen) < self.loss(greedy) - self.margin_nats
        return chosen if better else greedy

    def loss(self, removed: Bools) -> float:
        """Return the predicted loss without these blocks, in nats per token."""
        return self.quality.loss(with_mask(dense_plan(self.model), mask_of(removed)))


def first_that_fit(order: Sequence[int], peak: int, budget_bytes: int, freed: tuple[int, int], blocks: int) -> Bools:
    """Return the blocks to drop, bool[blocks], if they are dropped in this order until the load fits.

    Args:
        order: numbers of blocks. peak: bytes of the dense model. freed: bytes by one MHA and by one FFN block.
    """
    removed = np.zeros(blocks, dtype=np.bool_)
    for block in order:
        if peak <= budget_bytes:
            break
        removed[block] = True
        peak -= freed[block % 2]
    return removed


def about_guard(model: ModelSpec, form: str) -> dict[str, Any]:
    """Return what NAME.json states of the guard: greedy_stop's order for the model, the fit and the margin.

    Raises:
        ConfigError: for a model without an order of all its blocks, or a fit without a measured error.
    """
    order = own_order(model)
    quality = load_quality(model.name, form, TEXT)
    if sorted(order) != sorted(block_names(model.num_layers)):
        raise ConfigError(
            f"the order of {model.name} has {len(order)} of {2 * model.num_layers} blocks; a guard needs all"
        )
    if not isinstance(quality, FittedQuality) or quality.range is None:
        raise ConfigError(f"the quality of {model.name} has no measured error; a guard needs a fitted table")
    margin = math.log1p(quality.range.median_inside)
    return {"rule": "greedy_stop", "order": list(order), "form": form, "margin_nats": round(margin, 6)}


def read_guard(model: ModelSpec, about: Mapping[str, Any]) -> PruneGuard:
    """Return the guard that NAME.json states.

    Raises:
        ConfigError: for an order that does not name each block of the model once, or a model without a fitted table.
        CalibrationError: for an unknown form.
    """
    numbers = {name: at for at, name in enumerate(block_names(model.num_layers))}
    order = [str(name) for name in about["order"]]
    if sorted(order) != sorted(numbers):
        raise ConfigError(f"guard.order must name each of the {len(numbers)} blocks of {model.name} once")
    quality = load_quality(model.name, str(about["form"]), TEXT)
    if not isinstance(quality, FittedQuality):
        raise ConfigError(f"a guard needs a fitted quality table of {model.name}")
    return PruneGuard(model, tuple(numbers[name] for name in order), quality, float(about["margin_nats"]))
