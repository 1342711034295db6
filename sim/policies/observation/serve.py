"""What a serving policy observes and can choose: rates and states of the engine, and a table of plans.

``ServeObserver`` turns the history of ``EngineState`` into numbers; they contain no output length, and nothing of the
future except announced changes of the budget. ``serve_actions`` lists plans: a number of dropped blocks of an order, a
number of layers at low precision, and admission limits in requests and in seconds; if asked for, also streamed layers,
narrower FFN blocks, KV at fewer bits, compressed KV, products at fewer bits, and layers in which prompts only write KV.
An action is a pair: the weights (and which of them are streamed), and what can change at any time without a copy: all
else. ``groups`` numbers the weights.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np

from sim.cost.ffn_width import FFN_WIDTHS, FULL_WIDTH
from sim.cost.memory import weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import (
    KV_BITS,
    WEIGHT_BITS,
    KVCompression,
    Plan,
    check_plan,
    dense_plan,
    drop,
    is_positive,
    nested_bits,
    with_mask,
)
from sim.cost.streaming import nested_layers
from sim.engine import batch_step
from sim.engine.protocol import EngineState
from sim.errors import ConfigError, PlanError, nearest
from sim.immutable import Immutable
from sim.limits import is_whole
from sim.policies.greedy_stop import block_of
from sim.policies.observation.prune import Entry, ObservationSpec
from sim.policies.orders import check_made_for
from sim.policies.pop import layer_order
from sim.types import Bools, Floats, Floats32, Ints

# --- Actions ---------------------------------------------------------------------------------------------------------


LEFT_ALONE = ("KV16", "products at 16", "KV only 0", "KV whole", "streamed 0", "FFN 8/8")
"""What a name says of knobs that a plan leaves alone."""
HIDDEN = "hidden"
"""In a list of ``kv_bits``: hidden states in place of keys and values."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The action that runs, and when it last changed the weights."""

    action: int = 0
    changed_s: float = -math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeActions(Immutable):
    """The plans to choose from.

    levels: for each plan, its position in the lists of drops, low layers and admission limits, in [0, 1].
    extra_entries: what is observed in addition, where plans differ in what the levels do not say.
    extras: for each plan, the values of these entries.
    groups: plans with the same number have the same weights. low: whether a plan has layers at low precision.
    low_bits: whether the server has low-precision copies of the weights; plans that need them are illegal otherwise.
    starts: the plan before the first decision: with low-precision copies, and without.
    dwell_s: shortest time between two changes of the weights, unless they no longer fit; the admission limit may change
        at any time.
    """

    names: tuple[str, ...]
    plans: tuple[Plan, ...]
    weights_bytes: tuple[int, ...]
    levels: tuple[tuple[float, float, float], ...]
    extra_entries: tuple[Entry, ...]
    extras: tuple[tuple[float, ...], ...]
    groups: tuple[int, ...]
    low: tuple[bool, ...]
    dwell_s: float
    workspace_bytes: int
    low_bits: bool = True
    starts: tuple[int, int] = (0, 0)
    _there: Bools = field(init=False, repr=False, compare=False)
    _weights: Ints = field(init=False, repr=False, compare=False)
    _groups: Ints = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Keep what every decision reads as arrays: which plans the server has, their weights, and their groups."""
        there = np.ones(len(self.plans), dtype=np.bool_) if self.low_bits else ~np.array(self.low)
        arrays = {"_there": there, "_weights": np.array(self.weights_bytes), "_groups": np.array(self.groups)}
        for name, values in arrays.items():
            values.setflags(write=False)
            object.__setattr__(self, name, values)

    def without_low_bits(self) -> ServeActions:
        """Return the same table for a server that has no low-precision copies of the weights."""
        return replace(self, low_bits=False)

    @property
    def start(self) -> int:
        """The number of the plan that runs before the first decision."""
        return self.starts[0 if self.low_bits else 1]

    @property
    def heads(self) -> tuple[int, int]:
        """The numbers of weights and of limits: an action is a pair, numbered limit fastest."""
        return self.groups[-1] + 1, self.limits

    @property
    def limits(self) -> int:
        """The number of choices that need no copy; action = weights x limits + limit."""
        return len(self.plans) // (self.groups[-1] + 1)

    def named(self, name: str) -> int:
        """Return the number of a plan by its name; knobs that it leaves alone may be left out of the name.

        Raises:
            ConfigError: if there is no such plan.
        """
        for number, full in enumerate(self.names):
            rest = full[len(name) :].split(", ")[1:]
            if full == name or (full.startswith(f"{name}, ") and set(rest) <= set(LEFT_ALONE)):
                return number
        raise ConfigError(f"there is no plan {name!r} in the table; {nearest(name, self.names)}")

    def legal(self, state: EngineState, choice: Choice) -> Bools:
        """Return which plans are legal now, bool[plans]: their weights fit the budget, and the dwell time allows them.

        If no plan's weights fit, the plans with the smallest weights are legal.
        """
        there, weights = self._there, self._weights
        fits: Bools = there & (weights <= state.budget_bytes - self.workspace_bytes)
        if not fits.any():
            smallest: Bools = there & (weights == weights[there].min())
            return smallest
        if self.dwell_left(state, choice) > 0.0:
            same = fits & (self._groups == self.groups[choice.action])
            return same if same.any() else fits
        return fits

    def dwell_left(self, state: EngineState, choice: Choice) -> float:
        """Return the share of the dwell time that is left, in [0, 1]."""
        if not self.dwell_s:
            return 0.0
        return max(0.0, 1.0 - (state.time_s - choice.changed_s) / self.dwell_s)

    def chosen(self, state: EngineState, choice: Choice, action: int) -> Choice:
        """Return the new choice after an action in this state."""
        if self.groups[action] == self.groups[choice.action]:
            return Choice(action, choice.changed_s)
        return Choice(action, state.time_s)


def serve_actions(
    model: ModelSpec,
    *,
    order: Sequence[str] = (),
    made_for: str | None = None,
    drops: Sequence[int] = (0,),
    low_layers: Sequence[int] = (0,),
    low_bits: int = 4,
    admits: Sequence[int | None] = (None,),
    waits: Sequence[float | None] = (None,),
    runs: Sequence[int | None] = (None,),
    kv_bits: Sequence[int | str] = (16,),
    compute_bits: Sequence[int] = (16,),
    kv_only: Sequence[int] = (0,),
    kv_compression: Sequence[Mapping[str, Any] | None] = (None,),
    streamed: Sequence[int] = (0,),
    ffn_width: Sequence[int] = (FULL_WIDTH,),
    start_drops: int | None = None,
    dwell_s: float = 0.0,
    workspace_bytes: int = 0,
) -> ServeActions:
    """Return the plans of all combinations of the lists.

    Args:
        order: blocks in the order of dropping. drops: how many of its first blocks to drop.
        made_for: the model on which the order was measured; None accepts any model.
        low_layers: how many of the first layers run at ``low_bits``.
        admits: limits of waiting requests, None for no limit.
        waits: how long a request may wait for its admission, in seconds; None for no limit.
        runs: how many requests may run at once, which bounds the time per token; None for the engine's own limit.
        kv_bits: at how many bits requests keep their KV from now on: 16, 8 or 4 in all layers, or ``hidden`` for hidden
            states in its place.
        compute_bits: at how many bits products run, as near as the resident weights allow: 8 reads the first half of
            weights of 16 bits (``sim.cost.plan.nested_bits``); 16 uses all that is resident.
        kv_only: in how many layers prompts only write KV (POP): the first of ``sim.policies.pop.layer_order``.
        kv_compression: how the KV of prompts is compressed from now on, such as ``{method: ada_kv, percent: 70}``; None
            for not at all. Hidden states are not compressed: there are no plans with both.
        streamed: how many layers are streamed from the host (``sim.cost.streaming.nested_layers``): 0, or 3 or more.
        ffn_width: how many eighths of the channels of all FFN blocks run: 8, 7, 6 or 5.
        start_drops: None starts with the first plan. A number starts with the most layers at low precision and nothing
            dropped, or, where there are no copies, with at least this many blocks dropped, as far as the table goes. An
            engine refuses prompts that do not fit the memory that its first plan leaves for KV, so a start with full
            weights can refuse long ones forever.
        dwell_s, workspace_bytes: as in ``ServeActions``.
    Raises:
        PlanError: for a plan that is not legal, or an order made for another model.
        ConfigError: for a list that is empty, or has an entry that is not allowed, or one twice, or if there is no plan
            with hidden states, though they are asked for.
    """
    check_made_for(model, made_for, "actions")
    if not is_positive(dwell_s) and dwell_s != 0.0:
        raise ConfigError(f"actions.dwell_s is {dwell_s!r:.80}; it must be a finite number of seconds from 0 on")
    if start_drops is not None and not (is_whole(start_drops) and start_drops >= 0):
        raise ConfigError(
            f"actions.start_drops is {start_drops!r:.80}; it must be a whole number of blocks from 0 on, or null"
        )
    _check_lists(
        model,
        len(order),
        drops=drops,
        low_layers=low_layers,
        admits=admits,
        waits=waits,
        runs=runs,
        kv_bits=kv_bits,
        compute_bits=compute_bits,
        kv_only=kv_only,
        kv_compression=kv_compression,
        streamed=streamed,
        ffn_width=ffn_width,
    )
    held_ways = [_compression(way) for way in kv_compression]
    if HIDDEN in kv_bits and None not in held_ways:
        raise ConfigError(
            f"actions.kv_bits has {HIDDEN}, and every entry of actions.kv_compression compresses KV; hidden states are "
            f"not compressed: add null to kv_compression, or leave {HIDDEN} out"
        )
    limits = tuple(product(admits, waits, runs))
    stored = [(kept, held) for kept, held in product(kv_bits, held_ways) if kept != HIDDEN or held is None]
    free = tuple(product(stored, compute_bits, kv_only, enumerate(limits)))
    prompts_least_need = layer_order(model, None)
    dense = dense_plan(model)
    blocks = [block_of(name) for name in order]
    names, plans, levels, extras = [], [], [], []
    far_apart = nested_layers(model.num_layers)
    # Streamed layers and bits of KV are observed together, as tables with either of them always were.
    memory = len(streamed) > 1 or len(kv_bits) > 1
    observed = memory, memory, len(compute_bits) > 1, len(kv_only) > 1, len(held_ways) > 1, len(ffn_width) > 1
    per_precision = len(streamed) * len(ffn_width)
    moved = tuple(product(enumerate(streamed), ffn_width))
    combinations = product(enumerate(drops), enumerate(low_layers), moved, free)
    for (i, gone), (j, low), ((s, crossing), width), ((kept, held), compute, writing, (k, limit)) in combinations:
        mask = drop(
            model,
            mha=[layer for kind, layer in blocks[:gone] if kind == "MHA"],
            ffn=[layer for kind, layer in blocks[:gone] if kind == "FFN"],
        )
        bits = (low_bits,) * low + (model.weight_bits,) * (model.num_layers - low)
        max_waiting, max_wait_s, max_running = limit
        plan = replace(
            with_mask(dense, mask),
            weight_bits=bits,
            kv_bits=(kept if isinstance(kept, int) else 16,) * model.num_layers,
            kv_hidden=kept == HIDDEN,
            compute_bits=tuple(nested_bits(each, compute) for each in bits),
            kv_only=tuple(layer in prompts_least_need[:writing] for layer in range(model.num_layers)),
            kv_compression=held,
            ffn_width=(width,) * model.num_layers,
            streamed=tuple(layer in far_apart[:crossing] for layer in range(model.num_layers)),
            max_waiting=max_waiting,
            max_wait_s=max_wait_s,
            max_running=max_running,
        )
        check_plan(model, plan)
        names.append(
            f"drop {gone}, W{low_bits} {low}, {_limit_name(*limit)}"
            + (f", KV{' ' * (kept == HIDDEN)}{kept}" if len(kv_bits) > 1 else "")
            + (f", products at {compute}" if len(compute_bits) > 1 else "")
            + (f", KV only {writing}" if len(kv_only) > 1 else "")
            + (f", KV {_compression_name(held)}" if len(held_ways) > 1 else "")
            + (f", streamed {crossing}" if len(streamed) > 1 else "")
            + (f", FFN {width}/8" if len(ffn_width) > 1 else "")
        )
        plans.append(plan)
        moves = s / max(1, len(streamed) - 1), kept / 16 if isinstance(kept, int) else 0.0
        stays = 1.0 if held is None else held.percent / 100
        shown = compute / 16, kv_only.index(writing) / max(1, len(kv_only) - 1), stays, width / FULL_WIDTH
        extras.append(tuple(value for value, differs in zip((*moves, *shown), observed, strict=True) if differs))
        steps = ((i, drops), (j, low_layers), (k, limits))
        one, two, three = (at / max(1, len(of) - 1) for at, of in steps)
        levels.append((one, two, three))
    enough = min((gone for gone in drops if gone >= (start_drops or 0)), default=max(drops))
    each = len(free)
    dropping = 0 if start_drops is None else list(drops).index(enough) * len(low_layers) * per_precision * each
    lowest = 0 if start_drops is None else list(low_layers).index(max(low_layers)) * per_precision * each
    return ServeActions(
        names=tuple(names),
        plans=tuple(plans),
        weights_bytes=tuple(weight_bytes(model, plan) for plan in plans),
        levels=tuple(levels),
        extra_entries=tuple(entry for entry, differs in zip(EXTRA_ENTRIES, observed, strict=True) if differs),
        extras=tuple(extras),
        groups=tuple(number // each for number in range(len(plans))),
        low=tuple(min(plan.weight_bits) < model.weight_bits for plan in plans),
        dwell_s=dwell_s,
        workspace_bytes=workspace_bytes,
        starts=(lowest if max(low_layers) else dropping, dropping),
    )


LIST_EXAMPLES = {
    "drops": "[0, 4]",
    "low_layers": "[0, 16]",
    "admits": "[null, 8]",
    "waits": "[null, 1.5]",
    "runs": "[null, 64]",
    "kv_bits": "[16, 8]",
    "compute_bits": "[16, 8]",
    "kv_only": "[0, 10]",
    "kv_compression": "[null, {method: ada_kv, percent: 70}]",
    "streamed": "[0, 8]",
    "ffn_width": "[8, 7]",
}
"""Of each list of ``serve_actions``, for messages."""


def _check_lists(model: ModelSpec, blocks: int, **lists: Sequence[Any]) -> None:
    """Check the lists of ``serve_actions``; ``blocks`` is the length of the order.

    Raises:
        ConfigError: for a list that is empty, or has an entry that is not allowed, or one twice.
    """
    for name, values in lists.items():
        if isinstance(values, str | Mapping) or not isinstance(values, Sequence) or not values:
            raise ConfigError(
                f"actions.{name} is {values!r:.80}; it must be a list of at least one entry, such as "
                f"{LIST_EXAMPLES[name]}"
            )
        if len({repr(value) for value in values}) < len(values):
            raise ConfigError(f"actions.{name} is {list(values)!r:.80}; an entry is there twice, leave one out")
    layers = model.num_layers, f"the layers of {model.name}"
    for name, (most, what) in {
        "drops": (blocks, "the length of actions.order"),
        "low_layers": layers,
        "streamed": layers,
        "kv_only": layers,
    }.items():
        if any(not is_whole(count) or not 0 <= count <= most for count in lists[name]):
            raise ConfigError(
                f"actions.{name} is {list(lists[name])!r:.80}; the entries must be whole numbers from 0 to {most}, "
                f"{what}"
            )
    for name, numbers, names in (
        ("kv_bits", KV_BITS, (HIDDEN,)),
        ("compute_bits", WEIGHT_BITS, ()),
        ("ffn_width", FFN_WIDTHS, ()),
    ):
        if any(bits not in names and not (is_whole(bits) and bits in numbers) for bits in lists[name]):
            allowed = ", ".join((*map(str, numbers), *names))
            raise ConfigError(f"actions.{name} is {list(lists[name])!r:.80}; allowed are {allowed}")


def _compression(way: Mapping[str, Any] | None) -> KVCompression | None:
    """Return a way to compress KV from a configuration.

    Raises:
        ConfigError: unless it is null, or has a method and a percent. PlanError: for a method or percent not allowed.
    """
    if way is None:
        return None
    if not isinstance(way, Mapping) or set(way) != {"method", "percent"}:
        raise ConfigError(
            f"actions.kv_compression has {way!r:.80}; an entry is null, or a method and the percent of a prompt's "
            "bytes that stay, such as {method: ada_kv, percent: 70}"
        )
    try:
        return KVCompression(method=way["method"], percent=way["percent"])
    except PlanError as error:
        raise PlanError(f"actions.kv_compression: {error}") from error


def _compression_name(way: KVCompression | None) -> str:
    return "whole" if way is None else f"{way.method} {way.percent}%"


def _limit_name(max_waiting: int | None, max_wait_s: float | None, max_running: int | None) -> str:
    queue = f"queue {'any' if max_waiting is None else max_waiting}"
    wait = "" if max_wait_s is None else f", wait {max_wait_s:g} s"
    return queue + wait + ("" if max_running is None else f", run {max_running}")


# --- Observations ----------------------------------------------------------------------------------------------------

SMOOTHING_S = (1.0, 10.0, 60.0)
SERVER_ENTRIES = (
    Entry("waiting", "log2(1 + requests) / 10", 0.0, 1.0, "requests that wait"),
    Entry("waiting_tokens", "log2(1 + tokens) / 20", 0.0, 1.0, "their prompts"),
    Entry("oldest_wait", "s / 2", 0.0, 2.0, "how long the head of the queue has waited"),
    Entry("running", "log2(1 + requests) / 10", 0.0, 1.0, "requests that run"),
    Entry("running_tokens", "log2(1 + tokens) / 20", 0.0, 1.0, "tokens whose KV is held"),
    Entry("kv_used", "share", 0.0, 1.0, "of the KV pool"),
    Entry("kv_pool", "of dense weights / 8", 0.0, 1.0, "bytes of the KV pool"),
    Entry("budget", "of dense weights / 8", 0.0, 1.0, "memory there is"),
    Entry("weights", "of dense weights", 0.0, 1.0, "bytes of what is resident"),
    Entry("next_budget", "of dense weights / 8", -1.0, 1.0, "announced change of the budget, 0 when none is"),
    Entry("next_budget_soon", "exp(-s / 10)", 0.0, 1.0, "how near that change is"),
    Entry("arrivals_1s", "log2(1 + requests/s) / 8", 0.0, 1.0, "arrival rate, smoothed over a second"),
    Entry("arrivals_10s", "log2(1 + requests/s) / 8", 0.0, 1.0, "over ten"),
    Entry("arrivals_60s", "log2(1 + requests/s) / 8", 0.0, 1.0, "over sixty"),
    Entry("prompts_1s", "log2(1 + tokens/s) / 16", 0.0, 1.0, "prompt tokens that arrive, smoothed over a second"),
    Entry("prompts_10s", "log2(1 + tokens/s) / 16", 0.0, 1.0, "over ten"),
    Entry("first_tokens_10s", "log2(1 + requests/s) / 8", 0.0, 1.0, "first tokens given, over ten seconds"),
    Entry("ttft_10s", "s / 2", 0.0, 2.0, "mean TTFT of those"),
    Entry("produced_10s", "log2(1 + tokens/s) / 16", 0.0, 1.0, "tokens produced, over ten seconds"),
    Entry("busy_10s", "share", 0.0, 1.0, "time in iterations, over ten seconds"),
    Entry("preemptions_10s", "log2(1 + requests/s) / 8", 0.0, 1.0, "preemptions, over ten seconds"),
    Entry("rejected_10s", "log2(1 + requests/s) / 8", 0.0, 1.0, "rejections, over ten seconds"),
    Entry("copying", "flag", 0.0, 1.0, "whether weights are being copied in"),
    Entry("dwell_left", "share", 0.0, 1.0, "of the time for which the weights may not be changed again"),
    Entry("level_drop", "share", 0.0, 1.0, "how far along the drops the present choice is"),
    Entry("level_low", "share", 0.0, 1.0, "how far along the layers at low precision"),
    Entry("level_admit", "share", 0.0, 1.0, "how far along the admission limits"),
)
"""What a server observes of itself; the first entries of every policy that serves."""
SERVE_ENTRIES = (
    *SERVER_ENTRIES,
    Entry("slowdown", "log2(measured / calibrated) / 2", -1.0, 1.0, "time of iterations, over sixty seconds"),
    Entry("tpot_headroom", "share", -1.0, 1.0, "1 - mean iteration / TPOT target, over ten seconds"),
    Entry("low_bits", "flag", 0.0, 1.0, "whether there are low-precision copies of the weights"),
    Entry("low_loss", "nats / 0.4", 0.0, 1.0, "loss per token with all layers at low precision"),
    Entry("outputs_60s", "log2(1 + tokens) / 12", 0.0, 1.0, "tokens produced per request that finished, over sixty"),
    Entry("wait_limit", "s / 2", 0.0, 1.0, "longest wait for admission, 1 without a limit"),
    Entry("run_limit", "log2(1 + requests) / 10", 0.0, 1.0, "requests that may run at once, 1 without a limit"),
)


EXTRA_ENTRIES = (
    Entry("level_streamed", "share", 0.0, 1.0, "how far along the numbers of streamed layers the present choice is"),
    Entry("kv_bits", "bits / 16", 0.0, 1.0, "at which requests keep their KV from now on; 0 for hidden states"),
    Entry("compute_bits", "bits / 16", 0.0, 1.0, "the most bits at which products run"),
    Entry("level_kv_only", "share", 0.0, 1.0, "how far along the numbers of layers in which prompts only write KV"),
    Entry("kv_stays", "share", 0.0, 1.0, "of the bytes of a prompt's KV, when it is compressed from now on"),
    Entry("ffn_width", "share", 0.0, 1.0, "of the channels of FFN blocks that the present choice runs"),
)
"""Observed in addition where plans differ in them."""


def serve_table(actions: ServeActions) -> ObservationSpec:
    """Return the table of ``ServeTrace``."""
    return ObservationSpec(SERVE_ENTRIES + actions.extra_entries, actions.names)


def replica_table(actions: ServeActions) -> ObservationSpec:
    """Return the table of policies that observe only what a server reports of itself."""
    return ObservationSpec(SERVER_ENTRIES, actions.names)


def low_precision_loss(model: ModelSpec, actions: ServeActions, nll: Callable[[Plan], float]) -> float:
    """Return what all layers at low precision lose, in nats per token; 0 for a table without low precision.

    Args:
        nll: nats per token of a plan.
    """
    lowest = [plan for plan in actions.plans if min(plan.weight_bits) < model.weight_bits]
    if not lowest:
        return 0.0
    dense = dense_plan(model)
    bits = (min(min(plan.weight_bits) for plan in lowest),) * model.num_layers
    return max(0.0, nll(replace(dense, weight_bits=bits)) - nll(dense))


_ALL_COUNTERS = (
    "arrived", "arrived_prompt_tokens", "first_tokens", "ttft_sum_s", "produced_tokens", "busy_s", "preemptions",
    "rejected", "priced_s", "iterations", "finished",
)  # fmt: skip
PRICED_LEAST = 1e-6
"""Share of time in iterations below which a server counts as idle: it shows no speed."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What stays constant while a server is observed.

    tpot_s: the SLO's target of the time per output token, seconds; ``inf`` for none.
    low_loss: nats per token that all layers at low precision lose.
    """

    tpot_s: float = math.inf
    low_loss: float = 0.0


@dataclass(slots=True)
class ServeObserver:
    """Turns successive states into observations; each replay needs a new one.

    counters: the counters of the last state. rates: their smoothed rates per second, one list per ``SMOOTHING_S``.
    """

    model: ModelSpec
    actions: ServeActions
    kv_block_layer_bytes: int
    terms: Terms = Terms()
    dense_bytes: float = 0.0
    time_s: float = 0.0
    counters: tuple[float, ...] = (0.0,) * len(_ALL_COUNTERS)
    rates: list[list[float]] = field(default_factory=lambda: [[0.0] * len(_ALL_COUNTERS) for _ in SMOOTHING_S])

    def __post_init__(self) -> None:
        self.dense_bytes = float(weight_bytes(self.model, dense_plan(self.model)))

    def __call__(self, state: EngineState, choice: Choice) -> Floats32:
        """Return the features at this state, float32[entries]; ``choice``: what runs now."""
        self._smooth(state)
        second, ten, sixty = self.rates
        dense = self.dense_bytes
        change = (state.next_budget_bytes - state.budget_bytes) / dense / 8.0
        soon = math.exp(-(state.next_budget_s - state.time_s) / 10.0) if math.isfinite(state.next_budget_s) else 0.0
        first_tokens_rps = ten[2]
        pool = state.kv_layer_blocks
        values = (
            log_scaled(state.waiting, 10.0),
            log_scaled(state.waiting_tokens, 20.0),
            min(state.oldest_wait_s / 2.0, 2.0),
            log_scaled(state.running, 10.0),
            log_scaled(state.running_tokens, 20.0),
            min(state.kv_used_layer_blocks / pool, 1.0) if pool else 1.0,
            min(pool * self.kv_block_layer_bytes / dense / 8.0, 1.0),
            min(state.budget_bytes / dense / 8.0, 1.0),
            min(state.weight_bytes / dense, 1.0),
            max(-1.0, min(change, 1.0)),
            soon,
            log_scaled(second[0], 8.0),
            log_scaled(ten[0], 8.0),
            log_scaled(sixty[0], 8.0),
            log_scaled(second[1], 16.0),
            log_scaled(ten[1], 16.0),
            log_scaled(first_tokens_rps, 8.0),
            min(ten[3] / first_tokens_rps / 2.0, 2.0) if first_tokens_rps > 1e-6 else 0.0,
            log_scaled(ten[4], 16.0),
            min(ten[5], 1.0),
            log_scaled(ten[6], 8.0),
            log_scaled(ten[7], 8.0),
            1.0 if state.incoming_bytes else 0.0,
            self.actions.dwell_left(state, choice),
            *self.actions.levels[choice.action],
            _bounded(math.log2(sixty[5] / sixty[8]) / 2.0) if min(sixty[5], sixty[8]) > PRICED_LEAST else 0.0,
            _bounded(1.0 - ten[5] / max(ten[9], 1e-12) / self.terms.tpot_s) if ten[5] > PRICED_LEAST else 1.0,
            float(self.actions.low_bits),
            min(self.terms.low_loss / 0.4, 1.0) if self.actions.low_bits else 0.0,
            log_scaled(sixty[4] / sixty[10], 12.0) if sixty[10] > 1e-6 else 0.0,
            *limit_entries(self.actions.plans[choice.action]),
            *self.actions.extras[choice.action],
        )
        return np.array(values, dtype=np.float32)

    def _smooth(self, state: EngineState) -> None:
        """Update the smoothed rates to a state."""
        passed_s = state.time_s - self.time_s
        counters = tuple(float(getattr(state, name)) for name in _ALL_COUNTERS)
        if passed_s > 0.0:
            now = [(new - old) / passed_s for new, old in zip(counters, self.counters, strict=True)]
            for rates, scale_s in zip(self.rates, SMOOTHING_S, strict=True):
                weight = 1.0 - math.exp(-passed_s / scale_s)
                for i, rate in enumerate(now):
                    rates[i] += weight * (rate - rates[i])
            self.time_s, self.counters = state.time_s, counters


def limit_entries(plan: Plan) -> tuple[float, float]:
    """Return the entries ``wait_limit`` and ``run_limit`` of a plan."""
    wait = 1.0 if plan.max_wait_s is None else min(plan.max_wait_s / 2.0, 1.0)
    return wait, 1.0 if plan.max_running is None else log_scaled(plan.max_running, 10.0)


def _bounded(value: float) -> float:
    return max(-1.0, min(value, 1.0))


def log_scaled(value: float, scale: float) -> float:
    """Return log2(1 + value) / scale, at most 1; a value below 0 counts as 0."""
    return min(math.log2(1.0 + max(value, 0.0)) / scale, 1.0)


@dataclass(slots=True)
class ServeObservers:
    """Does for n engines at once what ``ServeObserver`` and ``ServeActions`` do for one; both give the same numbers.

    action, changed_s: int64[n] and float64[n], the `Choice` of each engine. dense_bytes: of the dense model's weights.
    """

    model: ModelSpec
    actions: ServeActions
    kv_block_layer_bytes: int
    size: int
    tpot_s: float = math.inf
    action: Ints = field(init=False)
    changed_s: Floats = field(init=False)
    _time_s: Floats = field(init=False)
    _counters: Floats = field(init=False)
    _rates: Floats = field(init=False)
    dense_bytes: float = field(init=False)
    _levels: Floats = field(init=False)
    _limits: Floats = field(init=False)
    _extras: Floats = field(init=False)
    _weights: Floats = field(init=False)
    _groups: Ints = field(init=False)
    _needs_low: Bools = field(init=False)
    _low_bits: Bools = field(init=False)
    _low_loss: Floats = field(init=False)

    def __post_init__(self) -> None:
        n, counters = self.size, len(_COUNTER_COLUMNS)
        self.dense_bytes = float(weight_bytes(self.model, dense_plan(self.model)))
        self._levels = np.array(self.actions.levels)
        self._limits = np.array([limit_entries(plan) for plan in self.actions.plans])
        self._extras = np.array(self.actions.extras).reshape(len(self.actions.plans), -1)
        self._weights = np.array(self.actions.weights_bytes, dtype=np.float64)
        self._groups, self._needs_low = np.array(self.actions.groups), np.array(self.actions.low)
        self._low_bits, self._low_loss = np.full(n, self.actions.low_bits), np.zeros(n)
        self.action, self.changed_s = np.zeros(n, dtype=np.int64), np.full(n, -math.inf)
        self._time_s, self._counters = np.zeros(n), np.zeros((n, counters))
        self._rates = np.zeros((len(SMOOTHING_S), n, counters))

    def begin(self, at: int, *, low_bits: bool = True, low_loss: float = 0.0) -> None:
        """Begin a new episode at position ``at``; ``low_bits`` as in ``ServeActions``, ``low_loss`` as in ``Terms``."""
        self._low_bits[at], self._low_loss[at] = low_bits, low_loss
        self.action[at] = self.actions.starts[0 if low_bits else 1]
        self.changed_s[at], self._time_s[at] = -math.inf, 0.0
        self._counters[at], self._rates[:, at] = 0.0, 0.0

    def legal(self, seen: Floats) -> Bools:
        """Return which plans may be chosen, bool[n, actions]; ``seen`` is float64[n, batch_step.SEEN_COLUMNS]."""
        budget = seen[:, batch_step.BUDGET_BYTES, None]
        there = self._low_bits[:, None] | ~self._needs_low
        fits = there & (self._weights + self.actions.workspace_bytes <= budget)
        if self.actions.dwell_s:
            stays = self._dwell_left(seen) > 0.0
            same = fits & (self._groups == self._groups[self.action, None])
            fits = np.where((stays & same.any(axis=1))[:, None], same, fits)
        none = ~fits.any(axis=1)
        if none.any():
            weights = np.where(there[none], self._weights, np.inf)
            fits[none] = weights == weights.min(axis=1, keepdims=True)
        legal: Bools = fits
        return legal

    def choose(self, seen: Floats, actions: Ints, where: Bools) -> None:
        """Take actions, int64[n], at the positions ``where``, bool[n]; they must be legal."""
        changed = where & (self._groups[actions] != self._groups[self.action])
        self.changed_s[changed] = seen[changed, batch_step.TIME_S]
        self.action[where] = actions[where]

    def _dwell_left(self, seen: Floats) -> Floats:
        if not self.actions.dwell_s:
            return np.zeros(self.size)
        left: Floats = np.maximum(0.0, 1.0 - (seen[:, batch_step.TIME_S] - self.changed_s) / self.actions.dwell_s)
        return left

    def __call__(self, seen: Floats) -> Floats32:
        """Return the features of each engine, float32[n, entries]."""
        self._smooth(seen)
        ten, sixty = self._rates[1], self._rates[2]
        dense = self.dense_bytes
        columns = seen.T
        pool, first_tokens_rps = columns[batch_step.KV_LAYER_BLOCKS], ten[:, 2]
        # Rows are SERVE_ENTRIES; the numbers below are their indices.
        found = np.empty((len(SERVE_ENTRIES), self.size))
        found[_LOG_ROWS] = columns[_LOG_COLUMNS]
        found[[11, 12, 13]], found[[14, 15]] = self._rates[:, :, 0], self._rates[:2, :, 1]
        found[[16, 18, 20, 21]] = ten[:, [2, 4, 6, 7]].T
        found[_ALL_LOG_ROWS] = np.log2(1.0 + np.maximum(found[_ALL_LOG_ROWS], 0.0)) / _LOG_SCALES
        found[2] = columns[batch_step.OLDEST_WAIT_S] / 2.0
        found[5] = np.where(pool > 0, columns[batch_step.KV_USED_LAYER_BLOCKS] / np.maximum(pool, 1.0), 1.0)
        found[6] = pool * self.kv_block_layer_bytes / dense / 8.0
        found[7], found[8] = columns[batch_step.BUDGET_BYTES] / dense / 8.0, columns[batch_step.WEIGHT_BYTES] / dense
        found[9] = (columns[batch_step.NEXT_BUDGET_BYTES] - columns[batch_step.BUDGET_BYTES]) / dense / 8.0
        found[10] = np.exp(-(columns[batch_step.NEXT_BUDGET_S] - columns[batch_step.TIME_S]) / 10.0)
        found[17] = np.where(first_tokens_rps > 1e-6, ten[:, 3] / np.maximum(first_tokens_rps, 1e-6) / 2.0, 0.0)
        found[19] = ten[:, 5]
        found[22] = columns[batch_step.INCOMING_BYTES] > 0
        found[23] = self._dwell_left(seen)
        found[24:27] = self._levels[self.action].T
        busy_s, priced_s = sixty[:, 5], sixty[:, 8]
        shows = np.minimum(busy_s, priced_s) > PRICED_LEAST
        found[27] = np.where(shows, np.log2(np.where(shows, busy_s / np.where(shows, priced_s, 1.0), 1.0)) / 2.0, 0.0)
        headroom = 1.0 - ten[:, 5] / np.maximum(ten[:, 9], 1e-12) / self.tpot_s
        found[28] = np.where(ten[:, 5] > PRICED_LEAST, headroom, 1.0)
        found[29], found[30] = self._low_bits, np.where(self._low_bits, self._low_loss / 0.4, 0.0)
        produced, finished = sixty[:, 4], sixty[:, 10]
        each = np.where(finished > 1e-6, produced / np.maximum(finished, 1e-6), 0.0)
        found[31] = np.log2(1.0 + each) / 12.0
        found[32:34] = self._limits[self.action].T
        np.clip(found, _LOWEST, _HIGHEST, out=found)
        if self.actions.extra_entries:
            found = np.concatenate([found, self._extras[self.action].T])
        return found.T.astype(np.float32)

    def _smooth(self, seen: Floats) -> None:
        counters = seen[:, _COUNTER_COLUMNS]
        passed_s = seen[:, batch_step.TIME_S] - self._time_s
        later = passed_s > 0.0
        now = (counters - self._counters) / np.where(later, passed_s, 1.0)[:, None]
        for rates, scale_s in zip(self._rates, SMOOTHING_S, strict=True):
            weight = np.where(later, 1.0 - np.exp(-passed_s / scale_s), 0.0)
            rates += weight[:, None] * (now - rates)
        self._time_s = np.where(later, seen[:, batch_step.TIME_S], self._time_s)
        self._counters = np.where(later[:, None], counters, self._counters)


_COUNTER_COLUMNS = [
    batch_step.ARRIVED,
    batch_step.ARRIVED_PROMPT_TOKENS,
    batch_step.FIRST_TOKENS,
    batch_step.TTFT_SUM_S,
    batch_step.PRODUCED_TOKENS,
    batch_step.BUSY_S,
    batch_step.PREEMPTIONS,
    batch_step.REJECTED,
    batch_step.PRICED_S,
    batch_step.ITERATIONS,
    batch_step.FINISHED,
]
_LOG_ROWS = [0, 1, 3, 4]
_LOG_COLUMNS = [batch_step.WAITING, batch_step.WAITING_TOKENS, batch_step.RUNNING, batch_step.RUNNING_TOKENS]
_ALL_LOG_ROWS = [0, 1, 3, 4, 11, 12, 13, 14, 15, 16, 18, 20, 21]
_LOG_SCALES = np.array([10.0, 20.0, 10.0, 20.0, 8.0, 8.0, 8.0, 16.0, 16.0, 8.0, 16.0, 8.0, 8.0])[:, None]
_LOWEST = np.array([entry.low for entry in SERVE_ENTRIES])[:, None]
_HIGHEST = np.array([entry.high for entry in SERVE_ENTRIES])[:, None]


def actions_from(model: ModelSpec, options: Mapping[str, Any], workspace_bytes: int) -> ServeActions:
    """Return the plans for the options of ``serve_actions`` in a configuration.

    Raises:
        ConfigError: for an unknown option, or anything but options.
    """
    if not isinstance(options, Mapping):
        raise ConfigError(f"actions is {options!r:.80}; it must be options by name, such as {{kv_bits: [16, 8]}}")
    allowed = set(inspect.signature(serve_actions).parameters) - {"model", "workspace_bytes"}
    for option in options:
        if option not in allowed:
            raise ConfigError(f"actions has no option {option!r}; {nearest(option, allowed)}")
    try:
        return serve_actions(model, **options, workspace_bytes=workspace_bytes)
    except TypeError as error:
        raise ConfigError(f"actions: {error}") from error
