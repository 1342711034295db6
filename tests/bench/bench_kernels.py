"""Time of every Triton kernel on this GPU beside the time that its bytes or its arithmetic need at least.

python tests/bench/bench_kernels.py [MODEL ...]     # llama2_7b llama3.1_8b

A row gives the median time of a kernel, the bytes that it has to move, their share of the bandwidth of a large copy on
this GPU, and the time of the plain PyTorch form, or of the dense product for quantized weights. Prefill is bound by
arithmetic: its share is of the rate of a large BF16 product.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from hw.elastic import ops
from hw.elastic.processor import processor_name
from hw.elastic.quantize import quantize
from sim.cost.model_spec import ModelSpec, load_model

BLOCK_TOKENS = 16
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One kernel on one shape. bound: bytes that it moves, or floating-point operations if ``arithmetic``."""

    name: str
    run: Callable[[], Any]
    plain: Callable[[], Any]
    bound: float
    arithmetic: bool = False


def normal(*shape: int) -> torch.Tensor:
    """Random BF16 values on the GPU."""
    return torch.randn(shape, dtype=DTYPE, device="cuda")


def ints(values: list[int]) -> torch.Tensor:
    """An int32 tensor on the GPU."""
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def attention_cases(model: ModelSpec) -> Iterator[Case]:
    """Decode of several batches and contexts, and prefill with and without a prefix."""
    heads, kv_heads, d = model.num_heads, model.num_kv_heads, model.head_dim
    scale = d**-0.5
    for requests, context in ((1, 1024), (1, 8192), (8, 1024), (64, 1024), (64, 300), (256, 512)):
        width = -(-context // BLOCK_TOKENS)
        kv = normal(requests * width, 2, BLOCK_TOKENS, kv_heads, d)
        table = torch.randperm(requests * width, device="cuda").to(torch.int32).view(requests, width)
        query = normal(requests, heads, d)
        none = ints([0] * requests)
        arguments = query, kv, table, ints([context] * requests), none, none
        yield Case(
            f"decode of {requests} x {context}",
            lambda arguments=arguments: ops.paged_decode(*arguments, scale=scale),
            lambda arguments=arguments: ops.paged_decode_reference(*arguments, scale=scale),
            2 * 2 * requests * context * kv_heads * d,
        )
    for rows, prefix in ((512, 0), (2048, 0), (512, 4096), (2048, 6144)):
        total = rows + prefix
        width = -(-total // BLOCK_TOKENS)
        kv = normal(width, 2, BLOCK_TOKENS, kv_heads, d)
        table = torch.randperm(width, device="cuda").to(torch.int32)[None]
        arguments = normal(rows, heads, d), kv, table, ints([0, rows]), ints([prefix])
        yield Case(
            f"prefill of {rows} behind {prefix}",
            lambda arguments=arguments: ops.paged_prefill(*arguments, scale=scale),
            lambda arguments=arguments: ops.paged_prefill_reference(*arguments, scale=scale),
            4 * heads * d * (rows * prefix + rows * (rows + 1) // 2),
            arithmetic=True,
        )


def linear_cases(model: ModelSpec) -> Iterator[Case]:
    """The largest products of a layer, at 8 and 4 bits."""
    e, f = model.hidden_size, model.intermediate_size
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    for name, o, i in (("qkv", qkv, e), ("gate and up", 2 * f, e), ("down", e, f)):
        dense = normal(o, i) * i**-0.5
        for bits in (8, 4):
            weight = quantize(dense, bits)
            for n in (1, 8, 32, 64, 256):
                x = normal(n, i)
                yield Case(
                    f"W{bits} {name} of {n} rows",
                    lambda x=x, weight=weight: ops.quantized_linear(x, weight),
                    lambda x=x, dense=dense: functional.linear(x, dense),
                    weight.nbytes + 2 * n * (i + o),
                )


def elementwise_cases(model: ModelSpec) -> Iterator[Case]:
    """Norms, the gated activation, rotation and storing."""
    e, f, heads, kv_heads, d = (
        model.hidden_size,
        model.intermediate_size,
        model.num_heads,
        model.num_kv_heads,
        model.head_dim,
    )
    for n in (8, 2048):
        x, residual, weight, both = normal(n, e), normal(n, e), normal(e), normal(n, 2 * f)
        yield Case(
            f"add and norm of {n} rows",
            lambda x=x, residual=residual, weight=weight: ops.add_rms_norm(x, residual, weight, 1e-5),
            lambda x=x, residual=residual, weight=weight: ops.add_rms_norm_reference(x, residual, weight, 1e-5),
            2 * 4 * n * e,
        )
        yield Case(
            f"gated activation of {n} rows",
            lambda both=both: ops.gated(both, "silu"),
            lambda both=both: ops.gated_reference(both, "silu"),
            2 * 3 * n * f,
        )
        kv, slots = normal(n, 2, BLOCK_TOKENS, kv_heads, d), torch.randperm(n * BLOCK_TOKENS, device="cuda")[:n]
        arguments = normal(n, (heads + 2 * kv_heads) * d), normal(n, d), normal(n, d), kv, slots
        yield Case(
            f"rotate and store of {n} rows",
            lambda arguments=arguments: ops.rope_and_store(*arguments, heads=heads, kv_heads=kv_heads),
            lambda arguments=arguments: ops.rope_and_store_reference(*arguments, heads=heads, kv_heads=kv_heads),
            2 * n * d * (2 * heads + 5 * kv_heads + 2),
        )


def seconds(run: Callable[[], Any]) -> float:
    """Return the median time of one run, the caches cold."""
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median")) / 1e3


def ceilings() -> tuple[float, float]:
    """Return the bytes per second of a large copy, read and written, and the rate of a large BF16 product."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    square = normal(8192, 8192)
    copy, product = seconds(lambda: target.copy_(source)), seconds(lambda: square @ square)
    return 2 * source.nbytes / copy, 2 * 8192**3 / product


def main(names: list[str]) -> int:
    """Print one table a model."""
    if not torch.cuda.is_available() or not ops.have_triton():
        print("nothing measured: the kernels need a CUDA device and triton, and this machine lacks one of them")
        return 0
    torch.manual_seed(0)
    bandwidth, rate = ceilings()
    print(f"{processor_name(torch.device('cuda'))}: a copy moves {bandwidth / 1e9:,.0f} GB/s, ", end="")
    print(f"a BF16 product runs at {rate / 1e12:,.0f} TFLOP/s")
    for name in names:
        model = load_model(name)
        print(f"\n{name:34} {'us':>9} {'GB/s, TFLOP/s':>14} {'of bound':>9} {'PyTorch us':>11}")
        for cases in (attention_cases, linear_cases, elementwise_cases):
            for case in cases(model):
                took, plain = seconds(case.run), seconds(case.plain)
                limit, unit = (rate, 1e12) if case.arithmetic else (bandwidth, 1e9)
                speed = case.bound / took
                print(
                    f"{case.name:34} {took * 1e6:9.1f} {speed / unit:14,.0f} {speed / limit:9.1%} {plain * 1e6:11.1f}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["llama2_7b", "llama3.1_8b"]))
