"""KV that goes with its requests when a replica is taken away with notice (SpotServe).

Rules, which sim/cluster/cluster.py follows if it has a bandwidth for them (``migrate_bytes_per_s``):

1. A replica with notice serves and accepts for as long as the KV of its decoding requests can still be sent in time. It
   looks at `CHECKS` equally spaced times of the notice. It leaves at the first from which two of these steps and the
   seconds to send that KV would end after the notice: one step until the next look, one for KV that grows meanwhile.
2. From then on it accepts nothing, and its waiting requests are routed again without KV. It sends the KV of one request
   at a time; the others go on decoding until it is their turn. The largest KV goes first, to the replica that can reuse
   the most bytes of it, among equals to that with the largest free share of its KV pool.
3. KV can be reused by a replica with the same model, if it holds every MHA block that decode runs there, all tokens,
   and 16 bits. Only the KV of those MHA blocks is sent. Prompts that are not computed yet are sent after their end, if
   there is time. A replica that has a notice itself gets no KV.
4. A transfer is begun only if it ends before the replica is taken away and the other one has room: free KV blocks above
   the watermark and a place among its running requests, those on their way to it counted.
5. KV that has arrived waits for the end of the iteration under way there, in memory that no pool counts; the request
   then goes on decoding. If there is no room any more, the request is routed again, and its KV is computed again.

Requests that run until the replica is taken away are routed again as without migration.

Source:
    Miao et al., SpotServe (arXiv 2311.15566): its device mapper matches KV to devices by the bytes that are reused, and
    its just-in-time arrangement lets requests decode for as long as the notice allows. That matching is the largest
    over all pairs of devices, for weights and KV; here each replica keeps its weights, and requests choose in turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.cluster import kernel as ck
from sim.cluster.kernel import _new_request, _touch
from sim.compiled import compiled
from sim.engine.kernel.decodes import _join_decodes, _leave_decodes, _link_slot, _unlink_slot
from sim.engine.kernel.kv import _blocks, _release, _take, blocks_of
from sim.engine.kernel.layout import Table
from sim.engine.kernel.state import (
    NEVER,
    NO_FORMAT,
    NO_OWNER,
    RUNNING,
    counters_of,
    due_clocks_of,
    kv_set_words_of,
    kv_sets_of,
    requests_of,
    slots_of,
)
from sim.errors import ConfigError
from sim.types import Floats, Ints

CHECKS = 64
"""How often a replica looks, within its notice, whether it is time to send KV."""


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A replica that could get KV: its number, that of its engine, and its state.

    coming, coming_blocks: requests on their way to it, and the KV blocks of one layer that they will need.
    """

    replica: int
    engine: int
    table: Table
    context_limit: int
    coming: int
    coming_blocks: int


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """The KV of one request, sent from one replica to another.

    slot, row: of the request where it was. target: where it goes. blocks: KV blocks of one layer that it will need
        there. words: int64[W], the layers whose KV is sent, as in the compiled state. begun_s, ends_s: when the first
        byte leaves and the last arrives.
    """

    slot: int
    row: int
    target: Target
    blocks: int
    words: Ints
    size_bytes: int
    begun_s: float
    ends_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """A transfer that has ended.

    request: of the trace. replica, to: which sent its KV, and which got it. size_bytes: with tensor parallelism, those
        that each GPU sent; all send at once. begun_s, ended_s: when the first byte left
        and the last arrived. reused: whether the request went on decoding there; False if its KV was computed again.
    """

    request: int
    replica: int
    to: int
    size_bytes: int
    begun_s: float
    ended_s: float
    reused: bool


def check_migration(bytes_per_s: float | None) -> None:
    """Check the bandwidth of migrations; None is none.

    Raises:
        ConfigError: if it is below 1 byte per second or not finite.
    """
    if bytes_per_s is not None and not 1 <= bytes_per_s < math.inf:
        raise ConfigError(
            f"migrate_bytes_per_s is {bytes_per_s}; it must be at least 1 byte per second and finite, or null to send "
            "no KV: set e.g. migrate_bytes_per_s=3.125e9 for 25 Gbit/s"
        )


def check_no_prefix_cache(bytes_per_s: float | None) -> None:
    """Refuse migrations of replicas with a prefix cache.

    Raises:
        ConfigError: if there is a bandwidth for them.
    """
    if bytes_per_s is not None:
        raise ConfigError(
            f"migrate_bytes_per_s is {bytes_per_s} and engine.prefix_caching is true; KV that several requests share "
            "is not sent: set engine.prefix_caching=false or migrate_bytes_per_s=null"
        )


# -- the replica that sends --------------------------------------------------------------------------------------------


@compiled(inline=True)
def _tokens(s: Table, i: int) -> int:
    """Return the tokens whose KV slot i holds if it decodes and its KV is neither cut nor quantized; -1 otherwise."""
    slot = slots_of(s)[i]
    request = requests_of(s)[slot.request]
    if request.computed_tokens < request.prefill_tokens or slot.kv_format_id >= 0:
        return -1
    since = counters_of(s).clock - slot.joined_clock if due_clocks_of(s)[i] != NEVER else 0
    return int(request.computed_tokens + since)


@compiled()
def decoding(s: Table, found: Ints) -> int:
    """Write the requests whose KV could be sent now, in the order of their admission; return their number.

    Args:
        found: int64[running requests or more, 4]: slot, row, tokens, and number of layers whose KV it holds.
    """
    slots = slots_of(s)
    count, end = 0, len(slots) - 1
    i = slots[end].next
    while i != end:
        tokens = _tokens(s, i)
        if tokens >= 0:
            found[count, 0], found[count, 1], found[count, 2] = i, slots[i].request, tokens
            found[count, 3] = kv_sets_of(s)[slots[i].kv_set].layers
            count += 1
        i = slots[i].next
    return count


@compiled()
def words_of_layers(s: Table) -> int:
    """Return W, the words of a set of layers."""
    return int(kv_set_words_of(s).shape[1])


@compiled()
def held_layers(s: Table, i: int, words: Ints) -> None:
    """Write the layers whose KV slot i holds to ``words``, int64[W]."""
    for word in range(len(words)):
        words[word] = kv_set_words_of(s)[slots_of(s)[i].kv_set, word]


@compiled()
def take_out(s: Table, next_s: Floats, k: int, now_s: float, i: int) -> int:
    """Let slot i, which decodes, go on elsewhere; return its KV blocks, which stay held until `free_sent`.

    Args:
        s: replica k, between two iterations.
    """
    n, slot = counters_of(s), slots_of(s)[i]
    if due_clocks_of(s)[i] != NEVER:
        _leave_decodes(s, i)
    computed = requests_of(s)[slot.request].computed_tokens
    held = blocks_of(s, i, computed)
    _unlink_slot(s, i)
    n.running_tokens -= computed
    _touch(s, next_s, k, now_s)
    return int(held)


@compiled()
def free_sent(s: Table, next_s: Floats, k: int, now_s: float, blocks: int) -> None:
    """Free KV blocks whose content has been sent."""
    _release(s, blocks, NO_OWNER)
    _touch(s, next_s, k, now_s)


# -- the replica that receives -----------------------------------------------------------------------------------------


@compiled()
def reusable_layers(s: Table, words: Ints) -> int:
    """Return how many layers' KV a replica reuses of those in ``words``; -1 if it runs a layer that they lack."""
    n = counters_of(s)
    runs = kv_set_words_of(s)
    for word in range(len(words)):
        if runs[n.decode_set, word] & ~words[word]:
            return -1
    return int(kv_sets_of(s)[n.decode_set].layers)


@compiled()
def run_layers(s: Table, words: Ints) -> None:
    """Write the layers whose MHA block decode runs to ``words``, int64[W]."""
    for word in range(len(words)):
        words[word] = kv_set_words_of(s)[counters_of(s).decode_set, word]


@compiled()
def blocks_for(s: Table, layers: int, tokens: int) -> int:
    """Return the KV blocks of one layer that KV needs in a replica."""
    return int(layers * _blocks(tokens, counters_of(s).block_tokens))


@compiled()
def free_share(s: Table, blocks: int, coming: int, coming_blocks: int) -> float:
    """Return the free share of the KV pool; -1 if there is no room for a request with this many KV blocks.

    Args:
        coming, coming_blocks: requests on their way to the replica, and the KV blocks that they will need.
    """
    n = counters_of(s)
    free = n.free_blocks - coming_blocks
    if free - blocks < n.watermark_blocks or n.running + coming >= n.max_running:
        return -1.0
    return float(free / max(n.pool_blocks, 1))


@compiled()
def go_on(s: Table, next_s: Floats, k: int, now_s: float, words: Ints, limit_tokens: int) -> int:
    """Go on decoding a request whose KV has arrived; return its row.

    Args:
        s: replica k, between two iterations, with room for a row, the KV and a running request.
        words: int64[fields], the record of the replica that sent it.
    """
    n, r = counters_of(s), _new_request(s, words)
    request = requests_of(s)[r]
    request.output_limit_tokens, request.status = limit_tokens, RUNNING
    request.free_run, request.host_blocks = -1, 0
    n.running_tokens += request.computed_tokens
    i = _link_slot(s, r, n.decode_set, NO_FORMAT)
    _take(s, blocks_of(s, i, request.computed_tokens))
    _join_decodes(s, i)
    _touch(s, next_s, k, now_s)
    return r


# -- which goes where --------------------------------------------------------------------------------------------------


def held_tokens(s: Table) -> Ints:
    """Return the requests whose KV could be sent now, in the order of their admission: as ``decoding`` writes them."""
    found = np.zeros((ck.outstanding(s), 4), dtype=np.int64)
    return found[: decoding(s, found)]


def is_time(s: Table, token_layer_bytes: int, bytes_per_s: float, now_s: float, step_s: float, until_s: float) -> bool:
    """Return whether a replica has to begin to send its KV.

    Args:
        token_layer_bytes: of the KV of a token in a layer. step_s: until its next look. until_s: end of the notice.
    """
    found = held_tokens(s)
    size_bytes = int((found[:, 2] * found[:, 3]).sum()) * token_layer_bytes
    return now_s + 2.0 * step_s + size_bytes / bytes_per_s >= until_s


def next_transfer(
    s: Table, targets: Sequence[Target], token_layer_bytes: int, bytes_per_s: float, now_s: float, until_s: float
) -> Transfer | None:
    """Return the transfer that a replica begins now; None if no request can be sent.

    Args:
        s: the replica. targets: with the same model. until_s: when the transfer must have ended.
    """
    found = held_tokens(s)
    largest_first = np.argsort(-found[:, 2] * found[:, 3], kind="stable")
    held = np.zeros(words_of_layers(s), dtype=np.int64)
    for slot, row, tokens, _ in found[largest_first].tolist():
        held_layers(s, slot, held)
        best, most = None, (-1, -1.0)
        for target in targets:
            layers = reusable_layers(target.table, held)
            size_bytes = layers * tokens * token_layer_bytes
            ends_s = now_s + size_bytes / bytes_per_s
            if layers < 0 or ends_s > until_s or tokens + 1 >= target.context_limit:
                continue
            blocks = blocks_for(target.table, layers, tokens)
            share = free_share(target.table, blocks, target.coming, target.coming_blocks)
            if share >= 0.0 and (layers, share) > most:
                words = np.zeros_like(held)
                run_layers(target.table, words)
                best = Transfer(slot, row, target, blocks, words, size_bytes, now_s, ends_s)
                most = layers, share
        if best is not None:
            return best
    return None
