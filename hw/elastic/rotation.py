"""Rotary positions: the angles by which a model rotates queries and keys.

rotations = find_rotations(rotary, config)          # one for all layers, or one for each type of layer (Gemma 3)
cos, sin = rotations[0](positions, torch.bfloat16)  # [n, d_rot] each; nothing looks at the host
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Shapes: n positions, d_rot the dimensions of a head that rotate.


@dataclass(frozen=True, slots=True)
class Rotation:
    """Frequencies [d_rot / 2] in FP32, and the factor of their cosine and sine.

    long: the frequencies of contexts of more than ``short_tokens`` tokens (longrope); None if there are no others.
    """

    frequencies: Tensor
    factor: float
    long: Tensor | None = None
    short_tokens: int = 0

    def __call__(self, positions: Tensor, dtype: torch.dtype, context: int) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines [..., d_rot] of positions [...], for contexts of up to this many tokens."""
        frequencies = self.frequencies
        if self.long is not None and context > self.short_tokens:
            frequencies = self.long
        angles = positions[..., None].to(torch.float32) * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        if self.factor != 1.0:
            cos, sin = cos * self.factor, sin * self.factor
        return cos.to(dtype), sin.to(dtype)


def find_rotations(rotary: Any, config: Any) -> list[Rotation]:
    """Return the rotations of a model: one, or one for each type of layer in the order of their names.

    A dynamic scaling is that of contexts up to ``max_position_embeddings``; the engine serves no others.
    """
    if hasattr(rotary, "inv_freq"):
        return [_rotation(rotary.inv_freq, rotary.attention_scaling, config.rope_parameters, config)]
    return [
        _rotation(
            getattr(rotary, f"{kind}_inv_freq"),
            getattr(rotary, f"{kind}_attention_scaling"),
            config.rope_parameters[kind],
            config,
        )
        for kind in sorted(set(config.layer_types))
    ]


def _rotation(frequencies: Tensor, factor: float, stated: Any, config: Any) -> Rotation:
    # A copy in FP32: transformers may change the buffer, and a cast of the model would round it.
    own = frequencies.detach().to(torch.float32).clone()
    if stated.get("rope_type") != "longrope":
        return Rotation(own, float(factor))
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    short_tokens = int(stated["original_max_position_embeddings"])
    of_length = ROPE_INIT_FUNCTIONS["longrope"]
    short, _ = of_length(config, own.device, seq_len=short_tokens)
    long, _ = of_length(config, own.device, seq_len=short_tokens + 1)
    return Rotation(short, float(factor), long, short_tokens)
