"""A table of plans: the arrival rate of prompt tokens picks the column, the memory budget the row.

A rule without learning, as one would write after trying every plan at every load: ``agents.tune_rules`` makes the table
from training windows. A column is left only when the rate has passed its edge by a margin, so that the plan does not
change back and forth at an edge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sim.cost.memory import weight_bytes
from sim.cost.plan import Plan, check_plan, dense_plan
from sim.engine.protocol import EngineState
from sim.errors import ConfigError, PlanError
from sim.limits import is_whole
from sim.policies.base import PolicyContext
from sim.policies.greedy_stop import dropping


@dataclass(slots=True)
class Load:
    """What the table is read by: the smoothed arrival rate of prompt tokens per second, and the budget."""

    smoothing_s: float
    rate: float = 0.0
    before: EngineState | None = None

    def add(self, state: EngineState) -> float:
        """Add a state; return the rate."""
        before, self.before = self.before, state
        passed_s = state.time_s - (before.time_s if before is not None else 0.0)
        if passed_s > 0.0:
            tokens = state.arrived_prompt_tokens - (before.arrived_prompt_tokens if before is not None else 0)
            weight = 1.0 - math.exp(-passed_s / self.smoothing_s) if before is not None else 1.0
            self.rate += weight * (tokens / passed_s - self.rate)
        return self.rate


def budget_of(state: EngineState) -> int:
    """Return the budget that counts, in bytes: an announced decrease counts now, an announced increase not yet."""
    return min(state.budget_bytes, state.next_budget_bytes)


@dataclass(slots=True)
class LoadTable:
    """Runs ``plans[row][column]``.

    rates: edges between columns, in prompt tokens per second. budgets: edges between rows, in bytes.
    margin: share by which the rate must pass an edge before the column changes.
    """

    plans: tuple[tuple[Plan, ...], ...]
    rates: tuple[float, ...]
    budgets: tuple[float, ...]
    margin: float
    load: Load
    column: int = 0

    @property
    def first_plan(self) -> Plan:
        """The plan of the lowest rate and the largest budget."""
        return self.plans[-1][0]

    def __call__(self, state: EngineState) -> Plan:
        """Measure the rate; look the plan up."""
        rate = self.load.add(state)
        while self.column < len(self.rates) and rate > self.rates[self.column] * (1.0 + self.margin):
            self.column += 1
        while self.column and rate < self.rates[self.column - 1] * (1.0 - self.margin):
            self.column -= 1
        row = sum(budget_of(state) >= edge for edge in self.budgets)
        return self.plans[row][self.column]


def load_table(
    served: PolicyContext,
    *,
    table: Sequence[Sequence[Sequence[int]]],
    rates: Sequence[float],
    budgets: Sequence[float],
    order: Sequence[str] = (),
    made_for: str | None = None,
    low_bits: int = 4,
    margin: float = 0.1,
    smoothing_s: float = 10.0,
) -> LoadTable:
    """Build the policy.

    Args:
        table: for each row and column, ``[blocks dropped, layers at low precision]``; the first row is that of the
            smallest budget, the first column that of the lowest rate.
        rates: edges between columns, ascending, in prompt tokens per second that arrive.
        budgets: edges between rows, ascending, in multiples of the bytes of the dense weights.
        order, made_for: blocks in the order of dropping, and the model on which it was measured.
        low_bits: bits of the first layers that are at low precision.
        margin: share by which the rate must pass an edge before the column changes.
        smoothing_s: time constant of the average of the rate.
    Raises:
        ConfigError: for edges that do not ascend, or a table whose size does not fit them.
        PlanError: for an entry that names no plan of the model.
    """
    for name, edges in (("rates", rates), ("budgets", budgets)):
        numbers = all(isinstance(edge, int | float) and not isinstance(edge, bool) for edge in edges)
        if not numbers or list(edges) != sorted(set(edges)) or not all(0 < edge < math.inf for edge in edges):
            raise ConfigError(f"policy.{name} is {list(edges)}; the edges must be above 0 and ascend, such as [1, 2]")
    if len(table) != len(budgets) + 1 or any(len(row) != len(rates) + 1 for row in table):
        raise ConfigError(
            f"policy.table has {len(table)} rows of {[len(row) for row in table]} entries; {len(budgets)} budgets and "
            f"{len(rates)} rates need {len(budgets) + 1} rows of {len(rates) + 1}"
        )
    if not 0.0 <= margin < 1.0 or not 0 < smoothing_s < math.inf:
        raise ConfigError(
            f"policy.margin is {margin} and smoothing_s {smoothing_s}; they must be in [0, 1) and above 0 seconds"
        )
    model = served.model
    fewer = dropping(model, order, made_for)

    def plan_at(entry: Sequence[int]) -> Plan:
        if len(entry) != 2 or not all(map(is_whole, entry)) or not 0 <= entry[0] < len(fewer):
            raise PlanError(
                f"policy.table has {list(entry)}; an entry is [blocks dropped, layers at {low_bits} bits], with at "
                f"most {len(fewer) - 1} blocks of policy.order and {model.num_layers} layers"
            )
        if not 0 <= entry[1] <= model.num_layers:
            raise PlanError(f"policy.table has {list(entry)}; {model.name} has {model.num_layers} layers")
        plan = fewer[entry[0]]
        plan = replace(plan, weight_bits=(low_bits,) * entry[1] + plan.weight_bits[entry[1] :])
        check_plan(model, plan)
        return plan

    dense_bytes = weight_bytes(model, dense_plan(model))
    return LoadTable(
        plans=tuple(tuple(map(plan_at, row)) for row in table),
        rates=tuple(map(float, rates)),
        budgets=tuple(edge * dense_bytes for edge in budgets),
        margin=margin,
        load=Load(smoothing_s),
    )
