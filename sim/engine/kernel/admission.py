"""Arrivals, admission, and the batch of an iteration, by the rules of sim/engine/scheduler.py.

A batch is formed at the start of its iteration, and its KV blocks are taken then. Its prefills and single decodes are
the first ``batch_chunks`` rows of ``batch`` (slot, tokens); ``decodes_in_batch`` adds all decoding requests at once.
`_form` treats the decoding requests as one group. If that is impossible (more decodes than the token budget, several
unfinished prompts), `_form_eagerly` goes through the running requests one by one.
"""

from __future__ import annotations

import numpy as np

from sim.compiled import compiled, constant
from sim.engine.kernel.decodes import _link_slot, _preempt, blocks_due, settle
from sim.engine.kernel.kv import _blocks, _prefix_blocks_in, _take, blocks_of
from sim.engine.kernel.layout import Table
from sim.engine.kernel.prefix_cache import _find_prefix, _hold_prefix_blocks
from sim.engine.kernel.state import (
    CHUNKED,
    NEVER,
    NO_FORMAT,
    NO_OWNER,
    OWN_SESSIONS,
    PREFILL_FIRST,
    REJECTED,
    RUNNING,
    WAITING,
    ZERO,
    admissible,
    batch_of,
    counters_of,
    due_clocks_of,
    free_runs_of,
    kv_sets_of,
    preempted_stack_of,
    prompts_of,
    queue_of,
    requests_of,
    slots_of,
    waiting,
)
from sim.engine.kernel.turns import _end_turn, _take_turn

NO_SWAPPED, ONLY_SWAPPED, ANY = constant(0), constant(1), constant(2)

# -- scheduling rules: another one needs a branch in these three functions, and a value of `SchedulingRule` ------------


@compiled(inline=True)
def _admits_first(s: Table) -> bool:
    """Return whether waiting prompts come first, and while any fits run without the decodes."""
    return bool(counters_of(s).scheduling_rule == PREFILL_FIRST)


@compiled(inline=True)
def _cuts_prompts(s: Table) -> bool:
    """Return whether a prompt is cut into chunks that fit the token budget, instead of being computed at once."""
    return bool(counters_of(s).scheduling_rule == CHUNKED)


@compiled(inline=True)
def _running_budget(s: Table) -> int:
    """Return the tokens that running requests may compute in one iteration."""
    n = counters_of(s)
    return int(n.max_batch_tokens if n.scheduling_rule == CHUNKED else n.running)


# -- arrivals ----------------------------------------------------------------------------------------------------------


@compiled()
def _first_that_never_ran(s: Table) -> int:
    """Return the place in the queue of the first request that was never admitted; its end if there is none.

    Requests that another replica admitted wait in the queue too.
    """
    n, requests, queue = counters_of(s), requests_of(s), queue_of(s)
    place = n.queue_head
    while place < n.queue_tail and not np.isnan(requests[queue[place]].admitted_s):
        place += 1
    return int(place)


@compiled()
def wait_ends_s(s: Table) -> float:
    """Return when the first request that was never admitted has waited too long; ``inf`` for never."""
    n, ends_s = counters_of(s), np.inf
    if n.max_wait_s < np.inf:
        place = _first_that_never_ran(s)
        if place < n.queue_tail:
            ends_s = requests_of(s)[queue_of(s)[place]].arrival_s + n.max_wait_s
    return float(ends_s)


@compiled(inline=True)
def _leave_queue(s: Table, place: int) -> None:
    """Take the request at a place out of the queue; those before it move up."""
    n, queue = counters_of(s), queue_of(s)
    for at in range(place, n.queue_head, -1):
        queue[at] = queue[at - 1]
    n.queue_head += 1


@compiled()
def reject_late(s: Table, now_s: float) -> None:
    """Reject the requests that have waited too long for their first admission by now.

    Calling it more often changes nothing. Whatever reads the queue calls it first. In sessions a rejected request lets
    the next one arrive; this then ends at that arrival, if it is earlier, for `take_arrivals` to go on.
    """
    n, queue = counters_of(s), queue_of(s)
    while wait_ends_s(s) <= now_s:
        place, ended_s = _first_that_never_ran(s), max(wait_ends_s(s), n.max_wait_since_s)
        r = queue[place]
        late = requests_of(s)[r]
        late.status = REJECTED
        n.rejected += 1
        n.waiting_tokens -= late.prompt_tokens
        _leave_queue(s, place)
        n.known_tail += place >= n.known_tail
        n.late_from += n.late_from != NEVER and place >= n.late_from
        if n.in_sessions:
            _end_turn(s, r, ended_s)
            now_s = min(now_s, n.next_arrival_s)  # what comes before the next rejection comes first


@compiled(inline=True)
def queue_due_s(s: Table) -> float:
    """Return when the next request arrives or one has waited too long, whichever is first."""
    n = counters_of(s)
    due_s = n.next_arrival_s
    if n.max_wait_s < np.inf:  # looked up only then: this runs before every iteration
        due_s = min(due_s, wait_ends_s(s))
    return float(due_s)


@compiled()
def take_arrivals(s: Table, now_s: float) -> None:
    """Queue the requests that have arrived by now, or reject them; reject those that have waited too long."""
    n, requests = counters_of(s), requests_of(s)
    while True:
        if n.max_wait_s < np.inf:
            reject_late(s, min(n.next_arrival_s, now_s))
        if n.next_arrival_s > now_s:
            break
        r = n.arrived
        if n.in_sessions == OWN_SESSIONS:
            r = _take_turn(s)
        else:
            n.next_arrival_s = requests[r + 1].arrival_s if r + 1 < n.request_count else np.inf
        n.arrived += 1
        request = requests[r]
        request.computed_tokens = request.produced_tokens = request.prefill_tokens = 0
        request.preemptions = request.kept_params = 0
        request.free_run, request.host_blocks, request.status = -1, 0, WAITING
        request.admitted_s = request.first_token_s = request.last_token_s = request.finish_s = np.nan
        request.nll_sum = 0.0
        n.arrived_prompt_tokens += request.prompt_tokens
        if (n.max_waiting >= 0 and waiting(s) >= n.max_waiting) or request.output_limit_tokens < 1:
            request.status = REJECTED
            n.rejected += 1
            if n.in_sessions:
                _end_turn(s, r, request.arrival_s)
        else:
            queue_of(s)[n.queue_tail] = r
            n.queue_tail += 1
            n.waiting_tokens += request.prompt_tokens


@compiled()
def head(s: Table) -> int:
    """Return the request at the head of the queue; at least one must be waiting."""
    n = counters_of(s)
    if n.preempted_waiting > 0:
        return int(preempted_stack_of(s)[n.preempted_waiting - 1])
    return int(queue_of(s)[n.queue_head])


# -- admission ---------------------------------------------------------------------------------------------------------


@compiled()
def _next_place(s: Table, now_s: float, most_blocks: int) -> int:
    """Return the place in the queue of the request that is admitted next, after the preempted ones; -1 for none.

    By value (``by_value`` in sim/engine/scheduler.py), or else the first; at least one must be admissible.

    Args:
        s: the replica. now_s: the time.
        most_blocks: by value, requests whose full prompts need more KV blocks are passed over; ``NEVER`` passes none.
    """
    n, requests, queue = counters_of(s), requests_of(s), queue_of(s)
    if not n.admits_by_value:
        return int(n.queue_head)
    most_valuable, best, layers = -np.inf, -1, kv_sets_of(s)[n.prefill_set].layers
    for place in range(n.queue_head, min(n.queue_tail, n.late_from)):
        request = requests[queue[place]]
        blocks = _blocks(request.prompt_tokens + request.produced_tokens, n.block_tokens)
        value = (now_s - request.arrival_s) / blocks
        if value > most_valuable and layers * blocks <= most_blocks:
            most_valuable, best = value, place
    return int(best)


@compiled(inline=True)
def _chunk(s: Table, r: int, computed: int, budget: int, longest: int) -> int:
    """Return how many tokens of r an iteration computes after the first ``computed``; ``longest`` 0 is no limit."""
    request = requests_of(s)[r]
    chunk = min(request.prompt_tokens + request.produced_tokens - computed, budget)
    return int(min(chunk, longest)) if longest > 0 else int(chunk)


@compiled()
def _admit(s: Table, r: int, place: int, now_s: float, found: int) -> int:
    """Admit request r, which finds KV of ``found`` tokens; return its slot.

    place: in the queue, or -1 for the request that was preempted last.
    """
    n = counters_of(s)
    if place < 0:
        n.preempted_waiting -= 1
    else:
        _leave_queue(s, place)
    request = requests_of(s)[r]
    target = request.prompt_tokens + request.produced_tokens
    n.waiting_tokens -= target
    n.running_tokens += found
    held_set = n.prefill_set
    if request.host_blocks == 0:
        request.prefill_tokens = target
    elif found >= request.prefill_tokens:  # a swapped request goes on where it stopped
        held_set = n.decode_set
    request.computed_tokens, request.status = found, RUNNING
    if np.isnan(request.admitted_s):
        request.admitted_s = now_s
    i = _link_slot(s, r, held_set, NO_FORMAT)
    if n.caching:
        _hold_prefix_blocks(s, i, _prefix_blocks_in(s, r, found))
    if n.prefix_caching and prompts_of(s)[r].cached_tokens < 0:
        prompts_of(s)[r].cached_tokens = found
    if request.free_run >= 0:  # it reuses the KV that it freed when it was preempted
        run, claimed = free_runs_of(s)[request.free_run], blocks_of(s, i, found)
        run.blocks -= claimed
        run.owner = NO_OWNER
        request.free_run = -1
        n.free_blocks -= claimed
    return int(i)


@compiled()
def _admit_those_that_fit(s: Table, now_s: float, budget: int, free: int, back: int) -> int:
    """Admit waiting requests in their order while token budget, KV blocks and slots last; return how many.

    budget: tokens that may still be computed. free: KV blocks that the batch so far leaves free; nothing is taken here.
    back: whether swapped requests may come back: `NO_SWAPPED`, `ONLY_SWAPPED` or `ANY`.
    """
    n, requests, batch = counters_of(s), requests_of(s), batch_of(s)
    in_chunks, prefill_layers = _cuts_prompts(s), kv_sets_of(s)[n.prefill_set].layers
    admitted, most_blocks = 0, free - n.watermark_blocks if n.running == 0 else NEVER
    while admissible(s) > 0 and n.running + n.late_ended < n.max_running:
        place = -1
        if n.preempted_waiting == 0:
            place = _next_place(s, now_s, most_blocks)
            if place < 0:
                break
        r = head(s) if place < 0 else queue_of(s)[place]
        found, held_by_others, layers = requests[r].computed_tokens, 0, prefill_layers
        if n.host_blocks > 0:
            swapped = requests[r].host_blocks > 0
            if back != ANY and swapped != (back == ONLY_SWAPPED):
                break
            if swapped and found >= requests[r].prefill_tokens:
                layers = kv_sets_of(s)[n.decode_set].layers
        if n.caching:
            found = _find_prefix(s, r)
            held_by_others = n.found_held_blocks * n.prefix_block_kv_blocks
        target = requests[r].prompt_tokens + requests[r].produced_tokens
        # Prefix blocks that others hold take no room; those that are free must be taken out of the pool.
        full = layers * (_blocks(target, n.block_tokens) - held_by_others)
        if in_chunks:
            if budget == 0:
                break
            chunk = _chunk(s, r, found, budget, n.long_prefill_tokens)
            need = layers * (_blocks(found + chunk, n.block_tokens) - held_by_others)
            # If nothing else runs, the full prompt must fit: otherwise it would preempt itself and start over forever.
            must_fit = full if n.reserve_full_prompt or n.running == 0 else need
        else:
            chunk = target - found
            if chunk > budget and admitted > 0:  # a prompt above the budget runs alone
                break
            need = must_fit = full
        if must_fit + n.watermark_blocks > free:
            break
        free -= need
        budget -= chunk
        row = batch[n.batch_chunks]
        row.slot, row.tokens = _admit(s, r, place, now_s, found), chunk
        n.batch_chunks += 1
        admitted += 1
        if not in_chunks and budget <= 0:
            break
    return admitted


# -- the batch of one iteration ----------------------------------------------------------------------------------------


@compiled(inline=True)
def _free(s: Table) -> int:
    """Return the KV blocks that the next batch can use: the free ones, without those freed too late."""
    n = counters_of(s)
    return int(n.free_blocks - n.late_blocks)


@compiled(inline=True)
def _blocks_for_chunks(s: Table, first: int) -> int:
    """Return the KV blocks that the chunks of the batch from ``first`` on need beyond those already held."""
    n, requests, slots, batch = counters_of(s), requests_of(s), slots_of(s), batch_of(s)
    need = 0
    for j in range(first, n.batch_chunks):
        i = batch[j].slot
        request = requests[slots[i].request]
        computed = request.computed_tokens
        need += blocks_of(s, i, computed + batch[j].tokens)
        if request.host_blocks == 0:  # one that comes back from the host holds none yet
            need -= blocks_of(s, i, computed)
    return need


@compiled(inline=True)
def _leave_host(s: Table, first: int) -> None:
    """Let the requests of the batch from chunk ``first`` on that come back free their host memory."""
    n, requests, slots, batch = counters_of(s), requests_of(s), slots_of(s), batch_of(s)
    for j in range(first, n.batch_chunks):
        request = requests[slots[batch[j].slot].request]
        n.host_free_blocks += request.host_blocks
        n.moved_blocks += request.host_blocks
        request.host_blocks = 0


@compiled()
def _form(s: Table, now_s: float) -> int:
    """Form the next batch with all decodes as one group; return how many requests were preempted.

    Running requests come before admissions, and at most one prompt is unfinished: the newest. So the newest requests
    are preempted until the others fit, and the order in which the others take their blocks does not matter.
    """
    n, requests, slots, batch = counters_of(s), requests_of(s), slots_of(s), batch_of(s)
    end = len(slots) - 1
    n.batch_chunks, n.decodes_in_batch = 0, 0
    if _admits_first(s) and _admit_those_that_fit(s, now_s, n.max_batch_tokens, _free(s), NO_SWAPPED) > 0:
        _take(s, _blocks_for_chunks(s, ZERO))
        return 0
    victims = 0
    need = blocks_due(s)
    while need > _free(s) and n.running > 0:
        _preempt(s, slots[end].previous)
        victims += 1
        need = blocks_due(s)
    budget = n.max_batch_tokens - n.decoding  # each decode computes one token
    # The newest request is the only one that can still be in prefill; it gets what the decodes leave.
    newest = slots[end].previous
    if newest != end and due_clocks_of(s)[newest] == NEVER and budget > 0:
        r = slots[newest].request
        computed = requests[r].computed_tokens
        chunk = _chunk(s, r, computed, budget, n.long_prefill_tokens)
        more = blocks_of(s, newest, computed + chunk) - blocks_of(s, newest, computed)
        if need + more > _free(s):
            _preempt(s, newest)
            victims += 1
        else:
            need += more
            budget -= chunk
            batch[0].slot, batch[0].tokens = newest, chunk
            n.batch_chunks = 1
    n.decodes_in_batch = n.decoding > 0
    # After a preemption no request is admitted: its blocks would go to a newer request.
    if victims == 0 and (not _admits_first(s) or n.host_blocks > 0):
        before = n.batch_chunks
        back = ONLY_SWAPPED if _admits_first(s) else ANY
        if _admits_first(s):
            budget = NEVER  # decodes do not count
        _admit_those_that_fit(s, now_s, budget, _free(s) - need, back)
        need += _blocks_for_chunks(s, before)
        if n.host_blocks > 0:
            _leave_host(s, before)
    _take(s, need)
    return victims


@compiled()
def _form_eagerly(s: Table, now_s: float) -> int:
    """Form the next batch request by request, including decodes; return how many were preempted."""
    n, slots = counters_of(s), slots_of(s)
    end = len(slots) - 1
    settle(s)
    i = slots[end].next
    while i != end:  # no request is in the group of decodes now; its record tells whether it decodes
        due_clocks_of(s)[i] = NEVER
        i = slots[i].next
    n.batch_chunks, n.decodes_in_batch = 0, 0
    victims = 0
    if not _admits_first(s) or _admit_those_that_fit(s, now_s, n.max_batch_tokens, _free(s), NO_SWAPPED) == 0:
        victims = _form_running(s, now_s)
    _take(s, _blocks_for_chunks(s, ZERO))
    if n.host_blocks > 0:
        _leave_host(s, ZERO)
    return int(victims)


@compiled(once=True)
def _form_running(s: Table, now_s: float) -> int:
    """Batch the running requests in order of admission, then admit others; return how many were preempted.

    The twin of ``_extend_running`` in sim/engine/scheduler.py: ``kept`` requests still run, the first ``index`` of them
    are in the batch, and ``taken`` KV blocks are needed for them.
    """
    n, requests, slots, batch = counters_of(s), requests_of(s), slots_of(s), batch_of(s)
    end, running = len(slots) - 1, n.running
    budget, longest = _running_budget(s), n.long_prefill_tokens if _cuts_prompts(s) else 0
    kept, index, i = running, 0, slots[end].next
    while n.free_blocks < 0 and kept > 0:  # the pool has shrunk below its use
        kept -= 1
        _preempt(s, slots[end].previous)
    taken = 0
    while index < kept and budget > 0:
        r = slots[i].request
        computed = requests[r].computed_tokens
        chunk = _chunk(s, r, computed, budget, longest)
        need = blocks_of(s, i, computed + chunk) - blocks_of(s, i, computed)
        while taken + need > _free(s) and kept > index:
            kept -= 1
            _preempt(s, slots[end].previous)
        if kept == index:  # it was itself the newest: it has been preempted
            break
        taken += need
        budget -= chunk
        batch[index].slot, batch[index].tokens = i, chunk
        index += 1
        i = slots[i].next
    n.batch_chunks = index
    victims = running - kept
    if victims == 0 and (not _admits_first(s) or n.host_blocks > 0):
        back = ONLY_SWAPPED if _admits_first(s) else ANY
        if _admits_first(s):
            budget = NEVER  # decodes do not count
        _admit_those_that_fit(s, now_s, budget, _free(s) - taken, back)
    return int(victims)


@compiled()
def _needs_eager(s: Table) -> bool:
    """Return whether the next batch has to be formed request by request."""
    n, slots = counters_of(s), slots_of(s)
    if n.decoding > _running_budget(s):
        return True
    prompts = n.running - n.decoding
    if prompts == 0:
        return False
    return bool(prompts > 1 or due_clocks_of(s)[slots[len(slots) - 1].previous] != NEVER)


@compiled(once=True)
def _form_batch(s: Table, now_s: float) -> int:
    """Form the next batch, by `_form` if possible; return how many requests were preempted."""
    n = counters_of(s)
    if n.late_blocks > 0:  # a change of plan or memory may have taken them
        n.late_blocks = min(n.late_blocks, max(n.free_blocks, 0))
    if _needs_eager(s):
        n.eager = 1
        victims = _form_eagerly(s, now_s)
    else:
        n.eager = 0
        victims = _form(s, now_s)
    n.batch_preemptions = n.change_preemptions + victims
    n.change_preemptions = 0
    n.late_from, n.late_blocks, n.late_ended = NEVER, 0, 0
    return victims
