"""Measures the terms of ``sim.cost.latency`` on this device: ``python -m hw.calibrate source=device``.

Each term is timed in the code that serves: the modules of the elastic model, and paged attention over a paged pool.
Linear blocks run in the order of a forward pass (MHA and FFN of all layers in turn), so that their weights come from
memory and not from a cache. Cells are measured in rounds of random order until the median of each is precise enough.
Samples are saved after every round, and a run that was stopped continues from there.

Before, between and after the rounds, the engine serves random requests, so that a busy machine slows down both. The
time of an iteration is then fitted as a constant plus a factor times the sum of its terms. A final run, on other
requests, measures the error of the result.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor

from hw.calibrate import measurements as m
from hw.calibrate.calibration import times
from hw.elastic.attention_choice import find_attention
from hw.elastic.device import Device
from hw.elastic.model import ElasticModel
from hw.elastic.paged_attention import ATTENTION, Packed, PagedBatch, forward
from hw.elastic.paged_kv import ArenaStorage
from hw.elastic.staging import Staging
from hw.engine.clock import CLOCKS, RealClock
from hw.engine.hw_engine import HwEngine, arena_of
from hw.engine.iteration_log import Shape
from hw.engine.prompts import RandomPrompts
from sim.cost.latency import LatencyModel, calibration_from_dict
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.plan import KeepMask, dense_plan
from sim.engine.block_table import BlockTable
from sim.engine.kv_pool import KVPool
from sim.engine.protocol import EngineConfig
from sim.engine.scheduler import Limits
from sim.errors import CalibrationError
from sim.json_file import read_json_object
from sim.policies import Fixed
from sim.progress import progress
from sim.replay.loop import replay
from sim.results.plots import figure_file
from sim.results.run_folder import write_json
from sim.traces.generate import lognormal_lengths, poisson
from sim.types import Floats

Timed = Callable[[], tuple[float, ...]]

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SEQUENCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
PREFILL_TOKENS, PREFIXES = (1, 4, 16, 32, 64, 128, 256), (0, 32, 128, 256, 512)
BATCHES, CONTEXTS = (1, 2, 3, 4, 6, 8, 12, 16, 24), (8, 32, 64, 128, 256, 512)
QUANTISED_LAYERS = 4
"""Layers over which a linear block is timed at 8 and 4 bits: unpacking takes longer than a cache could save."""
BLOCK_TOKENS = 16
LEAST_REPEATS, MOST_REPEATS = 12, 40
RUN_S = 10.0
"""Seconds of arrivals in a run of the engine."""
RATES_RPS = (1.5, 6.0, 0.7, 3.0)
"""Arrival rates of the engine's runs in turn: from single requests to full batches with prompts."""
WANTED_SPREAD = 0.02
"""A cell is done when the standard error of its median is below this share of the median."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettings:
    """What is measured, and how. device: an option of conf/gpu. clock: cpu or wall. seconds: at most."""

    model: str
    device: str
    clock: str
    seconds: float
    seed: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to time: ``run`` does it ``count`` times and returns the total seconds of each of ``names``."""

    names: tuple[str, ...]
    run: Timed
    count: int


class _NoAttention:
    """KV pages that skip attention; only norm, projections and rotary embedding of an MHA block remain."""

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return key, value

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        return query.transpose(1, 2)


class Bench:
    """Builds the cells of one model and times them."""

    def __init__(self, elastic: ElasticModel, clock: str) -> None:
        """Use a dense model and a clock by name."""
        self.elastic, self._spec = elastic, elastic.spec
        self.clock = CLOCKS[clock]
        elastic.use_attention(ATTENTION)
        most = (max(BATCHES) + 1) * (-(-(max(CONTEXTS) + max(PREFILL_TOKENS) + 1) // BLOCK_TOKENS) + 1)
        blocks = most * self._spec.num_layers
        self.arena = arena_of(elastic, blocks, first_blocks=blocks, block_tokens=BLOCK_TOKENS)
        self.pool = KVPool(blocks, ArenaStorage(self.arena, elastic.hardware))

    @torch.inference_mode()
    def time(self, cell: Cell) -> list[float]:
        """Return the microseconds of one repetition, for each name of the cell."""
        return [seconds / cell.count * 1e6 for seconds in cell.run()]

    def now_s(self) -> float:
        """Return the time on the clock of the bench, after all work of the device is done."""
        self.elastic.hardware.synchronize()
        return self.clock()

    def _hidden(self, tokens: int) -> Tensor:
        return torch.randn(1, tokens, self._spec.hidden_size, device=self.elastic.device).to(self.elastic.dtype)

    @torch.inference_mode()
    def linear(self, bits: int) -> list[Cell]:
        """Return the cells of MHA and FFN blocks at a precision, to which the model is changed."""
        layers = self._spec.num_layers if bits == 16 else min(QUANTISED_LAYERS, self._spec.num_layers)
        dense = dense_plan(self._spec)
        self.elastic.apply(
            replace(dense, weight_bits=tuple(bits if i < layers else 16 for i in range(self._spec.num_layers)))
        )
        pages = _NoAttention()

        def run(hidden: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[float, float]:
            mha_s = ffn_s = 0.0
            for layer in range(layers):
                start_s = self.now_s()
                hidden + self.elastic.attend_paged(layer, hidden, rope, pages)
                middle_s = self.now_s()
                hidden + self.elastic.feed(layer, hidden)
                ffn_s += self.now_s() - middle_s
                mha_s += middle_s - start_s
            return mha_s, ffn_s

        cells = []
        for tokens in TOKENS:
            hidden = self._hidden(tokens)
            rope = self.elastic.rope(hidden, torch.arange(tokens, device=hidden.device)[None])
            names = (f"mha_{bits}/{tokens}", f"ffn_{bits}/{tokens}")
            cells.append(Cell(names, partial(run, hidden, rope), layers))
        return cells

    @torch.inference_mode()
    def ends(self) -> list[Cell]:
        """Return the cells of the embedding, and of the head with the choice of a token."""

        def token(ids: Tensor) -> tuple[float]:
            start_s = self.now_s()
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
            self.elastic.rope(self.elastic.embed(ids, positions), positions)
            return (self.now_s() - start_s,)

        def head(hidden: Tensor) -> tuple[float]:
            start_s = self.now_s()
            logits = self.elastic.head(hidden)
            bool(torch.isfinite(logits).all())
            logits.argmax(-1).tolist()
            return (self.now_s() - start_s,)

        cells = []
        for tokens in TOKENS:
            ids = torch.zeros(1, tokens, dtype=torch.long, device=self.elastic.device)
            cells.append(Cell((f"token/{tokens}",), partial(token, ids), 1))
        cells += [Cell((f"head/{count}",), partial(head, self._hidden(count)[0]), 1) for count in SEQUENCES]
        return cells

    def attention(self) -> list[Cell]:
        """Return the cells of attention: a batch of decodes with equal context, and a prompt chunk after a prefix."""
        layers = self._spec.num_layers
        decodes = [(batch, context) for batch in BATCHES for context in CONTEXTS]
        chunks = [(tokens, before) for tokens in PREFILL_TOKENS for before in PREFIXES]
        return [
            *(Cell((f"decode/{b}/{c}",), self._attention([(c, 1)] * b, []), layers) for b, c in decodes),
            *(Cell((f"prefill/{t}/{c}",), self._attention([], [(c, t)]), layers) for t, c in chunks),
        ]

    def _attention(self, decodes: list[tuple[int, int]], prefills: list[tuple[int, int]]) -> Timed:
        def run() -> tuple[float, ...]:
            spec, device = self._spec, self.elastic.device
            made = self._requests(decodes + prefills, frozenset(range(spec.num_layers)))
            count = sum(len(packed.tokens) for packed in made)
            query = torch.zeros(1, spec.num_heads, count, spec.head_dim, dtype=self.elastic.dtype, device=device)
            key = torch.zeros(1, spec.num_kv_heads, count, spec.head_dim, dtype=self.elastic.dtype, device=device)
            start_s = self.now_s()
            batch = PagedBatch(self.arena, made[: len(decodes)], made[len(decodes) :], self.elastic.windows)
            for layer in range(spec.num_layers):
                batch.enter(layer)
                batch.update(key, key, layer)
                batch.attend(layer, query, key, key, None)
            seconds = self.now_s() - start_s
            for packed in made:
                self.pool.release(packed.table.own_blocks())
            return (seconds,)

        return run

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
            made = self._requests(decodes + prefills, held)
            single, chunks = made[: len(decodes)], made[len(decodes) :]
            ends = np.cumsum([len(packed.tokens) for packed in made]) - 1
            start_s = self.now_s()
            batch = PagedBatch(self.arena, single, chunks, self.elastic.windows)
            logits = forward(self.elastic, batch, single, chunks, ends.tolist(), prefill=keep, decode=keep)
            bool(torch.isfinite(logits).all())
            logits.argmax(-1).tolist()
            seconds = self.now_s() - start_s
            for packed in made:
                self.pool.release(packed.table.own_blocks())
            return (seconds,)

        return run

    def _requests(self, shapes: list[tuple[int, int]], held: frozenset[int]) -> list[Packed]:
        made = []
        for before, new in shapes:
            table = BlockTable(mha=held, block_tokens=BLOCK_TOKENS)
            table.hold(self.pool, before + new)
            made.append(Packed(table, [0] * new, before))
        return made


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

    def done(self, name: str) -> bool:
        """Return whether a cell's median is precise enough, or the cell has enough samples."""
        values = self.of.get(name, [])
        if len(values) < LEAST_REPEATS:
            return False
        return len(values) >= MOST_REPEATS or spread(values) < WANTED_SPREAD


def spread(values: list[float]) -> float:
    """Return the standard error of the median over the median, from the median absolute deviation.

    For normal noise the deviation is 1.4826 MAD, and a median's standard error 1.2533 deviation / sqrt(n).
    """
    middle = float(np.median(values))
    deviation = 1.4826 * float(np.median(np.abs(np.asarray(values) - middle)))
    return float(1.2533 * deviation / np.sqrt(len(values)) / middle)


def measure(bench: Bench, samples: Samples, settings: DeviceSettings) -> list[Iterations]:
    """Measure every cell of every term; return the runs of the engine made before, between and after."""
    deadline_s = time.monotonic() + settings.seconds
    rng = random.Random(settings.seed)
    groups: list[tuple[Callable[[], list[Cell]], float]] = [  # and their share of the remaining time
        (lambda: bench.linear(16) + bench.ends() + bench.attention(), 0.7),
        (lambda: bench.linear(8), 0.5),
        (lambda: bench.linear(4), 1.0),
    ]
    runs = [run_engine(bench.elastic, settings.clock, settings.seed + 1, RUN_S, RATES_RPS[0])]
    for index, (build, share) in enumerate(groups):
        cells = build()
        until_s = time.monotonic() + share * (deadline_s - time.monotonic())
        with progress(f"measuring group {index + 1} of {len(groups)}", len(cells), "timings") as report:
            for cell in cells:
                if cell.names[0] not in samples.of:
                    bench.time(cell)  # the first run also warms up caches
            while todo := [cell for cell in cells if not all(map(samples.done, cell.names))]:
                late = time.monotonic() > until_s
                if late and all(len(samples.of.get(cell.names[0], [])) >= LEAST_REPEATS for cell in todo):
                    break
                rng.shuffle(todo)
                for cell in todo:
                    for name, us in zip(cell.names, bench.time(cell), strict=True):
                        samples.add(name, us)
                samples.save()
                report(len(cells) - len(todo))
        rate_rps = RATES_RPS[(1 + index) % len(RATES_RPS)]
        runs.append(run_engine(bench.elastic, settings.clock, settings.seed + 2 + index, RUN_S, rate_rps))
    return runs


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


@dataclass(frozen=True, slots=True)
class Iterations:
    """Iterations of a run of the engine: the seconds and the batch of each."""

    measured_s: Floats
    shapes: tuple[Shape, ...]

    def priced_s(self, latency: LatencyModel) -> Floats:
        """Return the seconds that a latency model predicts for each."""
        prices = [
            latency.iteration_s(s.plan, s.chunks, s.decode_batch, s.decode_context_sum, s.sequences)
            for s in self.shapes
        ]
        return np.array(prices)


@dataclass(frozen=True, slots=True)
class Line:
    """The seconds of an iteration: ``factor * terms + prefill_attention_factor * prefill attention + fixed_s``.

    The factors are not 1 because a term finds other data in the caches during a run than when it is timed in a loop,
    and because the attention of prompts touches KV blocks and masks that were never used before.
    off: median absolute relative error over the iterations.
    """

    factor: float
    prefill_attention_factor: float
    fixed_s: float
    off: float


def line_over_terms(runs: Sequence[Iterations], content: Mapping[str, Any]) -> Line:
    """Fit the line to the iterations of runs: relative errors with a soft L1 loss, so that those above 5 % count less.

    content: the calibration with the terms; its ``fixed_us`` is 0.
    """
    measured_s = np.concatenate([run.measured_s for run in runs])
    once, twice = (latency_of(times(content, 1.0, factor)) for factor in (1.0, 2.0))
    all_s, more_s = (np.concatenate([run.priced_s(latency) for run in runs]) for latency in (once, twice))
    terms_s = np.column_stack((2 * all_s - more_s, more_s - all_s, np.full(len(all_s), 1e-3)))

    def off(at: Floats) -> Floats:
        errors: Floats = terms_s @ at / measured_s - 1
        return errors

    bounds = ([0.1, 0.1, 0.0], np.inf)
    found = least_squares(off, (1.0, 1.0, 1.0), bounds=bounds, loss="soft_l1", f_scale=0.05).x
    return Line(float(found[0]), float(found[1]), float(found[2]) * 1e-3, float(np.median(np.abs(off(found)))))


def run_engine(elastic: ElasticModel, clock: str, seed: int, duration_s: float, rate_rps: float) -> Iterations:
    """Serve random requests on the dense model."""
    spec = elastic.spec
    elastic.apply(dense_plan(spec))
    config = EngineConfig(limits=Limits(max_batch_tokens=128, max_running=16), kv_block_tokens=BLOCK_TOKENS)
    trace = poisson(
        rate_rps=rate_rps,
        duration_s=duration_s,
        lengths=lambda rng, requests: lognormal_lengths(
            rng,
            requests,
            prompt_tokens_p50=70,
            prompt_sigma=0.7,
            output_tokens_p50=14,
            output_sigma=0.6,
            max_prompt_tokens=300,
            max_output_tokens=60,
        ),
        seed=seed,
    )
    plan = dense_plan(spec)
    engine = HwEngine(
        elastic=elastic,
        config=config,
        plan=plan,
        budget_bytes=budget_for_kv_blocks(spec, plan, 200, 0, BLOCK_TOKENS),
        prompts=RandomPrompts(spec.vocab_size, seed),
        clock=RealClock(clock, skip_idle=True),
    )
    replay(trace, engine, Fixed(plan))
    rows, shapes = engine.iterations(), engine.shapes()
    engine.close()
    # An iteration lasts until the next one starts, if that follows at once.
    following = np.append(rows.start_s[1:], np.inf)
    lasting = np.where(following - rows.end_s < 0.005, following, rows.end_s) - rows.start_s
    return Iterations(lasting, tuple(shapes))


def memory_bandwidth_bytes_per_s(device: Device) -> float:
    """Return the bytes per second of copying a large array, reads and writes counted; the median of five."""
    source = torch.ones(64 << 20, dtype=torch.uint8, device=device.place)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        start_s = time.perf_counter()
        target.copy_(source)
        device.synchronize()
        seconds.append(time.perf_counter() - start_s)
    return float(2 * source.nbytes / np.median(seconds[1:]))


def plot(path: Path, terms: m.Terms, latency: LatencyModel, held_out: Iterations, title: str) -> None:
    """Write one PNG: measured points and fit of every term, and measured against predicted iterations."""
    with figure_file(path, 2, 3, size=(14, 8), title=title) as (_, axes):
        for axis, kind in zip(axes[0], ("mha", "ffn"), strict=False):
            for bits, kinds in terms.linear.items():
                measured = kinds[kind]
                points = axis.plot(measured.x, measured.us / 1e3, "o", markersize=4, label=f"{bits} bits, measured")
                x = np.arange(1, int(measured.x[-1]) + 1)
                fitted = [latency.linear_s(kind, bits, int(t)) * 1e3 for t in x]
                axis.plot(x, fitted, color=points[0].get_color(), linewidth=0.8)
            axis.set(
                xscale="log",
                yscale="log",
                xlabel="tokens",
                ylabel="time [ms]",
                title=f"{kind.upper()} block without attention",
            )
            axis.legend()
        head = axes[0][2].plot(terms.head.x, terms.head.us / 1e3, "o", markersize=4, label="head, measured")
        x = np.arange(1, int(terms.head.x[-1]) + 1)
        axes[0][2].plot(x, [latency.head_s(int(s)) * 1e3 for s in x], color=head[0].get_color(), linewidth=0.8)
        axes[0][2].set(xlabel="sequences", ylabel="time [ms]", title="LM head and choice of a token")
        for batch in (1, 4, 8, 16):
            here = terms.decode.x == batch
            line = axes[1][0].plot(
                terms.decode.y[here], terms.decode.us[here] / 1e3, "o", markersize=4, label=f"batch {batch}"
            )
            x = np.arange(8, int(terms.decode.y.max()) + 1, 8)
            fitted = [latency.decode_attention_s(batch, int(batch * c)) * 1e3 for c in x]
            axes[1][0].plot(x, fitted, color=line[0].get_color(), linewidth=0.8)
        axes[1][0].set(xlabel="context [tokens]", ylabel="time [ms]", title="decode attention, one layer")
        axes[1][0].legend()
        for tokens in (16, 64, 128):
            here = terms.prefill.x == tokens
            prefix = terms.prefill.y[here] - (tokens + 1) / 2
            line = axes[1][1].plot(prefix, terms.prefill.us[here] / 1e3, "o", markersize=4, label=f"{tokens} tokens")
            fitted = [latency.prefill_attention_s(tokens, int(p)) * 1e3 for p in prefix]
            axes[1][1].plot(prefix, fitted, color=line[0].get_color(), linewidth=0.8)
        axes[1][1].set(xlabel="tokens before the chunk", ylabel="time [ms]", title="prefill attention, one layer")
        axes[1][1].legend()
        both = (held_out.priced_s(latency) * 1e3, held_out.measured_s * 1e3)
        axes[1][2].plot(*both, ".", markersize=4)
        most = float(max(map(np.max, both)))
        axes[1][2].plot([0, most], [0, most], color="black", linewidth=0.8)
        axes[1][2].set(xlabel="priced [ms]", ylabel="measured [ms]", title="iterations, held out")


def latency_of(content: Mapping[str, Any]) -> LatencyModel:
    """Return the latency model of a calibration's content."""
    return calibration_from_dict(content, str(content["name"]))
