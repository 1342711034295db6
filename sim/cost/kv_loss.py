"""What KV at 8 and 4 bits costs: a sum over layers, as measured by ``python -m hw.score kind=kv_bits``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sim.cost.loss_files import measure_again, read_losses
from sim.cost.plan import Plan
from sim.errors import CalibrationError

MOST_LOSS = 100.0
"""Largest cost of a layer in a file, in nats; measured values are far below."""


@dataclass(frozen=True, slots=True)
class KVLoss:
    """The cost of quantized KV, layer by layer, in nats per generated token.

    measured_on: the model. at_8, at_4: [l], one entry per layer.
    """

    measured_on: str
    at_8: tuple[float, ...]
    at_4: tuple[float, ...]

    def of(self, plan: Plan) -> float:
        """Return the cost of a plan: of the layers whose KV decode reads."""
        costs = {16: (0.0,) * len(self.at_8), 8: self.at_8, 4: self.at_4}
        return sum(
            costs[bits][layer]
            for layer, (bits, runs) in enumerate(zip(plan.kv_bits, plan.decode.mha, strict=True))
            if runs
        )

    def resampled(self, layers: int) -> KVLoss:
        """Return the costs of a model with another number of layers, by assumption: the same at the same depth.

        A layer's cost is spread evenly over its share of the depth, and a new layer takes what lies in its own share.
        So the layers up to any depth cost together what they did, and so do all layers.
        """
        ends, own_ends = (np.linspace(0.0, 1.0, count + 1) for count in (layers, len(self.at_8)))
        totals = (np.concatenate(([0.0], np.cumsum(costs))) for costs in (self.at_8, self.at_4))
        at_8, at_4 = (np.diff(np.interp(ends, own_ends, total)).clip(min=0.0) for total in totals)
        return KVLoss(self.measured_on, tuple(at_8.tolist()), tuple(at_4.tolist()))


def quantizes_kv(plan: Plan) -> bool:
    """Return whether decode reads KV at fewer than 16 bits in some layer."""
    return any(bits < 16 and runs for bits, runs in zip(plan.kv_bits, plan.decode.mha, strict=True))


def kv_loss_path(table: Path) -> Path:
    """Return the file with the costs of quantized KV of the model whose quality table this is."""
    return table.parent / "kv_bits" / table.name


def read_kv_loss(path: Path, text: str, model: str, layers: int) -> KVLoss:
    """Read the costs that were fitted to the losses on a text, ``calibration`` or ``test``, of a model's layers.

    Raises:
        CalibrationError: if the file is malformed, or of another model.
    """
    again = measure_again("kv_bits")
    value = read_losses(path, model, costs="costs of KV", kind="kv_bits")
    fits = value.get("fits")
    fit = fits.get(text) if isinstance(fits, dict) else None
    try:
        if not isinstance(fit, dict):
            raise ValueError(f"fits.{text} is {fit!r:.80}; it must be an object with the lists '8' and '4'")
        return KVLoss(model, *(_costs(fit.get(bits), bits, layers) for bits in ("8", "4")))
    except ValueError as error:
        raise CalibrationError(
            f"{path} has no costs of KV at 8 and 4 bits on the {text} text ({error}); {again}"
        ) from error


def _costs(listed: Any, bits: str, layers: int) -> tuple[float, ...]:
    """Return the costs of a file at 8 or 4 bits.

    Raises:
        ValueError: if they are no list of one number per layer.
    """
    allowed = f"{bits!r} must be a list of {layers} numbers from 0 to {MOST_LOSS:g}, one per layer"
    if not isinstance(listed, list) or len(listed) != layers:
        found = f"a list of {len(listed)}" if isinstance(listed, list) else f"{listed!r:.80}"
        raise ValueError(f"{bits!r} is {found}; {allowed}")
    for layer, cost in enumerate(listed):
        # A bool is an int in Python, but no cost.
        if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 <= cost <= MOST_LOSS:
            raise ValueError(f"layer {layer} of {bits!r} is {cost!r:.80}; {allowed}")
    return tuple(map(float, listed))
