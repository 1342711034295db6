"""Measures what a plan change costs on this device: resizing the KV pool, dropping weights, copying weights in.

Each step is the one that ``hw.engine.hw_engine`` takes between two passes, with the same classes. A copy is timed alone
and during a forward pass; passes with and without a copy alternate in random order. With ``clock=cpu`` the time of a
copy is the processor time of the copying thread. The simulator uses two of the figures,
``host_to_device_bytes_per_s`` and ``copy_slowdown``; the others show what it leaves out.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hw.calibrate.device import Bench, spread
from hw.calibrate.engine_runs import BLOCK_TOKENS
from hw.elastic.blocks import ABSENT, KINDS, Kind
from hw.elastic.copies import LayerCopier
from hw.elastic.kv_storage import ArenaStorage
from hw.engine.hw_engine import arena_of
from sim.cost.memory import kv_block_layer_bytes, layer_weight_bytes
from sim.cost.plan import WEIGHT_BITS, dense_plan, drop, with_mask
from sim.engine.block_table import BlockTable
from sim.engine.kv_pool import KVPool
from sim.engine.transition import LayerCopy

LAYER = 1
"""The layer that is dropped and copied back."""
REPEATS = 30
POOL_BLOCKS = 3000
"""KV blocks of one layer, as many as a small engine has: shrinking the pool looks at each block."""
RESIZED_BLOCKS = 512
DECODES, CONTEXT = 4, 90
"""The pass during which a copy is timed."""
LONGEST_S = 60.0


class Changes:
    """Times the steps of plan changes on a dense model and leaves the model as it was."""

    def __init__(self, bench: Bench) -> None:
        """Use the model and the clock of a bench."""
        self._bench, self._elastic = bench, bench.elastic
        self._copier = LayerCopier(self._elastic, bench.clock)
        spec = self._elastic.spec
        # The pool makes room for a layer that is copied in, as it does when the engine has no other memory.
        layer_blocks = layer_weight_bytes(spec, 16) // kv_block_layer_bytes(spec, BLOCK_TOKENS)
        self._blocks = max(POOL_BLOCKS, 2 * layer_blocks)
        self._arena = arena_of(self._elastic, self._blocks, block_tokens=BLOCK_TOKENS)
        self._pool = KVPool(self._blocks, ArenaStorage(self._arena))
        self._found: dict[str, list[float]] = {}
        self._longer: list[float] = []  # time of a pass with a copy over one without, per round

    @torch.inference_mode()
    def measure(self, seed: int = 0) -> dict[str, Any]:
        """Return the figures of plan changes for a calibration's ``device_run``: medians, on the clock of the bench.

        ``host_to_device_bytes_per_s``: of full layers, over all precisions, during a pass. ``copy_slowdown``: by what
        share a pass that begins with a copy takes longer, including shrinking the pool for it and joining it, with its
        standard error. ``plan_changes``: the parts.
        """
        for kind in KINDS:
            for bits in WEIGHT_BITS:
                self._elastic.blocks[kind][LAYER].prepare(bits)
        layers = {str(bits): self._layer(bits, random.Random(seed + bits)) for bits in WEIGHT_BITS}
        parts = {
            "repeats": REPEATS,
            "load_average": round(os.getloadavg()[0], 1),  # of the machine, including other processes
            "pass": f"{DECODES} decodes of context {CONTEXT}",
            "layer_copies": layers,
            "blocks": {kind: self._block(kind) for kind in KINDS},
            "precision_swaps": {str(bits): self._swap(bits) for bits in WEIGHT_BITS if bits != 16},
            "kv_pool": self._resizes(),
        }
        self._copier.close()
        seconds = sum(row["bytes"] / row["bytes_per_s_while_serving"] for row in layers.values())
        longer = float(np.median(self._longer))
        return {
            "host_to_device_bytes_per_s": _short(sum(row["bytes"] for row in layers.values()) / seconds),
            "copy_slowdown": max(0.0, _short(longer - 1)),
            "copy_slowdown_standard_error": _short(longer * spread(self._longer)),
            "plan_changes": parts,
        }

    def _layer(self, bits: int, rng: random.Random) -> dict[str, Any]:
        """Time the copy of a full layer onto the device, alone and during a pass that runs without that layer."""
        spec = self._elastic.spec
        size, without = layer_weight_bytes(spec, bits), drop(spec, mha=[LAYER], ffn=[LAYER])
        run_pass = self._bench.full_pass([(CONTEXT, 1)] * DECODES, [], without)
        blocks = size // self._arena.block_bytes
        self._elastic.apply(with_mask(dense_plan(spec), without))

        def copied(name: str, meanwhile: Callable[[], object]) -> None:
            started = self._time("", lambda: self._resize(-blocks), lambda: self._start(bits, bits), meanwhile)
            self._copier.wait(LONGEST_S)  # the engine would go on: a copy joins after the pass in which it ends
            joined = self._time("", self._copier.join)
            self._note(f"{name}, copy", self._copier.copied_s)
            self._note(name, started + joined)
            for kind in KINDS:
                self._elastic.blocks[kind][LAYER].want(ABSENT)
            self._give_back()
            self._resize(blocks)

        steps: tuple[Callable[[], object], ...] = (
            lambda: self._time("pass", run_pass),
            lambda: copied("serving", run_pass),
            lambda: copied("alone", lambda: None),
        )
        for repeat in range(REPEATS + 1):
            for step in rng.sample(steps, len(steps)):
                step()
            if not repeat:
                self._found.clear()  # the first run also warms up caches
        self._elastic.apply(dense_plan(spec))
        self._longer += [a / b for a, b in zip(self._found["serving"], self._found["pass"], strict=True)]
        found = self._taken()
        return {
            "bytes": size,
            "bytes_per_s_alone": _short(size / found["alone, copy"]),
            "bytes_per_s_while_serving": _short(size / found["serving, copy"]),
            "pass_us": _us(found["pass"]),
            "pass_with_copy_us": _us(found["serving"]),
        }

    def _block(self, kind: Kind) -> dict[str, Any]:
        """Time the host's part in dropping one block at 16 bits, the copy back, and joining it."""
        block = self._elastic.blocks[kind][LAYER]
        for _ in range(REPEATS):
            self._time("drop", lambda: block.want(ABSENT), self._give_back)
            self._start(16 if kind == "mha" else ABSENT, 16 if kind == "ffn" else ABSENT)
            self._copier.wait(LONGEST_S)
            self._time("join", self._copier.join)
            self._note("copy", self._copier.copied_s)
        return {"bytes": block.nbytes, **{f"{name}_us": _us(seconds) for name, seconds in self._taken().items()}}

    def _swap(self, bits: int) -> dict[str, Any]:
        """Time a full layer's change from 16 bits and back: the copy, and the host's part in joining it."""
        for _ in range(REPEATS):
            for way, wanted in (("from_16", bits), ("to_16", 16)):
                self._start(wanted, wanted)
                self._copier.wait(LONGEST_S)
                self._time(f"{way}_join", self._copier.join, self._give_back)
                self._note(f"{way}_copy", self._copier.copied_s)
        return {f"{name}_us": _us(seconds) for name, seconds in self._taken().items()}

    def _resizes(self) -> dict[str, Any]:
        """Time growing and shrinking the pool, per KV block of one layer, also when held blocks must move."""
        pool, hardware = self._pool, self._elastic.hardware
        before = self._arena.allocated_bytes, hardware.in_use_bytes()
        self._resize(-RESIZED_BLOCKS)
        freed = {
            "by the pool": before[0] - self._arena.allocated_bytes,
            "on the device": before[1] - hardware.in_use_bytes(),
        }
        self._resize(RESIZED_BLOCKS)
        for _ in range(REPEATS):
            self._time("shrink", lambda: self._resize(-RESIZED_BLOCKS))
            self._time("grow", lambda: self._resize(RESIZED_BLOCKS))
            ids = sorted(pool.take(pool.layer_blocks)[0])
            pool.release(ids[:-RESIZED_BLOCKS])
            held = BlockTable(blocks={0: ids[-RESIZED_BLOCKS:]})  # at the end of the memory that is freed

            def move(held: BlockTable = held) -> None:
                held.rename(self._resize(-RESIZED_BLOCKS))

            self._time("shrink_and_move", move)
            pool.release(held.own_blocks())
            self._resize(RESIZED_BLOCKS)
        per_block = {f"{name}_us_per_block": _us(s / RESIZED_BLOCKS) for name, s in self._taken().items()}
        return {
            "block_bytes": self._arena.block_bytes,
            "blocks": self._blocks,
            "freed_bytes": freed,
            "resized_by": RESIZED_BLOCKS,
            **per_block,
        }

    def _resize(self, blocks: int) -> dict[int, int]:
        self._pool.resize(self._pool.layer_blocks + blocks)
        return self._pool.settle()

    def _give_back(self) -> None:
        self._elastic.hardware.give_back()

    def _start(self, mha_bits: int, ffn_bits: int) -> None:
        self._copier.start(
            LayerCopy(
                layer=LAYER, mha_bits=mha_bits, ffn_bits=ffn_bits, copied_bytes=0, net_bytes=0
            )  # not read by the copier
        )

    def _time(self, name: str, *steps: Callable[[], object]) -> float:
        """Run steps and return their seconds; with a name, also record them."""
        start_s = self._bench.now_s()
        for step in steps:
            step()
        seconds = self._bench.now_s() - start_s
        if name:
            self._note(name, seconds)
        return seconds

    def _note(self, name: str, seconds: float) -> None:
        self._found.setdefault(name, []).append(seconds)

    def _taken(self) -> dict[str, float]:
        """Return the median of everything recorded, by name, and clear the records."""
        found = {name: float(np.median(values)) for name, values in self._found.items()}
        self._found.clear()
        return found


def _us(seconds: float) -> float:
    return _short(seconds * 1e6)


def _short(value: float) -> float:
    return float(f"{value:.3g}")
