"""Names the processor that runs the model, so that a run and a calibration can be compared."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")


def processor_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with its architecture."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return cpu_name()


def cpu_name(info: Path = CPU_INFO) -> str:
    """Return the name of this machine's CPU; its architecture alone where the system states no name."""
    try:
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    stated = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return stated or platform.processor() or platform.machine()
