"""One forward pass over a batch, in this package's own code: no module of transformers runs.

What a block adds to the hidden states waits until the next norm, which adds it in the same operation. So a decode layer
of Llama is nine operations: two norms, four products, rotation, attention and activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hw.elastic import ops
from hw.elastic.hidden_kv import Project
from hw.elastic.layers import Layer, Norm
from hw.elastic.model import ElasticModel, Rope
from sim.cost.plan import KeepMask
from sim.errors import RapLabError

# Shapes: n rows (tokens) of the batch, decodes first; e hidden size, H heads, h KV heads, d head_dim.


class NotANumberError(RapLabError):
    """A block of the model gave values that are not finite."""


class Batch(Protocol):
    """What a pass computes: the tokens of one iteration, and the attention over their KV.

    tokens, positions: of each row, on the device. wanted: rows whose logits count. decodes: how many rows come first
    that are decodes. kv_only: for each layer, whether most tokens of prompts only write their keys and values in it.
    passing: the rows that run all of such a layer: decodes, then last tokens of prompts. known: positions of the tokens
    whose hidden states are stored in place of keys and values; None where none are.
    """

    @property
    def tokens(self) -> Tensor:
        """Token ids [n]."""
        ...

    @property
    def positions(self) -> Tensor:
        """Positions [n]."""
        ...

    @property
    def wanted(self) -> Tensor:
        """Rows whose logits count."""
        ...

    @property
    def decodes(self) -> int:
        """How many of the rows are decodes; they come first."""
        ...

    @property
    def kv_only(self) -> Sequence[bool]:
        """Whether most tokens of prompts only write their keys and values in a layer."""
        ...

    @property
    def passing(self) -> Tensor:
        """Rows that run all of such a layer: the decodes, then the last tokens of the prompts that end."""
        ...

    @property
    def known(self) -> Tensor | None:
        """Positions of the tokens whose hidden states are stored in place of keys and values; None: none are."""
        ...

    def rows(self, layer: int) -> Tensor | None:
        """Return the rows that run a layer's MHA block: None for all, empty for none."""
        ...

    def passing_rows(self, layer: int) -> Tensor | None:
        """Return those of ``rows`` that run all of a layer's MHA block; None if all of them do."""
        ...

    def attend(
        self,
        layer: int,
        qkv: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        *,
        heads: int,
        kv_heads: int,
        scale: float,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        offset: float,
        normed: Tensor | None = None,
        project: Project | None = None,
    ) -> Tensor:
        """Return the attention [n, H d] of the rows that run all of a layer, from the product of all with q, k, v.

        normed: what that product was of, [n, e]. project: gives keys and values of hidden states that are stored.
        """
        ...


class _Hidden:
    """Hidden states [n, e] in two parts: ``total``, and what the last block adds, which the next norm adds to it."""

    def __init__(self, total: Tensor) -> None:
        self._total = total
        self._added: Tensor | None = None

    def normed(self, norm: Norm) -> Tensor:
        """Return the norm of all rows."""
        if self._added is None:
            return norm(self._total)
        normed, self._total = norm.add(self._added, self._total)
        self._added = None
        return normed

    def add(self, added: Tensor) -> None:
        """Add to all rows."""
        self.settle()
        self._added = added

    def settle(self) -> Tensor:
        """Return the hidden states."""
        if self._added is not None:
            self._total = self._total + self._added
            self._added = None
        return self._total

    def normed_rows(self, norm: Norm, rows: Tensor) -> Tensor:
        """Return the norm of some rows alone."""
        if self._added is None:
            return norm(self._total[rows])
        return norm.add(self._added[rows], self._total[rows])[0]


@torch.inference_mode()
def forward(
    elastic: ElasticModel,
    batch: Batch,
    *,
    prefill: KeepMask,
    decode: KeepMask,
    check: bool = False,
    head: bool = True,
) -> Tensor:
    """Run one iteration; return logits [rows wanted, vocabulary].

    Args:
        elastic: the model.
        batch: its rows, and their attention.
        prefill, decode: the blocks that run at each stage; the batch says which rows run which MHA block, and in which
            layers most rows only write KV.
        check: test after every block whether all values are finite, which waits for the device each time.
        head: whether to compute logits; else the input of the head [rows wanted, e] is returned.
    Raises:
        NotANumberError: with ``check``, naming the first block whose output is not finite.
    """
    hidden = _Hidden(elastic.embed(batch.tokens, batch.positions))
    rope = elastic.rotate(batch.positions)
    known = None if batch.known is None else elastic.rotate(batch.known)
    split, count = batch.decodes, len(batch.tokens)
    for index, layer in enumerate(elastic.layers):
        elastic.streams.enter(index)
        if prefill.mha[index] or decode.mha[index]:
            _run_mha(elastic, batch, index, layer, hidden, rope, known)
            if check:
                _check_finite(hidden, f"MHA{index}")
        start = 0 if decode.ffn[index] else split
        stop = (len(batch.passing) if batch.kv_only[index] else count) if prefill.ffn[index] else split
        if batch.kv_only[index]:
            some, total = batch.passing[start:stop], hidden.settle()
            if some.numel():
                total.index_add_(0, some, layer.feed(layer.ffn_norm(total[some])))
        elif stop - start == count:
            hidden.add(layer.feed(hidden.normed(layer.ffn_norm)))
        elif stop > start:
            part = hidden.settle()[start:stop]
            part += layer.feed(layer.ffn_norm(part))
        if check:
            _check_finite(hidden, f"FFN{index}")
        elastic.streams.leave(index)
    normed = hidden.normed_rows(elastic.ends.norm, batch.wanted)
    return elastic.ends.logits(normed) if head else normed


def _run_mha(
    elastic: ElasticModel,
    batch: Batch,
    index: int,
    layer: Layer,
    hidden: _Hidden,
    rope: Rope,
    known: Rope | None,
) -> None:
    """Run the MHA block of a layer on the rows that have its KV.

    known: rotations of the tokens whose hidden states are stored, None where none are.
    """
    rows, passing = batch.rows(index), batch.passing_rows(index)

    def attended(normed: Tensor, own: Rope) -> Tensor:
        return attend(elastic, batch, index, layer, layer.qkv(normed), own, normed, known)

    if passing is not None:
        if rows is None or rows.numel():
            total = hidden.settle()
            some = rope if rows is None else tuple((cos[rows], sin[rows]) for cos, sin in rope)
            out = attended(layer.mha_norm(total if rows is None else total[rows]), some)
            if passing.numel():
                total.index_add_(0, passing, layer.added(layer.out(out), layer.mha_post_norm))
    elif rows is None:
        hidden.add(layer.added(layer.out(attended(hidden.normed(layer.mha_norm), rope)), layer.mha_post_norm))
    elif rows.numel():
        total = hidden.settle()
        some = tuple((cos[rows], sin[rows]) for cos, sin in rope)
        out = attended(layer.mha_norm(total[rows]), some)
        total.index_add_(0, rows, layer.added(layer.out(out), layer.mha_post_norm))


def attend(
    elastic: ElasticModel,
    batch: Batch,
    index: int,
    layer: Layer,
    qkv: Tensor,
    rope: Rope,
    normed: Tensor | None = None,
    known: Rope | None = None,
) -> Tensor:
    """Return the attention [n, H d] of the rows of a layer, from their product with q, k and v.

    normed: what that product was of. known: rotations of the tokens whose hidden states are stored, None for none.
    """
    norm = layer.q_norm
    return batch.attend(
        index,
        qkv,
        None if layer.rotation is None else rope[layer.rotation],
        heads=elastic.spec.num_heads,
        kv_heads=elastic.spec.num_kv_heads,
        scale=layer.scale,
        q_norm=None if norm is None else norm.weight.value,
        k_norm=None if layer.k_norm is None else layer.k_norm.weight.value,
        eps=0.0 if norm is None else norm.eps,
        offset=0.0 if norm is None else norm.offset,
        normed=normed,
        project=None if known is None else _projection(elastic, layer, known),
    )


def _projection(elastic: ElasticModel, layer: Layer, known: Rope) -> Project:
    """Return how a layer computes keys and values of stored hidden states; ``known``: rotations of their positions."""
    kv_heads, head_dim = elastic.spec.num_kv_heads, elastic.spec.head_dim

    def project(normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        both = layer.qkv.last(normed, 2 * kv_heads * head_dim).view(-1, 2 * kv_heads, head_dim)
        key, value = both[:, :kv_heads], both[:, kv_heads:]
        if (norm := layer.k_norm) is not None:
            key = ops.rms_norm_reference(key, norm.weight.value, norm.eps, norm.offset)
        if layer.rotation is not None:
            cos, sin = known[layer.rotation]
            key = ops.rotate(key, cos[positions], sin[positions])
        return key, value

    return project


def all_finite(values: Tensor) -> Tensor:
    """Return whether all values are finite, as a tensor: their sum is not if one of them is not.

    One pass over the values instead of four; a sum of finite logits is far from the largest number of FP32.
    """
    return torch.isfinite(values.sum(dtype=torch.float32))


def _check_finite(hidden: _Hidden, block: str) -> None:
    if not bool(torch.isfinite(hidden.settle()).all()):
        raise NotANumberError(block)
