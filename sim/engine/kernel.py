"""The compiled inner loop: whole iterations on arrays, exactly as the plain engine takes them one by one.

`advance` serves until a moment at which something outside may touch the replica. A request is its place in the order
of arrival; a running one also has a **slot**. An iteration is formed at its start (KV blocks are taken then) and its
effects happen at its end, so a call may stop in the middle of one.

**Decoding requests are not touched one by one.** Each of them gains a token in every decoding iteration, so one clock
counts those iterations (``CLOCK``) and a slot remembers when it joined. Sums over them price an iteration, a histogram
of their contexts modulo the KV block says how many blocks it needs, and the next clock at which one of them is done
says when to look. An iteration costs O(1) and O(1) for each chunk, admission and preemption; a finish costs one pass
over the slots. Where that picture does not hold (``kv_keep``, more decodes than the token budget, several unfinished
prompts), an iteration is formed request by request, in O(running): ``EAGER``.

State, for n requests, m running at most, KV blocks of b tokens, L layers:

    ints, floats   the counters named below
    request_i      int64[n, 9], request_f float64[n, 6]: one row a request, columns named below; of a decoding request
                   the row is as of the clock at which it joined (`settle`)
    slots          int64[14, m + 1]: a row a field; ``NEXT`` and ``PREVIOUS`` link the running in order of admission,
                   place m is both ends; ``STACK`` holds preempted requests, ``BATCH`` and ``TOKENS`` the chunks under
                   way, ``COHORT`` with ``cohort_s`` how many decodes got their last token when
    phases         int64[b]: blocks of one layer that decodes take at the iterations of clock -i modulo b
    runs           int64[2, r]: free KV blocks as (owner, blocks), longest free first (the same as sim/engine/kv_pool.py); a
                   unit of the prefix cache is the owner -1 - its number
    prompts        int64[n, 3], with a prefix cache only: a row a request, columns named below
    hash_ids       int64[h]: what the prompts' units are called, from 0 on; those of a request from its ``HASH_AT`` on
    held_units     int64[h]: the unit that its request holds in each place, 0 for none
    unit_of        int64[largest id + 1]: the unit that is found by an id, 0 for none
    units          int64[u, 4]: units of the prefix cache, numbered from 1 on, columns named below
    sets           int64[k, 6 + W]: sets of MHA blocks whose KV requests hold: fields named below, then the set; k is
                   2 m + 4, with a prefix cache 3 m + 4
    set_nll        float64[k, 2]: nats a token costs under the running plan, by its prefill and by its decode
    drafts         int64[k + 1, W], narrowed int64[k + 1, 4]: work space for new sets
    log, gaps      a row an iteration; a row a group of equal gaps between tokens
    block_counts   int64[3, 4], layer_rows int64[L, 3] (bits, prefill FFN, decode FFN), rows: int64[L, 7] of work space
    budget_s, budget_bytes   when each step of the budget begins, and what there is from then on
    schedule_s, schedule     decisions known beforehand: when, and which plan
    changes, shares          a row a plan change; a row (time, bytes) a change of the resident weights
    steps, copies, decisions, prices, price_nll, keeps   what follows from plans, of sim/engine/plan_graph.py: a row a step, a
                   copy that it needs, a decision met in it, a set of MHA blocks priced in it; which tokens stay
    data, layout   the latency tables

A set of layers is W = ceil(L / 60) words of 60 bits.

**Plans and memory** change between two iterations (`change_plan`), by the rules of sim/engine/sim_engine.py. A step that was never
met before is worked out in Python: `NEEDED` says which, and nothing has changed until it is there.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
from numba import types
from numba.extending import intrinsic
from numba.np import arrayobj
from numpy.typing import NDArray

from sim.compiled import compiled, constant
from sim.cost.latency import LatencyTables, iteration_in_range, iteration_seconds, layered_iteration_seconds
from sim.types import Floats, Ints

NEVER = 1 << 62
WAITING, RUNNING, FINISHED, REJECTED = range(4)
"""The values of ``sim.results.records.Status``."""
ZERO = constant(0)
NOBODY = constant(-1)
"""The owner of a run of free KV blocks that hold nothing of use (sim/engine/kv_pool.py)."""
HORIZON, NEEDS, GROW, DONE = range(4)
"""Why `advance` returned."""
DECISION, JOIN, PRICE = range(3)
"""What the plan book has to work out: the values of ``NEEDED``."""
LAYERS_A_WORD = 60

# State.ints: settings, then what the plan sets, then what happens.
(
    CHUNKED, MAX_BATCH_TOKENS, LONG_PREFILL_TOKENS, RESERVE_FULL_PROMPT, BLOCK_TOKENS, REUSE, KEEP_LOG,
    RECOMPUTE, PRICED, RUNNING_LIMIT, WATERMARK_LIMIT, WORKSPACE_BYTES, BLOCK_BYTES, KEEP_RUNS, PREFIX_CACHING,
    UNIT_TOKENS, UNIT_BLOCKS,
    MAX_RUNNING, WATERMARK, ADMIT, POOL, PREFILL_SET, DECODE_SET, N_SETS, PLAN_KEEP,
    STEP, TARGET, DECIDED, COPY, INCOMING_BYTES, WEIGHT_BYTES, BUDGET_STEP, BUDGET_MOVED, NEXT_DECISION, N_DECISIONS,
    OPEN_CHANGE, N_CHANGES, N_SHARES, NEEDED, NEEDED_STEP, NEEDED_AT,
    N_REQUESTS, NEXT_ARRIVAL, QUEUE_HEAD, QUEUE_TAIL, STACKED, N_RUNNING, DECODES, KEEPERS, CLOCK, NEXT_DUE, COHORTS,
    FREE, RUN_HEAD, RUN_TAIL, CACHING, N_UNITS, FREE_UNIT, FOUND_SHARED, N_HASH_IDS,
    IN_ITERATION, EAGER, DECODING, N_BATCH, CHANGE_PREEMPTED, USED_BEFORE,
    WAITING_TOKENS, RUNNING_TOKENS, ARRIVED_PROMPT_TOKENS, FIRST_TOKENS, PRODUCED_TOKENS, N_FINISHED, N_REJECTED,
    PREEMPTIONS, N_ITERATIONS, N_LOG, N_GAPS, IT_PREFILL, IT_DECODES, IT_RUNNING, IT_WAITING, IT_PREEMPTED,
    IT_EXTRAPOLATED, N_INTS,
) = range(84)  # fmt: skip
# State.floats
(
    NOW, START, END, DURATION, TTFT_SUM, BUSY, NEXT_ARRIVAL_S, COPY_SLOWDOWN, MAX_USED_SHARE,
    COPY_BYTES_PER_S, COPY_END, DECIDED_S, NEXT_DECISION_S, VIOLATION, VIOLATION_SINCE, WATERMARK_SHARE, NOTICE,
    N_FLOATS,
) = range(18)  # fmt: skip
# Columns of State.request_i; KEPT_RUN is the run of free blocks that still holds its KV, or -1. COMPUTED of one that
# waits leaves out the prefix cache.
PROMPT, LIMIT, COMPUTED, PRODUCED, PREFILL, PREEMPTED, STATUS, KEPT_RUN, KEPT_PARAMS, REQUEST_INTS = range(10)
# Columns of State.prompts: where its hash ids begin, its units, tokens found as it was first admitted here (-1 before)
HASH_AT, UNITS, CACHED, PROMPT_COLUMNS = range(4)
# Columns of State.request_f
ARRIVAL_S, ADMITTED_S, FIRST_S, LAST_S, FINISH_S, NLL_SUM, REQUEST_FLOATS = range(7)
# Rows of State.slots; SHARED KV blocks of one layer are its units; FILL tokens are the end of its next unit, or NEVER
(
    REQUEST, NEXT, PREVIOUS, SET, JOINED, DUE, KEEP, SHARED, FILL, FREE_SLOT, STACK, BATCH, TOKENS, COHORT, SLOT_ROWS,
) = range(15)  # fmt: skip
# Columns of State.sets, before the words of the set
LAYERS, COUNT, CONTEXT, PREFILL_PARAMS, DECODE_PARAMS, AFTER, SET_COLUMNS = range(7)
# Columns of State.log
(
    LOG_START, LOG_END, LOG_USED_SHARE, LOG_PREFILL, LOG_DECODES, LOG_RUNNING, LOG_WAITING, LOG_PREEMPTED,
    LOG_EXTRAPOLATED, LOG_COLUMNS,
) = range(10)  # fmt: skip
OWNER, BLOCKS = range(2)
# Columns of State.units: how many hold it, -1 for a row of none; its id, -1 once nobody finds it; the run that it is
# while nobody holds it (of a row of none the next such row, 0 at the end); the set of MHA blocks whose KV it is
UNIT_HOLDERS, UNIT_ID, UNIT_RUN, UNIT_SET, UNIT_COLUMNS = range(5)
# Columns of State.changes
(
    CHANGE_S, CHANGE_READY_S, CHANGE_FROM, CHANGE_TO, CHANGE_BYTES_IN, CHANGE_BYTES_FREED, CHANGE_VICTIMS,
    CHANGE_RECOMPUTED, CHANGE_BLOCKS_BEFORE, CHANGE_BLOCKS_AFTER, CHANGE_COLUMNS,
) = range(11)  # fmt: skip
# Columns of State.steps, before the words of the MHA blocks of prefill and of decode, block_counts and layer_rows
(
    STEP_TARGET, STEP_WEIGHT_BYTES, STEP_KEEP, STEP_ADMIT, STEP_MAX_RUNNING, STEP_PREFILL_PARAMS, STEP_DECODE_PARAMS,
    STEP_MHA_PARAMS, STEP_COPIES_AT, STEP_COPIES, STEP_DECISIONS, STEP_PRICES, STEP_COLUMNS,
) = range(13)  # fmt: skip
# Columns of State.copies; COPY_AFTER is the step that follows, or -1 where that was never met.
COPY_LAYER, COPY_MHA, COPY_FFN, COPY_BYTES, COPY_NET, COPY_RESTORES, COPY_AFTER, COPY_COLUMNS = range(8)
# Columns of State.decisions: lists, one a step; DECISION_NEXT is -1 at the end
DECISION_TARGET, DECISION_STEP, DECISION_NEXT, DECISION_COLUMNS = range(4)


class State(NamedTuple):
    """Everything a replica is; the module's docstring says what is what. Compiled code sees it as a `Table`."""

    ints: Ints
    floats: Floats
    request_i: Ints
    request_f: Floats
    queue: Ints
    slots: Ints
    cohort_s: Floats
    phases: Ints
    runs: Ints
    prompts: Ints
    hash_ids: Ints
    held_units: Ints
    unit_of: Ints
    units: Ints
    sets: Ints
    set_nll: Floats
    drafts: Ints
    narrowed: Ints
    log: Floats
    gaps: Floats
    block_counts: Ints
    layer_rows: Ints
    rows: Ints
    budget_s: Floats
    budget_bytes: Ints
    schedule_s: Floats
    schedule: Ints
    changes: Floats
    shares: Floats
    steps: Ints
    copies: Ints
    decisions: Ints
    prices: Ints
    price_nll: Floats
    keeps: Ints
    data: Floats
    layout: Ints


Table = NDArray[np.int64]
"""int64[arrays of a State, 3]: address, rows and columns of each. One argument in the place of all arrays, of nine
values each: compiled functions call each other in nanoseconds, and compile in a fraction of the time."""


def table_of(state: State) -> Table:
    """Return where compiled code finds a state; good as long as ``state`` is kept and none of its arrays replaced."""
    rows = []
    for name, array in zip(State._fields, state, strict=True):
        if not array.flags.c_contiguous or array.dtype != (np.float64 if name in _FLOATS else np.int64):
            raise TypeError(
                f"State.{name} is {array.dtype}; the kernel needs contiguous int64, or float64 for {_FLOATS}"
            )
        address = array.__array_interface__["data"][0]  # half the time of array.ctypes.data
        rows.append((address, array.shape[0], array.shape[1] if array.ndim == 2 else 1))
    return np.array(rows, dtype=np.int64)


_FLOATS = (
    "floats", "request_f", "cohort_s", "set_nll", "log", "gaps", "budget_s", "schedule_s", "changes", "shares",
    "price_nll", "data",
)  # fmt: skip
_FLAT = (
    "ints", "floats", "queue", "cohort_s", "phases", "budget_s", "budget_bytes", "schedule_s", "schedule", "data",
    "layout", "hash_ids", "held_units", "unit_of",
)  # fmt: skip


_numba: Any = arrayobj  # untyped


def _array(name: str) -> Any:
    """Return what compiled code calls with a `Table` to have one array of its state."""
    row, dimensions = State._fields.index(name), 1 if name in _FLAT else 2
    array_type = types.Array(types.float64 if name in _FLOATS else types.int64, dimensions, "C")

    def find(typing: Any, table: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            entries = _numba.make_array(signature.args[0])(context, builder, arguments[0]).data
            word = context.get_constant(types.intp, 8)
            address, rows, columns = (
                builder.load(builder.gep(entries, [context.get_constant(types.intp, 3 * row + k)])) for k in range(3)
            )
            array = _numba.make_array(array_type)(context, builder)
            _numba.populate_array(
                array,
                data=builder.inttoptr(address, array.data.type),
                shape=[rows, columns][:dimensions],
                strides=[word] if dimensions == 1 else [builder.mul(columns, word), word],
                itemsize=word,
                meminfo=None,
            )
            return array._getvalue()

        return array_type(table), generate

    find.__name__ = f"{name}_of"
    return intrinsic(find)


ints_of = _array("ints")
floats_of = _array("floats")
request_i_of = _array("request_i")
request_f_of = _array("request_f")
queue_of = _array("queue")
slots_of = _array("slots")
cohort_s_of = _array("cohort_s")
phases_of = _array("phases")
runs_of = _array("runs")
prompts_of = _array("prompts")
hash_ids_of = _array("hash_ids")
held_units_of = _array("held_units")
unit_of_of = _array("unit_of")
units_of = _array("units")
sets_of = _array("sets")
set_nll_of = _array("set_nll")
drafts_of = _array("drafts")
narrowed_of = _array("narrowed")
log_of = _array("log")
gaps_of = _array("gaps")
block_counts_of = _array("block_counts")
layer_rows_of = _array("layer_rows")
rows_of = _array("rows")
budget_s_of = _array("budget_s")
budget_bytes_of = _array("budget_bytes")
schedule_s_of = _array("schedule_s")
schedule_of = _array("schedule")
changes_of = _array("changes")
shares_of = _array("shares")
steps_of = _array("steps")
copies_of = _array("copies")
decisions_of = _array("decisions")
prices_of = _array("prices")
price_nll_of = _array("price_nll")
keeps_of = _array("keeps")
data_of = _array("data")
layout_of = _array("layout")


@compiled(inline=True)
def _blocks(tokens: int, block_tokens: int) -> int:
    return (tokens + block_tokens - 1) // block_tokens


@compiled(inline=True)
def _waiting(n: Ints) -> int:
    return int(n[STACKED] + n[QUEUE_TAIL] - n[QUEUE_HEAD])


@compiled(inline=True)
def _has(words: Ints, layer: int) -> bool:
    """Return whether a layer is in a set of layers."""
    return bool((words[layer // LAYERS_A_WORD] >> (layer % LAYERS_A_WORD)) & 1)


@compiled()
def blocks_of(s: Table, i: int, tokens: int) -> int:
    """Return the KV blocks that a slot's request needs for so many tokens, beside its units."""
    n, slots, sets, keeps = ints_of(s), slots_of(s), sets_of(s), keeps_of(s)
    block_tokens, held_set, keep = n[BLOCK_TOKENS], slots[SET, i], slots[KEEP, i]
    if keep < 0:
        return int(sets[held_set, LAYERS] * (_blocks(tokens, block_tokens) - slots[SHARED, i]))
    total = 0
    for layer in range(keeps.shape[1]):
        if _has(sets[held_set, SET_COLUMNS:], layer):
            total += _blocks(min(tokens, keeps[keep, layer]), block_tokens)
    return total


# -- KV blocks -----------------------------------------------------------------------------------------------------


@compiled(inline=True)
def _units_in(s: Table, r: int, tokens: int) -> int:
    """Return how many units of a request's prompt lie within its first tokens; none while nothing is cached."""
    n = ints_of(s)
    return int(min(tokens // n[UNIT_TOKENS], prompts_of(s)[r, UNITS])) if n[CACHING] else 0


@compiled()
def _found_again(s: Table, r: int) -> int:
    """Return the tokens of a preempted request whose KV nobody has overwritten."""
    n, request_i, runs, sets = ints_of(s), request_i_of(s), runs_of(s), sets_of(s)
    run = request_i[r, KEPT_RUN]
    if run < 0 or runs[BLOCKS, run] == 0:
        return 0
    block_tokens = n[BLOCK_TOKENS]
    # Its units were freed after its own blocks, so they are all there while one of these is.
    whole = _units_in(s, r, request_i[r, COMPUTED]) * n[UNIT_BLOCKS]
    whole += runs[BLOCKS, run] // sets[n[PREFILL_SET], LAYERS]
    whole = min(whole, request_i[r, COMPUTED] // block_tokens)
    last = (request_i[r, PROMPT] + request_i[r, PRODUCED] - 1) // block_tokens
    return int(min(whole, last) * block_tokens)


@compiled()
def _forget_unit(s: Table, unit: int) -> None:
    """Let nobody find a unit again; what is left of it in a run is anybody's."""
    n, units = ints_of(s), units_of(s)
    row = units[unit]
    unit_of_of(s)[row[UNIT_ID]] = 0
    row[UNIT_ID] = -1
    if row[UNIT_HOLDERS] == 0:
        runs_of(s)[OWNER, row[UNIT_RUN]] = NOBODY
        row[UNIT_HOLDERS], row[UNIT_RUN] = -1, n[FREE_UNIT]
        n[FREE_UNIT] = unit


@compiled()
def _take(s: Table, blocks: int) -> None:
    """Hold so many more blocks, the longest free first."""
    n, request_i, runs = ints_of(s), request_i_of(s), runs_of(s)
    n[FREE] -= blocks
    if not n[KEEP_RUNS]:
        return
    while blocks > 0:
        run = n[RUN_HEAD]
        taken = min(runs[BLOCKS, run], blocks)
        runs[BLOCKS, run] -= taken
        blocks -= taken
        owner = runs[OWNER, run]
        if taken > 0 and owner >= 0:
            request_i[owner, COMPUTED] = _found_again(s, owner)
        elif taken > 0 and owner < NOBODY:  # the rest of a unit is anybody's
            _forget_unit(s, NOBODY - owner)
        if runs[BLOCKS, run] == 0:
            n[RUN_HEAD] += 1
            if owner >= 0:
                request_i[owner, KEPT_RUN] = -1


@compiled(inline=True)
def _place_run(s: Table, run: int) -> None:
    """Tell the owner of a run where it is."""
    owner = runs_of(s)[OWNER, run]
    if owner >= 0:
        request_i_of(s)[owner, KEPT_RUN] = run
    elif owner < NOBODY:
        units_of(s)[NOBODY - owner, UNIT_RUN] = run


@compiled()
def _release(s: Table, blocks: int, owner: int) -> None:
    """Free blocks; their content stays readable for ``owner`` until they are taken. What the pool owes goes first."""
    n, runs = ints_of(s), runs_of(s)
    owed = min(max(-n[FREE], 0), blocks)
    n[FREE] += blocks
    blocks -= owed
    if not n[KEEP_RUNS] or blocks == 0:
        return
    tail = n[RUN_TAIL]
    if owner == NOBODY and tail > n[RUN_HEAD] and runs[OWNER, tail - 1] == NOBODY:
        runs[BLOCKS, tail - 1] += blocks
        return
    if tail == runs.shape[1]:  # owners are few, and neighbours without one become one run: half the room suffices
        to = ZERO
        for run in range(n[RUN_HEAD], tail):
            if runs[BLOCKS, run] == 0 and runs[OWNER, run] == NOBODY:
                continue
            if to > 0 and runs[OWNER, run] == NOBODY and runs[OWNER, to - 1] == NOBODY:
                runs[BLOCKS, to - 1] += runs[BLOCKS, run]
                continue
            runs[OWNER, to], runs[BLOCKS, to] = runs[OWNER, run], runs[BLOCKS, run]
            _place_run(s, to)
            to += 1
        n[RUN_HEAD], tail = 0, to
    runs[OWNER, tail], runs[BLOCKS, tail] = owner, blocks
    _place_run(s, tail)
    n[RUN_TAIL] = tail + 1


@compiled()
def resize_pool(s: Table, blocks: int) -> None:
    """Grow or shrink the pool; ``FREE`` is below 0 while it is smaller than what is held (sim/engine/kv_pool.py)."""
    n = ints_of(s)
    change = blocks - n[POOL]
    if change < 0:
        available = max(n[FREE], 0)
        _take(s, min(-change, available))
        n[FREE] -= max(-change - available, 0)
    n[POOL] = blocks
    if change > 0:
        _release(s, change, NOBODY)


@compiled(once=True)
def forget_kept_kv(s: Table) -> None:
    """Let no preempted request find again what it left behind."""
    n, request_i, slots, runs = ints_of(s), request_i_of(s), slots_of(s), runs_of(s)
    for run in range(n[RUN_HEAD], n[RUN_TAIL]):
        if runs[OWNER, run] >= 0:
            request_i[runs[OWNER, run], KEPT_RUN] = -1
            runs[OWNER, run] = NOBODY
    for place in range(n[STACKED]):
        request_i[slots[STACK, place], COMPUTED] = 0


# -- the prefix cache ------------------------------------------------------------------------------------------------


@compiled()
def _found(s: Table, r: int) -> int:
    """Return the tokens that a waiting request finds; ``FOUND_SHARED`` is how many of its units others hold already."""
    n, request_i, hash_ids, unit_of, units = ints_of(s), request_i_of(s), hash_ids_of(s), unit_of_of(s), units_of(s)
    n[FOUND_SHARED] = 0
    first = place = prompts_of(s)[r, HASH_AT]
    end = first + _units_in(s, r, request_i[r, PROMPT] + request_i[r, PRODUCED] - 1)
    while place < end:
        unit = unit_of[hash_ids[place]]
        if unit == 0:
            break
        n[FOUND_SHARED] += units[unit, UNIT_HOLDERS] > 0
        place += 1
    return int(max(request_i[r, COMPUTED], (place - first) * n[UNIT_TOKENS]))


@compiled()
def _hold_units(s: Table, i: int, count: int) -> None:
    """Let a request hold the leading units of its prompt, which are all found; it goes on from there."""
    n, slots, hash_ids, held_units, unit_of, units, runs = (
        ints_of(s),
        slots_of(s),
        hash_ids_of(s),
        held_units_of(s),
        unit_of_of(s),
        units_of(s),
        runs_of(s),
    )
    row = prompts_of(s)[slots[REQUEST, i]]
    for place in range(row[HASH_AT], row[HASH_AT] + count):
        unit = unit_of[hash_ids[place]]
        held_units[place] = unit
        if units[unit, UNIT_HOLDERS] == 0:
            run = units[unit, UNIT_RUN]
            n[FREE] -= runs[BLOCKS, run]
            runs[OWNER, run], runs[BLOCKS, run] = NOBODY, 0
        units[unit, UNIT_HOLDERS] += 1
    slots[SHARED, i] = count * n[UNIT_BLOCKS]
    if count < row[UNITS]:
        slots[FILL, i] = (count + 1) * n[UNIT_TOKENS]


@compiled()
def _fill_cache(s: Table, i: int) -> None:
    """Let others find the units that a request's prefill has passed; those that they find already stay its own."""
    n, slots, hash_ids, held_units, unit_of, units = (
        ints_of(s),
        slots_of(s),
        hash_ids_of(s),
        held_units_of(s),
        unit_of_of(s),
        units_of(s),
    )
    row, computed = prompts_of(s)[slots[REQUEST, i]], request_i_of(s)[slots[REQUEST, i], COMPUTED]
    while computed >= slots[FILL, i]:
        count = slots[FILL, i] // n[UNIT_TOKENS]
        place = row[HASH_AT] + count - 1
        if unit_of[hash_ids[place]] == 0:
            unit = n[FREE_UNIT]
            if unit > 0:
                n[FREE_UNIT] = units[unit, UNIT_RUN]
            else:
                n[N_UNITS] += 1
                unit = n[N_UNITS]
            units[unit, UNIT_HOLDERS], units[unit, UNIT_ID] = 1, hash_ids[place]
            units[unit, UNIT_SET] = n[PREFILL_SET]
            unit_of[hash_ids[place]] = held_units[place] = unit
            slots[SHARED, i] += n[UNIT_BLOCKS]
        slots[FILL, i] = (count + 1) * n[UNIT_TOKENS] if count < row[UNITS] else NEVER


@compiled()
def _let_units_go(s: Table, i: int) -> None:
    """Hold a request's units no longer, from the last to the first; its own blocks are free by then."""
    n, slots, held_units, units, sets = ints_of(s), slots_of(s), held_units_of(s), units_of(s), sets_of(s)
    row = prompts_of(s)[slots[REQUEST, i]]
    slots[SHARED, i] = 0
    for place in range(row[HASH_AT] + row[UNITS] - 1, row[HASH_AT] - 1, -1):
        unit = held_units[place]
        if unit == 0:
            continue
        held_units[place] = 0
        blocks = sets[units[unit, UNIT_SET], LAYERS] * n[UNIT_BLOCKS]
        if units[unit, UNIT_HOLDERS] == 1 and units[unit, UNIT_ID] >= 0 and n[FREE] < 0:
            _forget_unit(s, unit)  # the shrunk pool takes some of its blocks
        units[unit, UNIT_HOLDERS] -= 1
        if units[unit, UNIT_HOLDERS] > 0:
            continue
        if units[unit, UNIT_ID] >= 0:
            _release(s, blocks, NOBODY - unit)
        else:
            _release(s, blocks, NOBODY)
            units[unit, UNIT_HOLDERS], units[unit, UNIT_RUN] = -1, n[FREE_UNIT]
            n[FREE_UNIT] = unit


@compiled(once=True)
def _forget_units(s: Table) -> None:
    """Let nobody find a unit again; those that run hold theirs on, and put no more into the cache."""
    n, slots, units = ints_of(s), slots_of(s), units_of(s)
    slots[FILL, :] = NEVER
    for unit in range(1, n[N_UNITS] + 1):
        if units[unit, UNIT_HOLDERS] >= 0 and units[unit, UNIT_ID] >= 0:
            _forget_unit(s, unit)


# -- who decodes -----------------------------------------------------------------------------------------------------


@compiled()
def _settle_one(s: Table, i: int) -> None:
    """Bring the row of a decoding request up to the clock."""
    n, request_i, request_f, slots, cohort_s, sets, set_nll = (
        ints_of(s),
        request_i_of(s),
        request_f_of(s),
        slots_of(s),
        cohort_s_of(s),
        sets_of(s),
        set_nll_of(s),
    )
    r, since, held_set = slots[REQUEST, i], n[CLOCK] - slots[JOINED, i], slots[SET, i]
    if since > 0:
        request_i[r, COMPUTED] += since
        request_i[r, PRODUCED] += since
        request_i[r, KEPT_PARAMS] += since * sets[held_set, DECODE_PARAMS]
        request_f[r, NLL_SUM] += since * set_nll[held_set, 1]
        request_f[r, LAST_S] = cohort_s[0]
        slots[JOINED, i] = n[CLOCK]


@compiled()
def settle(s: Table) -> None:
    """Bring the rows of all decoding requests up to the clock."""
    slots = slots_of(s)
    i = slots[NEXT, slots.shape[1] - 1]
    while i != slots.shape[1] - 1:
        if slots[DUE, i] != NEVER:
            _settle_one(s, i)
        i = slots[NEXT, i]


@compiled()
def _cohort_of(s: Table, last_s: float) -> int:
    """Return the cohort of those that got their last token at ``last_s``; a new one if there is none."""
    n, slots, cohort_s = ints_of(s), slots_of(s), cohort_s_of(s)
    for cohort in range(n[COHORTS] - 1, -1, -1):
        if cohort_s[cohort] == last_s:
            return cohort
    if n[COHORTS] == slots.shape[1]:  # some are empty then, for there are fewer running requests
        to = 1
        for cohort in range(1, n[COHORTS]):
            if slots[COHORT, cohort] > 0:
                cohort_s[to], slots[COHORT, to] = cohort_s[cohort], slots[COHORT, cohort]
                to += 1
        n[COHORTS] = to
    cohort = n[COHORTS]
    cohort_s[cohort], slots[COHORT, cohort] = last_s, 0
    n[COHORTS] = cohort + 1
    return int(cohort)


@compiled()
def _join_decodes(s: Table, i: int) -> None:
    """Count a slot, whose row is up to date, among those that gain a token in every decoding iteration."""
    n, request_i, request_f, slots, phases, sets = (
        ints_of(s),
        request_i_of(s),
        request_f_of(s),
        slots_of(s),
        phases_of(s),
        sets_of(s),
    )
    r, held_set, clock = slots[REQUEST, i], slots[SET, i], n[CLOCK]
    since = request_i[r, COMPUTED] - clock
    slots[JOINED, i] = clock
    phases[since % n[BLOCK_TOKENS]] += sets[held_set, LAYERS]
    sets[held_set, COUNT] += 1
    sets[held_set, CONTEXT] += since
    n[DECODES] += 1
    due = clock + request_i[r, LIMIT] - request_i[r, PRODUCED]
    slots[DUE, i] = due
    n[NEXT_DUE] = min(n[NEXT_DUE], due)
    slots[COHORT, _cohort_of(s, request_f[r, LAST_S])] += 1


@compiled()
def _leave_decodes(s: Table, i: int) -> None:
    """Undo `_join_decodes`; the row is up to date then."""
    n, request_i, request_f, slots, phases, sets = (
        ints_of(s),
        request_i_of(s),
        request_f_of(s),
        slots_of(s),
        phases_of(s),
        sets_of(s),
    )
    _settle_one(s, i)
    r, held_set = slots[REQUEST, i], slots[SET, i]
    since = request_i[r, COMPUTED] - n[CLOCK]
    phases[since % n[BLOCK_TOKENS]] -= sets[held_set, LAYERS]
    sets[held_set, COUNT] -= 1
    sets[held_set, CONTEXT] -= since
    n[DECODES] -= 1
    slots[DUE, i] = NEVER
    slots[COHORT, _cohort_of(s, request_f[r, LAST_S])] -= 1


@compiled()
def _count_decodes(s: Table) -> None:
    """Count all decoding requests anew; their rows are up to date."""
    n, f, request_i, slots, cohort_s, phases, sets = (
        ints_of(s),
        floats_of(s),
        request_i_of(s),
        slots_of(s),
        cohort_s_of(s),
        phases_of(s),
        sets_of(s),
    )
    end = slots.shape[1] - 1
    phases[:] = 0
    for k in range(n[N_SETS]):
        sets[k, COUNT] = sets[k, CONTEXT] = 0
    n[DECODES], n[COHORTS], n[NEXT_DUE] = 0, 1, NEVER
    cohort_s[0], slots[COHORT, 0] = f[NOW], 0
    i = slots[NEXT, end]
    while i != end:
        slots[DUE, i] = NEVER
        if request_i[slots[REQUEST, i], COMPUTED] >= request_i[slots[REQUEST, i], PREFILL]:
            _join_decodes(s, i)
        i = slots[NEXT, i]


@compiled()
def _unlink(s: Table, i: int) -> None:
    n, slots = ints_of(s), slots_of(s)
    before, after = slots[PREVIOUS, i], slots[NEXT, i]
    slots[NEXT, before], slots[PREVIOUS, after] = after, before
    slots[FREE_SLOT, slots.shape[1] - 1 - n[N_RUNNING]] = i
    n[N_RUNNING] -= 1
    if slots[KEEP, i] >= 0:
        n[KEEPERS] -= 1


@compiled()
def _preempt(s: Table, i: int) -> int:
    """Take a running request's KV and put it back at the head of the queue; return the tokens it had computed."""
    n, request_i, slots = ints_of(s), request_i_of(s), slots_of(s)
    if slots[DUE, i] != NEVER:
        _leave_decodes(s, i)
    r = slots[REQUEST, i]
    computed = request_i[r, COMPUTED]
    held = blocks_of(s, i, computed)
    whole = slots[KEEP, i] < 0 and slots[SET, i] == n[PREFILL_SET]  # else nobody could go on from it
    whole = whole and slots[SHARED, i] == _units_in(s, r, computed) * n[UNIT_BLOCKS]
    if whole and slots[SHARED, i] > 0:  # its units are forgotten all or none
        whole = units_of(s)[held_units_of(s)[prompts_of(s)[r, HASH_AT]], UNIT_ID] >= 0
    _unlink(s, i)
    n[RUNNING_TOKENS] -= computed
    _release(s, held, r if n[REUSE] and whole else NOBODY)
    if slots[SHARED, i] > 0:
        _let_units_go(s, i)
    request_i[r, COMPUTED] = _found_again(s, r)
    request_i[r, PREEMPTED] += 1
    request_i[r, STATUS] = WAITING
    slots[STACK, n[STACKED]] = r
    n[STACKED] += 1
    n[WAITING_TOKENS] += request_i[r, PROMPT] + request_i[r, PRODUCED]
    n[PREEMPTIONS] += 1
    return int(computed)


# -- arrivals and admission ------------------------------------------------------------------------------------------


@compiled()
def take_arrivals(s: Table, now_s: float) -> None:
    """Let requests that have arrived wait, or reject them."""
    n, f, request_i, request_f, queue = ints_of(s), floats_of(s), request_i_of(s), request_f_of(s), queue_of(s)
    while f[NEXT_ARRIVAL_S] <= now_s:
        r = n[NEXT_ARRIVAL]
        n[NEXT_ARRIVAL] = r + 1
        f[NEXT_ARRIVAL_S] = request_f[r + 1, ARRIVAL_S] if r + 1 < n[N_REQUESTS] else np.inf
        row, times = request_i[r], request_f[r]
        row[COMPUTED] = row[PRODUCED] = row[PREFILL] = row[PREEMPTED] = row[KEPT_PARAMS] = 0
        row[KEPT_RUN], row[STATUS] = -1, WAITING
        times[ADMITTED_S] = times[FIRST_S] = times[LAST_S] = times[FINISH_S] = np.nan
        times[NLL_SUM] = 0.0
        n[ARRIVED_PROMPT_TOKENS] += row[PROMPT]
        if (n[ADMIT] >= 0 and _waiting(n) >= n[ADMIT]) or row[LIMIT] < 1:
            row[STATUS] = REJECTED
            n[N_REJECTED] += 1
        else:
            queue[n[QUEUE_TAIL]] = r
            n[QUEUE_TAIL] += 1
            n[WAITING_TOKENS] += row[PROMPT]


@compiled()
def head(s: Table) -> int:
    """Return the request that is admitted next."""
    n, queue, slots = ints_of(s), queue_of(s), slots_of(s)
    stacked = n[STACKED]
    return int(slots[STACK, stacked - 1] if stacked > 0 else queue[n[QUEUE_HEAD]])


@compiled(inline=True)
def _chunk(s: Table, r: int, computed: int, budget: int, long: int) -> int:
    """Return how many tokens of a request an iteration computes beyond those that are."""
    request_i = request_i_of(s)
    chunk = min(request_i[r, PROMPT] + request_i[r, PRODUCED] - computed, budget)
    return int(min(chunk, long)) if long > 0 else int(chunk)


@compiled()
def _admit(s: Table, now_s: float, found: int) -> int:
    """Admit the head of the queue, which finds so many tokens computed; return its slot."""
    n, request_i, request_f, queue, slots, runs = (
        ints_of(s),
        request_i_of(s),
        request_f_of(s),
        queue_of(s),
        slots_of(s),
        runs_of(s),
    )
    end = slots.shape[1] - 1
    if n[STACKED] > 0:
        n[STACKED] -= 1
        r = slots[STACK, n[STACKED]]
    else:
        r = queue[n[QUEUE_HEAD]]
        n[QUEUE_HEAD] += 1
    row = request_i[r]
    target = row[PROMPT] + row[PRODUCED]
    n[WAITING_TOKENS] -= target
    n[RUNNING_TOKENS] += found
    row[COMPUTED], row[PREFILL], row[STATUS] = found, target, RUNNING
    if np.isnan(request_f[r, ADMITTED_S]):
        request_f[r, ADMITTED_S] = now_s
    n[N_RUNNING] += 1
    i = slots[FREE_SLOT, end - n[N_RUNNING]]
    newest = slots[PREVIOUS, end]
    slots[NEXT, newest], slots[PREVIOUS, i], slots[NEXT, i], slots[PREVIOUS, end] = i, newest, end, i
    slots[REQUEST, i], slots[SET, i], slots[KEEP, i], slots[DUE, i] = r, n[PREFILL_SET], -1, NEVER
    slots[SHARED, i], slots[FILL, i] = 0, NEVER
    if n[CACHING]:
        _hold_units(s, i, _units_in(s, r, found))
    if n[PREFIX_CACHING] and prompts_of(s)[r, CACHED] < 0:
        prompts_of(s)[r, CACHED] = found
    run = row[KEPT_RUN]
    if run >= 0:
        claimed = blocks_of(s, i, found)
        runs[BLOCKS, run] -= claimed
        runs[OWNER, run] = NOBODY
        row[KEPT_RUN] = -1
        n[FREE] -= claimed
    return int(i)


@compiled()
def _admit_those_that_fit(s: Table, now_s: float, budget: int, free: int) -> int:
    """Admit from the head of the queue while budget, room and places last; return how many (sim/engine/scheduler.py)."""
    n, request_i, slots, sets = ints_of(s), request_i_of(s), slots_of(s), sets_of(s)
    chunked, layers = n[CHUNKED] != 0, sets[n[PREFILL_SET], LAYERS]
    admitted = 0
    while n[STACKED] + n[QUEUE_TAIL] - n[QUEUE_HEAD] > 0 and n[N_RUNNING] < n[MAX_RUNNING]:
        r = head(s)
        found, shared = request_i[r, COMPUTED], 0
        if n[CACHING]:
            found, shared = _found(s, r), n[FOUND_SHARED] * n[UNIT_BLOCKS]
        full = layers * (_blocks(request_i[r, PROMPT] + request_i[r, PRODUCED], n[BLOCK_TOKENS]) - shared)
        if chunked:
            if budget == 0:
                break
            chunk = _chunk(s, r, found, budget, n[LONG_PREFILL_TOKENS])
            need = layers * (_blocks(found + chunk, n[BLOCK_TOKENS]) - shared)
            must_fit = full if n[RESERVE_FULL_PROMPT] or n[N_RUNNING] == 0 else need
        else:
            chunk = request_i[r, PROMPT] + request_i[r, PRODUCED] - found
            if chunk > budget and admitted > 0:
                break
            need = must_fit = full
        if must_fit + n[WATERMARK] > free:
            break
        free -= need
        budget -= chunk
        at = n[N_BATCH]
        slots[BATCH, at], slots[TOKENS, at] = _admit(s, now_s, found), chunk
        n[N_BATCH] = at + 1
        admitted += 1
        if not chunked and budget <= 0:
            break
    return admitted


# -- plans and memory ------------------------------------------------------------------------------------------------


@compiled()
def follow_budget(s: Table, now_s: float) -> None:
    """Bring the budget up to ``now_s`` and count the seconds in which more was held than it allowed."""
    n, f, budget_s, budget_bytes = ints_of(s), floats_of(s), budget_s_of(s), budget_bytes_of(s)
    used = n[POOL] - n[FREE]
    if not n[IN_ITERATION] and f[END] == now_s:
        used = n[USED_BEFORE]  # what was held until this moment, at which an iteration ended
    held_bytes = n[WEIGHT_BYTES] + n[INCOMING_BYTES] + n[WORKSPACE_BYTES] + used * n[BLOCK_BYTES]
    while True:
        step = n[BUDGET_STEP]
        more = step + 1 < len(budget_s) and budget_s[step + 1] <= now_s
        until_s = budget_s[step + 1] if more else now_s
        if held_bytes > budget_bytes[step]:
            f[VIOLATION] += until_s - f[VIOLATION_SINCE]
        f[VIOLATION_SINCE] = until_s
        if not more:
            return
        n[BUDGET_STEP] = step + 1
        n[BUDGET_MOVED] = 1


@compiled()
def take_decisions(s: Table, now_s: float) -> bool:
    """Want the plan that the schedule has for this moment; return whether that is another one than before."""
    n, f, schedule_s, schedule = ints_of(s), floats_of(s), schedule_s_of(s), schedule_of(s)
    another = False
    while f[NEXT_DECISION_S] <= now_s:
        at = n[NEXT_DECISION]
        wanted = n[DECIDED] if n[DECIDED] >= 0 else n[TARGET]
        if schedule[at] != wanted:
            n[DECIDED], f[DECIDED_S] = schedule[at], schedule_s[at]
            another = True
        n[NEXT_DECISION] = at + 1
        f[NEXT_DECISION_S] = schedule_s[at + 1] if at + 1 < n[N_DECISIONS] else np.inf
    return another


@compiled()
def resize_to_budget(s: Table) -> None:
    """Give the KV pool what the budget leaves."""
    n, f, budget_bytes = ints_of(s), floats_of(s), budget_bytes_of(s)
    left = budget_bytes[n[BUDGET_STEP]] - n[WEIGHT_BYTES] - n[INCOMING_BYTES] - n[WORKSPACE_BYTES]
    layer_blocks = max(0, left // n[BLOCK_BYTES])
    if layer_blocks != n[POOL]:
        resize_pool(s, layer_blocks)
    n[WATERMARK] = n[WATERMARK_LIMIT] + int(np.ceil(f[WATERMARK_SHARE] * layer_blocks))


@compiled()
def _charge(s: Table, victims: int, tokens: int) -> None:
    """Charge the plan change under way with requests that lost their KV, and the tokens they had computed."""
    n, changes = ints_of(s), changes_of(s)
    if n[OPEN_CHANGE] >= 0:
        changes[n[OPEN_CHANGE], CHANGE_VICTIMS] += victims
        changes[n[OPEN_CHANGE], CHANGE_RECOMPUTED] += tokens


@compiled()
def _preempt_to_fit(s: Table) -> None:
    """Preempt the newest until what is held fits the pool."""
    n, slots = ints_of(s), slots_of(s)
    while n[FREE] < 0 and n[N_RUNNING] > 0:
        _charge(s, 1, _preempt(s, slots[PREVIOUS, slots.shape[1] - 1]))


@compiled(once=True)
def _preempt_lacking(s: Table, layer: int) -> None:
    """Preempt, newest first, those that lack an MHA block that runs at their stage."""
    n, slots, sets = ints_of(s), slots_of(s), sets_of(s)
    words = sets.shape[1] - SET_COLUMNS
    of_plan = steps_of(s)[n[STEP], STEP_COLUMNS:]
    prefill_too, decode_too = _has(of_plan, layer), _has(of_plan[words:], layer)
    end = slots.shape[1] - 1
    i = slots[PREVIOUS, end]
    while prefill_too and i != end:
        before = slots[PREVIOUS, i]
        if (decode_too or slots[DUE, i] == NEVER) and not _has(sets[slots[SET, i], SET_COLUMNS:], layer):
            _charge(s, 1, _preempt(s, i))
        i = before


@compiled()
def _draft(s: Table, count: int, held: Ints, mask: Ints) -> int:
    """Return the place among the first ``count`` drafts of what two sets share; ``count`` itself where it is new."""
    drafts = drafts_of(s)
    for w in range(drafts.shape[1]):
        drafts[count, w] = held[w] & mask[w]
    for k in range(count):
        same = True
        for w in range(drafts.shape[1]):
            same = same and drafts[k, w] == drafts[count, w]
        if same:
            return k
    return count


@compiled(once=True)
def _draft_sets(s: Table, step: int) -> int:
    """Draft the sets that requests will hold in a step: of each, what still runs of what it held.

    The first two are those of the plan itself; they are one where prefill runs no more than decode. Columns 0 and 1 of
    ``narrowed`` get the new set of those in prefill and those in decode, by their old one.

    Returns:
        How many there are.
    """
    n, slots, sets, drafts, narrowed = ints_of(s), slots_of(s), sets_of(s), drafts_of(s), narrowed_of(s)
    words, end = drafts.shape[1], slots.shape[1] - 1
    prefill = steps_of(s)[step, STEP_COLUMNS:]
    decode = prefill[words:]
    for k in range(n[N_SETS]):
        narrowed[k, 0] = narrowed[k, 1] = -1
    for unit in range(1, n[N_UNITS] + 1):  # a unit loses what prefill drops
        if units_of(s)[unit, UNIT_HOLDERS] > 0:
            narrowed[units_of(s)[unit, UNIT_SET], 0] = 0
    i = slots[NEXT, end]
    while i != end:
        narrowed[slots[SET, i], 1 if slots[DUE, i] != NEVER else 0] = 0
        i = slots[NEXT, i]
    count = 1 + _draft(s, ZERO, prefill, prefill)
    count = max(count, 1 + _draft(s, count, decode, decode))
    for k in range(n[N_SETS]):
        held = sets[k, SET_COLUMNS:]
        if narrowed[k, 0] == 0:
            narrowed[k, 0] = _draft(s, count, held, prefill)
            count = max(count, 1 + narrowed[k, 0])
            count = max(count, 1 + _draft(s, count, held, decode))
        if narrowed[k, 1] == 0:
            narrowed[k, 1] = _draft(s, count, held, decode)
            count = max(count, 1 + narrowed[k, 1])
    return count


@compiled(once=True)
def _change_sets(s: Table, count: int, decode: Ints) -> None:
    """Let requests hold the KV of the drafted sets; their rows are up to date (`settle`)."""
    n, request_i, slots, phases, sets, drafts, narrowed = (
        ints_of(s),
        request_i_of(s),
        slots_of(s),
        phases_of(s),
        sets_of(s),
        drafts_of(s),
        narrowed_of(s),
    )
    end, keepers, clock, block_tokens = slots.shape[1] - 1, n[KEEPERS] > 0, n[CLOCK], n[BLOCK_TOKENS]
    freed = 0
    i = slots[NEXT, end]
    while keepers and i != end:
        freed += blocks_of(s, i, request_i[slots[REQUEST, i], COMPUTED])
        i = slots[NEXT, i]
    for k in range(n[N_SETS]):
        narrowed[k, 2] = sets[k, LAYERS]
    for k in range(count):
        layers = 0
        for w in range(drafts.shape[1]):
            bits = drafts[k, w]
            sets[k, SET_COLUMNS + w] = bits
            while bits:
                layers += 1
                bits &= bits - 1
        sets[k, LAYERS], sets[k, COUNT], sets[k, CONTEXT] = layers, 0, 0
        sets[k, AFTER] = _draft(s, count, drafts[k], decode)
    n[N_SETS] = count
    phases[:] = 0
    i = slots[NEXT, end]
    while i != end:
        before, tokens = slots[SET, i], request_i[slots[REQUEST, i], COMPUTED]
        decodes = slots[DUE, i] != NEVER
        after = narrowed[before, 1 if decodes else 0]
        slots[SET, i] = after
        if decodes:
            since = tokens - clock
            phases[since % block_tokens] += sets[after, LAYERS]
            sets[after, COUNT] += 1
            sets[after, CONTEXT] += since
        if keepers:
            freed -= blocks_of(s, i, tokens)
        elif sets[after, LAYERS] != narrowed[before, 2]:
            freed += (narrowed[before, 2] - sets[after, LAYERS]) * (_blocks(tokens, block_tokens) - slots[SHARED, i])
        i = slots[NEXT, i]
    for unit in range(1, n[N_UNITS] + 1):
        row = units_of(s)[unit]
        if row[UNIT_HOLDERS] > 0:
            before, after = row[UNIT_SET], narrowed[row[UNIT_SET], 0]
            freed += (narrowed[before, 2] - sets[after, LAYERS]) * n[UNIT_BLOCKS]
            row[UNIT_SET] = after
    _release(s, freed, NOBODY)


@compiled(once=True)
def _find_prices(s: Table, step: int, count: int, drafted: bool) -> bool:
    """Find what tokens cost in a step by the set that their request holds: column 3 of ``narrowed``.

    Returns:
        Whether all are known; if not, what is needed is said, and the last draft is the set.
    """
    n, sets, drafts, narrowed, prices = ints_of(s), sets_of(s), drafts_of(s), narrowed_of(s), prices_of(s)
    words = drafts.shape[1]
    for k in range(count):
        held = drafts[k] if drafted else sets[k, SET_COLUMNS:]
        at = steps_of(s)[step, STEP_PRICES]
        while at >= 0:
            same = True
            for w in range(words):
                same = same and prices[at, 1 + w] == held[w]
            if same:
                break
            at = prices[at, 0]
        if at < 0:
            n[NEEDED], n[NEEDED_STEP], n[NEEDED_AT] = PRICE, step, drafts.shape[0] - 1
            for w in range(words):
                drafts[drafts.shape[0] - 1, w] = held[w]
            return False
        narrowed[k, 3] = at
    return True


@compiled()
def run_step(s: Table, step: int, now_s: float) -> bool:
    """Run what a step says; return whether all that this takes is known, else nothing has changed."""
    n, sets, set_nll, narrowed, price_nll, shares, block_counts, layer_rows = (
        ints_of(s),
        sets_of(s),
        set_nll_of(s),
        narrowed_of(s),
        price_nll_of(s),
        shares_of(s),
        block_counts_of(s),
        layer_rows_of(s),
    )
    row, words = steps_of(s)[step], sets.shape[1] - SET_COLUMNS
    other_prefill = other_decode = n[STEP] < 0
    one_set, some = True, False
    for w in range(words):
        prefill, decode = row[STEP_COLUMNS + w], row[STEP_COLUMNS + words + w]
        one_set, some = one_set and prefill == decode, some or prefill != 0
        if n[STEP] >= 0:
            before = steps_of(s)[n[STEP]]
            other_prefill = other_prefill or prefill != before[STEP_COLUMNS + w]
            other_decode = other_decode or decode != before[STEP_COLUMNS + words + w]
    caching = n[PREFIX_CACHING] != 0 and one_set and some and row[STEP_KEEP] < 0
    new_sets = other_prefill or other_decode
    count = _draft_sets(s, step) if new_sets else n[N_SETS]
    if n[PRICED] and not _find_prices(s, step, count, new_sets):
        return False
    settle(s)
    if other_prefill or caching != (n[CACHING] != 0):
        forget_kept_kv(s)  # it lacks a layer, or has one too many
        _forget_units(s)
    n[CACHING] = caching
    n[STEP], n[TARGET], n[WEIGHT_BYTES] = step, row[STEP_TARGET], row[STEP_WEIGHT_BYTES]
    n[PLAN_KEEP], n[ADMIT] = row[STEP_KEEP], row[STEP_ADMIT]
    n[MAX_RUNNING] = n[RUNNING_LIMIT]
    if row[STEP_MAX_RUNNING] >= 0:
        n[MAX_RUNNING] = min(n[RUNNING_LIMIT], row[STEP_MAX_RUNNING])
    at = STEP_COLUMNS + 2 * words
    for i in range(block_counts.shape[0]):
        for j in range(block_counts.shape[1]):
            block_counts[i, j] = row[at]
            at += 1
    for i in range(layer_rows.shape[0]):
        for j in range(layer_rows.shape[1]):
            layer_rows[i, j] = row[at]
            at += 1
    if new_sets:
        _change_sets(s, count, row[STEP_COLUMNS + words :])
        n[PREFILL_SET], n[DECODE_SET] = 0, 0 if one_set else 1
    for k in range(count):
        sets[k, PREFILL_PARAMS] = row[STEP_PREFILL_PARAMS] + sets[k, LAYERS] * row[STEP_MHA_PARAMS]
        sets[k, DECODE_PARAMS] = row[STEP_DECODE_PARAMS] + sets[k, LAYERS] * row[STEP_MHA_PARAMS]
        if n[PRICED]:
            set_nll[k, 0], set_nll[k, 1] = price_nll[narrowed[k, 3], 0], price_nll[narrowed[k, 3], 1]
    at = n[N_SHARES]
    if at == 0 or shares[at - 1, 1] != n[WEIGHT_BYTES]:
        shares[at, 0], shares[at, 1] = now_s, n[WEIGHT_BYTES]
        n[N_SHARES] = at + 1
    return True


@compiled(once=True)
def _join(s: Table, now_s: float) -> bool:
    """Let the layer whose copy is whole run from now on, in the place of what it replaces."""
    n, f, changes = ints_of(s), floats_of(s), changes_of(s)
    copy = copies_of(s)[n[COPY]]
    if copy[COPY_AFTER] < 0:
        n[NEEDED], n[NEEDED_STEP], n[NEEDED_AT] = JOIN, n[STEP], n[COPY]
        return False
    before_bytes = n[WEIGHT_BYTES]
    if not run_step(s, copy[COPY_AFTER], now_s):
        return False
    if n[OPEN_CHANGE] >= 0:
        changes[n[OPEN_CHANGE], CHANGE_BYTES_IN] += copy[COPY_BYTES]
        changes[n[OPEN_CHANGE], CHANGE_BYTES_FREED] += before_bytes + copy[COPY_BYTES] - n[WEIGHT_BYTES]
    n[COPY], n[INCOMING_BYTES], f[COPY_END] = -1, 0, np.inf
    if n[RECOMPUTE] and copy[COPY_RESTORES]:
        _preempt_lacking(s, copy[COPY_LAYER])
    return True


@compiled(once=True)
def _begin_change(s: Table, now_s: float) -> bool:
    """Drop what the plan decided on does not run, and go on with the copy under way if it still wants it."""
    n, f, steps, copies, decisions, changes = (
        ints_of(s),
        floats_of(s),
        steps_of(s),
        copies_of(s),
        decisions_of(s),
        changes_of(s),
    )
    target, before, before_bytes = n[DECIDED], n[STEP], n[WEIGHT_BYTES]
    at = steps[before, STEP_DECISIONS]
    while at >= 0 and decisions[at, DECISION_TARGET] != target:
        at = decisions[at, DECISION_NEXT]
    if at < 0:
        n[NEEDED], n[NEEDED_STEP], n[NEEDED_AT] = DECISION, before, target
        return False
    if not run_step(s, decisions[at, DECISION_STEP], now_s):
        return False
    row = changes[n[N_CHANGES]]
    row[:] = 0.0
    row[CHANGE_S], row[CHANGE_READY_S] = f[DECIDED_S], np.nan
    row[CHANGE_FROM], row[CHANGE_TO], row[CHANGE_BLOCKS_BEFORE] = before, target, n[POOL]
    row[CHANGE_BYTES_FREED] = before_bytes - n[WEIGHT_BYTES]
    n[OPEN_CHANGE] = n[N_CHANGES]
    n[N_CHANGES] += 1
    n[DECIDED] = -1
    if n[COPY] >= 0:
        under_way, first = copies[n[COPY]], steps[n[STEP], STEP_COPIES_AT]
        n[COPY] = -1
        for other in range(first, first + steps[n[STEP], STEP_COPIES]):
            same = True
            for column in range(COPY_RESTORES):
                same = same and copies[other, column] == under_way[column]
            if same:
                n[COPY] = other
        if n[COPY] < 0:
            n[INCOMING_BYTES], f[COPY_END] = 0, np.inf
    return True


@compiled(once=True)
def _carry_out(s: Table, now_s: float) -> bool:
    n, f, steps, changes = ints_of(s), floats_of(s), steps_of(s), changes_of(s)
    if n[COPY] >= 0 and f[COPY_END] <= now_s and not _join(s, now_s):
        return False
    take_decisions(s, now_s)
    if n[DECIDED] >= 0 and not _begin_change(s, now_s):
        return False
    n[BUDGET_MOVED] = 0
    if n[COPY] < 0 and steps[n[STEP], STEP_COPIES] > 0:
        n[COPY] = steps[n[STEP], STEP_COPIES_AT]
        n[INCOMING_BYTES] = copies_of(s)[n[COPY], COPY_BYTES]
        f[COPY_END] = now_s + n[INCOMING_BYTES] / f[COPY_BYTES_PER_S]
    if n[OPEN_CHANGE] >= 0 and n[COPY] < 0:
        changes[n[OPEN_CHANGE], CHANGE_READY_S] = now_s
    resize_to_budget(s)
    _preempt_to_fit(s)
    if n[OPEN_CHANGE] >= 0:
        changes[n[OPEN_CHANGE], CHANGE_BLOCKS_AFTER] = n[POOL]
        if n[COPY] < 0:
            n[OPEN_CHANGE] = -1
    return True


@compiled(once=True)
def change_plan(s: Table, now_s: float) -> bool:
    """Do what is due of plan and memory changes, between two iterations.

    Returns:
        Whether all of it is done. If not, ``NEEDED`` says what the plan book has to work out first: then call again.
    """
    n = ints_of(s)
    follow_budget(s, now_s)
    before = n[PREEMPTIONS]
    done = _carry_out(s, now_s)
    n[CHANGE_PREEMPTED] += n[PREEMPTIONS] - before
    return done


@compiled()
def change_due_s(s: Table) -> float:
    """Return from when on memory or the plan have to change before the next iteration."""
    n, f, budget_s = ints_of(s), floats_of(s), budget_s_of(s)
    if n[DECIDED] >= 0 or n[BUDGET_MOVED]:
        return -np.inf
    due_s = min(f[COPY_END], f[NEXT_DECISION_S])
    if n[BUDGET_STEP] + 1 < len(budget_s):
        due_s = min(due_s, budget_s[n[BUDGET_STEP] + 1])
    return float(due_s)


@compiled()
def _change_if_due(s: Table, now_s: float) -> int:
    """Change plan and memory if it is time; return ``DONE``, or why that is not done yet: ``GROW``, ``NEEDS``."""
    n, f, changes, shares = ints_of(s), floats_of(s), changes_of(s), shares_of(s)
    while now_s >= change_due_s(s):
        if n[N_CHANGES] == len(changes) or n[N_SHARES] + 2 > len(shares):
            return GROW
        if f[NEXT_ARRIVAL_S] <= now_s:
            take_arrivals(s, now_s)
        if not change_plan(s, now_s):
            return NEEDS
    return DONE


# -- the batch of one iteration ------------------------------------------------------------------------------------


@compiled()
def _form(s: Table, now_s: float) -> int:
    """Form the next batch while all decodes advance together; return how many requests were preempted.

    Everything that running requests need comes before what is admitted, and the one unfinished prompt there may be is
    the newest of them. So the newest are preempted until the rest fit: who they are does not depend on the order in
    which the others ask.
    """
    n, request_i, slots, phases = ints_of(s), request_i_of(s), slots_of(s), phases_of(s)
    end = slots.shape[1] - 1
    n[N_BATCH], n[DECODING] = 0, 0
    if not n[CHUNKED] and _admit_those_that_fit(s, now_s, n[MAX_BATCH_TOKENS], n[FREE]) > 0:
        need = 0
        for j in range(n[N_BATCH]):
            i = slots[BATCH, j]
            computed = request_i[slots[REQUEST, i], COMPUTED]
            need += blocks_of(s, i, computed + slots[TOKENS, j]) - blocks_of(s, i, computed)
        _take(s, need)
        return 0
    at_clock = (-n[CLOCK]) % n[BLOCK_TOKENS]
    victims = 0
    while phases[at_clock] > n[FREE] and n[N_RUNNING] > 0:
        _preempt(s, slots[PREVIOUS, end])
        victims += 1
    need = phases[at_clock]
    budget = n[MAX_BATCH_TOKENS] - n[DECODES]
    newest = slots[PREVIOUS, end]
    if newest != end and slots[DUE, newest] == NEVER and budget > 0:
        r = slots[REQUEST, newest]
        computed = request_i[r, COMPUTED]
        chunk = _chunk(s, r, computed, budget, n[LONG_PREFILL_TOKENS])
        more = blocks_of(s, newest, computed + chunk) - blocks_of(s, newest, computed)
        if need + more > n[FREE]:
            _preempt(s, newest)
            victims += 1
        else:
            need += more
            budget -= chunk
            slots[BATCH, 0], slots[TOKENS, 0] = newest, chunk
            n[N_BATCH] = 1
    n[DECODING] = n[DECODES] > 0
    if n[CHUNKED] and victims == 0:
        before = n[N_BATCH]
        _admit_those_that_fit(s, now_s, budget, n[FREE] - need)
        for j in range(before, n[N_BATCH]):
            i = slots[BATCH, j]
            computed = request_i[slots[REQUEST, i], COMPUTED]
            need += blocks_of(s, i, computed + slots[TOKENS, j]) - blocks_of(s, i, computed)
    _take(s, need)
    return victims


@compiled()
def _form_eagerly(s: Table, now_s: float) -> int:
    """Form the next batch request by request, decodes among them; return how many were preempted."""
    n, request_i, slots = ints_of(s), request_i_of(s), slots_of(s)
    end = slots.shape[1] - 1
    settle(s)
    i = slots[NEXT, end]
    while i != end:  # from here on a request decodes when its row says so
        slots[DUE, i] = NEVER
        i = slots[NEXT, i]
    n[N_BATCH], n[DECODING] = 0, 0
    victims, running = 0, n[N_RUNNING]
    if n[CHUNKED] or _admit_those_that_fit(s, now_s, n[MAX_BATCH_TOKENS], n[FREE]) == 0:
        budget = n[MAX_BATCH_TOKENS] if n[CHUNKED] else running
        long = n[LONG_PREFILL_TOKENS] if n[CHUNKED] else 0
        kept, index, i = running, 0, slots[NEXT, end]
        while n[FREE] < 0 and kept > 0:
            kept -= 1
            _preempt(s, slots[PREVIOUS, end])
        taken = 0
        while index < kept and budget > 0:
            r = slots[REQUEST, i]
            chunk = _chunk(s, r, request_i[r, COMPUTED], budget, long)
            held = blocks_of(s, i, request_i[r, COMPUTED])
            need = blocks_of(s, i, request_i[r, COMPUTED] + chunk) - held
            while taken + need > n[FREE] and kept > index:
                kept -= 1
                _preempt(s, slots[PREVIOUS, end])
            if kept == index:
                break
            taken += need
            budget -= chunk
            slots[BATCH, index], slots[TOKENS, index] = i, chunk
            index += 1
            i = slots[NEXT, i]
        n[N_BATCH] = index
        victims = running - kept
        if n[CHUNKED] and victims == 0:
            _admit_those_that_fit(s, now_s, budget, n[FREE] - taken)
    need = 0
    for j in range(n[N_BATCH]):
        i = slots[BATCH, j]
        computed = request_i[slots[REQUEST, i], COMPUTED]
        need += blocks_of(s, i, computed + slots[TOKENS, j]) - blocks_of(s, i, computed)
    _take(s, need)
    return int(victims)


@compiled()
def _layer_rows(s: Table) -> int:
    """Fill ``rows`` with what each layer sees of the batch, equal layers together, in the order of the first of each.

    Returns:
        How many rows there are; their columns are those of ``sim.cost.latency.layered_iteration_seconds``.
    """
    n, request_i, slots, sets, layer_rows, rows, keeps = (
        ints_of(s),
        request_i_of(s),
        slots_of(s),
        sets_of(s),
        layer_rows_of(s),
        rows_of(s),
        keeps_of(s),
    )
    count = 0
    prefill_tokens, decodes = n[IT_PREFILL], n[IT_DECODES]
    for layer in range(len(layer_rows)):
        tokens, contexts, batch, context = 0, 0, 0, 0
        for j in range(n[N_BATCH]):
            i, chunk = slots[BATCH, j], slots[TOKENS, j]
            if not _has(sets[slots[SET, i], SET_COLUMNS:], layer):
                continue
            r = slots[REQUEST, i]
            computed = request_i[r, COMPUTED]
            if computed < request_i[r, PREFILL]:
                tokens += chunk
                contexts += chunk * computed + chunk * (chunk + 1) // 2
            else:
                batch += 1
                context += min(computed, keeps[slots[KEEP, i], layer]) if slots[KEEP, i] >= 0 else computed
        if n[DECODING]:
            for k in range(n[N_SETS]):
                if _has(sets[k, SET_COLUMNS:], layer):
                    batch += sets[k, COUNT]
                    context += sets[k, CONTEXT] + sets[k, COUNT] * n[CLOCK]
        bits = layer_rows[layer, 0]
        ffn = prefill_tokens * layer_rows[layer, 1] + decodes * layer_rows[layer, 2]
        found = False
        for at in range(count):
            row = rows[at]
            if (
                row[1] == bits
                and row[2] == tokens
                and row[3] == contexts
                and row[4] == batch
                and row[5] == context
                and row[6] == ffn
            ):
                row[0] += 1
                found = True
                break
        if not found:
            row = rows[count]
            row[0], row[1], row[2], row[3], row[4], row[5], row[6] = 1, bits, tokens, contexts, batch, context, ffn
            count += 1
    return count


@compiled()
def _start(s: Table, now_s: float) -> None:
    """Price the batch and put it under way."""
    n, f, request_i, slots, sets, block_counts, rows, data, layout = (
        ints_of(s),
        floats_of(s),
        request_i_of(s),
        slots_of(s),
        sets_of(s),
        block_counts_of(s),
        rows_of(s),
        data_of(s),
        layout_of(s),
    )
    # Not the literal: numba would compile all that prices an iteration for an argument that is always 0 as well.
    prefill = prefill_contexts = decodes = contexts = sequences = ZERO
    uniform = True
    for j in range(n[N_BATCH]):
        i, tokens = slots[BATCH, j], slots[TOKENS, j]
        row = request_i[slots[REQUEST, i]]
        computed = row[COMPUTED]
        if computed < row[PREFILL]:
            prefill += tokens
            prefill_contexts += tokens * computed + tokens * (tokens + 1) // 2
            uniform = uniform and slots[SET, i] == n[PREFILL_SET]
        else:
            decodes += 1
            contexts += computed
            uniform = uniform and slots[SET, i] == n[DECODE_SET] and slots[KEEP, i] < 0
        if computed + tokens == row[PROMPT] + row[PRODUCED]:
            sequences += 1
    if n[DECODING]:
        decodes += n[DECODES]
        sequences += n[DECODES]
        for k in range(n[N_SETS]):
            contexts += sets[k, CONTEXT] + sets[k, COUNT] * n[CLOCK]
        uniform = uniform and sets[n[DECODE_SET], COUNT] == n[DECODES]
    n[IT_PREFILL], n[IT_DECODES] = prefill, decodes
    tables = LatencyTables(data, layout)
    if uniform:
        duration_s = iteration_seconds(tables, block_counts, prefill, prefill_contexts, decodes, contexts, sequences)
    else:
        duration_s = layered_iteration_seconds(tables, rows[: _layer_rows(s)], prefill + decodes, sequences)
    if n[COPY] >= 0:
        duration_s *= 1.0 + f[COPY_SLOWDOWN]
    inside = iteration_in_range(tables, prefill, prefill_contexts, decodes, contexts, sequences)
    n[IT_EXTRAPOLATED] = 0 if inside else 1
    n[IT_RUNNING], n[IT_WAITING] = n[N_RUNNING], n[STACKED] + n[QUEUE_TAIL] - n[QUEUE_HEAD]
    n[IN_ITERATION] = 1
    f[DURATION], f[START], f[END] = duration_s, now_s, now_s + duration_s


@compiled(inline=True)
def _gap(s: Table, gap_s: float, count: int) -> None:
    n, gaps = ints_of(s), gaps_of(s)
    at = n[N_GAPS]
    gaps[at, 0], gaps[at, 1] = gap_s, count
    n[N_GAPS] = at + 1


@compiled()
def _finish(s: Table, i: int, now_s: float) -> None:
    """Let go of a request, whose row is up to date, that has its last token."""
    n, request_i, request_f, slots = ints_of(s), request_i_of(s), request_f_of(s), slots_of(s)
    r = slots[REQUEST, i]
    request_f[r, FINISH_S] = now_s
    request_i[r, STATUS] = FINISHED
    n[N_FINISHED] += 1
    computed = request_i[r, COMPUTED]
    n[RUNNING_TOKENS] -= computed
    _release(s, blocks_of(s, i, computed), NOBODY)
    if slots[SHARED, i] > 0:
        _let_units_go(s, i)
    _unlink(s, i)


@compiled()
def _finish_due(s: Table, now_s: float) -> None:
    """Let go of the decoding requests that are done at this clock."""
    n, slots = ints_of(s), slots_of(s)
    due, clock, next_due, end = slots[DUE], n[CLOCK], NEVER, slots.shape[1] - 1
    i = slots[NEXT, end]
    while n[PREFIX_CACHING] and i != end:  # in order of admission: what is freed first is taken first
        after = slots[NEXT, i]
        if due[i] == clock:
            _leave_decodes(s, i)
            _finish(s, i, now_s)
        i = after
    for i in range(end):
        if due[i] == clock:
            _leave_decodes(s, i)
            _finish(s, i, now_s)
        elif due[i] < next_due:
            next_due = due[i]
    n[NEXT_DUE] = next_due


@compiled()
def _end_chunk(s: Table, i: int, tokens: int, now_s: float) -> None:
    """Count a request's tokens of this iteration; if it has caught up, it gets its next token."""
    n, f, request_i, request_f, slots, sets, set_nll = (
        ints_of(s),
        floats_of(s),
        request_i_of(s),
        request_f_of(s),
        slots_of(s),
        sets_of(s),
        set_nll_of(s),
    )
    r = slots[REQUEST, i]
    row, times = request_i[r], request_f[r]
    decoding = row[COMPUTED] >= row[PREFILL]
    row[COMPUTED] += tokens
    n[RUNNING_TOKENS] += tokens
    if row[COMPUTED] >= slots[FILL, i]:
        _fill_cache(s, i)
    if row[COMPUTED] < row[PROMPT] + row[PRODUCED]:
        return
    held_set = slots[SET, i]
    if decoding:
        row[KEPT_PARAMS] += sets[held_set, DECODE_PARAMS]
        times[NLL_SUM] += set_nll[held_set, 1]
    else:
        row[KEPT_PARAMS] += sets[held_set, PREFILL_PARAMS]
        times[NLL_SUM] += set_nll[held_set, 0]
        after = sets[held_set, AFTER]
        if after != held_set or n[PLAN_KEEP] >= 0:
            held = blocks_of(s, i, row[COMPUTED])
            slots[SET, i] = after
            if n[PLAN_KEEP] >= 0 and slots[SHARED, i] == 0:
                slots[KEEP, i] = n[PLAN_KEEP]
                n[KEEPERS] += 1
            _release(s, held - blocks_of(s, i, row[COMPUTED]), NOBODY)
    row[PRODUCED] += 1
    n[PRODUCED_TOKENS] += 1
    if row[PRODUCED] == 1:
        times[FIRST_S] = now_s
        n[FIRST_TOKENS] += 1
        f[TTFT_SUM] += now_s - times[ARRIVAL_S]
    else:
        _gap(s, now_s - times[LAST_S], 1)
    times[LAST_S] = now_s
    if row[PRODUCED] == row[LIMIT]:
        _finish(s, i, now_s)
    elif not n[EAGER]:
        _join_decodes(s, i)


@compiled()
def _end(s: Table) -> None:
    """End the iteration under way: tokens, finishes, the log."""
    n, f, slots, cohort_s, log = ints_of(s), floats_of(s), slots_of(s), cohort_s_of(s), log_of(s)
    now_s = f[END]
    f[NOW] = now_s
    f[BUSY] += f[DURATION]
    n[IN_ITERATION] = 0
    n[N_ITERATIONS] += 1
    n[USED_BEFORE] = n[POOL] - n[FREE]
    used_share = n[USED_BEFORE] / max(n[POOL], 1)
    f[MAX_USED_SHARE] = max(f[MAX_USED_SHARE], used_share)
    if n[KEEP_LOG]:
        row = log[n[N_LOG]]
        row[LOG_START], row[LOG_END], row[LOG_USED_SHARE] = f[START], now_s, used_share
        row[LOG_PREFILL], row[LOG_DECODES] = n[IT_PREFILL], n[IT_DECODES]
        row[LOG_RUNNING], row[LOG_WAITING] = n[IT_RUNNING], n[IT_WAITING]
        row[LOG_PREEMPTED], row[LOG_EXTRAPOLATED] = n[IT_PREEMPTED], n[IT_EXTRAPOLATED]
        n[N_LOG] += 1
    if n[DECODING]:
        decodes = n[DECODES]
        n[CLOCK] += 1
        n[PRODUCED_TOKENS] += decodes
        n[RUNNING_TOKENS] += decodes
        for cohort in range(n[COHORTS]):
            if slots[COHORT, cohort] > 0:
                _gap(s, now_s - cohort_s[cohort], slots[COHORT, cohort])
        cohort_s[0], slots[COHORT, 0], n[COHORTS] = now_s, decodes, 1
        if n[CLOCK] >= n[NEXT_DUE]:
            _finish_due(s, now_s)
    for j in range(n[N_BATCH]):
        _end_chunk(s, slots[BATCH, j], slots[TOKENS, j], now_s)
    if n[EAGER]:
        _count_decodes(s)


@compiled()
def _needs_eager(s: Table) -> bool:
    """Return whether the next batch has to be formed request by request."""
    n, slots = ints_of(s), slots_of(s)
    if n[KEEPERS] > 0:
        return True
    if n[CHUNKED] and n[DECODES] > n[MAX_BATCH_TOKENS]:
        return True
    prompts = n[N_RUNNING] - n[DECODES]
    if prompts == 0:
        return False
    return bool(prompts > 1 or slots[DUE, slots[PREVIOUS, slots.shape[1] - 1]] != NEVER)


@compiled()
def advance(s: Table, horizon_s: float) -> int:
    """Serve on, whole iterations at a time; ``NOW`` says how far it came. What is due at ``NOW`` is done first.

    Args:
        s: the replica, changed in place.
        horizon_s: serve up to this moment, and start no iteration then.
    Returns:
        ``HORIZON``: it came so far, perhaps into the middle of an iteration. ``NEEDS``: the plan book has to work out
        first what ``NEEDED`` says. ``GROW``: the logs have to grow first. ``DONE``: nothing will happen by itself.
    """
    n, f, slots, log, gaps = ints_of(s), floats_of(s), slots_of(s), log_of(s), gaps_of(s)
    room = 2 * slots.shape[1] + 2
    if not n[IN_ITERATION]:
        why = _change_if_due(s, f[NOW])
        if why != DONE:
            return why
    while True:
        if n[IN_ITERATION]:
            if f[END] > horizon_s:
                f[NOW] = horizon_s
                return HORIZON
            _end(s)
        now_s = f[NOW]
        if f[NEXT_ARRIVAL_S] <= now_s:
            take_arrivals(s, now_s)
        if now_s >= horizon_s:
            return HORIZON
        change_s = change_due_s(s)
        if now_s >= change_s:
            why = _change_if_due(s, now_s)
            if why != DONE:
                return why
            change_s = change_due_s(s)
        if n[N_GAPS] + room > len(gaps) or n[N_LOG] == len(log):
            return GROW
        if _needs_eager(s):
            n[EAGER] = 1
            victims = _form_eagerly(s, now_s)
        else:
            n[EAGER] = 0
            victims = _form(s, now_s)
        n[IT_PREEMPTED] = n[CHANGE_PREEMPTED] + victims
        n[CHANGE_PREEMPTED] = 0
        if n[N_BATCH] > 0 or n[DECODING]:
            _start(s, now_s)
            continue
        if n[EAGER]:
            _count_decodes(s)
        if victims > 0:
            continue
        if f[NEXT_ARRIVAL_S] == np.inf and (change_s == np.inf or n[N_RUNNING] + _waiting(n) == 0):
            return DONE
        f[NOW] = min(f[NEXT_ARRIVAL_S], horizon_s, change_s)


_A = TypeVar("_A", bound=np.generic)


def longer(array: NDArray[_A], rows: int) -> NDArray[_A]:
    """Return a copy with so many rows, zero in the new ones."""
    made = np.zeros((rows, *array.shape[1:]), dtype=array.dtype)
    made[: len(array)] = array
    return made
