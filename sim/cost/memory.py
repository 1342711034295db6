"""Bytes that a plan needs: weights at every precision, KV cache, and how many KV blocks a budget holds.

Pure functions; bytes are exact integers. Four things live in the memory of a replica:

    budget  =  resident weights  +  workspace (activations, CUDA graphs, fragmentation)  +  KV pool  +  remainder

The KV pool is counted in layer blocks: one is one KV block (``kv_block_tokens`` tokens) of one MHA block, because
layers come and go one by one and may keep different tokens (DESIGN section 2, rule 5). A request of T tokens holds
``kv_blocks(T, kv_block_tokens)`` of them in every layer whose MHA block it uses.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

from sim.cost.model_spec import QUANT_GROUP_ELEMENTS, Linear, ModelSpec
from sim.cost.plan import WEIGHT_BITS, KeepMask, Plan, check_layers, check_plan, keep_all
from sim.errors import BudgetError, PlanError, nearest

QUANT_SCALE_BYTES = 2

Stage = Literal["both", "prefill", "decode"]
"""What a replica does: all of a request, only its prefill, or only its decode (disaggregated serving)."""

STAGES: tuple[Stage, ...] = ("both", "prefill", "decode")


# --- Weights ---------------------------------------------------------------------------------------------------------


def linear_weight_bytes(model: ModelSpec, linear: Linear, bits: int) -> int:
    """Bytes of one linear layer at 16, 8 or 4 bits; its bias stays at the model's own precision.

    16 bits stand for the unquantised weights, so they take ``weight_dtype_bytes`` each: 4 for an FP32 checkpoint.
    With g = ceil(in / 128) groups of input elements a row of outputs:

        8 bits:  in * out  +  2 * g * out                             int8 weights, FP16 scales, symmetric
        4 bits:  in * out / 2  +  2 * g * out  +  g * out / 2         and a 4-bit zero point a group, packed

    each quotient rounded up to a whole byte. Group indices (GPTQ's g_idx with activation order) are not counted.

    Raises:
        PlanError: for another number of bits.
    Source:
        AWQ's WQLinear_GEMM (qweight, qzeros: int32 with eight 4-bit values; scales: FP16) and GPTQ with group size
        128, the default of both; equal to theirs to the byte where ``out`` is a multiple of 8.
    """
    weights = linear.in_features * linear.out_features
    bias = linear.out_features * model.weight_dtype_bytes if linear.bias else 0
    groups = -(-linear.in_features // QUANT_GROUP_ELEMENTS) * linear.out_features
    if bits == 16:
        return weights * model.weight_dtype_bytes + bias
    if bits == 8:
        return weights + groups * QUANT_SCALE_BYTES + bias
    if bits == 4:
        return -(-weights // 2) + groups * QUANT_SCALE_BYTES + -(-groups // 2) + bias
    raise PlanError(f"weights of {bits} bits are not modelled; allowed are {', '.join(map(str, WEIGHT_BITS))}")


@functools.cache  # a plan change asks for every layer
def mha_weight_bytes(model: ModelSpec, bits: int = 16) -> int:
    """Bytes of the weights of one MHA block, its norms included; norms and biases are never quantised."""
    linears = model.mha_linears
    norms = model.mha_params - sum(linear.params for linear in linears)
    return sum(linear_weight_bytes(model, linear, bits) for linear in linears) + norms * model.weight_dtype_bytes


@functools.cache
def ffn_weight_bytes(model: ModelSpec, bits: int = 16) -> int:
    """Bytes of the weights of one FFN block, its norm included; norms and biases are never quantised."""
    linears = model.ffn_linears
    norms = model.ffn_params - sum(linear.params for linear in linears)
    return sum(linear_weight_bytes(model, linear, bits) for linear in linears) + norms * model.weight_dtype_bytes


def layer_weight_bytes(model: ModelSpec, bits: int = 16) -> int:
    """Bytes of one whole layer: what MorphServe swaps in one action (arXiv 2506.02006)."""
    return mha_weight_bytes(model, bits) + ffn_weight_bytes(model, bits)


def fixed_weight_bytes(model: ModelSpec) -> int:
    """Bytes of embeddings, positions, final norm and head, which every plan holds at full precision."""
    return model.fixed_params * model.weight_dtype_bytes


def resident_mask(plan: Plan, stage: Stage = "both") -> KeepMask:
    """Return the blocks whose weights a replica of this stage has to hold.

    A replica that does both stages holds what prefill runs, which contains what decode runs (PDTrim's nesting,
    ``sim.cost.plan.check_plan``); a decode-only replica holds what decode runs.

    Raises:
        PlanError: for an unknown stage.
    """
    if stage not in STAGES:
        raise PlanError(f"unknown stage {stage!r}; {nearest(stage, STAGES)}")
    return plan.decode if stage == "decode" else plan.prefill


def weight_bytes(model: ModelSpec, plan: Plan, stage: Stage = "both") -> int:
    """Bytes of the weights that must be resident to run ``plan``, each layer at its own precision.

    Args:
        model: the unpruned architecture.
        plan: a legal plan for it.
        stage: whether the replica does prefill, decode or both.
    Raises:
        PlanError: if the plan is not legal for the model.
    """
    check_plan(model, plan)
    keep = resident_mask(plan, stage)
    mha = {bits: mha_weight_bytes(model, bits) for bits in set(plan.weight_bits)}
    ffn = {bits: ffn_weight_bytes(model, bits) for bits in set(plan.weight_bits)}
    return (
        fixed_weight_bytes(model)
        + sum(mha[bits] for bits, kept in zip(plan.weight_bits, keep.mha, strict=True) if kept)
        + sum(ffn[bits] for bits, kept in zip(plan.weight_bits, keep.ffn, strict=True) if kept)
    )


# --- KV cache --------------------------------------------------------------------------------------------------------


def kv_bytes_per_token(model: ModelSpec, keep: KeepMask) -> int:
    """Bytes of KV cache that one token holds, prompt or generated.

    Only a kept MHA block writes keys and values; pruning an FFN block frees weights and no KV.

    Raises:
        PlanError: if a mask has another length than the model has layers.
    Source:
        Kwon et al., PagedAttention (SOSP 2023), section 3; num_kv_heads extends it to GQA.
    """
    check_layers(model, keep)
    return sum(keep.mha) * model.kv_bytes_per_token_layer


def kv_block_layer_bytes(model: ModelSpec, kv_block_tokens: int) -> int:
    """Bytes of one KV block of one MHA block: the unit in which a KV pool is counted."""
    _at_least(1, kv_block_tokens=kv_block_tokens)
    return kv_block_tokens * model.kv_bytes_per_token_layer


def kv_blocks(tokens: int, kv_block_tokens: int) -> int:
    """Number of KV blocks that ``tokens`` tokens hold in one layer; the last may be partly filled."""
    if tokens < 0 or kv_block_tokens < 1:  # engines call this for every request of every iteration
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
    """Number of KV blocks of one layer that fit beside the weights and the workspace; 0 when none does.

        (budget - resident weights - workspace) // bytes of one KV block of one layer

    A pool of n holds n // (kept MHA blocks) KV blocks of whole requests when every layer keeps all tokens.

    Raises:
        PlanError: if the plan is not legal for the model.
    Source:
        DESIGN section 2, rule 5.
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
    """Bytes of the smallest budget whose pool holds ``num_kv_blocks`` KV blocks in every kept MHA block.

    For configs that state the capacity of a published engine as a count over all layers, as vLLM's num_gpu_blocks:
    one such block is ``kept MHA blocks`` layer blocks. An unpruned engine's count goes with the dense plan.
    ``kv_pool_layer_blocks`` of the result is num_kv_blocks * kept MHA blocks, exactly.

    Raises:
        PlanError: if the plan is not legal for the model.
    """
    _at_least(0, num_kv_blocks=num_kv_blocks, workspace_bytes=workspace_bytes)
    layer_blocks = num_kv_blocks * sum(resident_mask(plan, stage).mha)
    kv_bytes = layer_blocks * kv_block_layer_bytes(model, kv_block_tokens)
    return weight_bytes(model, plan, stage) + workspace_bytes + kv_bytes


# --- RAP's memory model ----------------------------------------------------------------------------------------------


def peak_bytes(model: ModelSpec, mask: KeepMask, batch: int, sequence_tokens: int) -> int:
    """Bytes at the peak of one generation: kept weights, and the KV of ``batch`` full sequences.

        peak(mask; B, S) = 2 * params_kept + sum over kept MHA blocks of 2 * 2 * B * S * num_kv_heads * head_dim

    Weights are unquantised; workspace is not in it (RAP measures 4 to 7 % above this).

    Args:
        model: the unpruned architecture, whose dtypes replace the factors 2 of FP16.
        mask: the blocks that run, in prefill and decode alike.
        batch: sequences B.
        sequence_tokens: prompt and output of each, S.
    Raises:
        PlanError: if the mask has another length than the model has layers.
        BudgetError: for a negative batch or length.
    Source:
        RAP (arXiv 2505.17138); derived, it gives the authors' theoretical peaks to 0.01 GB (GB = 1e9 bytes).
    """
    _at_least(0, batch=batch, sequence_tokens=sequence_tokens)
    check_layers(model, mask)
    params = model.fixed_params + sum(mask.mha) * model.mha_params + sum(mask.ffn) * model.ffn_params
    return params * model.weight_dtype_bytes + batch * sequence_tokens * kv_bytes_per_token(model, mask)


def relative_budget_bytes(model: ModelSpec, share: float, batch: int, sequence_tokens: int) -> int:
    """Bytes of RAP's relative budget r: the share of the dense peak at the same load, rounded down.

    Raises:
        BudgetError: for a share that is not a positive number, or a negative load.
    """
    if not (math.isfinite(share) and share > 0):
        raise BudgetError(f"share is {share!r}; it must be a positive share of the dense peak, such as 0.8")
    return math.floor(share * peak_bytes(model, keep_all(model), batch, sequence_tokens))


def fits(model: ModelSpec, mask: KeepMask, batch: int, sequence_tokens: int, budget_bytes: int) -> bool:
    """Return whether RAP's peak of this mask at this load stays within the budget."""
    return peak_bytes(model, mask, batch, sequence_tokens) <= budget_bytes


# --- Help ------------------------------------------------------------------------------------------------------------


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise BudgetError(f"{name} is {value}; it must be at least {least}")
