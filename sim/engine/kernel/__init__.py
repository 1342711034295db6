"""The compiled kernel: the rules of sim/engine/replica.py as Numba functions on arrays, with equal records.

`advance` runs iterations until a time at which something outside may act on the replica. Every function takes ``s``,
the `Table` of one replica. Each module imports only from modules above it in this table:

| module | holds |
|---|---|
| layout | `Layout`, `State` and `Table`: arrays shared by Python and compiled code, each declared once |
| state | every array and field of a replica, with unit and shape |
| turns | sessions: requests that arrive when others have ended |
| kv | KV blocks: the pool, and the last owners of free blocks |
| prefix_cache | KV that requests with the same first tokens share |
| decodes | running requests, above all those that decode |
| admission | arrivals, admission, scheduling rules, the batch of an iteration |
| plans | plan and memory changes between two iterations |
| loop | pricing, ending and logging iterations: `advance` |
| first_start | fills an empty compile cache |

Index names: r is a request, i a slot, j a chunk of the batch, k a KV set, w a word of a set of layers.
A function whose name begins with ``_`` may be called by compiled code only (sim/compiled.py).
"""

from __future__ import annotations

from sim.engine.kernel.admission import head, queue_due_s, reject_late, take_arrivals, wait_ends_s
from sim.engine.kernel.decodes import settle
from sim.engine.kernel.kv import blocks_of, forget_host_kv, forget_kept_kv
from sim.engine.kernel.layout import Layout, State, Table, fields_of, longer
from sim.engine.kernel.loop import advance
from sim.engine.kernel.plans import (
    change_due_s,
    enter_residency,
    follow_budget,
    resize_to_budget,
    take_decisions,
    wanted_target,
)
from sim.engine.kernel.state import (
    FINISHED,
    GROW,
    HORIZON,
    LAYERS_A_WORD,
    NEED_COPY_END,
    NEED_DECISION,
    NEEDS,
    NEVER,
    OWN_SESSIONS,
    REJECTED,
    REPLICA,
    RUNNING,
    STALLED,
    WAITING,
    Floats,
    Ints,
    SchedulingRule,
    Sizes,
    arrival_order_of,
    budget_of,
    counters_of,
    idle,
    requests_of,
    waiting,
)

__all__ = [
    "FINISHED",
    "GROW",
    "HORIZON",
    "LAYERS_A_WORD",
    "NEEDS",
    "NEED_COPY_END",
    "NEED_DECISION",
    "NEVER",
    "OWN_SESSIONS",
    "REJECTED",
    "REPLICA",
    "RUNNING",
    "STALLED",
    "WAITING",
    "Floats",
    "Ints",
    "Layout",
    "SchedulingRule",
    "Sizes",
    "State",
    "Table",
    "advance",
    "arrival_order_of",
    "blocks_of",
    "budget_of",
    "change_due_s",
    "counters_of",
    "enter_residency",
    "fields_of",
    "follow_budget",
    "forget_host_kv",
    "forget_kept_kv",
    "head",
    "idle",
    "longer",
    "queue_due_s",
    "reject_late",
    "requests_of",
    "resize_to_budget",
    "settle",
    "take_arrivals",
    "take_decisions",
    "wait_ends_s",
    "waiting",
    "wanted_target",
]
