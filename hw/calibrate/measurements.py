"""Readers of published GPU measurements, and the fits that turn them into the tables of ``sim.cost.latency``.

A reader returns samples in microseconds. A fit is a piecewise linear curve or a bilinear surface on chosen knots, the
form that ``sim.cost.latency`` evaluates. It minimizes squared relative errors; a small penalty on curvature fills cells
without a measurement. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.interpolate import NearestNDInterpolator, RegularGridInterpolator
from scipy.optimize import isotonic_regression, minimize
from scipy.sparse import csr_matrix, diags, identity, kron, vstack
from scipy.sparse.linalg import spsolve

from sim.cost.gpu import Gpu
from sim.cost.latency_tables import TILE_TOKENS, interp2, interpolated
from sim.cost.model_spec import ModelSpec
from sim.errors import CalibrationError
from sim.types import Floats

FOLDS = 5
SEED = 0
SMOOTH = 1e-3
VIDUR_ATTENTION = ("batch_size", "prefill_chunk_size", "kv_cache_size", "is_prefill", "time_stats.attn_prefill.median")
CROSS = 10.0


@dataclass(frozen=True, slots=True)
class Curve:
    """Microseconds ``us`` over counts ``x``: an operation of one layer over tokens, or the head over sequences."""

    x: Floats
    us: Floats


@dataclass(frozen=True, slots=True)
class Surface:
    """Microseconds ``us`` over (``x``, ``y``): prefill over (tokens, mean context), decode over (batch, context)."""

    x: Floats
    y: Floats
    us: Floats


@dataclass(frozen=True, slots=True)
class Mixed:
    """Microseconds of one kernel over a chunk on a prefix and ``batch`` decodes of ``context`` tokens each."""

    chunk: Floats
    prefix: Floats
    batch: Floats
    context: Floats
    us: Floats

    def __getitem__(self, rows: NDArray[np.bool_]) -> Mixed:
        return Mixed(self.chunk[rows], self.prefix[rows], self.batch[rows], self.context[rows], self.us[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Samples of every term of one model on one device.

    linear: bits -> `mha` or `ffn` -> curve over tokens. token: embedding and final norm over tokens. head: LM head and
    sampler over sequences. mixed: one kernel over prompt chunks and decodes, where the stack has one. allreduce: of the
    hidden states over tokens, where the model is divided among several GPUs; no other term of a block contains it.
    fp8: like an entry of ``linear``, where products of 8 bits are those of FP8.
    """

    linear: dict[int, dict[str, Curve]]
    token: Curve
    head: Curve
    prefill: Surface
    decode: Surface
    mixed: Mixed | None = None
    allreduce: Curve | None = None
    fp8: dict[str, Curve] | None = None


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Return a CSV file, gzipped or not, that has at least these columns.

    Raises:
        CalibrationError: if the file is missing, unreadable or lacks a column; the message names it.
    """
    if not path.is_file():
        raise CalibrationError(
            f"no measurements at {path}; set RAP_LAB_DATA to the folder that holds calibration/, or give data=FOLDER"
        )
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError, EOFError) as error:
        raise CalibrationError(f"{path} cannot be read as CSV: {error}") from error
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise CalibrationError(f"{path} lacks column {', '.join(missing)}; it has {', '.join(table.columns)}")
    return table


def mean_context(chunk: Floats, prefix: Floats) -> Floats:
    """Return how many tokens a token of a chunk attends to on average: the prefix and half of the chunk."""
    return prefix + (chunk + 1.0) / 2.0


# --- readers --------------------------------------------------------------------------------------------------------


def read_llmservingsim(folder: Path) -> Terms:
    """Read LLMServingSim's profile of vLLM: `dense`, `per_sequence` and `attention` (microseconds of one layer)."""
    dense = _by_layer(read_table(folder / "dense.csv.gz", ("layer", "tokens", "time_us")), "tokens", "time_us")
    head = _by_layer(
        read_table(folder / "per_sequence.csv.gz", ("layer", "sequences", "time_us")), "sequences", "time_us"
    )
    columns = ["prefill_chunk", "kv_prefill", "n_decode", "kv_decode"]
    rows = read_table(folder / "attention.csv.gz", (*columns, "time_us")).groupby(columns, as_index=False).median()
    chunk, prefix, batch, context = (rows[column].to_numpy(dtype=np.float64) for column in columns)
    us = rows["time_us"].to_numpy(dtype=np.float64)
    prefill, decode = (chunk > 0) & (batch == 0), (chunk == 0) & (batch > 0)
    return Terms(
        linear={
            16: {
                "mha": _sum(dense, {"layernorm": 1, "qkv_proj": 1, "rotary_emb": 1, "o_proj": 1}),
                "ffn": _sum(dense, {"layernorm": 1, "gate_up_proj": 1, "act_fn": 1, "down_proj": 1}),
            }
        },
        token=_sum(dense, {"embedding": 1, "final_layernorm": 1}),
        head=_sum(head, {"lm_head": 1, "sampler": 1}),
        prefill=Surface(chunk[prefill], mean_context(chunk[prefill], prefix[prefill]), us[prefill]),
        decode=Surface(batch[decode], context[decode], us[decode]),
        mixed=Mixed(chunk, prefix, batch, context, us)[(chunk > 0) & (batch > 0)],
    )


def read_llmservingsim_v0(folder: Path, model: ModelSpec, gpu: Gpu, sampler: Curve) -> Terms:
    """Read LLMServingSim's first profile of a Llama-3.1-8B layer (`layers`, nanoseconds) and its attention sweep.

    Prefill attention without prefix comes from `layers`; a prefix adds what it adds in the sweep, where
    `kv_cache_size` counts the chunk too. The two files disagree without prefix. The sampler is not in the profile.
    """
    raw = read_table(folder / "layers.csv.gz", ("layer_name", "input", "latency(ns)"))
    raw = raw.rename(columns={"layer_name": "layer"}).assign(us=raw["latency(ns)"] / 1e3)
    layers = _by_layer(raw, "input", "us")
    layers = layers[layers.index.isin([*range(1, 17), *range(24, 65, 8), *range(80, 257, 16), *range(320, 2049, 64)])]
    mha = ("input_layernorm", "q_proj", "k_proj", "v_proj", "rope", "o_proj")
    ffn = ("post_layernorm", "gate_proj", "up_proj", "act_fn", "down_proj")
    head = _sum(layers, {"lm_head": 1})
    head = Curve(head.x[head.x <= 256], head.us[head.x <= 256])
    no_prefix = _sum(_by_layer(raw, "input", "us"), {"attn": 1})
    sweep = _vidur_attention(read_table(folder / "attention.csv.gz", VIDUR_ATTENTION))
    chunk, total, us = sweep.prefill_chunk, sweep.prefill_kv, sweep.prefill_us
    alone = Curve(chunk[total == chunk], us[total == chunk])
    order = np.argsort(alone.x)
    more = (total > chunk) & np.isin(chunk, alone.x)
    added = us[more] - np.interp(chunk[more], alone.x[order], alone.us[order])
    with_prefix = np.interp(chunk[more], no_prefix.x, no_prefix.us) + np.maximum(added, 0.0)
    lone = np.isin(no_prefix.x, [1, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048])
    decode = Surface(sweep.batch, sweep.context, sweep.decode_us)
    return Terms(
        linear={16: {"mha": _sum(layers, dict.fromkeys(mha, 1)), "ffn": _sum(layers, dict.fromkeys(ffn, 1))}},
        token=_sum(layers, {"embedding": 1, "final_layernorm": 1}),
        head=Curve(head.x, head.us + sampler_us(sampler, model.vocab_size, head.x)),
        prefill=Surface(
            np.concatenate([no_prefix.x[lone], chunk[more]]),
            np.concatenate(
                [mean_context(no_prefix.x[lone], np.zeros(lone.sum())), total[more] - (chunk[more] - 1) / 2]
            ),
            np.concatenate([no_prefix.us[lone], with_prefix]),
        ),
        decode=raise_to_bandwidth(decode, model.kv_bytes_per_token_layer, gpu),
    )


@dataclass(frozen=True, slots=True)
class _Sweep:
    """Attention samples in Vidur's columns, microseconds."""

    prefill_chunk: Floats
    prefill_kv: Floats
    prefill_us: Floats
    batch: Floats
    context: Floats
    decode_us: Floats
    save_us: Floats


def _vidur_attention(table: pd.DataFrame) -> _Sweep:
    keys = ["prefill_chunk_size", "kv_cache_size", "batch_size"]
    values = [f"time_stats.{name}.median" for name in ("attn_prefill", "attn_decode", "attn_kv_cache_save")]
    table = table.assign(**{value: table.get(value, 0.0) for value in values})
    prefill = table[table["is_prefill"].astype(bool)].groupby(keys, as_index=False)[values].median()
    decode = table[~table["is_prefill"].astype(bool)].groupby(keys, as_index=False)[values].median()

    def column(rows: pd.DataFrame, name: str, scale: float = 1.0) -> Floats:
        return rows[name].to_numpy(dtype=np.float64) * scale

    return _Sweep(
        column(prefill, keys[0]),
        column(prefill, keys[1]),
        column(prefill, values[0], 1e3),
        column(decode, keys[2]),
        column(decode, keys[1]),
        column(decode, values[1], 1e3),
        column(decode, values[2], 1e3),
    )


VIDUR_MHA = ("input_layernorm", "attn_pre_proj", "attn_rope", "attn_post_proj", "add")
VIDUR_FFN = ("post_attention_layernorm", "mlp_up_proj", "mlp_act", "mlp_down_proj", "add")
"""Operators of a block without attention and without an all-reduce, by Vidur's names."""


def _vidur_operators(mlp: Path, model: ModelSpec, gpu: Gpu) -> pd.DataFrame:
    """Return microseconds of one layer's operators over tokens on one of ``gpu.tp`` GPUs.

    Rows faster than the device's peak are dropped: the profiler timed another kernel.
    """
    raw = read_table(mlp, ("num_tokens", "num_tensor_parallel_workers", "time_stats.mlp_up_proj.median"))
    raw = raw[raw["num_tensor_parallel_workers"] == gpu.tp].groupby("num_tokens").median(numeric_only=True)
    table = pd.DataFrame(raw[[name for name in raw.columns if name.endswith(".median")]] * 1e3)
    table.columns = pd.Index([name.removeprefix("time_stats.").removesuffix(".median") for name in table.columns])
    shard = model.shard(gpu.tp)
    products = {
        "attn_pre_proj": (qkv_size(shard), shard.hidden_size),
        "attn_post_proj": (shard.hidden_size, shard.num_heads * shard.head_dim),
        "mlp_up_proj": (2 * shard.intermediate_size, shard.hidden_size),
        "mlp_down_proj": (shard.hidden_size, shard.intermediate_size),
    }
    tokens = table.index.to_numpy(dtype=np.float64)
    for name, (n, k) in products.items():
        table[name] = table[name].where(table[name] >= product_us(tokens, n, k, gpu))
    return table[table.index.isin(_spread(table.index.to_numpy(dtype=np.int64)))]


def read_vidur_blocks(mlp: Path, model: ModelSpec, gpu: Gpu) -> dict[str, Curve]:
    """Return what Vidur measured of the blocks of a model on one of ``gpu.tp`` GPUs: `mha` and `ffn` over tokens.

    Neither attention, nor storing KV, nor an all-reduce is part of it.
    """
    table = _vidur_operators(mlp, model, gpu)
    return {"mha": _sum(table, dict.fromkeys(VIDUR_MHA, 1)), "ffn": _sum(table, dict.fromkeys(VIDUR_FFN, 1))}


def read_vidur(mlp: Path, attention: Path, model: ModelSpec, gpu: Gpu, sampler: Curve) -> Terms:
    """Read a pair of Vidur's operator profiles (milliseconds of one layer) at tensor parallelism 1.

    Vidur does not time the LM head; it is priced as the gate-and-up product scaled by output columns.
    """
    table = _vidur_operators(mlp, model, gpu)
    sweep = _vidur_attention(read_table(attention, VIDUR_ATTENTION))
    save = merge(Curve(sweep.batch, sweep.save_us))
    mha = _sum(table, dict.fromkeys(VIDUR_MHA, 1))
    # Measured KV saves are of decode batches. Those of prompts are priced by bytes: one profiler looped over tokens.
    saved = np.maximum(np.interp(mha.x, save.x, save.us), elementwise_us(mha.x, model.kv_bytes_per_token_layer, gpu))
    up = _sum(table, {"mlp_up_proj": model.vocab_size / (2 * model.intermediate_size)})
    up = Curve(up.x[up.x <= 256], up.us[up.x <= 256])
    decode = Surface(sweep.batch, sweep.context, sweep.decode_us)
    return Terms(
        linear={
            16: {
                "mha": Curve(mha.x, mha.us + saved),
                "ffn": _sum(table, dict.fromkeys(VIDUR_FFN, 1)),
            }
        },
        token=_sum(table, {"emb": 1, "input_layernorm": 1}),
        head=Curve(up.x, up.us + sampler_us(sampler, model.vocab_size, up.x)),
        prefill=Surface(sweep.prefill_chunk, mean_context(sweep.prefill_chunk, sweep.prefill_kv), sweep.prefill_us),
        decode=raise_to_bandwidth(decode, model.kv_bytes_per_token_layer, gpu),
    )


def _spread(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return about half of a dense sweep's counts: all up to 64, then in steps of at least 4 %."""
    kept: list[int] = []
    for count in counts.tolist():
        if count <= 64 or count >= kept[-1] * 1.04:
            kept.append(count)
    return np.array(kept, dtype=np.int64)


class Kernels:
    """Kernel times of one framework on one device, as aiconfigurator publishes them (milliseconds per call)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gemm = read_table(folder / "gemm_perf.csv.gz", ("gemm_dtype", "m", "n", "k", "latency"))
        names = ("batch_size", "isl", "step", "num_heads", "num_key_value_heads", "kv_cache_dtype", "latency")
        self.context = read_table(folder / "context_attention_perf.csv.gz", names)
        self.generation = read_table(folder / "generation_attention_perf.csv.gz", names)

    def dtypes(self) -> dict[int, str]:
        """Return the products of each precision: weight-only ones, or those of FP8 where no others of 8 bits are."""
        measured = set(self.gemm["gemm_dtype"])
        found = {bits: name for bits, name in DTYPES.items() if name in measured}
        if 8 not in found and FP8 in measured:
            found[8] = FP8
        return dict(sorted(found.items(), reverse=True))

    def product(self, dtype: str, n: int, k: int, leave_out: bool = False) -> Curve:
        """Return microseconds over m of out[m, n] = in[m, k] x weight[k, n].

        A shape that was not measured is interpolated, at every m, between its nearest measured neighbors in n or in k;
        beyond the largest, extrapolated from the largest and one of at most half its size.

        Args:
            leave_out: predict a measured shape from its neighbors, to measure that error.
        """
        rows = self.gemm[self.gemm["gemm_dtype"] == dtype]
        along, wanted = ("n", n) if (rows["k"] == k).any() else ("k", k)
        rows = rows[(rows["k"] == k) if along == "n" else (rows["n"] == n)]
        table = rows.pivot_table(index="m", columns=along, values="latency", aggfunc="median").dropna(axis=0) * 1e3
        sizes = table.columns.to_numpy(dtype=np.float64)
        if sizes.size < 3:
            raise CalibrationError(f"{self.folder} has no {dtype} products near n={n}, k={k}")
        m = table.index.to_numpy(dtype=np.float64)
        if wanted in sizes and not leave_out:
            return Curve(m, table[wanted].to_numpy(dtype=np.float64))
        others = sizes[sizes != wanted]
        low = others[others < wanted].max()
        above = others[others > wanted]
        high = above.min() if above.size else low
        if not above.size:
            low = others[others <= high / 2].max()
        share = (wanted - low) / (high - low)
        left, right = (table[size].to_numpy(dtype=np.float64) for size in (low, high))
        return Curve(m, left + share * (right - left))

    def decode(self, heads: int, kv_heads: int) -> Surface:
        """Return decode attention: ``step`` tokens of context and the new one, for ``batch_size`` sequences.

        Heads that were not measured are those of ``measured_heads`` over more rows (``spread_heads``).
        """
        measured, measured_kv = self.measured_heads(self.generation, heads, kv_heads)
        if measured != heads:
            return spread_heads(self.decode(measured, measured_kv), heads / measured)
        rows = self._attention(self.generation, heads, kv_heads)
        batch = rows["batch_size"].to_numpy(dtype=np.float64)
        return Surface(batch, rows["step"].to_numpy(dtype=np.float64) + 1, rows["latency"].to_numpy() * 1e3)

    def prefill(self, heads: int, kv_heads: int) -> Surface:
        """Return prefill attention over (prompt tokens of the batch, their mean context): prompts without prefix."""
        measured, measured_kv = self.measured_heads(self.context, heads, kv_heads)
        if measured != heads:
            return spread_heads(self.prefill(measured, measured_kv), heads / measured)
        rows = self._attention(self.context, heads, kv_heads)
        rows = rows[(rows["isl"] >= 16) & (rows["batch_size"] * rows["isl"] <= 16384)]
        length = rows["isl"].to_numpy(dtype=np.float64)
        tokens = length * rows["batch_size"].to_numpy(dtype=np.float64)
        return Surface(tokens, mean_context(length, np.zeros(len(length))), rows["latency"].to_numpy() * 1e3)

    def measured_heads(self, table: pd.DataFrame, heads: int, kv_heads: int) -> tuple[int, int]:
        """Return the heads and KV heads nearest to those wanted, of as many queries for each KV head.

        Raises:
            CalibrationError: if no attention of that grouping was measured.
        """
        group = heads // kv_heads
        found = {
            (int(pair[0]), int(pair[1]))
            for pair in table[["num_heads", "num_key_value_heads"]].drop_duplicates().itertuples(index=False)
            if pair[0] == pair[1] * group
        }
        if not found:
            raise CalibrationError(f"{self.folder} has no attention with {heads} heads over {kv_heads} KV heads")
        return min(found, key=lambda pair: (abs(np.log(pair[0] / heads)), pair))

    def _attention(self, table: pd.DataFrame, heads: int, kv_heads: int) -> pd.DataFrame:
        rows = table[
            (table["num_heads"] == heads)
            & (table["num_key_value_heads"] == kv_heads)
            & (table["kv_cache_dtype"] == "bfloat16")
        ]
        if rows.empty:
            raise CalibrationError(f"{self.folder} has no attention with {heads} heads over {kv_heads} KV heads")
        return rows.groupby(["batch_size", "isl", "step"], as_index=False)[["latency"]].median()


DTYPES = {16: "bfloat16", 8: "int8_wo", 4: "int4_wo"}
FP8 = "fp8"
"""Products of 8-bit floats with 8-bit floats (W8A8), which need activations rounded first."""


def read_allreduce(path: Path, gpus: int) -> Curve:
    """Return microseconds of an all-reduce among ``gpus`` GPUs over its elements of two bytes, in a CUDA graph.

    aiconfigurator's `message_size` counts elements: as bytes, the largest ones would take twice as long as NVLink does.
    """
    table = read_table(path, ("kernel_source", "allreduce_dtype", "num_gpus", "message_size", "latency"))
    graph = table["kernel_source"].str.endswith("_graph") & (table["allreduce_dtype"] == "bfloat16")
    rows = table[graph & (table["num_gpus"] == gpus)].groupby("message_size")["latency"].median()
    if rows.empty:
        raise CalibrationError(f"{path} has no all-reduce among {gpus} GPUs")
    return Curve(rows.index.to_numpy(dtype=np.float64), rows.to_numpy(dtype=np.float64) * 1e3)


def compose(kernels: Kernels, model: ModelSpec, gpu: Gpu, sampler: Curve, allreduce: Curve | None = None) -> Terms:
    """Return a model's terms composed of kernels; elementwise operations are priced by their bytes.

    With tensor parallelism (Megatron-LM, arXiv 1909.08053, section 3) these are the kernels of one GPU. After every
    MHA and FFN block, and after the embedding, the hidden states are summed over all GPUs. The logits are gathered,
    which sends half of what an all-reduce of their size does and is priced as one of half their size.

    Args:
        kernels: of one GPU. model: all of it; ``gpu.tp`` GPUs divide it among them.
        gpu: the device. sampler: over sequences.
        allreduce: over elements, among ``gpu.tp`` GPUs; None on one GPU.
    """
    whole, model = model, model.shard(gpu.tp)
    kinds: dict[int, dict[str, Curve]] = {}
    gates = 2 if model.gated_ffn else 1
    dtypes = kernels.dtypes()
    for bits, dtype in dtypes.items():
        qkv, out = (
            kernels.product(dtype, qkv_size(model), model.hidden_size),
            kernels.product(dtype, model.hidden_size, model.num_heads * model.head_dim),
        )
        up = kernels.product(dtype, gates * model.intermediate_size, model.hidden_size)
        down = kernels.product(dtype, model.hidden_size, model.intermediate_size)
        norm = 2 * 4 * model.hidden_size  # read and write activations and residual
        rope = 2 * 2 * qkv_size(model)
        act = 2 * (gates + 1) * model.intermediate_size
        mha_bytes, ffn_bytes = [norm, rope], [norm, act]
        if dtype == FP8:  # each product's input is read at two bytes and written at one
            mha_bytes += [3 * model.hidden_size, 3 * model.num_heads * model.head_dim]
            ffn_bytes += [3 * model.hidden_size, 3 * model.intermediate_size]
        m, n = np.intersect1d(qkv.x, out.x), np.intersect1d(up.x, down.x)
        kinds[bits] = {
            "mha": Curve(m, sum((elementwise_us(m, each, gpu) for each in mha_bytes), _on(qkv, m) + _on(out, m))),
            "ffn": Curve(n, sum((elementwise_us(n, each, gpu) for each in ffn_bytes), _on(up, n) + _on(down, n))),
        }
    head = kernels.product("bfloat16", model.vocab_size, model.hidden_size)
    few = head.x <= 512
    tokens = kinds[16]["mha"].x
    token_us = elementwise_us(tokens, 2 * 2 * model.hidden_size, gpu) * 2
    head_us = head.us[few] + sampler_us(sampler, whole.vocab_size, head.x[few])
    summed = None
    if allreduce is not None:
        summed = Curve(allreduce.x / model.hidden_size, allreduce.us)
        token_us = token_us + curve_at(summed.x, summed.us, tokens)
        head_us = head_us + curve_at(allreduce.x, allreduce.us, head.x[few] * whole.vocab_size / 2)
    return Terms(
        linear={bits: curves for bits, curves in kinds.items() if dtypes[bits] != FP8},
        fp8=kinds[8] if dtypes.get(8) == FP8 else None,
        token=Curve(tokens, token_us),
        head=Curve(head.x[few], head_us),
        prefill=kernels.prefill(model.num_heads, model.num_kv_heads),
        decode=raise_to_bandwidth(
            kernels.decode(model.num_heads, model.num_kv_heads), model.kv_bytes_per_token_layer, gpu
        ),
        allreduce=summed,
    )


def spread_heads(measured: Surface, times: float) -> Surface:
    """Return attention of ``times`` as many heads as measured, from that of the measured heads over as many more rows.

    An attention kernel's work items are pairs of a head and a sequence or a tile of a prompt, so that twice the heads
    are twice the work items. Rows below one are left out.
    """
    kept = measured.x >= times
    return Surface(measured.x[kept] / times, measured.y[kept], measured.us[kept])


def _on(curve: Curve, counts: Floats) -> Floats:
    return curve.us[np.isin(curve.x, counts)]


def qkv_size(model: ModelSpec) -> int:
    """Return the output features of the fused query, key and value projection."""
    return (model.num_heads + 2 * model.num_kv_heads) * model.head_dim


ACHIEVED = 0.9
"""Share of the data-sheet bandwidth that a kernel reaches: Vidur's residual add of 4,096 tokens on A100 runs at 1.83e12
bytes/s of 2.04e12, LLMServingSim's largest decode attention on RTX 4090 at 0.95e12 of 1.008e12, aiconfigurator's
on L40S at 0.75e12 of 0.864e12."""
LAUNCH_US = 2.0
"""Least time of an elementwise kernel: Vidur's residual add of one token on A100, H100 and A40 takes 1 to 2 us."""


def elementwise_us(tokens: Floats, bytes_per_token: float, gpu: Gpu) -> Floats:
    """Return the microseconds of a fused elementwise kernel: the time to move its bytes."""
    return np.maximum(LAUNCH_US, tokens * bytes_per_token / (ACHIEVED * gpu.memory_bandwidth_bytes_per_s) * 1e6)


def product_us(tokens: Floats, n: int, k: int, gpu: Gpu) -> Floats:
    """Return the fewest microseconds that the data sheet allows for a matrix product with 2-byte weights."""
    compute_s = 2.0 * tokens * n * k / gpu.dense_fp16_flop_per_s
    return np.maximum(compute_s, 2.0 * n * k / gpu.memory_bandwidth_bytes_per_s) * 1e6


def sampler_us(sampler: Curve, vocab: int, sequences: Floats) -> Floats:
    """Return the microseconds of sampling: vLLM's on RTX 4090, with the slope over sequences scaled by vocabulary."""
    first = float(sampler.us[0])
    measured = np.interp(sequences, sampler.x, sampler.us)
    slope = (sampler.us[-1] - sampler.us[-2]) / (sampler.x[-1] - sampler.x[-2])
    beyond = np.maximum(0.0, sequences - sampler.x[-1]) * slope
    scaled: Floats = first + (measured + beyond - first) * vocab / 128256
    return scaled


def read_sampler(folder: Path) -> Curve:
    """Return vLLM's sampler over sequences, for a vocabulary of 128,256."""
    table = read_table(folder / "per_sequence.csv.gz", ("layer", "sequences", "time_us"))
    return _sum(_by_layer(table, "sequences", "time_us"), {"sampler": 1})


def raise_to_bandwidth(decode: Surface, kv_bytes_per_token: int, gpu: Gpu) -> Surface:
    """Return decode attention with times raised to what memory needs to deliver the KV.

    A profiler that calls one kernel repeatedly finds its KV in the L2 cache. In a served model, the weights and KV of
    all other layers pass through that cache in between.
    """
    least = decode.x * decode.y * kv_bytes_per_token / (ACHIEVED * gpu.memory_bandwidth_bytes_per_s) * 1e6
    return Surface(decode.x, decode.y, np.maximum(decode.us, least))


def _by_layer(table: pd.DataFrame, over: str, value: str) -> pd.DataFrame:
    """Return one row per count and one column per operation: the median of repeats."""
    return table.pivot_table(index=over, columns="layer", values=value, aggfunc="median")


def _sum(table: pd.DataFrame, operations: dict[str, float]) -> Curve:
    """Return the curve of a weighted sum of operations, at the counts where all were measured."""
    missing = [name for name in operations if name not in table.columns]
    if missing:
        raise CalibrationError(
            f"measurements lack {', '.join(missing)}; they have {', '.join(map(str, table.columns))}"
        )
    kept = table[list(operations)].dropna()
    total = (kept * pd.Series(operations)).sum(axis=1)
    return Curve(kept.index.to_numpy(dtype=np.float64), total.to_numpy(dtype=np.float64))


def read_steady_decode(folder: Path, kv_tokens: int, block_tokens: int, before_s: float) -> pd.DataFrame:
    """Return the seconds of pure decode of a real vLLM run, from its once-a-second log.

    They are the first stretch of five seconds or more before ``before_s`` in which no prompt was processed and the
    number of running requests never rose. Later stretches hide preempted requests that are computed again.

    Columns: `batch`; `context_sum`, from the share of KV in use (on average half of a request's last block is empty);
    `iteration_us`, in which each running request gets one token.
    """
    log = read_table(folder / "timeseries.csv", ("t", "prompt_throughput", "gen_throughput", "running", "kv_cache_pct"))
    log = log[log["t"] <= before_s].reset_index(drop=True)
    steady = (log["prompt_throughput"] == 0) & (log["running"] > 1) & (log["running"].diff() <= 0)
    run = (steady != steady.shift()).cumsum()[steady]
    long = run[run.groupby(run).transform("size") >= 5]
    if long.empty:
        raise CalibrationError(f"{folder} has no five seconds of pure decode before {before_s} s")
    rows = log.loc[long[long == long.iloc[0]].index]
    held = rows["kv_cache_pct"] / 100.0 * kv_tokens
    return pd.DataFrame(
        {
            "batch": rows["running"].astype(int),
            "context_sum": (held - rows["running"] * block_tokens / 2).astype(int),
            "iteration_us": rows["running"] / rows["gen_throughput"] * 1e6,
        }
    )


# --- fits -----------------------------------------------------------------------------------------------------------


def merge(curve: Curve) -> Curve:
    """Return the curve with one point per count: the median of repeats."""
    counts = np.unique(curve.x)
    return Curve(counts, np.array([np.median(curve.us[curve.x == count]) for count in counts]))


def fit_curve(curve: Curve, knots: Floats, smooth: float = SMOOTH) -> Floats:
    """Return microseconds at ``knots``, never falling."""
    index, share = _place(knots, curve.x)
    n = np.arange(len(curve.us))
    design = csr_matrix(
        (
            np.concatenate([1.0 - share, share]) / np.tile(curve.us, 2),
            (np.tile(n, 2), np.concatenate([index, index + 1])),
        ),
        shape=(len(curve.us), len(knots)),
    )
    order = np.argsort(curve.x, kind="stable")
    scale = np.interp(knots, curve.x[order], curve.us[order])
    fitted = _solve(design, smooth * diags(1.0 / scale[1:-1]) @ _bends(knots))
    return rising(np.maximum(fitted, 0.5 * curve.us.min()))


def fit_surface(surface: Surface, rows: Floats, columns: Floats, smooth: float = SMOOTH, power: float = 0.5) -> Floats:
    """Return microseconds at ``rows`` x ``columns``, never falling along either axis.

    ``power`` says how a cell without a measurement is continued: 0 in a straight line, 1 as a power law, between: both.
    """
    i, u = _place(rows, surface.x)
    j, v = _place(columns, surface.y)
    n, width = np.arange(len(surface.us)), len(columns)
    weights = np.concatenate([(1 - u) * (1 - v), (1 - u) * v, u * (1 - v), u * v]) / np.tile(surface.us, 4)
    cells = np.concatenate([i * width + j, i * width + j + 1, (i + 1) * width + j, (i + 1) * width + j + 1])
    design = csr_matrix((weights, (np.tile(n, 4), cells)), shape=(len(n), len(rows) * width))
    straight: csr_matrix = _bends_2d(rows, columns)
    # Logarithms are near a sum of a row and a column where cells miss: twice two differences between neighbors vanish.
    crossed = CROSS * kron(_steps(len(rows)), _steps(width))
    curved = csr_matrix(vstack([power * _bends_2d(np.log(rows), np.log(columns)), crossed]))
    centre = vstack([kron(_inner(rows), identity(width)), kron(identity(len(rows)), _inner(columns))])
    near = NearestNDInterpolator(np.column_stack([np.log(surface.x), np.log(surface.y)]), surface.us)
    height = near(*np.meshgrid(np.log(rows), np.log(columns), indexing="ij")).ravel()
    for _ in range(6):
        # The bend of a logarithm, linearized at the last height: log h is about log h0 + h / h0 - 1.
        penalty = vstack([(1.0 - power) * diags(1.0 / (centre @ height)) @ straight, curved @ diags(1.0 / height)])
        wanted = np.concatenate([np.zeros(straight.shape[0]), -(curved @ (np.log(height) - 1.0))])
        height = np.maximum(_solve(design, smooth * penalty, smooth * wanted), 0.5 * surface.us.min())
    return rising_surface(height.reshape(len(rows), width))


def rising(values: Floats) -> Floats:
    """Return the closest sequence, in logarithms, that never falls."""
    fitted: Floats = np.exp(isotonic_regression(np.log(values)).x)
    return fitted


def rising_surface(values: Floats) -> Floats:
    """Return a surface near ``values`` that falls along neither axis: isotonic fits in turn, then a running maximum."""
    fitted = values.copy()
    for _ in range(8):
        fitted = np.apply_along_axis(rising, 1, fitted)
        fitted = np.apply_along_axis(rising, 0, fitted)
    return np.maximum.accumulate(np.maximum.accumulate(fitted, axis=0), axis=1)


def thin(x: Floats, values: Floats, tolerance: float) -> NDArray[np.int64]:
    """Return the indices of the fewest points (greedily) between which lines stay within a relative ``tolerance``."""
    keep = {0, len(x) - 1}
    stack = [(0, len(x) - 1)]
    while stack:
        low, high = stack.pop()
        if high - low < 2:
            continue
        inner = np.arange(low + 1, high)
        line = np.interp(x[inner], x[[low, high]], values[[low, high]])
        error = np.abs(line / values[inner] - 1.0)
        if error.max() > tolerance:
            worst = int(inner[error.argmax()])
            keep.add(worst)
            stack += [(low, worst), (worst, high)]
    return np.array(sorted(keep), dtype=np.int64)


def folds(points: int) -> NDArray[np.int64]:
    """Return the fold of every point, 0 to FOLDS - 1, by a seeded permutation."""
    order = np.random.default_rng(SEED).permutation(points)
    fold = np.empty(points, dtype=np.int64)
    fold[order] = np.arange(points) % FOLDS
    return fold


def held_out(points: int, inside: NDArray[np.bool_], fit_and_predict: Callable[[NDArray[np.bool_]], Floats]) -> Floats:
    """Return each inner point's prediction by a fit that did not see it; NaN for points at the edge.

    Args:
        inside: points that may be held out. The edges stay in every training set: beyond them is extrapolation.
        fit_and_predict: from the mask of training points to predictions at all points.
    """
    fold, predicted = folds(points), np.full(points, np.nan)
    for k in range(FOLDS):
        test = (fold == k) & inside
        if test.any():
            predicted[test] = fit_and_predict(~test)[test]
    return predicted


def _place(knots: Floats, x: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Return each x's segment and its position in it: 0 below the first knot, above 1 beyond the last."""
    x = np.maximum(x, knots[0])
    index = np.clip(np.searchsorted(knots, x, side="right") - 1, 0, len(knots) - 2)
    return index, (x - knots[index]) / (knots[index + 1] - knots[index])


def _bends(knots: Floats) -> csr_matrix:
    """Return the matrix that gives each inner knot's height above the line between its neighbors: the curvature."""
    n = np.arange(1, len(knots) - 1)
    share = (knots[n] - knots[n - 1]) / (knots[n + 1] - knots[n - 1])
    values = np.concatenate([share - 1.0, np.ones(len(n)), -share])
    return csr_matrix((values, (np.tile(n - 1, 3), np.concatenate([n - 1, n, n + 1]))), shape=(len(n), len(knots)))


def _bends_2d(rows: Floats, columns: Floats) -> csr_matrix:
    by_row = csr_matrix(kron(_bends(rows), identity(len(columns))))
    return csr_matrix(vstack([by_row, csr_matrix(kron(identity(len(rows)), _bends(columns)))]))


def _steps(count: int) -> csr_matrix:
    """Return the matrix of differences between neighbors."""
    return csr_matrix(identity(count))[1:] - csr_matrix(identity(count))[:-1]


def _inner(knots: Floats) -> csr_matrix:
    """Return the matrix that picks every inner knot."""
    return csr_matrix(identity(len(knots)))[1:-1]


def _solve(design: csr_matrix, penalty: csr_matrix, wanted: Floats | float = 0.0) -> Floats:
    """Return x that makes ``design @ x`` near 1 and ``penalty @ x`` near ``wanted`` in least squares."""
    normal = design.T @ design + penalty.T @ penalty
    target = design.T @ np.ones(design.shape[0]) + penalty.T @ np.broadcast_to(wanted, penalty.shape[0])
    solved: Floats = spsolve(normal.tocsc(), target)
    return solved


# --- one kernel for prompts and decodes -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedFit:
    """The `shared` rule of `sim.cost.latency_tables`: coefficients, decode table M, and the residual on its axes."""

    fit_us: Floats
    batch: Floats
    context: Floats
    decode_us: Floats
    axes: tuple[Floats, Floats, Floats, Floats]
    residual: Floats


def fit_shared(mixed: Mixed, prefill_us: Callable[[Floats, Floats], Floats]) -> SharedFit:
    """Fit the price of one kernel over a chunk and decodes.

    Args:
        mixed: samples; those of the smallest chunk without prefix give M, the decodes' own price in such a kernel.
        prefill_us: microseconds of the prefill part alone, from (tokens, mean context).
    """
    alone = (mixed.chunk == mixed.chunk.min()) & (mixed.prefix == 0)
    batch, context = np.unique(mixed.batch), np.unique(mixed.context)
    # Axes on which the samples are complete; the other samples of a denser sweep are left to check the rule.
    axes = (_frequent(mixed.chunk), _frequent(mixed.prefix), _frequent(mixed.batch), _frequent(mixed.context))
    context = axes[3]
    decode_us = fit_surface(Surface(mixed.batch[alone], mixed.context[alone], mixed.us[alone]), batch, context)
    fit = SharedFit(
        fit_us=np.zeros(5),
        batch=batch,
        context=context,
        decode_us=decode_us,
        axes=axes,
        residual=np.ones([len(axis) for axis in axes]),
    )
    prefill = prefill_us(mixed.chunk, mean_context(mixed.chunk, mixed.prefix))
    decode = surface_at(batch, context, decode_us, mixed.batch, mixed.context)

    def loss(logs: Floats) -> float:
        predicted = _shared_rule(np.exp(logs), mixed, prefill, decode)
        return float(np.mean(np.minimum(np.abs(np.log(predicted / mixed.us)), 0.3)))

    start = np.log([0.03, 0.6, 0.015, 3.0, 1.0])
    best = minimize(loss, start, method="Nelder-Mead", options={"maxiter": 1500, "xatol": 1e-3, "fatol": 1e-5})
    fit_us: Floats = np.exp(best.x)
    ratio = mixed.us / _shared_rule(fit_us, mixed, prefill, decode)
    return replace(fit, fit_us=fit_us, residual=_fill(mixed, ratio, axes))


def shared_at(fit: SharedFit, mixed: Mixed, prefill: Floats) -> Floats:
    """Return the microseconds of the fitted rule, as `sim.cost.latency_tables.attention_seconds` computes them."""
    decode = surface_at(fit.batch, fit.context, fit.decode_us, mixed.batch, mixed.context)
    logs = (np.log(fit.axes[0]), np.log1p(fit.axes[1]), np.log(fit.axes[2]), np.log(fit.axes[3]))
    points = np.column_stack([np.log(mixed.chunk), np.log1p(mixed.prefix), np.log(mixed.batch), np.log(mixed.context)])
    inside = np.clip(points, [axis[0] for axis in logs], [axis[-1] for axis in logs])
    residual: Floats = RegularGridInterpolator(logs, fit.residual)(inside)
    total: Floats = np.maximum(prefill, _shared_rule(fit.fit_us, mixed, prefill, decode) * residual)
    return total


def surface_at(rows: Floats, columns: Floats, us: Floats, x: Floats, y: Floats) -> Floats:
    """Return a fitted surface at points, by the function that prices iterations."""
    data, p, q = np.concatenate([rows, columns, us.ravel()]), len(rows), len(columns)
    return np.array([interp2(data, 0, p, p, q, p + q, float(a), float(b)) for a, b in zip(x, y, strict=True)])


def curve_at(knots: Floats, us: Floats, x: Floats) -> Floats:
    """Return a fitted curve at points, as iterations are priced."""
    return interpolated(knots, us, np.asarray(x, dtype=np.float64))


def _shared_rule(fit: Floats, mixed: Mixed, prefill: Floats, decode: Floats) -> Floats:
    tiles = np.ceil(mixed.chunk / TILE_TOKENS)
    work = fit[0] * mean_context(mixed.chunk, mixed.prefix) * tiles + fit[1] * tiles
    decode_work = fit[2] * mixed.batch * mixed.context + fit[3] * mixed.batch
    together = fit[4] + np.minimum(prefill, work) + np.minimum(decode, decode_work)
    seconds: Floats = np.maximum(np.maximum(prefill, decode), together)
    return seconds


def _frequent(values: Floats) -> Floats:
    """Return the values of the sweep's complete grid: powers of two, and none."""
    unique = np.unique(values)
    powers: Floats = unique[(unique == 0) | (np.log2(np.maximum(unique, 1)) % 1 == 0)]
    return powers


def _fill(mixed: Mixed, ratio: Floats, axes: tuple[Floats, Floats, Floats, Floats]) -> Floats:
    """Return the residual on the grid: the measured ratio, and between measured cells their running average."""
    shape = tuple(len(axis) for axis in axes)
    known, total = np.zeros(shape), np.zeros(shape)
    columns = (mixed.chunk, mixed.prefix, mixed.batch, mixed.context)
    on_grid = np.logical_and.reduce([np.isin(column, axis) for column, axis in zip(columns, axes, strict=True)])
    cell = tuple(np.searchsorted(axis, column[on_grid]) for column, axis in zip(columns, axes, strict=True))
    np.add.at(known, cell, 1.0)
    np.add.at(total, cell, np.log(ratio[on_grid]))
    measured = known > 0
    logs = np.where(measured, total / np.maximum(known, 1.0), 0.0)
    for _ in range(40):
        padded = np.pad(logs, 1, mode="edge")
        middle = (slice(1, -1),) * 4
        around = np.zeros(shape)
        for axis in range(4):
            for step in (slice(0, -2), slice(2, None)):
                around += padded[tuple(step if i == axis else middle[i] for i in range(4))]
        logs = np.where(measured, logs, around / 8.0)
    filled: Floats = np.exp(logs)
    return filled
