"""A prompt computed in full, and the loss of the tokens after it when they read what a method stored of its KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hw.elastic import ops
from hw.elastic.kv_compression.prompt_kv import LayerKV, StoredKV
from hw.elastic.model import ElasticModel, Rope
from hw.score.nll import token_nll
from sim.cost.plan import dense_plan

# Shapes: p tokens of the prompt, c tokens after it, H query heads, h KV heads, d head_dim, e hidden size.


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt after its prefill.

    layers: the KV of each layer. last_hidden: [1, 1, e], of its last token after the last layer.
    """

    layers: list[LayerKV]
    last_hidden: Tensor

    @property
    def tokens(self) -> int:
        """Length of the prompt."""
        return self.layers[0].tokens


class _Recorder:
    """A KVView of a prompt that is computed at once; it remembers the keys and values of each layer."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self._at = torch.arange(tokens, device=device)
        self.kv: list[tuple[Tensor, Tensor]] = []

    def rows(self, layer: int) -> None:
        """All rows run."""

    def mask(self, layer: int, window: int | None) -> Tensor:
        """Return which keys each token sees, bool [1, 1, p, p]."""
        return _causal(self._at, self._at, window)[None, None]

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Remember keys and values [1, h, p, d]."""
        self.kv.append((key[0], value[0]))
        return key, value


def _causal(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Return which keys, by place, queries see."""
    seen = keys[None] <= queries[:, None]
    return seen if window is None else seen & (keys[None] > queries[:, None] - window)


@torch.inference_mode()
def read_prompt(elastic: ElasticModel, tokens: Tensor, queries: int) -> Prompt:
    """Compute a prompt with all blocks at full precision.

    Args:
        tokens: ids [p]. queries: of how many of the last tokens the queries are remembered.
    """
    assert elastic.plan == dense_plan(elastic.spec)
    ids = tokens.to(elastic.device)[None]
    positions = torch.arange(ids.shape[1], device=elastic.device)[None]
    hidden = elastic.embed(ids, positions)
    rope = elastic.rope(hidden, positions)
    view = _Recorder(ids.shape[1], elastic.device)
    layers = []
    for number, layer in enumerate(elastic.layers):
        asked = _queries(elastic, number, hidden[0, -queries:], rope)
        hidden = hidden + elastic.attend(number, hidden, rope, view)
        hidden = hidden + elastic.feed(number, hidden)
        cos, sin = (None, None) if layer.rotation is None else (part[0] for part in rope[layer.rotation])
        keys, values = view.kv[number]
        layers.append(
            LayerKV(
                queries=asked,
                keys=keys,
                values=values,
                scale=layer.scale,
                cos=cos,
                sin=sin,
                window=elastic.windows[number],
            )
        )
    return Prompt(layers, hidden[:, -1:])


def _queries(elastic: ElasticModel, number: int, hidden: Tensor, rope: Rope) -> Tensor:
    """Return the rotated queries [H, n, d] of a layer, of the last n tokens, from their hidden states [n, e]."""
    layer, spec = elastic.layers[number], elastic.spec
    made = layer.qkv(layer.mha_norm(hidden))[:, : spec.num_heads * spec.head_dim]
    found = made.view(len(hidden), spec.num_heads, spec.head_dim)
    if (norm := layer.q_norm) is not None:
        found = ops.rms_norm_reference(found, norm.weight.value, norm.eps, norm.offset)
    if layer.rotation is not None:
        cos, sin = (part[0, -len(hidden) :] for part in rope[layer.rotation])
        found = ops.rotate(found, cos, sin)
    return found.transpose(0, 1)


class _AfterPrompt:
    """A KVView of the tokens after a prompt, all at once: they read what is stored of it, and one another's KV."""

    def __init__(self, prompt: int, new: int, heads: int, stored: Sequence[StoredKV | None], device: torch.device):
        self._keys = torch.arange(prompt + new, device=device)
        self._queries, self._new, self._heads, self._stored = self._keys[prompt:], new, heads, stored

    def rows(self, layer: int) -> None:
        """All rows run."""

    def _of(self, layer: int) -> StoredKV:
        stored = self._stored[layer]
        assert stored is not None
        return stored

    def mask(self, layer: int, window: int | None) -> Tensor:
        """Return which keys each token sees, bool [1, 1 or H, c, p + c]."""
        seen = _causal(self._queries, self._keys, window)[None]
        if (kept := self._of(layer).kept) is not None:
            kept = functional.pad(kept, (0, self._new), value=True)
            seen = seen & kept.repeat_interleave(self._heads // len(kept), 0)[:, None]
        return seen[None]

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Return the stored keys and values, followed by those of the new tokens [1, h, c, d]."""
        stored = self._of(layer)
        return torch.cat((stored.keys[None], key), 2), torch.cat((stored.values[None], value), 2)


@torch.inference_mode()
def continuation_nll(
    elastic: ElasticModel, prompt: Prompt, window: Tensor, stored: Sequence[StoredKV | None]
) -> Tensor:
    """Return the NLL of each token after the prompt, FP32 [c], in nats; arguments as ``continuation``."""
    ids = window.to(elastic.device)[None]
    return token_nll(elastic, continuation(elastic, prompt, window, stored), ids[:, prompt.tokens - 1 :])[0]


@torch.inference_mode()
def continuation(elastic: ElasticModel, prompt: Prompt, window: Tensor, stored: Sequence[StoredKV | None]) -> Tensor:
    """Return the hidden states of the prompt's last token and of those after it, [1, 1 + c, e], after the last layer.

    The first one is that of prefill, whatever is stored. The KV of the tokens after the prompt stays as it is.

    Args:
        window: ids [p + c] that begin with the prompt.
        stored: what is stored of each layer; None where the MHA block does not run after the prompt.
    """
    ids = window.to(elastic.device)[None]
    positions = torch.arange(prompt.tokens, ids.shape[1], device=elastic.device)[None]
    hidden = elastic.embed(ids[:, prompt.tokens :], positions)
    rope = elastic.rope(hidden, positions)
    view = _AfterPrompt(prompt.tokens, positions.shape[1], elastic.spec.num_heads, stored, elastic.device)
    for layer in range(elastic.spec.num_layers):
        if stored[layer] is not None:
            hidden = hidden + elastic.attend(layer, hidden, rope, view)
        hidden = hidden + elastic.feed(layer, hidden)
    return torch.cat((prompt.last_hidden, hidden), 1)
