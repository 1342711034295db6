"""What FFN blocks at fewer channels cost: a sum over layers, as measured by ``python -m hw.score kind=width``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sim.cost.ffn_width import FFN_WIDTHS, FULL_WIDTH
from sim.cost.loss_files import layer_costs, measure_again, read_losses, resampled
from sim.cost.plan import Plan
from sim.errors import CalibrationError


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
    again = measure_again("width")
    value = read_losses(path, model, costs="costs of FFN blocks at fewer channels", kind="width")
    fits = value.get("fits")
    fit = fits.get(text) if isinstance(fits, dict) else None
    try:
        if not isinstance(fit, dict):
            raise ValueError(f"fits.{text} is {fit!r:.80}; it must be an object with the lists '7', '6' and '5'")
        costs = {width: layer_costs(fit.get(str(width)), str(width), layers) for width in FFN_WIDTHS[1:]}
        return FFNWidthLoss(model, costs)
    except ValueError as error:
        raise CalibrationError(
            f"{path} has no costs of FFN blocks at fewer channels on the {text} text ({error}); {again}"
        ) from error
