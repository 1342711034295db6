"""What follows from plans, worked out once and then walked by compiled code.

Between two plans an engine is in a **step**: what is resident on the device, and the plan that is wanted. A decision
leads from a step to another, and so does the end of each copy. A `PlanBook` holds the steps met so far as rows of
arrays; sim/engine/kernel follows them, and asks for a step, or for the price of one, that it meets for the first time.

Sets of layers are bits, 60 a word, in ``ceil(L / 60)`` words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sim.cost.latency import plan_layers
from sim.cost.memory import fixed_weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KV_KEEP_ALL, WEIGHT_BITS, KVKeep, Plan
from sim.engine import kernel
from sim.engine.transition import (
    Resident,
    copies_between,
    joined,
    plan_for_holder,
    resident_of,
    running_plan,
    without_dropped,
)
from sim.types import Floats, Ints


class PlanBook:
    """The steps between plans of one model; engines of the same model and quality may share one.

    The arrays are what sim/engine/kernel says they are. ``version`` changes whenever one of them is replaced by a longer
    one: whoever gave its address away has to give the new one.
    """

    def __init__(self, model: ModelSpec, quality_nll: Callable[[Plan], float] | None = None) -> None:
        """Begin an empty book.

        Args:
            model: whose plans.
            quality_nll: nats a token that a plan costs (``sim.cost.quality``); None prices nothing.
        """
        self.model, self.quality_nll = model, quality_nll
        self.words = words_for(model.num_layers)
        layers = model.num_layers
        columns = kernel.STEP_COLUMNS + 2 * self.words + 4 * len(WEIGHT_BITS) + 3 * layers
        self.steps: Ints = np.zeros((16, columns), dtype=np.int64)
        self.copies: Ints = np.zeros((64, kernel.COPY_COLUMNS), dtype=np.int64)
        self.decisions: Ints = np.zeros((16, kernel.DECISION_COLUMNS), dtype=np.int64)
        self.prices: Ints = np.zeros((16, 1 + self.words), dtype=np.int64)
        self.price_nll: Floats = np.zeros((16, 2))
        self.keeps: Ints = np.zeros((1, layers), dtype=np.int64)
        self.version = 0
        self._fixed_weight_bytes = fixed_weight_bytes(model)
        self._targets: dict[Plan, int] = {}
        self._target_plans: list[Plan] = []
        self._numbers: dict[tuple[Resident, int], int] = {}
        self._residents: list[Resident] = []
        self._plans: list[Plan] = []
        self._keep_ids: dict[tuple[KVKeep, ...], int] = {}
        self._copies = self._decisions = self._prices = 0

    def __len__(self) -> int:
        """Return how many steps there are."""
        return len(self._plans)

    def target(self, plan: Plan) -> int:
        """Return the number of a plan that is wanted; it must be legal for the model."""
        number = self._targets.get(plan)
        if number is None:
            number = self._targets[plan] = len(self._target_plans)
            self._target_plans.append(plan)
        return number

    def target_plan(self, target: int) -> Plan:
        """Return the plan of a number."""
        return self._target_plans[target]

    def plan(self, step: int) -> Plan:
        """Return what runs in a step: of the wanted blocks, those that are resident."""
        return self._plans[step]

    def first(self, target: int) -> int:
        """Return the step in which everything that a plan wants is resident."""
        return self._step(resident_of(self._target_plans[target]), target)

    def taken_from(self, other: PlanBook, step: int) -> int:
        """Return the step of this book, still an empty one, that is a step of another; their ``keeps`` are the same."""
        self.keeps, self._keep_ids = other.keeps.copy(), dict(other._keep_ids)
        target = int(other.steps[step, kernel.STEP_TARGET])
        return self._step(other._residents[step], self.target(other._target_plans[target]))

    def decide(self, step: int, target: int) -> None:
        """Work out which step follows when another plan is wanted: what it does not run has left."""
        after = self._step(without_dropped(self._residents[step], self._target_plans[target]), target)
        self.decisions = self._with_room(self.decisions, self._decisions + 1)
        self.decisions[self._decisions] = target, after, self.steps[step, kernel.STEP_DECISIONS]
        self.steps[step, kernel.STEP_DECISIONS] = self._decisions
        self._decisions += 1

    def join(self, step: int, copy: int) -> None:
        """Work out which step follows when a copy is whole: its blocks run, what they replace has left."""
        target = int(self.steps[step, kernel.STEP_TARGET])
        wanted = copies_between(self.model, self._residents[step], self._target_plans[target])
        done = wanted[copy - int(self.steps[step, kernel.STEP_COPIES_AT])]
        after = self._step(joined(self._residents[step], done), target)
        self.copies[copy, kernel.COPY_AFTER] = after

    def price(self, step: int, held: Iterable[int]) -> None:
        """Work out the nats a token of a request costs in a step, in prefill and in decode.

        Args:
            step: what runs. held: words of the set of MHA blocks whose KV the request holds.
        """
        assert self.quality_nll is not None
        words = [int(word) for word in held]
        layers = layers_of(words)
        self.prices = self._with_room(self.prices, self._prices + 1)
        self.price_nll = self._with_room(self.price_nll, self._prices + 1)
        self.prices[self._prices] = [self.steps[step, kernel.STEP_PRICES], *words]
        self.price_nll[self._prices] = [
            self.quality_nll(plan_for_holder(self._plans[step], layers, decoding=decoding))
            for decoding in (False, True)
        ]
        self.steps[step, kernel.STEP_PRICES] = self._prices
        self._prices += 1

    def _step(self, resident: Resident, target: int) -> int:
        """Return the number of a step; a new one gets its row."""
        known = self._numbers.get((resident, target))
        if known is not None:
            return known
        number = self._numbers[resident, target] = len(self._plans)
        wanted = self._target_plans[target]
        plan = running_plan(resident, wanted)
        self._residents.append(resident)
        self._plans.append(plan)
        copies = copies_between(self.model, resident, wanted)
        self.copies = self._with_room(self.copies, self._copies + len(copies))
        for at, copy in enumerate(copies, start=self._copies):
            row = self.copies[at]
            row[kernel.COPY_LAYER], row[kernel.COPY_MHA], row[kernel.COPY_FFN] = (
                copy.layer,
                copy.mha_bits,
                copy.ffn_bits,
            )
            row[kernel.COPY_BYTES], row[kernel.COPY_NET] = copy.copied_bytes, copy.net_bytes
            row[kernel.COPY_RESTORES] = bool(copy.mha_bits) and not resident.mha_bits[copy.layer]
            row[kernel.COPY_AFTER] = -1
        self.steps = self._with_room(self.steps, number + 1)
        row, model = self.steps[number], self.model
        row[kernel.STEP_TARGET] = target
        row[kernel.STEP_WEIGHT_BYTES] = self._fixed_weight_bytes + resident.weight_bytes(model)
        row[kernel.STEP_KEEP] = self._keep(plan.kv_keep)
        row[kernel.STEP_ADMIT] = -1 if plan.admit is None else plan.admit
        row[kernel.STEP_MAX_RUNNING] = -1 if plan.max_running is None else plan.max_running
        row[kernel.STEP_PREFILL_PARAMS] = model.fixed_params + model.ffn_params * sum(plan.prefill.ffn)
        row[kernel.STEP_DECODE_PARAMS] = model.fixed_params + model.ffn_params * sum(plan.decode.ffn)
        row[kernel.STEP_MHA_PARAMS] = model.mha_params
        row[kernel.STEP_COPIES_AT], row[kernel.STEP_COPIES] = self._copies, len(copies)
        row[kernel.STEP_DECISIONS] = row[kernel.STEP_PRICES] = -1
        self._copies += len(copies)
        layers = zip(plan.weight_bits, plan.prefill.ffn, plan.decode.ffn, strict=True)
        row[kernel.STEP_COLUMNS :] = [
            *words_of(plan.prefill.mha),
            *words_of(plan.decode.mha),
            *plan_layers(plan).ravel(),
            *(value for bits, prefill, decode in layers for value in (WEIGHT_BITS.index(bits), prefill, decode)),
        ]
        return number

    def _keep(self, kv_keep: tuple[KVKeep, ...]) -> int:
        """Return the row of ``keeps`` that says which tokens stay; -1 where all do."""
        if all(layer == KV_KEEP_ALL for layer in kv_keep):
            return -1
        number = self._keep_ids.setdefault(kv_keep, len(self._keep_ids))
        self.keeps = self._with_room(self.keeps, number + 1)
        self.keeps[number] = [layer.tokens(kernel.NEVER) for layer in kv_keep]
        return number

    def _with_room(self, array: NDArray[_A], rows: int) -> NDArray[_A]:
        if rows <= len(array):
            return array
        self.version += 1
        return kernel.longer(array, max(rows, 2 * len(array)))


_A = TypeVar("_A", bound=np.generic)


def words_for(layers: int) -> int:
    """Return how many words a set of layers takes."""
    return -(-layers // kernel.LAYERS_A_WORD)


def words_of(flags: tuple[bool, ...]) -> list[int]:
    """Return the words of a set of layers, from a flag a layer."""
    words = [0] * words_for(len(flags))
    for layer, flag in enumerate(flags):
        words[layer // kernel.LAYERS_A_WORD] |= int(flag) << (layer % kernel.LAYERS_A_WORD)
    return words


def layers_of(words: Iterable[int]) -> frozenset[int]:
    """Return the layers of a set given by its words."""
    found = set()
    for place, word in enumerate(words):
        bits = int(word)
        while bits:
            lowest = bits & -bits
            found.add(place * kernel.LAYERS_A_WORD + lowest.bit_length() - 1)
            bits ^= lowest
    return frozenset(found)
