"""PDTrim's scores: redundant blocks, nested sets for prefill and decode, and attention on the first and last tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hw.elastic.model import ElasticModel
from hw.score.block_numbers import check_removals, staged_plan
from hw.score.cosine import block_cosines
from hw.score.nll import measure
from sim.errors import ConfigError
from sim.progress import progress

# Shapes: n windows, t tokens of each.


def redundancy_sets(cosines: Mapping[int, float], threshold: float = 0.95) -> tuple[list[int], list[int]]:
    """Return the pruning set (blocks whose cosine is at least the threshold) and the distillation set (all others).

    Both are ordered by cosine, the most redundant block first.

    Source:
        PDTrim (arXiv 2509.04467): a threshold of 0.95 on the cosine of a block's input and output splits the blocks.
    """
    ordered = sorted(cosines, key=lambda block: (-cosines[block], block))
    return [b for b in ordered if cosines[b] >= threshold], [b for b in ordered if cosines[b] < threshold]


def redundancy_order(elastic: ElasticModel, windows: Tensor, removals: int) -> list[int]:
    """Return blocks in order of removal: the most redundant one goes, and the others are measured again without it.

    ``block_cosines`` of the dense model judges all blocks at once; here a block is judged by its input after all blocks
    before it in this order are gone. Ties are broken by block number.

    Args:
        elastic: with all blocks at full precision.
        windows: token ids [n, t] of calibration text.
        removals: how many blocks to remove.
    Source:
        PDTrim (arXiv 2509.04467): iterative removal by block redundancy. To measure again after each one is our choice.
    """
    check_removals("pdtrim.removals", removals, elastic.spec)
    order: list[int] = []
    with progress("removing the most redundant block", removals, "removals") as report:
        while len(order) < removals:
            cosines = block_cosines(elastic, windows, removed=order)
            order.append(max(cosines, key=lambda block: (cosines[block], -block)))
            report(len(order))
    return order


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoStage:
    """Nested sets of removed blocks: prefill drops a subset of what decode drops.

    nll, start_nll: NLL of a token after the prompt, for these sets and for those that the search started with.
    """

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
    """Return the nested pair of sets with the lowest NLL after the prompt that simulated annealing finds.

    The search starts with the most redundant blocks. A step exchanges one removed block of one stage for a block that
    this stage may remove instead (prefill: from decode's set; decode: from the pool). It is accepted if the NLL falls,
    otherwise with probability exp(-rise / temperature). The temperature falls linearly to zero.

    Args:
        elastic: with all blocks at full precision.
        windows: token ids [n, t] of calibration text; the first half of each window is its prompt.
        pool: blocks that may be removed, the most redundant first: PDTrim's pruning set, or all blocks.
        prefill_removals, decode_removals: sizes of the two sets.
        steps: how many exchanges to try.
        rng: source of the random numbers.
        first_temperature: in nats per token.
    Raises:
        ConfigError: if prefill should drop more blocks than decode, or decode more than the pool holds.
    Source:
        PDTrim (arXiv 2509.04467): iterative block removal, separately for prefill and decode, prefill's removals a
        subset of decode's. The paper leaves schedule, moves and objective open; these are ours.
    """
    if not 0 <= prefill_removals <= decode_removals <= len(pool):
        raise ConfigError(
            f"prefill drops {prefill_removals} blocks and decode {decode_removals} of a pool of {len(pool)}; prefill "
            "must drop no more than decode, and decode no more than the pool holds"
        )

    def cost(prefill: set[int], decode: set[int]) -> float:
        return measure(elastic, staged_plan(elastic.spec, prefill=prefill, decode=decode), windows).decode_mean

    decode, prefill = set(pool[:decode_removals]), set(pool[:prefill_removals])
    now = start = cost(prefill, decode)
    best = (now, sorted(prefill), sorted(decode))
    with progress(f"searching {prefill_removals} in prefill, {decode_removals} in decode", steps, "steps") as report:
        for step in range(steps):
            moves = _moves(prefill, decode, pool)
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
            report(step + 1)
    return TwoStage(prefill=tuple(best[1]), decode=tuple(best[2]), nll=best[0], start_nll=start, evaluations=steps + 1)


def _moves(prefill: set[int], decode: set[int], pool: Sequence[int]) -> list[tuple[str, int, int]]:
    """Return the exchanges that keep the sets nested: (stage, block that comes back, block that goes)."""
    if prefill == decode:  # equal sets stay nested only if both change
        return [("both", a, b) for a in sorted(decode) for b in pool if b not in decode]
    moves = [("decode", a, b) for a in sorted(decode - prefill) for b in pool if b not in decode]
    return moves + [("prefill", a, b) for a in sorted(prefill) for b in sorted(decode - prefill)]


@torch.inference_mode()
def attention_mass(elastic: ElasticModel, windows: Tensor, *, first_tokens: int, last_tokens: int) -> list[float]:
    """Return for each layer the share of attention that falls on the first f and the last w tokens before a query.

    This is the mean over heads and over the queries of the second half of each window [n, t], which see more than those
    tokens. A layer with a high share loses little if decode receives only the KV of those tokens.

    Raises:
        ConfigError: if the first and last tokens cover half a window or more.
    Source:
        PDTrim (arXiv 2509.04467), token-aware cache pruning. The paper leaves both lengths and the threshold open.
    """
    length = windows.shape[1]
    if first_tokens + last_tokens >= length // 2:
        raise ConfigError(
            f"{first_tokens} first and {last_tokens} last tokens must be fewer than half a window of {length} tokens; "
            "take longer windows"
        )
    query, key = torch.arange(length)[length // 2 :, None], torch.arange(length)[None]
    edge = ((key < first_tokens) | (key > query - last_tokens)) & (key <= query)
    shares = [0.0] * elastic.spec.num_layers
    with progress("reading attention", len(windows), "windows") as report:
        for number, window in enumerate(windows.to(elastic.device), start=1):
            for layer, weights in enumerate(elastic.attention_weights(window[None])):
                rows = weights[0, :, length // 2 :].float().cpu()
                shares[layer] += float((rows * edge).sum(-1).mean()) / len(windows)
            report(number)
    return shares
