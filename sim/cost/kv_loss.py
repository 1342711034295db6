"""What KV at 8 and 4 bits costs: a sum over layers, as measured by ``python -m hw.score kind=kv_bits``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sim.cost.loss_files import read_layer_fits, resampled
from sim.cost.plan import Plan


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

        See ``sim.cost.loss_files.resampled``.
        """
        return KVLoss(self.measured_on, resampled(self.at_8, layers), resampled(self.at_4, layers))


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
    fits = read_layer_fits(
        path, text, model, layers, costs="costs of KV at 8 and 4 bits", kind="kv_bits", keys=("8", "4")
    )
    return KVLoss(model, *fits.values())
