"""Losses that were measured one by one and are added to the loss of a plan's blocks and precision.

They are those of KV at fewer bits (``sim.cost.kv_loss``), of layers in which prompts only write KV (``kv_only_loss``),
of compressed KV (``kv_compression_loss``) and of FFN blocks at fewer channels (``ffn_width_loss``). That they add up is
an assumption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.cost.ffn_width_loss import FFNWidthLoss, ffn_width_loss_path, read_ffn_width_loss
from sim.cost.kv_compression_loss import KVCompressionLoss, kv_compression_loss_path, read_kv_compression_loss
from sim.cost.kv_loss import KVLoss, kv_loss_path, quantizes_kv, read_kv_loss
from sim.cost.kv_only_loss import KVOnlyLoss, kv_only_layers, kv_only_loss_path, read_kv_only_loss
from sim.cost.plan import Plan
from sim.errors import CalibrationError

MEASURE = "measure it: python -m hw.score kind={kind} model.path=..."


@dataclass(frozen=True, slots=True)
class Part:
    """One of the losses.

    field: of ``AddedLosses``. what, instead: for messages, what costs, and which plan costs nothing of it. kind: that
    of ``python -m hw.score``, which measures it. changes: whether a plan costs any of it.
    """

    field: str
    what: str
    instead: str
    kind: str
    changes: Callable[[Plan], Any]


PARTS = (
    Part("kv_bits", "what KV at 8 and 4 bits costs", "leave kv_bits at 16", "kv_bits", quantizes_kv),
    Part("kv_only", "what layers cost in which prompts only write KV", "leave kv_only out", "pop", kv_only_layers),
    Part(
        "kv_compression",
        "what compressed KV costs",
        "leave kv_compression out",
        "kv_compression",
        lambda plan: plan.kv_compression is not None,
    ),
    Part(
        "ffn_width",
        "what FFN blocks at fewer channels cost",
        "leave ffn_width at 8",
        "width",
        lambda plan: plan.cuts_ffn,
    ),
)


@dataclass(frozen=True, slots=True)
class AddedLosses:
    """The losses of one model; None for what was not measured."""

    kv_bits: KVLoss | None = None
    kv_only: KVOnlyLoss | None = None
    kv_compression: KVCompressionLoss | None = None
    ffn_width: FFNWidthLoss | None = None

    def of(self, plan: Plan, name: str, otherwise: str = MEASURE) -> float:
        """Return what a plan costs of all of them, in nats per token.

        Args:
            name: of the model. otherwise: what a message offers instead of leaving it out.
        Raises:
            CalibrationError: for what was not measured.
        """
        total = 0.0
        for part in PARTS:
            if not part.changes(plan):
                continue
            measured = getattr(self, part.field)
            if measured is None:
                raise CalibrationError(
                    f"{part.what} is not known of {name}; {part.instead}, or {otherwise.format(kind=part.kind)}"
                )
            total += measured.of(plan)
        return total

    def transferred(self, layers: int) -> AddedLosses:
        """Return the losses of a model with another number of layers, by assumption.

        KV at fewer bits and narrower FFN blocks cost the same at the same depth, and compressed KV the same at the same
        share of its bytes.
        In which layers prompts need least is not taken over.
        """
        bits = None if self.kv_bits is None else self.kv_bits.resampled(layers)
        width = None if self.ffn_width is None else self.ffn_width.resampled(layers)
        return AddedLosses(kv_bits=bits, kv_compression=self.kv_compression, ffn_width=width)

    def said(self) -> str:
        """Return of which model the losses are, for a summary of a model to which they were transferred."""
        return "; ".join(
            f"{part.what} is {'not known' if measured is None else f'assumed to be that of {measured.measured_on}'}"
            for part in PARTS
            for measured in [getattr(self, part.field)]
        )


NOTHING_ADDED = AddedLosses()
"""Of a model of which none of them was measured."""


def read_added_losses(table: Path, text: str, model: str, layers: int) -> AddedLosses:
    """Read the files of losses next to a quality table, as many as there are.

    Args:
        text: ``calibration`` or ``test``.
    Raises:
        CalibrationError: if a file is malformed, or of another model.
    """
    bits, writing, compressed = kv_loss_path(table), kv_only_loss_path(table), kv_compression_loss_path(table)
    width = ffn_width_loss_path(table)
    return AddedLosses(
        kv_bits=read_kv_loss(bits, text, model, layers) if bits.is_file() else None,
        kv_only=read_kv_only_loss(writing, text, model, layers) if writing.is_file() else None,
        kv_compression=read_kv_compression_loss(compressed, text, model) if compressed.is_file() else None,
        ffn_width=read_ffn_width_loss(width, text, model, layers) if width.is_file() else None,
    )
