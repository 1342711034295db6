"""What the files of losses next to a quality table have in common: of kv_bits, kv_only, ffn_width, kv_compression."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sim.errors import CalibrationError
from sim.json_file import read_json_object

MOST_LOSS = 100.0
"""Largest cost of a layer in a file, in nats; measured values are far below."""


def measure_again(kind: str) -> str:
    """Return how such a file is made: ``kind`` is that of ``python -m hw.score``."""
    return f"measure it again: python -m hw.score kind={kind}"


def read_losses(path: Path, model: str, *, costs: str, kind: str) -> dict[str, Any]:
    """Read a file of losses of a model.

    Args:
        costs: what it holds, for messages. kind: that of ``python -m hw.score``, which writes it.

    Raises:
        CalibrationError: if it is no JSON object, or of another model.
    """
    value = read_json_object(path, CalibrationError, measure_again(kind))
    if value.get("model") != model:
        raise CalibrationError(
            f"{path} has {costs} of the model {value.get('model')!r:.80}, but it must be {model!r}, that of the "
            f"quality table; put the file of {model} there, or remove it and measure: python -m hw.score kind={kind}"
        )
    return value


def read_layer_fits(
    path: Path, text: str, model: str, layers: int, *, costs: str, kind: str, keys: Sequence[str]
) -> dict[str, tuple[float, ...]]:
    """Read the costs of every layer that were fitted to the losses on a text, ``calibration`` or ``test``.

    Args:
        costs, kind: as in ``read_losses``. keys: under which the file has them, which are those of the result.

    Raises:
        CalibrationError: if the file is malformed, or of another model.
    """
    value = read_losses(path, model, costs=costs, kind=kind)
    fits = value.get("fits")
    fit = fits.get(text) if isinstance(fits, dict) else None
    try:
        if not isinstance(fit, dict):
            listed = ", ".join(map(repr, keys[:-1])) + f" and {keys[-1]!r}"
            raise ValueError(f"fits.{text} is {fit!r:.80}; it must be an object with the lists {listed}")
        return {key: layer_costs(fit.get(key), key, layers) for key in keys}
    except ValueError as error:
        raise CalibrationError(f"{path} has no {costs} on the {text} text ({error}); {measure_again(kind)}") from error


def layer_costs(listed: Any, key: str, layers: int) -> tuple[float, ...]:
    """Return the costs of every layer, in nats, which a file has under a key.

    Raises:
        ValueError: if they are no list of one number per layer.
    """
    allowed = f"{key!r} must be a list of {layers} numbers from 0 to {MOST_LOSS:g}, one per layer"
    if not isinstance(listed, list) or len(listed) != layers:
        found = f"a list of {len(listed)}" if isinstance(listed, list) else f"{listed!r:.80}"
        raise ValueError(f"{key!r} is {found}; {allowed}")
    for layer, cost in enumerate(listed):
        # A bool is an int in Python, but no cost.
        if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 <= cost <= MOST_LOSS:
            raise ValueError(f"layer {layer} of {key!r} is {cost!r:.80}; {allowed}")
    return tuple(map(float, listed))


def resampled(costs: Sequence[float], layers: int) -> tuple[float, ...]:
    """Return the costs of layers of a model with another number of them.

    A layer's cost is spread evenly over its share of the depth, and a new layer takes what lies in its own share. So
    the layers up to any depth cost together what they did, and so do all layers.
    """
    ends, own_ends = (np.linspace(0.0, 1.0, count + 1) for count in (layers, len(costs)))
    total = np.concatenate(([0.0], np.cumsum(costs)))
    found: list[float] = np.diff(np.interp(ends, own_ends, total)).clip(min=0.0).tolist()
    return tuple(found)
