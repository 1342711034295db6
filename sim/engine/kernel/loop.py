"""The loop: form a batch, price it, end it, until something outside may act on the replica.

A batch is formed and priced at the start of its iteration and takes effect at its end, so a call of `advance` may
return in the middle of one (``in_iteration``). The last module of the kernel: it uses all others.
"""

from __future__ import annotations

import numpy as np

from sim.compiled import compiled
from sim.cost.kv_format import HIDDEN_ROW
from sim.cost.latency_tables import (
    LatencyTables,
    iteration_in_range,
    iteration_seconds,
    kv_only_in_range,
    layered_iteration_seconds,
    projected_in_range,
)
from sim.cost.streaming import SHARED_LINK, slowed_s, streamed_end_s
from sim.engine.kernel.admission import _form_batch, queue_due_s, take_arrivals
from sim.engine.kernel.decodes import _count_decodes, _join_decodes, _leave_decodes, _unlink_slot, reach_limits
from sim.engine.kernel.kv import _release, blocks_of, saved_tokens
from sim.engine.kernel.layout import Table
from sim.engine.kernel.plans import _change_if_due, change_due_s
from sim.engine.kernel.prefix_cache import _fill_answer, _fill_cache, _release_prefix_blocks
from sim.engine.kernel.state import (
    FINISHED,
    GROW,
    HORIZON,
    LAYERS_A_WORD,
    NEVER,
    NO_OWNER,
    STALLED,
    ZERO,
    _has,
    batch_of,
    block_counts_of,
    counters_of,
    due_clocks_of,
    idle,
    iteration_log_of,
    itl_counts_of,
    kv_format_bits_of,
    kv_format_tokens_of,
    kv_precisions_of,
    kv_set_words_of,
    kv_sets_of,
    last_token_groups_of,
    latency_data_of,
    latency_layout_of,
    layer_kv_of,
    layer_loads_of,
    layers_of,
    requests_of,
    slots_of,
    stream_bytes_of,
    stream_shares_of,
    waiting,
)
from sim.engine.kernel.turns import _end_turn

# -- the start of an iteration -----------------------------------------------------------------------------------------


@compiled(inline=True)
def _edges(s: Table, word: int) -> int:
    """Return the layers of a word, as bits, that some KV set has without the layer before, or lacks with it."""
    words, edges = kv_set_words_of(s), 0
    for k in range(counters_of(s).kv_set_count):
        edges |= words[k, word] ^ (words[k, word] << 1)
    return int(edges)


@compiled(inline=True)
def _as_the_layer_before(s: Table, layer: int) -> bool:
    """Return whether a layer that is in the same KV sets as the layer before has its load, whatever the batch is."""
    one, other = layers_of(s)[layer - 1], layers_of(s)[layer]
    same = one.bits_index == other.bits_index and one.kv_only == other.kv_only
    same = same and one.prefill_ffn == other.prefill_ffn and one.decode_ffn == other.decode_ffn
    same = same and one.ffn_cut == other.ffn_cut
    return bool(same and (counters_of(s).formatted == 0 or _keeps_as_the_layer_before(s, layer)))


@compiled()
def _keeps_as_the_layer_before(s: Table, layer: int) -> bool:
    """Return whether requests that keep only a part of their KV keep as much in a layer as in the layer before."""
    before, here = layer_kv_of(s)[layer - 1], layer_kv_of(s)[layer]
    if not counters_of(s).eager:  # all decodes that keep only a part of their KV are in these sums
        same = before.decodes == here.decodes and before.bytes == here.bytes
        same = same and before.hidden == here.hidden and before.hidden_tokens == here.hidden_tokens
        return bool(same and before.token_bytes == here.token_bytes)
    kept, bits = kv_format_tokens_of(s), kv_format_bits_of(s)
    for number in range(len(kept)):
        if kept[number, layer - 1] != kept[number, layer] or bits[number, layer - 1] != bits[number, layer]:
            return False
    return True


@compiled()
def _fill_layer_loads(s: Table) -> int:
    """Fill ``layer_loads`` with the load of each layer; layers with equal loads share a row, in order of appearance.

    Returns:
        The number of rows; their 10 columns are those of ``sim.cost.latency_tables.layered_iteration_seconds``.
    """
    n, requests, slots, sets, words, batch, layers, loads = (
        counters_of(s),
        requests_of(s),
        slots_of(s),
        kv_sets_of(s),
        kv_set_words_of(s),
        batch_of(s),
        layers_of(s),
        layer_loads_of(s),
    )
    kept_tokens, kept_bits, precisions = kv_format_tokens_of(s), kv_format_bits_of(s), kv_precisions_of(s)
    count = edges = 0
    place = 0  # row of the layer before
    for layer in range(len(layers)):
        bit = layer % LAYERS_A_WORD
        if bit == 0:
            edges = _edges(s, layer // LAYERS_A_WORD)
        elif not edges >> bit & 1 and _as_the_layer_before(s, layer):
            loads[place, 0] += 1
            continue
        tokens, contexts, decodes, context, writing = 0, 0, 0, 0, 0
        stored = projected = 0  # bytes read of KV that is cut or quantized; tokens whose hidden states are stored
        kv_only = layers[layer].kv_only != 0
        for j in range(n.batch_chunks):
            slot, chunk = slots[batch[j].slot], batch[j].tokens
            if not _has(words, slot.kv_set, layer):
                continue
            computed = requests[slot.request].computed_tokens
            if computed < requests[slot.request].prefill_tokens and kv_only:
                request = requests[slot.request]
                writing += chunk
                if computed + chunk == request.prompt_tokens + request.produced_tokens:
                    writing -= 1  # its last token passes all of the layer: one query over its context, like a decode
                    decodes += 1
                    context += computed + chunk
            elif computed < requests[slot.request].prefill_tokens:
                tokens += chunk
                # Token k of the chunk attends to computed + k tokens, k = 1 ... chunk.
                contexts += chunk * computed + chunk * (chunk + 1) // 2
            else:
                number = slot.kv_format_id
                decodes += 1
                if number < 0:
                    context += computed
                else:
                    kept = min(computed - slot.saved_tokens, kept_tokens[number, layer])
                    stored += kept * precisions[kept_bits[number, layer]].token_bytes
                    if kept_bits[number, layer] == HIDDEN_ROW:
                        projected += kept
        if n.decodes_in_batch:
            # A decode at clock c has since + c tokens, and context_tokens sums only since (`_join_decodes`).
            for k in range(n.kv_set_count):
                if _has(words, k, layer):
                    decodes += sets[k].decodes
                    context += sets[k].context_tokens + sets[k].decodes * n.clock
            if n.formatted_decodes > 0:
                layer_kv = layer_kv_of(s)[layer]
                decodes += layer_kv.decodes
                stored += layer_kv.bytes + layer_kv.token_bytes * n.clock
                projected += layer_kv.hidden_tokens + layer_kv.hidden * n.clock
        if stored > 0:  # as many tokens at 16 bits have the bytes that the decodes read
            context += stored // (n.block_bytes // n.block_tokens)
        bits, runs = layers[layer].bits_index, layers[layer]
        ffn = (n.batch_ends if kv_only else n.batch_prefill_tokens) * runs.prefill_ffn
        ffn += n.batch_decodes * runs.decode_ffn
        found = False
        for at in range(count):
            row = loads[at]
            if (
                row[1] == bits
                and row[2] == tokens
                and row[3] == contexts
                and row[4] == decodes
                and row[5] == context
                and row[6] == ffn
                and row[7] == writing
                and row[8] == runs.ffn_cut
                and row[9] == projected
            ):
                row[0] += 1
                place, found = at, True
                break
        if not found:
            place, row = count, loads[count]
            row[0], row[1], row[2], row[3], row[4], row[5], row[6] = 1, bits, tokens, contexts, decodes, context, ffn
            row[7], row[8], row[9] = writing, runs.ffn_cut, projected
            count += 1
    return count


@compiled()
def _end_contexts(s: Table) -> int:
    """Return the contexts of the last tokens of the prompts that end with this iteration, in total."""
    n, requests, slots, batch = counters_of(s), requests_of(s), slots_of(s), batch_of(s)
    total = 0
    for j in range(n.batch_chunks):
        request = requests[slots[batch[j].slot].request]
        computed, after = request.computed_tokens, request.computed_tokens + batch[j].tokens
        if computed < request.prefill_tokens and after == request.prompt_tokens + request.produced_tokens:
            total += after
    return total


@compiled(once=True)
def _with_streams(s: Table, compute_s: float, now_s: float) -> float:
    """Return the seconds of an iteration that waits for streamed layers, on a machine of slowdown 1."""
    n = counters_of(s)
    if n.copy < 0:  # a plan change that copies slows computing down all the time
        compute_s = slowed_s(
            stream_bytes_of(s),
            n.streams_at,
            n.streams,
            compute_s,
            n.copy_bytes_per_s,
            n.copy_layer_s,
            n.copy_slowdown,
        )
    end_s, n.first_stream_s, n.second_stream_s = streamed_end_s(
        stream_bytes_of(s),
        stream_shares_of(s),
        n.streams_at,
        n.streams,
        now_s,
        compute_s * n.slowdown,
        n.copy_bytes_per_s,
        n.copy_layer_s,
        n.slowdown * (SHARED_LINK if n.copy >= 0 else 1.0),
        n.first_stream_s,
        n.second_stream_s,
    )
    return float((end_s - now_s) / n.slowdown)


@compiled()
def _start(s: Table, now_s: float) -> None:
    """Price the batch and start its iteration."""
    n, requests, slots, sets, batch = counters_of(s), requests_of(s), slots_of(s), kv_sets_of(s), batch_of(s)
    # Not a literal 0: Numba would compile the pricing functions once more, for arguments that are always 0.
    prefill = prefill_contexts = decodes = contexts = sequences = ZERO
    uniform = n.cuts_ffn == 0  # every layer has the same load, so one price per block suffices
    for j in range(n.batch_chunks):
        slot, tokens = slots[batch[j].slot], batch[j].tokens
        request = requests[slot.request]
        computed = request.computed_tokens
        if computed < request.prefill_tokens:
            prefill += tokens
            # Token k of the chunk attends to computed + k tokens, k = 1 ... tokens.
            prefill_contexts += tokens * computed + tokens * (tokens + 1) // 2
            uniform = uniform and slot.kv_set == n.prefill_set
        else:
            decodes += 1
            contexts += computed
            uniform = uniform and slot.kv_set == n.decode_set and slot.kv_format_id < 0
        if computed + tokens == request.prompt_tokens + request.produced_tokens:
            sequences += 1  # its last token reaches the LM head and yields the next one
    if n.decodes_in_batch:
        decodes += n.decoding
        sequences += n.decoding
        for k in range(n.kv_set_count):
            contexts += sets[k].context_tokens + sets[k].decodes * n.clock
        contexts += n.formatted_tokens + n.formatted_decodes * n.clock
        uniform = uniform and sets[n.decode_set].decodes == n.decoding
    n.batch_prefill_tokens, n.batch_decodes = prefill, decodes
    if n.kv_only > 0:
        n.batch_ends = sequences - decodes
        uniform = uniform and prefill == 0
    tables, counts = LatencyTables(latency_data_of(s), latency_layout_of(s)), block_counts_of(s)
    inside = True
    if uniform:
        duration_s = iteration_seconds(tables, counts, prefill, prefill_contexts, decodes, contexts, sequences)
    else:
        loads = layer_loads_of(s)[: _fill_layer_loads(s)]
        duration_s = layered_iteration_seconds(tables, loads, prefill + decodes, sequences, n.qkv_share)
        inside = projected_in_range(tables, loads)
    if n.copy >= 0:
        duration_s *= 1.0 + n.copy_slowdown
    if n.streams > 0:
        duration_s = _with_streams(s, duration_s, now_s)
    if n.moved_blocks > 0:
        duration_s += n.moved_blocks * n.block_bytes / n.copy_bytes_per_s
        n.moved_blocks = 0
    inside = inside and iteration_in_range(tables, prefill, prefill_contexts, decodes, contexts, sequences)
    if n.kv_only > 0 and prefill > 0:
        inside = inside and kv_only_in_range(tables, sequences, contexts + _end_contexts(s))
    n.batch_extrapolated = 0 if inside else 1
    n.batch_running, n.batch_waiting = n.running, waiting(s)
    n.known_tail = n.queue_tail
    n.in_iteration = 1
    n.iteration_priced_s = duration_s
    duration_s *= n.slowdown
    n.duration_s, n.start_s, n.end_s = duration_s, now_s, now_s + duration_s


# -- the end of an iteration -------------------------------------------------------------------------------------------


@compiled(inline=True)
def _count_itl(s: Table, itl_s: float, count: int) -> None:
    """Log that ``count`` requests got a token ``itl_s`` seconds after their last one."""
    n, itl_counts = counters_of(s), itl_counts_of(s)
    itl_counts[n.itl_count].itl_s, itl_counts[n.itl_count].count = itl_s, count
    n.itl_count += 1


@compiled()
def _finish(s: Table, i: int, now_s: float) -> None:
    """End the request of slot i, which has its last token, and free its KV; its record is up to date."""
    n, slot = counters_of(s), slots_of(s)[i]
    request = requests_of(s)[slot.request]
    request.finish_s = now_s
    request.status = FINISHED
    n.finished += 1
    n.running_tokens -= request.computed_tokens
    if n.in_sessions:
        if n.prefix_caching:
            _fill_answer(s, i)
        _end_turn(s, slot.request, now_s)
    _release(s, blocks_of(s, i, request.computed_tokens), NO_OWNER)
    if slot.shared_blocks > 0:
        _release_prefix_blocks(s, i)
    _unlink_slot(s, i)


@compiled()
def _finish_due(s: Table, now_s: float) -> None:
    """Finish the decoding requests that get their last token at this clock."""
    n, slots = counters_of(s), slots_of(s)
    due, clock, next_due, end = due_clocks_of(s), n.clock, NEVER, len(slots) - 1
    i = slots[end].next
    # With a prefix cache the order of release matters, since blocks freed first are taken first: by admission.
    while n.prefix_caching and i != end:
        after = slots[i].next
        if due[i] == clock:
            _leave_decodes(s, i)
            _finish(s, i, now_s)
        i = after
    for i in range(end):  # without one, the order does not matter: a plain pass over the array is faster
        if due[i] == clock:
            _leave_decodes(s, i)
            _finish(s, i, now_s)
        elif due[i] < next_due:
            next_due = due[i]
    n.next_due = next_due


@compiled(inline=True)
def _end_prefill(s: Table, i: int) -> None:
    """Free the KV that decode will not read: layers that it does not run, tokens and bits that the plan drops."""
    n, slot = counters_of(s), slots_of(s)[i]
    after, computed = kv_sets_of(s)[slot.kv_set].after_prefill, requests_of(s)[slot.request].computed_tokens
    if after != slot.kv_set or n.kv_format_id >= 0:
        held = blocks_of(s, i, computed)
        slot.kv_set = after
        if n.kv_format_id >= 0 and slot.shared_blocks == 0:  # a request that holds prefix blocks keeps all of its KV
            slot.kv_format_id, slot.saved_tokens = n.kv_format_id, saved_tokens(s, computed)
            n.formatted += 1
        _release(s, held - blocks_of(s, i, computed), NO_OWNER)


@compiled()
def _end_chunk(s: Table, i: int, tokens: int, now_s: float) -> None:
    """Count the tokens that slot i computed; if all its tokens are computed, it gets its next token."""
    n, slot = counters_of(s), slots_of(s)[i]
    request, held_set = requests_of(s)[slot.request], kv_sets_of(s)[slot.kv_set]
    decoding = request.computed_tokens >= request.prefill_tokens
    request.computed_tokens += tokens
    n.running_tokens += tokens
    if request.computed_tokens >= slot.fill_tokens:
        _fill_cache(s, i)
    if request.computed_tokens < request.prompt_tokens + request.produced_tokens:
        return
    if decoding:
        request.kept_params += held_set.decode_params
        request.nll_sum += held_set.decode_nll
    else:
        request.kept_params += held_set.prefill_params
        request.nll_sum += held_set.prefill_nll
        _end_prefill(s, i)
    request.produced_tokens += 1
    n.produced_tokens += 1
    if request.produced_tokens == 1:
        request.first_token_s = now_s
        n.first_tokens += 1
        n.ttft_sum_s += now_s - request.arrival_s
    else:
        _count_itl(s, now_s - request.last_token_s, 1)
    request.last_token_s = now_s
    if request.produced_tokens == request.output_limit_tokens:
        _finish(s, i, now_s)
    elif not n.eager:  # after an eager iteration `_count_decodes` adds all decodes
        _join_decodes(s, i)


@compiled(inline=True)
def _log_iteration(s: Table, used_share: float) -> None:
    """Add a row for the iteration that ends; ``used_share`` of the pool was held during it."""
    n = counters_of(s)
    row = iteration_log_of(s)[n.log_count]
    row.start_s, row.end_s, row.kv_used_share = n.start_s, n.end_s, used_share
    row.prefill_tokens, row.decode_requests = n.batch_prefill_tokens, n.batch_decodes
    row.running, row.waiting = n.batch_running, n.batch_waiting
    row.preemptions, row.extrapolated = n.batch_preemptions, n.batch_extrapolated
    n.log_count += 1


@compiled()
def _end(s: Table) -> None:
    """End the iteration under way: log it, count its tokens, finish requests."""
    n, batch, groups = counters_of(s), batch_of(s), last_token_groups_of(s)
    now_s = n.end_s
    n.now_s = now_s
    if n.in_sessions and queue_due_s(s) <= now_s:
        take_arrivals(s, now_s)  # turns that were rejected by now end before those that finish now
    n.busy_s += n.duration_s
    n.priced_s += n.iteration_priced_s
    n.in_iteration = 0
    n.iterations += 1
    n.used_blocks_before = n.pool_blocks - n.free_blocks
    free, finished = n.free_blocks, n.finished
    if n.log_enabled:
        _log_iteration(s, n.used_blocks_before / max(n.pool_blocks, 1))
    if n.decodes_in_batch:
        # Every decoding request gains one token: the clock advances, and only the sums change.
        decodes = n.decoding
        n.clock += 1
        n.produced_tokens += decodes
        n.running_tokens += decodes
        for group in range(n.group_count):
            if groups[group].requests > 0:
                _count_itl(s, now_s - groups[group].last_token_s, groups[group].requests)
        # All of them now have their last token at the same time: one group.
        groups[0].last_token_s, groups[0].requests, n.group_count = now_s, decodes, 1
        if n.clock >= n.next_due:
            _finish_due(s, now_s)
        if n.clock >= n.next_limit:
            reach_limits(s)
    for j in range(n.batch_chunks):
        _end_chunk(s, batch[j].slot, batch[j].tokens, now_s)
    if n.eager:
        _count_decodes(s)
    if n.schedules_ahead:
        n.late_from, n.late_blocks, n.late_ended = n.known_tail, n.free_blocks - free, n.finished - finished


# -- the loop ----------------------------------------------------------------------------------------------------------


@compiled()
def advance(s: Table, horizon_s: float) -> int:
    """Serve from ``now_s`` on; changes that are due at ``now_s`` happen first.

    Args:
        s: the replica, changed in place; its ``now_s`` is the time it has reached.
        horizon_s: serve up to this time and start no iteration at it.
    Returns:
        ``HORIZON``: it reached ``horizon_s``, perhaps in the middle of an iteration. ``NEEDS``: Python has to add to
        the plan graph what ``needed`` names. ``GROW``: Python has to make a log longer. ``STALLED``: it is `idle`, or
        the waiting requests cannot start until something outside changes.
    """
    n, log, itl_counts = counters_of(s), iteration_log_of(s), itl_counts_of(s)
    room = 2 * len(slots_of(s)) + 2  # rows of itl_counts that one iteration may need: a group and a chunk per slot
    if not n.in_iteration:
        why = _change_if_due(s, n.now_s)
        if why != STALLED:
            return why
    while True:
        if n.in_iteration:
            if n.end_s > horizon_s:
                n.now_s = horizon_s
                return HORIZON
            _end(s)
        now_s = n.now_s
        if queue_due_s(s) <= now_s:
            take_arrivals(s, now_s)
        if now_s >= horizon_s:
            return HORIZON
        change_s = change_due_s(s)
        if now_s >= change_s:
            why = _change_if_due(s, now_s)
            if why != STALLED:
                return why
            change_s = change_due_s(s)
        if n.itl_count + room > len(itl_counts) or n.log_count == len(log):
            return GROW
        if n.copies_block and n.copy >= 0 and n.running + waiting(s) > 0:  # the next iteration waits for the copy
            n.now_s = min(n.next_arrival_s, horizon_s, change_s)
            continue
        ahead = n.late_from != NEVER
        victims = _form_batch(s, now_s)
        if n.batch_chunks > 0 or n.decodes_in_batch:
            _start(s, now_s)
            continue
        # The batch is empty. If requests were preempted, there is room now. If it was formed ahead, more is known now.
        # Otherwise wait for the next event.
        if n.eager:
            _count_decodes(s)
        if victims > 0 or ahead:
            continue
        if n.next_arrival_s == np.inf and (change_s == np.inf or idle(s)):
            return STALLED
        n.now_s = min(n.next_arrival_s, horizon_s, change_s)
