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

from hw.model import ElasticModel
from hw.nll import block_name, mask_without, measure, rounded, token_nll
from sim.errors import ConfigError
from sim.plan import dense_plan

# Shapes: n windows, t tokens of each, e hidden size, v vocabulary.


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round of GSI: which block went, the NLL a token without it, and what was found of every candidate.

    candidates: block -> NLL a token, or a lower bound (with a margin an estimate) where the candidate was abandoned.
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
    margin: float | None = None,
    done: Sequence[Round] = (),
    removals: int | None = None,
    on_round: Callable[[list[Round]], None] | None = None,
) -> list[Round]:
    """Return Greedy Sequential Importance: in each round the block goes whose removal leaves the lowest perplexity.

    Without a margin the order is that of the naive algorithm, which evaluates every kept block in every round on all
    tokens, for less:

    1. The hidden states before each kept block are stored once a round; a candidate runs only what comes after it.
    2. NLL is never negative, so a candidate is abandoned once the sum of the windows seen so far exceeds the whole sum
       of the best one. Windows are the unit, and the one with the highest NLL comes first.
    3. The loss over a part of the vocabulary is a lower bound of the loss: log sum exp over fewer terms is smaller. The
       part holds the likeliest tokens of the model as it stands, so that most candidates never need the whole head.
    4. The order of the last round says whom to try first, since an early good one lets others be abandoned.

    Equal sums are broken by block number. The bound of (3) is exact up to the rounding of the dtype; its slack covers
    a relative rounding error of 2e-3 in float16 and bfloat16, 1e-5 in float32.

    Since most candidates are a few per cent worse than the best, (2) alone has to see almost every window of each. A
    margin races them: a candidate is abandoned once it is further behind the best one, on the windows both have seen,
    than it could make up if it were better by ``margin`` nats a token on all others: an assumption, not a bound.

    Args:
        elastic: with all blocks at full precision.
        windows: token ids [n, t] of calibration text.
        margin: nats a token that a candidate may catch up; None assumes nothing and is exact.
        done: rounds of an earlier run on the same model and text, which this goes on from.
        removals: how many blocks to remove in all; None removes every one.
        on_round: called after every round with all of them.
    Source:
        RAP (arXiv 2505.17138), Greedy Sequential Importance; BlockPruner (arXiv 2406.10594) removes the same units.
    """
    blocks = 2 * elastic.spec.num_layers
    rounds = list(done)
    windows = windows.to(elastic.device)
    while len(rounds) < (blocks if removals is None else removals):
        started = time.process_time()
        kept = [block for block in range(blocks) if block not in {r.removed for r in rounds}]
        last = rounds[-1].candidates if rounds else {}
        found = _Round(elastic, windows, kept, margin).run(
            sorted(kept, key=lambda block: (last.get(block, 0.0), block))
        )
        rounds.append(replace(found, cpu_s=time.process_time() - started))
        if on_round is not None:
            on_round(rounds)
    return rounds


class _Round:
    """One round: the hidden states of the model as it stands, and the evaluation of candidates on them."""

    def __init__(self, elastic: ElasticModel, windows: Tensor, kept: Sequence[int], margin: float | None) -> None:
        self._elastic = elastic
        self._windows = windows
        self._kept = kept
        self._margin = margin
        self._window_tokens = windows.shape[1] - 1
        self._tokens = windows.shape[0] * self._window_tokens
        positions = torch.arange(windows.shape[1], device=windows.device)[None]
        self._rope = elastic.rope(elastic.embed(windows[:1], positions), positions)
        self._slack = 1e-5 if elastic.dtype == torch.float32 else 2e-3
        # before[w][j]: hidden state of window w before kept block j; the last entry is that before the head.
        self._before: list[list[Tensor]] = []
        self._part: list[Tensor] = []  # the part of the vocabulary that bounds a window's loss
        self._weight: list[Tensor] = []
        losses = []
        for window in windows:
            states = [elastic.embed(window[None], positions)]
            for block in kept:
                states.append(self._run_block(block, states[-1]))
            self._before.append(states)
            logits = elastic.head(states[-1][:, :-1])[0].float()
            losses.append(float(functional.cross_entropy(logits, window[1:], reduction="sum")))
            likely = logits.topk(min(24, logits.shape[1]), dim=-1).indices.flatten()
            part = torch.unique(torch.cat((likely, window)))
            self._part.append(part)
            self._weight.append(elastic.head_weight()[part])
        self._order = sorted(range(len(losses)), key=lambda w: (-losses[w], w))

    def _run_block(self, block: int, hidden: Tensor) -> Tensor:
        layer = block // 2
        if block % 2:
            return hidden + self._elastic.feed(layer, hidden)
        return hidden + self._elastic.attend(layer, hidden, self._rope)

    def _last_hidden(self, window: int, index: int) -> Tensor:
        """Return the last hidden state of a window without kept block ``index``."""
        hidden = self._before[window][index]
        for block in self._kept[index + 1 :]:
            hidden = self._run_block(block, hidden)
        return hidden

    def _loss(self, window: int, hidden: Tensor) -> float:
        return float(token_nll(self._elastic, hidden, self._windows[window][None]).double().sum())

    def _bound(self, window: int, hidden: Tensor) -> float:
        """Return a lower bound of ``_loss`` that costs a tenth of it."""
        normed = self._elastic.normed(hidden[0, :-1])
        logits = functional.linear(normed, self._weight[window]).float()
        target = torch.searchsorted(self._part[window], self._windows[window][1:])
        loss = float(functional.cross_entropy(logits, target, reduction="sum"))
        return loss * (1 - self._slack) - self._slack

    def run(self, order: Sequence[int]) -> Round:
        """Evaluate candidates in this order; return the round with its winner."""
        best, best_sum, best_bounds = -1, math.inf, None
        candidates: dict[int, float] = {}
        abandoned = []
        for block in order:
            total, bounds = self._evaluate(self._kept.index(block), best_sum, best_bounds)
            candidates[block] = total / self._tokens
            if bounds is None:
                abandoned.append(block)
            elif (total, block) < (best_sum, best):
                best, best_sum, best_bounds = block, total, bounds
        return Round(
            removed=best,
            nll=best_sum / self._tokens,
            candidates=candidates,
            abandoned=tuple(sorted(abandoned)),
            cpu_s=0.0,
        )

    def _evaluate(
        self, index: int, best_sum: float, best_bounds: Sequence[float] | None
    ) -> tuple[float, list[float] | None]:
        """Return a candidate's summed loss and the bound of each window.

        None stands for the bounds of a candidate that was abandoned; the sum is then a lower bound, or with a margin an
        estimate: the best candidate's sum and what this one was behind it when it was given up.
        """
        bounds, hidden = [], []
        for seen, window in enumerate(self._order, start=1):
            hidden.append(self._last_hidden(window, index))
            bounds.append(self._bound(window, hidden[-1]))
            if math.fsum(bounds) > best_sum:
                return math.fsum(bounds), None
            if self._margin is not None and best_bounds is not None:
                behind = math.fsum(bounds) - math.fsum(best_bounds[:seen])
                if behind > self._margin * self._window_tokens * (len(self._order) - seen):
                    # Behind on these windows, scaled to all of them.
                    return best_sum + max(0.0, behind) * len(self._order) / seen, None
        losses = list(bounds)
        for seen, window in enumerate(self._order):
            losses[seen] = self._loss(window, hidden[seen])
            if math.fsum(losses) > best_sum:
                return math.fsum(losses), None  # bounds still stand for the windows that were not reached
        return math.fsum(losses), bounds


@torch.inference_mode()
def single_removals(elastic: ElasticModel, windows: Tensor) -> dict[int, float]:
    """Return the NLL a token without each block in turn, all others kept; what precedes a block is run once."""
    blocks = range(2 * elastic.spec.num_layers)
    one = _Round(elastic, windows.to(elastic.device), blocks, None)
    return {block: one._evaluate(block, math.inf, None)[0] / one._tokens for block in blocks}


@torch.inference_mode()
def gsi_round_naive(elastic: ElasticModel, windows: Tensor, removed: Sequence[int]) -> dict[int, float]:
    """Return the NLL a token without each kept block in turn, each evaluated from the first layer on all tokens.

    This is what GSI costs as RAP states it, n (n + 1) / 2 evaluations for a whole order: the other side of a
    comparison of speed. The tests hold ``gsi`` against a naive algorithm that shares no code with it.
    """
    dense = dense_plan(elastic.spec)
    found = {}
    for block in range(2 * elastic.spec.num_layers):
        if block not in removed:
            mask = mask_without(elastic.spec.num_layers, {*removed, block})
            found[block] = measure(elastic, replace(dense, prefill=mask, decode=mask), windows).mean
    return found


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
        for block, (before, after) in enumerate(_block_states(elastic, window[None])):
            cosine = functional.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[block] += float(cosine.sum())
    return [total / windows.numel() for total in sums]


def _block_states(elastic: ElasticModel, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    hidden = elastic.embed(tokens, positions)
    rope = elastic.rope(hidden, positions)
    states = []
    for layer in range(elastic.spec.num_layers):
        middle = hidden + elastic.attend(layer, hidden, rope)
        after = middle + elastic.feed(layer, middle)
        states += [(hidden, middle), (middle, after)]
        hidden = after
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
        states = _block_states(elastic, window[None])
        for layer in range(layers):
            before, after = states[2 * layer][0], states[2 * layer + 1][1]
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
