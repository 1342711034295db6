"""Data-sheet values of a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from sim.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One device according to its data sheet; measured speeds are in conf/calibration.

    memory_bytes, memory_bandwidth_bytes_per_s: of the device memory.
    dense_fp16_flop_per_s: without sparsity.
    host_to_device_bytes_per_s: of the host link, in one direction.
    """

    name: str
    memory_bytes: float
    memory_bandwidth_bytes_per_s: float
    dense_fp16_flop_per_s: float
    host_to_device_bytes_per_s: float

    def __post_init__(self) -> None:
        for field in (
            "memory_bytes",
            "memory_bandwidth_bytes_per_s",
            "dense_fp16_flop_per_s",
            "host_to_device_bytes_per_s",
        ):
            if not getattr(self, field) > 0:
                raise ConfigError(f"gpu {self.name!r}: {field} is {getattr(self, field)}; it must be above 0")
