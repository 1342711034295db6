"""The configuration of a replay: its keys, their types and their meaning. Hydra checks a command's keys by it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore


@dataclass(kw_only=True)
class ReplayConfig:
    """One replay. Each group is a folder of conf/; its YAML names what it builds and the values.

    tick_s: seconds between two decisions of the policy, which are also the moments at which the budget may change.
    latency: a file of conf/calibration by name, or a path; null takes the calibration of this model on this GPU.
    quality_table: a file of conf/quality by name, which says what the plans that a request ran under cost in quality;
        null takes the one of this model, where there is one.
    workspace_bytes: activations, CUDA graphs and the like: the part of the budget that neither weights nor KV can use.
        The default is what vLLM 0.19 took on a real RTX 4090 with Llama-3.1-8B: 0.9 x 25.25 GB - 16.06 GB of weights
        - 5.43 GB of KV blocks (casys-kaist/LLMServingSim, meta.json).
    fixed_s: overhead of an iteration, in place of the calibration's; null keeps that.
    host_floor_s: least time of an iteration, in place of the calibration's (0 where it states none): that of a server
        whose host launches operations one by one, without CUDA graphs; null keeps the calibration's.
    nested_overhead: how much longer products at the bits of the checkpoint take, as a share, where weights are stored
        so that half of their bits can be read (``Plan.compute_bits``); NestedFP's abstract has 0.039.
    slowdown: an iteration takes this times as long as the calibration says: how much slower your machine is (above 1)
        than the one that was measured.
    label, tags: free text, to find a run again.
    iterations: also write iterations.parquet. plot: also write replay.png.
    """

    trace: Any
    workload: Any
    model: Any
    gpu: Any
    engine: Any
    budget: Any
    policy: Any
    slo: Any
    latency: str | None = None
    quality_table: str | None = None
    fixed_s: float | None = None
    host_floor_s: float | None = None
    nested_overhead: float = 0.0
    slowdown: float = 1.0
    workspace_bytes: float = 1.24e9
    tick_s: float = 1.0
    seed: int = 0
    iterations: bool = False
    plot: bool = False
    label: str = ""
    tags: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class SweepConfig(ReplayConfig):
    """A replay, or many: over several seeds and several windows of the trace.

    seeds: one replay each; ``seed`` alone when empty.
    windows, window_s: one replay for each of these windows of ``window_s`` seconds, counted from 0, after all steps of
        the workload; the full trace when empty.
    workers: processes; the records are the same for any number.
    executor: what runs the replays: processes of this machine, or a Ray cluster.
    max_rate: whether to measure the maximum rate in addition, by one more replay with all requests at once; null does
        so for a single replay of a fixed plan.
    frontend: what lies between clients and the engine's queue, for client-side figures; none by default.
    """

    seeds: list[int] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    window_s: float | None = None
    workers: int = 1
    executor: Any = None
    frontend: Any = None
    max_rate: bool | None = None


ConfigStore.instance().store(name="replay_schema", node=SweepConfig)
