"""What FFN blocks at fewer channels cost: a sum over layers, as measured by ``python -m hw.score kind=width``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sim.cost.ffn_width import FULL_WIDTH
from sim.cost.loss_files import read_layer_fits, resampled
from sim.cost.plan import Plan


@dataclass(frozen=True, slots=True)
class FFNWidthLoss:
    """The cost of FFN blocks at fewer channels, in nats per generated token.

    measured_on: the model. costs: width in eighths, below 8 -> [l], one entry per layer.
    """

    measured_on: str
    costs: Mapping[int, tuple[float, ...]]

    def of(self, plan: Plan) -> float:
        """Return the cost of a plan: of the layers whose FFN block prefill runs, whether or not decode does."""
        return sum(
            self.costs[width][layer]
            for layer, (width, runs) in enumerate(zip(plan.ffn_width, plan.prefill.ffn, strict=True))
            if runs and width < FULL_WIDTH
        )

    def resampled(self, layers: int) -> FFNWidthLoss:
        """Return the costs of a model with another number of layers, by assumption: the same at the same depth."""
        return FFNWidthLoss(
            self.measured_on, {width: resampled(listed, layers) for width, listed in self.costs.items()}
        )


def ffn_width_loss_path(table: Path) -> Path:
    """Return the file with the costs of narrower FFN blocks of the model whose quality table this is."""
    return table.parent / "ffn_width" / table.name


def read_ffn_width_loss(path: Path, text: str, model: str, layers: int) -> FFNWidthLoss:
    """Read the costs that were fitted to the losses on a text, ``calibration`` or ``test``, of a model's layers.

    Raises:
        CalibrationError: if the file is malformed, or of another model.
    """
    fits = read_layer_fits(
        path, text, model, layers, costs="costs of FFN blocks at fewer channels", kind="width", keys=("7", "6", "5")
    )
    return FFNWidthLoss(model, {int(width): costs for width, costs in fits.items()})
