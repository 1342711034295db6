"""The plan graph: what follows from each plan, computed once in Python and then read by compiled code.

At any time an engine is at a **residency**: the blocks on the device, and the wanted plan. A decision leads from one
residency to another, and so does the end of each copy. The nodes of a `PlanGraph` are the residencies met so far, as
rows of arrays; sim/engine/kernel/plans.py follows the edges. When it needs an edge or a price that is not there yet,
`SimEngine` calls `decide`, `end_copy` or `price`, and the kernel continues.

Shapes: L layers of the model, W = ceil(L / 60) words. A set of layers is W int64 words; layer l is bit l % 60 of word
l // 60. Arrays have spare rows and are replaced by longer ones when full (sim/engine/kernel/state.py lists them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.cost.ffn_width import FULL_WIDTH, ffn_params
from sim.cost.kv_format import HIDDEN_ROW, stores_all
from sim.cost.latency import plan_layers
from sim.cost.memory import fixed_weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KV_BITS, WEIGHT_BITS, KVKeep, Plan
from sim.cost.streaming import stream_rows
from sim.engine import kernel
from sim.engine.kernel.state import COPY, DECISION, LAYER, PRICE, RESIDENCY
from sim.engine.transition import (
    Resident,
    copies_between,
    joined,
    plan_for_holder,
    resident_of,
    running_plan,
    without_dropped,
)


class PlanGraph:
    """The residencies between plans of one model; engines of the same model and quality may share one.

    Its arrays are those of the kernel's state with the same names. ``version`` changes whenever an array is replaced by
    a longer one; then every engine that uses the graph has to read the addresses again.
    """

    def __init__(self, model: ModelSpec, quality_nll: Callable[[Plan], float] | None = None) -> None:
        """Begin an empty graph.

        Args:
            model: the model whose plans these are.
            quality_nll: nats per token that a plan costs (``sim.cost.quality``); None prices nothing.
        """
        self.model, self.quality_nll = model, quality_nll
        self.words = words_for(model.num_layers)
        layers = model.num_layers
        self.residencies = np.zeros(16, dtype=RESIDENCY)
        self.residency_words = np.zeros((16, 2 * self.words), dtype=np.int64)
        self.residency_layers = np.zeros((16, layers), dtype=LAYER)
        self.residency_block_counts = np.zeros((16, 4 * len(WEIGHT_BITS)), dtype=np.int64)
        self.copies = np.zeros(64, dtype=COPY)
        self.decisions = np.zeros(16, dtype=DECISION)
        self.prices = np.zeros(16, dtype=PRICE)
        self.price_words = np.zeros((16, self.words), dtype=np.int64)
        self.kv_format_tokens = np.zeros((1, layers), dtype=np.int64)
        self.kv_format_bits = np.zeros((1, layers), dtype=np.int64)
        self.stream_bytes = np.zeros(1, dtype=np.int64)
        self.stream_shares = np.zeros((1, 2))
        self.version = 0
        self._fixed_weight_bytes = fixed_weight_bytes(model)
        self._targets: dict[Plan, int] = {}
        self._target_plans: list[Plan] = []
        self._numbers: dict[tuple[Resident, int], int] = {}
        self._residents: list[Resident] = []
        self._plans: list[Plan] = []
        self._format_ids: dict[tuple[tuple[KVKeep, ...], tuple[int, ...], bool], int] = {}
        self._streams: dict[Resident, int] = {}
        self._stream_ids: dict[tuple[tuple[int, int], ...], int] = {}
        self._copies = self._decisions = self._prices = self._stream_rows = 0

    def __len__(self) -> int:
        """Return how many residencies there are."""
        return len(self._plans)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that the kernel's state uses, by name."""
        return {name: getattr(self, name) for name in _ARRAYS}

    def target(self, plan: Plan) -> int:
        """Return the number of a plan as a target; the plan must be legal for the model."""
        number = self._targets.get(plan)
        if number is None:
            number = self._targets[plan] = len(self._target_plans)
            self._target_plans.append(plan)
        return number

    def target_plan(self, target: int) -> Plan:
        """Return the plan with this number."""
        return self._target_plans[target]

    def plan(self, residency: int) -> Plan:
        """Return the plan that runs at a residency: the resident blocks of the wanted plan."""
        return self._plans[residency]

    def first(self, target: int) -> int:
        """Return the residency at which all blocks of a plan are on the device."""
        return self._residency(resident_of(self._target_plans[target]), target)

    def take_from(self, other: PlanGraph, residency: int) -> int:
        """Copy a residency of another graph into this empty one; return its number here.

        ``kv_format_id`` and ``stream_id`` stay.
        """
        self._stream_ids = dict(other._stream_ids)
        self.kv_format_tokens, self.kv_format_bits = other.kv_format_tokens.copy(), other.kv_format_bits.copy()
        self._format_ids = dict(other._format_ids)
        target = int(other.residencies["target"][residency])
        return self._residency(other._residents[residency], self.target(other._target_plans[target]))

    def decide(self, residency: int, target: int) -> None:
        """Add the edge of a decision: the residency after dropping the blocks that ``target`` does not run."""
        after = self._residency(without_dropped(self._residents[residency], self._target_plans[target]), target)
        self._make_room(self._decisions + 1, "decisions")
        self.decisions[self._decisions] = target, after, self.residencies["first_decision"][residency]
        self.residencies["first_decision"][residency] = self._decisions
        self._decisions += 1

    def end_copy(self, residency: int, copy: int) -> None:
        """Add the edge of a complete copy: the residency where its blocks run and those they replace are freed."""
        target = int(self.residencies["target"][residency])
        wanted = copies_between(self.model, self._residents[residency], self._target_plans[target])
        done = wanted[copy - int(self.residencies["copies_at"][residency])]
        after = self._residency(joined(self._residents[residency], done), target)
        self.copies["after"][copy] = after

    def price(self, residency: int, held: Iterable[int]) -> None:
        """Add the nats that a token of a request costs at a residency, in prefill and in decode.

        Args:
            residency: what runs. held: int64[W], the set of MHA blocks whose KV the request holds.
        """
        assert self.quality_nll is not None
        words = [int(word) for word in held]
        layers = layers_of(words)
        self._make_room(self._prices + 1, "prices", "price_words")
        prefill_nll, decode_nll = (
            self.quality_nll(plan_for_holder(self._plans[residency], layers, decoding=decoding))
            for decoding in (False, True)
        )
        self.prices[self._prices] = self.residencies["first_price"][residency], prefill_nll, decode_nll
        self.price_words[self._prices] = words
        self.residencies["first_price"][residency] = self._prices
        self._prices += 1

    def _residency(self, resident: Resident, target: int) -> int:
        """Return the number of a residency; a new one gets its rows."""
        known = self._numbers.get((resident, target))
        if known is not None:
            return known
        number = self._numbers[resident, target] = len(self._plans)
        wanted, model = self._target_plans[target], self.model
        plan = running_plan(resident, wanted)
        self._residents.append(resident)
        self._plans.append(plan)
        copies = copies_between(model, resident, wanted)
        self._make_room(self._copies + len(copies), "copies")
        for at, copy in enumerate(copies, start=self._copies):
            restores = bool(copy.mha_bits) and not resident.mha_bits[copy.layer]
            # In the order of the fields of COPY; the last, ``after``, is not known yet.
            blocks = copy.layer, copy.mha_bits, copy.ffn_bits, copy.ffn_width
            self.copies[at] = *blocks, copy.copied_bytes, copy.net_bytes, restores, -1
        row = {
            "target": target,
            "weight_bytes": self._fixed_weight_bytes + resident.weight_bytes(model),
            "kv_format_id": self._format_id(plan),
            "kv_percent": 100 if plan.kv_compression is None else plan.kv_compression.percent,
            "stream_id": self._stream_id(resident),
            "streams_at": self._streams_at(resident),
            "streams": len(resident.crossing()),
            "kv_only": sum(plan.kv_only),
            "cuts_ffn": plan.cuts_ffn,
            "max_waiting": -1 if plan.max_waiting is None else plan.max_waiting,
            "max_wait_s": math.inf if plan.max_wait_s is None else plan.max_wait_s,
            "max_running": -1 if plan.max_running is None else plan.max_running,
            "prefill_params": model.fixed_params + ffn_params(model, plan.ffn_width, plan.prefill.ffn),
            "decode_params": model.fixed_params + ffn_params(model, plan.ffn_width, plan.decode.ffn),
            "mha_params": model.mha_params,
            "copies_at": self._copies,
            "copies": len(copies),
            "first_decision": -1,
            "first_price": -1,
        }
        self._copies += len(copies)
        self._make_room(number + 1, "residencies", "residency_words", "residency_layers", "residency_block_counts")
        self.residencies[number] = tuple(row[name] for name in RESIDENCY.names or ())
        self.residency_words[number] = [*words_of(plan.prefill.mha), *words_of(plan.decode.mha)]
        self.residency_block_counts[number] = plan_layers(plan).ravel()
        self.residency_layers[number] = [
            (WEIGHT_BITS.index(bits), prefill, decode, kv_only, FULL_WIDTH - width)
            for bits, prefill, decode, kv_only, width in zip(
                plan.product_bits, plan.prefill.ffn, plan.decode.ffn, plan.kv_only, plan.ffn_width, strict=True
            )
        ]
        return number

    def _format_id(self, plan: Plan) -> int:
        """Return the row of ``kv_format_tokens`` and ``kv_format_bits``; -1 for all tokens of all layers at 16 bits."""
        if stores_all(plan):
            return -1
        form = plan.kv_keep, plan.kv_bits, plan.kv_hidden
        number = self._format_ids.setdefault(form, len(self._format_ids))
        self._make_room(number + 1, "kv_format_tokens", "kv_format_bits")
        self.kv_format_tokens[number] = [layer.tokens(kernel.NEVER) for layer in plan.kv_keep]
        self.kv_format_bits[number] = [HIDDEN_ROW if plan.kv_hidden else KV_BITS.index(bits) for bits in plan.kv_bits]
        return number

    def _stream_id(self, resident: Resident) -> int:
        """Return the number of what crosses the link in each iteration; -1 for nothing."""
        if not (layers := resident.crossing()):
            return -1
        sizes = resident.layer_bytes(self.model)
        return self._stream_ids.setdefault(tuple((layer, sizes[layer]) for layer in layers), len(self._stream_ids))

    def _streams_at(self, resident: Resident) -> int:
        """Return the first row of ``stream_bytes`` and ``stream_shares`` for these layers; -1 if none is streamed."""
        if not resident.crossing():
            return -1
        known = self._streams.get(resident)
        if known is not None:
            return known
        sizes, shares = stream_rows(resident.layer_bytes(self.model), resident.blocks(), resident.streamed)
        at = self._streams[resident] = self._stream_rows
        self._stream_rows += len(sizes)
        self._make_room(self._stream_rows, "stream_bytes", "stream_shares")
        self.stream_bytes[at : self._stream_rows], self.stream_shares[at : self._stream_rows] = sizes, shares
        return at

    def _make_room(self, rows: int, *names: str) -> None:
        """Make arrays long enough for this many rows."""
        for name in names:
            array = getattr(self, name)
            if rows > len(array):
                self.version += 1
                setattr(self, name, kernel.longer(array, max(rows, 2 * len(array))))


_ARRAYS = (
    "residencies", "residency_words", "residency_layers", "residency_block_counts", "copies", "decisions", "prices",
    "price_words", "kv_format_tokens", "kv_format_bits", "stream_bytes", "stream_shares",
)  # fmt: skip


def words_for(layers: int) -> int:
    """Return W, the number of words of a set of layers."""
    return -(-layers // kernel.LAYERS_A_WORD)


def words_of(flags: tuple[bool, ...]) -> list[int]:
    """Return the words of a set of layers, from one flag per layer."""
    words = [0] * words_for(len(flags))
    for layer, flag in enumerate(flags):
        words[layer // kernel.LAYERS_A_WORD] |= int(flag) << (layer % kernel.LAYERS_A_WORD)
    return words


def layers_of(words: Iterable[int]) -> frozenset[int]:
    """Return the layers of a set from its words."""
    found = set()
    for place, word in enumerate(words):
        bits = int(word)
        while bits:
            lowest = bits & -bits
            found.add(place * kernel.LAYERS_A_WORD + lowest.bit_length() - 1)
            bits ^= lowest
    return frozenset(found)
