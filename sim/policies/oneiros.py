"""``oneiros``: layers whose weights are streamed from host memory while KV is short (Oneiros, arXiv 2507.11507).

Nothing is lost, and the memory of streamed layers becomes KV cache; but an iteration cannot be shorter than the copies
of all streamed layers. So two rules decide together: pressure asks for layers, and computing allows them.

1. Pressure on the KV cache and the queue chooses a step, as in ``sim.policies.pressure``.
2. No step is chosen whose copies take longer than ``most_stretch`` times the computing of an iteration over the decodes
   that run now. At 1 copies hide behind computing, and a slow link streams nothing.

A budget that cannot hold the weights overrules both. Steps are nested, so a higher one copies no layer back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sim.cost.memory import layer_weight_bytes, weight_bytes
from sim.cost.plan import Plan, dense_plan, is_positive, layer_list
from sim.cost.streaming import LEAST_STREAMED, nested_layers
from sim.engine.protocol import EngineState
from sim.engine.transition import peak_weight_bytes
from sim.errors import ConfigError
from sim.policies.base import PolicyContext
from sim.policies.pressure import REST_LEVELS, AdaptivePrecision, check_pressure


@dataclass(slots=True)
class Oneiros:
    """Runs ``plans[level]``, which stream more and more layers.

    pressure: asks for a level. link_s: seconds in which the layers of each level cross the link.
    weights_bytes: of every level, with the workspace. peaks: [from][to], the most bytes of weights during a change.
    compute_s: seconds of computing of an iteration over the decodes that run at a state.
    most_stretch: copies may take at most this times as long.
    """

    plans: tuple[Plan, ...]
    pressure: AdaptivePrecision
    link_s: tuple[float, ...]
    weights_bytes: tuple[int, ...]
    peaks: tuple[tuple[int, ...], ...]
    compute_s: Callable[[EngineState], float]
    most_stretch: float
    level: int

    @property
    def first_plan(self) -> Plan:
        """The most streamed layers: an engine refuses prompts that do not fit what its first plan leaves for KV."""
        return self.plans[-1]

    def __call__(self, state: EngineState) -> Plan:
        """Take one sample and set the level."""
        self.pressure(state)
        allowed = self.most_stretch * self.compute_s(state)
        wanted = self.pressure.level
        while wanted and self.link_s[wanted] > allowed:
            wanted -= 1
        self.pressure.level = wanted
        # An announced decrease of the budget counts now; an announced increase does not count yet.
        budget_bytes = min(state.budget_bytes, state.next_budget_bytes)
        while wanted < len(self.plans) - 1 and not self._fits(wanted, budget_bytes):
            wanted += 1
        self.level = wanted
        return self.plans[wanted]

    def _fits(self, level: int, budget_bytes: int) -> bool:
        """Return whether a level fits the budget, and fewer streamed layers also while they are copied back."""
        most = self.peaks[self.level][level] if level < self.level else self.weights_bytes[level]
        return most <= budget_bytes


def oneiros(
    served: PolicyContext,
    *,
    layers: Sequence[int] = (4, 8, 16),
    most_stretch: float = 1.0,
    calm: float = 0.6,
    wait_s: float = 1.0,
    smoothing: float = 0.5,
    hysteresis: float = 0.5,
) -> Oneiros:
    """Build the policy.

    Args:
        layers: how many layers each step streams, ascending from 3.
        most_stretch: copies of an iteration may take at most this times its computing.
        calm, wait_s, smoothing, hysteresis: as in ``AdaptivePrecision``.
    Raises:
        ConfigError: for numbers out of range, counts that do not ascend, or a server without calibration.
    """
    check_pressure(calm, wait_s, smoothing, hysteresis)
    model = served.model
    total, counts = model.num_layers, layer_list("policy.layers", layers)
    if not counts or counts != sorted(set(counts)) or not all(LEAST_STREAMED <= count <= total for count in counts):
        raise ConfigError(
            f"policy.layers is {counts}; the numbers must ascend and lie between {LEAST_STREAMED} and {total}, such as "
            f"[{max(LEAST_STREAMED, total // 4)}]"
        )
    if not is_positive(most_stretch):
        raise ConfigError(f"policy.most_stretch is {most_stretch}; it must be a finite number above 0, such as 1")
    if served.server is None:
        raise ConfigError("policy=oneiros weighs copies against computing, so it needs a server with a calibration")
    latency, link = served.server.priced(), served.server.copying()
    dense, order = dense_plan(model), nested_layers(total)
    chosen = [set(order[:count]) for count in counts]
    plans = (dense, *(replace(dense, streamed=tuple(i in some for i in range(total))) for some in chosen))
    layer_s = layer_weight_bytes(model) / link.host_to_device_bytes_per_s + link.layer_s
    workspace = served.workspace_bytes

    def compute_s(state: EngineState) -> float:
        running = max(1, state.running)
        return latency.iteration_s(dense, [], running, max(running, state.running_tokens), running)

    return Oneiros(
        plans=plans,
        pressure=AdaptivePrecision(plans, calm, wait_s, smoothing, hysteresis, rest_levels=REST_LEVELS),
        link_s=tuple(count * layer_s for count in (0, *counts)),
        weights_bytes=tuple(weight_bytes(model, plan) + workspace for plan in plans),
        peaks=tuple(tuple(peak_weight_bytes(model, one, other) + workspace for other in plans) for one in plans),
        compute_s=compute_s,
        most_stretch=most_stretch,
        level=len(plans) - 1,
    )
