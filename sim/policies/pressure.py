"""Policies that follow load: lower precision in proportion to pressure, or drop blocks step by step.

``adaptive_precision`` resembles FlexQuant (arXiv 2506.12024) and PMPD (arXiv 2410.13461), which lower bits where the
loss is smallest; here the number of layers at low precision follows the load. ``kv_precision`` does the same to the KV
of requests whose prefill ends under load: it shrinks what they hold and read, not the weights. ``hidden_cache`` lets
these requests keep hidden states instead: half the bytes, more to compute. ``adaptive_pruning`` gives MorphServe's
controller (arXiv 2506.02006) a greedy order of blocks to drop instead of layers to quantize: a rule without learning
that reacts to queues as well as to memory. Thresholds that no paper states are our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sim.cost.plan import LARGEST, Plan, check_plan, dense_plan, is_positive, layer_list
from sim.engine.protocol import EngineState
from sim.errors import ConfigError
from sim.limits import is_whole
from sim.policies.base import PolicyContext
from sim.policies.greedy_stop import greedy_stop
from sim.policies.morphserve import MorphServe

REST_LEVELS = 0.1
"""``rest_levels`` of ``kv_precision``, ``hidden_cache``, ``oneiros``. Above 0, as smoothed pressure never reaches 0."""


@dataclass(slots=True)
class AdaptivePrecision:
    """Runs ``plans[level]``; the level is proportional to the smoothed pressure.

    Load is the larger of KV use (share of the pool) and the oldest wait (share of ``wait_s``). Pressure is 0 up to a
    load of ``calm`` and rises linearly to 1 at a load of 1.
    hysteresis: how far, in levels, the pressure must fall below the current level's range before the level falls.
    weights_bytes: of every plan, with the workspace; a level whose plan does not fit the budget is passed over. Empty:
        the budget does not matter.
    prefill_tokens: waits do not count while iterations compute more tokens than this on average; None: they always do.
    rest_levels: level 0 ends when the pressure exceeds this, in levels, and returns when the pressure falls below half
        of it. 0: level 0 ends at any pressure and never returns (``adaptive_precision`` and ``load_ladder``, as in the
        published tables).
    """

    plans: tuple[Plan, ...]
    calm: float
    wait_s: float
    smoothing: float
    hysteresis: float
    weights_bytes: tuple[int, ...] = ()
    prefill_tokens: float | None = None
    rest_levels: float = 0.0
    pressure: float = 0.0
    level: int = 0
    before: EngineState | None = None

    @property
    def first_plan(self) -> Plan:
        """Full precision."""
        return self.plans[0]

    def __call__(self, state: EngineState) -> Plan:
        """Take one sample and set the level."""
        pool = state.kv_layer_blocks
        used = state.kv_used_layer_blocks / pool if pool else 1.0
        waited = 0.0 if self._prefills(state) else min(state.oldest_wait_s / self.wait_s, 1.0)
        seen = max(0.0, max(used, waited) - self.calm) / (1.0 - self.calm)
        self.pressure += self.smoothing * (seen - self.pressure)
        steps = self.pressure * (len(self.plans) - 1)
        if steps < self.rest_levels / 2:
            self.level = 0
        elif steps > max(self.level, self.rest_levels):
            self.level = min(len(self.plans) - 1, int(steps) + 1)
        elif steps < self.level - 1 - self.hysteresis:
            self.level = int(steps) + 1
        self.level = max(self.level, self._first_that_fits(state))
        return self.plans[self.level]

    def _first_that_fits(self, state: EngineState) -> int:
        """Return the first level whose weights fit the budget, the last if none does."""
        # An announced decrease of the budget counts now; an announced increase does not count yet.
        budget_bytes = min(state.budget_bytes, state.next_budget_bytes)
        fits = (level for level, weights in enumerate(self.weights_bytes) if weights <= budget_bytes)
        return next(fits, max(0, len(self.weights_bytes) - 1))

    def _prefills(self, state: EngineState) -> bool:
        """Return whether iterations have computed more tokens on average than ``prefill_tokens``."""
        before, self.before = self.before, state
        if self.prefill_tokens is None or before is None or state.iterations <= before.iterations:
            return False
        admitted = state.arrived_prompt_tokens - state.waiting_tokens
        admitted -= before.arrived_prompt_tokens - before.waiting_tokens
        tokens = max(0, admitted) + state.produced_tokens - before.produced_tokens
        return tokens / (state.iterations - before.iterations) > self.prefill_tokens


def adaptive_precision(
    served: PolicyContext,
    *,
    bits: int = 4,
    levels: int = 4,
    calm: float = 0.6,
    wait_s: float = 1.0,
    smoothing: float = 0.5,
    hysteresis: float = 0.5,
) -> AdaptivePrecision:
    """Build the policy: ``levels`` steps from full precision to all layers at ``bits`` bits, front to back.

    Raises:
        ConfigError: for numbers out of range. PlanError: for bits that are not supported.
    """
    if not (is_whole(levels) and 1 <= levels <= LARGEST):
        raise ConfigError(f"policy.levels is {levels!r}; it must be a whole number from 1")
    check_pressure(calm, wait_s, smoothing, hysteresis)
    layers = served.model.num_layers
    dense = dense_plan(served.model)
    counts = [round(layers * level / levels) for level in range(levels + 1)]
    plans = tuple(replace(dense, weight_bits=(bits,) * n + (dense.weight_bits[0],) * (layers - n)) for n in counts)
    check_plan(served.model, plans[-1])
    return AdaptivePrecision(plans, calm, wait_s, smoothing, hysteresis)


def kv_precision(
    served: PolicyContext,
    *,
    low_layers: Sequence[int] = (),
    calm: float = 0.6,
    wait_s: float = 1.0,
    smoothing: float = 0.5,
    hysteresis: float = 0.5,
) -> AdaptivePrecision:
    """Build the policy whose steps are: KV at 16 bits, at 8 bits, and at 4 bits in ever more layers, front to back.

    A request keeps the bits at which its prefill ended, so a step shrinks the KV of later requests. Fewer than 16 bits
    start when the pressure exceeds 0.1 levels and end when it falls below 0.05, unlike in ``adaptive_precision``, which
    never returns to full precision.

    Args:
        low_layers: how many layers are at 4 bits, ascending from 1; the others are at 8. Empty: none ever is.
        calm, wait_s, smoothing, hysteresis: as in ``AdaptivePrecision``.
    Raises:
        ConfigError: for numbers out of range, or counts that do not ascend.
        PlanError: if the model's KV is no larger at 16 bits.
    """
    check_pressure(calm, wait_s, smoothing, hysteresis)
    layers, counts = served.model.num_layers, layer_list("policy.low_layers", low_layers)
    if counts != sorted(set(counts)) or not all(0 < count <= layers for count in counts):
        raise ConfigError(
            f"policy.low_layers is {counts}; the numbers must ascend and lie between 1 and {layers}, such as "
            f"[{layers // 2}, {layers}]"
        )
    dense = dense_plan(served.model)
    plans = (dense, *(replace(dense, kv_bits=(4,) * low + (8,) * (layers - low)) for low in (0, *counts)))
    for plan in plans:
        check_plan(served.model, plan)
    return AdaptivePrecision(plans, calm, wait_s, smoothing, hysteresis, rest_levels=REST_LEVELS)


@dataclass(slots=True)
class HiddenCache:
    """Runs what ``pressure`` asks for, but keeps no further hidden states while iterations are slow.

    pressure: between keys and values and hidden states. tpot_s: iterations since the last decision may take this on
        average; None: as long as they like.
    """

    pressure: AdaptivePrecision
    tpot_s: float | None
    before: EngineState | None = None

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Keys and values, hidden states."""
        return self.pressure.plans

    @property
    def first_plan(self) -> Plan:
        """Keys and values."""
        return self.plans[0]

    def __call__(self, state: EngineState) -> Plan:
        """Take one sample and choose."""
        wanted, before, self.before = self.pressure(state), self.before, state
        if self.tpot_s is None or before is None or state.iterations <= before.iterations:
            return wanted
        iteration_s = (state.busy_s - before.busy_s) / (state.iterations - before.iterations)
        return wanted if iteration_s <= self.tpot_s else self.first_plan


def hidden_cache(
    served: PolicyContext,
    *,
    tpot_s: float | None = None,
    calm: float = 0.6,
    wait_s: float = 1.0,
    smoothing: float = 0.5,
    hysteresis: float = 0.5,
) -> HiddenCache:
    """Build the policy of two steps: requests keep keys and values, or hidden states of half the bytes (Apt-Serve).

    A request keeps what it had when its prefill ended, so the step shrinks what later requests hold. It begins and ends
    as the first one of ``kv_precision`` does.

    Args:
        tpot_s: no further request keeps hidden states while iterations take longer than this, in seconds; None: all
            do while pressure is high.
        calm, wait_s, smoothing, hysteresis: as in ``AdaptivePrecision``.
    Raises:
        ConfigError: for numbers out of range. PlanError: for a model whose hidden states do not halve its KV.
    """
    check_pressure(calm, wait_s, smoothing, hysteresis)
    if tpot_s is not None and not is_positive(tpot_s):
        raise ConfigError(f"policy.tpot_s is {tpot_s!r}; it must be seconds above 0, or null for no limit")
    dense = dense_plan(served.model)
    plans = (dense, replace(dense, kv_hidden=True))
    check_plan(served.model, plans[-1])
    return HiddenCache(AdaptivePrecision(plans, calm, wait_s, smoothing, hysteresis, rest_levels=REST_LEVELS), tpot_s)


def check_pressure(calm: float, wait_s: float, smoothing: float, hysteresis: float) -> None:
    """Check the numbers of ``AdaptivePrecision``.

    Raises:
        ConfigError: for one out of range.
    """
    for name, value, right, allowed in (
        ("calm", calm, (is_positive(calm) or calm == 0) and calm < 1, "from 0 to below 1"),
        ("wait_s", wait_s, is_positive(wait_s), "of seconds above 0"),
        ("smoothing", smoothing, is_positive(smoothing) and smoothing <= 1, "above 0, at most 1"),
        ("hysteresis", hysteresis, is_positive(hysteresis) or hysteresis == 0, "from 0 on"),
    ):
        if not right:
            raise ConfigError(f"policy.{name} is {value!r:.80}; it must be a finite number {allowed}")


def adaptive_pruning(
    served: PolicyContext,
    *,
    order: Sequence[str],
    made_for: str | None = None,
    step: int = 2,
    most: int = 8,
    smoothing: float = 0.25,
    pressure_kv_share: float = 0.85,
    pressure_delay_s: float = 0.1,
    pressure_samples: int = 3,
    recovery_kv_share: float = 0.65,
    recovery_delay_s: float = 0.025,
    recovery_samples: int = 5,
) -> MorphServe:
    """Build MorphServe's controller for the first ``most`` blocks of an order, ``step`` blocks per action.

    Raises:
        ConfigError: for steps out of range. PlanError: for an order that is not for this model.
    """
    stop = greedy_stop(served, order=order, made_for=made_for)
    if not (is_whole(step) and is_whole(most) and 1 <= step <= most <= len(stop.plans) - 1):
        raise ConfigError(
            f"policy.step is {step!r} and most {most!r}; step must be at least 1, and most from step to the length of "
            f"policy.order, {len(stop.plans) - 1}"
        )
    return MorphServe(
        plans=stop.plans[: most + 1],
        served=served,
        step=step,
        smoothing=smoothing,
        pressure_kv_share=pressure_kv_share,
        pressure_delay_s=pressure_delay_s,
        pressure_samples=pressure_samples,
        recovery_kv_share=recovery_kv_share,
        recovery_delay_s=recovery_delay_s,
        recovery_samples=recovery_samples,
    )
