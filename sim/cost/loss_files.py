"""What the files of losses next to a quality table have in common: of kv_bits, kv_only and kv_compression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sim.errors import CalibrationError
from sim.json_file import read_json_object


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
