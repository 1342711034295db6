"""The loss of a plan on text: the negative log-likelihood (NLL) of tokens, in nats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from hw.elastic.blocks import KINDS, Block
from hw.elastic.model import ElasticModel, Rope
from hw.elastic.nested import half_of_16, has_half
from hw.elastic.quantize import quantize
from hw.elastic.quantized_kv import stored
from hw.score.ffn_slices import FFNSlice, sliced
from sim.cost.plan import KV_KEEP_ALL, KVKeep, Plan, dense_plan
from sim.progress import progress

# Shapes: n windows, t tokens of each, e hidden size, v vocabulary.

Slices = Mapping[int, FFNSlice]
"""The layers whose FFN blocks run only some channels; the others run all."""


@dataclass(frozen=True, slots=True)
class Nll:
    """Sums of NLL over windows, in nats, and how many tokens they cover.

    total, tokens: all predicted tokens. decode, decode_tokens: those after the prompt alone.
    """

    total: float
    tokens: int
    decode: float
    decode_tokens: int

    @property
    def mean(self) -> float:
        """NLL per token."""
        return self.total / self.tokens

    @property
    def decode_mean(self) -> float:
        """NLL per token of those after the prompt."""
        return self.decode / self.decode_tokens


@torch.inference_mode()
def measure(elastic: ElasticModel, plan: Plan, windows: Tensor, *, prompt_tokens: int | None = None) -> Nll:
    """Return the NLL of windows [n, t] under a plan; the first ``prompt_tokens`` of each window are its prompt.

    This takes one pass a window and equals prefilling the prompt and decoding the rest token by token. After the
    prompt, a block that decode drops adds nothing, and a layer sees only the first f and last w tokens, at 8 or 4 bits,
    if the plan says so. In a layer of ``kv_only``, only the last token of the prompt and those after it gain anything.

    Args:
        elastic: with all blocks at full precision; the plan's masks work as gates, and rounded weights replace the full
            ones during the measurement.
        plan: any legal plan.
        windows: token ids.
        prompt_tokens: None takes half a window. A plan that treats all tokens alike does not depend on it.
    """
    return measure_many(elastic, [plan], windows, prompt_tokens=prompt_tokens)[0]


@torch.inference_mode()
def measure_many(
    elastic: ElasticModel,
    plans: Sequence[Plan],
    windows: Tensor,
    *,
    prompt_tokens: int | None = None,
    slices: Sequence[Slices] | None = None,
) -> list[Nll]:
    """Return what ``measure`` returns for every plan, bit for bit; layers that plans have in common run once.

    ``slices`` has the FFN blocks that each plan cuts; None cuts none. Plans have a slice in common if it is one object.
    """
    cuts: Sequence[Slices] = [{} for _ in plans] if slices is None else slices
    assert len(cuts) == len(plans)
    assert elastic.plan == dense_plan(elastic.spec)
    assert not any(plan.kv_compression for plan in plans), "hw.score.kv_compression measures these"
    assert not any(plan.cuts_ffn for plan in plans), "pass the slices of FFN blocks, as hw.score.width does"
    prompt = windows.shape[1] // 2 if prompt_tokens is None else prompt_tokens
    total, after = [0.0] * len(plans), [0.0] * len(plans)
    with progress("measuring", len(windows), "windows") as report:
        for number, window in enumerate(windows.to(elastic.device), start=1):
            for members, hidden in _run(elastic, plans, cuts, window[None], prompt):
                losses = token_nll(elastic, hidden, window[None])[0]
                # Entry i predicts token i + 1.
                every, after_prompt = float(losses.sum()), float(losses[prompt - 1 :].sum())
                for index in members:
                    total[index] += every
                    after[index] += after_prompt
            report(number)
    rows, length = windows.shape
    return [
        Nll(every, rows * (length - 1), after_prompt, rows * (length - prompt))
        for every, after_prompt in zip(total, after, strict=True)
    ]


def _run(
    elastic: ElasticModel, plans: Sequence[Plan], cuts: Sequence[Slices], tokens: Tensor, prompt: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield last hidden states [1, t, e], each with the indices of all plans that share it."""
    positions = torch.arange(tokens.shape[1], device=elastic.device)[None]
    embedded = elastic.embed(tokens, positions)
    rope = elastic.rope(embedded, positions)
    # Depth first, so that the number of states in memory does not grow with the number of plans.
    waiting: list[tuple[int, list[int], Tensor]] = [(0, list(range(len(plans))), embedded)]
    while waiting:
        layer, members, hidden = waiting.pop()
        if layer == elastic.spec.num_layers:
            yield members, hidden
            continue
        alike: dict[tuple[object, FFNSlice | None], list[int]] = {}
        for index in members:
            alike.setdefault((_of_layer(plans[index], layer), cuts[index].get(layer)), []).append(index)
        for (_, cut), group in alike.items():
            after = _run_layer(elastic, plans[group[0]], layer, cut, hidden, rope, tokens, prompt)
            waiting.append((layer + 1, group, after))


def _of_layer(plan: Plan, layer: int) -> object:
    """Return everything that a plan says about a layer; plans with equal values run it alike."""
    return (
        plan.prefill.mha[layer],
        plan.decode.mha[layer],
        plan.prefill.ffn[layer],
        plan.decode.ffn[layer],
        plan.weight_bits[layer],
        plan.product_bits[layer],
        plan.kv_keep[layer],
        plan.kv_bits[layer],
        plan.kv_only[layer],
    )


def _run_layer(
    elastic: ElasticModel,
    plan: Plan,
    layer: int,
    cut: FFNSlice | None,
    hidden: Tensor,
    rope: Rope,
    tokens: Tensor,
    prompt: int,
) -> Tensor:
    """Return the hidden states after a layer that runs as the plan says, in prefill up to the prompt's end."""
    layers = range(elastic.spec.num_layers)
    bits = [plan.weight_bits[layer] if i == layer else 16 for i in layers]
    half = [plan.nested[layer] and i == layer for i in layers]
    with rounded(elastic, bits, half), sliced(elastic, layer, cut):  # the rounded weights are cut
        if plan.prefill.mha[layer]:
            keep, kv_bits, decodes = plan.kv_keep[layer], plan.kv_bits[layer], plan.decode.mha[layer]
            view = _Kept(keep, kv_bits, tokens, prompt) if decodes and (keep != KV_KEEP_ALL or kv_bits < 16) else None
            added = elastic.attend(layer, hidden, rope, view)
            if view is not None and kv_bits < 16:  # prefill reads KV at 16 bits
                added = torch.cat((elastic.attend(layer, hidden, rope, None)[:, :prompt], added[:, prompt:]), 1)
            if not decodes:
                added[:, prompt:] = 0
            if plan.kv_only[layer]:  # the prompt's last token and those after it read the keys of all, which pass on
                added[:, : prompt - 1] = 0
            hidden = hidden + added
        if plan.kv_only[layer]:
            some = slice(prompt - 1 if plan.prefill.ffn[layer] else prompt, None if plan.decode.ffn[layer] else prompt)
            gained = torch.zeros_like(hidden)
            gained[:, some] = elastic.feed(layer, hidden[:, some])
            hidden = hidden + gained
        elif plan.decode.ffn[layer]:
            hidden = hidden + elastic.feed(layer, hidden)
        elif plan.prefill.ffn[layer]:
            hidden = torch.cat((hidden[:, :prompt] + elastic.feed(layer, hidden[:, :prompt]), hidden[:, prompt:]), 1)
    return hidden


class _Kept:
    """A KVView of one full window as tokens after the prompt see it: only the first f and last w tokens, at some bits.

    Tokens of the prompt see all earlier tokens.
    """

    def __init__(self, keep: KVKeep, bits: int, tokens: Tensor, prompt: int) -> None:
        self._keep, self._bits = keep, bits
        self._positions = torch.arange(tokens.shape[1], device=tokens.device)
        self._prompt = prompt

    def rows(self, layer: int) -> None:
        """All rows run."""

    def mask(self, layer: int, window: int | None) -> Tensor:
        """Return which keys each token sees."""
        query, key = self._positions[:, None], self._positions[None]
        seen = key <= query
        if self._keep.first_tokens is not None and self._keep.last_tokens is not None:
            kept = (key < self._keep.first_tokens) | (key > query - self._keep.last_tokens)
            seen &= kept | (query < self._prompt)
        if window is not None:
            seen &= key > query - window
        return seen[None, None]

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values as decode reads them: all tokens of the window run at once."""
        return stored(key, value, self._bits)


HEAD_TOKENS = 256
"""How many tokens' logits to hold at once; a long window over a large vocabulary would not fit the CPU's caches."""


def token_nll(elastic: ElasticModel, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return the NLL [n, t - 1] of every token but the first, in nats and FP32, from last hidden states [n, t, e]."""
    parts = []
    for first in range(0, tokens.shape[1] - 1, HEAD_TOKENS):
        end = min(first + HEAD_TOKENS, tokens.shape[1] - 1)
        logits = elastic.head(hidden[:, first:end]).float()
        target = tokens[:, first + 1 : end + 1]
        loss = functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        parts.append(loss.view(tokens.shape[0], -1))
    return torch.cat(parts, dim=1)


_rounded_copies: WeakKeyDictionary[ElasticModel, dict[tuple[str, int, int, bool], Tensor]] = WeakKeyDictionary()


@contextmanager
def rounded(elastic: ElasticModel, weight_bits: Sequence[int], nested: Sequence[bool] | None = None) -> Iterator[None]:
    """Replace weights by their values rounded to 8 or 4 bits, as ``weight_bits`` [l] says; restore them at the end.

    With ``nested`` [l], half of their bits are read (``hw.elastic.nested``).

    The values are those that the quantized layers of ``ElasticModel.apply`` multiply with, but they are unpacked once
    instead of in every product. No memory is saved.
    """
    full = []
    try:
        for layer, bits in enumerate(weight_bits):
            half = nested is not None and nested[layer]
            if bits == 16 and not half:
                continue
            for kind in KINDS:
                for index, linear in enumerate(elastic.blocks[kind][layer].linears):
                    full.append((linear, linear.weight.data))
                    linear.weight.data = _rounded_weight(elastic, elastic.blocks[kind][layer], index, bits, half)
        yield
    finally:
        for linear, weight in full:
            linear.weight.data = weight


def _rounded_weight(elastic: ElasticModel, block: Block, index: int, bits: int, half: bool) -> Tensor:
    """Return the rounded weight of one linear layer of a block, computed once for each model."""
    copies = _rounded_copies.setdefault(elastic, {})
    key = block.name, index, bits, half
    if key not in copies:
        weight = block.linears[index].weight.data
        if bits == 16:
            matrix = next(one for one in block.matrices if block.linears[index] in one.linears)
            copies[key] = half_of_16(weight) if all(has_half(one.weight.data) for one in matrix.linears) else weight
        else:
            copies[key] = quantize(weight, bits).read(half=half).dequantize(weight.dtype)
    return copies[key]
