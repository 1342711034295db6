"""KV at 8 and 4 bits: how a head of a token is packed, and a paged pool whose KV blocks hold packed tokens.

    kv = QuantizedKV(arena, bits=4)                 # the same KV blocks, in which more tokens fit
    kv.write(slots, keys, values)                   # quantizes
    keys, values = kv.read(blocks)                  # rotated: attention rotates its queries and its result instead

Each head of a token has a scale and a least value in FP16, for its keys and for its values:

    code = round((x - least) / scale), scale = (most - least) / (2^bits - 1)

A few channels of keys are much larger than the others, in all tokens (KIVI, arXiv 2402.02750, section 3), and would
spoil the scale of a token. KIVI quantizes keys by channel, which needs groups of tokens that are complete. Here keys
and values are rotated first by a Hadamard matrix, which spreads a large channel over all (QuaRot, arXiv 2404.00456,
section 4), so every token can be packed when it is computed. ``sim.cost.kv_format`` counts the bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from hw.elastic.paged_kv import KVArena
from sim.cost.model_spec import KV_SCALE_BYTES

# Shapes: n tokens, c KV blocks, p tokens of one, h KV heads, d head_dim, w bytes of a packed head.

UNPACKED_AT_ONCE = 1 << 18
"""Packed bytes that are unpacked in one step: few enough for the caches of a CPU, and for the workspace of a GPU."""
MOST = 60_000.0
"""Largest scale and least value: FP16 ends at 65,504."""


@functools.cache  # on a GPU, every copy of it would stop the host
def hadamard(size: int, device: torch.device) -> Tensor | None:
    """Return Sylvester's Hadamard matrix [size, size] in FP32, over its norm, or None if size is no power of two.

    It is symmetric and its own inverse.
    """
    if size & (size - 1):
        return None
    matrix: Tensor = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix.div(size**0.5)


def rotated(values: Tensor) -> Tensor:
    """Return values [..., d] in FP32, times the Hadamard matrix; twice gives them back."""
    matrix = hadamard(values.shape[-1], values.device)
    wide = values.to(torch.float32)
    return wide if matrix is None else wide @ matrix


def pack(values: Tensor, bits: int) -> Tensor:
    """Return values [..., d] as bytes, uint8 [..., w]: codes of the rotated ones, scale and least value in FP16."""
    wide = rotated(values)
    least, most = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    # Codes are made for the scale and least value as they are stored. A head with a value that is not finite has none.
    least = torch.where((most - least).isfinite(), least.clamp(-MOST, MOST), torch.nan).to(torch.float16)
    scale = ((most - least) / (2**bits - 1)).clamp(max=MOST).to(torch.float16)
    steps = torch.where(scale > 0, (wide - least) / scale, 0.0)
    codes = steps.round().clamp_(0, 2**bits - 1).nan_to_num_(0.0).to(torch.uint8)
    if bits == 4:
        codes = functional.pad(codes, (0, codes.shape[-1] % 2))
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return torch.cat((codes, torch.cat((scale, least), -1).view(torch.uint8)), -1)


def unpack(packed: Tensor, bits: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Return the rotated values [..., d] of bytes [..., w]."""
    codes = packed[..., :-KV_SCALE_BYTES]
    ends = packed[..., -KV_SCALE_BYTES:].clone(memory_format=torch.contiguous_format)  # at an even address
    scale, least = ends.view(torch.float16).to(torch.float32).chunk(2, -1)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., :head_dim]
    values = codes * scale + least
    return (values.clamp(-MOST, MOST) if dtype == torch.float16 else values).to(dtype)


def stored(keys: Tensor, values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return keys and values [..., d] as they come back from KV at these bits."""
    if bits == 16:
        return keys, values
    size, dtype = keys.shape[-1], keys.dtype
    back = (rotated(unpack(pack(each, bits), bits, size, dtype)).to(dtype) for each in (keys, values))
    return next(back), next(back)


class QuantizedKV:
    """The KV blocks of an arena, for tokens at 8 or 4 bits. A slot is block * ``block_tokens`` + place in it."""

    def __init__(self, arena: KVArena, bits: int) -> None:
        """View the memory of ``arena``."""
        self._arena, self._bits, self._dtype = arena, bits, arena.kv.dtype
        self._heads, self._head_dim = arena.kv.shape[3:]
        self._packed_bytes = -(-self._head_dim * bits // 8) + KV_SCALE_BYTES
        self.token_bytes = 2 * self._heads * self._packed_bytes
        self.block_tokens = arena.block_bytes // self.token_bytes
        used = self.block_tokens * self.token_bytes
        shape = (arena.capacity, self.block_tokens, 2, self._heads, self._packed_bytes)
        self._memory: Tensor = arena.memory[:, :used].view(shape)

    def note_written(self, slots: Iterable[int]) -> None:
        """Note that slots are written: the host has to know which blocks hold packed KV."""
        self._arena.packed.update(slot // self.block_tokens for slot in slots)

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Quantize keys and values [n, h, d] and store them in slots [n]; call ``note_written`` before."""
        self.write_bytes(slots, self.packed(keys, values))

    def packed(self, keys: Tensor, values: Tensor) -> Tensor:
        """Return keys and values [n, h, d] as they are stored, uint8 [n, token_bytes]."""
        return torch.stack((pack(keys, self._bits), pack(values, self._bits)), 1).flatten(1)

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotated keys and values [c, p, h, d] of blocks [c]."""
        shape = len(blocks), self.block_tokens, self._heads, self._head_dim
        keys, values = (torch.empty(shape, dtype=self._dtype, device=blocks.device) for _ in range(2))
        step = max(1, UNPACKED_AT_ONCE // self._arena.block_bytes)  # what is unpacked exists in FP32 for a moment
        for start in range(0, len(blocks), step):
            part = slice(start, start + step)
            both = unpack(self._memory.index_select(0, blocks[part]), self._bits, self._head_dim, self._dtype)
            keys[part], values[part] = both[:, :, 0], both[:, :, 1]
        return keys, values

    def read_bytes(self, slots: Tensor) -> Tensor:
        """Return what slots [n] hold, uint8 [n, token_bytes]."""
        held: Tensor = self._memory[slots // self.block_tokens, slots % self.block_tokens].flatten(1)
        return held

    def write_bytes(self, slots: Tensor, content: Tensor) -> None:
        """Store what ``read_bytes`` returned; call ``note_written`` before."""
        at = slots // self.block_tokens, slots % self.block_tokens
        self._memory[at] = content.view(-1, *self._memory.shape[2:])
