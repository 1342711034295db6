"""The compiled loop of a cluster: arrivals one by one, and between them only the replicas to which something happens.

`serve` works on the tables of all replicas (sim/engine/kernel) up to a horizon, the next event of SimPy. For an arrival
it advances those replicas whose iteration has ended by then, lets the router choose, and hands the request over. It
returns early when Python has to change a plan or a budget, make arrays longer, or choose a replica.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sim.compiled import compiled
from sim.cost.latency_tables import LatencyTables, iteration_seconds, layered_iteration_seconds
from sim.engine import kernel
from sim.engine.kernel import Table
from sim.engine.kernel.decodes import _join_decodes, _link_slot, settle
from sim.engine.kernel.kv import _release, _take, saved_tokens
from sim.engine.kernel.layout import FLOAT64, INT64, Layout
from sim.engine.kernel.state import (
    DUE_TURN,
    GROW,
    HORIZON,
    NEEDS,
    REJECTED,
    RUNNING,
    STALLED,
    TURN,
    WAITING,
    _has,
    batch_of,
    block_counts_of,
    counters_of,
    ended_turns_of,
    kv_sets_of,
    latency_data_of,
    latency_layout_of,
    layer_loads_of,
    layers_of,
    preempted_stack_of,
    prompts_of,
    queue_of,
    request_words_of,
    requests_of,
    residency_words_of,
    slots_of,
    waiting,
)
from sim.engine.kernel.state import turns_of as turns_of_replica
from sim.engine.kernel.turns import _add_due, _drop_first, _end_turn
from sim.types import Floats, Ints

Tables = NDArray[np.int64]
"""int64[k, arrays of a replica, 3]: a `kernel.Table` each."""

ROUND_ROBIN, LEAST_OUTSTANDING, LEAST_KV, SHORTEST_WAIT, PREFIX_AFFINITY, POWER_OF_TWO, SESSION_AFFINITY, ASK = range(8)
"""Routers (sim/cluster/routers.py says what each does); ``ASK`` leaves the choice to Python."""
REACHED, ATTEND, ROOM, NO_REPLICA_ACCEPTS, CHOOSE = range(5)
"""Why `serve` returned: it came to the horizon; a replica needs its engine (plans, memory, longer logs), or room for
another request; no replica accepts the request that is next; Python chooses for it."""

CLUSTER = Layout()
CLUSTER_FIELDS = np.dtype(
    [
        ("next_request", INT64),  # requests that have arrived; without sessions the next one, too
        ("due_count", INT64),  # with sessions: entries of due_turns
        ("reached_s", FLOAT64),  # with sessions: the event up to which all has happened
        ("next_session", INT64),  # first of session_starts that no user has begun
        ("replica", INT64),  # for ATTEND and ROOM: which
        ("why", INT64),  # for ATTEND: what `kernel.advance` returned
        ("router", INT64),  # ROUND_ROBIN, ...
        ("next_in_turn", INT64),  # replica that round robin tries next
        ("most_apart", INT64),  # prefix affinity yields if loads differ by more than this many requests
        ("most_times", INT64),  # and the largest load is more than this many times the smallest
    ],
    align=True,
)
cluster_of = CLUSTER.record("cluster", CLUSTER_FIELDS)
REPLICA_FIELDS = np.dtype(
    [
        ("accepts", INT64),  # whether it accepts requests
        ("context_limit", INT64),  # tokens, as ``SimEngine.context_limit``
        ("engine", INT64),  # number of its present engine
        ("residency_priced", INT64),  # residency for which prefill_token_s holds; -1 for none
        ("prefill_token_s", FLOAT64),  # seconds that a token of a prompt takes
    ],
    align=True,
)
replicas_of = CLUSTER.array("replicas", REPLICA_FIELDS)
next_s_of = CLUSTER.array("next_s", FLOAT64)  # per replica: time of its next event; inf for none
arrival_s_of = CLUSTER.array("arrival_s", FLOAT64)  # of the trace's requests, ascending
prompt_tokens_of = CLUSTER.array("prompt_tokens")
output_tokens_of = CLUSTER.array("output_tokens")
random_pairs_of = CLUSTER.array("random_pairs", FLOAT64, columns=2)  # in [0, 1), per request; one row if unused
HOME = np.dtype([("engine", INT64), ("row", INT64)], align=True)  # engine of a request, -1: none; its row there
homes_of = CLUSTER.array("homes", HOME)
turns_of = CLUSTER.array("turns", TURN)  # with sessions, as in a replica: what follows each request of the trace
session_starts_of = CLUSTER.array("session_starts")
due_turns_of = CLUSTER.array("due_turns", DUE_TURN)
arrival_order_of = CLUSTER.array("arrival_order")
session_of = CLUSTER.array("session")  # of each request, numbered from 0
session_homes_of = CLUSTER.array("session_homes")  # by session: replica that its last turn was routed to, -1: none
hash_at_of = CLUSTER.array("hash_at")  # ids of request i's prompt: hash_ids[hash_at[i] : hash_at[i + 1]]
hash_ids_of = CLUSTER.array("hash_ids")  # an id stands for its prefix block and all before it
block_owners_of = CLUSTER.array("block_owners")  # by hash id: replica that computed the block last, -1: none


@compiled(inline=True)
def outstanding(s: Table) -> int:
    """Return how many requests of a replica wait or run."""
    return int(counters_of(s).running + waiting(s))


@compiled()
def kv_load(s: Table) -> float:
    """Return the share of the KV pool that is held, or will be once the waiting prompts are computed."""
    n = counters_of(s)
    will = n.pool_blocks - n.free_blocks + n.waiting_tokens * kv_sets_of(s)[n.prefill_set].layers / n.block_tokens
    return float(will / max(n.pool_blocks, 1))


@compiled()
def prefill_token_s(s: Table) -> float:
    """Return the seconds per prompt token under the running plan, in a full batch with one chunk of a prompt."""
    tokens, tables = counters_of(s).max_batch_tokens, LatencyTables(latency_data_of(s), latency_layout_of(s))
    n = counters_of(s)
    if n.kv_only > 0 or n.cuts_ffn:
        loads, layers, words = layer_loads_of(s), layers_of(s), residency_words_of(s)
        for layer in range(len(layers)):
            row, runs = loads[layer], 1 if _has(words, n.residency, layer) else 0
            row[0], row[1], row[4], row[5] = 1, layers[layer].bits_index, 0, 0
            row[8], row[9] = layers[layer].ffn_cut, 0
            if layers[layer].kv_only != 0:
                row[2], row[3], row[7] = 0, 0, (tokens - 1) * runs
                row[4], row[5], row[6] = runs, tokens * runs, layers[layer].prefill_ffn
            else:
                row[2], row[3], row[7] = tokens * runs, tokens * (tokens + 1) // 2 * runs, 0
                row[6] = tokens * layers[layer].prefill_ffn
        return float(layered_iteration_seconds(tables, loads, tokens, 1, n.qkv_share) / tokens)
    seconds = iteration_seconds(tables, block_counts_of(s), tokens, tokens * (tokens + 1) // 2, 0, 0, 1)
    return float(seconds / tokens)


@compiled()
def expected_wait_s(s: Table, c: Table, k: int, tokens: int) -> float:
    """Return the seconds that replica k needs for its waiting prompts and ``tokens`` more."""
    n, replica = counters_of(s), replicas_of(c)[k]
    # The price changes only with the residency, so it is kept until then.
    if replica.residency_priced != n.residency:
        replica.residency_priced, replica.prefill_token_s = n.residency, prefill_token_s(s)
    return float((n.waiting_tokens + tokens) * replica.prefill_token_s)


@compiled()
def next_event_s(s: Table) -> float:
    """Return the time of a replica's next event: the end of its iteration or a due change; ``inf`` for none."""
    return float(counters_of(s).end_s) if counters_of(s).in_iteration else kernel.change_due_s(s)


@compiled()
def bring(s: Table, next_s: Floats, k: int, now_s: float, until_s: float) -> int:
    """Advance one replica to ``until_s``: iterations that end at it have ended, and none starts at it.

    Args:
        s: the replica. next_s: float64[replicas], its entry k is updated. now_s: SimPy's present time.
        until_s: not before ``now_s``.
    Returns:
        ``NEEDS`` or ``GROW`` if its engine has to act first (`kernel.advance`), otherwise another value.
    """
    n = counters_of(s)
    if not n.in_iteration:
        n.now_s = max(n.now_s, now_s)
    why = kernel.advance(s, until_s)
    while why == STALLED and kernel.change_due_s(s) < until_s:
        n.now_s = max(n.now_s, kernel.change_due_s(s))  # nothing happens until then
        why = kernel.advance(s, until_s)
    if why not in (NEEDS, GROW):
        next_s[k] = n.now_s if why == HORIZON and not n.in_iteration else next_event_s(s)
    return why


# -- routers -----------------------------------------------------------------------------------------------------------


@compiled(inline=True)
def _fits(c: Table, k: int, tokens: int) -> bool:
    """Return whether a replica accepts a request of this many tokens."""
    replica = replicas_of(c)[k]
    return bool(replica.accepts and tokens < replica.context_limit)


@compiled()
def _least_outstanding(tables: Tables, c: Table, tokens: int) -> int:
    """Return the accepting replica with the fewest requests, the first of equal ones; -1 if none accepts."""
    best, least = -1, 0
    for k in range(len(tables)):
        if _fits(c, k, tokens):
            count = outstanding(tables[k])
            if best < 0 or count < least:
                best, least = k, count
    return best


@compiled()
def _fitting(c: Table, tokens: int, place: int) -> int:
    """Return number ``place`` of the replicas that accept a request of this many tokens."""
    for k in range(len(replicas_of(c))):
        if _fits(c, k, tokens):
            if place == 0:
                return k
            place -= 1
    return -1


@compiled()
def reject_late(tables: Tables, c: Table, now_s: float) -> None:
    """Reject the requests that have waited too long by now, wherever a router looks at the queue."""
    for k in range(len(tables)):
        if replicas_of(c)[k].accepts:  # a replica that has not started has no queue
            kernel.reject_late(tables[k], now_s)


@compiled()
def choose(tables: Tables, c: Table, request: int, tokens: int) -> int:
    """Return the replica for a request of this many tokens, prompt and produced; -1 if none accepts requests.

    Replicas whose context limit is too small are skipped. If all are too small, the first that accepts requests gets it
    and rejects it.
    """
    cluster, count, first = cluster_of(c), 0, -1
    for k in range(len(tables)):
        if replicas_of(c)[k].accepts and first < 0:
            first = k
        if _fits(c, k, tokens):
            count += 1
    if count == 0:
        return first
    router = cluster.router
    if router == ROUND_ROBIN:
        k = cluster.next_in_turn
        while not _fits(c, k, tokens):
            k = (k + 1) % len(tables)
        cluster.next_in_turn = (k + 1) % len(tables)
        return int(k)
    if router == LEAST_OUTSTANDING:
        return _least_outstanding(tables, c, tokens)
    if router == POWER_OF_TWO:
        pair = random_pairs_of(c)[request % len(random_pairs_of(c))]
        if count == 1:
            return _fitting(c, tokens, 0)
        # Two different places among ``count``: j is drawn from the others and moved past i.
        i, j = int(pair[0] * count), int(pair[1] * (count - 1))
        j += j >= i
        a, b = _fitting(c, tokens, min(i, j)), _fitting(c, tokens, max(i, j))
        return a if outstanding(tables[a]) <= outstanding(tables[b]) else b
    if router == PREFIX_AFFINITY:
        return _by_prefix(tables, c, request, tokens)
    if router == SESSION_AFFINITY:
        if len(session_of(c)) == 0:  # a trace without sessions
            return _least_outstanding(tables, c, tokens)
        session = session_of(c)[request]
        session_homes_of(c)[session] = _home_of_session(tables, c, session_homes_of(c)[session], tokens)
        return int(session_homes_of(c)[session])
    best, least = -1, np.inf
    for k in range(len(tables)):
        if _fits(c, k, tokens):
            load = kv_load(tables[k]) if router == LEAST_KV else expected_wait_s(tables[k], c, k, tokens)
            if best < 0 or load < least:
                best, least = k, load
    return best


@compiled()
def _by_prefix(tables: Tables, c: Table, request: int, tokens: int) -> int:
    """Choose the replica of a request by its prompt, and record it as the owner of the prompt's prefix blocks."""
    owners, ids = block_owners_of(c), hash_ids_of(c)[hash_at_of(c)[request] : hash_at_of(c)[request + 1]]
    best = _owner_of_prefix(tables, c, ids, tokens)
    for at in range(len(ids)):
        owners[ids[at]] = best
    return best


@compiled()
def _loads_differ(tables: Tables, c: Table, shortest: int) -> bool:
    """Return whether loads differ so much from that of replica ``shortest`` that affinity yields."""
    cluster, least, most = cluster_of(c), outstanding(tables[shortest]), 0
    for k in range(len(tables)):
        if replicas_of(c)[k].accepts:
            most = max(most, outstanding(tables[k]))
    return bool(most - least > cluster.most_apart and most > cluster.most_times * least)


@compiled()
def _home_of_session(tables: Tables, c: Table, home: int, tokens: int) -> int:
    """Return the replica of the session's last turn (``home``, -1: none); the least loaded if loads differ too much."""
    shortest = _least_outstanding(tables, c, tokens)
    if home < 0 or not _fits(c, home, tokens) or _loads_differ(tables, c, shortest):
        return shortest
    return home


@compiled()
def _owner_of_prefix(tables: Tables, c: Table, ids: Ints, tokens: int) -> int:
    """Return the replica that computed the longest prefix of a prompt; the least loaded if loads differ too much."""
    shortest = _least_outstanding(tables, c, tokens)
    if _loads_differ(tables, c, shortest):
        return shortest
    for at in range(len(ids) - 1, -1, -1):  # the last owned prefix block ends the longest known prefix
        k = block_owners_of(c)[ids[at]]
        if k >= 0 and _fits(c, k, tokens):
            return int(k)
    return shortest


# -- handing requests over ---------------------------------------------------------------------------------------------


@compiled(inline=True)
def _set_prompt(s: Table, r: int, hash_at: int, ids: int) -> None:
    """Record where the hash ids of a request's prompt are, if there is a prefix cache."""
    n = counters_of(s)
    if n.prefix_caching:
        prompt = prompts_of(s)[r]
        request = requests_of(s)[r]
        prompt.prefix_blocks = min(request.prompt_tokens // n.prefix_block_tokens, ids)
        said = request.prompt_tokens + max(request.output_limit_tokens, 0)
        prompt.answer_blocks = min(said // n.prefix_block_tokens, ids)
        prompt.hash_at, prompt.cached_tokens = hash_at, -1


@compiled(inline=True)
def _new_request(s: Table, words: Ints) -> int:
    """Append another replica's record of a request to the requests here; return its row."""
    n = counters_of(s)
    r = n.request_count
    for word in range(len(words)):
        request_words_of(s)[r, word] = words[word]
    n.request_count = n.arrived = r + 1
    n.arrived_prompt_tokens += requests_of(s)[r].prompt_tokens
    return int(r)


@compiled(inline=True)
def _touch(s: Table, next_s: Floats, k: int, now_s: float) -> None:
    """Let a replica that is between two iterations continue now."""
    n = counters_of(s)
    if not n.in_iteration:
        n.now_s = next_s[k] = now_s


@compiled()
def give(
    s: Table,
    next_s: Floats,
    k: int,
    arrival_s: float,
    now_s: float,
    prompt_tokens: int,
    limit_tokens: int,
    hash_at: int,
    ids: int,
) -> int:
    """Hand a new request to a replica that has advanced to ``now_s`` and has room for a row; return its row.

    hash_at, ids: where this request's ids begin in the replica's ``hash_ids``, and how many there are.
    """
    n = counters_of(s)
    r = n.request_count
    request = requests_of(s)[r]
    request.prompt_tokens, request.output_limit_tokens, request.arrival_s = prompt_tokens, limit_tokens, arrival_s
    _set_prompt(s, r, hash_at, ids)
    n.request_count = r + 1
    n.next_arrival_s = arrival_s
    kernel.take_arrivals(s, now_s)
    _touch(s, next_s, k, now_s)
    return int(r)


@compiled()
def note_turn(s: Table, r: int, request: int) -> None:
    """Note which request of the trace a row of a replica is, for `_take_ended`."""
    turns_of_replica(s)[r].after = request


@compiled()
def give_moved(
    s: Table, next_s: Floats, k: int, now_s: float, words: Ints, limit_tokens: int, hash_at: int, ids: int
) -> int:
    """Hand over a request of another replica with the tokens it has produced; return its row. Its KV is recomputed.

    It was accepted before, so ``max_waiting`` does not reject it; a limit that it has already reached does.

    Args:
        words: int64[fields], the other replica's record of it.
    """
    n, r = counters_of(s), _new_request(s, words)
    request = requests_of(s)[r]
    request.output_limit_tokens, request.computed_tokens, request.prefill_tokens = limit_tokens, 0, 0
    request.free_run, request.host_blocks = -1, 0
    _set_prompt(s, r, hash_at, ids)
    if limit_tokens <= request.produced_tokens:
        request.status = REJECTED
        n.rejected += 1
        if n.in_sessions:
            _end_turn(s, r, now_s)
    else:
        request.status = WAITING
        queue_of(s)[n.queue_tail] = r
        n.queue_tail += 1
        n.waiting_tokens += request.prompt_tokens + request.produced_tokens
    _touch(s, next_s, k, now_s)
    return r


@compiled()
def held_rows(s: Table, rows: Ints, running_too: bool) -> int:
    """Write the rows of the requests that have not ended to ``rows``, in the order in which they would be served.

    Args:
        s: a replica; the records of its requests are brought up to date.
        rows: int64, long enough for all of them.
        running_too: whether to include running requests, or only waiting ones.
    Returns:
        The number of rows.
    """
    n, slots = counters_of(s), slots_of(s)
    count, end = 0, len(slots) - 1
    if running_too:
        settle(s)
        i = slots[end].next
        while i != end:
            rows[count] = slots[i].request
            count += 1
            i = slots[i].next
    for place in range(n.preempted_waiting - 1, -1, -1):
        rows[count] = preempted_stack_of(s)[place]
        count += 1
    for place in range(n.queue_head, n.queue_tail):
        rows[count] = queue_of(s)[place]
        count += 1
    return count


@compiled()
def stop(s: Table) -> None:
    """Let a replica that serves no longer reject none of the requests that others serve now."""
    counters_of(s).max_wait_s = np.inf


@compiled()
def let_waiting_go(s: Table) -> None:
    """Forget the waiting requests; running ones continue."""
    n = counters_of(s)
    kernel.forget_kept_kv(s)
    kernel.forget_host_kv(s)
    n.preempted_waiting, n.queue_head, n.waiting_tokens = 0, n.queue_tail, 0


# -- prefill and decode on different replicas --------------------------------------------------------------------------


@compiled()
def hold(s: Table, blocks: int) -> None:
    """Reserve free KV blocks, for KV that is being sent here."""
    _take(s, blocks)


@compiled()
def keep(s: Table, blocks: int) -> None:
    """Hold KV blocks that an iteration has just freed: those of a prompt that has ended here and is to be sent."""
    _take(s, blocks)
    n = counters_of(s)
    n.late_blocks = max(n.late_blocks - blocks, 0)


@compiled()
def let_go(s: Table, blocks: int) -> None:
    """Free blocks that were reserved."""
    _release(s, blocks, -1)


@compiled()
def chunks_under_way(s: Table, rows: Ints) -> int:
    """Write to ``rows`` the requests whose prompt the iteration under way completes; return how many."""
    n, requests, slots, batch = counters_of(s), requests_of(s), slots_of(s), batch_of(s)
    count = 0
    if n.in_iteration:
        for j in range(n.batch_chunks):
            r = slots[batch[j].slot].request
            if requests[r].computed_tokens + batch[j].tokens == requests[r].prefill_tokens:
                rows[count] = r
                count += 1
    return count


@compiled()
def free_share(s: Table, blocks: int, coming: int) -> float:
    """Return the free share of the KV pool; -1 if there is no room for another request with this many KV blocks.

    Args:
        s: a decode replica. It has no room while preempted requests wait there. coming: requests being sent to it.
    """
    n = counters_of(s)
    if n.free_blocks - blocks < n.watermark_blocks or n.running + coming >= n.max_running or waiting(s) > 0:
        return -1.0
    return float(n.free_blocks / max(n.pool_blocks, 1))


@compiled(inline=True)
def in_iteration(s: Table) -> bool:
    """Return whether an iteration is under way."""
    return bool(counters_of(s).in_iteration)


@compiled()
def begin(s: Table, next_s: Floats, k: int, now_s: float) -> int:
    """Start the iteration that is due at ``now_s``, if any; return as `bring` does."""
    why = bring(s, next_s, k, now_s, np.nextafter(now_s, np.inf))
    if why == HORIZON and not in_iteration(s):
        next_s[k] = next_event_s(s)  # nothing could start, so nothing will before that
    return why


@compiled()
def join(s: Table, next_s: Floats, k: int, now_s: float, words: Ints, limit_tokens: int, computed_tokens: int) -> int:
    """Start to decode a request whose KV has arrived in the blocks reserved for it; return its row.

    The replica must be between two iterations, with room for a row and a free slot.

    Args:
        words: int64[fields], the prefill replica's record of it.
        computed_tokens: whose KV has arrived: its prompt and, after a failure, tokens that it had produced before.
    """
    n, r = counters_of(s), _new_request(s, words)
    request = requests_of(s)[r]
    request.output_limit_tokens, request.status = limit_tokens, RUNNING
    request.free_run, request.host_blocks = -1, 0
    request.computed_tokens = request.prefill_tokens = computed_tokens
    request.finish_s = np.nan
    n.running_tokens += computed_tokens
    i = _link_slot(s, r, n.decode_set, n.kv_format_id)
    if n.kv_format_id >= 0:
        n.formatted += 1
        slots_of(s)[i].saved_tokens = saved_tokens(s, computed_tokens)
    _join_decodes(s, i)
    n.now_s = next_s[k] = now_s
    return r


# -- the loop ----------------------------------------------------------------------------------------------------------


@compiled()
def serve(tables: Tables, c: Table, now_s: float, horizon_s: float) -> int:
    """Serve and route from ``now_s`` to a horizon, including arrivals at it; return why it stopped.

    At the horizon, iterations end and requests arrive and are routed; iterations start in the next call.

    Args:
        tables: the replicas. c: the cluster. now_s: SimPy's present time.
    """
    cluster, next_s, arrival_s = cluster_of(c), next_s_of(c), arrival_s_of(c)
    while True:
        at = cluster.next_request
        arrives_s = arrival_s[at] if at < len(arrival_s) else np.inf
        until_s = min(arrives_s, horizon_s)
        for k in range(len(tables)):
            # A replica between two iterations at until_s starts none before all requests of that time have arrived.
            due_s = next_s[k]
            if due_s < until_s or (due_s == until_s and due_s < np.inf and in_iteration(tables[k])):
                why = bring(tables[k], next_s, k, now_s, until_s)
                if why in (NEEDS, GROW):
                    cluster.replica, cluster.why = k, why
                    return ATTEND
        if at == len(arrival_s) or arrives_s > horizon_s:
            return REACHED
        why = _hand_over(tables, c, at, arrives_s)
        if why != REACHED:
            return why
        cluster.next_request = at + 1


@compiled()
def _hand_over(tables: Tables, c: Table, at: int, arrives_s: float) -> int:
    """Route the request that arrives now and hand it over; return ``REACHED``, or why Python has to act first."""
    cluster, replicas, prompt_tokens, hash_at = cluster_of(c), replicas_of(c), prompt_tokens_of(c), hash_at_of(c)
    if cluster.router == ASK:
        return CHOOSE
    reject_late(tables, c, arrives_s)
    next_in_turn = cluster.next_in_turn
    k = choose(tables, c, at, prompt_tokens[at])
    if k < 0:
        return NO_REPLICA_ACCEPTS
    s = tables[k]
    if counters_of(s).request_count == len(requests_of(s)):
        cluster.replica, cluster.next_in_turn = k, next_in_turn  # the choice is repeated in the next call
        return ROOM
    limit = min(output_tokens_of(c)[at], replicas[k].context_limit - prompt_tokens[at])
    ids, home = hash_at[at + 1] - hash_at[at], homes_of(c)[at]
    home.engine = replicas[k].engine
    home.row = give(s, next_s_of(c), k, arrives_s, arrives_s, prompt_tokens[at], limit, hash_at[at], ids)
    if counters_of(s).in_sessions:
        note_turn(s, home.row, at)
    return REACHED


# -- sessions ----------------------------------------------------------------------------------------------------------


@compiled()
def take_due(c: Table) -> int:
    """Remove the request that arrives next, and note its arrival; return it."""
    cluster, due = cluster_of(c), due_turns_of(c)
    at = due[0].request
    arrival_s_of(c)[at] = due[0].at_s
    arrival_order_of(c)[cluster.next_request] = at
    _drop_first(due, cluster.due_count)
    cluster.due_count -= 1
    cluster.next_request += 1
    return int(at)


@compiled()
def _take_ended(tables: Tables, c: Table, ended_s: float) -> None:
    """Let the requests arrive that follow those which replicas report as ended."""
    cluster, turns, starts = cluster_of(c), turns_of(c), session_starts_of(c)
    for k in range(len(tables)):
        if replicas_of(c)[k].engine < 0:
            continue
        n = counters_of(tables[k])
        for place in range(n.ended_count):
            after = turns[turns_of_replica(tables[k])[ended_turns_of(tables[k])[place]].after].after
            if after < 0 and cluster.next_session < len(starts):
                after = starts[cluster.next_session]
                cluster.next_session += 1
            if after >= 0:
                _add_due(due_turns_of(c), cluster.due_count, after, ended_s + turns[after].think_s)
                cluster.due_count += 1
        n.ended_count = 0


@compiled()
def serve_sessions(tables: Tables, c: Table, now_s: float, horizon_s: float) -> int:
    """Serve and route as `serve` does, but event by event: any iteration may end a turn that another one follows.

    An event is the end of an iteration, the end of a longest wait, an arrival, or the horizon. What ends between the
    start of an iteration and the next event ends the smallest moment after the event before.
    """
    cluster, next_s = cluster_of(c), next_s_of(c)
    _take_ended(tables, c, max(now_s, cluster.reached_s))
    while True:
        arrives_s = due_turns_of(c)[0].at_s if cluster.due_count > 0 else np.inf
        at_s = min(arrives_s, horizon_s)
        for k in range(len(tables)):
            if replicas_of(c)[k].engine >= 0:
                at_s = min(at_s, next_s[k], kernel.wait_ends_s(tables[k]))
        if at_s == np.inf:
            return REACHED
        at_s = cluster.reached_s = max(at_s, now_s, cluster.reached_s)
        for k in range(len(tables)):
            if next_s[k] <= at_s and in_iteration(tables[k]):
                why = bring(tables[k], next_s, k, now_s, at_s)
                if why in (NEEDS, GROW):
                    cluster.replica, cluster.why = k, why
                    return ATTEND
        for k in range(len(tables)):
            if replicas_of(c)[k].engine >= 0:
                kernel.reject_late(tables[k], at_s)
        _take_ended(tables, c, at_s)
        while cluster.due_count > 0 and due_turns_of(c)[0].at_s <= at_s:
            # Chosen before it is taken, so that the choice can be repeated; a rejected one may add another.
            why = _hand_over(tables, c, due_turns_of(c)[0].request, at_s)
            if why != REACHED:
                return why
            take_due(c)
            _take_ended(tables, c, at_s)
        if at_s >= horizon_s:
            return REACHED
        for k in range(len(tables)):
            if next_s[k] <= at_s and not in_iteration(tables[k]):
                why = begin(tables[k], next_s, k, at_s)
                if why in (NEEDS, GROW):
                    _take_ended(tables, c, np.nextafter(at_s, np.inf))
                    cluster.replica, cluster.why = k, why
                    return ATTEND
        _take_ended(tables, c, np.nextafter(at_s, np.inf))
