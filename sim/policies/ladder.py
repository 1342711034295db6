"""Ladders of plans: precision first, then blocks; memory or load says how far down to go.

Lower precision frees more memory for the same loss than dropping blocks, so a ladder lowers the precision of more and
more layers, and drops blocks only below that. ``memory_ladder`` takes the first plan that leaves enough memory, as
``greedy_stop`` does over blocks alone. ``load_ladder`` takes the plan by pressure, as ``adaptive_precision`` does, with
two additions that anyone who runs a server would make: it passes over plans that do not fit the budget, and it can
ignore waits while prefill is the bottleneck, which weights of 4 bits slow down. Both are rules without learning; they
and their values are our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sim.cost.memory import weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan, check_plan, layer_list
from sim.errors import ConfigError
from sim.limits import is_whole
from sim.policies.base import PolicyContext
from sim.policies.greedy_stop import GreedyStop, dropping, stop_over
from sim.policies.pressure import AdaptivePrecision, check_pressure


def plan_ladder(
    model: ModelSpec,
    *,
    order: Sequence[str] = (),
    made_for: str | None = None,
    low_bits: int = 4,
    low_layers: Sequence[int] = (),
    drops: Sequence[int] = (),
) -> list[Plan]:
    """Return plans of falling size, the first being dense.

    Args:
        order, made_for: blocks in the order of dropping, and the model on which it was measured.
        low_bits: bits of low precision. low_layers: how many of the first layers have it, ascending from 1.
        drops: how many blocks of the order are dropped, ascending from 1; with as many layers at low precision as the
            last entry of ``low_layers`` says.
    Raises:
        PlanError: for an order that is not for this model, or bits that are not supported.
        ConfigError: for counts that do not ascend, or are more than there are layers or blocks.
    """
    fewer = dropping(model, order, made_for)
    lows, gone = layer_list("policy.low_layers", low_layers), layer_list("policy.drops", drops)
    for name, counts, most in (("low_layers", lows, model.num_layers), ("drops", gone, len(order))):
        if counts != sorted(set(counts)) or not all(0 < count <= most for count in counts):
            raise ConfigError(
                f"policy.{name} is {counts}; the numbers must ascend and lie between 1 and {most}, such as "
                f"[{most // 2}, {most}]"
            )

    def with_low(plan: Plan, low: int) -> Plan:
        return replace(plan, weight_bits=(low_bits,) * low + plan.weight_bits[low:])

    last = lows[-1] if lows else 0
    plans = [fewer[0], *(with_low(fewer[0], low) for low in lows), *(with_low(fewer[count], last) for count in gone)]
    if len(plans) < 2:
        raise ConfigError("policy.low_layers and policy.drops are empty; name at least one step, such as drops=[4]")
    check_plan(model, plans[-1])
    return plans


def memory_ladder(
    served: PolicyContext,
    *,
    order: Sequence[str] = (),
    made_for: str | None = None,
    low_bits: int = 4,
    low_layers: Sequence[int] = (),
    drops: Sequence[int] = (),
    headroom: float = 1.1,
    restore_headroom: float = 1.3,
    waiting_share: float = 0.0,
    waiting_most: float = 0.25,
    patience: int = 5,
) -> GreedyStop:
    """Build the policy that takes the first plan of a ladder that leaves enough memory.

    Args:
        order, made_for, low_bits, low_layers, drops: as in ``plan_ladder``.
        headroom, restore_headroom, waiting_share, waiting_most, patience: as in ``GreedyStop``.
    """
    plans = plan_ladder(
        served.model, order=order, made_for=made_for, low_bits=low_bits, low_layers=low_layers, drops=drops
    )
    return stop_over(served, plans, headroom, restore_headroom, waiting_share, waiting_most, patience)


def load_ladder(
    served: PolicyContext,
    *,
    order: Sequence[str] = (),
    made_for: str | None = None,
    low_bits: int = 4,
    low_layers: Sequence[int] = (),
    drops: Sequence[int] = (),
    calm: float = 0.6,
    wait_s: float = 1.0,
    smoothing: float = 0.5,
    hysteresis: float = 0.5,
    prefill_tokens: int | None = None,
) -> AdaptivePrecision:
    """Build the policy that takes a plan of a ladder by pressure.

    Args:
        order, made_for, low_bits, low_layers, drops: as in ``plan_ladder``.
        calm, wait_s, smoothing, hysteresis, prefill_tokens: as in ``AdaptivePrecision``.
    Raises:
        ConfigError: for numbers out of range.
    """
    check_pressure(calm, wait_s, smoothing, hysteresis)
    if prefill_tokens is not None and not (is_whole(prefill_tokens) and prefill_tokens >= 1):
        raise ConfigError(
            f"policy.prefill_tokens is {prefill_tokens!r}; it must be a whole number from 1, or null to count all waits"
        )
    plans = plan_ladder(
        served.model, order=order, made_for=made_for, low_bits=low_bits, low_layers=low_layers, drops=drops
    )
    weights = tuple(weight_bytes(served.model, plan) + served.workspace_bytes for plan in plans)
    return AdaptivePrecision(tuple(plans), calm, wait_s, smoothing, hysteresis, weights, prefill_tokens)
