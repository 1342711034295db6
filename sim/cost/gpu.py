"""Data-sheet values of a GPU, and how many of them serve a model together."""

from __future__ import annotations

from dataclasses import dataclass

from sim.errors import ConfigError

TP_DEGREES = (1, 2, 4, 8)
"""Degrees of tensor parallelism: GPUs that one model is divided among."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One device according to its data sheet; measured speeds are in conf/calibration.

    memory_bytes, memory_bandwidth_bytes_per_s: of the device memory.
    dense_fp16_flop_per_s: without sparsity.
    host_to_device_bytes_per_s: of the host link, in one direction.
    tp: devices that one model is divided among (tensor parallelism, arXiv 1909.08053, section 3). Every other value,
        and all bytes of a simulation, are those of one of them: each holds the same share of weights and KV, and
        copies it over its own link (``sim.cost.model_spec.ModelSpec.shard``).
    """

    name: str
    memory_bytes: float
    memory_bandwidth_bytes_per_s: float
    dense_fp16_flop_per_s: float
    host_to_device_bytes_per_s: float
    tp: int = 1

    @property
    def title(self) -> str:
        """How the devices are named in tables, such as `4 x a100_80gb`."""
        return self.name if self.tp == 1 else f"{self.tp} x {self.name}"

    def __post_init__(self) -> None:
        for field in (
            "memory_bytes",
            "memory_bandwidth_bytes_per_s",
            "dense_fp16_flop_per_s",
            "host_to_device_bytes_per_s",
        ):
            if not getattr(self, field) > 0:
                raise ConfigError(f"gpu {self.name!r}: {field} is {getattr(self, field)}; it must be above 0")
        if isinstance(self.tp, bool) or self.tp not in TP_DEGREES:
            raise ConfigError(
                f"gpu {self.name!r}: tp is {self.tp!r}; the GPUs among which a model is divided must be one of "
                f"{', '.join(map(str, TP_DEGREES))}; set gpu.tp=1 for a single one"
            )
