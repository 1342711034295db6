"""What every block of a real model is worth: the orders in which RAP, ShortGPT, MorphServe and PDTrim would remove it.

A block is a number here: 2 l is the MHA block of layer l, 2 l + 1 its FFN block, the order in which they run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hw.elastic.model import ElasticModel
from hw.score.nll import block_name, mask_without, measure, rounded, token_nll
from sim.cost.plan import dense_plan
from sim.errors import ConfigError

# Shapes: n windows, t tokens of each, e hidden size, v vocabulary.


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round of GSI: which block went, the NLL a token without it, and what was found of every candidate.

    candidates: block -> NLL a token, or a lower bound where the candidate was abandoned.
    abandoned: the blocks whose figure is no more than that. cpu_s: process time of this round.
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


def block_number(name: str) -> int:
    """Return 6 for ``MHA3``, 7 for ``FFN3``.

    Raises:
        ConfigError: for any other text.
    """
    kind, layer = name[:3], name[3:]
    if kind not in ("MHA", "FFN") or not layer.isdecimal():
        raise ConfigError(f"{name!r} names no block; write MHA0 or FFN0 with the number of the layer")
    return 2 * int(layer) + (kind == "FFN")


# --- GSI -------------------------------------------------------------------------------------------------------------


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
    """Return Greedy Sequential Importance: in each round the block goes whose removal leaves the lowest perplexity.

    The order is that of the naive algorithm, which evaluates every kept block in every round on all tokens, for less:

    1. Hidden states are shared within a round: those before a candidate are those of the model as it stands.
    2. And between rounds: what a candidate's own removal led to, up to the block that went last, still holds. So a
       candidate runs only what comes after both.
    3. Candidates that run the same block on the same window are one batch.
    4. A lower bound of the loss, ``_Tail``, stands for the head; few candidates come close enough to need that.
    5. NLL is never negative, so a candidate is abandoned once the sum over the windows seen so far exceeds the whole
       sum of the best one. Windows are the unit, and the one with the highest NLL comes first.
    6. The order of the last round says whom to try first, since an early good one lets others be abandoned.

    Equal sums are broken by block number. All this is exact up to rounding: batches of other sizes round otherwise, and
    so may the naive algorithm break near ties otherwise.

    Args:
        elastic: with all blocks at full precision.
        windows: token ids [n, t] of calibration text.
        done: rounds of an earlier run on the same model and text, which this goes on from.
        removals: how many blocks to remove in all; None removes every one.
        on_round: called after every round with all of them.
        cache_bytes: what (2) may hold; where all states do not fit, every second, third ... is kept.
    Source:
        RAP (arXiv 2505.17138), Greedy Sequential Importance; BlockPruner (arXiv 2406.10594) removes the same units.
    """
    blocks = 2 * elastic.spec.num_layers
    rounds = list(done)
    states = _States(elastic, windows.to(elastic.device), [r.removed for r in rounds], cache_bytes)
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


BATCH_TOKENS = 1024
"""Tokens that run a block together; with more, hidden states leave the cache of a CPU core."""


class _States:
    """Hidden states of the model as it stands and of its candidates, on every window.

    The state at key i is what block i receives; the key of the head is ``end``. ``base[w][i]``: with all kept blocks.
    ``without[w][c][i]``: with all but candidate c, for keys behind c.
    """

    def __init__(self, elastic: ElasticModel, windows: Tensor, removed: Sequence[int], cache_bytes: int) -> None:
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
        needed = len(self.kept) ** 2 // 2 * sum(state.nbytes for state in embedded)
        self._stride = max(1, math.ceil(needed / max(1, cache_bytes)))

    def _after(self, block: int) -> int:
        """Return the key behind a kept block."""
        return next((kept for kept in self.kept if kept > block), self.end)

    def _run(self, block: int, hidden: Tensor) -> Tensor:
        layer = block // 2
        if block % 2:
            return hidden + self.elastic.feed(layer, hidden)
        return hidden + self.elastic.attend(layer, hidden, self._rope)

    def fill_base(self) -> None:
        """Calculate what is missing of the model as it stands."""
        for base in self.base:
            for block in self.kept:
                key = self._after(block)
                if key not in base:
                    base[key] = self._run(block, base[block])

    def fill(self, window: int, candidates: Sequence[int]) -> None:
        """Calculate the last hidden state of some candidates on a window."""
        begin: dict[int, tuple[int, Tensor]] = {}
        for block in candidates:
            found = self.without[window].setdefault(block, {})
            if not found:
                found[self._after(block)] = self.base[window][block]
            begin[block] = max(found), found[max(found)]
        queue = sorted((b for b in candidates if begin[b][0] != self.end), key=lambda b: begin[b][0])
        batch = max(1, BATCH_TOKENS // self.windows.shape[1])
        for chunk in (queue[first : first + batch] for first in range(0, len(queue), batch)):
            rows: list[int] = []
            hidden: Tensor | None = None
            for rank, block in enumerate(self.kept):
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
        """Return a candidate's last hidden state [1, t, e]."""
        return self.without[window][candidate][self.end]

    def remove(self, block: int) -> None:
        """Let a block go, and with it the states that it took part in."""
        after = self._after(block)
        self.kept.remove(block)
        for base, without in zip(self.base, self.without, strict=True):
            own = without.pop(block, {})
            before = base.pop(block)
            for key in [key for key in base if key > block]:
                del base[key]
            base.update(own)
            base[after] = before
            for candidate in list(without):
                if candidate > block:
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


LIKELY_TOKENS = 1024
"""Tokens of the vocabulary in A below: with more, the bound costs more; with fewer, more candidates need the head."""


class _Tail:
    """A lower bound of the loss of a window under any changed model, at a few per cent of the cost of the head.

        log sum over v of exp(l_v)  >=  log( sum over v in A of exp(l_v)
                                             + exp( sum over v not in A of q_v l_v + H(q) ) )

    for any distribution q over the tokens outside of A, by Jensen's inequality. A holds the tokens that one model
    thinks likeliest in this window, and q is that model's distribution over all others; the bound is then off by the
    share of the others times their relative entropy, little where the models are alike. sum q_v l_v is one product
    with the mean of the rows of the head.
    """

    def __init__(self, elastic: ElasticModel, logits: Tensor, tokens: Tensor) -> None:
        """Take the logits [t - 1, v] of the model as it stands, and the window [t]."""
        self._elastic = elastic
        weight = elastic.head_weight()
        logs = logits.float().log_softmax(-1)
        self.loss = -float(logs.gather(-1, tokens[1:, None]).double().sum())
        shares = logs.exp()
        likely = shares.sum(0).topk(min(LIKELY_TOKENS, logs.shape[1])).indices
        part = torch.unique(torch.cat((likely, tokens)))
        self._weight = weight[part]
        self._target = torch.searchsorted(part, tokens[1:])
        self._all = part.numel() == logs.shape[1]
        if self._all:
            return
        shares[:, part] = 0.0
        rounded_shares = shares.to(weight.dtype)  # q is what the product below really weighs with
        total = rounded_shares.sum(-1, keepdim=True, dtype=torch.float32).clamp_min_(1e-30)
        self._mean = (rounded_shares @ weight).float() / total
        self._entropy = (total.log() - (shares.mul_(logs)).sum(-1, keepdim=True) / total)[:, 0]

    def bound(self, hidden: Tensor) -> Tensor:
        """Return the lower bound for last hidden states [m, t, e], one each, FP64."""
        normed = self._elastic.normed(hidden[:, :-1])
        logits = functional.linear(normed, self._weight).float()
        mass = logits.logsumexp(-1)
        if not self._all:
            mass = torch.logaddexp(mass, (normed.float() * self._mean).sum(-1) + self._entropy)
        target = logits.gather(-1, self._target.expand(len(hidden), -1)[..., None])[..., 0]
        return (mass - target).double().sum(-1)


class _Search:
    """Rounds of GSI one after the other: the bounds, and the sums of the round at hand."""

    def __init__(self, states: _States) -> None:
        self._states = states
        self._elastic, self._windows = states.elastic, states.windows
        self._slack = 1e-5 if self._elastic.dtype == torch.float32 else 1e-3
        self._tails: list[_Tail] = []
        self._hardest: list[int] = []
        self._heads = 0
        self._sums: dict[int, list[float]] = {}  # of windows, the hardest first: losses, or lower bounds of them

    def round(self, order: Sequence[int]) -> Round:
        """Evaluate all candidates, the first of ``order`` first; return the round with its winner."""
        self._states.fill_base()
        if not self._tails or self._heads > HEADS_PER_ROUND:  # older bounds are lower, and as true
            self._renew_tails()
        self._heads = 0
        self._sums = {block: [] for block in order}
        self._follow(order[:1], math.inf)
        self._follow(order[1:], 1.02 * self._sum(order[0]))  # a guess; below, they are followed as far as it takes
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

    def _renew_tails(self) -> None:
        end = self._states.end
        self._tails = [
            _Tail(self._elastic, self._elastic.head(base[end][:, :-1])[0], window)
            for base, window in zip(self._states.base, self._windows, strict=True)
        ]
        self._hardest = sorted(range(len(self._tails)), key=lambda w: (-self._tails[w].loss, w))

    def _follow(self, blocks: Sequence[int], limit: float) -> None:
        """Add the bounds of windows to candidates until their sum exceeds a limit."""
        for seen, window in enumerate(self._hardest):
            at_hand = [block for block in blocks if len(self._sums[block]) == seen and self._sum(block) <= limit]
            self._states.fill(window, at_hand)
            for block in at_hand:
                loss = float(self._tails[window].bound(self._states.last(window, block)))
                self._sums[block].append(loss * (1 - self._slack) - self._slack)

    def _finish(self, block: int, limit: float) -> None:
        """Put losses in the place of a candidate's bounds until their sum exceeds a limit."""
        for seen, window in enumerate(self._hardest):
            if self._sum(block) > limit:
                return
            losses = token_nll(self._elastic, self._states.last(window, block), self._windows[window][None])
            self._sums[block][seen] = float(losses.double().sum())
        self._heads += 1


HEADS_PER_ROUND = 3
"""Bounds are calculated anew, for the price of about two, once a round needed the head for more candidates."""


@torch.inference_mode()
def single_removals(elastic: ElasticModel, windows: Tensor) -> dict[int, float]:
    """Return the NLL a token without each block in turn, all others kept; what precedes a block is run once."""
    windows = windows.to(elastic.device)
    states = _States(elastic, windows, (), cache_bytes=0)
    states.fill_base()
    sums = dict.fromkeys(states.kept, 0.0)
    for index, window in enumerate(windows):
        states.fill(index, states.kept)
        for block in states.kept:
            sums[block] += float(token_nll(elastic, states.last(index, block), window[None]).double().sum())
        states.without[index].clear()
    return {block: total / (windows.shape[0] * (windows.shape[1] - 1)) for block, total in sums.items()}


@torch.inference_mode()
def gsi_round_naive(elastic: ElasticModel, windows: Tensor, removed: Sequence[int]) -> dict[int, float]:
    """Return the NLL a token without each kept block in turn, each evaluated from the first layer on all tokens.

    This is what GSI costs as RAP states it, n (n + 1) / 2 evaluations for a whole order: the other side of a
    comparison of speed, in batches as large as the fast one's. The tests hold ``gsi`` against a naive algorithm that
    shares no code with it.
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
                    layer = block // 2
                    hidden = hidden + (
                        elastic.feed(layer, hidden) if block % 2 else elastic.attend(layer, hidden, rope)
                    )
            for row, window in zip(hidden, batch, strict=True):  # logits of all at once would be slower
                sums[candidate] += float(token_nll(elastic, row[None], window[None]).double().sum())
    return {block: total / (windows.shape[0] * (windows.shape[1] - 1)) for block, total in sums.items()}


def one_shot(first: dict[int, float]) -> list[int]:
    """Return the blocks by the NLL that each leaves when it alone is removed, the least harmful first.

    Source:
        RAP (arXiv 2505.17138): one-shot ranking, the ablation of GSI.
    """
    return sorted(first, key=lambda block: (first[block], block))


def random_order(blocks: int, seed: int) -> list[int]:
    """Return all blocks in a random order."""
    return [int(block) for block in np.random.default_rng(seed).permutation(blocks)]


# --- Similarities ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def block_cosines(elastic: ElasticModel, windows: Tensor) -> list[float]:
    """Return the mean cosine between the input and the output of every block of the dense model, over all tokens.

    High means redundant. ShortGPT's Block Influence is one minus this, of whole layers; PDTrim's redundancy is this,
    of the units it removes. Here a unit is one MHA or FFN block with its residual connection.

    Source:
        ShortGPT (arXiv 2403.03853), section 3.1, Block Influence; PDTrim (arXiv 2509.04467), block redundancy.
    """
    sums = [0.0] * (2 * elastic.spec.num_layers)
    for window in windows.to(elastic.device):
        for block, states in enumerate(_block_states(elastic, window[None])):
            assert states is not None
            cosine = functional.cosine_similarity(states[0].float(), states[1].float(), dim=-1)
            sums[block] += float(cosine.sum())
    return [total / windows.numel() for total in sums]


def _block_states(
    elastic: ElasticModel, tokens: Tensor, skipped: frozenset[int] = frozenset()
) -> list[tuple[Tensor, Tensor] | None]:
    """Return the hidden states before and after every block; None for those that are skipped."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    hidden = elastic.embed(tokens, positions)
    rope = elastic.rope(hidden, positions)
    states: list[tuple[Tensor, Tensor] | None] = []
    for block in range(2 * elastic.spec.num_layers):
        if block in skipped:
            states.append(None)
            continue
        added = elastic.feed(block // 2, hidden) if block % 2 else elastic.attend(block // 2, hidden, rope)
        states.append((hidden, hidden + added))
        hidden = hidden + added
    return states


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerImportance:
    """MorphServe's scores of every layer, MDS and LIS as of when it was chosen, and the order of layers to swap."""

    order: tuple[int, ...]
    lts: tuple[float, ...]
    lrs: tuple[float, ...]
    mds: tuple[float, ...]
    lis: tuple[float, ...]


@torch.inference_mode()
def layer_importance(
    elastic: ElasticModel, windows: Tensor, bits: int, on_step: Callable[[int, int], None] | None = None
) -> LayerImportance:
    """Return the order in which layers are swapped for their W8 or W4 copies.

        LTS_p = cos(h_p(x), x_p)    LRS_p = cos(h_p(x), h_p^Q(x))    MDS_p = cos(f^Q(x), f^(Q+p)(x))
        LIS_p = 0.25 LTS_p + 0.25 LRS_p + 0.5 MDS_p

    and greedily the layer with the highest LIS joins the swapped set Q. f is the model's logits, a cosine is the mean
    over tokens; the paper leaves both open.

    Source:
        MorphServe (arXiv 2506.02006), Layer Importance Score.
    """
    layers = elastic.spec.num_layers
    windows = windows.to(elastic.device)
    lts, lrs = [0.0] * layers, [0.0] * layers
    for window in windows:
        hidden = elastic.embed(window[None], torch.arange(windows.shape[1], device=windows.device)[None])
        for layer in range(layers):
            before, after = hidden, _run_layers(elastic, hidden, layer, layer + 1)
            hidden = after
            with rounded(elastic, _bits_of(layers, [layer], bits)):
                quantised = _run_layers(elastic, before, layer, layer + 1)
            lts[layer] += _cosine(before, after) / len(windows)
            lrs[layer] += _cosine(after, quantised) / len(windows)
    swapped: list[int] = []
    mds, lis = [0.0] * layers, [0.0] * layers
    while len(swapped) < layers:
        # Everything before the candidate is common to f^Q and f^(Q+p): run it once.
        scores = dict.fromkeys((p for p in range(layers) if p not in swapped), 0.0)
        for window in windows:
            hidden = elastic.embed(window[None], torch.arange(windows.shape[1], device=windows.device)[None])
            entering: list[Tensor] = []
            with rounded(elastic, _bits_of(layers, swapped, bits)):
                for layer in range(layers):
                    entering.append(hidden)
                    hidden = _run_layers(elastic, hidden, layer, layer + 1)
                reference = elastic.head(hidden)
            for p in scores:
                with rounded(elastic, _bits_of(layers, [*swapped, p], bits)):
                    logits = elastic.head(_run_layers(elastic, entering[p], p, layers))
                scores[p] += _cosine(reference, logits) / len(windows)
        total = {p: 0.25 * lts[p] + 0.25 * lrs[p] + 0.5 * scores[p] for p in scores}
        chosen = max(total, key=lambda p: (total[p], -p))
        mds[chosen], lis[chosen] = scores[chosen], total[chosen]
        swapped.append(chosen)
        if on_step is not None:
            on_step(len(swapped), layers)
    return LayerImportance(order=tuple(swapped), lts=tuple(lts), lrs=tuple(lrs), mds=tuple(mds), lis=tuple(lis))


def _bits_of(layers: int, swapped: Sequence[int], bits: int) -> list[int]:
    return [bits if layer in swapped else 16 for layer in range(layers)]


def _run_layers(elastic: ElasticModel, hidden: Tensor, first: int, end: int) -> Tensor:
    rope = elastic.rope(hidden, torch.arange(hidden.shape[1], device=hidden.device)[None])
    for layer in range(first, end):
        hidden = hidden + elastic.attend(layer, hidden, rope)
        hidden = hidden + elastic.feed(layer, hidden)
    return hidden


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(functional.cosine_similarity(a.float(), b.float(), dim=-1).mean())


# --- PDTrim ----------------------------------------------------------------------------------------------------------


def redundancy_sets(cosines: Sequence[float], threshold: float = 0.95) -> tuple[list[int], list[int]]:
    """Return the pruning set (cosine of at least the threshold, the most redundant first) and the distillation set.

    Source:
        PDTrim (arXiv 2509.04467): a threshold of 0.95 on the cosine of a block's input and output splits the blocks.
    """
    ordered = sorted(range(len(cosines)), key=lambda block: (-cosines[block], block))
    return [b for b in ordered if cosines[b] >= threshold], [b for b in ordered if cosines[b] < threshold]


@torch.inference_mode()
def redundancy_order(
    elastic: ElasticModel, windows: Tensor, removals: int, on_step: Callable[[list[int]], None] | None = None
) -> list[int]:
    """Return blocks in the order in which the most redundant goes and the rest are measured again without it.

    Where ``block_cosines`` looks at the dense model once, a block is judged here by what reaches it once all before it
    in this order are gone. Equal cosines are broken by block number.

    Source:
        PDTrim (arXiv 2509.04467): iterative removal by block redundancy. That it is measured anew is our choice.
    """
    order: list[int] = []
    windows = windows.to(elastic.device)
    while len(order) < removals:
        sums = [0.0] * (2 * elastic.spec.num_layers)
        for window in windows:
            for block, states in enumerate(_block_states(elastic, window[None], skipped=frozenset(order))):
                if states is not None:
                    cosine = functional.cosine_similarity(states[0].float(), states[1].float(), dim=-1)
                    sums[block] += float(cosine.sum())
        order.append(max((b for b in range(len(sums)) if b not in order), key=lambda b: (sums[b], -b)))
        if on_step is not None:
            on_step(order)
    return order


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoStage:
    """Nested sets of removed blocks: what prefill drops is a part of what decode drops."""

    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    nll: float
    start_nll: float
    evaluations: int


def two_stage_search(
    elastic: ElasticModel,
    windows: Tensor,
    pool: Sequence[int],
    *,
    prefill_removals: int,
    decode_removals: int,
    steps: int,
    rng: np.random.Generator,
    first_temperature: float = 0.05,
) -> TwoStage:
    """Return the nested pair of sets with the lowest NLL behind the prompt that an annealing search finds.

    It starts with the most redundant blocks. A step exchanges one removed block of one stage for one that the stage may
    remove instead (prefill only from decode's set, decode from the pool), and is taken if the NLL falls, else with
    probability exp(-rise / temperature); the temperature falls linearly to zero.

    Args:
        pool: blocks that may go, the most redundant first: PDTrim's pruning set, or all blocks.
    Raises:
        ConfigError: if prefill should drop more than decode, or decode more than the pool holds.
    Source:
        PDTrim (arXiv 2509.04467): iterative block removal, separately for prefill and decode, prefill's removals a
        subset of decode's. The schedule, the moves and the objective are open there and ours.
    """
    if not 0 <= prefill_removals <= decode_removals <= len(pool):
        raise ConfigError(
            f"prefill drops {prefill_removals} blocks and decode {decode_removals} of a pool of {len(pool)}; prefill "
            "must drop no more than decode, and decode no more than the pool holds"
        )
    layers = elastic.spec.num_layers
    dense = dense_plan(elastic.spec)

    def cost(prefill: set[int], decode: set[int]) -> float:
        plan = replace(dense, prefill=mask_without(layers, prefill), decode=mask_without(layers, decode))
        return measure(elastic, plan, windows).decode_mean

    decode, prefill = set(pool[:decode_removals]), set(pool[:prefill_removals])
    now = start = cost(prefill, decode)
    best = (now, sorted(prefill), sorted(decode))
    for step in range(steps):
        moves = [("decode", a, b) for a in sorted(decode - prefill) for b in pool if b not in decode]
        moves += [("prefill", a, b) for a in sorted(prefill) for b in sorted(decode - prefill)]
        if prefill == decode:  # nested sets of one size move together
            moves = [("both", a, b) for a in sorted(decode) for b in pool if b not in decode]
        if not moves:
            break
        stage, out, new = moves[int(rng.integers(len(moves)))]
        next_prefill = prefill - {out} | {new} if stage != "decode" else prefill
        next_decode = decode - {out} | {new} if stage != "prefill" else decode
        found = cost(next_prefill, next_decode)
        temperature = first_temperature * (1 - step / steps)
        if found <= now or rng.random() < math.exp(-(found - now) / max(temperature, 1e-12)):
            prefill, decode, now = next_prefill, next_decode, found
            best = min(best, (now, sorted(prefill), sorted(decode)))
    return TwoStage(prefill=tuple(best[1]), decode=tuple(best[2]), nll=best[0], start_nll=start, evaluations=steps + 1)


@torch.inference_mode()
def attention_mass(elastic: ElasticModel, windows: Tensor, *, first_tokens: int, last_tokens: int) -> list[float]:
    """Return for each layer the share of attention that falls on the first f and the last w tokens before a query.

    The mean over heads and over the queries of the second half of each window, which see more than those tokens. A
    layer whose share is high loses little when decode is sent only those entries.

    Source:
        PDTrim (arXiv 2509.04467), token-aware cache pruning. Both lengths and the threshold are open there.
    """
    length = windows.shape[1]
    if first_tokens + last_tokens >= length // 2:
        raise ConfigError(
            f"{first_tokens} first and {last_tokens} last tokens leave nothing out of half a window of {length}; "
            "take longer windows"
        )
    query, key = torch.arange(length)[length // 2 :, None], torch.arange(length)[None]
    edge = ((key < first_tokens) | (key > query - last_tokens)) & (key <= query)
    shares = [0.0] * elastic.spec.num_layers
    for window in windows.to(elastic.device):
        for layer, weights in enumerate(elastic.attention_weights(window[None])):
            rows = weights[0, :, length // 2 :].float().cpu()
            shares[layer] += float((rows * edge).sum(-1).mean()) / len(windows)
    return shares
