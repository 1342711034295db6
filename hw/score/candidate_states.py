"""Hidden states of a model, and of the same model without one more block, with shared work done once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hw.elastic.model import ElasticModel, Rope

# Shapes: n windows, t tokens of each, e hidden size.

BATCH_TOKENS = 1024
"""How many tokens run a block together; with more, hidden states no longer fit the caches of a CPU core."""


class CandidateStates:
    """Hidden states of the current model and of its candidates (the current model without one more block), by window.

    A state [1, t, e] is stored under the block that receives it; ``end`` is the key of the head's input.

    kept: the blocks of the current model, in order.
    base: window -> key -> state of the current model.
    without: window -> candidate -> key -> state of the current model without the candidate, for keys after it.
    """

    def __init__(self, elastic: ElasticModel, windows: Tensor, removed: Sequence[int], cache_bytes: int) -> None:
        """Start with the embeddings.

        Args:
            elastic: with all blocks at full precision.
            windows: token ids [n, t].
            removed: blocks that the current model does not run.
            cache_bytes: how much memory states may take; if not all fit, every second, third, ... is stored.
        """
        self.elastic = elastic
        self.windows = windows
        self.end = 2 * elastic.spec.num_layers
        self.kept = [block for block in range(self.end) if block not in set(removed)]
        positions = torch.arange(windows.shape[1], device=windows.device)[None]
        embedded = [elastic.embed(window[None], positions) for window in windows]
        self._rope = elastic.rope(embedded[0], positions)
        first = (*self.kept, self.end)[0]
        self.base: list[dict[int, Tensor]] = [{first: state} for state in embedded]
        self.without: list[dict[int, dict[int, Tensor]]] = [{} for _ in windows]
        needed_bytes = len(self.kept) ** 2 // 2 * sum(state.nbytes for state in embedded)
        self._stride = max(1, math.ceil(needed_bytes / max(1, cache_bytes)))

    def _after(self, block: int) -> int:
        """Return the key after a kept block."""
        return next((kept for kept in self.kept if kept > block), self.end)

    def _run(self, block: int, hidden: Tensor) -> Tensor:
        return hidden + block_output(self.elastic, block, hidden, self._rope)

    def fill_base(self) -> None:
        """Compute the missing states of the current model."""
        for base in self.base:
            for block in self.kept:
                key = self._after(block)
                if key not in base:
                    base[key] = self._run(block, base[block])

    def fill(self, window: int, candidates: Sequence[int]) -> None:
        """Compute the last hidden state of some candidates on a window, from the latest stored state of each."""
        begin: dict[int, tuple[int, Tensor]] = {}  # candidate -> where it starts, and the state there
        for block in candidates:
            known = self.without[window].setdefault(block, {})
            if not known:
                known[self._after(block)] = self.base[window][block]
            begin[block] = max(known), known[max(known)]
        queue = sorted((b for b in candidates if begin[b][0] != self.end), key=lambda b: begin[b][0])
        batch = max(1, BATCH_TOKENS // self.windows.shape[1])
        for chunk in (queue[first : first + batch] for first in range(0, len(queue), batch)):
            rows: list[int] = []
            hidden: Tensor | None = None
            for rank, block in enumerate(self.kept):
                # A candidate joins the batch at the first block that it has to run.
                joining = [c for c in chunk if begin[c][0] == block]
                if joining:
                    parts = [begin[c][1] for c in joining]
                    hidden = torch.cat(parts if hidden is None else [hidden, *parts])
                    rows += joining
                if hidden is None:
                    continue
                hidden = self._run(block, hidden)
                key = self._after(block)
                if key == self.end or rank % self._stride == 0:
                    for row, candidate in enumerate(rows):
                        self.without[window][candidate][key] = hidden[row : row + 1]

    def last(self, window: int, candidate: int) -> Tensor:
        """Return the last hidden state [1, t, e] of a candidate."""
        return self.without[window][candidate][self.end]

    def remove(self, block: int) -> None:
        """Remove a block from the current model, and discard the states that depend on it."""
        after = self._after(block)
        self.kept.remove(block)
        for base, without in zip(self.base, self.without, strict=True):
            # The states of the candidate that won become those of the current model.
            own = without.pop(block, {})
            before = base.pop(block)
            for key in [key for key in base if key > block]:
                del base[key]
            base.update(own)
            base[after] = before
            for candidate in list(without):
                if candidate > block:  # all of its states come after the removed block
                    del without[candidate]
                    continue
                states = without[candidate]
                reached = states.get(block)
                for key in [key for key in states if key >= block]:
                    del states[key]
                if reached is not None:
                    states[after] = reached
                if not states:
                    del without[candidate]


def block_output(elastic: ElasticModel, block: int, hidden: Tensor, rope: Rope) -> Tensor:
    """Return what a block adds to hidden states [n, t, e]."""
    layer = block // 2
    return elastic.feed(layer, hidden) if block % 2 else elastic.attend(layer, hidden, rope)
