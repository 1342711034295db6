"""The compiled engine: whole iterations on arrays, request for request as the plain engine serves them.

`advance` serves until a moment at which something outside may touch the replica. The modules import downwards only:

| module | holds |
|---|---|
| state | every field of a replica, with its unit; the `Table` by which compiled code finds them |
| kv | KV blocks: the pool, who owned the free ones |
| prefix_cache | KV that requests with the same first tokens share |
| decodes | running requests, above all those that decode |
| admission | arrivals, admission, scheduling rules, the batch of an iteration |
| plans | plan and memory changes between two iterations |
| loop | pricing, ending and logging iterations: `advance` |

A name that begins with ``_`` may be called by compiled code only (sim/compiled.py).
"""

from __future__ import annotations

from sim.engine.kernel.admission import head, take_arrivals
from sim.engine.kernel.decodes import settle
from sim.engine.kernel.kv import blocks_of, forget_kept_kv
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
    REJECTED,
    REPLICA,
    RUNNING,
    STALLED,
    WAITING,
    Floats,
    Ints,
    SchedulingRule,
    Sizes,
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
    "blocks_of",
    "budget_of",
    "change_due_s",
    "counters_of",
    "enter_residency",
    "fields_of",
    "follow_budget",
    "forget_kept_kv",
    "head",
    "idle",
    "longer",
    "requests_of",
    "resize_to_budget",
    "settle",
    "take_arrivals",
    "take_decisions",
    "waiting",
    "wanted_target",
]
