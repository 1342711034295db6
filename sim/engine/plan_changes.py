"""Which plan runs on a replica, which one is wanted, and the copies that lead from one to the other.

sim/engine/transition.py says what has to be copied; ``Weights`` does it: a device, or a clock that knows how long it takes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from sim.cost.memory import fixed_weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan
from sim.engine.executor import Weights
from sim.engine.transition import (
    LayerCopy,
    Resident,
    copies_between,
    joined,
    resident_of,
    running_plan,
    without_dropped,
)
from sim.engine.transition_log import TransitionLog


class PlanChanges:
    """The running plan, the wanted one, and what is under way between them.

    plan: what runs. target: the plan that the last change leads to. resident: the blocks on the device.
    copy: the layer that is being copied in, if any. weight_bytes: of what is resident. log: one row a change.
    """

    def __init__(self, model: ModelSpec, plan: Plan, weights: Weights) -> None:
        """Begin with all weights of ``plan`` on the device."""
        self._model, self._weights = model, weights
        self._fixed_bytes = fixed_weight_bytes(model)
        self.target, self.resident = plan, resident_of(plan)
        self.copy: LayerCopy | None = None
        self.log = TransitionLog()
        self._copy_started = False
        self._queued: deque[LayerCopy] = deque()
        self._decided: tuple[float, Plan] | None = None
        self._schedule: deque[tuple[float, Plan]] = deque()
        self._run_what_is_resident()

    # -- decisions -----------------------------------------------------------------------------------------------

    @property
    def wanted(self) -> Plan:
        """What the last decision wants; it may not have taken effect yet."""
        return self._decided[1] if self._decided is not None else self.target

    @property
    def next_scheduled_s(self) -> float:
        """When the next decision known beforehand is due; ``inf`` for none."""
        return self._schedule[0][0] if self._schedule else math.inf

    @property
    def last_scheduled_s(self) -> float:
        """When the last decision known beforehand is due; ``-inf`` for none."""
        return self._schedule[-1][0] if self._schedule else -math.inf

    def decide(self, time_s: float, plan: Plan) -> bool:
        """Want another plan from now on; return False if it is wanted already."""
        if plan == self.wanted:
            return False
        self._decided = (time_s, plan)
        return True

    def schedule(self, decisions: Iterable[tuple[float, Plan]]) -> None:
        """Take decisions known beforehand, ascending in time."""
        self._schedule.extend(decisions)

    def take_due(self, now_s: float) -> bool:
        """Want what the schedule says for now; return whether that is another plan than before."""
        another = False
        while self.next_scheduled_s <= now_s:
            another |= self.decide(*self._schedule.popleft())
        return another

    # -- between two iterations ----------------------------------------------------------------------------------

    def join(self, now_s: float) -> LayerCopy | None:
        """Let the layer run from now on whose copy is complete; return its copy, or None if there is none."""
        copy = self.copy
        if copy is None or not self._weights.arrived(now_s):
            return None
        self._weights.join()
        self.log.charge(bytes_in=copy.copied_bytes)
        self._set_resident(joined(self.resident, copy), copied_bytes=copy.copied_bytes)
        self.copy, self._copy_started = None, False
        return copy

    def begin(self, pool_layer_blocks: int) -> bool:
        """Start the change that was decided: drop what the new plan does not run, line up copies of what it needs.

        Return False if nothing was decided.
        """
        if self._decided is None:
            return False
        time_s, plan = self._decided
        self._decided = None
        self.log.begin(time_s, self.plan, plan, pool_layer_blocks)
        self.target = plan
        resident = without_dropped(self.resident, plan)
        copies = copies_between(self._model, resident, plan)
        if self.copy is not None and self.copy in copies:
            copies.remove(self.copy)  # the copy under way goes on, for the new plan
        elif self.copy is not None:
            self._weights.abandon()
            self.copy, self._copy_started = None, False
        self._queued = deque(copies)
        self._set_resident(resident)
        return True

    def line_up_copy(self) -> None:
        """Choose the next copy, so that the KV pool makes room for it; ``start_copy`` comes after that."""
        if self.copy is None and self._queued:
            self.copy = self._queued.popleft()

    def start_copy(self, now_s: float) -> None:
        """Start the chosen copy; only now is its memory free."""
        if self.copy is not None and not self._copy_started:
            self._weights.start(self.copy, now_s)
            self._copy_started = True

    def _set_resident(self, resident: Resident, copied_bytes: int = 0) -> None:
        freed = self.resident.weight_bytes(self._model) + copied_bytes - resident.weight_bytes(self._model)
        self.log.charge(bytes_freed=freed)
        self.resident = resident
        self._run_what_is_resident()
        if freed:
            self._weights.drop(resident)

    def _run_what_is_resident(self) -> None:
        """Run the blocks of the target that are on the device."""
        self.plan = running_plan(self.resident, self.target)
        self.weight_bytes = self._fixed_bytes + self.resident.weight_bytes(self._model)

    @property
    def incoming_bytes(self) -> int:
        """Bytes of the layer that is being copied in."""
        return self.copy.copied_bytes if self.copy is not None else 0
