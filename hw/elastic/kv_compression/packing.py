"""How the compressed KV of a prompt lies in the first token slots of a layer, and how attention reads it.

    packed, keys, values = pack(way, layer)         # what the slots hold in place of keys and of values
    read = packed.read(keys, values)                # keys and values as attention sees them

A prompt of p tokens at P percent takes s = ceil(P p / 100) slots in every layer, which the simulator counts. A slot has
room for the keys and the values of one token, so s slots have room for 2 s h d numbers:

* Ada-KV: s h tokens of heads, one head after another, each in the place of one head of a slot. Heads keep different
  numbers of tokens.
* ReFreeKV: the same, with the same tokens in every head: the first 4 and the last ones. The percent takes the place of
  its threshold, which would give every layer a number of its own.
* ThinK: all values, then the keys of the last tokens, then the channels that stay of all other keys.
* LoRC: the coefficients of keys, then those of values, of the first P percent of the directions in every layer.

What it takes to read them is small, lies outside of the slots and is not counted: ``PackedKV.nbytes`` for a layer of a
prompt, and LoRC's directions for all prompts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hw.elastic.kv_compression import ada_kv, refree_kv, think
from hw.elastic.kv_compression.lorc import Directions, coefficients, from_coefficients, turned, turned_back
from hw.elastic.kv_compression.prompt_kv import LayerKV
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KVCompression, Plan, describe
from sim.errors import PlanError

# Shapes: h KV heads, p tokens of the prompt, s slots, w tokens that are read of each head, d head_dim, r directions.

OBSERVED = {"ada_kv": ada_kv.QUERIES, "think": think.QUERIES}
"""Of how many of a prompt's last tokens a method observes the queries, at most; the others observe none."""

Angles = Callable[[int], tuple[Tensor | None, Tensor | None]]
"""From a number of tokens p to the cosines and sines [p, d_rot] of a layer's rotation; None without one."""


@dataclass(frozen=True, slots=True)
class PromptRead:
    """What attention reads of a prompt.

    keys, values: [h, w, d]. seen: bool [h, w], which of them are tokens that the head keeps; None for all. positions:
    [h, w] or [w], places in the prompt; None where they are not known and not needed.
    """

    keys: Tensor
    values: Tensor
    seen: Tensor | None = None
    positions: Tensor | None = None


class PackedKV(ABC):
    """How a layer of a prompt is packed. slots: the token slots that it takes. tokens: those of the prompt."""

    slots: int
    tokens: int

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes on the device that it takes to read the slots, of this layer of this prompt."""

    @abstractmethod
    def read(self, keys: Tensor, values: Tensor) -> PromptRead:
        """Return what attention reads, from what the slots hold in place of keys and of values, [s, h, d] each."""


@dataclass(frozen=True, slots=True)
class PackedTokens(PackedKV):
    """Tokens of heads, one head after another.

    starts, counts: int64 [h, 1], where each head's tokens begin, and how many there are. width: the most of them.
    positions: int32 [s h], places in the prompt; None in a layer that looks back to the first token.
    """

    slots: int
    tokens: int
    starts: Tensor
    counts: Tensor
    width: int
    positions: Tensor | None

    @property
    def nbytes(self) -> int:
        """Two numbers for each head, and with a sliding window one for each token."""
        return self.starts.nbytes + self.counts.nbytes + (0 if self.positions is None else self.positions.nbytes)

    def read(self, keys: Tensor, values: Tensor) -> PromptRead:
        """Return the tokens of each head, and those of others behind them, which it does not see."""
        count, head_dim = self.slots * keys.shape[1], keys.shape[2]
        at = torch.arange(self.width, device=keys.device)[None]
        places = (self.starts + at).clamp_(max=count - 1)
        keys, values = (part.reshape(count, head_dim)[places] for part in (keys, values))
        positions = None if self.positions is None else self.positions[places]
        return PromptRead(keys, values, at < self.counts, positions)


@dataclass(frozen=True, slots=True)
class PackedChannels(PackedKV):
    """All values, and keys without some channels.

    kept: int64 [h, 1, channels], those that stay. recent: last tokens with all channels.
    """

    slots: int
    tokens: int
    kept: Tensor
    recent: int

    @property
    def nbytes(self) -> int:
        """A number for each channel that stays."""
        return self.kept.nbytes

    def read(self, keys: Tensor, values: Tensor) -> PromptRead:
        """Return all values, and the keys with zeros in dropped channels: queries do not see these."""
        heads, head_dim = keys.shape[1:]
        earlier, kept = self.tokens - self.recent, self.kept.shape[2]
        sizes = [heads * self.tokens * head_dim, heads * self.recent * head_dim, heads * earlier * kept]
        numbers = torch.cat((keys.flatten(), values.flatten()))[: sum(sizes)]
        all_values, last, first = torch.split(numbers, sizes)
        read = keys.new_zeros(heads, self.tokens, head_dim)
        read[:, earlier:] = last.view(heads, self.recent, head_dim)
        read[:, :earlier].scatter_(2, self.kept.expand(-1, earlier, -1), first.view(heads, earlier, kept))
        return PromptRead(read, all_values.view(heads, self.tokens, head_dim))


@dataclass(frozen=True, slots=True)
class PackedDirections(PackedKV):
    """Coefficients of keys before their rotation, and of values.

    keys, values: the directions. angles: of the rotation.
    """

    slots: int
    tokens: int
    keys: Directions
    values: Directions
    angles: Angles

    @property
    def nbytes(self) -> int:
        """Nothing: the directions are those of all prompts."""
        return 0

    def read(self, keys: Tensor, values: Tensor) -> PromptRead:
        """Return the keys and values that the coefficients stand for."""
        size = self.tokens * self.keys.count
        numbers = torch.cat((keys.flatten(), values.flatten()))[: 2 * size]
        of_keys, of_values = numbers.view(2, self.tokens, self.keys.count)
        before = from_coefficients(of_keys, self.keys, keys.shape[2])
        made = from_coefficients(of_values, self.values, keys.shape[2])
        return PromptRead(turned(before, *self.angles(self.tokens)).to(keys.dtype), made.to(keys.dtype))


def pack(
    way: KVCompression,
    layer: LayerKV,
    directions: tuple[Directions, Directions] | None = None,
    angles: Angles | None = None,
) -> tuple[PackedKV, Tensor, Tensor]:
    """Compress a layer's KV of a prompt; return how it lies, and what its slots hold, [s, h, d] each.

    Args:
        way: the method, and the percent that stays, of which this must save a token at least.
        directions, angles: of the layer's keys and values, and of its rotation, for LoRC.
    """
    stored = layer.tokens - way.saved_tokens(layer.tokens)
    assert stored < layer.tokens
    if way.method == "think":
        return _pack_channels(layer, stored)
    if way.method == "lorc":
        assert directions is not None
        assert angles is not None
        return _pack_directions(layer, stored, directions, angles)
    return _pack_tokens(layer, stored, kept_in(way, layer))


def kept_in(way: KVCompression, layer: LayerKV) -> Tensor:
    """Return which tokens each head keeps, bool [h, p], of a method that chooses tokens."""
    stored = layer.tokens - way.saved_tokens(layer.tokens)
    if way.method == "ada_kv":
        queries = min(ada_kv.observed_tokens(stored), layer.queries.shape[1])
        return ada_kv.chosen(layer, stored * layer.heads, queries)
    assert way.method == "refree_kv"
    first = min(refree_kv.FIRST, stored - 1)  # the last token always stays
    kept = refree_kv.kept_places(layer.tokens, layer.tokens - stored, first)
    return kept.to(layer.keys.device).expand(layer.heads, -1)


def _pack_tokens(layer: LayerKV, stored: int, kept: Tensor) -> tuple[PackedKV, Tensor, Tensor]:
    heads, tokens, head_dim = layer.keys.shape
    # A stable sort puts the kept ones first, in their order; to list them would stop the host.
    order = kept.flatten().to(torch.uint8).argsort(descending=True, stable=True)[: stored * heads]
    counts = kept.sum(1, keepdim=True)
    packed = PackedTokens(
        slots=stored,
        tokens=tokens,
        starts=counts.cumsum(0) - counts,
        counts=counts,
        width=int(counts.max()),
        positions=None if layer.window is None else (order % tokens).to(torch.int32),
    )
    keys, values = (part.reshape(heads * tokens, head_dim)[order] for part in (layer.keys, layer.values))
    return packed, keys.view(stored, heads, head_dim), values.view(stored, heads, head_dim)


def _pack_channels(layer: LayerKV, stored: int) -> tuple[PackedKV, Tensor, Tensor]:
    _, tokens, head_dim = layer.keys.shape
    count, recent = think.channels_that_fit(tokens, stored, head_dim)
    gone = think.unused_channels(layer, count)
    kept = gone.to(torch.uint8).argsort(dim=-1, stable=True)[:, None, : head_dim - count]
    earlier = layer.keys[:, : tokens - recent].gather(2, kept.expand(-1, tokens - recent, -1))
    numbers = torch.cat([part.flatten() for part in (layer.values, layer.keys[:, tokens - recent :], earlier)])
    return PackedChannels(stored, tokens, kept, recent), *_filled(numbers, layer, stored)


def _pack_directions(
    layer: LayerKV, stored: int, directions: tuple[Directions, Directions], angles: Angles
) -> tuple[PackedKV, Tensor, Tensor]:
    of_keys, of_values = directions
    before = turned_back(layer.keys, *angles(layer.tokens))
    numbers = torch.cat(
        [
            coefficients(vectors, along, along.count).flatten()
            for vectors, along in ((before, of_keys), (layer.values, of_values))
        ]
    ).to(layer.keys.dtype)
    return PackedDirections(stored, layer.tokens, of_keys, of_values, angles), *_filled(numbers, layer, stored)


def _filled(numbers: Tensor, layer: LayerKV, stored: int) -> tuple[Tensor, Tensor]:
    """Return numbers [n], and zeros behind them, as what slots hold in place of keys and of values."""
    heads, _, head_dim = layer.keys.shape
    both = numbers.new_zeros(2, stored, heads, head_dim)
    both.view(-1)[: len(numbers)] = numbers
    return both[0], both[1]


# --- What the real engine can compress


def kept_directions(model: ModelSpec, way: KVCompression) -> int:
    """Return how many directions LoRC keeps of the keys, and of the values, in every layer."""
    numbers = model.num_kv_heads * model.head_dim
    return min(numbers * way.percent // 100, model.hidden_size)


def check_compression(model: ModelSpec, plan: Plan, *, normed_keys: bool, directions: int | None = None) -> None:
    """Check that the real engine can compress KV as a plan says.

    Args:
        normed_keys: whether the model normalizes its keys. directions: how many the engine has found of each weight;
            None: it can still find them.
    Raises:
        PlanError: if it cannot.
    """
    way = plan.kv_compression
    if way is None:
        return
    if way.method in ("think", "lorc") and set(plan.kv_bits) != {16}:
        raise PlanError(
            f"the real engine cannot compress KV by {way.method} and store it at fewer bits ({describe(plan)!r}): at "
            "fewer bits each key and value of a head has a scale, and this method stores no such keys; leave kv_bits "
            "at 16, or compress by ada_kv or refree_kv, or simulate the plan"
        )
    if way.method != "lorc":
        return
    if normed_keys:
        raise PlanError(
            f"the real engine cannot compress KV by lorc here: {model.name} normalizes its keys, which are then no "
            "product with a weight; compress by ada_kv, think or refree_kv, or simulate the plan"
        )
    wanted = kept_directions(model, way)
    if not wanted:
        raise PlanError(
            f"lorc keeps no direction of {model.num_kv_heads * model.head_dim} at {way.percent} percent; keep at least "
            f"{-(-100 // (model.num_kv_heads * model.head_dim))} percent"
        )
    if directions is not None and directions < wanted:
        raise PlanError(
            f"this real engine has found {directions} directions of the key and value weights for lorc, and "
            f"{way.percent} percent take {wanted}; it finds them when it starts, for its first plan and those that its "
            f"policy lists. Start with such a plan (policy=fixed policy.kv_method=lorc "
            f"policy.kv_percent={way.percent}), or simulate it"
        )
