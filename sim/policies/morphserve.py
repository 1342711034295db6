"""MorphServe's controller: swap layers to a lower precision under pressure, and restore them after it.

arXiv 2506.02006: a monitor smooths KV use and queue delay; a controller acts only after pressure has persisted; layers
are replaced in place, and the bytes that this frees become KV blocks. The paper gives example thresholds (KV use above
85 %, queue delay above 100 ms) and three modes, but not their parameters. The numbers here are from an independent
reproduction: EMA 0.25; pressure after 3 samples of KV >= 0.85 or delay >= 0.1 s; recovery after 5 of KV <= 0.65 and
delay <= 0.025 s; layers per action and in total 1/4 (accuracy), 2/8 (default), 4/16 (performance). Layers are swapped
front to back, the paper's default. A layer is restored only if its bytes fit next to the KV in use: the pool shrinks by
free KV blocks, and no request is preempted for it.

That reproduction's runs on an RTX 3090 switch 16 layers in one action and back: ``layers_per_action`` and ``layers``
replace the numbers of a mode, and with ``restore_partly`` false an action restores all of its layers or none. Its
engine stands still during a switch, so with ``samples_while_copying`` false no sample is taken then. Its tables hold
one switch to 4 bits and one back for each run. KV use as a share of the present pool does not give that, because the
larger pool at 4 bits relaxes it at once: with ``recovery_pool: restored`` recovery looks at the pool that restored
layers would leave (conf/policy/morphserve_rtx3090.yaml). That reading is this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sim.cost.memory import kv_block_layer_bytes, weight_bytes
from sim.cost.plan import Plan, check_plan, dense_plan, layer_list
from sim.engine.protocol import EngineState
from sim.engine.transition import peak_weight_bytes
from sim.errors import ConfigError, PlanError, nearest
from sim.policies.base import PolicyContext

MODES = {"accuracy": (1, 4), "default": (2, 8), "performance": (4, 16)}
"""Layers per action, layers in total."""
RECOVERY_POOLS = ("present", "restored")


@dataclass(slots=True)
class MorphServe:
    """Runs the first ``swapped`` layers of an order at low precision.

    plans: ``plans[n]`` has n swapped layers. served: what the policy knows of the server. step: layers per action.
    The other fields are the thresholds of the module's docstring: what counts as pressure and as recovery, and after
    how many samples in a row it acts.
    """

    plans: tuple[Plan, ...]
    served: PolicyContext
    step: int
    smoothing: float
    pressure_kv_share: float
    pressure_delay_s: float
    pressure_samples: int
    recovery_kv_share: float
    recovery_delay_s: float
    recovery_samples: int
    restore_partly: bool = True
    samples_while_copying: bool = True
    recovery_pool: str = "present"
    swapped: int = 0
    kv_share: float = 0.0
    restored_share: float = 0.0
    delay_s: float = 0.0
    pressed: int = 0
    relaxed: int = 0

    @property
    def first_plan(self) -> Plan:
        """Every layer at full precision."""
        return self.plans[0]

    def __call__(self, state: EngineState) -> Plan:
        """Take one sample; act if enough consecutive samples agree."""
        if not self.samples_while_copying and state.plan != state.target:
            return self.plans[self.swapped]
        kv_share = state.kv_used_layer_blocks / state.kv_layer_blocks if state.kv_layer_blocks else 1.0
        self.kv_share += self.smoothing * (kv_share - self.kv_share)
        self.restored_share += self.smoothing * (self._share_if_restored(state) - self.restored_share)
        self.delay_s += self.smoothing * (state.oldest_wait_s - self.delay_s)
        pressure = self.kv_share >= self.pressure_kv_share or self.delay_s >= self.pressure_delay_s
        share = self.restored_share if self.recovery_pool == "restored" else self.kv_share
        recovery = share <= self.recovery_kv_share and self.delay_s <= self.recovery_delay_s
        self.pressed = self.pressed + 1 if pressure else 0
        self.relaxed = self.relaxed + 1 if recovery else 0
        if self.pressed >= self.pressure_samples:
            self.swapped, self.pressed = min(self.swapped + self.step, len(self.plans) - 1), 0
        elif self.relaxed >= self.recovery_samples:
            fewer = self._fewest(state)
            if fewer < self.swapped:
                self.swapped, self.relaxed = fewer, 0
        return self.plans[self.swapped]

    def _share_if_restored(self, state: EngineState) -> float:
        """Return the KV use as a share of the pool that this action's restored layers would leave."""
        served, fewer = self.served, self.plans[max(self.swapped - self.step, 0)]
        more_bytes = weight_bytes(served.model, fewer) - state.weight_bytes
        blocks = state.kv_layer_blocks - more_bytes // kv_block_layer_bytes(served.model, served.kv_block_tokens)
        return state.kv_used_layer_blocks / blocks if blocks > 0 else 1.0

    def _fewest(self, state: EngineState) -> int:
        """Return the smallest number of swapped layers after this action whose weights fit next to the KV in use."""
        served = self.served
        held_bytes = state.kv_used_layer_blocks * kv_block_layer_bytes(served.model, served.kv_block_tokens)
        # An announced decrease of the budget counts now; an announced increase does not count yet.
        left_bytes = min(state.budget_bytes, state.next_budget_bytes) - served.workspace_bytes - held_bytes
        least = max(self.swapped - self.step, 0)
        for fewer in range(least, self.swapped if self.restore_partly else least + 1):
            if peak_weight_bytes(served.model, self.plans[self.swapped], self.plans[fewer]) <= left_bytes:
                return fewer
        return self.swapped


def morphserve(
    served: PolicyContext,
    *,
    mode: str = "default",
    layers_per_action: int | None = None,
    layers: int | None = None,
    restore_partly: bool = True,
    samples_while_copying: bool = True,
    recovery_pool: str = "present",
    bits: int = 4,
    order: Sequence[int] | None = None,
    smoothing: float = 0.25,
    pressure_kv_share: float = 0.85,
    pressure_delay_s: float = 0.1,
    pressure_samples: int = 3,
    recovery_kv_share: float = 0.65,
    recovery_delay_s: float = 0.025,
    recovery_samples: int = 5,
) -> MorphServe:
    """Build the controller; ``order`` lists the layers in the order of swapping, front to back if None.

    Args:
        layers_per_action, layers: in place of those of the mode; None keeps them.
        restore_partly: whether an action restores a part of its layers where not all of them fit.
        samples_while_copying: whether samples are taken while layers are copied in.
        recovery_pool: the pool whose use counts for recovery: ``present``, or ``restored``, as it would be after it.
    Raises:
        ConfigError: for an unknown mode, an empty order, or a smoothing outside (0, 1].
        PlanError: for layers the model does not have, or bits that are not supported.
    """
    if mode not in MODES:
        raise ConfigError(f"unknown policy.mode {mode!r}; {nearest(mode, MODES)}")
    if recovery_pool not in RECOVERY_POOLS:
        raise ConfigError(f"unknown policy.recovery_pool {recovery_pool!r}; {nearest(recovery_pool, RECOVERY_POOLS)}")
    if not 0.0 < smoothing <= 1.0 or pressure_samples < 1 or recovery_samples < 1:
        raise ConfigError(f"policy.smoothing is {smoothing}; it must be in (0, 1], and sample counts at least 1")
    model = served.model
    step, most = layers_per_action or MODES[mode][0], layers or MODES[mode][1]
    if step < 1 or most < 1:
        raise ConfigError(
            f"policy.layers_per_action is {step} and policy.layers {most}; each must be at least 1, or null to "
            "take the mode's"
        )
    sequence = list(range(model.num_layers)) if order is None else layer_list("policy.order's layers", order)
    if not sequence:
        raise ConfigError("policy.order is empty, so no layer is ever swapped; list layers, or null for all of them")
    if len(set(sequence)) != len(sequence) or any(not 0 <= layer < model.num_layers for layer in sequence):
        raise PlanError(f"policy.order must list layers 0 to {model.num_layers - 1} of {model.name}, each once")
    dense = dense_plan(model)
    plans = [dense]
    for count in range(1, min(most, len(sequence)) + 1):
        low = set(sequence[:count])
        plans.append(
            replace(dense, weight_bits=tuple(bits if i in low else model.weight_bits for i in range(model.num_layers)))
        )
    check_plan(model, plans[-1])  # an unsupported number of bits is an error now, not in the middle of a replay
    return MorphServe(
        plans=tuple(plans),
        served=served,
        step=step,
        smoothing=smoothing,
        pressure_kv_share=pressure_kv_share,
        pressure_delay_s=pressure_delay_s,
        pressure_samples=pressure_samples,
        recovery_kv_share=recovery_kv_share,
        recovery_delay_s=recovery_delay_s,
        recovery_samples=recovery_samples,
        restore_partly=restore_partly,
        samples_while_copying=samples_while_copying,
        recovery_pool=recovery_pool,
    )
