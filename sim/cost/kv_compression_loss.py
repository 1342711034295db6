"""What compressed KV costs: losses at shares of the bytes, measured by ``python -m hw.score kind=kv_compression``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sim.cost.loss_files import measure_again, read_losses
from sim.cost.plan import KV_METHODS, KVCompression, Plan
from sim.errors import CalibrationError

MOST_LOSS = 100.0
"""Largest loss in a file, in nats; measured values are far below."""
FULL = "full"
"""The method of the file with all KV, from which losses are differences."""
NAMES = dict(zip(KV_METHODS, ("Ada-KV", "ReFreeKV", "ThinK", "LoRC"), strict=True))
"""How the file names each method."""


@dataclass(frozen=True, slots=True)
class KVCompressionLoss:
    """The cost of compressed KV of prompts, in nats per generated token.

    measured_on: the model. prompt_tokens: of the measured prompts. shares: method -> shares of the bytes, descending
    from 1. costs: method -> the cost at each.
    """

    measured_on: str
    prompt_tokens: int
    shares: Mapping[str, tuple[float, ...]]
    costs: Mapping[str, tuple[float, ...]]

    def of(self, plan: Plan) -> float:
        """Return the cost of a plan: on a straight line between the nearest measured shares of its method.

        Prompts of all lengths are charged that of the measured length, by assumption. A smaller share never costs less
        than a larger one: where that was measured, it is noise.

        Raises:
            CalibrationError: for a method that was not measured, or a share below those that were.
        """
        wanted = plan.kv_compression
        if wanted is None:
            return 0.0
        if not self.knows(wanted):
            lowest = f"measured from {self.shares[wanted.method][-1]:.2f} up" if wanted.method in self.shares else "not"
            raise CalibrationError(
                f"what KV compressed by {wanted.method} to {wanted.percent} % of its bytes costs is not known of "
                f"{self.measured_on}: that method was {lowest}; keep more, or measure it: python -m hw.score "
                "kind=kv_compression"
            )
        costs = np.maximum.accumulate(self.costs[wanted.method])
        return float(np.interp(wanted.percent / 100, self.shares[wanted.method][::-1], costs[::-1]))

    def knows(self, wanted: KVCompression) -> bool:
        """Return whether the share of a method was measured; half a percent of it may be missing."""
        return wanted.method in self.shares and wanted.percent / 100 >= self.shares[wanted.method][-1] - 0.005


def kv_compression_loss_path(table: Path) -> Path:
    """Return the file with the costs of compressed KV of the model whose quality table this is."""
    return table.parent / "kv_compression" / table.name


def read_kv_compression_loss(path: Path, text: str, model: str) -> KVCompressionLoss:
    """Read the costs on a text, ``calibration`` or ``test``, of a model.

    Raises:
        CalibrationError: if the file is malformed, or of another model.
    """
    again = measure_again("kv_compression")
    value = read_losses(path, model, costs="costs of compressed KV", kind="kv_compression")
    try:
        rows, prompt_tokens = value["variants"], int(value["prompt_tokens"])
        (base,) = (_mean(row["nll"][text], MOST_LOSS) for row in rows if row["method"] == FULL)
        shares, costs = {}, {}
        for method, name in NAMES.items():
            own = [row for row in rows if row["method"] == name and row["factor"] is not None]
            pairs = [(_mean(row["share"][text], 1.0), _mean(row["nll"][text], MOST_LOSS) - base) for row in own]
            if pairs:
                ordered = sorted([(1.0, 0.0), *pairs], reverse=True)
                shares[method], costs[method] = zip(*ordered, strict=True)
        return KVCompressionLoss(model, prompt_tokens, shares, costs)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CalibrationError(
            f"{path} has no costs of compressed KV on the {text} text ({reason}); {again}"
        ) from error


def _mean(listed: Sequence[Any], most: float) -> float:
    """Return the mean of measured values.

    Raises:
        ValueError: for anything but numbers from 0 to ``most``.
    """
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{listed!r:.80} is no list of numbers")
    for number in listed:
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= most:
            raise ValueError(f"{number!r:.80} is no number from 0 to {most:g}")
    return math.fsum(listed) / len(listed)
