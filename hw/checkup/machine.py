"""Describes the machine that a check-up ran on: device, driver, versions. Nothing here fails: a gap says why."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "flashinfer-python",
    "flash-attn",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "numba",
    "simpy",
    "hydra-core",
    "omegaconf",
    "pydantic",
    "starlette",
    "uvicorn",
    "httpx",
    "pytest",
    "hypothesis",
)
ASKED = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,temperature.gpu,power.draw"
LONGEST_S = 10.0


def nvidia_smi() -> str | None:
    """Return what nvidia-smi says of the GPUs, a line each; None without it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed: {error}"
    return (done.stdout or done.stderr).strip()


def versions() -> dict[str, str]:
    """Return the version of every package that matters, and of Python."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def host() -> dict[str, Any]:
    """Return what the host has: processor, cores, memory, and how much of it a process may lock."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "memory_bytes": _memory_bytes("MemTotal"),
        "memory_available_bytes": _memory_bytes("MemAvailable"),
        "lockable_bytes": {"soft": soft, "hard": hard},
    }


def _memory_bytes(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def device(name: str) -> dict[str, Any]:
    """Return what torch says of a device."""
    import torch

    from hw.elastic.processor import cpu_name

    found: dict[str, Any] = {"place": name, "torch": torch.__version__, "processor": cpu_name()}
    if name == "cpu":
        return found | {"name": found["processor"]}
    shown = torch.cuda.get_device_properties(torch.device(name))
    free, total = torch.cuda.mem_get_info(torch.device(name))
    return found | {
        "name": shown.name,
        "capability": f"{shown.major}.{shown.minor}",
        "multiprocessors": shown.multi_processor_count,
        "memory_bytes": total,
        "free_bytes": free,
        "l2_bytes": getattr(shown, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "devices": torch.cuda.device_count(),
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF"),
    }


def best_device() -> str:
    """Return cuda if torch finds a GPU, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":  # in a process of its own: the check-up itself runs without torch
    wanted = json.load(sys.stdin)
    print(json.dumps(device(best_device() if wanted == "auto" else wanted)))
