"""Calibrations: the latency model of one model on one device, and the files that hold its tables.

sim/cost/latency_tables.py says how the tables give the duration of an iteration.

**The schema of a calibration file** (``conf/calibration/NAME.json``, schema 1). A new latency source is one reader that
writes this file; `hw.calibrate` has such readers. Times are microseconds, axes ascend, and lists of times match their
axes in length:

    schema          1
    name            the file's name without .json
    model, device   names of conf/model and conf/gpu; a run finds its calibration by these two and tp
    tp              optional, 1 if absent: GPUs among which the model is divided; all times are those of one of them
    kind            measured, composed, derived or fitted; see `LatencyModel`
    fixed_us        host overhead of one iteration
    fixed_source    where fixed_us comes from
    host_floor_us   optional: least time of an iteration, of a host that launches its operations one by one
    factors         optional {memory_bound, compute_bound}: of a server over these tables (sim/cost/bounds.py); hw.fit
                    writes them
    block_factors   optional "16", "8", "4" -> {memory_bound, compute_bound}: of blocks at that precision, in place of
                    factors; hw.loop and hw.validate write both for the machine on which they serve
    validation      how the held-out errors were computed
    errors          term -> {median, p95: relative errors, points: how many, note: optional}
    sources         list of {repository, commit, licence, ...}: where the measurements come from
    notes           list of sentences on known limits
    tables
      tokens        axis t of linear_us and token_us: tokens of the iteration
      linear_us     "16", "8", "4" -> {mha, ffn: times[tokens] of one block without attention}; absent bits cannot run
      fp8_linear    optional, instead of "8" in linear_us: {tokens: an axis with the same end, mha, ffn}, where
                    products of 8 bits are those of FP8 with FP8 (W8A8), the rounding of their inputs included
      allreduce     with tp > 1: {tokens, us}: one all-reduce of the hidden states of that many tokens, on its own
                    axis, which reaches beyond that of tokens. Every MHA and FFN block ends with one, so that a block
                    that a plan drops saves it too
      token_us      times[tokens] of embedding and final norm, with the all-reduce of the embedding
      sequences     axis s of head_us
      head_us       times[sequences] of LM head and sampling
      prefill_attention   {tokens, context: axes, us: times[tokens][context]}; context is the mean per query token
      decode_attention    {batch, context: axes, us: times[batch][context]}; context is the mean per sequence
      shared_attention    only if one kernel takes prompts and decodes: {batch, context, us: decodes next to a tiny
                          prefill; fit_us: [a, h, b, d, f] of latency_tables.py; prefill_tokens, prefix: two more axes;
                          residual: positive ratios[prefill_tokens][prefix][batch][context] in one flat list}
    device_run      optional, from a run on the device: {host_to_device_bytes_per_s, copy_slowdown,
                    copy_layer_s: seconds of each layer's copy in addition, 0 by default, ...}

Other keys (stack, date, fit) are for people; nothing reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sim.cost.bounds import Factors
from sim.cost.ffn_width import FULL_WIDTH
from sim.cost.gpu import TP_DEGREES, Gpu
from sim.cost.latency_tables import (
    CURVE_HEAD,
    CURVE_TOKEN,
    DATA_FIXED,
    DATA_HOST_FLOOR,
    FFN,
    FFN_BOTH,
    FP8_LINEAR,
    LOAD_COLUMNS,
    MHA,
    MHA_BOTH,
    MOST_S,
    LatencyTables,
    attention_seconds,
    curve_seconds,
    decode_attention_seconds,
    iteration_in_range,
    iteration_seconds,
    layered_iteration_seconds,
    linear_seconds,
    packed_tables,
    prefill_attention_seconds,
    scaled_tables,
)
from sim.cost.plan import WEIGHT_BITS, Plan, describe
from sim.errors import CalibrationError, nearest
from sim.json_file import read_json_object
from sim.paths import REPOSITORY
from sim.types import Ints

CALIBRATIONS = REPOSITORY / "conf" / "calibration"
SCHEMA = 1


def chunk_context_sum(chunk_tokens: int, prefix_tokens: int) -> int:
    """Return the summed context of a chunk: each token attends to the prefix, the chunk up to it and itself."""
    return chunk_tokens * prefix_tokens + chunk_tokens * (chunk_tokens + 1) // 2


class PromptLoad(NamedTuple):
    """The prompt tokens of an iteration, the sum of their contexts, and the same of the last tokens of prompts."""

    tokens: int
    context_sum: int
    ends: int
    end_context_sum: int


def _prompt_load(chunks: Sequence[tuple[int, int]], ends: int) -> PromptLoad:
    """Return the load of chunks (tokens, prefix), of which the first ``ends`` end their prompts."""
    return PromptLoad(
        tokens=sum(tokens for tokens, _ in chunks),
        context_sum=sum(chunk_context_sum(tokens, prefix) for tokens, prefix in chunks),
        ends=ends,
        end_context_sum=sum(tokens + prefix for tokens, prefix in chunks[:ends]),
    )


def plan_rows(plan: Plan, prompts: PromptLoad, decodes: int, decode_context_sum: int) -> Ints:
    """Return int64[layers, 10], the rows of `layered_iteration_seconds` if all requests run all that the plan runs."""
    rows = []
    for layer, (bits, kv_only) in enumerate(zip(plan.product_bits, plan.kv_only, strict=True)):
        runs, decoding = plan.prefill.mha[layer], decodes * plan.decode.mha[layer]
        context_sum = decode_context_sum * plan.decode.mha[layer]
        feeding = (prompts.ends if kv_only else prompts.tokens) * plan.prefill.ffn[layer]
        feeding += decodes * plan.decode.ffn[layer]
        if kv_only:
            passing = prompts.ends * runs
            attention = 0, 0, decoding + passing, context_sum + prompts.end_context_sum * runs
        else:
            attention = prompts.tokens * runs, prompts.context_sum * runs, decoding, context_sum
        writing = (prompts.tokens - prompts.ends) * runs if kv_only else 0
        cut = FULL_WIDTH - plan.ffn_width[layer]
        rows.append((1, WEIGHT_BITS.index(bits), *attention, feeding, writing, cut, 0))
    return np.array(rows, dtype=np.int64)


def plan_layers(plan: Plan) -> Ints:
    """Return the block counts, int64[3 bits, 4], on which `iteration_seconds` depends: all it needs of a plan."""
    return _plan_layers(plan.decode.mha, plan.decode.ffn, plan.prefill.mha, plan.prefill.ffn, plan.product_bits)


@lru_cache(maxsize=4096)
def _plan_layers(
    decode_mha: tuple[bool, ...],
    decode_ffn: tuple[bool, ...],
    prefill_mha: tuple[bool, ...],
    prefill_ffn: tuple[bool, ...],
    product_bits: tuple[int, ...],
) -> Ints:
    counts = np.zeros((len(WEIGHT_BITS), 4), dtype=np.int64)
    for both, prefill, first in ((decode_mha, prefill_mha, MHA_BOTH), (decode_ffn, prefill_ffn, FFN_BOTH)):
        for in_decode, in_prefill, bits in zip(both, prefill, product_bits, strict=True):
            row = WEIGHT_BITS.index(bits)
            if in_decode:
                counts[row, first] += 1
            elif in_prefill:
                counts[row, first + 1] += 1
    counts.flags.writeable = False
    return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class TermError:
    """Relative errors of a term on held-out measurements, and the number of those points."""

    median: float
    p95: float
    points: int
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopySpeed:
    """The speed of weight copies from host memory while iterations run.

    slowdown: relative increase of the duration of an iteration that starts during a copy.
    source: where the numbers come from. layer_s: seconds that the copy of each layer takes in addition to its bytes.
    """

    host_to_device_bytes_per_s: float
    slowdown: float
    source: str
    layer_s: float = 0.0

    def __post_init__(self) -> None:
        others = all(0 <= value < math.inf for value in (self.slowdown, self.layer_s))
        if not (0 < self.host_to_device_bytes_per_s < math.inf and others):
            raise CalibrationError(
                f"{self.source}: host_to_device_bytes_per_s is {self.host_to_device_bytes_per_s}, copy_slowdown "
                f"{self.slowdown} and copy_layer_s {self.layer_s}; the first must be above 0, the others at least 0, "
                "all finite"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatencyModel:
    """A calibrated latency model of one model on one device. Build it with `load_calibration`.

    tp: GPUs among which the model is divided; times are those of one of them, all-reduces included.
    kind: `measured` (the model's own operations on one serving stack), `composed` (from kernels of other shapes),
    `derived` (scaled from another device, not measured) or `fitted` (to the run of a server, by hw.fit).
    errors: held-out error of each term. fixed_source: where the overhead of an iteration comes from.
    copying: the speed of weight copies, if it was measured too.
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
    copying: CopySpeed | None = None
    tp: int = 1

    @property
    def fixed_s(self) -> float:
        """Host overhead of one iteration."""
        return float(self.tables.data[DATA_FIXED])

    def with_fixed(self, fixed_s: float, source: str) -> LatencyModel:
        """Return the model with another host overhead per iteration, from ``source``."""
        if not (math.isfinite(fixed_s) and fixed_s >= 0):
            raise CalibrationError(f"fixed_s is {fixed_s!r}; it must be a number of seconds of at least 0")
        data = self.tables.data.copy()
        data[DATA_FIXED] = fixed_s
        return replace(self, tables=LatencyTables(data, self.tables.layout), fixed_source=source)

    @property
    def host_floor_s(self) -> float:
        """Least time of an iteration."""
        return float(self.tables.data[DATA_HOST_FLOOR])

    def with_host_floor(self, host_floor_s: float) -> LatencyModel:
        """Return the model with another least time of an iteration; 0 for none."""
        if not 0 <= host_floor_s <= MOST_S:
            raise CalibrationError(
                f"host_floor_s is {host_floor_s!r}; it must be a number of seconds from 0 to {MOST_S:g}"
            )
        data = self.tables.data.copy()
        data[DATA_HOST_FLOOR] = host_floor_s
        return replace(self, tables=LatencyTables(data, self.tables.layout))

    def with_factors(self, factors: Factors, block_factors: Mapping[int, Factors] | None = None) -> LatencyModel:
        """Return the model with its memory-bound and its compute-bound times multiplied by two factors.

        Args:
            block_factors: bits of weights -> the factors of blocks at that precision, in place of ``factors``.
        """
        if factors.absent and not block_factors:
            return self
        return replace(self, tables=scaled_tables(self.tables, factors, block_factors))

    def check_bits(self, plan: Plan) -> None:
        """Check that the calibration covers every precision of a plan, of its weights and of its products.

        Raises:
            CalibrationError: if not; the message names the missing bits, the available ones and what to do.
        """
        self._check_bits({*plan.weight_bits, *plan.product_bits})

    def layered_iteration_s(self, rows: Ints, tokens: int, sequences: int, qkv_share: float = 1.0) -> float:
        """Return the seconds of an iteration in which layers differ in tokens; see `layered_iteration_seconds`.

        Raises:
            CalibrationError: for rows of another number of columns, beyond which compiled code would read.
        """
        if rows.ndim != 2 or rows.shape[1] != LOAD_COLUMNS:
            raise CalibrationError(f"rows of {rows.shape[-1]} columns; they need {LOAD_COLUMNS}")
        return float(layered_iteration_seconds(self.tables, rows, tokens, sequences, qkv_share))

    def linear_s(self, kind: str, bits: int, tokens: int) -> float:
        """Return the seconds of one block without attention: kind `mha` (norm to output projection) or `ffn`."""
        if kind not in ("mha", "ffn"):
            raise CalibrationError(f"block kind {kind!r}: {nearest(kind, ('mha', 'ffn'))}")
        self._check_bits({bits})
        return float(linear_seconds(self.tables, WEIGHT_BITS.index(bits), MHA if kind == "mha" else FFN, tokens))

    def prefill_attention_s(self, chunk_tokens: int, prefix_tokens: int = 0) -> float:
        """Return the seconds of one layer's attention of a chunk after a prefix whose KV is in the cache."""
        context_sum = chunk_context_sum(chunk_tokens, prefix_tokens)
        return float(prefill_attention_seconds(self.tables, chunk_tokens, context_sum))

    def decode_attention_s(self, batch: int, context_sum_tokens: int) -> float:
        """Return the seconds of one layer's attention of ``batch`` decodes that read that many KV tokens in total."""
        return float(decode_attention_seconds(self.tables, batch, context_sum_tokens))

    def attention_s(self, chunks: Sequence[tuple[int, int]], decode_batch: int, decode_context_sum: int) -> float:
        """Return the seconds of one layer's attention over chunks (tokens, prefix) and decodes in one iteration."""
        tokens = sum(chunk for chunk, _ in chunks)
        context_sum = sum(chunk_context_sum(chunk, prefix) for chunk, prefix in chunks)
        return float(attention_seconds(self.tables, tokens, context_sum, decode_batch, decode_context_sum))

    def head_s(self, sequences: int) -> float:
        """Return the seconds of LM head and sampling for ``sequences`` sequences."""
        return float(curve_seconds(self.tables.data, self.tables.layout, CURVE_HEAD, sequences))

    def token_s(self, tokens: int) -> float:
        """Return the seconds of embedding and final norm for ``tokens`` tokens; no plan can drop them."""
        return float(curve_seconds(self.tables.data, self.tables.layout, CURVE_TOKEN, tokens))

    def iteration_s(
        self,
        plan: Plan,
        chunks: Sequence[tuple[int, int]],
        decode_batch: int,
        decode_context_sum: int,
        sequences: int,
        *,
        qkv_share: float | None = None,
    ) -> float:
        """Return the seconds of one iteration.

        Args:
            plan: what runs; a block that only the prefill mask keeps processes only prompt tokens.
            chunks: (chunk tokens, prefix tokens with KV in the cache), one per prompt.
            decode_batch: sequences that decode.
            decode_context_sum: KV tokens that they read in one layer, in total, their new tokens included.
            sequences: sequences that get a next token: all decodes, and prompts whose last chunk this is. Under
                `kv_only` these are taken to be the first ones of ``chunks``.
            qkv_share: ``ModelSpec.qkv_share`` of the model; only a plan with `kv_only` needs it.
        Raises:
            CalibrationError: if the calibration does not cover a precision of the plan, or `kv_only` lacks the share.
        """
        self.check_bits(plan)
        skips = bool(chunks) and any(plan.kv_only)
        if skips and qkv_share is None:
            raise CalibrationError(
                f"the plan {describe(plan)!r} has layers that only write KV in prefill; pass qkv_share of the model"
            )
        if skips or plan.cuts_ffn:
            prompts = _prompt_load(chunks, sequences - decode_batch)
            rows = plan_rows(plan, prompts, decode_batch, decode_context_sum)
            share = 1.0 if qkv_share is None else qkv_share
            return self.layered_iteration_s(rows, prompts.tokens + decode_batch, sequences, share)
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
        """Return whether the duration of this iteration needs no extrapolation."""
        tokens = sum(chunk for chunk, _ in chunks)
        context_sum = sum(chunk_context_sum(chunk, prefix) for chunk, prefix in chunks)
        return bool(iteration_in_range(self.tables, tokens, context_sum, decode_batch, decode_context_sum, sequences))

    def _check_bits(self, wanted: set[int]) -> None:
        missing = sorted(wanted - set(self.bits), reverse=True)
        if missing:
            others = ", ".join(calibrations_with(missing, self.model)) or "there is none; measure one with hw.calibrate"
            raise CalibrationError(
                f"calibration {self.name!r} has no {' or '.join(map(str, missing))}-bit times; it has "
                f"{', '.join(map(str, self.bits))}. Limit weight_bits and compute_bits of the plan to those, or use a "
                f"calibration of {self.model} that has more: {others}"
            )


def calibration_names() -> list[str]:
    """Return the names of the committed calibrations."""
    return sorted(path.stem for path in CALIBRATIONS.glob("*.json"))


def calibrations_with(bits: Sequence[int], model: str) -> list[str]:
    """Return the names of the committed calibrations of a model that have all these bits."""
    found = {name: _read(CALIBRATIONS / f"{name}.json") for name in calibration_names()}
    return [
        name
        for name, content in found.items()
        if content["model"] == model and set(bits) <= set(priced_bits(content["tables"]))
    ]


def priced_bits(tables: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the precisions of products that the tables of a calibration file have."""
    return tuple(b for b in WEIGHT_BITS if str(b) in tables["linear_us"] or (b == 8 and FP8_LINEAR in tables))


def load_calibration(name_or_path: str | Path) -> LatencyModel:
    """Return a committed calibration by name, or any calibration file by path.

    Raises:
        CalibrationError: if there is none, or the file does not have the schema of this module.
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
            f"no calibration file {path}; give a .json file that hw.calibrate wrote, or a name: "
            f"{', '.join(calibration_names())}"
        )
    return calibration_from_dict(_read(path), str(path))


def _read(path: Path) -> dict[str, Any]:
    content = read_json_object(path, CalibrationError, "write it again with hw.calibrate")
    if not isinstance(content.get("tables"), dict):
        raise CalibrationError(f"{path} is not a calibration: it has no tables; write one with hw.calibrate")
    return content


def _copying(content: Mapping[str, Any]) -> CopySpeed | None:
    run = content.get("device_run", {})
    if "copy_slowdown" not in run:
        return None
    return CopySpeed(
        host_to_device_bytes_per_s=float(run["host_to_device_bytes_per_s"]),
        slowdown=float(run["copy_slowdown"]),
        layer_s=float(run.get("copy_layer_s", 0.0)),
        source=f"measured, calibration {content['name']}",
    )


def copy_speed(latency: LatencyModel, gpu: Gpu) -> CopySpeed:
    """Return the speed of weight copies from the calibration, or from the device's data sheet if it was not measured.

    From the data sheet, the rate is that of the host link, and the slowdown is an upper bound: a copy uses memory
    bandwidth that iterations need.
    """
    if latency.copying is not None:
        return latency.copying
    link = gpu.host_to_device_bytes_per_s
    return CopySpeed(
        host_to_device_bytes_per_s=link,
        slowdown=link / gpu.memory_bandwidth_bytes_per_s,
        source=f"data sheet of {gpu.name}, not measured",
    )


def calibration_from_dict(content: Mapping[str, Any], origin: str = "calibration") -> LatencyModel:
    """Return the latency model of a calibration file's content; the module's docstring has the schema.

    Raises:
        CalibrationError: if a key is missing or a value is wrong; the message names it.
    """
    if content.get("schema") != SCHEMA:
        raise CalibrationError(
            f"{origin}: schema is {content.get('schema')!r}, this version reads {SCHEMA}; "
            "write the file again with hw.calibrate"
        )
    for key in ("name", "model", "device", "kind"):
        if not isinstance(content.get(key), str):
            raise CalibrationError(
                f"{origin}: {key} is {content.get(key)!r:.80}; it must be text; write the file again with hw.calibrate"
            )
    try:
        factors = Factors(**content.get("factors", {}))
        block_factors = _block_factors(content, origin)
        found = LatencyModel(
            name=content["name"],
            model=content["model"],
            device=content["device"],
            kind=content["kind"],
            bits=priced_bits(content["tables"]),
            tables=packed_tables(content, origin),
            fixed_source=content["fixed_source"],
            errors={term: TermError(**error) for term, error in content["errors"].items()},
            validation=content["validation"],
            sources=tuple(content["sources"]),
            notes=tuple(content["notes"]),
            copying=_copying(content),
            tp=_tp_of(content, origin),
        )
        return found.with_factors(factors, block_factors)
    except CalibrationError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        reason = " ".join(repr(error).split())[:300]
        raise CalibrationError(f"{origin}: {reason}; write the file again with hw.calibrate") from error


def _block_factors(content: Mapping[str, Any], origin: str) -> dict[int, Factors]:
    """Return the factors of blocks at single precisions; a precision without times is refused."""
    found = content.get("block_factors", {})
    known = [str(bits) for bits in priced_bits(content["tables"])]
    unknown = [bits for bits in found if bits not in known]
    if unknown:
        raise CalibrationError(f"{origin}: block_factors has {unknown[0]!r}; the tables have {', '.join(known)} bits")
    return {int(bits): Factors(**factors) for bits, factors in found.items()}


def _tp_of(content: Mapping[str, Any], origin: str) -> int:
    """Return the degree of tensor parallelism of a calibration file; above 1 it must have times of all-reduces."""
    tp = content.get("tp", 1)
    if isinstance(tp, bool) or tp not in TP_DEGREES:
        raise CalibrationError(
            f"{origin}: tp is {tp!r}; allowed are {', '.join(map(str, TP_DEGREES))}, the GPUs of the model"
        )
    if (tp > 1) != ("allreduce" in content["tables"]):
        raise CalibrationError(
            f"{origin}: tp is {tp}; tables.allreduce must be there with a tp above 1, and only then; add or remove it"
        )
    return int(tp)
