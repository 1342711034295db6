"""Bytes that a plan needs: weights at each precision, KV cache, workspace, and the KV blocks that a budget holds.

Pure functions; bytes are exact integers. The memory of a replica has four parts:

    budget  =  resident weights  +  workspace (activations, CUDA graphs, fragmentation)  +  KV pool  +  remainder

The KV pool is counted in layer blocks. A layer block is one KV block (``kv_block_tokens`` tokens) of one MHA block,
because plans drop layers one by one, and layers may keep different tokens. A request of T tokens holds
``kv_blocks(T, kv_block_tokens)`` layer blocks in every layer whose MHA block it uses.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

from sim.cost.ffn_width import FULL_WIDTH, narrowed
from sim.cost.model_spec import QUANT_GROUP_ELEMENTS, Linear, ModelSpec
from sim.cost.plan import WEIGHT_BITS, KeepMask, Plan, check_layers, check_plan, keep_all
from sim.cost.quantization import Quantization
from sim.cost.streaming import held_bytes
from sim.errors import BudgetError, PlanError, nearest

QUANT_SCALE_BYTES = 2

Stage = Literal["both", "prefill", "decode"]
"""The part of a request that a replica serves: both stages, or one (disaggregated serving)."""

STAGES: tuple[Stage, ...] = ("both", "prefill", "decode")


# --- Weights ---------------------------------------------------------------------------------------------------------


def linear_weight_bytes(model: ModelSpec, linear: Linear, bits: int) -> int:
    """Return the bytes of one linear layer at 16, 8 or 4 bits; its bias keeps the model's precision.

    16 bits means unquantized: ``weight_dtype_bytes`` per weight, which is 4 for an FP32 checkpoint. A quantized
    checkpoint has no 16 bits; at its own bits a layer takes the bytes that ``model.quantization`` states.
    With g = ceil(in / 128) groups of input elements per output row:

        8 bits:  in * out  +  2 * g * out                             int8 weights, FP16 scales, symmetric
        4 bits:  in * out / 2  +  2 * g * out  +  g * out / 2         and a packed 4-bit zero point per group

    Each quotient is rounded up to a full byte. Group indices (GPTQ's g_idx with activation order) are not counted.

    Raises:
        PlanError: for another number of bits, or more than a quantized checkpoint has.
    Source:
        AWQ's WQLinear_GEMM (qweight, qzeros: int32 with eight 4-bit values; scales: FP16) and GPTQ with group size
        128, the default of both. Exactly equal to theirs if ``out`` is a multiple of 8.
    """
    if model.quantization is not None and bits >= model.weight_bits:
        return _stored_bytes(model, model.quantization, linear, bits)
    weights = linear.in_features * linear.out_features
    bias = linear.out_features * model.weight_dtype_bytes if linear.bias else 0
    groups = -(-linear.in_features // QUANT_GROUP_ELEMENTS) * linear.out_features
    if bits == 16:
        return weights * model.weight_dtype_bytes + bias
    if bits == 8:
        return weights + groups * QUANT_SCALE_BYTES + bias
    if bits == 4:
        return -(-weights // 2) + groups * QUANT_SCALE_BYTES + -(-groups // 2) + bias
    raise PlanError(f"weights of {bits} bits are not supported; allowed are {', '.join(map(str, WEIGHT_BITS))}")


def _stored_bytes(model: ModelSpec, stored: Quantization, linear: Linear, bits: int) -> int:
    """Return the bytes of one linear layer of a quantized checkpoint as it is stored."""
    if bits != stored.bits:
        raise PlanError(
            f"{model.name} holds {stored.bits}-bit weights ({stored.method}), so a plan cannot run them at {bits} bits"
        )
    bias = linear.out_features * model.weight_dtype_bytes if linear.bias else 0
    return stored.weight_bytes(linear.in_features, linear.out_features) + bias


@functools.cache  # called for every layer at each plan change
def mha_weight_bytes(model: ModelSpec, bits: int | None = None) -> int:
    """Return the bytes of one MHA block's weights, norms included; norms and biases are never quantized.

    Without ``bits`` the weights are those of the checkpoint.
    """
    bits = model.weight_bits if bits is None else bits
    linears = model.mha_linears
    norms = model.mha_params - sum(linear.params for linear in linears)
    return sum(linear_weight_bytes(model, linear, bits) for linear in linears) + norms * model.weight_dtype_bytes


@functools.cache
def ffn_weight_bytes(model: ModelSpec, bits: int | None = None, width: int = FULL_WIDTH) -> int:
    """Return the bytes of one FFN block's weights, norm included; ``bits`` as in ``mha_weight_bytes``.

    At a width below 8 eighths the block has fewer channels, and the constant that replaces the others: a bias of the
    down projection, which is never quantized.
    """
    bits = model.weight_bits if bits is None else bits
    narrow = narrowed(model, width)
    linears = narrow.ffn_linears
    others = narrow.ffn_params - sum(linear.params for linear in linears)
    if narrow is not model and not model.ffn_bias:
        others += model.hidden_size
    return sum(linear_weight_bytes(model, linear, bits) for linear in linears) + others * model.weight_dtype_bytes


def layer_weight_bytes(model: ModelSpec, bits: int | None = None) -> int:
    """Return the bytes of one full layer, which MorphServe swaps in one action (arXiv 2506.02006)."""
    return mha_weight_bytes(model, bits) + ffn_weight_bytes(model, bits)


def fixed_weight_bytes(model: ModelSpec) -> int:
    """Return the bytes of embeddings, positions, final norm and head, which every plan holds at full precision."""
    return model.fixed_params * model.weight_dtype_bytes


def resident_mask(plan: Plan, stage: Stage = "both") -> KeepMask:
    """Return the blocks whose weights a replica of this stage must hold.

    A replica for both stages holds what prefill runs, which contains what decode runs (PDTrim's nesting,
    ``sim.cost.plan.check_plan``); a decode-only replica holds what decode runs.

    Raises:
        PlanError: for an unknown stage.
    """
    if stage not in STAGES:
        raise PlanError(f"unknown stage {stage!r}; {nearest(stage, STAGES)}")
    return plan.decode if stage == "decode" else plan.prefill


def weight_bytes(model: ModelSpec, plan: Plan, stage: Stage = "both") -> int:
    """Return the bytes of the weights that must be resident to run ``plan``, each layer at its own precision.

    Streamed layers are not resident; together they need the room of two (``sim.cost.streaming``).

    Args:
        model: the unpruned architecture.
        plan: a legal plan for it.
        stage: what the replica serves.
    Raises:
        PlanError: if the plan is not legal for the model.
    """
    check_plan(model, plan)
    keep = resident_mask(plan, stage)
    mha = {bits: mha_weight_bytes(model, bits) for bits in set(plan.weight_bits)}
    forms = list(zip(plan.weight_bits, plan.ffn_width, strict=True))
    ffn = {form: ffn_weight_bytes(model, *form) for form in set(forms)}
    layers = [
        mha[form[0]] * kept_mha + ffn[form] * kept_ffn
        for form, kept_mha, kept_ffn in zip(forms, keep.mha, keep.ffn, strict=True)
    ]
    return fixed_weight_bytes(model) + held_bytes(layers, plan.streamed)


# --- KV cache --------------------------------------------------------------------------------------------------------


def kv_bytes_per_token(model: ModelSpec, keep: KeepMask) -> int:
    """Return the bytes of KV cache that one token holds, prompt or generated.

    Only kept MHA blocks write keys and values; pruning an FFN block frees weights but no KV.

    Raises:
        PlanError: if the mask does not have one entry per layer.
    Source:
        Kwon et al., PagedAttention (SOSP 2023), section 3; num_kv_heads extends it to GQA.
    """
    check_layers(model, keep)
    return sum(keep.mha) * model.kv_bytes_per_token_layer


def kv_block_layer_bytes(model: ModelSpec, kv_block_tokens: int) -> int:
    """Return the bytes of one KV block of one MHA block: the unit of a KV pool."""
    _at_least(1, kv_block_tokens=kv_block_tokens)
    return kv_block_tokens * model.kv_bytes_per_token_layer


def kv_blocks(tokens: int, kv_block_tokens: int) -> int:
    """Return the number of KV blocks that ``tokens`` tokens hold in one layer; the last may be partly filled."""
    if tokens < 0 or kv_block_tokens < 1:  # engines call this for every request in every iteration
        _at_least(0, tokens=tokens)
        _at_least(1, kv_block_tokens=kv_block_tokens)
    return -(-tokens // kv_block_tokens)


def kv_pool_layer_blocks(
    model: ModelSpec,
    plan: Plan,
    budget_bytes: int,
    workspace_bytes: int,
    kv_block_tokens: int,
    stage: Stage = "both",
) -> int:
    """Return the number of layer blocks in the KV pool, what the budget leaves after weights and workspace; at least 0.

        (budget - resident weights - workspace) // bytes of one KV block of one layer

    If every layer keeps all tokens, a pool of n layer blocks holds n // (kept MHA blocks) KV blocks over all layers.

    Raises:
        PlanError: if the plan is not legal for the model.
    """
    left_bytes = budget_bytes - weight_bytes(model, plan, stage) - workspace_bytes
    return max(0, left_bytes // kv_block_layer_bytes(model, kv_block_tokens))


def budget_for_kv_blocks(
    model: ModelSpec,
    plan: Plan,
    num_kv_blocks: int,
    workspace_bytes: int,
    kv_block_tokens: int,
    stage: Stage = "both",
) -> int:
    """Return the smallest budget, in bytes, whose pool holds ``num_kv_blocks`` KV blocks in every kept MHA block.

    For configurations that state a published engine's capacity over all layers, as vLLM's num_gpu_blocks does; one such
    block equals one layer block per kept MHA block. Use the dense plan for an unpruned engine's count.
    ``kv_pool_layer_blocks`` of the result is exactly num_kv_blocks * kept MHA blocks.

    Raises:
        PlanError: if the plan is not legal for the model.
    """
    _at_least(0, num_kv_blocks=num_kv_blocks, workspace_bytes=workspace_bytes)
    layer_blocks = num_kv_blocks * sum(resident_mask(plan, stage).mha)
    kv_bytes = layer_blocks * kv_block_layer_bytes(model, kv_block_tokens)
    return weight_bytes(model, plan, stage) + workspace_bytes + kv_bytes


# --- The workspace of a pass ------------------------------------------------------------------------------------------

LOGIT_BYTES = 64 << 20
"""Logits of one part: an engine computes those of more sequences in several parts."""
SAMPLED_LOGITS, SAMPLED_LOGIT_BYTES = 1 << 21, 40
"""Logits that are sampled together, and what each takes for that."""


def logit_rows(model: ModelSpec) -> int:
    """Return how many sequences have their logits computed together."""
    return max(1, LOGIT_BYTES // (model.vocab_size * model.weight_dtype_bytes))


def pass_bytes(model: ModelSpec, tokens: int, sequences: int, *, sampled: bool = False) -> int:
    """Return the most bytes that a pass takes for a moment: hidden states and what one block adds, or logits.

    In an FFN block these are the residual, its norm, gate and up projection, and the input of the down projection. In
    an MHA block they are the residual, its norm, q, k and v before and after their rotation, and the attention.
    Attention itself may need more (``hw.elastic.attention``). Quantized weights are not unpacked.

    Args:
        model: the unpruned architecture. tokens: of the pass. sequences: those that need a next token.
        sampled: whether tokens are sampled rather than the likeliest ones.
    Raises:
        BudgetError: for a negative number of tokens or sequences.
    """
    _at_least(0, tokens=tokens, sequences=sequences)
    size = model.weight_dtype_bytes
    ffn = sum(linear.out_features for linear in model.ffn_linears[:-1]) + model.ffn_linears[-1].in_features
    mha = 2 * sum(linear.out_features for linear in model.mha_linears[:-1]) + model.mha_linears[-1].in_features
    hidden = 2 * model.hidden_size * tokens * size
    blocks = hidden + max(ffn, mha) * tokens * size
    rotation = 6 * 4 * model.head_dim * tokens  # angles, cosines and sines, in FP32 and in the model's type
    rows = min(sequences, logit_rows(model))
    logits = rows * model.vocab_size * (size + 1)  # and whether each is finite
    if sampled:
        logits += min(rows * model.vocab_size, SAMPLED_LOGITS) * SAMPLED_LOGIT_BYTES
    return max(blocks, hidden + logits) + rotation


# --- RAP's memory model ----------------------------------------------------------------------------------------------


def peak_bytes(model: ModelSpec, mask: KeepMask, batch: int, sequence_tokens: int) -> int:
    """Return the peak bytes of one generation: kept weights, and the KV of ``batch`` full sequences.

        peak(mask; B, S) = 2 * params_kept + sum over kept MHA blocks of 2 * 2 * B * S * num_kv_heads * head_dim

    Weights have the precision of the checkpoint; workspace is not included (RAP measures 4 to 7 % above this).

    Args:
        model: the unpruned architecture, whose dtypes replace the factors 2 of FP16.
        mask: the blocks that run, in prefill and in decode.
        batch: number of sequences, B.
        sequence_tokens: prompt and output tokens of each sequence, S.
    Raises:
        PlanError: if the mask does not have one entry per layer.
        BudgetError: for a negative batch or length.
    Source:
        Derived from RAP (arXiv 2505.17138); it gives the authors' theoretical peaks to 0.01 GB (GB = 1e9 bytes).
    """
    _at_least(0, batch=batch, sequence_tokens=sequence_tokens)
    check_layers(model, mask)
    blocks = sum(mask.mha) * mha_weight_bytes(model) + sum(mask.ffn) * ffn_weight_bytes(model)
    return fixed_weight_bytes(model) + blocks + batch * sequence_tokens * kv_bytes_per_token(model, mask)


def relative_budget_bytes(model: ModelSpec, share: float, batch: int, sequence_tokens: int) -> int:
    """Return the bytes of RAP's relative budget r, a share of the dense peak at the same load, rounded down.

    Raises:
        BudgetError: for a share that is not a positive number, or a negative load.
    """
    if not (math.isfinite(share) and share > 0):
        raise BudgetError(f"share is {share!r}; it must be a positive share of the dense peak, such as 0.8")
    return math.floor(share * peak_bytes(model, keep_all(model), batch, sequence_tokens))


def fits(model: ModelSpec, mask: KeepMask, batch: int, sequence_tokens: int, budget_bytes: int) -> bool:
    """Return whether RAP's peak for this mask and load is within the budget."""
    return peak_bytes(model, mask, batch, sequence_tokens) <= budget_bytes


# --- Help ------------------------------------------------------------------------------------------------------------


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise BudgetError(f"{name} is {value}; it must be at least {least}")
