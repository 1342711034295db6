"""Write the latency calibrations that the simulator reads.

    python -m hw.calibrate source=measurements                          every target
    python -m hw.calibrate source=measurements target=llama2_7b_a100    one
    python -m hw.calibrate source=measurements data=FOLDER out=FOLDER   other folders

    python -m hw.calibrate source=device                                this device: SmolLM2-135M, one thread of a CPU
    python -m hw.calibrate source=device model=MODEL device=GPU clock=wall checkpoint=FOLDER seconds=600
    python -m hw.calibrate source=device only=changes                   the cost of plan changes anew, in the file there

source=measurements fits published measurements (data defaults to calibration/ under RAP_LAB_DATA, or to shared/ beside
the checkout) and writes one small JSON a target to conf/calibration. Each file states the held-out error of each term.

source=device measures every term on the machine at hand, in the code of hw.engine.hw_engine (hw/calibrate/device.py), and
writes MODEL_DEVICE.json and a picture beside it. device= names an option of conf/gpu. A run that was stopped goes on
where it was. clock=cpu counts processor seconds, for a machine that others share; clock=wall the real ones. What plan
changes cost (hw/calibrate/plan_changes.py) lies in the file's device_run; of it the simulator takes copy_slowdown and
host_to_device_bytes_per_s, instead of the data sheet's.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from hw.calibrate import measurements as m
from sim.cost.gpu import Gpu
from sim.cost.latency import CALIBRATIONS, SCHEMA
from sim.cost.model_spec import ModelSpec, load_model
from sim.errors import CalibrationError, ConfigError, RapLabError, nearest
from sim.paths import REPOSITORY, find_data
from sim.results.run_folder import commit
from sim.types import Floats

TARGET_MEDIAN, TARGET_P95 = 0.03, 0.12
CURVE_TOLERANCE = 0.002
"""Knots of a curve that a straight line replaces within this share are left out of the file."""

VALIDATION = (
    f"{m.FOLDS}-fold, seed {m.SEED}: every measured point that is not at the edge of its table is predicted once by a "
    "fit that did not see it; relative errors. The table itself is fitted on all points"
)

LLMSERVINGSIM = {
    "repository": "casys-kaist/LLMServingSim",
    "commit": "5daddb21a545658d5150b535712d0494584b5278",
    "licence": "MIT",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One calibration: which model on which device, from which measurements.

    read: from the folder of measurements to samples of every term. check: further errors that the target states.
    why: term -> the reason that its held-out error misses the target, where it does.
    """

    name: str
    model: str
    device: str
    kind: str
    stack: str
    sources: tuple[dict[str, str], ...]
    read: Callable[[Path], m.Terms]
    check: Callable[[Path], dict[str, Any]] | None = None
    notes: tuple[str, ...] = ()
    why: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """Host overhead of one iteration in microseconds, and where it comes from."""

    us: float
    source: str


def calibrate(target: Target, folder: Path, fixed: Fixed) -> dict[str, Any]:
    """Return the content of a calibration file: the tables fitted on all samples and each term's held-out error."""
    terms = target.read(folder)
    errors: dict[str, dict[str, Any]] = {}
    tables: dict[str, Any] = {}

    tokens = _shared_knots([curve for kinds in terms.linear.values() for curve in kinds.values()] + [terms.token])
    tables["tokens"] = _plain(tokens)
    tables["linear_us"] = {}
    for bits, kinds in terms.linear.items():
        tables["linear_us"][str(bits)] = {kind: _round(m.fit_curve(curve, tokens)) for kind, curve in kinds.items()}
        for kind, curve in kinds.items():
            errors[f"{kind}_linear_{bits}"] = _curve_error(curve)
    tables["token_us"] = _round(m.fit_curve(terms.token, tokens))
    errors["token"] = _curve_error(terms.token)
    sequences = _shared_knots([terms.head])
    tables["sequences"] = _plain(sequences)
    tables["head_us"] = _round(m.fit_curve(terms.head, sequences))
    errors["head"] = _curve_error(terms.head)

    rows, columns = _knots(terms.prefill.x), _knots(terms.prefill.y, whole=False, per_octave=4.0)
    prefill = m.fit_surface(terms.prefill, rows, columns)
    tables["prefill_attention"] = {"tokens": _plain(rows), "context": _plain(columns), "us": _round(prefill)}
    errors["prefill_attention"] = _surface_error(terms.prefill, rows, columns)
    batches, contexts = _knots(terms.decode.x), _knots(terms.decode.y)
    decode = m.fit_surface(terms.decode, batches, contexts)
    tables["decode_attention"] = {"batch": _plain(batches), "context": _plain(contexts), "us": _round(decode)}
    errors["decode_attention"] = _surface_error(terms.decode, batches, contexts)

    if terms.mixed is not None:

        def prefill_us(x: Floats, y: Floats) -> Floats:
            return m.surface_at(rows, columns, prefill, x, y)

        fit = m.fit_shared(terms.mixed, prefill_us)
        tables["shared_attention"] = {
            "fit_us": _round(fit.fit_us),
            "prefill_tokens": _plain(fit.axes[0]),
            "prefix": _plain(fit.axes[1]),
            "batch": _plain(fit.batch),
            "context": _plain(fit.context),
            "us": _round(fit.decode_us),
            "residual": [float(f"{ratio:.3g}") for ratio in fit.residual.ravel()],
        }
        errors["shared_attention"] = _shared_error(terms.mixed, prefill_us)

    if target.check is not None:
        errors |= target.check(folder)
    for term, error in errors.items():
        if not _met(error):
            error["note"] = target.why.get(term, "no reason known")
    return {
        "schema": SCHEMA,
        "name": target.name,
        "model": target.model,
        "device": target.device,
        "kind": target.kind,
        "stack": target.stack,
        "date": datetime.date.today().isoformat(),
        "sources": list(target.sources),
        "notes": list(target.notes),
        "fixed_us": fixed.us,
        "fixed_source": fixed.source if target.device == FIXED_DEVICE else f"{fixed.source}; for this device a prior",
        "validation": VALIDATION,
        "errors": errors,
        "tables": tables,
    }


def _shared_knots(curves: Sequence[m.Curve]) -> Floats:
    """Return counts, common to all curves, that keep each within CURVE_TOLERANCE of its measured points."""
    merged = [m.merge(curve) for curve in curves]
    common = merged[0].x
    for curve in merged[1:]:
        common = np.intersect1d(common, curve.x)
    keep = {0, len(common) - 1}
    for curve in merged:
        keep |= set(m.thin(common, m.rising(curve.us[np.isin(curve.x, common)]), CURVE_TOLERANCE).tolist())
    return common[sorted(keep)]


def _knots(values: Floats, whole: bool = True, per_octave: float = 2.0) -> Floats:
    """Return knots for a table's axis: the measured values if few, else about ``per_octave`` an octave and the ends."""
    unique = np.unique(values)
    if whole and len(unique) <= 24:
        return unique
    count = max(2, round(np.log2(unique[-1] / unique[0]) * per_octave) + 1)
    wanted = np.geomspace(unique[0], unique[-1], count)
    if not whole:
        return np.unique(np.array([float(f"{value:.4g}") for value in wanted]))
    return np.unique(unique[np.abs(np.log(unique)[:, None] - np.log(wanted)[None, :]).argmin(axis=0)])


def _curve_error(curve: m.Curve) -> dict[str, Any]:
    points = m.merge(curve)
    inside = (points.x > points.x[0]) & (points.x < points.x[-1])

    def fit_and_predict(train: NDArray[np.bool_]) -> Floats:
        knots = points.x[train]
        return m.curve_at(knots, m.fit_curve(m.Curve(knots, points.us[train]), knots), points.x)

    return _summary(m.held_out(len(points.x), inside, fit_and_predict), points.us)


def _surface_error(surface: m.Surface, rows: Floats, columns: Floats) -> dict[str, Any]:
    inside = (surface.x > surface.x.min()) & (surface.x < surface.x.max())
    inside &= (surface.y > surface.y.min()) & (surface.y < surface.y.max())

    def fit_and_predict(train: NDArray[np.bool_]) -> Floats:
        known = m.Surface(surface.x[train], surface.y[train], surface.us[train])
        return m.surface_at(rows, columns, m.fit_surface(known, rows, columns), surface.x, surface.y)

    return _summary(m.held_out(len(surface.us), inside, fit_and_predict), surface.us)


def _shared_error(mixed: m.Mixed, prefill_us: Callable[[Floats, Floats], Floats]) -> dict[str, Any]:
    prefill = prefill_us(mixed.chunk, m.mean_context(mixed.chunk, mixed.prefix))

    def fit_and_predict(train: NDArray[np.bool_]) -> Floats:
        return m.shared_at(m.fit_shared(mixed[train], prefill_us), mixed, prefill)

    return _summary(m.held_out(len(mixed.us), np.ones(len(mixed.us), dtype=bool), fit_and_predict), mixed.us)


def _summary(predicted: Floats, measured: Floats) -> dict[str, Any]:
    seen = ~np.isnan(predicted)
    error = np.abs(predicted[seen] / measured[seen] - 1.0)
    return {
        "median": float(f"{np.median(error):.3g}"),
        "p95": float(f"{np.quantile(error, 0.95):.3g}"),
        "points": int(seen.sum()),
    }


def _met(error: Mapping[str, Any]) -> bool:
    return bool(error["median"] < TARGET_MEDIAN and error["p95"] < TARGET_P95)


def _round(values: Floats) -> list[Any]:
    """Return values to five significant digits, nested as the array is."""
    if values.ndim > 1:
        return [_round(row) for row in values]
    return [float(f"{value:.5g}") for value in values]


def _plain(values: Floats) -> list[float]:
    return [int(value) if float(value).is_integer() else float(value) for value in values]


def write(content: dict[str, Any], path: Path) -> None:
    """Write a calibration file, one table row a line, so that a diff can be read; whole or not at all."""
    lines = json.dumps(content, indent=1, ensure_ascii=False)
    text = _compact(lines)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def _compact(text: str) -> str:
    """Return JSON with every list of plain numbers on one line."""
    out: list[str] = []
    numbers: list[str] | None = None
    for line in text.splitlines():
        stripped = line.strip()
        if numbers is not None:
            if stripped in ("]", "],"):
                out[-1] += ",".join(numbers) + stripped
                numbers = None
            elif stripped[0] in "-0123456789":
                numbers.append(stripped.rstrip(","))
            else:
                out.append(line)
                numbers = None
        else:
            out.append(line)
            if stripped.endswith("["):
                numbers = []
    return "\n".join(out)


def table_of(contents: Sequence[dict[str, Any]]) -> Table:
    """Return the held-out errors of calibrations as one table."""
    table = Table(title=f"Held-out error of each term (target: median < {TARGET_MEDIAN:.0%}, P95 < {TARGET_P95:.0%})")
    for column in ("calibration", "term"):
        table.add_column(column)
    for column in ("median", "P95", "points"):
        table.add_column(column, justify="right")
    table.add_column("target")
    for content in contents:
        for term, error in content["errors"].items():
            verdict = "met" if _met(error) else f"missed: {error['note']}"
            table.add_row(
                content["name"], term, f"{error['median']:.2%}", f"{error['p95']:.1%}", str(error["points"]), verdict
            )
    return table


def _gpu(name: str) -> Gpu:
    path = REPOSITORY / "conf" / "gpu" / f"{name}.yaml"
    gpu: Gpu = instantiate(OmegaConf.load(path))
    return gpu


SAMPLER = "llmservingsim/RTX4090/Llama-3.1-8B/bf16/tp1"
SAMPLER_NOTE = (
    "The sampler was not measured here: it is vLLM's on RTX 4090 (casys-kaist/LLMServingSim), its slope over sequences "
    "scaled by the vocabulary"
)
CACHE_NOTE = (
    f"Decode attention is never faster than its KV at {m.ACHIEVED:.0%} of the data-sheet bandwidth: the profiler's "
    "repeated calls found their KV in the L2 cache, which a served model would not"
)
HEAD_NOTE = (
    "The LM head was not measured: it is the gate-and-up product scaled by output columns. Against LLMServingSim's "
    "measured heads that rule has a median error of 1.5 % on RTX 4090, 5.4 % on RTX PRO 6000, 22 % at the worst count"
)
SUM_NOTE = (
    "An iteration with prompts and decodes adds the two attention kernels' times. No mixed batch was measured on this "
    "stack, so that rule is unvalidated here"
)


def _llmservingsim(name: str, device: str, gpu: str, notes: tuple[str, ...], why: dict[str, str]) -> Target:
    return Target(
        name=name,
        model="llama3.1_8b",
        device=device,
        kind="measured",
        stack="vLLM 0.19, eager, bf16, one attention kernel for prompts and decodes",
        sources=(LLMSERVINGSIM | {"path": f"profiler/perf/{gpu}/meta-llama/Llama-3.1-8B/bf16/tp1"},),
        read=lambda folder: m.read_llmservingsim(folder / f"llmservingsim/{gpu}/Llama-3.1-8B/bf16/tp1"),
        notes=notes,
        why=why,
    )


WAVES = "matrix products step up at tile boundaries; a line between the neighbours of a held-out step cuts its corner"
SPARSE = (
    "the sweep doubles along each axis: a held-out point leaves a gap of four, across steps of tiles or the L2 cache"
)
SWITCH = (
    "the kernel is switched inside the sweep, and longer chunks then take less time; a rising surface cannot follow"
)
SPLITS = "the sweep doubles along each axis, and the number of KV splits steps within a held-out gap of four"
COARSE = f"only 21 to 73 counts were measured; {WAVES}"
TINY = "microseconds an iteration; the embedding's kernel is switched at 16 to 20 tokens, and no rising curve follows"


AICONFIGURATOR = {
    "repository": "ai-dynamo/aiconfigurator",
    "commit": "095f58a51c4ca8e61b66ec108d86f223f8d559ce",
    "licence": "Apache-2.0",
}
VIDUR = {
    "repository": "microsoft/vidur",
    "commit": "7d47513363ec447a741ac5e47241580b47724fbf",
    "licence": "MIT",
}


def _composed(model: str, gpu: str, device: str, folder: str, stack: str, name: str = "") -> Target:
    return Target(
        name=name or f"{model}_{gpu.split('_')[0]}",
        model=model,
        device=gpu,
        kind="composed",
        stack=stack,
        sources=(
            AICONFIGURATOR
            | {"path": f"aic-core/src/aiconfigurator_core/systems/data/{device}/{{gemm,attention}}/{folder}"},
            LLMSERVINGSIM | {"path": "profiler/perf/RTX4090/meta-llama/Llama-3.1-8B/bf16/tp1/per_sequence (sampler)"},
        ),
        read=lambda root: m.compose(
            _kernels(root, device, folder), load_model(model), _gpu(gpu), m.read_sampler(root / SAMPLER)
        ),
        check=lambda root: _shape_errors(_kernels(root, device, folder), load_model(model), root),
        notes=(
            "Composed of kernels, not measured as a layer: products of n * k that are not in the files are "
            "interpolated (term product_shape: the error of such a line at shapes that are in them); norms, rotary "
            f"embedding and activation are priced by their bytes at {m.ACHIEVED:.0%} of the data-sheet bandwidth, "
            f"{m.LAUNCH_US:.0f} us at least each",
            "Prefill attention was measured over batches of prompts without a prefix; a chunk on a prefix continues "
            "that surface along the mean context. llama2_7b_a100_trtllm states how far that is from chunks on a prefix "
            "that another stack measured (terms prefix_small_chunks, up to 256 tokens, and prefix_large_chunks)",
            SUM_NOTE,
            SAMPLER_NOTE,
            CACHE_NOTE,
            "8 and 4 bits are weight-only kernels (int8_wo, int4_wo); activations stay in bf16"
            if "trtllm" in folder
            else "The files hold bf16 and fp8 (W8A8) products only: no weight-only kernel, so neither 8 nor 4 bits",
            *(
                (
                    "The files lack decode attention of 32 KV heads: it is that of 8 at four times the batch (term "
                    "decode_heads: how far that is from 32 measured heads on A100)",
                )
                if model == "llama2_7b" and "vllm" in folder
                else ()
            ),
        ),
        why={
            **{f"{kind}_linear_{bits}": COARSE for kind in ("mha", "ffn") for bits in (16, 8, 4)},
            "head": COARSE,
            "prefill_attention": SPARSE,
            "decode_attention": SPLITS,
            "product_shape_16": "shapes differ in how they fill the last wave of tiles",
            "product_shape_8": "shapes differ in how they fill the last wave of tiles",
            "product_shape_4": "shapes differ in how they fill the last wave of tiles",
            "prefix_small_chunks": "the files have no prefix: few tokens on a long one cost up to twice too much",
            "prefix_large_chunks": "the files have no prefix, and the measured stack is another (FlashInfer)",
            "decode_heads": "another kernel layout: fewer heads at more sequences",
        },
    )


@lru_cache(maxsize=2)
def _kernels(root: Path, device: str, folder: str) -> m.Kernels:
    return m.Kernels(root / "aiconfigurator" / device / folder.replace("/", "-"))


def _shape_errors(kernels: m.Kernels, model: ModelSpec, root: Path) -> dict[str, Any]:
    """Return the error of interpolating products in n * k, at measured shapes near the model's, each left out."""
    errors = {}
    for bits, dtype in m.DTYPES.items():
        if not (kernels.gemm["gemm_dtype"] == dtype).any():
            continue
        predicted, measured = [], []
        for size in (6144, 8192, 10240, 12288, 16384):
            for n, k in ((size, model.hidden_size), (model.hidden_size, size)):
                curve, line = kernels.product(dtype, n, k), kernels.product(dtype, n, k, leave_out=True)
                common = np.intersect1d(curve.x, line.x)
                measured.append(curve.us[np.isin(curve.x, common)])
                predicted.append(line.us[np.isin(line.x, common)])
        errors[f"product_shape_{bits}"] = _summary(np.concatenate(predicted), np.concatenate(measured))
    if model.num_kv_heads == 32 and kernels.folder.parent.name == "a100_sxm":
        # Llama-2-7B's chunks on a prefix were measured too, by another stack (FlashInfer) on the A800.
        chunks = TARGETS["llama2_7b_a100"].read(root).prefill
        beyond = chunks.y > m.mean_context(chunks.x, np.zeros(len(chunks.x)))
        surface = kernels.prefill(model.num_heads, model.num_kv_heads)
        rows, columns = _knots(surface.x), _knots(surface.y, whole=False, per_octave=4.0)
        predicted_us = m.surface_at(rows, columns, m.fit_surface(surface, rows, columns), chunks.x, chunks.y)
        for name, some in (("small", chunks.x <= 256), ("large", chunks.x > 256)):
            errors[f"prefix_{name}_chunks"] = _summary(predicted_us[beyond & some], chunks.us[beyond & some])
    if model.num_kv_heads == 32 and "vllm" in kernels.folder.name:
        a100 = _kernels(root, "a100_sxm", "trtllm/1.0.0")
        by_heads, measured_heads = m.spread_heads(a100.decode(8, 8), 4), a100.decode(32, 32)
        known = {(x, y): us for x, y, us in zip(by_heads.x, by_heads.y, by_heads.us, strict=True)}
        pairs = [
            (known[x, y], us)
            for x, y, us in zip(measured_heads.x, measured_heads.y, measured_heads.us, strict=True)
            if (x, y) in known
        ]
        errors["decode_heads"] = _summary(np.array([p for p, _ in pairs]), np.array([us for _, us in pairs]))
    return errors


def derive(name: str, content: dict[str, Any], device: str) -> dict[str, Any]:
    """Return a calibration for another device by data-sheet ratios: an estimate that nobody has measured.

    Every entry grows by the ratio of bandwidths where it lies nearer the bandwidth's bound, by that of dense fp16
    operations where nearer that one: for the linear terms and the head by tokens, for prefill attention by operations,
    for decode attention by bandwidth. Overheads of launches are thereby scaled too, on the slow side.
    """
    source, gpu = _gpu(content["device"]), _gpu(device)
    by_bandwidth = source.memory_bandwidth_bytes_per_s / gpu.memory_bandwidth_bytes_per_s
    by_compute = source.dense_fp16_flop_per_s / gpu.dense_fp16_flop_per_s
    # A product with weights of 2 bytes is bound by compute from about this many tokens on.
    ridge = source.dense_fp16_flop_per_s / source.memory_bandwidth_bytes_per_s

    def scaled(us: list[float], counts: list[float], turn: float) -> list[float]:
        share = np.clip(np.asarray(counts) / turn, 0.0, 1.0)
        return _round(np.asarray(us) * (by_bandwidth + share * (by_compute - by_bandwidth)))

    tables = content["tables"]
    derived = dict(tables)
    derived["linear_us"] = {
        bits: {kind: scaled(us, tables["tokens"], ridge * int(bits) / 16) for kind, us in kinds.items()}
        for bits, kinds in tables["linear_us"].items()
    }
    derived["token_us"] = _round(np.asarray(tables["token_us"]) * by_bandwidth)
    derived["head_us"] = scaled(tables["head_us"], tables["sequences"], ridge)
    for key, ratio in (("prefill_attention", by_compute), ("decode_attention", by_bandwidth)):
        derived[key] = tables[key] | {"us": _round(np.asarray(tables[key]["us"]) * ratio)}
    return content | {
        "name": name,
        "device": device,
        "kind": "derived",
        "notes": [
            f"DERIVED, not measured: {content['name']} ({content['device']}) times {by_bandwidth:.3f} where bandwidth "
            f"binds and {by_compute:.3f} where compute does, the ratios of the data sheets in conf/gpu. The errors "
            "stated are those of the calibration it is derived from; how far the derivation itself is off is unknown",
            *content["notes"],
        ],
        "tables": derived,
    }


TRTLLM, VLLM = "TensorRT-LLM 1.0.0 kernels, bf16", "vLLM 0.24.0 kernels, bf16 (FlashAttention 3)"
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _llmservingsim(
            "llama3.1_8b_rtx4090", "rtx4090_24gb", "RTX4090", (), {"token": TINY, "prefill_attention": SPARSE}
        ),
        _llmservingsim(
            "llama3.1_8b_rtx_pro_6000",
            "rtx_pro_6000_96gb",
            "RTXPRO6000",
            (),
            {"token": TINY, "shared_attention": "a denser sweep beside the powers of two is all held out"},
        ),
        Target(
            name="llama3.1_8b_a6000",
            model="llama3.1_8b",
            device="a6000_48gb",
            kind="measured",
            stack="LLMServingSim v0 layer profile, FlashAttention, eager",
            sources=(LLMSERVINGSIM | {"path": "profiler/v0/perf_models/A6000/meta-llama/Llama-3.1-8B/tp1"},),
            read=lambda root: m.read_llmservingsim_v0(
                root / "llmservingsim/v0/A6000/Llama-3.1-8B/tp1",
                load_model("llama3.1_8b"),
                _gpu("a6000_48gb"),
                m.read_sampler(root / SAMPLER),
            ),
            notes=(
                "Decode attention: 88 % of the published rows are faster than memory allows (up to 55e12 bytes/s on a "
                "device of 0.768e12), as if all sequences shared their KV. Those rows are raised to KV bytes at "
                f"{m.ACHIEVED:.0%} of the data-sheet bandwidth, so that this term is mostly the data sheet's and its "
                "held-out error says little",
                "Prefill attention without prefix is the layer profile's, a prefix adds what it adds in the attention "
                "sweep; the two files differ by up to 45 % without prefix",
                SUM_NOTE,
                SAMPLER_NOTE,
            ),
            why={
                "token": TINY,
                "mha_linear_16": WAVES,
                "ffn_linear_16": WAVES,
                "head": WAVES,
                "prefill_attention": "the layer profile and the attention sweep disagree where they are joined",
                "decode_attention": "rows of one sequence ran without split-KV, slower than rows of two",
            },
        ),
        Target(
            name="llama2_7b_a100",
            model="llama2_7b",
            device="a100_80gb",
            kind="measured",
            stack="Vidur's profiler (linear, A100) and Frontier's with FlashInfer (attention, A800), fp16",
            sources=(
                VIDUR | {"path": "data/profiling/compute/a100/meta-llama/Llama-2-7b-hf/mlp.csv"},
                {
                    "repository": "NetX-lab/Frontier",
                    "commit": "a4b22df8211864bf229258ecdfbe680f048f2d77",
                    "licence": "MIT",
                    "path": "data/profiling/compute/a800/meta-llama/Llama-2-7b-hf/attention.csv",
                },
                LLMSERVINGSIM
                | {"path": "profiler/perf/RTX4090/meta-llama/Llama-3.1-8B/bf16/tp1/per_sequence (sampler)"},
            ),
            read=lambda root: m.read_vidur(
                root / "vidur/compute/a100/meta-llama/Llama-2-7b-hf/mlp.csv.gz",
                root / "frontier/compute/a800/meta-llama/Llama-2-7b-hf/attention.csv.gz",
                load_model("llama2_7b"),
                _gpu("a100_80gb"),
                m.read_sampler(root / SAMPLER),
            ),
            notes=(HEAD_NOTE, SUM_NOTE, SAMPLER_NOTE, CACHE_NOTE),
            why={
                "token": WAVES,
                "prefill_attention": SWITCH,
                "mha_linear_16": WAVES,
                "ffn_linear_16": WAVES,
                "head": WAVES,
            },
        ),
        Target(
            name="qwen2_7b_a30",
            model="qwen2_7b",
            device="a30_24gb",
            kind="measured",
            stack="Vidur's profiler, FlashAttention or FlashInfer as published, fp16",
            sources=(
                {
                    "repository": "AKafakA/vidur_opt_scheduler",
                    "commit": "20bdc49d6c1d23de84c9d4e7a8626ea33fe498f4",
                    "licence": "MIT",
                    "path": "data/profiling/compute/a30/Qwen/Qwen-2-7B/{mlp,attention}.csv",
                },
                LLMSERVINGSIM
                | {"path": "profiler/perf/RTX4090/meta-llama/Llama-3.1-8B/bf16/tp1/per_sequence (sampler)"},
            ),
            read=lambda root: m.read_vidur(
                root / "vidur_opt_scheduler/compute/a30/Qwen/Qwen-2-7B/mlp.csv.gz",
                root / "vidur_opt_scheduler/compute/a30/Qwen/Qwen-2-7B/attention.csv.gz",
                load_model("qwen2_7b"),
                _gpu("a30_24gb"),
                m.read_sampler(root / SAMPLER),
            ),
            notes=(
                HEAD_NOTE,
                "Empty cells, and rows of attn_pre_proj of about 2 us, faster than the device's peak, are left out",
                SUM_NOTE,
                SAMPLER_NOTE,
                CACHE_NOTE,
            ),
            why={
                "token": WAVES,
                "prefill_attention": SWITCH,
                "mha_linear_16": WAVES,
                "ffn_linear_16": WAVES,
                "head": WAVES,
            },
        ),
        _composed("llama2_7b", "a100_80gb", "a100_sxm", "trtllm/1.0.0", TRTLLM, "llama2_7b_a100_trtllm"),
        _composed("llama3.1_8b", "a100_80gb", "a100_sxm", "trtllm/1.0.0", TRTLLM),
        _composed("llama2_7b", "l40s_48gb", "l40s", "trtllm/1.0.0", TRTLLM),
        _composed("llama3.1_8b", "l40s_48gb", "l40s", "trtllm/1.0.0", TRTLLM),
        _composed("llama3_8b", "l40s_48gb", "l40s", "trtllm/1.0.0", TRTLLM),
        _composed("llama2_7b", "h100_80gb", "h100_sxm", "vllm/0.24.0", VLLM),
        _composed("llama3.1_8b", "h100_80gb", "h100_sxm", "vllm/0.24.0", VLLM),
        _composed("llama2_7b", "h200_141gb", "h200_sxm", "vllm/0.24.0", VLLM),
        _composed("llama3.1_8b", "h200_141gb", "h200_sxm", "vllm/0.24.0", VLLM),
    )
}
DERIVED = {
    "llama2_7b_l4": ("llama2_7b_l40s", "l4_24gb"),
    "llama3_8b_l4": ("llama3_8b_l40s", "l4_24gb"),
    "llama3.1_8b_l4": ("llama3.1_8b_l40s", "l4_24gb"),
}


FIXED_DEVICE = "rtx4090_24gb"


def fixed_overhead(folder: Path) -> Fixed:
    """Return the host overhead of an iteration: what a real run's decode iterations took above their kernels.

    The run is LLMServingSim's reference of vLLM 0.19 with Llama-3.1-8B on an RTX 4090; only its first 60 s are used, so
    that the rest can judge the simulator.
    """
    run = "llmservingsim_e2e/RTX4090/Llama-3.1-8B"
    seconds = m.read_steady_decode(folder / run, kv_tokens=2588 * 16, block_tokens=16, before_s=60.0)
    target = TARGETS["llama3.1_8b_rtx4090"]
    terms = target.read(folder)
    kinds = terms.linear[16]
    grid = (_knots(terms.decode.x), _knots(terms.decode.y))
    decode = m.fit_surface(terms.decode, *grid)
    above = []
    for batch, context_sum, iteration_us in seconds.itertuples(index=False):
        linear = sum(float(np.interp(batch, *_points(kinds[kind]))) for kind in ("mha", "ffn"))
        attention = float(m.surface_at(*grid, decode, np.array([batch]), np.array([context_sum / batch]))[0])
        once = float(np.interp(batch, *_points(terms.head))) + float(np.interp(batch, *_points(terms.token)))
        above.append(iteration_us - once - 32 * (linear + attention))
    us = round(max(0.0, float(np.median(above))), 1)
    spread = f"{min(above):.0f} to {max(above):.0f}"
    return Fixed(
        us=us,
        source=(
            f"median over {len(above)} seconds of pure decode (first 60 s only) of measured iteration less kernels: "
            f"casys-kaist/LLMServingSim bench/examples/RTX4090/Llama-3.1-8B/vllm at {LLMSERVINGSIM['commit'][:12]}, "
            f"vLLM 0.19 with asynchronous scheduling; single seconds lie {spread} us above the kernels"
        ),
    )


def _points(curve: m.Curve) -> tuple[Floats, Floats]:
    points = m.merge(curve)
    return points.x, points.us


@dataclass(slots=True)
class Arguments:
    """What the command takes as key=value."""

    source: str = "measurements"
    target: str = "all"
    data: str = "calibration"
    out: str = str(CALIBRATIONS)
    model: str = "smollm2_135m"
    device: str = "cpu_epyc_1thread"
    checkpoint: str = ""
    clock: str = "cpu"
    threads: str = "1"
    seconds: str = "480"
    seed: str = "0"
    only: str = "all"


def parse(words: Sequence[str]) -> Arguments:
    """Return the arguments; an unknown key is an error that names the nearest one."""
    arguments = Arguments()
    allowed = list(Arguments.__dataclass_fields__)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise ConfigError(f"argument {word!r} is not of the form key=value; {nearest(key, allowed)}")
        if key not in allowed:
            raise ConfigError(f"unknown argument {key!r}; {nearest(key, allowed)}")
        setattr(arguments, key, value)
    return arguments


def from_measurements(arguments: Arguments) -> list[dict[str, Any]]:
    """Fit and write every target asked for; return their contents."""
    folder, out = find_data(arguments.data), Path(arguments.out)
    known = [*TARGETS, *DERIVED]
    names = known if arguments.target == "all" else arguments.target.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f"no target {name!r}; {nearest(name, [*known, 'all'])}")
    if not folder.is_dir():
        raise CalibrationError(
            f"no folder of measurements at {folder}; set RAP_LAB_DATA to the folder that holds calibration/, "
            "or give data=FOLDER"
        )
    out.mkdir(parents=True, exist_ok=True)
    contents, fixed = [], fixed_overhead(folder)
    for name in names:
        if name in DERIVED:
            base, device = DERIVED[name]
            content = derive(name, calibrate(TARGETS[base], folder, fixed), device)
        else:
            content = calibrate(TARGETS[name], folder, fixed)
        write(content, out / f"{name}.json")
        contents.append(content)
    return contents


def from_device(arguments: Arguments) -> list[dict[str, Any]]:
    """Measure this device, fit and write; return the one content."""
    import torch  # source=measurements needs none

    from hw.calibrate import device as d
    from hw.calibrate.plan_changes import Changes
    from hw.elastic.checkpoint import load_checkpoint
    from hw.elastic.model import ElasticModel
    from hw.engine.clock import CLOCKS

    model, gpu, out = load_model(arguments.model), _gpu(arguments.device), Path(arguments.out)
    if arguments.clock not in CLOCKS:
        raise ConfigError(f"unknown clock {arguments.clock!r}; {nearest(arguments.clock, CLOCKS)}")
    if arguments.only not in ONLY:
        raise ConfigError(f"unknown only={arguments.only!r}; {nearest(arguments.only, ONLY)}")
    name = f"{model.name}_{gpu.name}"
    if arguments.only == "changes" and not (out / f"{name}.json").is_file():
        raise ConfigError(f"only=changes adds to {out / f'{name}.json'}, which is not there; measure all first")
    try:
        seconds, seed, threads = float(arguments.seconds), int(arguments.seed), int(arguments.threads)
    except ValueError as error:
        raise ConfigError(f"seconds, seed and threads must be numbers: {error}") from error
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    dtype = "float32" if model.weight_dtype_bytes == 4 else "bfloat16"
    place = "cpu" if gpu.name.startswith("cpu") else "cuda"
    loaded, _ = load_checkpoint(arguments.checkpoint or arguments.model, dtype=dtype, device=place)
    elastic = ElasticModel(loaded, name=model.name)
    if arguments.only == "changes":
        content = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        content["device_run"] |= Changes(d.Bench(elastic, arguments.clock)).measure(seed)
        write(content, out / f"{name}.json")
        return [content]
    settings = d.DeviceSettings(model=model.name, device=gpu.name, clock=arguments.clock, seconds=seconds, seed=seed)
    # Not beside the calibrations: every JSON there is one.
    samples = d.Samples(
        REPOSITORY / "runs" / "calibrate" / f"{name}.json", {**asdict(settings), "dtype": dtype, "threads": threads}
    )
    out.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    bench = d.Bench(elastic, settings.clock)
    runs = d.measure(bench, samples, settings, Console(stderr=True))
    terms = d.terms_of(samples)
    target = Target(
        name=name,
        model=model.name,
        device=gpu.name,
        kind="measured",
        stack=f"hw.engine.hw_engine: PyTorch {torch.__version__}, {dtype}, paged attention by scaled_dot_product_attention, "
        f"{threads} thread(s), {settings.clock} seconds",
        sources=({"path": "python -m hw.calibrate source=device", "commit": commit()},),
        read=lambda _: terms,
        notes=(
            "Weights of 8 and 4 bits are unpacked for every product: memory is saved, time is not",
            "Prompt chunks and decodes of one iteration are separate calls of attention, and their times add",
        ),
    )
    content = calibrate(target, out, Fixed(us=0.0, source=""))
    for term in content["errors"].values():
        if term.get("note") == "no reason known":
            term["note"] = "single cells of a coarse grid: products switch kernels between few and many tokens"
    line = d.line_over_terms(runs, content)
    content = d.times(content, line.factor, line.prefill_attention_factor)
    content["fixed_us"] = round(line.fixed_s * 1e6, 1)
    content["fixed_source"] = (
        f"{sum(len(run.shapes) for run in runs)} iterations of {len(runs)} runs of hw.engine between the measurements "
        f"take this long and {line.factor:.3f} times what their terms take one by one, for the attention of prompts "
        f"{line.prefill_attention_factor:.3f} times (soft L1; off by {line.off:.1%} in the median); the tables hold "
        "the terms times that"
    )
    held_out = d.run_engine(elastic, settings.clock, seed + 100, 25.0, 2.0)
    priced_s = held_out.priced_s(d.latency_of(content))
    content["errors"]["iteration"] = _summary(priced_s, held_out.measured_s) | {
        "note": f"iterations of a run of the engine, of which nothing was fitted; their sum is off by "
        f"{priced_s.sum() / held_out.measured_s.sum() - 1:+.1%}, the machine's changes of speed included"
    }
    counts = [len(values) for values in samples.of.values()]
    spreads = sorted(d.spread(values) for values in samples.of.values())
    content["device_run"] = {
        "seconds": round(time.monotonic() - started_s),
        "clock": settings.clock,
        "cells": len(counts),
        "samples": sum(counts),
        "repeats": [min(counts), max(counts)],
        "standard_error_of_medians_p50_p95": [float(f"{np.quantile(spreads, q):.2g}") for q in (0.5, 0.95)],
        "memory_bandwidth_bytes_per_s": float(f"{d.memory_bandwidth_bytes_per_s(elastic.device):.3g}"),
        **Changes(bench).measure(seed),
    }
    write(content, out / f"{name}.json")
    d.plot(
        out / f"{name}.png", terms, d.latency_of(content), held_out, f"{model.name} on {gpu.name}, {content['date']}"
    )
    return [content]


ONLY = ("all", "changes")
SOURCES: dict[str, Callable[[Arguments], list[dict[str, Any]]]] = {
    "measurements": from_measurements,
    "device": from_device,
}


def main(words: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    if any(word in ("-h", "--help") for word in words):
        print(__doc__)
        print(f"targets: {', '.join([*TARGETS, *DERIVED])}")
        return 0
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        arguments = parse(words)
        if arguments.source not in SOURCES:
            raise ConfigError(f"unknown source {arguments.source!r}; {nearest(arguments.source, SOURCES)}")
        contents = SOURCES[arguments.source](arguments)
    except RapLabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(table_of(contents))
    for content in contents:
        console.print(f"wrote {Path(arguments.out) / content['name']}.json")
    return 0
