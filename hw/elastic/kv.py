"""The KV cache of a request, one growing tensor per layer: simple and exact, not fast. The paged pool is ``paged_kv``.

A request that loses an MHA block has no KV of that layer for the tokens in between, so it never runs the block again
(docs/concepts.md, "When a plan changes", rule 4). ``RequestKV.holds`` is the set of MHA blocks that it can still run;
the set only shrinks. ``restore=recompute`` starts a new RequestKV and prefills the prompt and the tokens produced so
far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hw.elastic.quantized_kv import stored
from sim.cost.plan import KV_KEEP_ALL, KVKeep

# Shapes: b rows of a batch, t new tokens, k keys, h KV heads, d head_dim.


@dataclass(slots=True)
class RequestKV:
    """The keys and values of one request, and the MHA blocks that it can run.

    tokens: number of computed tokens, which is also the position of the next one.
    holds: layers whose MHA block this request can run; None before its first token.
    kv_keep, kv_bits: which tokens each layer keeps, and at how many bits; None until prefill has ended.
    """

    tokens: int = 0
    holds: frozenset[int] | None = None
    kv_keep: tuple[KVKeep, ...] | None = None
    kv_bits: tuple[int, ...] | None = None
    _keys: dict[int, Tensor] = field(default_factory=dict)  # layer -> [h, k, d]
    _values: dict[int, Tensor] = field(default_factory=dict)  # layer -> [h, k, d]
    _positions: dict[int, Tensor] = field(default_factory=dict)  # layer -> [k], the position of each key

    def restrict(self, running: frozenset[int]) -> None:
        """Remove the MHA blocks that are not in ``running``, with their keys and values."""
        self.holds = running if self.holds is None else self.holds & running
        for layer in [layer for layer in self._keys if layer not in self.holds]:
            del self._keys[layer], self._values[layer], self._positions[layer]

    def end_prefill(self, kv_keep: tuple[KVKeep, ...], kv_bits: tuple[int, ...]) -> None:
        """From now on keep only the tokens that ``kv_keep`` names, rounded to ``kv_bits`` bits."""
        self.kv_keep, self.kv_bits = kv_keep, kv_bits
        for layer in self._keys:
            self._truncate(layer)
            self._keys[layer], self._values[layer] = stored(self._keys[layer], self._values[layer], kv_bits[layer])

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [h, t, d] of new tokens; return all that the layer keeps, [h, k, d] each."""
        positions = torch.arange(self.tokens, self.tokens + key.shape[1], device=key.device)
        if self.kv_bits is not None:
            key, value = stored(key, value, self.kv_bits[layer])
        if layer in self._keys:
            key = torch.cat((self._keys[layer], key), dim=1)
            value = torch.cat((self._values[layer], value), dim=1)
            positions = torch.cat((self._positions[layer], positions))
        self._keys[layer], self._values[layer], self._positions[layer] = key, value, positions
        if self.kv_keep is not None:
            self._truncate(layer)
        return self._keys[layer], self._values[layer]

    def positions_with(self, layer: int, new_tokens: int, device: torch.device) -> Tensor:
        """Return the positions [k] that the layer keeps once ``new_tokens`` more are appended."""
        new = torch.arange(self.tokens, self.tokens + new_tokens, device=device)
        positions = torch.cat((self._positions[layer], new)) if layer in self._positions else new
        kept = self._kept(layer, positions.numel())
        return positions if kept is None else positions[kept]

    def kv_tokens(self, layer: int) -> int:
        """Return how many tokens the layer keeps."""
        return self._keys[layer].shape[1] if layer in self._keys else 0

    def nbytes(self) -> int:
        """Return the bytes of all keys and values."""
        return sum(t.nbytes for tensors in (self._keys, self._values) for t in tensors.values())

    def _kept(self, layer: int, count: int) -> Tensor | None:
        """Return the indices to keep of ``count`` tokens; None if all stay."""
        keep = self.kv_keep[layer] if self.kv_keep is not None else KV_KEEP_ALL
        if keep.first_tokens is None or keep.last_tokens is None or keep.tokens(count) == count:
            return None
        first = torch.arange(keep.first_tokens)
        return torch.cat((first, torch.arange(count - keep.last_tokens, count)))

    def _truncate(self, layer: int) -> None:
        kept = self._kept(layer, self._keys[layer].shape[1])
        if kept is None:
            return
        kept = kept.to(self._keys[layer].device)
        self._keys[layer] = self._keys[layer][:, kept]
        self._values[layer] = self._values[layer][:, kept]
        self._positions[layer] = self._positions[layer][kept]


class KVView(Protocol):
    """The KV cache of one batch as a layer's attention uses it; ``BatchKV`` and the paged pool both fit it."""

    def rows(self, layer: int) -> Tensor | None:
        """Return the rows of the batch that run this layer's MHA block; None means all of them."""
        ...

    def mask(self, layer: int, window: int | None) -> Tensor:
        """Return which keys each new token sees, bool [b, 1, t, k], for these rows.

        ``window`` is the number of tokens that sliding-window attention looks back; None means no limit.
        """
        ...

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store the keys and values [b, h, t, d] of the new tokens; return all, [b, h, k, d] each."""
        ...


class BatchKV:
    """The KVView of a batch of RequestKVs. It copies all keys at every step."""

    def __init__(self, requests: Sequence[RequestKV], lengths: Sequence[int], device: torch.device) -> None:
        """View ``requests``, one per row; ``lengths`` holds the number of new tokens of each row."""
        self._requests = requests
        self._lengths = lengths
        self._device = device

    def _row_list(self, layer: int) -> list[int]:
        return [row for row, request in enumerate(self._requests) if request.holds and layer in request.holds]

    def rows(self, layer: int) -> Tensor | None:
        """Return the rows whose request holds the KV of this layer."""
        rows = self._row_list(layer)
        return None if len(rows) == len(self._requests) else torch.tensor(rows, device=self._device, dtype=torch.long)

    def mask(self, layer: int, window: int | None) -> Tensor:
        """Return which keys each new token sees, bool [b, 1, t, k]."""
        rows = self._row_list(layer)
        longest = max(self._lengths)
        keys = pad_sequence(
            [self._requests[row].positions_with(layer, self._lengths[row], self._device) for row in rows],
            batch_first=True,
            padding_value=-1,
        )[:, None, :]
        start = torch.tensor([self._requests[row].tokens for row in rows], device=self._device)
        queries = (start[:, None] + torch.arange(longest, device=self._device))[:, :, None]
        seen = (keys <= queries) & (keys >= 0)
        if window is not None:
            seen &= keys > queries - window
        # A query that sees no key gives NaN. Padding queries may see none, so they see the first key.
        padding = ~seen.any(-1, keepdim=True)
        seen[..., :1] |= padding
        return seen[:, None]

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append to each request; return the keys and values padded to the longest."""
        keys, values = [], []
        for index, row in enumerate(self._row_list(layer)):
            new = self._lengths[row]
            all_keys, all_values = self._requests[row].append(layer, key[index, :, :new], value[index, :, :new])
            keys.append(all_keys.transpose(0, 1))
            values.append(all_values.transpose(0, 1))
        padded = [pad_sequence(tensors, batch_first=True).transpose(1, 2) for tensors in (keys, values)]
        return padded[0], padded[1]
