"""From one plan to the next: which blocks can be dropped at once, and which have to be copied in first.

Pure functions of plans, used by ``sim.engine.plan_changes`` (Python), ``sim.engine.plan_graph`` (compiled) and devices.

A plan change never stops the engine. Blocks that the new plan does not run are dropped before the next iteration.
Blocks that it needs and the device lacks (dropped earlier, or present at another precision) are copied from pinned host
memory, one layer at a time, while iterations continue. The blocks of a layer run from the first iteration after its
copy is complete, and the blocks that they replace are freed then (MorphServe, arXiv 2506.02006, also replaces single
layers in place).

A new decision during a change supersedes the old one: blocks are dropped at once, and copies that have not started are
planned again. The copy under way continues if the new plan lacks exactly the blocks that it brings; otherwise it is
abandoned.

A streamed layer (sim/cost/streaming.py) has no blocks on the device; a plan that streams it can run any blocks of it at
any precision from the next iteration on. A layer that is not to be streamed any more is, until its copy is complete.

``Plan.compute_bits`` moves nothing: products run at other bits from the next iteration on. While a layer is present at
another precision than its plan wants, it is read as close to the wanted bits as its present weights allow.

``Plan.ffn_width``: channels of an FFN block are stored in order of importance, so cutting a block only drops the last
ones, at once. Widening it copies in those that are missing, next to the ones that stay. The bias that replaces removed
channels, one number for each hidden unit, comes with no copy of its own when a block is cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from sim.cost.ffn_width import FULL_WIDTH
from sim.cost.memory import ffn_weight_bytes, fixed_weight_bytes, mha_weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KeepMask, Plan, nested_bits
from sim.cost.streaming import held_bytes

ABSENT = 0
"""The bits of a block that is not on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """The blocks that can run: bits per weight of each layer's MHA and FFN block, ``ABSENT`` if it cannot.

    ffn_width: of each layer's FFN block, in eighths of its channels; all of them for one that cannot run, or if left
        out.
    streamed: whether the blocks of a layer are in host memory and cross the link in each iteration; the others are on
        the device. None are if left out.
    """

    mha_bits: tuple[int, ...]
    ffn_bits: tuple[int, ...]
    streamed: tuple[bool, ...] = ()
    ffn_width: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.ffn_width == ():
            object.__setattr__(self, "ffn_width", (FULL_WIDTH,) * len(self.ffn_bits))
        if self.streamed == ():
            object.__setattr__(self, "streamed", (False,) * len(self.mha_bits))

    def layer_bytes(self, model: ModelSpec) -> list[int]:
        """Return the bytes of the blocks of each layer, streamed or not."""
        mha = {bits: mha_weight_bytes(model, bits) for bits in set(self.mha_bits) - {ABSENT}}
        forms = list(zip(self.ffn_bits, self.ffn_width, strict=True))
        ffn = {form: ffn_weight_bytes(model, *form) for form in set(forms) if form[0] != ABSENT}
        return [mha.get(m, 0) + ffn.get(form, 0) for m, form in zip(self.mha_bits, forms, strict=True)]

    def blocks(self) -> list[int]:
        """Return how many blocks of each layer can run."""
        return [(m != ABSENT) + (f != ABSENT) for m, f in zip(self.mha_bits, self.ffn_bits, strict=True)]

    def crossing(self) -> list[int]:
        """Return the layers that cross the link in each iteration."""
        return [layer for layer, count in enumerate(self.blocks()) if count and self.streamed[layer]]

    def weight_bytes(self, model: ModelSpec) -> int:
        """Return the bytes on the device, without embeddings and head."""
        return held_bytes(self.layer_bytes(model), self.streamed)


class LayerCopy(NamedTuple):
    """One copy from host memory: the blocks of one layer.

    mha_bits, ffn_bits: precision of each block that is copied; ABSENT if it is not. copied_bytes: bytes copied in.
    net_bytes: copied_bytes minus the bytes of the blocks that are replaced. ffn_width: of the FFN block after the copy;
    if it is on the device at these bits, only the channels that it lacks are copied, and nothing is replaced.
    """

    layer: int
    mha_bits: int
    ffn_bits: int
    copied_bytes: int
    net_bytes: int
    ffn_width: int = FULL_WIDTH


def resident_of(plan: Plan) -> Resident:
    """Return the blocks that a plan needs on a device that runs both prefill and decode."""
    return Resident(
        mha_bits=tuple(bits if keep else ABSENT for bits, keep in zip(plan.weight_bits, plan.prefill.mha, strict=True)),
        ffn_bits=tuple(bits if keep else ABSENT for bits, keep in zip(plan.weight_bits, plan.prefill.ffn, strict=True)),
        streamed=plan.streamed,
        ffn_width=tuple(w if keep else FULL_WIDTH for w, keep in zip(plan.ffn_width, plan.prefill.ffn, strict=True)),
    )


def without_dropped(resident: Resident, target: Plan) -> Resident:
    """Return what can run when all that ``target`` does not run, or streams, has been dropped: blocks, and channels."""
    wanted = resident_of(target)

    def left(held: tuple[int, ...], asked: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            bits if streamed else (here if bits else ABSENT)
            for here, bits, streamed in zip(held, asked, target.streamed, strict=True)
        )

    mha, ffn = left(resident.mha_bits, wanted.mha_bits), left(resident.ffn_bits, wanted.ffn_bits)
    widths = zip(resident.ffn_width, wanted.ffn_width, ffn, target.streamed, strict=True)
    return Resident(
        mha_bits=mha,
        ffn_bits=ffn,
        streamed=tuple(
            now or (before and (m or f) != ABSENT)
            for now, before, m, f in zip(target.streamed, resident.streamed, mha, ffn, strict=True)
        ),
        ffn_width=tuple(
            FULL_WIDTH if bits == ABSENT else asked if streamed else min(here, asked)
            for here, asked, bits, streamed in widths
        ),
    )


def copies_between(model: ModelSpec, resident: Resident, target: Plan) -> list[LayerCopy]:
    """Return the copies that lead from ``resident`` to ``target``: smallest ``net_bytes`` first, then by layer."""
    wanted = resident_of(target)
    mha_bytes = {bits: mha_weight_bytes(model, bits) for bits in {*wanted.mha_bits, *resident.mha_bits} - {ABSENT}}
    mha_bytes[ABSENT] = 0

    def ffn_bytes(bits: int, width: int) -> int:
        return ffn_weight_bytes(model, bits, width) if bits != ABSENT else 0

    copies = []
    for layer in range(model.num_layers):
        if target.streamed[layer]:
            continue
        mha_held, ffn_held, width_held = resident.mha_bits[layer], resident.ffn_bits[layer], resident.ffn_width[layer]
        width = wanted.ffn_width[layer]
        if resident.streamed[layer]:  # nothing of it is on the device
            mha_held = ffn_held = ABSENT
        mha = wanted.mha_bits[layer] if wanted.mha_bits[layer] != mha_held else ABSENT
        alike = wanted.ffn_bits[layer] == ffn_held
        ffn = wanted.ffn_bits[layer] if not alike or (ffn_held != ABSENT and width_held < width) else ABSENT
        if mha == ABSENT and ffn == ABSENT:
            continue
        copied, freed = mha_bytes[mha], mha_bytes[mha_held] if mha != ABSENT else 0
        if ffn != ABSENT:
            there = ffn_bytes(ffn_held, width_held)
            copied += ffn_bytes(ffn, width) - (there if alike else 0)
            freed += 0 if alike else there
        copies.append(LayerCopy(layer, mha, ffn, copied, copied - freed, width if ffn != ABSENT else FULL_WIDTH))
    return sorted(copies, key=lambda copy: (copy.net_bytes, copy.layer))


def peak_weight_bytes(model: ModelSpec, start: Plan, target: Plan) -> int:
    """Return the largest number of bytes that weights take during the change from ``start`` to ``target``.

    Until a copy is complete, it takes memory in addition to the blocks that it replaces.
    """
    resident = without_dropped(resident_of(start), target)
    held = peak = resident.weight_bytes(model)
    for copy in copies_between(model, resident, target):
        peak = max(peak, held + copy.copied_bytes)
        resident = joined(resident, copy)
        held = resident.weight_bytes(model)
    return fixed_weight_bytes(model) + peak


def joined(resident: Resident, copy: LayerCopy) -> Resident:
    """Return what is resident once a copy is complete and the blocks that it replaces are freed."""
    mha, ffn, streamed = list(resident.mha_bits), list(resident.ffn_bits), list(resident.streamed)
    widths = list(resident.ffn_width)
    if copy.mha_bits != ABSENT:
        mha[copy.layer] = copy.mha_bits
    if copy.ffn_bits != ABSENT:
        ffn[copy.layer], widths[copy.layer] = copy.ffn_bits, copy.ffn_width
    streamed[copy.layer] = False
    return Resident(mha_bits=tuple(mha), ffn_bits=tuple(ffn), streamed=tuple(streamed), ffn_width=tuple(widths))


def running_plan(resident: Resident, target: Plan) -> Plan:
    """Return what runs during the change to ``target``: its resident blocks, at their resident precision or below.

    FFN blocks run at their resident width.
    """

    def mask(keep: KeepMask) -> KeepMask:
        return KeepMask(
            mha=tuple(k and b != ABSENT for k, b in zip(keep.mha, resident.mha_bits, strict=True)),
            ffn=tuple(k and b != ABSENT for k, b in zip(keep.ffn, resident.ffn_bits, strict=True)),
        )

    weight_bits = tuple(
        max(mha, ffn) or bits
        for mha, ffn, bits in zip(resident.mha_bits, resident.ffn_bits, target.weight_bits, strict=True)
    )
    lower = zip(weight_bits, target.product_bits, target.nested, strict=True)
    return replace(  # every other field of the plan is the target's
        target,
        decode=mask(target.decode),
        prefill=mask(target.prefill),
        weight_bits=weight_bits,
        compute_bits=tuple(nested_bits(here, wanted) if nested else here for here, wanted, nested in lower),
        streamed=resident.streamed,
        ffn_width=tuple(
            here if bits != ABSENT else wanted
            for here, wanted, bits in zip(resident.ffn_width, target.ffn_width, resident.ffn_bits, strict=True)
        ),
    )


def plan_for_holder(plan: Plan, held: frozenset[int], *, decoding: bool) -> Plan:
    """Return the plan that effectively runs for a request that holds the KV of only the MHA blocks ``held``.

    decoding: whether its prefill has ended. Then the MHA blocks of ``plan.decode`` outside ``held`` are lost to it;
    otherwise those of ``plan.prefill``.
    """
    runs = plan.decode.mha if decoding else plan.prefill.mha
    lost = {layer for layer, keep in enumerate(runs) if keep and layer not in held}
    if not lost:
        return plan

    def without(keep: KeepMask) -> KeepMask:
        return KeepMask(mha=tuple(k and layer not in lost for layer, k in enumerate(keep.mha)), ffn=keep.ffn)

    return replace(plan, decode=without(plan.decode), prefill=without(plan.prefill))
