"""The loss of many masks at once, by the same forward passes that GSI runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hw.elastic.model import ElasticModel
from hw.score.candidate_states import BATCH_TOKENS, block_output
from hw.score.mask_search import Mask
from hw.score.nll import token_nll

# Shapes: r hidden states that differ, n windows, t tokens of each, e hidden size.


class MaskNll:
    """Returns the NLL per token of masks on windows [n, t], in nats.

    Masks that agree on the first blocks share their hidden states up to there, as candidates of GSI do. Masks that run
    the same block form one batch.
    """

    def __init__(self, elastic: ElasticModel, windows: Tensor) -> None:
        """Take a model with all blocks at full precision, and token ids."""
        self._elastic = elastic
        self._windows = windows.to(elastic.device)
        self._positions = torch.arange(windows.shape[1], device=elastic.device)[None]

    @torch.inference_mode()
    def __call__(self, masks: Sequence[Mask]) -> list[float]:
        """Return the loss of each mask; more masks than fit a batch run one batch after another."""
        # Sorted by their removed blocks, masks with a common beginning meet in a batch.
        order = sorted(range(len(masks)), key=lambda index: sorted(masks[index]))
        size = max(1, BATCH_TOKENS // self._windows.numel())
        losses = [0.0] * len(masks)
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            for index, nll in zip(batch, self._batch([masks[index] for index in batch]), strict=True):
                losses[index] = nll
        return losses

    def _batch(self, masks: Sequence[Mask]) -> list[float]:
        embedded = self._elastic.embed(self._windows, self._positions)
        rope = self._elastic.rope(embedded, self._positions)
        hidden = embedded[None]  # [r, n, t, e]
        row = [0] * len(masks)  # of each mask's state
        for block in range(2 * self._elastic.spec.num_layers):
            kept = sorted({at for at, mask in zip(row, masks, strict=True) if block not in mask})
            removed = sorted({at for at, mask in zip(row, masks, strict=True) if block in mask})
            parts = []
            if kept:
                states = hidden[kept].flatten(0, 1)
                states = states + block_output(self._elastic, block, states, rope)
                parts.append(states.view(len(kept), *hidden.shape[1:]))
            if removed:
                parts.append(hidden[removed])
            row = [
                len(kept) + removed.index(at) if block in mask else kept.index(at)
                for at, mask in zip(row, masks, strict=True)
            ]
            hidden = torch.cat(parts)
        losses = [float(token_nll(self._elastic, state, self._windows).double().mean()) for state in hidden]
        return [losses[at] for at in row]
