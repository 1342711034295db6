"""The price of one iteration in seconds, composed block by block from a calibrated table of each term.

    iteration = fixed + token(t) + head(s) + sum over kept MHA (linear(t, bits) + attention)
                                           + sum over kept FFN linear(t, bits)

t counts the tokens of the batch that a block sees, s the sequences that get a next token. A table is linear between its
measured points. **Above** its last point it goes on with the slope of its last segment, which is the compute or
bandwidth slope of that operation; **below** its first point it holds the first value, the price of a launch. `in_range`
says whether an iteration needed the former.

Attention is priced on sums over the batch, so that an engine keeps four integers and no list:

* prefill by (query tokens, mean context that one of them attends to): a chunk of c tokens on a prefix of p adds c and
  `c * p + c * (c + 1) / 2`. Many short prompts and one long chunk are then one formula, as they are one kernel launch.
* decode by (sequences, mean context), from the batch and the sum of its contexts.
* both in one iteration: `sum` where the stack launches two kernels, `shared` where one kernel takes both (vLLM V1). A
  shared kernel runs decodes without split-KV and grouped-query packing, so they cost up to four times more:
  max(P, M, f + min(P, a * tile-contexts + h * tiles) + min(M, b * contexts + d * sequences)) times a tabulated
  residual, where P is the prefill part alone and M the decode part beside a tiny prefill.

The functions marked `njit` are the only arithmetic: the reference engine calls them from Python, the compiled one from
inside its loop, and both get the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sim.data import REPOSITORY
from sim.errors import CalibrationError, nearest
from sim.plan import WEIGHT_BITS, Plan

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

CALIBRATIONS = REPOSITORY / "conf" / "calibration"
SCHEMA = 1
MHA, FFN = 0, 1
MHA_BOTH, MHA_PREFILL_ONLY, FFN_BOTH, FFN_PREFILL_ONLY = range(4)
TILE_TOKENS = 128
"""Query tokens of one attention work item (FlashAttention's block of queries at head size 128)."""


class SharedTables(NamedTuple):
    """What prices one attention kernel over prompts and decodes; the names are those of the docstring above."""

    fit_s: Floats  # (5,) a, h, b, d, f of the module's docstring
    batch: Floats  # (D,)
    context: Floats  # (E,)
    decode_s: Floats  # (D, E) M: decodes beside a tiny prefill
    residual_prefill_tokens: Floats  # (I,) natural logarithms of the axes, as the residual is interpolated on them
    residual_prefix: Floats  # (J,) of 1 + prefix
    residual_batch: Floats  # (K,)
    residual_context: Floats  # (L,)
    residual: Floats  # (I, J, K, L)


class LatencyTables(NamedTuple):
    """The numbers of one calibration, as arrays that compiled code takes. Bits are indexed as in WEIGHT_BITS.

    N tokens, S sequences: largest tabulated counts. `linear_s` and the other one-dimensional tables hold one value for
    every whole count up to there, so that a look-up is one load.
    """

    fixed_s: float
    linear_s: Floats  # (3 bits, 2 kinds, N + 1); nan where a precision was not measured
    linear_slope_s: Floats  # (3, 2) seconds a token above N
    token_s: Floats  # (N + 1,) embedding and final norm
    token_slope_s: float
    head_s: Floats  # (S + 1,) LM head and sampler
    head_slope_s: float
    prefill_tokens: Floats  # (P,)
    prefill_context: Floats  # (Q,) mean context of a query token
    prefill_s: Floats  # (P, Q) one layer
    decode_batch: Floats  # (B,)
    decode_context: Floats  # (C,) mean context of a sequence
    decode_s: Floats  # (B, C) one layer
    shared_kernel: bool
    shared: SharedTables


@njit(cache=True)
def _segment(grid: Floats, x: float) -> int:
    """Return i so that grid[i] <= x < grid[i + 1], or the first or last segment for x outside."""
    low, high = 0, grid.shape[0] - 1
    while high - low > 1:
        middle = (low + high) // 2
        if x < grid[middle]:
            high = middle
        else:
            low = middle
    return low


@njit(cache=True)
def interp1(grid: Floats, values: Floats, x: float) -> float:
    """Return values at x: linear between points, the first value below, the last slope above."""
    if x <= grid[0] or grid.shape[0] == 1:
        return float(values[0])
    i = _segment(grid, x)
    share = (x - grid[i]) / (grid[i + 1] - grid[i])
    return float(values[i] + share * (values[i + 1] - values[i]))


@njit(cache=True)
def interp2(rows: Floats, columns: Floats, values: Floats, row: float, column: float) -> float:
    """Return values at (row, column): bilinear between points, held below, the last slopes above."""
    row, column = max(row, rows[0]), max(column, columns[0])
    i, j = _segment(rows, row), _segment(columns, column)
    u = (row - rows[i]) / (rows[i + 1] - rows[i])
    v = (column - columns[j]) / (columns[j + 1] - columns[j])
    low = values[i, j] + v * (values[i, j + 1] - values[i, j])
    high = values[i + 1, j] + v * (values[i + 1, j + 1] - values[i + 1, j])
    return float(low + u * (high - low))


@njit(cache=True)
def _position(grid: Floats, x: float) -> tuple[int, float]:
    """Return the segment of x and how far into it, held at both ends: a residual is not extrapolated."""
    if x <= grid[0]:
        return 0, 0.0
    last = grid.shape[0] - 1
    if x >= grid[last]:
        return last - 1, 1.0
    i = _segment(grid, x)
    return i, (x - grid[i]) / (grid[i + 1] - grid[i])


@njit(cache=True)
def interp4(
    a: Floats, b: Floats, c: Floats, d: Floats, values: Floats, x: float, y: float, z: float, w: float
) -> float:
    """Return values at (x, y, z, w): linear in every axis, held outside."""
    i, p = _position(a, x)
    j, q = _position(b, y)
    k, r = _position(c, z)
    m, s = _position(d, w)
    total = 0.0
    for e in range(16):
        ei, ej, ek, em = e & 1, (e >> 1) & 1, (e >> 2) & 1, (e >> 3) & 1
        weight = (p if ei else 1.0 - p) * (q if ej else 1.0 - q) * (r if ek else 1.0 - r) * (s if em else 1.0 - s)
        if weight > 0.0:
            total += weight * values[i + ei, j + ej, k + ek, m + em]
    return total


@njit(cache=True)
def _dense(values: Floats, slope: float, x: int) -> float:
    """Return values[x], or the slope's continuation above the last one."""
    last = values.shape[0] - 1
    if x <= last:
        return float(values[x])
    return float(values[last] + slope * (x - last))


@njit(cache=True)
def linear_seconds(tables: LatencyTables, bits_index: int, kind: int, tokens: int) -> float:
    """Return the seconds of one block (kind MHA or FFN) without attention over ``tokens`` tokens; none for none."""
    last = tables.linear_s.shape[2] - 1
    if tokens <= last:
        return float(tables.linear_s[bits_index, kind, tokens])
    slope = tables.linear_slope_s[bits_index, kind]
    return float(tables.linear_s[bits_index, kind, last] + slope * (tokens - last))


@njit(cache=True)
def prefill_attention_seconds(tables: LatencyTables, tokens: int, context_sum: int) -> float:
    """Return the seconds of one layer's attention of ``tokens`` prompt tokens that attend to ``context_sum`` in all."""
    if tokens == 0:
        return 0.0
    return interp2(tables.prefill_tokens, tables.prefill_context, tables.prefill_s, float(tokens), context_sum / tokens)


@njit(cache=True)
def decode_attention_seconds(tables: LatencyTables, batch: int, context_sum: int) -> float:
    """Return the seconds of one layer's attention of ``batch`` new tokens over ``context_sum`` tokens of KV in all."""
    if batch == 0:
        return 0.0
    return interp2(tables.decode_batch, tables.decode_context, tables.decode_s, float(batch), context_sum / batch)


@njit(cache=True)
def shared_kernel_seconds(
    tables: LatencyTables, prefill_s: float, prefill_tokens: int, prefill_context_sum: int, batch: int, context_sum: int
) -> float:
    """Return the seconds of one attention kernel over prompt chunks and decodes together, before its residual."""
    decode_s = interp2(
        tables.shared.batch, tables.shared.context, tables.shared.decode_s, float(batch), context_sum / batch
    )
    fit = tables.shared.fit_s
    tiles = float((prefill_tokens + TILE_TOKENS - 1) // TILE_TOKENS)
    work_s = fit[0] * (prefill_context_sum / prefill_tokens * tiles) + fit[1] * tiles
    decode_work_s = fit[2] * context_sum + fit[3] * batch
    together_s = fit[4] + min(prefill_s, work_s) + min(decode_s, decode_work_s)
    return float(max(max(prefill_s, decode_s), together_s))


@njit(cache=True)
def attention_seconds(
    tables: LatencyTables, prefill_tokens: int, prefill_context_sum: int, batch: int, context_sum: int
) -> float:
    """Return the seconds of one layer's attention over everything in the iteration."""
    if prefill_tokens == 0:
        return decode_attention_seconds(tables, batch, context_sum)
    prefill_s = prefill_attention_seconds(tables, prefill_tokens, prefill_context_sum)
    if batch == 0:
        return prefill_s
    if not tables.shared_kernel:
        return prefill_s + decode_attention_seconds(tables, batch, context_sum)
    seconds = shared_kernel_seconds(tables, prefill_s, prefill_tokens, prefill_context_sum, batch, context_sum)
    residual = interp4(
        tables.shared.residual_prefill_tokens,
        tables.shared.residual_prefix,
        tables.shared.residual_batch,
        tables.shared.residual_context,
        tables.shared.residual,
        math.log(prefill_tokens),
        math.log(1.0 + max(0.0, prefill_context_sum / prefill_tokens - 0.5 * (prefill_tokens + 1))),
        math.log(batch),
        math.log(max(context_sum, batch) / batch),
    )
    return max(prefill_s, seconds * residual)


@njit(cache=True)
def iteration_seconds(
    tables: LatencyTables,
    layers: Counts,
    prefill_tokens: int,
    prefill_context_sum: int,
    decode_batch: int,
    decode_context_sum: int,
    sequences: int,
) -> float:
    """Return the seconds of one iteration.

    Args:
        tables: of a LatencyModel.
        layers: (3 bits, 4) how many blocks are MHA kept in decode and prefill, MHA in prefill only, and so for FFN.
        prefill_tokens, prefill_context_sum: prompt tokens of the iteration and the contexts they attend to, summed.
        decode_batch, decode_context_sum: sequences that decode and the tokens of KV they read, summed.
        sequences: sequences that get a next token.
    """
    tokens = prefill_tokens + decode_batch
    total = tables.fixed_s + _dense(tables.token_s, tables.token_slope_s, tokens)
    total += _dense(tables.head_s, tables.head_slope_s, sequences)
    mha_both, mha_prefill_only = 0, 0
    for b in range(layers.shape[0]):
        mha_both += layers[b, 0]
        mha_prefill_only += layers[b, 1]
        if layers[b, 0] > 0:
            total += layers[b, 0] * linear_seconds(tables, b, 0, tokens)
        if layers[b, 1] > 0:
            total += layers[b, 1] * linear_seconds(tables, b, 0, prefill_tokens)
        if layers[b, 2] > 0:
            total += layers[b, 2] * linear_seconds(tables, b, 1, tokens)
        if layers[b, 3] > 0:
            total += layers[b, 3] * linear_seconds(tables, b, 1, prefill_tokens)
    if mha_both > 0:
        total += mha_both * attention_seconds(
            tables, prefill_tokens, prefill_context_sum, decode_batch, decode_context_sum
        )
    if mha_prefill_only > 0:
        total += mha_prefill_only * prefill_attention_seconds(tables, prefill_tokens, prefill_context_sum)
    return total


@njit(cache=True)
def iteration_in_range(
    tables: LatencyTables,
    prefill_tokens: int,
    prefill_context_sum: int,
    decode_batch: int,
    decode_context_sum: int,
    sequences: int,
) -> bool:
    """Return whether no table is read above its last point. Holding a price below the first one counts as in."""
    if prefill_tokens + decode_batch >= tables.linear_s.shape[2] or sequences >= tables.head_s.shape[0]:
        return False
    if prefill_tokens > 0 and (
        prefill_tokens > tables.prefill_tokens[-1] or prefill_context_sum > tables.prefill_context[-1] * prefill_tokens
    ):
        return False
    if decode_batch == 0:
        return True
    if prefill_tokens > 0 and tables.shared_kernel:
        return bool(
            decode_batch <= tables.shared.batch[-1] and decode_context_sum <= tables.shared.context[-1] * decode_batch
        )
    return bool(
        decode_batch <= tables.decode_batch[-1] and decode_context_sum <= tables.decode_context[-1] * decode_batch
    )


def chunk_context_sum(chunk_tokens: int, prefix_tokens: int) -> int:
    """Return how many tokens a chunk's tokens attend to, summed: each sees the prefix, those before it and itself."""
    return chunk_tokens * prefix_tokens + chunk_tokens * (chunk_tokens + 1) // 2


def plan_layers(plan: Plan) -> Counts:
    """Return the block counts (3 bits, 4) that `iteration_seconds` prices; a plan is no more than these to it."""
    return _plan_layers(plan.decode.mha, plan.decode.ffn, plan.prefill.mha, plan.prefill.ffn, plan.weight_bits)


@lru_cache(maxsize=4096)
def _plan_layers(
    decode_mha: tuple[bool, ...],
    decode_ffn: tuple[bool, ...],
    prefill_mha: tuple[bool, ...],
    prefill_ffn: tuple[bool, ...],
    weight_bits: tuple[int, ...],
) -> Counts:
    counts = np.zeros((len(WEIGHT_BITS), 4), dtype=np.int64)
    for both, prefill, first in ((decode_mha, prefill_mha, MHA_BOTH), (decode_ffn, prefill_ffn, FFN_BOTH)):
        for in_decode, in_prefill, bits in zip(both, prefill, weight_bits, strict=True):
            row = WEIGHT_BITS.index(bits)
            if in_decode:
                counts[row, first] += 1
            elif in_prefill:
                counts[row, first + 1] += 1
    counts.flags.writeable = False
    return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class TermError:
    """How far a term was from measurements that its fit had not seen: relative errors, and on how many points."""

    median: float
    p95: float
    points: int
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatencyModel:
    """A calibrated latency model of one model on one device. Build it with `load_calibration`.

    kind: `measured` (one stack measured the model's own operations), `composed` (of kernels of other shapes) or
    `derived` (scaled from another device; not measured).
    errors: held-out error of every term; fixed_source: where the overhead of an iteration comes from.
    """

    name: str
    model: str
    device: str
    kind: str
    bits: tuple[int, ...]
    tables: LatencyTables
    fixed_source: str
    errors: Mapping[str, TermError]
    validation: str
    sources: tuple[Mapping[str, str], ...]
    notes: tuple[str, ...] = ()

    @property
    def fixed_s(self) -> float:
        """Host overhead of one iteration."""
        return self.tables.fixed_s

    def with_fixed(self, fixed_s: float, source: str) -> LatencyModel:
        """Return the model with another overhead per iteration and where it comes from."""
        if not (math.isfinite(fixed_s) and fixed_s >= 0):
            raise CalibrationError(f"fixed_s is {fixed_s!r}; it must be a number of seconds of at least 0")
        return replace(self, tables=self.tables._replace(fixed_s=float(fixed_s)), fixed_source=source)

    def check_bits(self, plan: Plan) -> None:
        """Check that every precision of a plan was measured.

        Raises:
            CalibrationError: naming the bits that lack, those there are, and what to do.
        """
        self._check_bits(set(plan.weight_bits))

    def linear_s(self, kind: str, bits: int, tokens: int) -> float:
        """Return the seconds of one block without attention: kind `mha` (norm to output projection) or `ffn`."""
        if kind not in ("mha", "ffn"):
            raise CalibrationError(f"block kind {kind!r}: {nearest(kind, ('mha', 'ffn'))}")
        self._check_bits({bits})
        return float(linear_seconds(self.tables, WEIGHT_BITS.index(bits), MHA if kind == "mha" else FFN, tokens))

    def prefill_attention_s(self, chunk_tokens: int, prefix_tokens: int = 0) -> float:
        """Return the seconds of one layer's attention of a chunk on top of a prefix whose KV is there."""
        context_sum = chunk_context_sum(chunk_tokens, prefix_tokens)
        return float(prefill_attention_seconds(self.tables, chunk_tokens, context_sum))

    def decode_attention_s(self, batch: int, context_sum_tokens: int) -> float:
        """Return the seconds of one layer's attention of ``batch`` decodes that read that many tokens of KV in all."""
        return float(decode_attention_seconds(self.tables, batch, context_sum_tokens))

    def attention_s(self, chunks: Sequence[tuple[int, int]], decode_batch: int, decode_context_sum: int) -> float:
        """Return the seconds of one layer's attention over chunks (tokens, prefix) and decodes in one iteration."""
        tokens = sum(chunk for chunk, _ in chunks)
        context_sum = sum(chunk_context_sum(chunk, prefix) for chunk, prefix in chunks)
        return float(attention_seconds(self.tables, tokens, context_sum, decode_batch, decode_context_sum))

    def head_s(self, sequences: int) -> float:
        """Return the seconds of LM head and sampling for that many sequences."""
        return float(_dense(self.tables.head_s, self.tables.head_slope_s, sequences))

    def token_s(self, tokens: int) -> float:
        """Return the seconds of embedding and final norm, which no plan can drop."""
        return float(_dense(self.tables.token_s, self.tables.token_slope_s, tokens))

    def iteration_s(
        self,
        plan: Plan,
        chunks: Sequence[tuple[int, int]],
        decode_batch: int,
        decode_context_sum: int,
        sequences: int,
    ) -> float:
        """Return the seconds of one iteration.

        Args:
            plan: what runs; a block that only its prefill mask keeps sees only prompt tokens.
            chunks: (chunk tokens, prefix tokens whose KV is there), one a prompt.
            decode_batch: sequences that decode.
            decode_context_sum: tokens of KV that they read in one layer, summed, each one's own new token included.
            sequences: sequences that get a next token: the decodes and the prompts whose last chunk this is.
        Raises:
            CalibrationError: if the plan asks for a precision that was not measured.
        """
        self.check_bits(plan)
        tokens = sum(chunk for chunk, _ in chunks)
        context_sum = sum(chunk_context_sum(chunk, prefix) for chunk, prefix in chunks)
        return float(
            iteration_seconds(
                self.tables, plan_layers(plan), tokens, context_sum, decode_batch, decode_context_sum, sequences
            )
        )

    def in_range(
        self, chunks: Sequence[tuple[int, int]], decode_batch: int, decode_context_sum: int, sequences: int
    ) -> bool:
        """Return whether the price of this iteration needs no extrapolation."""
        tokens = sum(chunk for chunk, _ in chunks)
        context_sum = sum(chunk_context_sum(chunk, prefix) for chunk, prefix in chunks)
        return bool(iteration_in_range(self.tables, tokens, context_sum, decode_batch, decode_context_sum, sequences))

    def _check_bits(self, wanted: set[int]) -> None:
        missing = sorted(wanted - set(self.bits), reverse=True)
        if missing:
            raise CalibrationError(
                f"calibration {self.name!r} has no {' or '.join(map(str, missing))}-bit times; it has "
                f"{', '.join(map(str, self.bits))}. Keep weight_bits of the plan to those, or take a calibration that "
                f"has more: {', '.join(calibrations_with(missing)) or 'none is here; measure one with hw.calibrate'}"
            )


def calibration_names() -> list[str]:
    """Return the names of the committed calibrations."""
    return sorted(path.stem for path in CALIBRATIONS.glob("*.json"))


def calibrations_with(bits: Sequence[int]) -> list[str]:
    """Return the names of the committed calibrations that have all these bits."""
    return [
        name
        for name in calibration_names()
        if all(str(b) in _read(CALIBRATIONS / f"{name}.json")["tables"]["linear_us"] for b in bits)
    ]


def load_calibration(name_or_path: str | Path) -> LatencyModel:
    """Return a committed calibration by name, or any by path.

    Raises:
        CalibrationError: if there is none of that name, or the file is not one that `hw.calibrate` writes.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        path = CALIBRATIONS / f"{name_or_path}.json"
        if not path.is_file():
            raise CalibrationError(
                f"no calibration {str(name_or_path)!r}; {nearest(str(name_or_path), calibration_names())}"
            )
    if not path.is_file():
        raise CalibrationError(
            f"no calibration file {path}; give a .json that hw.calibrate wrote, or a name: "
            f"{', '.join(calibration_names())}"
        )
    return calibration_from_dict(_read(path), str(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} cannot be read as JSON: {error}; write it again with hw.calibrate") from error
    if not isinstance(content, dict) or not isinstance(content.get("tables"), dict):
        raise CalibrationError(f"{path} is no calibration; hw.calibrate writes one")
    return content


def calibration_from_dict(content: Mapping[str, Any], origin: str = "calibration") -> LatencyModel:
    """Return the model that a calibration file's content describes.

    Raises:
        CalibrationError: naming what is missing or out of order.
    """
    if content.get("schema") != SCHEMA:
        raise CalibrationError(
            f"{origin}: schema is {content.get('schema')!r}, this version reads {SCHEMA}; "
            "write the file again with hw.calibrate"
        )
    try:
        tables = _tables(content, origin)
        return LatencyModel(
            name=content["name"],
            model=content["model"],
            device=content["device"],
            kind=content["kind"],
            bits=tuple(b for b in WEIGHT_BITS if str(b) in content["tables"]["linear_us"]),
            tables=tables,
            fixed_source=content["fixed_source"],
            errors={term: TermError(**error) for term, error in content["errors"].items()},
            validation=content["validation"],
            sources=tuple(content["sources"]),
            notes=tuple(content["notes"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(f"{origin}: {error!r} while reading it; write it again with hw.calibrate") from error


def _tables(content: Mapping[str, Any], origin: str) -> LatencyTables:
    tables = content["tables"]

    def axis(values: Sequence[float], name: str) -> Floats:
        grid = np.asarray(values, dtype=np.float64)
        if grid.ndim != 1 or len(grid) < 2 or not np.all(np.isfinite(grid)) or np.any(np.diff(grid) <= 0):
            raise CalibrationError(f"{origin}: axis {name} must hold at least two finite numbers in ascending order")
        return grid

    def seconds(values: Any, name: str, shape: tuple[int, ...]) -> Floats:
        table = np.asarray(values, dtype=np.float64) * 1e-6
        if table.shape != shape or not np.all(np.isfinite(table)) or np.any(table < 0):
            raise CalibrationError(f"{origin}: {name} must hold {' x '.join(map(str, shape))} finite microseconds >= 0")
        return table

    def dense(grid: Floats, values: Floats) -> tuple[Floats, float]:
        by_count = np.array([0.0] + [interp1(grid, values, float(x)) for x in range(1, int(grid[-1]) + 1)])
        return by_count, float((values[-1] - values[-2]) / (grid[-1] - grid[-2]))

    tokens = axis(tables["tokens"], "tokens")
    linear = np.full((len(WEIGHT_BITS), 2, int(tokens[-1]) + 1), np.nan)
    slopes = np.full((len(WEIGHT_BITS), 2), np.nan)
    for row, bits in enumerate(WEIGHT_BITS):
        for kind, key in ((MHA, "mha"), (FFN, "ffn")):
            if str(bits) in tables["linear_us"]:
                values = seconds(tables["linear_us"][str(bits)][key], f"linear_us.{bits}.{key}", tokens.shape)
                linear[row, kind], slopes[row, kind] = dense(tokens, values)
    token_s, token_slope_s = dense(tokens, seconds(tables["token_us"], "token_us", tokens.shape))
    sequences = axis(tables["sequences"], "sequences")
    head_s, head_slope_s = dense(sequences, seconds(tables["head_us"], "head_us", sequences.shape))

    def plane(key: str, rows: str, columns: str) -> tuple[Floats, Floats, Floats]:
        table = tables[key]
        first, second = axis(table[rows], f"{key}.{rows}"), axis(table[columns], f"{key}.{columns}")
        return first, second, seconds(table["us"], f"{key}.us", (len(first), len(second)))

    shared = tables.get("shared_attention")
    if shared is None:
        none, nothing = np.zeros(2), np.zeros((2, 2))
        shared_tables = SharedTables(np.zeros(5), none, none, nothing, none, none, none, none, np.ones((2, 2, 2, 2)))
    else:
        names = ("prefill_tokens", "prefix", "batch", "context")
        axes = [axis(shared[key], f"shared_attention.{key}") for key in names]
        residual = np.asarray(shared["residual"], dtype=np.float64).reshape([len(a) for a in axes])
        logs = [np.log(axes[0]), np.log1p(axes[1]), np.log(axes[2]), np.log(axes[3])]
        fit_s = seconds(shared["fit_us"], "shared_attention.fit_us", (5,))
        beside = plane("shared_attention", "batch", "context")
        shared_tables = SharedTables(fit_s, *beside, logs[0], logs[1], logs[2], logs[3], residual)
    return LatencyTables(
        float(content["fixed_us"]) * 1e-6,
        linear,
        slopes,
        token_s,
        token_slope_s,
        head_s,
        head_slope_s,
        *plane("prefill_attention", "tokens", "context"),
        *plane("decode_attention", "batch", "context"),
        shared is not None,
        shared_tables,
    )
