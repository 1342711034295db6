"""RAP's Greedy Sequential Importance: an order of blocks in which each step removes the one that costs least."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hw.elastic.model import ElasticModel
from hw.score.block_numbers import block_name, block_number, check_removals
from hw.score.candidate_states import BATCH_TOKENS, CandidateStates, block_output
from hw.score.loss_bound import LossBound
from hw.score.nll import token_nll

# Shapes: n windows, t tokens of each.

HEADS_PER_ROUND = 3
"""Once a round computed the head for more candidates than this, the bounds are renewed, which costs about two heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round of GSI.

    removed: the block that was removed. nll: NLL per token without it.
    candidates: block -> NLL per token without it, or a lower bound if the candidate was abandoned.
    abandoned: the candidates whose entry is a lower bound. cpu_s: process time of this round.
    """

    removed: int
    nll: float
    candidates: dict[int, float]
    abandoned: tuple[int, ...]
    cpu_s: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "removed": block_name(self.removed),
            "nll": self.nll,
            "candidates": {block_name(block): value for block, value in self.candidates.items()},
            "abandoned": [block_name(block) for block in self.abandoned],
            "cpu_s": self.cpu_s,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Round:
        """Read what ``to_json`` wrote."""
        return cls(
            removed=block_number(value["removed"]),
            nll=value["nll"],
            candidates={block_number(name): nll for name, nll in value["candidates"].items()},
            abandoned=tuple(block_number(name) for name in value["abandoned"]),
            cpu_s=value["cpu_s"],
        )


@torch.inference_mode()
def gsi(
    elastic: ElasticModel,
    windows: Tensor,
    *,
    done: Sequence[Round] = (),
    removals: int | None = None,
    on_round: Callable[[list[Round]], None] | None = None,
    cache_bytes: int = 6 << 30,
) -> list[Round]:
    """Return the rounds of Greedy Sequential Importance; each removes the block that leaves the lowest perplexity.

    The naive algorithm evaluates every kept block in every round on all tokens. This finds the same order faster:

    1. Within a round, a candidate starts from the hidden state before it, which it shares with the current model.
    2. Between rounds, the states of a candidate up to the block removed last still hold. So a candidate runs only the
       blocks after both.
    3. Candidates that run the same block on the same window form one batch.
    4. ``LossBound``, a lower bound of the loss, replaces the head; few candidates come close enough to need the head.
    5. NLL is never negative, so a candidate is abandoned once its sum over the windows seen so far exceeds the full sum
       of the best one. The window with the highest NLL comes first.
    6. Candidates are tried in the order of the last round, because an early good one lets others be abandoned.

    Ties are broken by block number. The result is exact up to rounding: batches of another size round differently, and
    so the naive algorithm may break near ties differently.

    Args:
        elastic: with all blocks at full precision.
        windows: token ids [n, t] of calibration text.
        done: rounds of an earlier run on the same model and text, to continue from.
        removals: how many blocks to remove in all; None removes every block.
        on_round: called after every round with all rounds so far.
        cache_bytes: memory for the states of (2); if not all fit, every second, third, ... is kept.
    Source:
        RAP (arXiv 2505.17138), Greedy Sequential Importance; BlockPruner (arXiv 2406.10594) removes the same units.
    """
    blocks = 2 * elastic.spec.num_layers
    check_removals("gsi.removals", blocks if removals is None else removals, elastic.spec)
    rounds = list(done)
    states = CandidateStates(elastic, windows.to(elastic.device), [r.removed for r in rounds], cache_bytes)
    search = _Search(states)
    while len(rounds) < (blocks if removals is None else removals):
        started = time.process_time()
        last = rounds[-1].candidates if rounds else {}
        found = search.round(sorted(states.kept, key=lambda block: (last.get(block, 0.0), block)))
        states.remove(found.removed)
        rounds.append(replace(found, cpu_s=time.process_time() - started))
        if on_round is not None:
            on_round(rounds)
    return rounds


class _Search:
    """Runs one round of GSI after another; keeps the loss bounds from round to round."""

    def __init__(self, states: CandidateStates) -> None:
        self._states = states
        self._elastic, self._windows = states.elastic, states.windows
        # Bounds are lowered by this much, relative and absolute, so that rounding cannot lift one above the true loss.
        self._slack = 1e-5 if self._elastic.dtype == torch.float32 else 1e-3
        self._bounds: list[LossBound] = []
        self._hardest: list[int] = []  # windows, the one with the highest loss first
        self._heads = 0  # how many candidates needed the head in this round
        self._sums: dict[int, list[float]] = {}  # candidate -> losses or lower bounds, in the order of _hardest

    def round(self, order: Sequence[int]) -> Round:
        """Evaluate all candidates, the first of ``order`` first; return the round with the best one removed."""
        self._states.fill_base()
        if not self._bounds or self._heads > HEADS_PER_ROUND:  # bounds of earlier rounds are valid, but less tight
            self._renew_bounds()
        self._heads = 0
        self._sums = {block: [] for block in order}
        self._follow(order[:1], math.inf)
        # The best sum is not known yet, so guess it; the loop below follows candidates further if they need it.
        self._follow(order[1:], 1.02 * self._sum(order[0]))
        best, best_sum = -1, math.inf
        finished: set[int] = set()
        while left := [b for b in order if b not in finished and self._sum(b) <= best_sum]:
            block = min(left, key=lambda b: (self._sum(b), b))
            if len(self._sums[block]) < len(self._hardest):
                self._follow(left, best_sum)
                continue
            finished.add(block)
            self._finish(block, best_sum)
            if (self._sum(block), block) < (best_sum, best):
                best, best_sum = block, self._sum(block)
        tokens = self._windows.shape[0] * (self._windows.shape[1] - 1)
        return Round(
            removed=best,
            nll=best_sum / tokens,
            candidates={block: self._sum(block) / tokens for block in order},
            abandoned=tuple(sorted(block for block in order if self._sum(block) > best_sum)),
            cpu_s=0.0,
        )

    def _sum(self, block: int) -> float:
        return math.fsum(self._sums[block])

    def _renew_bounds(self) -> None:
        end = self._states.end
        self._bounds = [
            LossBound(self._elastic, self._elastic.head(base[end][:, :-1])[0], window)
            for base, window in zip(self._states.base, self._windows, strict=True)
        ]
        self._hardest = sorted(range(len(self._bounds)), key=lambda w: (-self._bounds[w].loss, w))

    def _follow(self, blocks: Sequence[int], limit: float) -> None:
        """Add the bounds of further windows to candidates until their sums exceed a limit."""
        for seen, window in enumerate(self._hardest):
            active = [block for block in blocks if len(self._sums[block]) == seen and self._sum(block) <= limit]
            self._states.fill(window, active)
            for block in active:
                loss = float(self._bounds[window].bound(self._states.last(window, block)))
                self._sums[block].append(loss * (1 - self._slack) - self._slack)

    def _finish(self, block: int, limit: float) -> None:
        """Replace a candidate's bounds by exact losses until their sum exceeds a limit."""
        for seen, window in enumerate(self._hardest):
            if self._sum(block) > limit:
                return
            losses = token_nll(self._elastic, self._states.last(window, block), self._windows[window][None])
            self._sums[block][seen] = float(losses.double().sum())
        self._heads += 1


@torch.inference_mode()
def gsi_round_naive(elastic: ElasticModel, windows: Tensor, removed: Sequence[int]) -> dict[int, float]:
    """Return the NLL per token without each kept block in turn, each evaluated from the first layer on all tokens.

    This is what a round of GSI costs as RAP describes it: n (n + 1) / 2 evaluations for a full order. It exists for
    comparisons of speed and uses batches as large as those of ``gsi``.
    """
    positions = torch.arange(windows.shape[1], device=elastic.device)[None]
    kept = [block for block in range(2 * elastic.spec.num_layers) if block not in set(removed)]
    sums = dict.fromkeys(kept, 0.0)
    for batch in torch.split(windows.to(elastic.device), max(1, BATCH_TOKENS // windows.shape[1])):
        for candidate in kept:
            hidden = elastic.embed(batch, positions)
            rope = elastic.rope(hidden, positions)
            for block in kept:
                if block != candidate:
                    hidden = hidden + block_output(elastic, block, hidden, rope)
            for row, window in zip(hidden, batch, strict=True):  # one row at a time is faster than all logits at once
                sums[candidate] += float(token_nll(elastic, row[None], window[None]).double().sum())
    return {block: total / (windows.shape[0] * (windows.shape[1] - 1)) for block, total in sums.items()}
