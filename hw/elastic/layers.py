"""The layers of a real model as its own code computes them: norms, and matrices that are one product each.

The weights of q, k and v lie in one tensor, one after another, and so do those of gate and up. The parameters of the
Hugging Face modules are views of them, so both ways to compute a layer read the same memory, which counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hw.elastic import ops
from hw.elastic.families import Family, find_part, sliding_window
from hw.elastic.nested import has_half
from hw.elastic.quantize import ElasticLinear, QuantWeight
from sim.cost.model_spec import QUANT_GROUP_ELEMENTS
from sim.errors import ModelError

# Shapes: n rows (tokens), e hidden size, f FFN size, o outputs and i inputs of a matrix, H heads, h KV heads,
# d head_dim.


class Rows:
    """One tensor that holds the values of some parameters, one after another; the parameters are views of it.

    value: [sum of o, ...]; empty while the values are not resident.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, copy: bool = True) -> None:
        """Copy the values of parameters into one tensor; without ``copy``, take that of the only one."""
        self.parameters = tuple(parameters)
        self._sizes = [len(parameter) for parameter in parameters]
        for parameter in parameters:
            parameter.requires_grad_(False)
        # Always a copy: a parameter may be a view into the mapped checkpoint, all of which it would keep in memory.
        self.value: Tensor
        self.set(torch.cat([parameter.data for parameter in parameters]) if copy else parameters[0].data)

    @property
    def nbytes(self) -> int:
        """Bytes of the resident values."""
        return self.value.nbytes

    def resize(self, sizes: Sequence[int]) -> None:
        """Let each parameter have this many rows in the next tensor."""
        self._sizes = list(sizes)

    def set(self, value: Tensor) -> None:
        """Take the values of a tensor of the expected shape, without a copy."""
        self.value = value
        for parameter, part in zip(self.parameters, torch.split(value, self._sizes), strict=True):
            parameter.data = part

    def free(self) -> None:
        """Free the values."""
        self.value = self.value.new_empty(0)
        for parameter in self.parameters:
            parameter.data = self.value


class Matrix:
    """The weights of linear layers with the same input, as one product.

    shape: outputs of all linear layers, and inputs. weight: [o, i]; empty while quantized or absent. bias: [o].
    quantized: the weights at 8 or 4 bits, while those are resident. half: whether half of the bits are wanted.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        """Take over the parameters of linear layers.

        Raises:
            ModelError: if rows of a quantized copy would not begin at full bytes.
        """
        self.linears: list[ElasticLinear] = []
        for linear in linears:
            linear.__class__ = ElasticLinear  # in place, so that the model keeps its module tree
            assert isinstance(linear, ElasticLinear)
            self.linears.append(linear)
        outputs, inputs = [linear.out_features for linear in self.linears], self.linears[0].in_features
        self.shape = sum(outputs), inputs
        groups = -(-inputs // QUANT_GROUP_ELEMENTS)
        if len(linears) > 1 and any(count * inputs % 2 or count * groups % 2 for count in outputs):
            raise ModelError(
                f"matrices of {outputs} x {inputs} values are not supported; each must have an even number of rows"
            )
        weights: list[Any] = [linear.weight for linear in self.linears]
        self.weight = Rows(weights)
        biases: list[Any] = [linear.bias for linear in self.linears if linear.bias is not None]
        assert len(biases) in (0, len(linears))
        self.bias = Rows(biases) if biases else None
        self.quantized: QuantWeight | None = None
        self.half = False
        self._has_half: bool | None = None  # of the weight at 16 bits, once that is known

    def resize(self, outputs: Sequence[int], inputs: int) -> None:
        """Let each linear layer have this many outputs, and this many inputs, in the next weights and biases."""
        for linear, count in zip(self.linears, outputs, strict=True):
            linear.out_features, linear.in_features = count, inputs
        self.shape = sum(outputs), inputs
        self.weight.resize(outputs)
        if self.bias is not None:
            self.bias.resize(outputs)
        self._has_half = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The resident weights as they are stored: one tensor, or those of a quantized copy."""
        return (self.weight.value,) if self.quantized is None else self.quantized.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of the resident weights, without the bias."""
        return self.weight.nbytes + (self.quantized.nbytes if self.quantized is not None else 0)

    def quantize(self, copy: QuantWeight) -> None:
        """Take the weights of a copy at 8 or 4 bits."""
        self.quantized = copy = copy.read(half=self.half)
        first = 0
        for linear in self.linears:
            linear.quantized = copy.rows(first, first + linear.out_features)
            first += linear.out_features

    def read(self, *, half: bool) -> None:
        """Read half of the bits of the resident weights from now on, or all; 4 bits have no half.

        Linear layers of which one has weights that 8 bits do not hold are read at all of 16, as in NestedFP.
        """
        self.half = half
        if self.quantized is not None:
            self.quantize(self.quantized)
        elif half and self._has_half is None and self.weight.nbytes:
            self._has_half = has_half(self.weight.value)
        for linear in self.linears:
            linear.reads_half = half and bool(self._has_half)

    def free(self) -> None:
        """Free the weights at every precision, but not the bias."""
        self.weight.free()
        self.quantized = None
        for linear in self.linears:
            linear.quantized = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product [n, o] of x [n, i] with the resident weights, plus the bias."""
        bias = None if self.bias is None else self.bias.value
        if self.quantized is not None:
            return ops.quantized_linear(x, self.quantized, bias)
        if self.half and self._has_half:
            return ops.half_linear(x, self.weight.value, bias)
        return functional.linear(x, self.weight.value, bias)

    def last(self, x: Tensor, count: int) -> Tensor:
        """Return the last ``count`` columns of the product, computed alone."""
        first = self.shape[0] - count
        bias = None if self.bias is None else self.bias.value[first:]
        if self.quantized is not None:
            return ops.quantized_linear(x, self.quantized.rows(first, first + count), bias)
        if self.half and self._has_half:
            return ops.half_linear(x, self.weight.value[first:], bias)
        return functional.linear(x, self.weight.value[first:], bias)


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm, or a layer norm where there is a bias. offset: what is added to the weight (Gemma's is 1)."""

    weight: Rows
    bias: Rows | None
    eps: float
    offset: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of every row of x [n, e]."""
        if self.bias is not None:
            return functional.layer_norm(x, x.shape[-1:], self.weight.value, self.bias.value, self.eps)
        return ops.rms_norm(x, self.weight.value, self.eps, self.offset)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of residual + x, and that sum."""
        if self.bias is not None:
            total = residual + x
            return self(total), total
        return ops.add_rms_norm(x, residual, self.weight.value, self.eps, self.offset)

    @property
    def parts(self) -> tuple[Rows, ...]:
        """The tensors of the norm."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


Activation = Callable[[Tensor], Tensor]
"""From the product with gate and up [n, 2 f], or with up alone [n, f], to the input of the last product [n, f]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer: an MHA block and an FFN block.

    qkv: q, k and v. up: gate and up, or up alone. q_norm, k_norm: norms of each head. mha_post_norm, ffn_post_norm:
    norms of what a block adds. multiplier: of what a block adds. scale: of the attention scores.
    rotation: which of the model's rotations q and k get; None for none.
    window: how many tokens back the attention looks; None for all.
    """

    mha_norm: Norm
    qkv: Matrix
    q_norm: Norm | None
    k_norm: Norm | None
    out: Matrix
    mha_post_norm: Norm | None
    ffn_norm: Norm
    up: Matrix
    activation: Activation
    down: Matrix
    ffn_post_norm: Norm | None
    multiplier: float
    scale: float
    rotation: int | None
    window: int | None

    def added(self, output: Tensor, post_norm: Norm | None) -> Tensor:
        """Return what a block adds to the hidden states, from the output of its last product."""
        if post_norm is not None:
            output = post_norm(output)
        return output if self.multiplier == 1.0 else output * self.multiplier

    def attend(self, normed: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what the MHA block adds, from normed hidden states [n, e].

        ``attention`` gets the product with q, k and v [n, (H + 2 h) d] and returns the attention [n, H d].
        """
        return self.added(self.out(attention(self.qkv(normed))), self.mha_post_norm)

    def feed(self, normed: Tensor) -> Tensor:
        """Return what the FFN block adds, from normed hidden states [n, e]."""
        return self.added(self.down(self.activation(self.up(normed))), self.ffn_post_norm)

    @property
    def mha_parts(self) -> tuple[list[Matrix], list[Rows]]:
        """The matrices of the MHA block, and its other tensors."""
        return _parts([self.qkv, self.out], (self.mha_norm, self.q_norm, self.k_norm, self.mha_post_norm))

    @property
    def ffn_parts(self) -> tuple[list[Matrix], list[Rows]]:
        """The matrices of the FFN block, and its other tensors."""
        return _parts([self.up, self.down], (self.ffn_norm, self.ffn_post_norm))


def _parts(matrices: list[Matrix], norms: Iterable[Norm | None]) -> tuple[list[Matrix], list[Rows]]:
    rest = [part for norm in norms if norm is not None for part in norm.parts]
    return matrices, rest + [matrix.bias for matrix in matrices if matrix.bias is not None]


def read_layer(module: Any, family: Family, config: Any, index: int) -> Layer:
    """Return a layer over the parameters of a layer of transformers, which become views.

    Raises:
        ModelError: if the layer has parts that the family does not have.
    """
    attention = find_part(module, family.attention, config.model_type)

    def part(path: str) -> Any:
        return find_part(module, path, config.model_type)

    def norm(path: str | None) -> Norm | None:
        return None if path is None else _norm(part(path), family)

    layer = Layer(
        mha_norm=_norm(part(family.mha_norm), family),
        qkv=Matrix([part(f"{family.attention}.{name}") for name in family.qkv]),
        q_norm=norm(f"{family.attention}.q_norm" if hasattr(attention, "q_norm") else None),
        k_norm=norm(f"{family.attention}.k_norm" if hasattr(attention, "k_norm") else None),
        out=Matrix([part(f"{family.attention}.{family.out}")]),
        mha_post_norm=norm(family.mha_post_norm),
        ffn_norm=_norm(part(family.ffn_norm), family),
        up=Matrix([part(name) for name in family.up]),
        activation=find_activation(getattr(config, family.activation), gated=family.gated),
        down=Matrix([part(family.down)]),
        ffn_post_norm=norm(family.ffn_post_norm),
        multiplier=float(config.residual_multiplier) if family.multipliers else 1.0,
        scale=float(attention.scaling),
        rotation=_rotation(attention, config, index),
        window=sliding_window(config, index),
    )
    known = {id(parameter) for rows in _all_rows(layer) for parameter in rows.parameters}
    if unknown := [name for name, parameter in module.named_parameters() if id(parameter) not in known]:
        raise ModelError(
            f"layer {index} of this {config.model_type} model has {unknown[0]!r}, which is not supported: the layers "
            "of transformers 5 have no such part"
        )
    return layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """What comes before the first layer and after the last: embeddings, final norm and head.

    positions: learned positions, whose first rows come before position 0; None for none.
    scale: of the embeddings, rounded as the model's class rounds it. divisor: of the logits.
    """

    tokens: nn.Parameter
    positions: nn.Parameter | None
    rows_before: int
    scale: float
    norm: Norm
    head: nn.Parameter
    divisor: float

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the hidden states [..., e] of tokens at positions, both [...]."""
        hidden = functional.embedding(tokens, self.tokens)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        if self.positions is not None:
            hidden = hidden + functional.embedding(positions + self.rows_before, self.positions)
        return hidden

    def logits(self, normed: Tensor) -> Tensor:
        """Return the logits [n, vocabulary] of hidden states after the final norm."""
        logits = functional.linear(normed, self.head)
        return logits if self.divisor == 1.0 else logits / self.divisor


def read_ends(model: Any, stack: Any, norm: Any, family: Family) -> Ends:
    """Return the ends of a model of transformers; they keep the parameters of its modules."""
    embeddings, learned = stack.embed_tokens, getattr(stack, "embed_positions", None)
    scale = getattr(embeddings, "scalar_embed_scale", 1.0)  # Gemma 3 rounds it to the dtype of the weights
    return Ends(
        tokens=embeddings.weight,
        positions=None if learned is None else learned.weight,
        rows_before=0 if learned is None else int(learned.offset),
        scale=(
            float(model.config.embedding_multiplier)
            if family.multipliers
            else float(torch.tensor(scale, dtype=embeddings.weight.dtype))
        ),
        norm=_norm(norm, family),
        head=model.lm_head.weight,
        divisor=float(model.config.logits_scaling) if family.multipliers else 1.0,
    )


def _norm(module: Any, family: Family) -> Norm:
    bias = getattr(module, "bias", None)
    eps = getattr(module, "variance_epsilon", None)
    return Norm(
        weight=Rows([module.weight]),
        bias=None if bias is None else Rows([bias]),
        eps=float(module.eps if eps is None else eps),
        offset=family.norm_offset,
    )


def _all_rows(layer: Layer) -> Iterable[Rows]:
    for matrices, rest in (layer.mha_parts, layer.ffn_parts):
        yield from (matrix.weight for matrix in matrices)
        yield from rest


def _rotation(attention: Any, config: Any, index: int) -> int | None:
    """Return which rotation a layer applies: None for one without, else its place in ``rotation.find_rotations``."""
    if config.model_type == "opt" or not getattr(attention, "use_rope", True):  # SmolLM3 has layers without
        return None
    if config.model_type == "gemma3_text":
        return sorted(set(config.layer_types)).index(config.layer_types[index])
    return 0


def find_activation(name: str, *, gated: bool) -> Activation:
    """Return the activation with this name in a Hugging Face config."""
    own = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}.get(name)
    if gated and own is not None:
        return lambda gate_up: ops.gated(gate_up, own)
    if name == "relu" and not gated:
        return functional.relu
    from transformers.activations import ACT2FN

    function: Activation = ACT2FN[name]
    if not gated:
        return function

    def apply(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return function(gate) * up

    return apply
