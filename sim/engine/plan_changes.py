"""Plan changes of a replica: the running plan, the wanted plan, and the copies that lead from one to the other.

sim/engine/transition.py computes what has to be copied; ``Weights`` (sim/engine/executor.py) copies it: on a device, or
in simulated time.
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
    """The running plan, the wanted plan, and the change under way between them.

    plan: what runs. target: the plan that the last change leads to. resident: the blocks that can run.
    copy: the layer that is being copied in or is next, None for none. weight_bytes: bytes of the resident weights.
    log: one row per change.
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
        """The plan last decided on; its change may not have begun yet."""
        return self._decided[1] if self._decided is not None else self.target

    @property
    def next_scheduled_s(self) -> float:
        """Time of the next scheduled decision; ``inf`` for none."""
        return self._schedule[0][0] if self._schedule else math.inf

    @property
    def last_scheduled_s(self) -> float:
        """Time of the last scheduled decision; ``-inf`` for none."""
        return self._schedule[-1][0] if self._schedule else -math.inf

    def decide(self, time_s: float, plan: Plan) -> bool:
        """Decide on a plan; return False if it is the wanted plan already."""
        if plan == self.wanted:
            return False
        self._decided = (time_s, plan)
        return True

    def schedule(self, decisions: Iterable[tuple[float, Plan]]) -> None:
        """Schedule decisions, ascending in time."""
        self._schedule.extend(decisions)

    def take_due(self, now_s: float) -> bool:
        """Take the scheduled decisions that are due; return whether the wanted plan has changed."""
        another = False
        while self.next_scheduled_s <= now_s:
            another |= self.decide(*self._schedule.popleft())
        return another

    # -- between two iterations ----------------------------------------------------------------------------------

    @property
    def copying(self) -> bool:
        """Whether a copy is under way; ``copy`` may also be one that waits for memory."""
        return self._copy_started

    def join(self, now_s: float) -> LayerCopy | None:
        """Start to run the layer whose copy is complete; return that copy, or None if no copy is complete.

        Raises:
            MemoryError: if the copy ran out of memory; it has to start again.
        """
        copy = self.copy
        if copy is None or not self._copy_started or not self._weights.arrived(now_s):
            return None
        self._copy_started = False
        self._weights.join()
        self.log.charge(bytes_in=copy.copied_bytes)
        self._set_resident(joined(self.resident, copy), copied_bytes=copy.copied_bytes)
        self.copy = None
        return copy

    def begin(self, pool_layer_blocks: int) -> bool:
        """Begin the change decided on: drop the blocks that the new plan does not run, queue copies of those it lacks.

        Return False if there is none.
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
            copies.remove(self.copy)  # the copy under way continues, for the new plan
        elif self.copy is not None:
            self._weights.abandon()
            self.copy, self._copy_started = None, False
        self._queued = deque(copies)
        self._set_resident(resident)
        return True

    def line_up_copy(self) -> None:
        """Choose the next copy, so that the KV pool can make room for it before ``start_copy``."""
        if self.copy is None and self._queued:
            self.copy = self._queued.popleft()

    def start_copy(self, now_s: float) -> None:
        """Start the chosen copy; the KV pool has made room for it by now.

        Raises:
            MemoryError: if there is no memory for it; the next call tries again.
        """
        if self.copy is not None and not self._copy_started:
            self._weights.start(self.copy, now_s, shared=bool(self.resident.crossing()))
            self._copy_started = True

    def _set_resident(self, resident: Resident, copied_bytes: int = 0) -> None:
        freed = self.resident.weight_bytes(self._model) + copied_bytes - resident.weight_bytes(self._model)
        self.log.charge(bytes_freed=freed)
        before, self.resident = self.resident, resident
        self._run_what_is_resident()
        if resident != before:
            self._weights.drop(resident)

    def _run_what_is_resident(self) -> None:
        """Set the running plan: the blocks of the target that are on the device."""
        self.plan = running_plan(self.resident, self.target)
        self.weight_bytes = self._fixed_bytes + self.resident.weight_bytes(self._model)

    @property
    def incoming_bytes(self) -> int:
        """Bytes of the layer that is being copied in."""
        return self.copy.copied_bytes if self.copy is not None else 0
