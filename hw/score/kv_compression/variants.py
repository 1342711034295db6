"""What is compared: each published method, and this project's own ways to hold less KV, at shares of its bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from hw.elastic.kv_compression import ada_kv, lorc, refree_kv, think
from hw.elastic.kv_compression.prompt_kv import Compress, LayerKV, StoredKV, full, kept_tokens
from hw.elastic.model import ElasticModel
from hw.elastic.quantized_kv import stored
from sim.cost.model_spec import ModelSpec

# Shapes: l layers, p tokens of the prompt.


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to store a prompt's KV.

    method: its name. factor: the share of the bytes that is wanted; None where a setting decides. setting: what decides
    instead, or what the factor became.
    """

    method: str
    factor: float | None
    setting: str
    compress: Compress


FULL = Variant("full", 1.0, "", lambda _number, layer: full(layer))


def variants(
    elastic: ElasticModel,
    factors: Sequence[float],
    *,
    thresholds: Mapping[float, float],
    mha_order: Sequence[int],
    ada_queries: int,
    think_queries: int,
    prompt_tokens: int,
) -> Iterator[Variant]:
    """Yield what is compared, in the order of the tables; a method that cannot reach a factor is left out there.

    Args:
        factors: shares of the bytes of the KV.
        thresholds: of ReFreeKV, by factor. mha_order: layers in the order in which their MHA blocks are dropped.
        ada_queries, think_queries: observed queries. prompt_tokens: length of every prompt.
    """
    for factor in factors:
        yield Variant("Ada-KV", factor, "", _ada_kv(factor, ada_queries, equal=False))
    for factor in factors:
        yield Variant("SnapKV", factor, "", _ada_kv(factor, ada_queries, equal=True))
    for factor in factors:
        threshold = thresholds[factor]
        yield Variant("ReFreeKV", factor, f"threshold {threshold:.2%}", _refree_kv(threshold))
    yield Variant("ReFreeKV", None, f"threshold {refree_kv.PUBLISHED:.0%}", _refree_kv(refree_kv.PUBLISHED))
    for factor in factors:
        yield Variant("kv_keep", factor, "", _kv_keep(factor))
    for factor in factors:
        try:
            count = think.channels_to_drop(factor, prompt_tokens, elastic.spec.head_dim, think_queries)
        except ValueError:
            continue
        yield Variant("ThinK", factor, f"{count} channels dropped", _think(factor, think_queries))
    yield from _lorc_variants(elastic, factors)
    for factor in factors:
        if (bits := bits_of_layers(elastic.spec, factor)) is not None:
            yield Variant("kv_bits", factor, _counted(bits), _kv_bits(elastic.spec, bits))
    for width in (8, 4):
        bits = [width] * elastic.spec.num_layers
        yield Variant("kv_bits", None, _counted(bits), _kv_bits(elastic.spec, bits))
    for factor in factors:
        count = round((1 - factor) * elastic.spec.num_layers)
        yield Variant("dropped MHA blocks", factor, f"{count} blocks", _dropped(mha_order[:count]))


def _ada_kv(factor: float, queries: int, *, equal: bool) -> Compress:
    return lambda _number, layer: ada_kv.compress(layer, factor, queries, equal=equal)


def _refree_kv(threshold: float) -> Compress:
    return lambda _number, layer: refree_kv.compress(layer, threshold)


def _think(factor: float, queries: int) -> Compress:
    return lambda _number, layer: think.compress(layer, factor, queries, queries)


def _kv_keep(factor: float) -> Compress:
    """Return ``Plan.kv_keep``: the first 4 tokens and the last ones, the same in all layers and heads."""

    def compress(_number: int, layer: LayerKV) -> StoredKV:
        evicted = layer.tokens - round(factor * layer.tokens)
        kept = refree_kv.kept_places(layer.tokens, evicted).to(layer.keys.device)
        return kept_tokens(layer, kept.expand(layer.heads, -1))

    return compress


def _lorc_variants(elastic: ElasticModel, factors: Sequence[float]) -> Iterator[Variant]:
    """Yield LoRC, then with the same rank in all layers, then with all of the values (which its paper does not do)."""
    keys, values = lorc.key_and_value_directions(elastic.layers, elastic.spec)
    directions, layers = keys[0].count, len(keys)
    conditions = [a.log_condition + b.log_condition for a, b in zip(keys, values, strict=True)]
    for name, logs in (("LoRC", conditions), ("LoRC, equal ranks", [0.0] * layers)):
        for factor in factors:
            ranks = lorc.layer_ranks(logs, directions, factor)
            yield Variant(name, factor, _ranks_text(ranks), _lorc(keys, values, ranks, ranks))
    for factor in factors:
        if factor > 0.5:
            ranks = lorc.layer_ranks([0.0] * layers, directions, 2 * factor - 1)
            yield Variant(
                "LoRC, keys alone", factor, _ranks_text(ranks), _lorc(keys, values, ranks, [directions] * layers)
            )


def _ranks_text(ranks: Sequence[int]) -> str:
    lowest, highest = min(ranks), max(ranks)
    return f"ranks {highest} to {lowest}" if lowest < highest else f"rank {lowest}"


def _lorc(
    keys: Sequence[lorc.Directions],
    values: Sequence[lorc.Directions],
    key_ranks: Sequence[int],
    value_ranks: Sequence[int],
) -> Compress:
    return lambda at, layer: lorc.compress(layer, keys[at], values[at], key_ranks[at], value_ranks[at])


def bits_of_layers(spec: ModelSpec, factor: float) -> list[int] | None:
    """Return the KV bits of each layer so that this share of the bytes is stored, to the nearest; None if too few.

    Layers go from 16 to 8 bits front to back, and once all have 8, from 8 to 4.
    """
    at_8, at_4 = (spec.kv_bytes_per_token_layer_at(bits) / spec.kv_bytes_per_token_layer for bits in (8, 4))
    high, low, below, above = (16, 8, at_8, 1.0) if factor >= at_8 else (8, 4, at_4, at_8)
    count = round((above - factor) / (above - below) * spec.num_layers)
    return [low] * count + [high] * (spec.num_layers - count) if count <= spec.num_layers else None


def _counted(bits: Sequence[int]) -> str:
    return ", ".join(f"{bits.count(width)} layers at {width} bits" for width in (16, 8, 4) if width in bits)


def _kv_bits(spec: ModelSpec, bits: Sequence[int]) -> Compress:
    def compress(number: int, layer: LayerKV) -> StoredKV:
        keys, values = stored(layer.keys, layer.values, bits[number])
        share = spec.kv_bytes_per_token_layer_at(bits[number]) / spec.kv_bytes_per_token_layer
        return StoredKV(keys=keys, values=values, share=share)

    return compress


def _dropped(layers: Sequence[int]) -> Compress:
    gone = frozenset(layers)
    return lambda number, layer: None if number in gone else full(layer)


@torch.inference_mode()
def compressed(variant: Variant, layers: Sequence[LayerKV]) -> tuple[list[StoredKV | None], float]:
    """Return what a variant stores of each layer, and its share of the bytes of the full KV of all layers."""
    found = [variant.compress(number, layer) for number, layer in enumerate(layers)]
    return found, sum(0.0 if one is None else one.share for one in found) / len(found)
