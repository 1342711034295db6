"""The memory budget: bytes that weights, workspace and KV cache may take together, over time.

`Budget` is the value and `BudgetMeter` follows it during a run. The functions below them are the options of
``conf/budget``: each returns a `Budget` for one server (`BudgetContext`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.cost.gpu import Gpu
from sim.cost.memory import budget_for_kv_blocks, relative_budget_bytes, weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan, dense_plan
from sim.errors import BudgetError, nearest
from sim.limits import MOST_CHANGES, check_count
from sim.paths import find_data
from sim.types import GIB

STEP_UNITS = ("share", "bytes")
MOST_SHARE = 0.9
"""Share of device memory that serving may use at most, like vLLM's gpu_memory_utilization."""
KINDS = ("full", "cotenant", "random_walk", "steps")
"""How a budget moves between two amounts (``moving``)."""
MEAN_AWAY_S, MEAN_STAY_S = 40.0, 30.0
WALK_PERIOD_S, WALK_STEPS = 10.0, 6
_LONGER = "lower budget.horizon_s, or raise budget."


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget that changes in steps.

    change_s: start of each step, ascending from 0. budget_bytes: the budget from then on; one entry per step.
    notice_s: how long before its start a step is announced to the server; 0 for no announcement.
    """

    change_s: tuple[float, ...]
    budget_bytes: tuple[int, ...]
    notice_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.change_s or len(self.change_s) != len(self.budget_bytes):
            raise BudgetError(
                f"a budget needs as many times as bytes, and at least one; got {len(self.change_s)} times "
                f"and {len(self.budget_bytes)} bytes"
            )
        if self.change_s[0] != 0.0:
            raise BudgetError(f"a budget begins at 0 s; the first step begins at {self.change_s[0]} s")
        if any(not b > a for a, b in zip(self.change_s, self.change_s[1:], strict=False)):
            raise BudgetError("the times of a budget's steps must ascend; sort them and leave out repeated ones")
        if any(not math.isfinite(t) for t in self.change_s) or any(b < 1 for b in self.budget_bytes):
            raise BudgetError("a budget's times must be finite and its bytes at least 1")
        if not (self.notice_s >= 0 and math.isfinite(self.notice_s)):
            raise BudgetError(f"budget.notice_s is {self.notice_s}; it must be a number of seconds of at least 0")

    @property
    def steps(self) -> tuple[tuple[float, int], ...]:
        """The steps as (start in seconds, bytes)."""
        return tuple(zip(self.change_s, self.budget_bytes, strict=True))


class BudgetMeter:
    """Follows a budget during a run: its present value, its next step, and how long it was exceeded.

    violation_s: seconds so far in which the held bytes exceeded the budget.
    """

    def __init__(self, budget: Budget, start_s: float = 0.0) -> None:
        """Start at the step that is in force at ``start_s``."""
        self.budget = budget
        self.violation_s = 0.0
        self._step = bisect_right(budget.change_s, start_s) - 1
        self._followed_s = start_s
        self._over_since_s = math.nan  # start of the present stretch over budget
        self._violation_before_s = 0.0  # violation_s at that start

    @property
    def now_bytes(self) -> int:
        """The present budget."""
        return self.budget.budget_bytes[self._step]

    @property
    def next_s(self) -> float:
        """When the next step begins; ``inf`` after the last."""
        step = self._step + 1
        return self.budget.change_s[step] if step < len(self.budget.change_s) else math.inf

    def announced(self, now_s: float) -> tuple[int, float]:
        """Return bytes and time of the next step once it is announced; before that, the present budget and ``inf``."""
        if self.next_s - self.budget.notice_s <= now_s:
            return self.budget.budget_bytes[self._step + 1], self.next_s
        return self.now_bytes, math.inf

    def follow(self, now_s: float, held_bytes: int) -> None:
        """Advance to ``now_s``; ``held_bytes`` were held since the last call and are compared with each step passed."""
        while True:
            until_s = min(self.next_s, now_s)
            if until_s > self._followed_s:
                self._count(until_s, over=held_bytes > self.now_bytes)
            if self.next_s > now_s:
                return
            self._step += 1

    def _count(self, until_s: float, *, over: bool) -> None:
        """Count the time up to ``until_s``, with one subtraction for each stretch over budget."""
        if not over:
            self._over_since_s = math.nan
        else:
            if math.isnan(self._over_since_s):
                self._over_since_s, self._violation_before_s = self._followed_s, self.violation_s
            self.violation_s = self._violation_before_s + (until_s - self._over_since_s)
        self._followed_s = until_s


def constant_budget(budget_bytes: int) -> Budget:
    """Return a budget that never changes."""
    return Budget((0.0,), (budget_bytes,))


def stepped(rows: Iterable[tuple[float, int]], notice_s: float = 0.0) -> Budget:
    """Return the budget of (time_s, bytes) rows without steps that change nothing."""
    times: list[float] = []
    values: list[int] = []
    for time_s, budget_bytes in rows:
        if not values or budget_bytes != values[-1]:
            times.append(time_s)
            values.append(budget_bytes)
    return Budget(tuple(times), tuple(values), notice_s)


def no_room_for_kv(weight_bytes: int, workspace_bytes: int, budget_bytes: int) -> BudgetError:
    """Return the error for a first budget that cannot hold the weights, the workspace and one request."""
    return BudgetError(
        f"weights {weight_bytes / GIB:.2f} GiB and workspace {workspace_bytes / GIB:.2f} GiB leave "
        f"no room for the KV cache of one request in a budget of {budget_bytes / GIB:.2f} GiB; prune or "
        "quantize more blocks, or raise the budget (budget=, gpu=)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetContext:
    """The server for which a budget is computed: model, device, first plan, and the memory settings of its engine."""

    model: ModelSpec
    gpu: Gpu
    plan: Plan
    workspace_bytes: int
    kv_block_tokens: int


def gpu_share(context: BudgetContext, *, share: float) -> Budget:
    """Return ``share`` of the device memory, as vLLM's ``gpu_memory_utilization`` takes it.

    Raises:
        BudgetError: if share is not in (0, 1].
    """
    return constant_budget(_share_bytes(context, share, "share"))


def constant(context: BudgetContext, *, budget_bytes: float) -> Budget:
    """Return a stated number of bytes.

    Raises:
        BudgetError: if it is not above 0.
    """
    if not budget_bytes > 0:
        raise BudgetError(f"budget.budget_bytes is {budget_bytes}; it must be above 0")
    return constant_budget(int(budget_bytes))


def kv_blocks(context: BudgetContext, *, blocks: int) -> Budget:
    """Return the bytes that hold the first plan's weights, workspace, and ``blocks`` KV blocks over all kept layers.

    This is how real engines state their cache (vLLM's ``num_gpu_blocks``).

    Raises:
        BudgetError: if blocks is not above 0.
    """
    if blocks < 1:
        raise BudgetError(f"budget.blocks is {blocks}; it must be at least 1")
    return constant_budget(
        budget_for_kv_blocks(context.model, context.plan, blocks, context.workspace_bytes, context.kv_block_tokens)
    )


def steps(
    context: BudgetContext, *, rows: Sequence[Sequence[float]], unit: str = "share", notice_s: float = 0.0
) -> Budget:
    """Return a budget of ``[time_s, value]`` rows, the first at 0; values are shares of the device memory, or bytes.

    Raises:
        BudgetError: for a share outside (0, 1], bytes that the device does not have, another unit, or times that do not
            ascend from 0.
    """
    if unit not in STEP_UNITS:
        raise BudgetError(f"budget.unit is {unit!r}; {nearest(unit, STEP_UNITS)}")
    before_s = -math.inf
    for row in rows:
        if not isinstance(row, Sequence) or len(row) != 2 or not all(isinstance(cell, int | float) for cell in row):
            raise BudgetError(f"budget.rows: {row} is not [time_s, value]; e.g. [60.0, 0.5]")
        if not before_s < row[0] < math.inf:
            raise BudgetError(
                f"budget.rows: the row {list(row)} comes after {before_s} s; times must be finite and ascend from 0"
            )
        before_s = row[0]
    if unit == "share":
        return stepped(((float(t), _share_bytes(context, share, "rows")) for t, share in rows), notice_s)
    for _, value in rows:
        if not 1 <= value <= context.gpu.memory_bytes:
            raise BudgetError(
                f"budget.rows: {value} bytes; at least 1 and at most the {context.gpu.memory_bytes:.4g} of "
                f"{context.gpu.name} are allowed (budget.unit=share takes shares of it)"
            )
    return stepped(((float(t), int(value)) for t, value in rows), notice_s)


def from_csv(context: BudgetContext, *, path: str, notice_s: float = 0.0) -> Budget:
    """Return a budget read from a CSV file with the columns ``time_s,budget_bytes``, ascending from 0.

    Raises:
        BudgetError: for a missing file, other columns, or a row that is not two numbers in order; it names file
            and line.
    """
    found = find_data(path)
    try:
        lines = found.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BudgetError(f"budget.path: {found} cannot be read: {error}") from error
    if not lines or [cell.strip() for cell in lines[0].split(",")] != ["time_s", "budget_bytes"]:
        raise BudgetError(f"{found}, line 1: the header must be time_s,budget_bytes; it is {(lines or [''])[0]!r}")
    rows: list[tuple[float, int]] = []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split(",")
        try:
            time_s, budget_bytes = (float(cell) for cell in cells)
            rows.append((time_s, int(budget_bytes)))
        except (ValueError, OverflowError):
            raise BudgetError(
                f"{found}, line {number}: {line!r} is not two finite numbers, a time in seconds and bytes"
            ) from None
        in_order = time_s == 0.0 if len(rows) == 1 else rows[-2][0] < time_s < math.inf
        if not in_order or rows[-1][1] < 1:
            raise BudgetError(
                f"{found}, line {number}: {line!r}; a budget begins at 0 s, its times must ascend and be finite, and "
                "bytes be at least 1"
            )
    if not rows:
        raise BudgetError(f"{found}, line 2: there is no row; give at least the budget at 0 s")
    return stepped(rows, notice_s)


def cotenant(
    context: BudgetContext,
    *,
    share: float,
    cotenant_bytes: float,
    mean_away_s: float,
    mean_stay_s: float,
    horizon_s: float,
    seed: int,
    notice_s: float = 0.0,
) -> Budget:
    """Return ``share`` of the device memory minus what a co-tenant takes while it is present.

    It comes and goes as a two-state Markov process with exponential times; it is away at the start.

    Raises:
        BudgetError: for times that are not above 0, too many changes, or a co-tenant that takes everything.
    """
    full_bytes = _share_bytes(context, share, "share")
    if min(mean_away_s, mean_stay_s, horizon_s) <= 0 or not 0 < cotenant_bytes < full_bytes:
        raise BudgetError(
            f"budget.mean_away_s, mean_stay_s and horizon_s must be above 0 seconds, and cotenant_bytes "
            f"({cotenant_bytes:.3g}) above 0 and below the {full_bytes:.3g} bytes there are"
        )
    changes = 2 * horizon_s / (mean_away_s + mean_stay_s)
    check_count(changes, "changes of the budget", MOST_CHANGES, f"{_LONGER}mean_away_s or mean_stay_s", BudgetError)
    return cotenant_between(
        full_bytes,
        full_bytes - int(cotenant_bytes),
        mean_away_s=mean_away_s,
        mean_stay_s=mean_stay_s,
        horizon_s=horizon_s,
        seed=seed,
        notice_s=notice_s,
    )


def cotenant_between(
    high_bytes: int,
    low_bytes: int,
    *,
    mean_away_s: float,
    mean_stay_s: float,
    horizon_s: float,
    seed: int,
    notice_s: float = 0.0,
) -> Budget:
    """Return ``low_bytes`` while a co-tenant is present, else ``high_bytes``; its times are those of ``cotenant``."""
    rng = np.random.default_rng(seed)
    rows, time_s, there = [(0.0, high_bytes)], 0.0, False
    while True:
        time_s += float(rng.exponential(mean_stay_s if there else mean_away_s))
        if time_s >= horizon_s:
            break
        there = not there
        rows.append((time_s, low_bytes if there else high_bytes))
    if there:
        rows.append((horizon_s, high_bytes))  # it leaves in the end, so that waiting requests can be served
    return stepped(rows, notice_s)


def random_walk(
    context: BudgetContext,
    *,
    low_share: float,
    high_share: float,
    step_share: float,
    period_s: float,
    horizon_s: float,
    seed: int,
    notice_s: float = 0.0,
) -> Budget:
    """Return a share of the device memory that steps up or down by ``step_share`` each period, between two bounds.

    It starts at the upper bound, and returns there at the horizon.

    Raises:
        BudgetError: for bounds that are not 0 < low < high <= 1, a step or times that are not above 0, or too many
            changes.
    """
    high, low = _share_bytes(context, high_share, "high_share"), _share_bytes(context, low_share, "low_share")
    if low >= high or min(step_share, period_s, horizon_s) <= 0:
        raise BudgetError(
            f"budget.low_share {low_share} must be below high_share {high_share}, and step_share, period_s and "
            "horizon_s above 0"
        )
    check_count(horizon_s / period_s, "changes of the budget", MOST_CHANGES, f"{_LONGER}period_s", BudgetError)
    return walk_between(
        high,
        low,
        step_bytes=int(step_share * context.gpu.memory_bytes),
        period_s=period_s,
        horizon_s=horizon_s,
        seed=seed,
        notice_s=notice_s,
    )


def walk_between(
    high_bytes: int,
    low_bytes: int,
    *,
    step_bytes: int,
    period_s: float,
    horizon_s: float,
    seed: int,
    notice_s: float = 0.0,
) -> Budget:
    """Return a budget that steps up or down by ``step_bytes`` each period, between two bounds, as ``random_walk``."""
    rng = np.random.default_rng(seed)
    rows, value = [(0.0, high_bytes)], high_bytes
    for k in range(1, math.ceil(horizon_s / period_s)):
        value = min(high_bytes, max(low_bytes, value + (step_bytes if rng.random() < 0.5 else -step_bytes)))
        rows.append((k * period_s, value))
    rows.append((math.ceil(horizon_s / period_s) * period_s, high_bytes))
    return stepped(rows, notice_s)


def moving(
    high: int, low: int, *, kind: str, seed: int, horizon_s: float, notice_s: float = 0.0, pace: float = 1.0
) -> Budget:
    """Return a budget between two amounts of bytes; it ends at the higher one, so that waiting requests finish.

    full: always the higher one.
    cotenant: the lower one while a co-tenant is present; it is 40 s away and 30 s present on average.
    random_walk: steps up or down by a sixth of the range every 10 s, from the higher one.
    steps: the lower one once; it begins after 10 to 50 % of the time and lasts for 20 to 40 % of it.
    A co-tenant and a walk move ``pace`` times as fast.

    Raises:
        BudgetError: for an unknown kind, or a time or pace that is not above 0.
    """
    if not horizon_s > 0:
        raise BudgetError(f"budget.horizon_s is {horizon_s}; it must be above 0 seconds")
    if not 0 < pace < math.inf:
        raise BudgetError(f"budget.pace is {pace}; it must be above 0: 1 is the usual one, 2 moves twice as fast")
    period_s = WALK_PERIOD_S / pace
    check_count(
        horizon_s / period_s,
        "changes of the budget",
        MOST_CHANGES,
        "lower budget.horizon_s or budget.pace",
        BudgetError,
    )
    shared: dict[str, Any] = {"horizon_s": horizon_s, "seed": seed, "notice_s": notice_s}
    if kind == "full":
        return stepped([(0.0, high)], notice_s)
    if kind == "cotenant":
        return cotenant_between(high, low, mean_away_s=MEAN_AWAY_S / pace, mean_stay_s=MEAN_STAY_S / pace, **shared)
    if kind == "random_walk":
        return walk_between(high, low, step_bytes=(high - low) // WALK_STEPS, period_s=period_s, **shared)
    if kind == "steps":
        rng = np.random.default_rng(seed)
        begin_s = float(rng.uniform(0.1, 0.5)) * horizon_s
        end_s = begin_s + float(rng.uniform(0.2, 0.4)) * horizon_s
        return stepped([(0.0, high), (begin_s, low), (end_s, high)], notice_s)
    raise BudgetError(f"budget.kind is {kind!r}; {nearest(kind, KINDS)}")


def dense_share_bytes(context: BudgetContext, share: float) -> int:
    """Return this multiple of the dense model's weight bytes, at most ``MOST_SHARE`` of the device memory."""
    dense_bytes = weight_bytes(context.model, dense_plan(context.model))
    return min(int(MOST_SHARE * context.gpu.memory_bytes), round(share * dense_bytes))


def dense_shares(
    context: BudgetContext,
    *,
    kind: str,
    high_share: float,
    low_share: float,
    horizon_s: float,
    seed: int,
    notice_s: float = 0.0,
    pace: float = 1.0,
) -> Budget:
    """Return a budget that moves between two multiples of the dense model's weight bytes, as ``moving``.

    One budget is then as tight for a small model as for a large one. Never above 90 % of the device memory.

    Raises:
        BudgetError: unless 0 < low_share <= high_share, and as ``moving``.
    """
    if not 0.0 < low_share <= high_share < math.inf:
        raise BudgetError(
            f"budget.low_share is {low_share} and budget.high_share {high_share}; low_share must be above 0 and at "
            "most high_share (both in multiples of the model's dense weight bytes)"
        )
    high, low = dense_share_bytes(context, high_share), dense_share_bytes(context, low_share)
    return moving(high, low, kind=kind, seed=seed, horizon_s=horizon_s, notice_s=notice_s, pace=pace)


def relative(context: BudgetContext, *, share: float, batch: int, sequence_tokens: int) -> Budget:
    """Return RAP's relative budget: ``share`` of the dense peak at a batch and a length, plus the workspace.

    arXiv 2505.17138: budget r is met when peak(mask; B, S) <= r * peak(dense; B, S).

    Raises:
        BudgetError: if share is not in (0, 1], or batch or length not above 0.
    """
    if not 0.0 < share <= 1.0:
        raise BudgetError(f"budget.share is {share}; it must be above 0 and at most 1")
    peak = relative_budget_bytes(context.model, share, batch, sequence_tokens)
    return constant_budget(peak + context.workspace_bytes)


def _share_bytes(context: BudgetContext, share: float, key: str) -> int:
    if not 0.0 < share <= 1.0:
        raise BudgetError(f"budget.{key} is {share}; it must be above 0 and at most 1 (vLLM's default is 0.9)")
    return int(share * context.gpu.memory_bytes)
