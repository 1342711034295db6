"""Blocks by number: 2 l is the MHA block of layer l and 2 l + 1 its FFN block, the order in which they run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KeepMask, Plan, dense_plan
from sim.errors import ConfigError


def block_name(block: int) -> str:
    """Return ``MHA3`` for block 6, ``FFN3`` for block 7."""
    return f"{'MHA' if block % 2 == 0 else 'FFN'}{block // 2}"


def block_number(name: str) -> int:
    """Return 6 for ``MHA3``, 7 for ``FFN3``.

    Raises:
        ConfigError: for any other text.
    """
    kind, layer = name[:3], name[3:]
    if kind not in ("MHA", "FFN") or not layer.isdecimal():
        raise ConfigError(f"{name!r} names no block; write MHA or FFN and the number of the layer, as in MHA0")
    return 2 * int(layer) + (kind == "FFN")


def check_removals(key: str, removals: int, spec: ModelSpec) -> None:
    """Check that a model has as many blocks as are to be removed.

    Raises:
        ConfigError: if not; ``key`` states the number.
    """
    if not 0 <= removals <= 2 * spec.num_layers:
        raise ConfigError(f"{key} is {removals}; {spec.name} has {2 * spec.num_layers} blocks to remove")


def mask_without(num_layers: int, removed: Collection[int]) -> KeepMask:
    """Return the mask that keeps all but the removed blocks."""
    return KeepMask(
        mha=tuple(2 * layer not in removed for layer in range(num_layers)),
        ffn=tuple(2 * layer + 1 not in removed for layer in range(num_layers)),
    )


def plan_without(spec: ModelSpec, removed: Collection[int]) -> Plan:
    """Return the plan that drops the same blocks in prefill and decode and is otherwise dense."""
    return staged_plan(spec, prefill=removed, decode=removed)


def staged_plan(spec: ModelSpec, *, prefill: Collection[int], decode: Collection[int]) -> Plan:
    """Return the plan that drops some blocks in prefill and others in decode and is otherwise dense."""
    return replace(
        dense_plan(spec),
        prefill=mask_without(spec.num_layers, set(prefill)),
        decode=mask_without(spec.num_layers, set(decode)),
    )


def random_order(blocks: int, seed: int) -> list[int]:
    """Return all blocks in a random order."""
    return [int(block) for block in np.random.default_rng(seed).permutation(blocks)]
