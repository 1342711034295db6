"""Compiles every kernel for NVIDIA GPUs that are not here, as a first iteration on them would, and reads the result.

    python -m tests.hw.elastic.compile_kernels            # for compute capability 9.0 (H100, H200)
    python -m tests.hw.elastic.compile_kernels 80 120     # for 8.0 (A100) and 12.0 (RTX 50)
    python -m tests.hw.elastic.compile_kernels few 90     # only one variant of each kernel

It prints the shared memory, registers and stack (where spilled registers go) of each variant, and how many instructions
of its PTX go to the matrix units or load 16 bytes at once; then how many variants batches of all sizes need. Triton
brings NVIDIA's assembler, so neither a GPU nor a driver is needed. This finds code that only the interpreter accepts,
tiles that do not fit the memory of a GPU, and kernels that a growing context compiles again.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget

from hw.elastic import ops
from hw.elastic.kernels import attention, elementwise, quantized
from hw.elastic.quantize import QuantWeight

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Most shared memory of a program: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""


class Driver:
    """Just enough of a driver of Triton to compile."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """What one variant of a kernel takes."""

    case: str
    kernel: str
    capability: int
    shared_bytes: int
    registers: int
    stack_bytes: int
    matrix_instructions: int
    wide_loads: int
    seconds: float


def compiled(case: str, run: Callable[[], Any], capability: int) -> list[Compiled]:
    """Compile the kernels that ``run`` starts on meta tensors."""
    found: list[Compiled] = []

    def build(
        kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
    ) -> None:
        start = time.perf_counter()
        done = kernel.warmup(*arguments, **constants, grid=grid, num_warps=num_warps, num_stages=num_stages)
        took = time.perf_counter() - start
        ptx = done.asm["ptx"]
        log = resources(done.asm["cubin"])
        found.append(
            Compiled(
                case,
                kernel.__name__,
                capability,
                done.metadata.shared,
                log[0],
                log[1],
                len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)", ptx)),
                len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared\.global \[.*?\], \[.*?\], 0x10", ptx)),
                took,
            )
        )

    with launching(build, capability):
        run()
    return found


@contextmanager
def launching(start: Callable[..., None], capability: int) -> Iterator[None]:
    """Call ``start`` in place of starting a kernel on a GPU of this capability."""
    triton.runtime.driver.set_active(Driver(capability))
    with ExitStack() as patches:
        for module in (attention, elementwise, quantized):
            patches.enter_context(patch.object(module, "launch", start))
        yield


MOST_VARIANTS = 8
"""How many variants of a kernel the batches of one model may compile."""


def variants(capability: int) -> dict[str, int]:
    """Return how many variants of each kernel batches of all sizes and contexts of Llama-3.1-8B compile."""
    found: dict[str, set[str]] = {}

    def note(
        kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
    ) -> None:
        bind = kernel.device_caches[capability][-1]
        _, *key = bind(*arguments, **constants, num_warps=num_warps, num_stages=num_stages)
        found.setdefault(kernel.__name__, set()).add(str(key))

    heads, kv_heads, d, e = 32, 8, 128, 4096
    kv = meta(1000, 2, 16, kv_heads, d)
    with launching(note, capability):
        for n in (1, 2, 3, 8, 17, 64, 256):
            counts, starts = meta(n, dtype=torch.int32), meta(n + 1, dtype=torch.int32)
            for width in (1, 2, 4, 7, 16, 64, 100, 512):
                table = meta(n, width, dtype=torch.int32)
                ops.paged_decode(meta(n, heads, d), kv, table, counts, counts, counts, scale=0.1)
                for rows in (1, 3, 17, 64, 300, 2048):
                    ops.paged_prefill(meta(rows, heads, d), kv, table, starts, counts, scale=0.1)
            product, turn = meta(n, (heads + 2 * kv_heads) * d), meta(n, d)
            slots = meta(n, dtype=torch.int64)
            ops.rope_and_store(product, turn, turn, kv, slots, heads=heads, kv_heads=kv_heads)
            x = meta(n, e)
            ops.add_rms_norm(x, x, x[0], 1e-5)
            ops.gated(x, "silu")
            ops.quantized_linear(x, meta_weight(e, e, 4))
    return {name: len(keys) for name, keys in found.items()}


def resources(cubin: bytes) -> tuple[int, int]:
    """Return registers of a thread and bytes of its stack, where spilled registers go, as cuobjdump reads them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert match, text
    return int(match[1]), int(match[2])


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention_cases(heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Decode and prefill of a shape, with and without windows."""
    name = f"{heads}/{kv_heads} x {d} {str(dtype)[6:]}"
    kv = meta(1000, 2, 16, kv_heads, d, dtype=dtype)
    whole = meta(300, (heads + 2 * kv_heads) * d, dtype=dtype)
    query = whole[:, : heads * d].view(300, heads, d)
    table, counts = meta(8, 512, dtype=torch.int32), meta(9, dtype=torch.int32)
    for window in (0, 4096):
        yield (
            f"decode {name}{' window' if window else ''}",
            lambda window=window: ops.paged_decode(
                query[:8], kv, table, counts[:8], counts[:8], counts[:8], scale=0.1, window=window
            ),
        )
        for rows in (300, 16):
            yield (
                f"prefill of {rows} {name}{' window' if window else ''}",
                lambda window=window, rows=rows: ops.paged_prefill(
                    query[:rows], kv, table, counts, counts[:8], scale=0.1, window=window
                ),
            )
    cos, norm = meta(300, d, dtype=dtype), meta(d, dtype=dtype)
    slots = meta(300, dtype=torch.int64)
    for norms in (None, norm):
        yield (
            f"rope {name}{' norms' if norms is not None else ''}",
            lambda norms=norms: ops.rope_and_store(
                whole, cos, cos, kv, slots, heads=heads, kv_heads=kv_heads, q_norm=norms, k_norm=norms, eps=1e-5
            ),
        )


def meta_weight(o: int, i: int, bits: int) -> QuantWeight:
    """Return a quantized weight without values."""
    groups = -(-i // 128)
    packed = meta(-(-o * i * bits // 8), dtype=torch.int8 if bits == 8 else torch.uint8)
    zeros = meta(0 if bits == 8 else -(-o * groups // 2), dtype=torch.uint8)
    return QuantWeight(bits, o, i, packed, meta(o, groups, dtype=torch.float16), zeros)


def linear_cases(o: int, i: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Products at both precisions and all sizes of tiles."""
    for bits in (8, 4):
        weight = meta_weight(o, i, bits)
        for n in (1, 8, 32, 64, 300):
            yield (
                f"W{bits} {o} x {i} of {n} rows {str(dtype)[6:]}",
                lambda weight=weight, n=n: ops.quantized_linear(meta(n, i, dtype=dtype), weight),
            )


def norm_cases(e: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Norms and activations of rows of e."""
    x = meta(8, e)
    for offset in (0.0, 1.0):
        yield f"add and norm {e} {offset}", lambda offset=offset: ops.add_rms_norm(x, x, x[0], 1e-5, offset)
    yield f"norm {e}", lambda: ops.rms_norm(x, x[0], 1e-5)
    for activation in ops.ACTIVATIONS:
        yield f"{activation} {e}", lambda activation=activation: ops.gated(x, activation)


def few_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """One variant of each kernel and of each form that it takes."""
    for name, run in attention_cases(32, 8, 128, torch.bfloat16):
        if name.endswith(("window", "norms")):
            yield name, run
    yield next(attention_cases(32, 32, 128, torch.float16))
    yield from (case for case in linear_cases(4096, 4096, torch.bfloat16) if re.search("of (1|8|300) rows", case[0]))
    yield from norm_cases(4096)


def all_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Many shapes: Llama, Qwen2.5, SmolLM2, Gemma 3, a head_dim that is no power of two; odd weights; FP32."""
    half, single = torch.bfloat16, torch.float32
    for heads, kv_heads, d in ((32, 8, 128), (32, 32, 128), (28, 4, 128), (9, 3, 64), (4, 1, 256), (32, 8, 80)):
        yield from attention_cases(heads, kv_heads, d, half)
    yield from attention_cases(9, 3, 64, single)
    yield from attention_cases(32, 8, 128, single)
    yield from attention_cases(32, 32, 128, torch.float16)
    yield from linear_cases(4096, 4096, half)
    yield from linear_cases(4096, 11008, torch.float16)
    yield from linear_cases(65, 257, half)
    yield from linear_cases(64, 256, single)
    yield from norm_cases(4096)
    yield from norm_cases(576)


def main(arguments: list[str]) -> int:
    """Print a table; return 1 if something does not compile or fit."""
    cases = few_cases if "few" in arguments else all_cases
    capabilities = [int(one) for one in arguments if one != "few"] or [90]
    bad = 0
    for capability in capabilities:
        print(f"compute capability {capability / 10:.1f}")
        print(f"{'case':44} {'kernel':24} {'shared':>8} {'regs':>5} {'stack':>6} {'mma':>4} {'wide':>4} {'s':>5}")
        for case, run in cases():
            try:
                done = compiled(case, run, capability)
            except Exception as error:
                bad += 1
                print(f"{case:44} {type(error).__name__}: {error}")
                continue
            for one in done:
                fits = one.shared_bytes <= SHARED_BYTES[capability]
                bad += not fits
                print(
                    f"{one.case:44} {one.kernel:24} {one.shared_bytes:8,} {one.registers:5} {one.stack_bytes:6} "
                    f"{one.matrix_instructions:4} {one.wide_loads:4} {one.seconds:5.1f}{'' if fits else '  TOO MUCH'}",
                    flush=True,
                )
        for name, number in variants(capability).items():
            print(
                f"{name}: {number} variants for batches of all sizes{'' if number <= MOST_VARIANTS else '  TOO MANY'}"
            )
            bad += number > MOST_VARIANTS
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
