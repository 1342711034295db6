"""The duration of one iteration in seconds, summed over blocks from one calibrated table per term.

    iteration = max(host floor, fixed + token(t) + head(s) + sum over kept MHA (linear(t, bits) + attention)
                                                           + sum over kept FFN linear(t, bits))

t is the number of batch tokens that a block processes, s the number of sequences that get a next token. Between
measured points a table is linear. **Above** the last point it continues with the slope of the last segment, the compute
or bandwidth slope of the operation. **Below** the first point it keeps the first value, the cost of a kernel launch.
`in_range` returns whether an iteration needs no extrapolation above a last point.

Attention depends on sums over the batch, so that an engine keeps four integers instead of a list of requests:

* prefill on (query tokens, mean context per query token): a chunk of c tokens after a prefix of p tokens adds c and
  `c * p + c * (c + 1) / 2`. One formula covers many short prompts and one long chunk, as one kernel launch does.
* decode on (sequences, mean context), from the batch size and the sum of its contexts.
* both in one iteration: the sum, if the serving stack launches two kernels; `shared`, if one kernel takes both (vLLM
  V1). A shared kernel runs decodes without split-KV and grouped-query packing, so they cost up to four times more:
  max(P, M, f + min(P, a * tile-contexts + h * tiles) + min(M, b * contexts + d * sequences)) times a tabulated
  residual, where P is the prefill part alone and M the decode part next to a tiny prefill.

**Layers of `kv_only`** (``Plan``, POP). All tokens of a prompt but its last one pass only the products with q, k and v
of such a layer, which write their keys and values. The last ones of the prompts that end in this iteration, and the
decodes, pass all of it; as each of them is one query over a context, their attention is that of decodes:

    MHA block = share * linear(all tokens) + (1 - share) * linear(those that pass all) + decode attention of these
    FFN block = linear(those that pass all)

The share is that of q, k and v in the multiplications with the block's weights (``ModelSpec.qkv_share``). So the norm,
the rotation and the writing of KV, which the tables hold together with the products, are taken to be divided in the
same way. An all-reduce follows the output projection, so it is one of the tokens that pass all.

**FFN blocks at fewer channels** (``Plan.ffn_width``, AmoebaLLM). Both the bytes and the multiplications of a block fall
with its channels, so w eighths of them take w eighths of its time, of which nothing was measured on a GPU:

    FFN block = w / 8 * (linear(t) - all-reduce(t)) + all-reduce(t)

The norm and the launches of kernels, which the tables hold together with the products, are taken to shrink too.

**Hidden states** (``Plan.kv_hidden``, Apt-Serve). Decodes whose requests store hidden states compute the keys and
values of their contexts first, by a product of its own over all these tokens, and then read them as others do:

    MHA block += KV_SHARE * linear(tokens stored as hidden states)

Only the functions marked `compiled` do this arithmetic: ``sim.engine.pricing_executor`` calls them from Python, the
compiled kernel from inside its loop, and both get bit-identical results.

`sim.cost.latency` reads calibration files and has the model that Python code calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sim.compiled import compiled, constant
from sim.cost.bounds import Factors, knee_of, ratio_at
from sim.cost.plan import WEIGHT_BITS
from sim.errors import CalibrationError
from sim.types import Floats, Ints

MOST_COUNT = 100_000_000
"""The largest number on an axis: curves are laid out at every count, so a limit protects the memory."""
MHA, FFN = 0, 1
MHA_BOTH, MHA_PREFILL_ONLY, FFN_BOTH, FFN_PREFILL_ONLY = range(4)
MOST_BY_COUNT = 2**20
"""Last count of a curve, which is laid out for every count up to it."""
MOST_S = 1e6
"""Largest entry of a table, eleven days; sums and products of larger ones could leave the range of a float."""
KV_SHARE = 0.5
"""Of k and v in the products of an MHA block in which every query head has its own (``ModelSpec.hidden_halves_kv``)."""
LOAD_COLUMNS = 10
"""Of the rows of `layered_iteration_seconds`."""
TILE_TOKENS = 128
"""Query tokens per attention work item (FlashAttention's query block at head size 128)."""


# `LatencyTables.layout` holds the offsets of each table in `LatencyTables.data`. A curve has two entries: the offset of
# its value at count 0, and its last count; the slope above follows its values. A surface has five: offset and length of
# its row axis, the same of its column axis, and the offset of its values, row after row. The residual has nine: offset
# and length of four axes, and the offset of its values.
# These constants go through `constant`, because numba would compile a function once per plain integer passed to it.
CURVE_LINEAR = 0  # six curves: 4 * bits_index + 2 * kind
MHA_KIND, FFN_KIND = constant(0), constant(1)
CURVE_TOKEN = constant(12)
CURVE_HEAD = constant(14)
SURFACE_PREFILL = constant(16)
SURFACE_DECODE = constant(21)
SURFACE_SHARED_DECODE = constant(26)
RESIDUAL = 31
SHARED_KERNEL = 40  # 1 if one kernel takes prompts and decodes
ALLREDUCE = constant(41)  # what of every block's curve is its all-reduce, laid out as they are; last count 0 for none
LAYOUT_LENGTH = 43
FP8_LINEAR = "fp8_linear"
"""The table of a calibration file with the products of 8 bits, where these are FP8's."""
DATA_FIXED = 0
DATA_SHARED_FIT = 1  # five coefficients a, h, b, d, f of the module's docstring
DATA_HOST_FLOOR = 6
DATA_START = 7


class LatencyTables(NamedTuple):
    """All numbers of one calibration in one array, and the offset of each table in it, for compiled code.

    One array instead of forty keeps the arguments of compiled functions short.
    """

    data: Floats
    layout: Ints


@compiled()
def segment(data: Floats, at: int, length: int, x: float) -> int:
    """Return the segment of the grid at ``at`` that holds x; the first or last segment for x outside the grid."""
    low, candidates = 0, length - 1
    while candidates > 1:
        half = candidates // 2
        # An expression, not an if: it compiles to a conditional move, where a branch would often be mispredicted.
        low = low + half if data[at + low + half] <= x else low
        candidates -= half
    return low


@compiled()
def interp1(data: Floats, grid_at: int, length: int, values_at: int, x: float) -> float:
    """Return a curve at x: linear between points, constant below the first, with the last segment's slope above.

    Args:
        data: holds ``length`` grid points at offset ``grid_at`` and their values at offset ``values_at``.
    """
    if x <= data[grid_at]:
        return float(data[values_at])
    i = segment(data, grid_at, length, x)
    left = data[grid_at + i]
    share = (x - left) / (data[grid_at + i + 1] - left)
    value = data[values_at + i]
    return float(value + share * (data[values_at + i + 1] - value))


def interpolated(grid: Floats, values: Floats, x: Floats) -> Floats:
    """Return `interp1` at many x, bit for bit the same, in one go."""
    i = np.clip(np.searchsorted(grid, x, side="right") - 1, 0, len(grid) - 2)
    share = (x - grid[i]) / (grid[i + 1] - grid[i])
    found: Floats = np.where(x <= grid[0], values[0], values[i] + share * (values[i + 1] - values[i]))
    return found


@compiled()
def interp2(
    data: Floats, rows_at: int, rows: int, columns_at: int, columns: int, values_at: int, row: float, column: float
) -> float:
    """Return a surface at (row, column): bilinear between points, constant below, with the last slopes above."""
    # Clamped below only: u or v above 1 continues the last segment.
    row, column = max(row, data[rows_at]), max(column, data[columns_at])
    i, j = segment(data, rows_at, rows, row), segment(data, columns_at, columns, column)
    top, left = data[rows_at + i], data[columns_at + j]
    u = (row - top) / (data[rows_at + i + 1] - top)
    v = (column - left) / (data[columns_at + j + 1] - left)
    at = values_at + i * columns + j
    low = data[at] + v * (data[at + 1] - data[at])
    at += columns
    high = data[at] + v * (data[at + 1] - data[at])
    return float(low + u * (high - low))


@compiled()
def _hold(data: Floats, at: int, length: int, x: float) -> tuple[int, float]:
    """Return the segment of x and the position in it, clamped at both ends, because a residual is not extrapolated."""
    if x <= data[at]:
        return 0, 0.0
    if x >= data[at + length - 1]:
        return length - 2, 1.0
    i = segment(data, at, length, x)
    return i, (x - data[at + i]) / (data[at + i + 1] - data[at + i])


@compiled()
def _residual(data: Floats, layout: Ints, x: float, y: float, z: float, w: float) -> float:
    """Return the residual at (x, y, z, w): linear along every axis, clamped outside."""
    i, p = _hold(data, layout[RESIDUAL], layout[RESIDUAL + 1], x)
    j, q = _hold(data, layout[RESIDUAL + 2], layout[RESIDUAL + 3], y)
    k, r = _hold(data, layout[RESIDUAL + 4], layout[RESIDUAL + 5], z)
    m, s = _hold(data, layout[RESIDUAL + 6], layout[RESIDUAL + 7], w)
    # Strides of the flat table [prefill tokens][prefix][batch][context].
    step_m = 1
    step_k = layout[RESIDUAL + 7]
    step_j = step_k * layout[RESIDUAL + 5]
    step_i = step_j * layout[RESIDUAL + 3]
    corner = layout[RESIDUAL + 8] + i * step_i + j * step_j + k * step_k + m * step_m
    total = 0.0
    # Quadrilinear interpolation: each bit of e chooses the lower or upper grid point of one axis.
    for e in range(16):
        ei, ej, ek, em = e & 1, (e >> 1) & 1, (e >> 2) & 1, (e >> 3) & 1
        weight = (p if ei else 1.0 - p) * (q if ej else 1.0 - q) * (r if ek else 1.0 - r) * (s if em else 1.0 - s)
        total += weight * data[corner + ei * step_i + ej * step_j + ek * step_k + em * step_m]
    return total


@compiled()
def curve_seconds(data: Floats, layout: Ints, slot: int, x: int) -> float:
    """Return a curve tabulated for every count at count x; above the last count it continues with its slope."""
    at, last = layout[slot], layout[slot + 1]
    if x <= last:
        return float(data[at + x])
    return float(data[at + last] + data[at + last + 1] * (x - last))


@compiled()
def _surface(data: Floats, layout: Ints, slot: int, row: float, column: float) -> float:
    """Return the surface of a slot at (row, column)."""
    return float(
        interp2(data, layout[slot], layout[slot + 1], layout[slot + 2], layout[slot + 3], layout[slot + 4], row, column)
    )


@compiled()
def linear_seconds(tables: LatencyTables, bits_index: int, kind: int, tokens: int) -> float:
    """Return the seconds of one block (kind MHA or FFN) without attention over ``tokens`` tokens; 0 for 0 tokens.

    ``bits_index`` is an index of WEIGHT_BITS; a precision without measurements gives NaN.
    """
    return float(curve_seconds(tables.data, tables.layout, CURVE_LINEAR + 4 * bits_index + 2 * kind, tokens))


@compiled()
def prefill_attention_seconds(tables: LatencyTables, tokens: int, context_sum: int) -> float:
    """Return the seconds of one layer's attention of ``tokens`` prompt tokens with contexts that sum to context_sum."""
    if tokens == 0:
        return 0.0
    return float(_surface(tables.data, tables.layout, SURFACE_PREFILL, float(tokens), context_sum / tokens))


@compiled()
def decode_attention_seconds(tables: LatencyTables, batch: int, context_sum: int) -> float:
    """Return the seconds of one layer's attention of ``batch`` decodes that read context_sum tokens of KV in total."""
    if batch == 0:
        return 0.0
    return float(_surface(tables.data, tables.layout, SURFACE_DECODE, float(batch), context_sum / batch))


@compiled()
def _shared_kernel_seconds(
    tables: LatencyTables, prefill_s: float, prefill_tokens: int, prefill_context_sum: int, batch: int, context_sum: int
) -> float:
    """Return the seconds of one attention kernel over prompt chunks and decodes together."""
    data, layout = tables.data, tables.layout
    # The formula of the module's docstring: prefill_s is P, decode_s is M, fit[0:5] is a, h, b, d, f.
    decode_s = _surface(data, layout, SURFACE_SHARED_DECODE, float(batch), context_sum / batch)
    mean_context = prefill_context_sum / prefill_tokens
    tiles = float((prefill_tokens + TILE_TOKENS - 1) // TILE_TOKENS)
    work_s = data[DATA_SHARED_FIT] * (mean_context * tiles) + data[DATA_SHARED_FIT + 1] * tiles
    decode_work_s = data[DATA_SHARED_FIT + 2] * context_sum + data[DATA_SHARED_FIT + 3] * batch
    together_s = data[DATA_SHARED_FIT + 4] + min(prefill_s, work_s) + min(decode_s, decode_work_s)
    # The residual's axes are logarithms; the prefix is what the mean context exceeds that of a prompt without one.
    residual = _residual(
        data,
        layout,
        math.log(prefill_tokens),
        math.log(1.0 + max(0.0, mean_context - 0.5 * (prefill_tokens + 1))),
        math.log(batch),
        math.log(max(1.0, context_sum / batch)),
    )
    # No residual makes the kernel faster than its prefill part alone.
    return float(max(prefill_s, max(max(prefill_s, decode_s), together_s) * residual))


@compiled()
def attention_seconds(
    tables: LatencyTables, prefill_tokens: int, prefill_context_sum: int, batch: int, context_sum: int
) -> float:
    """Return the seconds of one layer's attention over all requests of the iteration."""
    if prefill_tokens == 0:
        return float(decode_attention_seconds(tables, batch, context_sum))
    prefill_s = float(prefill_attention_seconds(tables, prefill_tokens, prefill_context_sum))
    if batch == 0:
        return prefill_s
    if tables.layout[SHARED_KERNEL] == 0:
        return prefill_s + float(decode_attention_seconds(tables, batch, context_sum))
    return float(_shared_kernel_seconds(tables, prefill_s, prefill_tokens, prefill_context_sum, batch, context_sum))


@compiled()
def iteration_seconds(
    tables: LatencyTables,
    layers: Ints,
    prefill_tokens: int,
    prefill_context_sum: int,
    decode_batch: int,
    decode_context_sum: int,
    sequences: int,
) -> float:
    """Return the seconds of one iteration.

    Args:
        tables: of a LatencyModel.
        layers: int64[3 bits, 4], the number of MHA blocks that decode and prefill keep, of MHA blocks that only prefill
            keeps, and the same two for FFN blocks; see `plan_layers`.
        prefill_tokens, prefill_context_sum: prompt tokens of the iteration, and the sum of their contexts in tokens.
        decode_batch, decode_context_sum: sequences that decode, and the tokens of KV that they read in total.
        sequences: sequences that get a next token.
    """
    tokens = prefill_tokens + decode_batch
    # Neither the fixed overhead, embedding nor head depends on the plan.
    total = tables.data[DATA_FIXED] + curve_seconds(tables.data, tables.layout, CURVE_TOKEN, tokens)
    total += curve_seconds(tables.data, tables.layout, CURVE_HEAD, sequences)
    mha_both, mha_prefill_only = 0, 0
    for b in range(layers.shape[0]):
        mha, mha_only, ffn, ffn_only = layers[b, 0], layers[b, 1], layers[b, 2], layers[b, 3]
        if decode_batch == 0:  # then all prefill blocks process the same tokens: one product rounds once
            mha, mha_only, ffn, ffn_only = mha + mha_only, 0, ffn + ffn_only, 0
        if mha > 0:
            total += mha * linear_seconds(tables, b, MHA_KIND, tokens)
        if ffn > 0:
            total += ffn * linear_seconds(tables, b, FFN_KIND, tokens)
        if mha_only > 0:
            total += mha_only * linear_seconds(tables, b, MHA_KIND, prefill_tokens)
        if ffn_only > 0:
            total += ffn_only * linear_seconds(tables, b, FFN_KIND, prefill_tokens)
        mha_both += mha
        mha_prefill_only += mha_only
    # Attention does not depend on the precision of the weights, so it is added once for all layers.
    if mha_both > 0:
        total += mha_both * attention_seconds(
            tables, prefill_tokens, prefill_context_sum, decode_batch, decode_context_sum
        )
    if mha_prefill_only > 0:
        total += mha_prefill_only * prefill_attention_seconds(tables, prefill_tokens, prefill_context_sum)
    return float(max(total, tables.data[DATA_HOST_FLOOR]))


@compiled()
def _kv_only_seconds(tables: LatencyTables, bits: int, tokens: int, passing: int, qkv_share: float) -> float:
    """Return the seconds of an MHA block without attention that only ``passing`` of ``tokens`` tokens pass in full."""
    seconds = qkv_share * linear_seconds(tables, bits, MHA_KIND, tokens)
    seconds += (1.0 - qkv_share) * linear_seconds(tables, bits, MHA_KIND, passing)
    if tables.layout[ALLREDUCE + 1] > 0:  # without the all-reduce of those that do not reach the output projection
        whole = curve_seconds(tables.data, tables.layout, ALLREDUCE, tokens)
        seconds -= qkv_share * (whole - curve_seconds(tables.data, tables.layout, ALLREDUCE, passing))
    return float(seconds)


@compiled()
def _ffn_seconds(tables: LatencyTables, bits: int, tokens: int, cut: int) -> float:
    """Return the seconds of an FFN block of which ``cut`` eighths of the channels do not run."""
    seconds = linear_seconds(tables, bits, FFN_KIND, tokens)
    if cut == 0:
        return float(seconds)
    shared = 0.0
    if tables.layout[ALLREDUCE + 1] > 0:
        shared = curve_seconds(tables.data, tables.layout, ALLREDUCE, tokens)
    return float((seconds - shared) * ((8 - cut) / 8) + shared)


@compiled()
def layered_iteration_seconds(
    tables: LatencyTables, rows: Ints, tokens: int, sequences: int, qkv_share: float
) -> float:
    """Return the seconds of an iteration in which requests run different blocks or read different KV.

    Args:
        tables: of a LatencyModel.
        rows: int64[n, 10], one row per group of layers that process the same tokens: number of layers, bits index; of
            the MHA block: prompt tokens, their summed context, decodes, the KV tokens that they read; of the FFN
            block: tokens; of the MHA block again: prompt tokens that only write keys and values; of the FFN block
            again: eighths of its channels that do not run; last, tokens stored as hidden states whose keys and values
            decodes compute. A block that processes no token costs nothing. In a layer of `kv_only` the last tokens of
            prompts count as decodes.
        tokens, sequences: of the iteration. qkv_share: ``ModelSpec.qkv_share``, read where tokens only write KV.
    """
    total = tables.data[DATA_FIXED] + curve_seconds(tables.data, tables.layout, CURVE_TOKEN, tokens)
    total += curve_seconds(tables.data, tables.layout, CURVE_HEAD, sequences)
    for i in range(rows.shape[0]):
        layers, bits = rows[i, 0], rows[i, 1]
        mha_tokens = rows[i, 2] + rows[i, 4]
        if rows[i, 7] > 0:
            total += layers * _kv_only_seconds(tables, bits, mha_tokens + rows[i, 7], mha_tokens, qkv_share)
        elif mha_tokens > 0:
            total += layers * linear_seconds(tables, bits, MHA_KIND, mha_tokens)
        if rows[i, 9] > 0:
            total += layers * (KV_SHARE * linear_seconds(tables, bits, MHA_KIND, rows[i, 9]))
        if mha_tokens > 0:
            total += layers * attention_seconds(tables, rows[i, 2], rows[i, 3], rows[i, 4], rows[i, 5])
        if rows[i, 6] > 0:
            total += layers * _ffn_seconds(tables, bits, rows[i, 6], rows[i, 8])
    return float(max(total, tables.data[DATA_HOST_FLOOR]))


@compiled()
def _covers(tables: LatencyTables, slot: int, count: int, context_sum: int) -> bool:
    """Return whether a surface covers ``count`` with this summed context without extrapolation."""
    data, layout = tables.data, tables.layout
    last_row = data[layout[slot] + layout[slot + 1] - 1]
    last_column = data[layout[slot + 2] + layout[slot + 3] - 1]
    return bool(count <= last_row and context_sum <= last_column * count)


@compiled()
def iteration_in_range(
    tables: LatencyTables,
    prefill_tokens: int,
    prefill_context_sum: int,
    decode_batch: int,
    decode_context_sum: int,
    sequences: int,
) -> bool:
    """Return whether no table is read above its last point; a read below the first point counts as in range."""
    layout = tables.layout
    if prefill_tokens + decode_batch > layout[CURVE_TOKEN + 1] or sequences > layout[CURVE_HEAD + 1]:
        return False
    if prefill_tokens > 0 and not _covers(tables, SURFACE_PREFILL, prefill_tokens, prefill_context_sum):
        return False
    if decode_batch == 0:
        return True
    shared = prefill_tokens > 0 and layout[SHARED_KERNEL] == 1
    return bool(_covers(tables, SURFACE_SHARED_DECODE if shared else SURFACE_DECODE, decode_batch, decode_context_sum))


@compiled()
def kv_only_in_range(tables: LatencyTables, passing: int, context_sum: int) -> bool:
    """Return whether the attention of layers of `kv_only` needs no extrapolation: of the tokens that pass all of it."""
    return bool(_covers(tables, SURFACE_DECODE, passing, context_sum))


@compiled()
def projected_in_range(tables: LatencyTables, rows: Ints) -> bool:
    """Return whether no product with hidden states needs extrapolation; ``rows``: of `layered_iteration_seconds`."""
    inside = True
    for i in range(rows.shape[0]):
        inside = inside and rows[i, 9] <= tables.layout[CURVE_LINEAR + 4 * rows[i, 1] + 2 * MHA + 1]
    return bool(inside)


def scaled_tables(
    tables: LatencyTables, factors: Factors, block_factors: Mapping[int, Factors] | None = None
) -> LatencyTables:
    """Return tables whose memory-bound and compute-bound times are multiplied by two factors (sim/cost/bounds.py).

    Products with weights, the head's too, are split by their own knee. Embedding, norms, the attention of decodes and
    all-reduces are memory-bound, the attention of prompts is compute-bound; a kernel that takes both has parts of each.

    Args:
        block_factors: bits of weights -> the factors of the products of blocks at that precision, in place of
            ``factors``.
    """
    of_blocks = block_factors or {}
    data, layout = tables.data.copy(), tables.layout
    shared_at, shared_last = int(layout[ALLREDUCE]), int(layout[ALLREDUCE + 1])
    allreduce = data[shared_at : shared_at + shared_last + 2].copy()
    head_knee = math.inf
    for slot in range(CURVE_LINEAR, CURVE_LINEAR + 4 * len(WEIGHT_BITS), 2):
        at, last = int(layout[slot]), int(layout[slot + 1])
        if last == 0:
            continue  # a precision that was not measured
        own = of_blocks.get(WEIGHT_BITS[(slot - int(CURVE_LINEAR)) // 4], factors)
        block = slice(at, at + last + 2)
        if shared_last:
            data[block] -= allreduce  # the knee is that of the products alone
        knee = knee_of(data[at + 1 : at + last + 1])
        _scale_product(data, at, last, knee, own)
        if shared_last:
            data[block] += factors.memory_bound * allreduce
        head_knee = knee if math.isinf(head_knee) else head_knee  # of the highest precision, as the head's
    if shared_last:
        data[shared_at : shared_at + shared_last + 2] *= factors.memory_bound
    at, last = int(layout[int(CURVE_TOKEN)]), int(layout[int(CURVE_TOKEN) + 1])
    data[at : at + last + 2] *= factors.memory_bound
    _scale_product(data, int(layout[int(CURVE_HEAD)]), int(layout[int(CURVE_HEAD) + 1]), head_knee, factors)
    surfaces = [(SURFACE_PREFILL, factors.compute_bound), (SURFACE_DECODE, factors.memory_bound)]
    if layout[SHARED_KERNEL]:
        surfaces.append((SURFACE_SHARED_DECODE, factors.memory_bound))
        data[DATA_SHARED_FIT : DATA_SHARED_FIT + 2] *= factors.compute_bound
        data[DATA_SHARED_FIT + 2 : DATA_SHARED_FIT + 5] *= factors.memory_bound
    for surface, factor in surfaces:
        _, rows, _, columns, at = (int(x) for x in layout[int(surface) : int(surface) + 5])
        data[at : at + rows * columns] *= factor
    return LatencyTables(data, layout)


def _scale_product(data: Floats, at: int, last: int, knee: float, factors: Factors) -> None:
    """Scale the curve of a product in place: its values at the counts 1 to ``last``, and the slope above."""
    data[at + 1 : at + last + 1] *= ratio_at(np.arange(1, last + 1, dtype=np.float64), knee, factors)
    data[at + last + 1] *= factors.compute_bound if last > knee else factors.memory_bound


class _Packer:
    """Checks tables and lays them out one after another in one array."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.parts: list[Floats] = [np.zeros(DATA_START)]
        self.layout: Ints = np.zeros(LAYOUT_LENGTH, dtype=np.int64)

    def put(self, values: Floats) -> int:
        """Append values; return their offset."""
        at = sum(len(part) for part in self.parts)
        self.parts.append(np.ascontiguousarray(values, dtype=np.float64).ravel())
        return at

    def axis(self, values: Sequence[float], name: str) -> Floats:
        """Return a checked axis."""
        grid = np.asarray(values, dtype=np.float64)
        if (
            grid.ndim != 1
            or len(grid) < 2
            or not np.all(np.isfinite(grid))
            or np.any(np.diff(grid) <= 0)
            or grid[0] < 0
            or grid[-1] > MOST_COUNT
        ):
            raise CalibrationError(
                f"{self.origin}: axis {name} must hold two or more ascending numbers between 0 and {MOST_COUNT:,}"
            )
        return grid

    def seconds(self, microseconds: Any, name: str, shape: tuple[int, ...]) -> Floats:
        """Return a checked table, converted from microseconds to seconds."""
        table = np.asarray(microseconds, dtype=np.float64) * 1e-6
        if table.shape != shape or not np.all((table >= 0) & (table <= MOST_S)):
            raise CalibrationError(
                f"{self.origin}: {name} must hold {' x '.join(map(str, shape))} microseconds >= 0, at most "
                f"{1e6 * MOST_S:g}"
            )
        return table

    def allreduce(self, table: Any, last: int) -> Floats:
        """Lay out the time of an all-reduce at every count up to ``last``, and its slope above; return both."""
        if not isinstance(table, Mapping) or not {"tokens", "us"} <= set(table):
            raise CalibrationError(
                f"{self.origin}: tables.allreduce is {str(table)[:80]}; it must hold tokens and us, lists of one length"
            )
        grid = self.axis(table["tokens"], "allreduce.tokens")
        seconds = self.seconds(table["us"], "allreduce.us", grid.shape)
        if grid[-1] <= last or np.any(np.diff(seconds) < 0):
            raise CalibrationError(
                f"{self.origin}: tables.allreduce must reach beyond the last of tokens, {last}, and us must not fall"
            )
        ends = interpolated(grid, seconds, np.array([last, float(grid[-1]) + 1.0]))
        slope = (ends[1] - ends[0]) / (grid[-1] + 1.0 - last)
        laid_out = np.concatenate([[0.0], interpolated(grid, seconds, np.arange(1.0, last + 1)), [slope]])
        self.layout[ALLREDUCE : ALLREDUCE + 2] = self.put(laid_out), last
        return laid_out

    def curve(self, slot: int, grid: Floats, microseconds: Any, name: str, added: Floats | None = None) -> None:
        """Lay out a curve at every integer count up to the grid's last, and its slope above; ``added`` to both."""
        values = self.seconds(microseconds, name, grid.shape)
        last = int(grid[-1])
        if last > MOST_BY_COUNT:
            raise CalibrationError(f"{self.origin}: {name} reaches {last:,}; a curve may reach {MOST_BY_COUNT:,}")
        slope = (values[-1] - values[-2]) / (grid[-1] - grid[-2])
        laid_out = np.concatenate([[0.0], interpolated(grid, values, np.arange(1.0, last + 1)), [slope]])
        self.layout[slot : slot + 2] = self.put(laid_out if added is None else laid_out + added), last

    def surface(self, slot: int, table: Mapping[str, Any], rows: str, columns: str, name: str) -> None:
        """Lay out a surface."""
        first, second = self.axis(table[rows], f"{name}.{rows}"), self.axis(table[columns], f"{name}.{columns}")
        values = self.seconds(table["us"], f"{name}.us", (len(first), len(second)))
        self.layout[slot : slot + 5] = (self.put(first), len(first), self.put(second), len(second), self.put(values))

    def tables(self) -> LatencyTables:
        """Return all tables and their offsets."""
        data = np.concatenate(self.parts)
        return LatencyTables(data, self.layout)


def packed_tables(content: Mapping[str, Any], origin: str) -> LatencyTables:
    pack, tables = _Packer(origin), content["tables"]
    tokens = pack.axis(tables["tokens"], "tokens")
    allreduce = pack.allreduce(tables["allreduce"], int(tokens[-1])) if "allreduce" in tables else None
    for row, bits in enumerate(WEIGHT_BITS):
        for kind, key in ((MHA, "mha"), (FFN, "ffn")):
            slot = CURVE_LINEAR + 4 * row + 2 * kind
            if bits == 8 and FP8_LINEAR in tables:
                fp8 = tables[FP8_LINEAR]
                if "8" in tables["linear_us"] or fp8["tokens"][-1] != tables["tokens"][-1]:
                    raise CalibrationError(
                        f"{origin}: tables.fp8_linear must end at the last of tokens, {int(tokens[-1])}, and linear_us "
                        "must not have times of 8 bits too"
                    )
                grid = pack.axis(fp8["tokens"], "fp8_linear.tokens")
                pack.curve(slot, grid, fp8[key], f"fp8_linear.{key}", allreduce)
            elif str(bits) in tables["linear_us"]:
                pack.curve(slot, tokens, tables["linear_us"][str(bits)][key], f"linear_us.{bits}.{key}", allreduce)
            else:
                pack.layout[slot : slot + 2] = pack.put(np.array([0.0, np.nan])), 0
    pack.curve(CURVE_TOKEN, tokens, tables["token_us"], "token_us")
    pack.curve(CURVE_HEAD, pack.axis(tables["sequences"], "sequences"), tables["head_us"], "head_us")
    pack.surface(SURFACE_PREFILL, tables["prefill_attention"], "tokens", "context", "prefill_attention")
    pack.surface(SURFACE_DECODE, tables["decode_attention"], "batch", "context", "decode_attention")
    pack.parts[0][DATA_FIXED] = pack.seconds([content["fixed_us"]], "fixed_us", (1,))[0]
    floor_us = content.get("host_floor_us", 0.0)
    if isinstance(floor_us, bool) or not isinstance(floor_us, int | float):
        raise CalibrationError(f"{origin}: host_floor_us is {floor_us!r}; it must be a number of microseconds from 0")
    pack.parts[0][DATA_HOST_FLOOR] = pack.seconds([floor_us], "host_floor_us", (1,))[0]
    shared = tables.get("shared_attention")
    if shared is not None:
        pack.layout[SHARED_KERNEL] = 1
        fit_s = pack.seconds(shared["fit_us"], "shared_attention.fit_us", (5,))
        pack.parts[0][DATA_SHARED_FIT : DATA_SHARED_FIT + 5] = fit_s
        pack.surface(SURFACE_SHARED_DECODE, shared, "batch", "context", "shared_attention")
        lengths = []
        for i, key in enumerate(("prefill_tokens", "prefix", "batch", "context")):
            grid = pack.axis(shared[key], f"shared_attention.{key}")
            if key != "prefix" and grid[0] == 0:
                raise CalibrationError(f"{origin}: axis shared_attention.{key} must start above 0")
            # The residual is linear in the logarithms of its axes; log1p, because a prefix may be 0.
            logs = np.log1p(grid) if key == "prefix" else np.log(grid)
            pack.layout[RESIDUAL + 2 * i : RESIDUAL + 2 * i + 2] = pack.put(logs), len(grid)
            lengths.append(len(grid))
        residual = np.asarray(shared["residual"], dtype=np.float64)
        if residual.shape != (int(np.prod(lengths)),) or not np.all((residual > 0) & (residual <= MOST_S)):
            raise CalibrationError(f"{origin}: shared_attention.residual must hold {np.prod(lengths)} positive ratios")
        pack.layout[RESIDUAL + 8] = pack.put(residual)
    return pack.tables()
