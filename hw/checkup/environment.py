"""Step: what the machine is, and how fast it copies, multiplies and attends, without any code of the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hw.checkup import machine
from hw.checkup.findings import Findings
from hw.checkup.setup import Setup
from hw.elastic.checkpoint import pick_device
from hw.elastic.device import Accelerator, Device, device_of

LEAST_H2D_BYTES_PER_S = 20e9
REPEATS = 7
WARM_UPS = 3
PRODUCT = {"gpu": 8192, "cpu": 1024, "short": 256}
"""Rows and columns of the matrices that are multiplied."""
ATTENTION = {"gpu": (8, 2048), "cpu": (1, 256), "short": (1, 64)}
"""Sequences and tokens of the attention that is timed."""


def run(setup: Setup, findings: Findings) -> None:
    """Describe the machine, and time what everything else is made of."""
    findings.figure("nvidia_smi", machine.nvidia_smi())
    findings.figure("optional_packages", {name: v for name, v in machine.versions().items() if "flash" in name})
    hardware = device_of(pick_device(setup.device))
    findings.figure("memory_bandwidth_bytes_per_s", bandwidth(hardware, setup.amounts.copied_bytes))
    if isinstance(hardware, Accelerator):
        rate = host_to_device(hardware, setup.amounts.copied_bytes)
        findings.figure("pinned_host_to_device_bytes_per_s", rate)
        findings.figure("pinned_device_to_host_bytes_per_s", device_to_host(hardware, setup.amounts.copied_bytes))
        findings.check(
            "copies from pinned memory, bytes/s",
            rate > LEAST_H2D_BYTES_PER_S,
            rate,
            f"above {LEAST_H2D_BYTES_PER_S:.0e}",
        )
        findings.figure("launch_us", launch_us(hardware))
    findings.figure("product_flop_per_s", product(hardware, PRODUCT[setup.size]))
    kernels = attention_kernels(hardware, *ATTENTION[setup.size])
    findings.figure("attention", kernels)
    works = [name for name, found in kernels.items() if "ms" in found]
    findings.check("kernels of PyTorch's attention that run", bool(works), ", ".join(works), "one at least")


def seconds_of(hardware: Device, work: Callable[[], object]) -> float:
    """Return the seconds of a piece of work that keeps the device busy: the median of several, after warming up."""
    found = []
    for repeat in range(WARM_UPS + REPEATS):
        hardware.synchronize()
        start_s = time.perf_counter()
        work()
        hardware.synchronize()
        if repeat >= WARM_UPS:
            found.append(time.perf_counter() - start_s)
    return float(np.median(found))


def bandwidth(hardware: Device, size: int) -> float:
    """Return the bytes per second of a copy inside the device's memory, reads and writes counted."""
    source = torch.ones(size, dtype=torch.uint8, device=hardware.place)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(hardware, lambda: target.copy_(source))


def host_to_device(hardware: Accelerator, size: int) -> float:
    """Return the bytes per second of a copy from pinned memory, as the engine's weights are copied."""
    source = hardware.pinned(size).fill_(1)

    def copy() -> None:
        tensors, event = hardware.copy_in([source])
        hardware.join(event, tensors)

    return size / seconds_of(hardware, copy)


def device_to_host(hardware: Accelerator, size: int) -> float:
    """Return the bytes per second of a copy into pinned memory."""
    target = hardware.pinned(size)
    source = torch.ones(size, dtype=torch.uint8, device=hardware.place)
    return size / seconds_of(hardware, lambda: target.copy_(source, non_blocking=True))


def launch_us(hardware: Device, count: int = 1000) -> float:
    """Return the microseconds that the host needs to start one small operation."""
    small = torch.ones(8, device=hardware.place)

    def start() -> None:
        for _ in range(count):
            small.add_(1.0)

    return seconds_of(hardware, start) / count * 1e6


def product(hardware: Device, size: int) -> float:
    """Return the operations per second of a BF16 matrix product."""
    matrix = torch.randn(size, size, device=hardware.place).to(torch.bfloat16)
    return 2.0 * size**3 / seconds_of(hardware, lambda: matrix @ matrix)


def attention_kernels(hardware: Device, sequences: int, tokens: int) -> dict[str, dict[str, Any]]:
    """Return the milliseconds of each kernel of PyTorch's causal attention, or why it does not run."""
    shape = (sequences, 32, tokens, 128)
    query, key, value = (torch.randn(shape, device=hardware.place).to(torch.bfloat16) for _ in range(3))
    found: dict[str, dict[str, Any]] = {}
    for name, backend in SDPBackend.__members__.items():
        if name in ("ERROR", "OVERRIDEABLE"):
            continue
        try:
            with sdpa_kernel(backend):
                seconds = seconds_of(hardware, lambda: scaled_dot_product_attention(query, key, value, is_causal=True))
            found[name] = {"ms": seconds * 1e3}
        except RuntimeError as error:
            found[name] = {"error": str(error).splitlines()[0]}
    return found
