"""Measures the terms of ``sim.cost.latency`` on this device: ``python -m hw.calibrate source=device``.

Each term is timed in the code that serves: the layers of the elastic model, and paged attention over a paged pool.
Weights come from memory and not from a cache. On a CPU the blocks run in the order of a forward pass, MHA and FFN of
all layers in turn. On a GPU the same block of all layers runs in a row between two events, while the host is ahead
with its launches: what is timed is the device, and what the host adds is fitted to runs of the engine.

First a coarse complete grid is measured, then the points that say most (``hw.calibrate.grid``), as many as the time
allows. Then all of them are timed again, in rounds of random order, until the median of each is precise enough. Samples
are saved after every round, and a run that was stopped continues from there.

Before, between and after the rounds, the engine serves random requests, so that a busy machine slows down both. The
time of an iteration is then fitted as a constant plus a factor times the sum of its terms. A final run, on other
requests, measures the error of the result.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hw.calibrate import measurements as m
from hw.calibrate.engine_runs import BLOCK_TOKENS, USED_SHARE, WORKSPACE_BYTES, Iterations, Load, run_engine
from hw.calibrate.grid import ON_CPU, Limits, Point, Term, coarse, grid_of, most_informative
from hw.elastic.attention_choice import find_attention
from hw.elastic.device import Accelerator, Device
from hw.elastic.forward import attend, forward
from hw.elastic.kv_storage import ArenaStorage
from hw.elastic.layers import Layer
from hw.elastic.model import ElasticModel, Rope
from hw.elastic.paged_attention import Packed, PagedBatch
from hw.elastic.staging import Staging
from hw.engine.clock import CLOCKS
from hw.engine.hw_engine import arena_of
from sim.cost.memory import kv_block_layer_bytes, kv_blocks
from sim.cost.plan import KeepMask, dense_plan
from sim.engine.block_table import BlockTable
from sim.engine.kv_pool import KVPool
from sim.errors import CalibrationError
from sim.json_file import read_json_object
from sim.progress import Report, progress
from sim.results.run_folder import write_json
from sim.types import Floats

Timed = Callable[[], tuple[float, ...]]

QUANTISED_LAYERS = {"cpu": 4, "cuda": 8}
"""Layers over which a block is timed at 8 and 4 bits: on a CPU unpacking takes longer than a cache could save, and on a
GPU 8 layers are more than its cache holds."""
LEAST_REPEATS = {"cpu": 12, "cuda": 4}
MOST_REPEATS = {"cpu": 40, "cuda": 16}
"""Timings of a cell. A GPU that one process has for itself repeats itself."""
VERY_LATE = 1.25
"""At this multiple of its time a group ends with the cells that have been timed once."""
WEIGHTS = {"linear": 4.0, "token": 0.5}
"""How much an error of a term matters, others 1: most of an iteration is linear layers, the least its embedding."""
WANTED_SPREAD = 0.02
"""A cell is done when the standard error of its median is below this share of the median."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettings:
    """What is measured, and how. device: an option of conf/gpu. clock: cpu or wall. seconds: at most.

    limits: where the grids end. memory_bytes: of the device.
    """

    model: str
    device: str
    clock: str
    seconds: float
    seed: int
    limits: Limits = ON_CPU
    memory_bytes: float = math.inf
    attention: str = "auto"


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to time: ``run`` does it ``count`` times and returns the total seconds of each of ``names``."""

    names: tuple[str, ...]
    run: Timed
    count: int


class Bench:
    """Builds the cells of one model and times them.

    grid: the points of every term. fitting: those of decodes that the memory allows.
    """

    def __init__(self, elastic: ElasticModel, settings: DeviceSettings) -> None:
        """Use a dense model."""
        self.elastic, self._spec = elastic, elastic.spec
        self.clock = CLOCKS[settings.clock]
        self.place = "cuda" if isinstance(elastic.hardware, Accelerator) else "cpu"
        block_bytes = kv_block_layer_bytes(self._spec, BLOCK_TOKENS)
        free_bytes = settings.memory_bytes * USED_SHARE - elastic.hardware.in_use_bytes() - WORKSPACE_BYTES[self.place]
        longest = self._spec.max_context_tokens
        most_blocks = max(0, int(min(free_bytes / block_bytes, 2.0**31 - 1)))
        self.grid, self.fitting = grid_of(settings.limits, longest, lambda point: _blocks(point) <= most_blocks)
        wanted = max(map(_blocks, self.fitting)) + _blocks((1, self.grid.longest))
        self.most_blocks = min(wanted * self._spec.num_layers, most_blocks)
        self.arena = arena_of(elastic, self.most_blocks, block_tokens=BLOCK_TOKENS)
        self.pool = KVPool(0, ArenaStorage(self.arena))
        self.staging = Staging(elastic.hardware)
        self.attention = find_attention(
            settings.attention,
            self.arena.device,
            head_dim=self._spec.head_dim,
            dtype=elastic.dtype,
            block_tokens=BLOCK_TOKENS,
        )
        self._host_s: dict[str, float] = {}

    @torch.inference_mode()
    def time(self, cell: Cell) -> list[float]:
        """Return the microseconds of one repetition, for each name of the cell."""
        return [seconds / cell.count * 1e6 for seconds in cell.run()]

    def now_s(self) -> float:
        """Return the time on the clock of the bench, after all work of the device is done."""
        self.elastic.hardware.synchronize()
        return self.clock()

    def seconds(self, name: str, work: Callable[[], object]) -> float:
        """Return the seconds of some work: on a GPU those of the device, without its waits for the host.

        name: of the work, whose last run says how long the host takes to start all of it.
        """
        hardware = self.elastic.hardware
        if not isinstance(hardware, Accelerator):
            start_s = self.clock()
            work()
            return self.clock() - start_s
        seconds, self._host_s[name] = hardware.timed(work, ahead_s=self._host_s.get(name, 0.0))
        return seconds

    def host_us(self) -> dict[str, float]:
        """Return the microseconds that the host needed to start what was timed on a GPU, by name."""
        return {name: _us(seconds) for name, seconds in self._host_s.items()}

    def hold(self, blocks: int) -> None:
        """Give the pool memory for this many KV blocks of one layer; 0 gives all of it back."""
        if self.pool.layer_blocks != blocks:
            self.pool.resize(blocks)
            self.pool.settle()
            self.elastic.hardware.give_back()

    def _hidden(self, tokens: int) -> Tensor:
        return torch.randn(tokens, self._spec.hidden_size, device=self.elastic.device).to(self.elastic.dtype)

    @torch.inference_mode()
    def linear(self, bits: int, tokens: Sequence[int]) -> dict[Point, Cell]:
        """Return the cells of MHA and FFN blocks at a precision, to which the model is changed."""
        some = min(QUANTISED_LAYERS[self.place], self._spec.num_layers)
        count = self._spec.num_layers if bits == 16 else some
        dense = dense_plan(self._spec)
        self.elastic.apply(
            replace(dense, weight_bits=tuple(bits if i < count else 16 for i in range(self._spec.num_layers)))
        )
        layers, query = self.elastic.layers[:count], self._spec.num_heads * self._spec.head_dim

        def mha(layer: Layer, hidden: Tensor) -> None:
            normed, _ = layer.mha_norm.add(hidden, hidden)
            layer.attend(normed, lambda qkv: qkv[:, :query])  # without attention itself

        def ffn(layer: Layer, hidden: Tensor) -> None:
            normed, _ = layer.ffn_norm.add(hidden, hidden)
            layer.feed(normed)

        def in_turn(hidden: Tensor) -> tuple[float, float]:
            both = [0.0, 0.0]
            for layer in layers:
                for at, block in enumerate((mha, ffn)):
                    both[at] += self.seconds("", partial(block, layer, hidden))
            return both[0], both[1]

        def in_a_row(name: str, hidden: Tensor) -> tuple[float, float]:
            def all_of(block: Callable[[Layer, Tensor], None]) -> None:
                for layer in layers:
                    block(layer, hidden)

            mha_s, ffn_s = (
                self.seconds(f"{kind}_{name}", partial(all_of, block)) for kind, block in (("mha", mha), ("ffn", ffn))
            )
            return mha_s, ffn_s

        def run(name: str, amount: int) -> tuple[float, float]:
            hidden = self._hidden(amount)
            return in_turn(hidden) if self.place == "cpu" else in_a_row(name, hidden)

        return {
            (amount,): Cell(
                (f"mha_{bits}/{amount}", f"ffn_{bits}/{amount}"), partial(run, f"{bits}/{amount}", amount), count
            )
            for amount in tokens
        }

    def embedding(self) -> dict[Point, Cell]:
        """Return the cells of the embedding and the rotation."""

        def run(name: str, count: int) -> tuple[float]:
            ids = torch.zeros(count, dtype=torch.long, device=self.elastic.device)

            def work() -> None:
                positions = torch.arange(count, device=ids.device)
                self.elastic.embed(ids, positions)
                self.elastic.rotate(positions)

            return (self.seconds(name, work),)

        return {
            (count,): Cell((f"token/{count}",), partial(run, f"token/{count}", count), 1) for count in self.grid.tokens
        }

    def head(self) -> dict[Point, Cell]:
        """Return the cells of the head with the choice of a token, which the host waits for."""

        def run(count: int) -> tuple[float]:
            hidden, ends = self._hidden(count), self.elastic.ends
            start_s = self.now_s()
            logits = ends.logits(ends.norm.add(hidden, hidden)[0])
            bool(torch.isfinite(logits).all())
            logits.argmax(-1).tolist()
            return (self.now_s() - start_s,)

        return {(count,): Cell((f"head/{count}",), partial(run, count), 1) for count in self.grid.sequences}

    def decodes(self) -> dict[Point, Cell]:
        """Return the cells of attention of a batch of decodes with equal context."""
        return {(b, c): self._attention(f"decode/{b}/{c}", [(c, 1)] * b, []) for b, c in self.fitting}

    def prefills(self) -> dict[Point, Cell]:
        """Return the cells of attention of a prompt chunk after a prefix."""
        return {(t, c): self._attention(f"prefill/{t}/{c}", [], [(c, t)]) for t, c in self.grid.prefills}

    def _attention(self, name: str, decodes: list[tuple[int, int]], prefills: list[tuple[int, int]]) -> Cell:
        spec = self._spec

        def batch_of(made: list[Packed]) -> PagedBatch:
            return self._batch(made[: len(decodes)], made[len(decodes) :])

        def attend_all(batch: PagedBatch, qkv: Tensor, rope: Rope) -> None:
            for index, layer in enumerate(self.elastic.layers):
                batch.rows(index)
                attend(self.elastic, batch, index, layer, qkv, rope)

        def run() -> tuple[float, ...]:
            self.hold(self.most_blocks)
            made, held = self._requests(decodes + prefills, frozenset(range(spec.num_layers)))
            count = sum(len(packed.tokens) for packed in made)
            width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
            qkv = torch.zeros(count, width, dtype=self.elastic.dtype, device=self.elastic.device)
            rope = self.elastic.rotate(torch.zeros(count, dtype=torch.long, device=self.elastic.device))
            if self.place == "cpu":
                seconds = self.seconds(name, lambda: attend_all(batch_of(made), qkv, rope))
            else:  # the host prepares a batch while the device computes the last
                batch = batch_of(made)
                seconds = self.seconds(name, lambda: attend_all(batch, qkv, rope))
            self.pool.release(held)
            return (seconds,)

        return Cell((name,), run, spec.num_layers)

    def _batch(self, decodes: list[Packed], prefills: list[Packed], wanted: Sequence[int] = ()) -> PagedBatch:
        return PagedBatch(
            self.arena,
            decodes,
            prefills,
            self.elastic.windows,
            wanted,
            staging=self.staging,
            attention=self.attention,
        )

    def full_pass(
        self, decodes: list[tuple[int, int]], prefills: list[tuple[int, int]], keep: KeepMask | None = None
    ) -> Timed:
        """Return a full pass over decodes and prompt chunks, each (tokens before, new tokens); keep None keeps all."""
        keep = keep or dense_plan(self._spec).decode
        held = frozenset(layer for layer, kept in enumerate(keep.mha) if kept)

        def run() -> tuple[float, ...]:
            self.hold(max(self.pool.layer_blocks, min(self.most_blocks, 4096)))
            made, taken = self._requests(decodes + prefills, held)
            single, chunks = made[: len(decodes)], made[len(decodes) :]
            ends = np.cumsum([len(packed.tokens) for packed in made]) - 1
            start_s = self.now_s()
            batch = self._batch(single, chunks, ends.tolist())
            logits = forward(self.elastic, batch, prefill=keep, decode=keep)
            bool(torch.isfinite(logits).all())
            logits.argmax(-1).tolist()
            seconds = self.now_s() - start_s
            self.pool.release(taken)
            return (seconds,)

        return run

    def _requests(self, shapes: list[tuple[int, int]], held: frozenset[int]) -> tuple[list[Packed], list[int]]:
        """Return requests that hold KV, each (tokens before, new tokens), and the blocks to release afterwards.

        Where the pool is too small for the KV of all layers, several layers read the same blocks. Those of one layer
        are then more than any cache holds.
        """
        needed = sum(kv_blocks(before + new, BLOCK_TOKENS) for before, new in shapes)
        layers = sorted(held)
        own = layers[: max(1, min(len(layers), self.pool.free_layer_blocks // needed))]
        made, taken = [], []
        for before, new in shapes:
            table = BlockTable(mha=frozenset(own), block_tokens=BLOCK_TOKENS)
            table.hold(self.pool, before + new)
            taken += table.own_blocks()
            for at, layer in enumerate(layers[len(own) :]):
                table.blocks[layer] = table.blocks[own[at % len(own)]]
            table.mha = held
            made.append(Packed(table, [0] * new, before))
        return made, taken


def _blocks(point: Point) -> int:
    """Return the KV blocks of one layer that (batch, context) takes, with the new token."""
    batch, context = point
    return batch * kv_blocks(context + 1, BLOCK_TOKENS)


class Samples:
    """Every sample so far, by cell, saved in a file so that a stopped run can continue."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Read the samples of the file if they were measured with the same settings."""
        self._path, self._settings = path, dict(settings)
        self.of: dict[str, list[float]] = {}
        if path.is_file():
            content = read_json_object(path, CalibrationError, "remove it, to measure from the start")
            if content.get("settings") == self._settings:
                self.of = content["samples"]

    def add(self, name: str, us: float) -> None:
        """Add one sample."""
        self.of.setdefault(name, []).append(us)

    def save(self) -> None:
        """Write all samples."""
        write_json(self._path, {"settings": self._settings, "samples": self.of})

    def count(self, cell: Cell) -> int:
        """Return how many samples a cell has."""
        return len(self.of.get(cell.names[0], []))

    def done(self, cell: Cell, least: int, most: int) -> bool:
        """Return whether every median of a cell is precise enough, or the cell has enough samples."""
        count = self.count(cell)
        if count < least:
            return False
        return count >= most or all(spread(self.of[name]) < WANTED_SPREAD for name in cell.names)


def spread(values: list[float]) -> float:
    """Return the standard error of the median over the median, from the median absolute deviation.

    For normal noise the deviation is 1.4826 MAD, and a median's standard error 1.2533 deviation / sqrt(n).
    """
    middle = float(np.median(values))
    deviation = 1.4826 * float(np.median(np.abs(np.asarray(values) - middle)))
    return float(1.2533 * deviation / np.sqrt(len(values)) / middle)


class Survey:
    """Measures cells within a time: first which points there are to be, then all of them until they are precise."""

    def __init__(self, bench: Bench, samples: Samples, rng: random.Random) -> None:
        """Add to these samples."""
        self._bench, self._samples, self._rng = bench, samples, rng
        self._least, self._most = LEAST_REPEATS[bench.place], MOST_REPEATS[bench.place]
        self._cost_s: dict[str, float] = {}
        self.terms: dict[str, Term] = {}

    def points(self, cells: Mapping[str, Mapping[Point, Cell]], until_s: float, report: Report) -> list[Cell]:
        """Measure a coarse grid of every term once, then what says most, as far as the time allows; return the cells.

        The time has to suffice for timing each of them as often as a median needs.
        """
        self.terms = {name: Term(name, list(found), WEIGHTS.get(name, 1.0)) for name, found in cells.items()}
        chosen: list[Cell] = []
        planned_s = 0.0

        def visit(name: str, point: Point) -> None:
            nonlocal planned_s
            cell = cells[name][point]
            self.terms[name].add(point, self.once(cell))
            planned_s += self._least * self._cost_s[cell.names[0]]
            chosen.append(cell)
            report(len(chosen))

        for name, found in cells.items():
            seen = [point for point, cell in found.items() if self._samples.count(cell)]
            for point in dict.fromkeys([*coarse(list(found)), *seen]):
                visit(name, point)
        while (best := most_informative(self.terms)) is not None:
            if time.monotonic() + planned_s > until_s:
                break
            visit(*best)
        return chosen

    def once(self, cell: Cell) -> float:
        """Time a cell that has no sample yet, after warming it up; return the microseconds of its first name."""
        if not self._samples.count(cell):
            self._bench.time(cell)  # fills caches, compiles kernels, and shows how long the host takes
            self._sample(cell)
        else:
            self._cost_s.setdefault(cell.names[0], 0.0)
        return float(np.median(self._samples.of[cell.names[0]]))

    def _sample(self, cell: Cell) -> None:
        start_s = time.monotonic()
        for name, us in zip(cell.names, self._bench.time(cell), strict=True):
            self._samples.add(name, us)
        self._cost_s[cell.names[0]] = time.monotonic() - start_s

    def rounds(self, cells: Sequence[Cell], until_s: float, report: Report) -> None:
        """Time cells in rounds of random order until all are precise, or the time is over."""
        begin_s = time.monotonic()
        very_late_s = begin_s + VERY_LATE * max(until_s - begin_s, 0.0)
        while todo := [cell for cell in cells if not self._samples.done(cell, self._least, self._most)]:
            self._rng.shuffle(todo)
            enough = all(self._samples.count(cell) >= self._least for cell in todo)
            for cell in todo:
                if time.monotonic() > (until_s if enough else very_late_s):
                    break
                self._sample(cell)
            else:
                self._samples.save()
                report(len(cells) - len(todo))
                continue
            break
        self._samples.save()


def measure(bench: Bench, samples: Samples, settings: DeviceSettings, load: Load) -> tuple[list[Iterations], Survey]:
    """Measure the cells of every term; return the runs of the engine made before, between and after, and the survey."""
    deadline_s = time.monotonic() + settings.seconds
    survey = Survey(bench, samples, random.Random(settings.seed))

    def run(number: int) -> Iterations:
        bench.hold(0)
        return run_engine(bench.elastic, settings.clock, settings.seed + 1 + number, load, load.rates_rps[number])

    def until_s(share: float) -> float:
        return time.monotonic() + share * (deadline_s - time.monotonic())

    runs = [run(0)]
    cells = {
        "linear": bench.linear(16, bench.grid.tokens),
        "token": bench.embedding(),
        "head": bench.head(),
        "decode": bench.decodes(),
        "prefill": bench.prefills(),
    }
    end_s = until_s(0.7)
    with progress("choosing points, 16 bits and attention", sum(map(len, cells.values())), "points") as report:
        chosen = survey.points(cells, end_s, report)
    with progress("timing them until they are precise", len(chosen), "points") as report:
        survey.rounds(chosen, end_s, report)
    runs.append(run(1))
    tokens = sorted(tokens for (tokens,) in survey.terms["linear"].measured)
    for number, (bits, share) in enumerate(((8, 0.5), (4, 1.0)), start=2):
        quantized, end_s = list(bench.linear(bits, tokens).values()), until_s(share)
        with progress(f"measuring {bits} bits", len(quantized), "points") as report:
            for cell in quantized:
                survey.once(cell)
            survey.rounds(quantized, end_s, report)
        runs.append(run(number))
    bench.hold(0)
    return runs, survey


def terms_of(samples: Samples) -> m.Terms:
    """Return the median of every cell as the terms that ``hw.calibrate`` fits."""
    middle = {name: float(np.median(values)) for name, values in samples.of.items()}

    def curve(prefix: str) -> m.Curve:
        found = {int(name.split("/")[1]): us for name, us in middle.items() if name.split("/")[0] == prefix}
        counts = sorted(found)
        return m.Curve(np.array(counts, dtype=np.float64), np.array([found[c] for c in counts]))

    def rows(prefix: str) -> tuple[Floats, Floats, Floats]:
        found = [(*map(int, name.split("/")[1:]), us) for name, us in middle.items() if name.startswith(f"{prefix}/")]
        columns = np.array(sorted(found), dtype=np.float64).T
        return columns[0], columns[1], columns[2]

    batch, context, decode_us = rows("decode")
    chunk, prefix, prefill_us = rows("prefill")
    return m.Terms(
        linear={bits: {kind: curve(f"{kind}_{bits}") for kind in ("mha", "ffn")} for bits in (16, 8, 4)},
        token=curve("token"),
        head=curve("head"),
        prefill=m.Surface(chunk, m.mean_context(chunk, prefix), prefill_us),
        decode=m.Surface(batch, context, decode_us),
    )


def memory_bandwidth_bytes_per_s(device: Device) -> float:
    """Return the bytes per second of copying a large array, reads and writes counted; the median of five."""
    size = 1 << 30 if isinstance(device, Accelerator) else 64 << 20
    source = torch.ones(size, dtype=torch.uint8, device=device.place)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        start_s = time.perf_counter()
        target.copy_(source)
        device.synchronize()
        seconds.append(time.perf_counter() - start_s)
    return float(2 * source.nbytes / np.median(seconds[1:]))


def _us(seconds: float) -> float:
    return float(f"{seconds * 1e6:.4g}")
