"""What layers of ``kv_only`` cost (POP): losses of nested sets of them, measured by ``python -m hw.score kind=pop``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.cost.loss_files import measure_again, read_losses
from sim.cost.plan import Plan
from sim.errors import CalibrationError
from sim.limits import is_whole

MOST_LOSS = 100.0
"""Largest loss in a file, in nats; measured values are far below."""


@dataclass(frozen=True, slots=True)
class KVOnlyLoss:
    """The cost of nested sets of layers in which prompts only write KV, in nats per generated token.

    measured_on: the model. order: its layers, the first one that is chosen first. costs: of the first one, of the first
    two and so on, as many as were measured.
    """

    measured_on: str
    order: tuple[int, ...]
    costs: tuple[float, ...]

    def of(self, plan: Plan) -> float:
        """Return the cost of a plan: that of the smallest measured set that contains its layers.

        So a set that was not measured is charged for layers that it runs. A larger set never costs less than one that
        it contains: where that was measured, it is noise.

        Raises:
            CalibrationError: if no measured set contains the layers.
        """
        layers = kv_only_layers(plan)
        if not layers:
            return 0.0
        if not self.knows(layers):
            raise CalibrationError(
                f"layers {sorted(layers)} that only write KV are in no set that was measured on {self.measured_on}; "
                f"those are the first {len(self.costs)} of {list(self.order)}: python -m hw.score kind=pop"
            )
        return max(0.0, *self.costs[: self._place(layers) + 1])

    def knows(self, layers: Collection[int]) -> bool:
        """Return whether some measured set contains these layers."""
        return self._place(layers) < len(self.costs)

    def _place(self, layers: Collection[int]) -> int:
        return max(self.order.index(layer) for layer in layers)


def kv_only_layers(plan: Plan) -> set[int]:
    """Return the layers in which prompts only write KV, without those in which prefill runs nothing anyway."""
    prefill = zip(plan.kv_only, plan.prefill.mha, plan.prefill.ffn, strict=True)
    return {layer for layer, (flag, mha, ffn) in enumerate(prefill) if flag and (mha or ffn)}


def kv_only_loss_path(table: Path) -> Path:
    """Return the file with the costs of ``kv_only`` of the model whose quality table this is."""
    return table.parent / "kv_only" / table.name


def read_kv_only_loss(path: Path, text: str, model: str, layers: int) -> KVOnlyLoss:
    """Read the costs on a text, ``calibration`` or ``test``, of a model's layers.

    Raises:
        CalibrationError: if the file is malformed, or of another model.
    """
    again = measure_again("pop")
    value = read_losses(path, model, costs="costs of kv_only", kind="pop")
    try:
        order, costs = value["order"], value["losses"][text]
        if not isinstance(order, list) or not all(map(is_whole, order)) or sorted(order) != list(range(layers)):
            raise ValueError(f"order is {order!r:.80}; it must name each of {layers} layers once")
        if not isinstance(costs, list) or not 1 <= len(costs) <= layers:
            raise ValueError(f"losses are {costs!r:.80}; they must be a list of 1 to {layers} numbers")
        return KVOnlyLoss(model, tuple(order), tuple(_cost(cost) for cost in costs))
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CalibrationError(f"{path} has no costs of kv_only on the {text} text ({reason}); {again}") from error


def _cost(value: Any) -> float:
    """Return the cost of a file.

    Raises:
        ValueError: for anything but a number of nats; one slightly below 0 is noise.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1.0 <= value <= MOST_LOSS:
        raise ValueError(f"a loss is {value!r:.80}; it must be a number from -1 to {MOST_LOSS:g}")
    return float(value)
