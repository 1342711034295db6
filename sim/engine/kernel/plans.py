"""Plan and memory changes between two iterations, by the rules of sim/engine/protocol.py.

A plan change moves the replica along an edge of the plan graph (sim/engine/plan_graph.py). If that edge or a price is
missing, ``needed`` names what Python has to add, and the replica stays unchanged until the call is repeated.

Sets of layers have W words each: ``kv_set_words[k]``, ``candidate_sets[k]``, and ``residency_words[residency]`` with
the set of prefill in its first W columns and that of decode in the others.
"""

from __future__ import annotations

import numpy as np

from sim.compiled import compiled
from sim.cost.streaming import SHARED_LINK, stream_ready_s
from sim.engine.kernel.admission import queue_due_s, take_arrivals, wait_ends_s
from sim.engine.kernel.decodes import ONE, _preempt, _sum_decode, _sum_whole, empty_sums, settle
from sim.engine.kernel.kv import _blocks, _release, blocks_of, forget_host_kv, forget_kept_kv, resize_pool
from sim.engine.kernel.layout import Table
from sim.engine.kernel.prefix_cache import _forget_prefix_blocks
from sim.engine.kernel.state import (
    GROW,
    LAYERS_A_WORD,
    NEED_COPY_END,
    NEED_DECISION,
    NEED_PRICE,
    NEEDS,
    NEVER,
    NO_OWNER,
    STALLED,
    ZERO,
    Ints,
    _has,
    block_counts_of,
    blocks_due_by_phase_of,
    budget_of,
    candidate_sets_of,
    copies_of,
    counters_of,
    decisions_of,
    due_clocks_of,
    kv_set_words_of,
    kv_sets_of,
    layers_of,
    plan_changes_of,
    prefix_blocks_of,
    price_words_of,
    prices_of,
    requests_of,
    residencies_of,
    residency_block_counts_of,
    residency_layers_of,
    residency_words_of,
    resident_bytes_log_of,
    schedule_of,
    set_remap_of,
    slots_of,
    stream_bytes_of,
)

# -- budget and decisions ----------------------------------------------------------------------------------------------


@compiled()
def follow_budget(s: Table, now_s: float) -> None:
    """Advance the budget to ``now_s`` and count the seconds in which the held bytes exceeded it.

    One subtraction for each stretch over budget, so that its length does not depend on the calls during it.
    """
    n, budget = counters_of(s), budget_of(s)
    used = n.pool_blocks - n.free_blocks
    if not n.in_iteration and n.end_s == now_s:
        used = n.used_blocks_before  # an iteration ended just now: use the blocks held until its end
    held_bytes = n.weight_bytes + n.incoming_bytes + n.workspace_bytes + used * n.block_bytes
    if now_s < n.followed_s:
        _follow_back(s, now_s, held_bytes)
        return
    while True:
        step = n.budget_step
        more = step + 1 < len(budget) and budget[step + 1].from_s <= now_s
        until_s = budget[step + 1].from_s if more else now_s
        if until_s > n.followed_s:
            if held_bytes <= budget[step].budget_bytes:
                n.over_since_s = np.nan
            else:
                if np.isnan(n.over_since_s):
                    n.over_since_s, n.violation_before_s = n.followed_s, n.violation_s
                n.violation_s = n.violation_before_s + (until_s - n.over_since_s)
            n.followed_s = until_s
        if not more:
            return
        n.budget_step = step + 1
        n.budget_moved = 1


@compiled(once=True)
def _follow_back(s: Table, now_s: float, held_bytes: int) -> None:
    """Take back the seconds over budget after ``now_s``: a replica of a cluster has idled past the cluster's end."""
    n, budget, step = counters_of(s), budget_of(s), counters_of(s).budget_step
    if not np.isnan(n.over_since_s):
        n.followed_s = max(n.over_since_s, now_s)
        n.violation_s = n.violation_before_s + (n.followed_s - n.over_since_s)
    while n.followed_s > now_s:
        while budget[step].from_s >= n.followed_s:
            step -= 1
        from_s = max(budget[step].from_s, now_s)
        if held_bytes > budget[step].budget_bytes:
            n.violation_s -= n.followed_s - from_s
        n.followed_s = from_s
    n.over_since_s = np.nan


@compiled(inline=True)
def wanted_target(s: Table) -> int:
    """Return the number of the wanted plan, whether or not its change has begun."""
    n = counters_of(s)
    return int(n.decided_target if n.decided_target >= 0 else n.target)


@compiled()
def take_decisions(s: Table, now_s: float) -> bool:
    """Take the scheduled decisions that are due; return whether the wanted plan has changed."""
    n, schedule = counters_of(s), schedule_of(s)
    another = False
    while n.next_decision_s <= now_s:
        at = n.next_decision
        if schedule[at].target != wanted_target(s):
            n.decided_target, n.decided_s = schedule[at].target, schedule[at].at_s
            another = True
        n.next_decision = at + 1
        n.next_decision_s = schedule[at + 1].at_s if at + 1 < n.decision_count else np.inf
    return another


@compiled()
def resize_to_budget(s: Table) -> None:
    """Give the KV pool the memory that the budget leaves."""
    n = counters_of(s)
    left = budget_of(s)[n.budget_step].budget_bytes - n.weight_bytes - n.incoming_bytes - n.workspace_bytes
    blocks = max(0, left // n.block_bytes)
    if blocks != n.pool_blocks:
        resize_pool(s, blocks)
    n.watermark_blocks = n.least_free_blocks + int(np.ceil(n.watermark_share * blocks))


# -- preemption by plan changes ----------------------------------------------------------------------------------------


@compiled()
def _charge(s: Table, victims: int, tokens: int) -> None:
    """Add requests that lost their KV, and the tokens they had computed, to the row of the open plan change."""
    n, changes = counters_of(s), plan_changes_of(s)
    if n.open_change >= 0:
        changes[n.open_change].preempted += victims
        changes[n.open_change].recomputed_tokens += tokens


@compiled()
def _preempt_to_fit(s: Table) -> None:
    """Preempt the newest requests until the held KV fits the pool."""
    n, slots = counters_of(s), slots_of(s)
    while n.free_blocks < 0 and n.running > 0:
        _charge(s, 1, _preempt(s, slots[len(slots) - 1].previous))


@compiled(once=True)
def _preempt_lacking(s: Table, layer: int) -> None:
    """Preempt, newest first, the requests that lack the KV of a layer whose MHA block runs at their stage."""
    n, slots, words = counters_of(s), slots_of(s), residency_words_of(s)
    prefill_too = _has(words, n.residency, layer)
    decode_too = _has(words, n.residency, layer + LAYERS_A_WORD * kv_set_words_of(s).shape[1])
    end = len(slots) - 1
    i = slots[end].previous
    while prefill_too and i != end:
        before = slots[i].previous
        runs_here = decode_too or due_clocks_of(s)[i] == NEVER
        if runs_here and not _has(kv_set_words_of(s), slots[i].kv_set, layer):
            _charge(s, 1, _preempt(s, i))
        i = before


# -- KV sets -----------------------------------------------------------------------------------------------------------


@compiled()
def _candidate(s: Table, count: int, held: Ints, mask: Ints) -> int:
    """Return which of the first ``count`` candidates equals ``held & mask``; ``count``, its new row, if none does."""
    candidates = candidate_sets_of(s)
    for w in range(candidates.shape[1]):
        candidates[count, w] = held[w] & mask[w]
    for k in range(count):
        same = True
        for w in range(candidates.shape[1]):
            same = same and candidates[k, w] == candidates[count, w]
        if same:
            return k
    return count


@compiled(once=True)
def _collect_candidates(s: Table, residency: int) -> int:
    """Collect in ``candidate_sets`` the KV sets that requests will hold at a residency: what still runs of each.

    The first two are the sets of the plan, prefill and decode; they are one row if they are equal. ``set_remap[k]``
    gets the set that replaces old set k: one for requests in prefill, one for decoding requests.

    Returns:
        The number of candidates.
    """
    n, slots, words, remap, blocks = (
        counters_of(s),
        slots_of(s),
        kv_set_words_of(s),
        set_remap_of(s),
        prefix_blocks_of(s),
    )
    end = len(slots) - 1
    prefill = residency_words_of(s)[residency]
    decode = prefill[words.shape[1] :]
    # First mark the sets that are held (0), so that sets without a holder add no candidate.
    for k in range(n.kv_set_count):
        remap[k].prefill = remap[k].decode = -1
    for number in range(1, n.prefix_block_count + 1):  # a held prefix block loses the layers that prefill drops
        if blocks[number].holders > 0:
            remap[blocks[number].kv_set].prefill = 0
    i = slots[end].next
    while i != end:
        if due_clocks_of(s)[i] != NEVER:
            remap[slots[i].kv_set].decode = 0
        else:
            remap[slots[i].kv_set].prefill = 0
        i = slots[i].next
    count = 1 + _candidate(s, ZERO, prefill, prefill)
    count = max(count, 1 + _candidate(s, count, decode, decode))
    for k in range(n.kv_set_count):
        held = words[k]
        if remap[k].prefill == 0:
            remap[k].prefill = _candidate(s, count, held, prefill)
            count = max(count, 1 + remap[k].prefill)
            count = max(count, 1 + _candidate(s, count, held, decode))  # for the end of its prefill
        if remap[k].decode == 0:
            remap[k].decode = _candidate(s, count, held, decode)
            count = max(count, 1 + remap[k].decode)
    return count


@compiled()
def _replace_sets(s: Table, count: int, decode: Ints) -> None:
    """Copy the candidates to the KV sets in use, with empty sums over decodes."""
    n, sets, words, candidates, remap = (
        counters_of(s),
        kv_sets_of(s),
        kv_set_words_of(s),
        candidate_sets_of(s),
        set_remap_of(s),
    )
    for k in range(n.kv_set_count):
        remap[k].layers_before = sets[k].layers
    for k in range(count):
        layers = 0
        for w in range(words.shape[1]):
            bits = candidates[k, w]
            words[k, w] = bits
            while bits:
                layers += 1
                bits &= bits - 1  # clears the lowest bit
        sets[k].layers, sets[k].decodes, sets[k].context_tokens = layers, 0, 0
        sets[k].after_prefill = _candidate(s, count, candidates[k], decode)
    n.kv_set_count = count


@compiled(once=True)
def _change_sets(s: Table, count: int, decode: Ints) -> None:
    """Move every request to its candidate set and free the KV that it loses; records are up to date (`settle`)."""
    n, requests, slots, sets, remap, blocks = (
        counters_of(s),
        requests_of(s),
        slots_of(s),
        kv_sets_of(s),
        set_remap_of(s),
        prefix_blocks_of(s),
    )
    end, formatted = len(slots) - 1, n.formatted > 0
    # Read once: the compiler cannot know that the loop over the slots does not change them.
    clock, block_tokens, phases = n.clock, n.block_tokens, blocks_due_by_phase_of(s)
    # The freed blocks are the difference of the held blocks before and after. Where no KV is cut or quantized, all
    # layers of a request have equally many blocks, so the dropped layers times that number suffice.
    freed = 0
    i = slots[end].next
    while formatted and i != end:
        freed += blocks_of(s, i, requests[slots[i].request].computed_tokens)
        i = slots[i].next
    _replace_sets(s, count, decode)
    # The sums over decodes are per KV set, so they are built again.
    empty_sums(s)
    i = slots[end].next
    while i != end:
        before, tokens = slots[i].kv_set, requests[slots[i].request].computed_tokens
        decodes = due_clocks_of(s)[i] != NEVER
        after = remap[before].decode if decodes else remap[before].prefill
        slots[i].kv_set = after
        if decodes and formatted:
            _sum_decode(s, i, ONE)
        elif decodes:
            _sum_whole(phases, sets[after], tokens - clock, block_tokens, ONE)
        if formatted:
            freed -= blocks_of(s, i, tokens)
        elif sets[after].layers != remap[before].layers_before:
            dropped = remap[before].layers_before - sets[after].layers
            freed += dropped * (_blocks(tokens, block_tokens) - slots[i].shared_blocks)
        i = slots[i].next
    for number in range(1, n.prefix_block_count + 1):
        if blocks[number].holders > 0:
            before, after = blocks[number].kv_set, remap[blocks[number].kv_set].prefill
            freed += (remap[before].layers_before - sets[after].layers) * n.prefix_block_kv_blocks
            blocks[number].kv_set = after
    _release(s, freed, NO_OWNER)


@compiled(once=True)
def _find_prices(s: Table, residency: int, count: int, candidates_too: bool) -> bool:
    """Find the price of each KV set at a residency and store its row in ``set_remap``.

    Returns:
        Whether all prices are known. If not, ``needed`` is set, and the last candidate row is the set to price.
    """
    n, candidates, prices, price_words = counters_of(s), candidate_sets_of(s), prices_of(s), price_words_of(s)
    words = candidates.shape[1]
    for k in range(count):
        held = candidates[k] if candidates_too else kv_set_words_of(s)[k]
        at = residencies_of(s)[residency].first_price
        while at >= 0:  # prices of one residency form a linked list
            same = True
            for w in range(words):
                same = same and price_words[at, w] == held[w]
            if same:
                break
            at = prices[at].next
        if at < 0:
            last = len(candidates) - 1
            n.needed, n.needed_residency, n.needed_index = NEED_PRICE, residency, last
            for w in range(words):
                candidates[last, w] = held[w]
            return False
        set_remap_of(s)[k].price = at
    return True


# -- plan changes ------------------------------------------------------------------------------------------------------


@compiled(once=True)
def _copy_residency(s: Table, residency: int, count: int, now_s: float) -> None:
    """Copy a residency to where iterations read it: limits, blocks of each layer, parameters and prices of KV sets."""
    n, row, sets, remap = counters_of(s), residencies_of(s)[residency], kv_sets_of(s), set_remap_of(s)
    n.residency, n.target, n.weight_bytes = residency, row.target, row.weight_bytes
    if row.max_wait_s != n.max_wait_s:
        n.max_wait_since_s = now_s
    n.kv_format_id, n.max_waiting, n.max_wait_s = row.kv_format_id, row.max_waiting, row.max_wait_s
    n.kv_percent, n.streams_at, n.streams, n.kv_only = row.kv_percent, row.streams_at, row.streams, row.kv_only
    if row.stream_id != n.stream_id and row.streams > 0:  # other layers are streamed: the copies of the first two begin
        n.first_stream_s, n.second_stream_s = stream_ready_s(
            stream_bytes_of(s), n.streams_at, n.streams, now_s, n.copy_bytes_per_s, n.copy_layer_s, n.slowdown
        )
    n.stream_id, n.cuts_ffn = row.stream_id, row.cuts_ffn
    n.max_running = min(n.slots, row.max_running) if row.max_running >= 0 else n.slots
    block_counts, layers = block_counts_of(s), layers_of(s)
    wanted_counts, wanted_layers = residency_block_counts_of(s)[residency], residency_layers_of(s)[residency]
    columns = block_counts.shape[1]
    for i in range(block_counts.shape[0]):
        for j in range(columns):
            block_counts[i, j] = wanted_counts[columns * i + j]
    for layer in range(len(layers)):
        wanted = wanted_layers[layer]
        layers[layer].bits_index = wanted.bits_index
        layers[layer].prefill_ffn, layers[layer].decode_ffn = wanted.prefill_ffn, wanted.decode_ffn
        layers[layer].kv_only, layers[layer].ffn_cut = wanted.kv_only, wanted.ffn_cut
    for k in range(count):
        sets[k].prefill_params = row.prefill_params + sets[k].layers * row.mha_params
        sets[k].decode_params = row.decode_params + sets[k].layers * row.mha_params
        if n.quality_charged:
            price = prices_of(s)[remap[k].price]
            sets[k].prefill_nll, sets[k].decode_nll = price.prefill_nll, price.decode_nll


@compiled()
def enter_residency(s: Table, residency: int, now_s: float) -> bool:
    """Switch to a residency; return False, with the replica unchanged, if a price has to be added first."""
    n, words, log = counters_of(s), residency_words_of(s), resident_bytes_log_of(s)
    half = words.shape[1] // 2
    # other_*: the set of MHA blocks differs from the present one. one_set: prefill and decode run the same blocks.
    other_prefill = other_decode = n.residency < 0
    one_set, some = True, False
    for w in range(half):
        prefill, decode = words[residency, w], words[residency, half + w]
        one_set, some = one_set and prefill == decode, some or prefill != 0
        if n.residency >= 0:
            other_prefill = other_prefill or prefill != words[n.residency, w]
            other_decode = other_decode or decode != words[n.residency, half + w]
    caching = n.prefix_caching != 0 and one_set and some and residencies_of(s)[residency].kv_format_id < 0
    new_sets = other_prefill or other_decode
    count = _collect_candidates(s, residency) if new_sets else n.kv_set_count
    if n.quality_charged and not _find_prices(s, residency, count, new_sets):
        return False
    settle(s)
    if other_prefill or caching != (n.caching != 0):
        forget_kept_kv(s)  # that KV lacks a layer, or has one too many
        _forget_prefix_blocks(s)
    n.caching = caching
    if new_sets:
        forget_host_kv(s)
        _change_sets(s, count, words[residency, half:])
        n.prefill_set, n.decode_set = 0, 0 if one_set else 1
    _copy_residency(s, residency, count, now_s)
    at = n.resident_bytes_count
    if at == 0 or log[at - 1].weight_bytes != n.weight_bytes:
        log[at].time_s, log[at].weight_bytes = now_s, n.weight_bytes
        n.resident_bytes_count = at + 1
    return True


@compiled(once=True)
def _end_copy(s: Table, now_s: float) -> bool:
    """Start to run the layer whose copy is complete; return False if the plan graph has to be extended first."""
    n, copy, changes = counters_of(s), copies_of(s)[counters_of(s).copy], plan_changes_of(s)
    if copy.after < 0:
        n.needed, n.needed_residency, n.needed_index = NEED_COPY_END, n.residency, n.copy
        return False
    before_bytes = n.weight_bytes
    if not enter_residency(s, copy.after, now_s):
        return False
    if n.open_change >= 0:
        changes[n.open_change].bytes_in += copy.bytes
        changes[n.open_change].bytes_freed += before_bytes + copy.bytes - n.weight_bytes
    n.copy, n.incoming_bytes, n.copy_end_s = -1, 0, np.inf
    if n.recompute_on_restore and copy.restores_mha:
        _preempt_lacking(s, copy.layer)
    return True


@compiled(once=True)
def _keep_copy(s: Table) -> None:
    """Continue the copy under way if the new plan needs exactly that copy; otherwise abandon it."""
    n, copies, here = counters_of(s), copies_of(s), residencies_of(s)[counters_of(s).residency]
    if n.copy < 0:
        return
    under_way = copies[n.copy]
    n.copy = -1
    for other in range(here.copies_at, here.copies_at + here.copies):
        same = copies[other].layer == under_way.layer
        same = same and copies[other].mha_bits == under_way.mha_bits and copies[other].ffn_bits == under_way.ffn_bits
        same = same and copies[other].ffn_width == under_way.ffn_width
        if same and copies[other].bytes == under_way.bytes and copies[other].net_bytes == under_way.net_bytes:
            n.copy = other
    if n.copy < 0:
        n.incoming_bytes, n.copy_end_s = 0, np.inf


@compiled(once=True)
def _begin_change(s: Table, now_s: float) -> bool:
    """Begin the change decided on: drop blocks and keep or abandon the copy; return False if an edge is missing."""
    n, decisions = counters_of(s), decisions_of(s)
    target, before, before_bytes = n.decided_target, n.residency, n.weight_bytes
    at = residencies_of(s)[before].first_decision
    while at >= 0 and decisions[at].target != target:
        at = decisions[at].next
    if at < 0:
        n.needed, n.needed_residency, n.needed_index = NEED_DECISION, before, target
        return False
    if not enter_residency(s, decisions[at].after, now_s):
        return False
    change = plan_changes_of(s)[n.change_count]
    change.decided_s, change.ready_s = n.decided_s, np.nan
    change.from_residency, change.target = before, target
    change.bytes_in, change.bytes_freed = 0, before_bytes - n.weight_bytes
    change.preempted = change.recomputed_tokens = change.blocks_after = 0
    change.blocks_before = n.pool_blocks
    n.open_change = n.change_count
    n.change_count += 1
    n.decided_target = -1
    _keep_copy(s)
    if n.recompute_on_restore and n.streams > 0:  # a block that is streamed runs at once, however it was lost before
        words = residency_words_of(s)
        for layer in range(len(layers_of(s))):
            if _has(words, n.residency, layer) and not _has(words, before, layer):
                _preempt_lacking(s, layer)
    return True


@compiled(once=True)
def _carry_out(s: Table, now_s: float) -> bool:
    """Carry out what is due; return False if the plan graph has to be extended first.

    The order is that of ``Replica._change_plan``: a complete copy joins, the newest decision drops blocks, the pool
    takes the free memory, and the next copy starts.
    """
    n, changes = counters_of(s), plan_changes_of(s)
    if n.copy >= 0 and n.copy_end_s <= now_s and not _end_copy(s, now_s):
        return False
    take_decisions(s, now_s)
    if n.decided_target >= 0 and not _begin_change(s, now_s):
        return False
    n.budget_moved = 0
    here = residencies_of(s)[n.residency]
    if n.copy < 0 and here.copies > 0:
        n.copy = here.copies_at
        n.incoming_bytes = copies_of(s)[n.copy].bytes
        copy_s = n.incoming_bytes / n.copy_bytes_per_s + n.copy_layer_s
        n.copy_end_s = now_s + (copy_s * SHARED_LINK if n.streams > 0 else copy_s)
    if n.open_change >= 0 and n.copy < 0:
        changes[n.open_change].ready_s = now_s
    resize_to_budget(s)
    _preempt_to_fit(s)
    if n.open_change >= 0:
        changes[n.open_change].blocks_after = n.pool_blocks
        if n.copy < 0:
            n.open_change = -1
    return True


@compiled(once=True)
def change_plan(s: Table, now_s: float) -> bool:
    """Carry out due plan and memory changes between two iterations.

    Returns:
        Whether they are done. If not, ``needed`` names what has to be added to the plan graph before the next call.
    """
    n = counters_of(s)
    follow_budget(s, now_s)
    before = n.preemptions
    done = _carry_out(s, now_s)
    n.change_preemptions += n.preemptions - before
    return done


@compiled()
def change_due_s(s: Table) -> float:
    """Return the time from which something is due before the next iteration, ``-inf`` for now.

    That is a change of plan or memory, or the end of the time that the first request of the queue may wait.
    """
    n, budget = counters_of(s), budget_of(s)
    if n.decided_target >= 0 or n.budget_moved:
        return -np.inf
    due_s = min(n.copy_end_s, n.next_decision_s)
    if n.max_wait_s < np.inf:
        due_s = min(due_s, wait_ends_s(s))
    if n.budget_step + 1 < len(budget):
        due_s = min(due_s, budget[n.budget_step + 1].from_s)
    return float(due_s)


@compiled()
def _change_if_due(s: Table, now_s: float) -> int:
    """Carry out plan and memory changes if due; return ``STALLED`` when done, ``GROW`` or ``NEEDS`` if blocked."""
    n = counters_of(s)
    while now_s >= change_due_s(s):
        if n.change_count == len(plan_changes_of(s)) or n.resident_bytes_count + 2 > len(resident_bytes_log_of(s)):
            return GROW
        if queue_due_s(s) <= now_s:
            take_arrivals(s, now_s)
        if not change_plan(s, now_s):
            return NEEDS
    return STALLED
