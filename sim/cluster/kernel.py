"""The compiled loop of a cluster: arrivals one by one, between them only the replicas to which something happens.

`serve` works on the tables of all replicas (sim/engine/kernel) up to a horizon, the next thing that SimPy knows of. For an
arrival it brings on those replicas whose iteration has ended by then, lets the router choose, and hands the request
over. It returns early when Python has to change a plan or a budget, make arrays longer, or choose a replica.

State, for n requests and k replicas:

    tables         int64[k, arrays, 3]: a `sim.engine.kernel.Table` each
    replica_i      int64[k, 4], replica_f float64[k, 2]: columns named below
    cluster        int64[7]: fields named below; ``CURSOR`` is the first replica that round robin asks next
    arrival_s      float64[n], ascending; prompt, output: int64[n]
    draws          float64[n, 2] in [0, 1): what power of two choices draws for a request; none for other routers
    home           int64[n, 2]: the engine that has a request, or -1, and its row there
    hash_at, hash_ids   int64[n + 1], int64[sum]: ids of the KV blocks of request i's prompt are
                   ``hash_ids[hash_at[i] : hash_at[i + 1]]``; each id stands for its block and all before it
    owner          int64[largest id + 1]: the replica that computed a block last, or -1
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sim.compiled import compiled
from sim.cost.latency import LatencyTables, iteration_seconds
from sim.engine import kernel
from sim.engine.kernel import (
    ARRIVAL_S,
    ARRIVED_PROMPT_TOKENS,
    BATCH,
    BLOCK_TOKENS,
    CACHED,
    COMPUTED,
    DECODE_SET,
    DONE,
    DUE,
    END,
    FINISH_S,
    FREE,
    FREE_SLOT,
    GROW,
    HASH_AT,
    HORIZON,
    IN_ITERATION,
    KEEP,
    KEEPERS,
    KEPT_RUN,
    LAYERS,
    LIMIT,
    MAX_BATCH_TOKENS,
    MAX_RUNNING,
    N_BATCH,
    N_REJECTED,
    N_REQUESTS,
    N_RUNNING,
    NEEDS,
    NEVER,
    NEXT,
    NEXT_ARRIVAL,
    NEXT_ARRIVAL_S,
    NOW,
    PLAN_KEEP,
    POOL,
    PREFILL,
    PREFILL_SET,
    PREFIX_CACHING,
    PREVIOUS,
    PRODUCED,
    PROMPT,
    QUEUE_HEAD,
    QUEUE_TAIL,
    REJECTED,
    REQUEST,
    RUNNING,
    RUNNING_TOKENS,
    SET,
    STACK,
    STACKED,
    STATUS,
    STEP,
    TOKENS,
    UNIT_TOKENS,
    UNITS,
    WAITING,
    WAITING_TOKENS,
    WATERMARK,
    State,
    Table,
    advance,
    block_counts_of,
    change_due_s,
    data_of,
    floats_of,
    forget_kept_kv,
    ints_of,
    layout_of,
    prompts_of,
    queue_of,
    request_f_of,
    request_i_of,
    sets_of,
    settle,
    slots_of,
    take_arrivals,
)
from sim.types import Floats, Ints

Tables = NDArray[np.int64]

ROUND_ROBIN, LEAST_OUTSTANDING, LEAST_KV, SHORTEST_WAIT, PREFIX_AFFINITY, POWER_OF_TWO, ASK = range(7)
"""Routers (sim/cluster/routers.py says what each does); ``ASK`` leaves the choice to Python."""
REACHED, ATTEND, ROOM, NOBODY, CHOOSE = range(5)
"""Why `serve` returned: it came to the horizon; replica ``WHICH`` needs its engine (plans, memory, longer logs), or
room for another request; no replica accepts; Python chooses for the request ``AT``."""

# Columns of replica_i: CONTEXT_LIMIT as SimEngine.context_limit; ENGINE the number of its present engine; STEP_PRICED
# the step of its plan book for which TOKEN_S holds, or -1.
ACCEPTS, CONTEXT_LIMIT, ENGINE, STEP_PRICED, REPLICA_INTS = range(5)
# Columns of replica_f: from when on something happens there; seconds that a token of a prompt takes.
NEXT_S, TOKEN_S, REPLICA_FLOATS = range(3)
# Fields of cluster; MOST_APART and MOST_TIMES bound how far prefix affinity lets replicas fall apart.
AT, WHICH, WHY, ROUTER, CURSOR, MOST_APART, MOST_TIMES, CLUSTER_INTS = range(8)

ROWS_OF_REQUESTS = State._fields.index("request_i")


@compiled(inline=True)
def waiting(n: Ints) -> int:
    return int(n[STACKED] + n[QUEUE_TAIL] - n[QUEUE_HEAD])


@compiled(inline=True)
def outstanding(s: Table) -> int:
    """Return the requests that a replica has and that have not ended."""
    n = ints_of(s)
    return int(n[N_RUNNING] + waiting(n))


@compiled()
def kv_load(s: Table) -> float:
    """Return the share of the KV pool that is held or will be once those that wait have their prompts computed."""
    n, sets = ints_of(s), sets_of(s)
    will = n[POOL] - n[FREE] + n[WAITING_TOKENS] * sets[n[PREFILL_SET], LAYERS] / n[BLOCK_TOKENS]
    return float(will / max(n[POOL], 1))


@compiled()
def prefill_token_s(s: Table) -> float:
    """Return the seconds that a token of a prompt takes under what runs, in a full batch of one prompt's chunk."""
    n, tokens = ints_of(s), ints_of(s)[MAX_BATCH_TOKENS]
    tables = LatencyTables(data_of(s), layout_of(s))
    seconds = iteration_seconds(tables, block_counts_of(s), tokens, tokens * (tokens + 1) // 2, 0, 0, 1)
    return float(seconds / n[MAX_BATCH_TOKENS])


@compiled()
def expected_wait_s(s: Table, replica_i: Ints, replica_f: Floats, tokens: int) -> float:
    """Return the seconds in which a replica computes the prompts that wait and so many tokens more."""
    n = ints_of(s)
    if replica_i[STEP_PRICED] != n[STEP]:
        replica_i[STEP_PRICED], replica_f[TOKEN_S] = n[STEP], prefill_token_s(s)
    return float((n[WAITING_TOKENS] + tokens) * replica_f[TOKEN_S])


@compiled()
def next_s(s: Table) -> float:
    """Return from when on something happens at a replica that does nothing by itself before then; ``inf`` for never."""
    return float(floats_of(s)[END]) if ints_of(s)[IN_ITERATION] else change_due_s(s)


@compiled()
def bring(s: Table, times: Floats, now_s: float, until_s: float) -> int:
    """Serve at one replica from the present to a moment: iterations that end then have ended, none starts.

    Args:
        s: the replica. times: its row of replica_f. now_s: SimPy's present. until_s: not before it.
    Returns:
        ``NEEDS`` or ``GROW`` when its engine has to help first (sim/engine/kernel), else another.
    """
    n, f = ints_of(s), floats_of(s)
    if not n[IN_ITERATION]:
        f[NOW] = max(f[NOW], now_s)
    why = advance(s, until_s)
    while why == DONE and change_due_s(s) < until_s:
        f[NOW] = max(f[NOW], change_due_s(s))  # idle until then
        why = advance(s, until_s)
    if why not in (NEEDS, GROW):
        times[NEXT_S] = f[NOW] if why == HORIZON and not n[IN_ITERATION] else next_s(s)
    return why


@compiled()
def _least_outstanding(tables: Tables, replica_i: Ints, tokens: int) -> int:
    best, least = -1, 0
    for k in range(len(replica_i)):
        if replica_i[k, ACCEPTS] and tokens < replica_i[k, CONTEXT_LIMIT]:
            count = outstanding(tables[k])
            if best < 0 or count < least:
                best, least = k, count
    return best


@compiled()
def _fitting(replica_i: Ints, tokens: int, place: int) -> int:
    """Return the replica in this place of those that accept a request of so many tokens."""
    for k in range(len(replica_i)):
        if replica_i[k, ACCEPTS] and tokens < replica_i[k, CONTEXT_LIMIT]:
            if place == 0:
                return k
            place -= 1
    return -1


@compiled()
def choose(
    tables: Tables,
    replica_i: Ints,
    replica_f: Floats,
    cluster: Ints,
    tokens: int,
    draws: Floats,
    ids: Ints,
    owner: Ints,
) -> int:
    """Return the replica for a request of so many tokens, prompt and produced; -1 when none accepts.

    Those whose context limit does not hold it are passed over; where it fits none, the first that accepts has it, and
    rejects it.
    """
    count, first = 0, -1
    for k in range(len(replica_i)):
        if replica_i[k, ACCEPTS]:
            if first < 0:
                first = k
            if tokens < replica_i[k, CONTEXT_LIMIT]:
                count += 1
    if count == 0:
        return first
    router = cluster[ROUTER]
    if router == ROUND_ROBIN:
        k = cluster[CURSOR]
        while not (replica_i[k, ACCEPTS] and tokens < replica_i[k, CONTEXT_LIMIT]):
            k = (k + 1) % len(replica_i)
        cluster[CURSOR] = (k + 1) % len(replica_i)
        return int(k)
    if router == LEAST_OUTSTANDING:
        return _least_outstanding(tables, replica_i, tokens)
    if router == POWER_OF_TWO:
        if count == 1:
            return _fitting(replica_i, tokens, 0)
        i, j = int(draws[0] * count), int(draws[1] * (count - 1))
        j += j >= i
        a, b = _fitting(replica_i, tokens, min(i, j)), _fitting(replica_i, tokens, max(i, j))
        return a if outstanding(tables[a]) <= outstanding(tables[b]) else b
    if router == PREFIX_AFFINITY:
        best = _by_prefix(tables, replica_i, cluster, tokens, ids, owner)
        for at in range(len(ids)):
            owner[ids[at]] = best
        return best
    best, least = -1, np.inf
    for k in range(len(replica_i)):
        if replica_i[k, ACCEPTS] and tokens < replica_i[k, CONTEXT_LIMIT]:
            if router == LEAST_KV:
                load = kv_load(tables[k])
            else:
                load = expected_wait_s(tables[k], replica_i[k], replica_f[k], tokens)
            if best < 0 or load < least:
                best, least = k, load
    return best


@compiled()
def _by_prefix(tables: Tables, replica_i: Ints, cluster: Ints, tokens: int, ids: Ints, owner: Ints) -> int:
    """Return the replica that computed most of a prompt's beginning, unless the load of replicas has fallen apart."""
    shortest = _least_outstanding(tables, replica_i, tokens)
    least, most = outstanding(tables[shortest]), 0
    for k in range(len(replica_i)):
        if replica_i[k, ACCEPTS]:
            most = max(most, outstanding(tables[k]))
    if most - least > cluster[MOST_APART] and most > cluster[MOST_TIMES] * least:
        return shortest
    for at in range(len(ids) - 1, -1, -1):
        k = owner[ids[at]]
        if k >= 0 and replica_i[k, ACCEPTS] and tokens < replica_i[k, CONTEXT_LIMIT]:
            return int(k)
    return shortest


@compiled(inline=True)
def _with_ids(s: Table, r: int, hash_at: int, ids: int) -> None:
    n, prompts = ints_of(s), prompts_of(s)
    if n[PREFIX_CACHING]:
        units = min(request_i_of(s)[r, PROMPT] // n[UNIT_TOKENS], ids)
        prompts[r, HASH_AT], prompts[r, UNITS], prompts[r, CACHED] = hash_at, units, -1


@compiled()
def give(
    s: Table, times: Floats, arrival_s: float, now_s: float, prompt: int, limit: int, hash_at: int, ids: int
) -> int:
    """Hand a new request to a replica that has been advanced to ``now_s``; return its row. There is room for it.

    hash_at, ids: where the replica's ``hash_ids`` begin to be this request's, and how many there are.
    """
    n, f, request_i, request_f = ints_of(s), floats_of(s), request_i_of(s), request_f_of(s)
    r = n[N_REQUESTS]
    request_i[r, PROMPT], request_i[r, LIMIT] = prompt, limit
    _with_ids(s, r, hash_at, ids)
    request_f[r, ARRIVAL_S] = arrival_s
    n[N_REQUESTS] = r + 1
    f[NEXT_ARRIVAL_S] = arrival_s
    take_arrivals(s, now_s)
    if not n[IN_ITERATION]:
        f[NOW] = times[NEXT_S] = now_s
    return int(r)


@compiled()
def give_moved(
    s: Table, times: Floats, now_s: float, row_i: Ints, row_f: Floats, limit: int, hash_at: int, ids: int
) -> int:
    """Hand over a request of another replica, with what it has produced; its KV is computed anew. Return its row.

    It was accepted once, so ``admit`` does not reject it; a limit that it cannot go on under does.
    """
    n, f, request_i, request_f, queue = ints_of(s), floats_of(s), request_i_of(s), request_f_of(s), queue_of(s)
    r = n[N_REQUESTS]
    for column in range(len(row_i)):
        request_i[r, column] = row_i[column]
    for column in range(len(row_f)):
        request_f[r, column] = row_f[column]
    row = request_i[r]
    row[LIMIT], row[COMPUTED], row[PREFILL], row[KEPT_RUN] = limit, 0, 0, -1
    _with_ids(s, r, hash_at, ids)
    n[N_REQUESTS] = n[NEXT_ARRIVAL] = r + 1
    n[ARRIVED_PROMPT_TOKENS] += row[PROMPT]
    if limit <= row[PRODUCED]:
        row[STATUS] = REJECTED
        n[N_REJECTED] += 1
    else:
        row[STATUS] = WAITING
        queue[n[QUEUE_TAIL]] = r
        n[QUEUE_TAIL] += 1
        n[WAITING_TOKENS] += row[PROMPT] + row[PRODUCED]
    if not n[IN_ITERATION]:
        f[NOW] = times[NEXT_S] = now_s
    return int(r)


@compiled()
def held_rows(s: Table, rows: Ints, running_too: bool) -> int:
    """Write down the rows of the requests that have not ended, in the order in which they would go on.

    Args:
        s: a replica; the rows of its requests are brought up to date.
        rows: room for all of them.
        running_too: whether those that run count, or those that wait alone.
    Returns:
        How many there are.
    """
    n, slots, queue = ints_of(s), slots_of(s), queue_of(s)
    count, end = 0, slots.shape[1] - 1
    if running_too:
        settle(s)
        i = slots[NEXT, end]
        while i != end:
            rows[count] = slots[REQUEST, i]
            count += 1
            i = slots[NEXT, i]
    for place in range(n[STACKED] - 1, -1, -1):
        rows[count] = slots[STACK, place]
        count += 1
    for place in range(n[QUEUE_HEAD], n[QUEUE_TAIL]):
        rows[count] = queue[place]
        count += 1
    return count


@compiled()
def let_waiting_go(s: Table) -> None:
    """Forget the requests that wait; those that run go on."""
    n = ints_of(s)
    forget_kept_kv(s)
    n[STACKED], n[QUEUE_HEAD], n[WAITING_TOKENS] = 0, n[QUEUE_TAIL], 0


# -- prefill and decode apart ----------------------------------------------------------------------------------------


@compiled()
def hold(s: Table, blocks: int) -> None:
    """Keep free KV blocks from everybody: for KV that waits to be sent, or that is on its way here."""
    kernel._take(s, blocks)


@compiled()
def let_go(s: Table, blocks: int) -> None:
    """Free blocks that were held."""
    kernel._release(s, blocks, -1)


@compiled()
def chunks_under_way(s: Table, rows: Ints) -> int:
    """Write down the rows of the requests whose prompt the iteration under way completes; return how many."""
    n, request_i, slots = ints_of(s), request_i_of(s), slots_of(s)
    count = 0
    if n[IN_ITERATION]:
        for j in range(n[N_BATCH]):
            r = slots[REQUEST, slots[BATCH, j]]
            if request_i[r, COMPUTED] + slots[TOKENS, j] == request_i[r, PROMPT]:
                rows[count] = r
                count += 1
    return count


@compiled()
def free_share(s: Table, blocks: int, coming: int) -> float:
    """Return the share of the KV pool that is free; -1 where there is no room for one more with so many KV blocks.

    Args:
        s: a decode replica. coming: requests on their way to it. Nobody has room while preempted ones wait there.
    """
    n = ints_of(s)
    if n[FREE] - blocks < n[WATERMARK] or n[N_RUNNING] + coming >= n[MAX_RUNNING] or waiting(n) > 0:
        return -1.0
    return float(n[FREE] / max(n[POOL], 1))


@compiled(inline=True)
def in_iteration(s: Table) -> bool:
    """Return whether an iteration is under way."""
    return bool(ints_of(s)[IN_ITERATION])


@compiled()
def begin(s: Table, times: Floats, now_s: float) -> int:
    """Start the iteration that is due at this moment, if one is; return as `bring` does."""
    return bring(s, times, now_s, np.nextafter(now_s, np.inf))


@compiled()
def join(s: Table, times: Floats, now_s: float, row_i: Ints, row_f: Floats, limit: int) -> int:
    """Let a request decode here whose KV has arrived, in blocks that are held for it; return its row.

    The replica is between two iterations, has room for a row and a place among those that run.
    """
    n, f, request_i, request_f, slots = ints_of(s), floats_of(s), request_i_of(s), request_f_of(s), slots_of(s)
    r, end = n[N_REQUESTS], slots.shape[1] - 1
    for column in range(len(row_i)):
        request_i[r, column] = row_i[column]
    for column in range(len(row_f)):
        request_f[r, column] = row_f[column]
    row = request_i[r]
    row[LIMIT], row[STATUS], row[KEPT_RUN] = limit, RUNNING, -1
    row[COMPUTED] = row[PREFILL] = row[PROMPT]
    request_f[r, FINISH_S] = np.nan
    n[N_REQUESTS] = n[NEXT_ARRIVAL] = r + 1
    n[ARRIVED_PROMPT_TOKENS] += row[PROMPT]
    n[RUNNING_TOKENS] += row[PROMPT]
    n[N_RUNNING] += 1
    i = slots[FREE_SLOT, end - n[N_RUNNING]]
    newest = slots[PREVIOUS, end]
    slots[NEXT, newest], slots[PREVIOUS, i], slots[NEXT, i], slots[PREVIOUS, end] = i, newest, end, i
    slots[REQUEST, i], slots[SET, i], slots[KEEP, i], slots[DUE, i] = r, n[DECODE_SET], n[PLAN_KEEP], NEVER
    n[KEEPERS] += n[PLAN_KEEP] >= 0
    kernel._join_decodes(s, i)
    f[NOW] = times[NEXT_S] = now_s
    return int(r)


# -- the loop --------------------------------------------------------------------------------------------------------


@compiled()
def serve(
    tables: Tables,
    replica_i: Ints,
    replica_f: Floats,
    cluster: Ints,
    arrival_s: Floats,
    prompt: Ints,
    output: Ints,
    draws: Floats,
    home: Ints,
    hash_at: Ints,
    hash_ids: Ints,
    owner: Ints,
    now_s: float,
    horizon_s: float,
) -> int:
    """Serve and route from SimPy's present to a horizon, arrivals at it included; return why it stopped.

    At one moment: iterations end, requests arrive and are routed; iterations start in the next call.
    """
    replicas, requests = len(tables), len(arrival_s)
    while True:
        at = cluster[AT]
        arrives_s = arrival_s[at] if at < requests else np.inf
        until_s = min(arrives_s, horizon_s)
        for k in range(replicas):
            # One that stands at this very moment between two iterations starts none before everybody has arrived.
            due_s = replica_f[k, NEXT_S]
            if due_s < until_s or (due_s == until_s and due_s < np.inf and ints_of(tables[k])[IN_ITERATION]):
                why = bring(tables[k], replica_f[k], now_s, until_s)
                if why in (NEEDS, GROW):
                    cluster[WHICH], cluster[WHY] = k, why
                    return ATTEND
        if at == requests or arrives_s > horizon_s:
            return REACHED
        if cluster[ROUTER] == ASK:
            return CHOOSE
        cursor, draw, ids = cluster[CURSOR], draws[at % len(draws)], hash_ids[hash_at[at] : hash_at[at + 1]]
        k = choose(tables, replica_i, replica_f, cluster, prompt[at], draw, ids, owner)
        if k < 0:
            return NOBODY
        s = tables[k]
        if ints_of(s)[N_REQUESTS] == s[ROWS_OF_REQUESTS, 1]:
            cluster[WHICH], cluster[CURSOR] = k, cursor  # it is chosen again
            return ROOM
        limit = min(output[at], replica_i[k, CONTEXT_LIMIT] - prompt[at])
        home[at, 0] = replica_i[k, ENGINE]
        home[at, 1] = give(s, replica_f[k], arrives_s, arrives_s, prompt[at], limit, hash_at[at], len(ids))
        cluster[AT] = at + 1
