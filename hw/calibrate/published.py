"""Calibrations from published measurements: the files each one is fitted on, and notes on its errors.

``TARGETS`` are fitted on measurements, ``DERIVED`` are scaled from a target by data-sheet ratios.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hw.calibrate import measurements as m
from hw.calibrate import rtx3090
from hw.calibrate.calibration import Fixed, Target, calibrate, error_summary, knots_of, rounded
from hw.calibrate.writing import write_calibration
from sim.config import build_option
from sim.cost.gpu import Gpu
from sim.cost.model_spec import ModelSpec, load_model
from sim.errors import CalibrationError, ConfigError, nearest
from sim.types import Floats

LLMSERVINGSIM = {
    "repository": "casys-kaist/LLMServingSim",
    "commit": "5daddb21a545658d5150b535712d0494584b5278",
    "licence": "MIT",
}


def gpu_named(name: str) -> Gpu:
    """Return the data sheet of ``conf/gpu/NAME.yaml``."""
    gpu: Gpu = build_option("gpu", name)
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
ALGORITHMS = (
    "only powers of two were measured: a held-out point leaves a gap of four, some of them across the change from "
    "vLLM's kernel to NCCL"
)
VIDUR_MODELS = {"llama2_7b": "meta-llama/Llama-2-7b-hf", "llama3.1_8b": "meta-llama/Meta-Llama-3-8B"}
"""Models whose blocks Vidur measured at several degrees, by their folder; Llama-3.1-8B has the shape of Llama-3-8B."""
ALLREDUCE_FILE = "custom_allreduce_perf.csv.gz"
NCCL_BYTES = 8 << 20
"""From this size on all-reduces are compared with NCCL's of another machine."""
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


def _composed(model: str, gpu: str, device: str, folder: str, stack: str, name: str = "", *, tp: int = 1) -> Target:
    divided = _divided(device) if tp > 1 else _ALONE
    return Target(
        name=(name or f"{model}_{gpu.split('_')[0]}") + (f"_tp{tp}" if tp > 1 else ""),
        model=model,
        device=gpu,
        tp=tp,
        kind="composed",
        stack=stack,
        sources=(
            AICONFIGURATOR
            | {"path": f"aic-core/src/aiconfigurator_core/systems/data/{device}/{{gemm,attention}}/{folder}"},
            *divided.sources,
            LLMSERVINGSIM | {"path": "profiler/perf/RTX4090/meta-llama/Llama-3.1-8B/bf16/tp1/per_sequence (sampler)"},
        ),
        read=lambda root: composed_terms(root, load_model(model), replace(gpu_named(gpu), tp=tp), device, folder),
        check=lambda root: _shape_errors(_kernels(root, device, folder), load_model(model), root, tp),
        notes=(
            "Composed of kernels, not measured as a layer: products of n * k that are not in the files are "
            "interpolated (term product_shape: the error of such a line at shapes that are in them); norms, rotary "
            f"embedding and activation are priced by their bytes at {m.ACHIEVED:.0%} of the data-sheet bandwidth, "
            f"{m.LAUNCH_US:.0f} us at least each",
            "Prefill attention was measured over batches of prompts without a prefix; a chunk on a prefix continues "
            "that surface along the mean context. llama2_7b_a100_trtllm states how far that is from chunks on a prefix "
            "that another stack measured (terms prefix_small_chunks, up to 256 tokens, and prefix_large_chunks)",
            *divided.notes,
            SUM_NOTE,
            SAMPLER_NOTE,
            CACHE_NOTE,
            "8 and 4 bits are weight-only kernels (int8_wo, int4_wo); activations stay in bf16"
            if "trtllm" in folder
            else "8 bits are products with weights and activations in fp8 (W8A8); each product's input is rounded by "
            "an operation of its own, priced by its bytes. The files hold no weight-only kernel, so no 4 bits",
            *(
                (
                    "The files lack decode attention of 32 KV heads: it is that of 8 at four times the batch (term "
                    "decode_heads: how far that is from 32 measured heads on A100)",
                )
                if model == "llama2_7b" and "vllm" in folder
                else ()
            ),
            *(
                (
                    "The files lack attention of 64 heads over 8 KV heads: it is that of 32 over 4 at twice the rows "
                    "(terms decode_heads and prefill_heads: how far 32 measured heads are from 16 at twice the rows)",
                )
                if tp == 1 and load_model(model).num_heads == 64
                else ()
            ),
        ),
        why={
            "allreduce": ALGORITHMS,
            "allreduce_nccl": "another library version and machine; without a CUDA graph",
            "mha_block": "kernels of another library (PyTorch's, fp16), each timed alone",
            "ffn_block": "kernels of another library (PyTorch's, fp16), each timed alone",
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
            "prefill_heads": "another kernel layout: fewer heads at more tokens",
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Divided:
    """What a calibration states of the division of its model among several GPUs."""

    sources: tuple[dict[str, str], ...] = ()
    notes: tuple[str, ...] = ()


_ALONE = _Divided()


def _divided(device: str) -> _Divided:
    """Return what is stated of the all-reduces of a device."""
    path = f"aic-core/src/aiconfigurator_core/systems/data/{device}/comm/{_allreduce_folder(device)}"
    return _Divided(
        sources=(AICONFIGURATOR | {"path": f"{path}/custom_allreduce_perf (in a CUDA graph)"},),
        notes=(
            "Times of one GPU. An all-reduce of the hidden states ends every block, as vLLM launches it in a CUDA "
            "graph: its own kernel for small ones, NCCL for large ones. It does not overlap with products",
            "Logits are gathered over all GPUs, which is priced as an all-reduce of half their size. The host overhead "
            "of an iteration was measured on one GPU; what several processes add to it is unknown",
        ),
    )


def _allreduce_folder(device: str) -> str:
    return "vllm-0.24.0" if device.startswith("h") else "vllm-0.14.0"


def composed_terms(root: Path, model: ModelSpec, gpu: Gpu, device: str, folder: str) -> m.Terms:
    """Return a model's terms composed of kernels that aiconfigurator publishes.

    Args:
        root: the folder of measurements. model: all of it, which ``gpu.tp`` GPUs divide among them.
        device, folder: which of its systems, and which of its frameworks.
    """
    allreduce = None
    if gpu.tp > 1:
        files = root / "aiconfigurator" / device / _allreduce_folder(device)
        allreduce = m.read_allreduce(files / ALLREDUCE_FILE, gpu.tp)
    return m.compose(_kernels(root, device, folder), model, gpu, m.read_sampler(root / SAMPLER), allreduce)


@lru_cache(maxsize=2)
def _kernels(root: Path, device: str, folder: str) -> m.Kernels:
    return m.Kernels(root / "aiconfigurator" / device / folder.replace("/", "-"))


def _shape_errors(kernels: m.Kernels, model: ModelSpec, root: Path, tp: int) -> dict[str, Any]:
    """Return the errors of what is composed rather than measured.

    Of interpolated matrix products, at measured shapes near the model's, each left out in turn; of attention with other
    heads; and of all-reduces next to another measurement.
    """
    errors: dict[str, Any] = {}
    sizes = sorted(set(kernels.gemm["n"]) & {size // tp for size in (6144, 8192, 10240, 12288, 16384)})
    for bits, dtype in kernels.dtypes().items():
        predicted, measured = [], []
        for size in sizes:
            for n, k in ((size, model.hidden_size), (model.hidden_size, size)):
                curve, line = kernels.product(dtype, n, k), kernels.product(dtype, n, k, leave_out=True)
                common = np.intersect1d(curve.x, line.x)
                measured.append(curve.us[np.isin(curve.x, common)])
                predicted.append(line.us[np.isin(line.x, common)])
        errors[f"product_shape_{bits}"] = error_summary(np.concatenate(predicted), np.concatenate(measured))
    if tp > 1:
        device = kernels.folder.parent.name
        return errors | _nccl_error(device, root, tp) | _block_errors(device, kernels.folder.name, model, root, tp)
    if model.num_heads == 64:
        for name, read in (("decode", kernels.decode), ("prefill", kernels.prefill)):
            errors[f"{name}_heads"] = _same_points(m.spread_heads(read(16, 2), 2), read(32, 4))
    if model.num_kv_heads == 32 and kernels.folder.parent.name == "a100_sxm":
        # Llama-2-7B's chunks on a prefix were measured too, by another stack (FlashInfer) on the A800.
        chunks = TARGETS["llama2_7b_a100"].read(root).prefill
        beyond = chunks.y > m.mean_context(chunks.x, np.zeros(len(chunks.x)))
        surface = kernels.prefill(model.num_heads, model.num_kv_heads)
        rows, columns = knots_of(surface.x), knots_of(surface.y, measured=False, per_octave=4.0)
        predicted_us = m.surface_at(rows, columns, m.fit_surface(surface, rows, columns), chunks.x, chunks.y)
        for name, some in (("small", chunks.x <= 256), ("large", chunks.x > 256)):
            errors[f"prefix_{name}_chunks"] = error_summary(predicted_us[beyond & some], chunks.us[beyond & some])
    if model.num_kv_heads == 32 and "vllm" in kernels.folder.name:
        a100 = _kernels(root, "a100_sxm", "trtllm/1.0.0")
        errors["decode_heads"] = _same_points(m.spread_heads(a100.decode(8, 8), 4), a100.decode(32, 32))
    return errors


def _same_points(predicted: m.Surface, measured: m.Surface) -> dict[str, Any]:
    """Return the error of a surface at the points of another that it has too."""
    known = {(x, y): us for x, y, us in zip(predicted.x, predicted.y, predicted.us, strict=True)}
    pairs = [(known[x, y], us) for x, y, us in zip(measured.x, measured.y, measured.us, strict=True) if (x, y) in known]
    return error_summary(np.array([p for p, _ in pairs]), np.array([us for _, us in pairs]))


def _block_errors(device: str, folder: str, model: ModelSpec, root: Path, tp: int) -> dict[str, Any]:
    """Return how far blocks of one GPU's share are from those that Vidur measured, where it measured the model."""
    path = root / "vidur/compute" / device.split("_")[0] / VIDUR_MODELS.get(model.name, "none") / "mlp.csv.gz"
    if not path.is_file():
        return {}
    gpu = replace(next(gpu_named(name) for name, system, *_ in (A100, H100) if system == device), tp=tp)
    composed = composed_terms(root, model, gpu, device, folder).linear[16]
    errors = {}
    for kind, measured in m.read_vidur_blocks(path, model, gpu).items():
        inside = (measured.x >= composed[kind].x[0]) & (measured.x <= composed[kind].x[-1])
        at = measured.x[inside]
        errors[f"{kind}_block"] = error_summary(
            m.curve_at(composed[kind].x, composed[kind].us, at), measured.us[inside]
        )
    return errors


def _nccl_error(device: str, root: Path, tp: int) -> dict[str, Any]:
    """Return how far all-reduces of 8 MB and more are from Vidur's of NCCL on a DGX, where it measured the device."""
    path = root / f"vidur/network/{device.split('_')[0]}_dgx/all_reduce.csv.gz"
    if not path.is_file():
        return {}
    names = ("num_workers", "devices_per_node", "size", "time_stats.all_reduce.median")
    table = m.read_table(path, names)
    one_node = table[(table["num_workers"] == tp) & (table["devices_per_node"] == tp) & (table["size"] >= NCCL_BYTES)]
    measured = one_node.groupby("size")[names[-1]].median() * 1e3
    ours = m.read_allreduce(root / "aiconfigurator" / device / _allreduce_folder(device) / ALLREDUCE_FILE, tp)
    elements = measured.index.to_numpy(dtype=np.float64) / 2
    return {"allreduce_nccl": error_summary(m.curve_at(ours.x, ours.us, elements), measured.to_numpy(dtype=np.float64))}


def derive(name: str, content: dict[str, Any], device: str) -> dict[str, Any]:
    """Return a calibration for another device by data-sheet ratios: an estimate without a measurement.

    Times bound by memory scale with the ratio of bandwidths, times bound by compute with the ratio of dense fp16
    operations per second. Linear terms and the head move from the first to the second as tokens grow; prefill attention
    scales with compute, decode attention with bandwidth. Launch overheads scale too, which errs on the slow side.
    """
    source, gpu = gpu_named(content["device"]), gpu_named(device)
    by_bandwidth = source.memory_bandwidth_bytes_per_s / gpu.memory_bandwidth_bytes_per_s
    by_compute = source.dense_fp16_flop_per_s / gpu.dense_fp16_flop_per_s
    # A product with weights of 2 bytes is bound by compute from about this many tokens on.
    ridge = source.dense_fp16_flop_per_s / source.memory_bandwidth_bytes_per_s

    def scaled(us: list[float], counts: list[float], turn: float) -> list[float]:
        share = np.clip(np.asarray(counts) / turn, 0.0, 1.0)
        return rounded(np.asarray(us) * (by_bandwidth + share * (by_compute - by_bandwidth)))

    tables = content["tables"]
    derived = {key: table for key, table in tables.items() if key != "fp8_linear"}  # one data sheet has it, one not
    derived["linear_us"] = {
        bits: {kind: scaled(us, tables["tokens"], ridge * int(bits) / 16) for kind, us in kinds.items()}
        for bits, kinds in tables["linear_us"].items()
    }
    derived["token_us"] = rounded(np.asarray(tables["token_us"]) * by_bandwidth)
    derived["head_us"] = scaled(tables["head_us"], tables["sequences"], ridge)
    for key, ratio in (("prefill_attention", by_compute), ("decode_attention", by_bandwidth)):
        derived[key] = tables[key] | {"us": rounded(np.asarray(tables[key]["us"]) * ratio)}
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


A100 = ("a100_80gb", "a100_sxm", "trtllm/1.0.0", "TensorRT-LLM 1.0.0 kernels, bf16")
L40S = ("l40s_48gb", "l40s", *A100[2:])
H100 = ("h100_80gb", "h100_sxm", "vllm/0.24.0", "vLLM 0.24.0 kernels, bf16 (FlashAttention 3)")
H200 = ("h200_141gb", "h200_sxm", *H100[2:])
DIVIDED: dict[str, list[tuple[tuple[str, str, str, str], tuple[int, ...]]]] = {
    "llama2_7b": [(A100, (2, 4, 8)), (H100, (2, 4, 8))],
    "llama3.1_8b": [(A100, (2, 4, 8)), (L40S, (2, 4, 8)), (H100, (2, 4, 8))],
    "codellama_34b": [(A100, (1, 2, 4, 8)), (H100, (1, 2, 4, 8))],
    "qwen3_32b": [(A100, (1, 2, 4, 8)), (H100, (1, 2, 4, 8))],
    "llama2_70b": [(A100, (2, 4, 8)), (H100, (2, 4, 8))],
    "llama3.1_70b": [(A100, (2, 4, 8)), (L40S, (4, 8)), (H100, (2, 4, 8)), (H200, (2, 4, 8))],
    "qwen2.5_72b": [(A100, (2, 4, 8)), (H100, (2, 4, 8))],
}
"""Models that one or several GPUs hold: the devices, and of how many."""
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
            {"token": TINY, "shared_attention": "a denser sweep next to the powers of two is all held out"},
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
                gpu_named("a6000_48gb"),
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
                gpu_named("a100_80gb"),
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
                gpu_named("a30_24gb"),
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
        *(
            _composed(model, *device, tp=tp)
            for model, devices in DIVIDED.items()
            for device, degrees in devices
            for tp in degrees
        ),
    )
}
DERIVED = {
    "llama2_7b_l4": ("llama2_7b_l40s", "l4_24gb"),
    "llama3_8b_l4": ("llama3_8b_l40s", "l4_24gb"),
    "llama3.1_8b_l4": ("llama3.1_8b_l40s", "l4_24gb"),
}


SIMULATED = {rtx3090.NAME: rtx3090.calibrated}
"""Fitted by simulating measured runs: name -> what returns the calibration, from the folder of measurements."""


def fixed_overhead(folder: Path) -> Fixed:
    """Return the host overhead of an iteration: the time of a real run's decode iterations minus their kernels.

    The run is LLMServingSim's reference of vLLM 0.19 with Llama-3.1-8B on an RTX 4090. Only its first 60 s are used, so
    that the rest can test the simulator.
    """
    run = "llmservingsim_e2e/RTX4090/Llama-3.1-8B"
    seconds = m.read_steady_decode(folder / run, kv_tokens=2588 * 16, block_tokens=16, before_s=60.0)
    target = TARGETS["llama3.1_8b_rtx4090"]
    terms = target.read(folder)
    kinds = terms.linear[16]
    grid = (knots_of(terms.decode.x), knots_of(terms.decode.y))
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


def from_measurements(names: Sequence[str], folder: Path, out: Path) -> list[dict[str, Any]]:
    """Fit and write calibrations; return their contents.

    Args:
        names: of TARGETS, DERIVED and SIMULATED; all when empty.
        folder: measurements. out: where to write one JSON file each.
    Raises:
        ConfigError: for an unknown target, with the nearest name. CalibrationError: without measurements.
    """
    known = [*TARGETS, *DERIVED, *SIMULATED]
    for name in names:
        if name not in known:
            raise ConfigError(f"no target {name!r}; {nearest(name, [*known, 'all'])}")
    if not folder.is_dir():
        raise CalibrationError(
            f"no folder of measurements at {folder}; set RAP_LAB_DATA to the folder that holds calibration/, "
            "or give data=FOLDER"
        )
    contents = []
    fixed = fixed_overhead(folder) if set(names or known) - set(SIMULATED) else Fixed(us=0.0, source="")
    for name in names or known:
        if name in SIMULATED:
            contents.append(SIMULATED[name](folder))
            write_calibration(contents[-1], out / f"{name}.json")
            continue
        if name in DERIVED:
            base, device = DERIVED[name]
            content = derive(name, calibrate(TARGETS[base], folder, fixed), device)
        else:
            content = calibrate(TARGETS[name], folder, fixed)
        write_calibration(content, out / f"{name}.json")
        contents.append(content)
    return contents
