"""Forms the batch of one iteration: pure functions that ``Replica`` calls, in simulation and on a real model.

The compiled kernel has its own version of these rules (sim/engine/kernel/admission.py); tests compare the two on random
cases. There are two schedulers, each following a published engine:

| rule | `chunked`: vLLM 0.19, V1 scheduler | `prefill_first`: vLLM 0.6, V0 default, and SwiftLLM |
|---|---|---|
| order | running, then waiting; both first come, first served [3] | only prefills while one fits, else all decode |
| token budget | `max_batch_tokens` (`max_num_batched_tokens`) over all | over full prompts; decodes do not count |
| concurrent requests | `max_running` (`max_num_seqs`) | the same |
| long prompts | cut to the budget left and to `long_prefill_tokens` | never cut; one above the budget runs alone [1] |
| KV blocks are taken | for the tokens of this batch, as it is formed | for the full prompt, then token by token |
| admission needs | room for the chunk; for the prompt if `reserve_full_prompt` [2] or alone | room for the prompt |
| watermark | none by default | a share of the pool stays free at admission (0.01) |
| preempted | the newest running requests, until the one that lacks a KV block gets it; that one last | the same |
| after a preemption | no request is admitted; the victim waits at the head of the queue | the same |
| a preempted request | computes prompt and produced tokens again, except those whose KV it finds | all of them |
| a swapped request | is admitted in its turn | comes back into a batch of decodes, before any prefill |

[1] V0 refuses such a prompt; here it is served. [2] vLLM's `scheduler_reserve_full_isl`, true by default, and
`long_prefill_token_threshold` for `long_prefill_tokens`. [3] Waiting requests by their value, with `by_value`.

With ``schedules_ahead``, the batch is formed without what came or was freed during the iteration before it
(sim/engine/protocol.py).

With prefix caching, KV that several requests hold is counted once. As in vLLM V1, admission needs room for new KV and
for KV found in free blocks, but none for KV that running requests hold. Memory is counted in KV blocks of one layer
("layer blocks"): plans drop MHA blocks, so requests differ in how many layers they hold. For a dense model of L layers,
one vLLM block is L layer blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from sim.errors import ConfigError, nearest
from sim.limits import MOST_RUNNING, check_count, check_whole

SCHEDULERS = ("chunked", "prefill_first")
SchedulerName = Literal["chunked", "prefill_first"]
ADMISSION_ORDERS = ("fcfs", "value")
AdmissionOrder = Literal["fcfs", "value"]


class Schedulable(Protocol):
    """What a scheduler may know of a request; its output length is not part of it."""

    @property
    def target_tokens(self) -> int:
        """Tokens whose KV must exist before the next token can be produced: prompt and produced tokens."""
        ...

    @property
    def computed_tokens(self) -> int:
        """Tokens whose KV exists; for a waiting request, the tokens that it will find when it is admitted."""
        ...

    @property
    def held_layer_blocks(self) -> int:
        """KV blocks of one layer that the request holds now, over all layers."""
        ...

    @property
    def swapped(self) -> bool:
        """Whether its KV is in host memory: it waits, and ``computed_tokens`` need KV blocks when it comes back."""
        ...


R = TypeVar("R", bound=Schedulable)
LayerBlocks = Callable[[R, int], int]
"""``layer_blocks(request, tokens)``: the KV blocks, summed over layers, that ``tokens`` computed tokens need."""
Shared = Callable[[R, Sequence[R]], int]
"""``shared(request, others)``: layer blocks that a request holds or would find and that ``others`` do too."""


def nothing_shared(request: R, others: Sequence[R]) -> int:
    """Return 0: no request shares its KV."""
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a batch.

    max_batch_tokens: tokens that one iteration may compute.
    max_running: requests that may hold KV at the same time.
    long_prefill_tokens: longest chunk of one prompt in one iteration; 0 for no such limit.
    reserve_full_prompt: admit a request only if its full prompt fits, not only its first chunk.
    watermark_layer_blocks: layer blocks that an admission must leave free.
    """

    max_batch_tokens: int = 2048
    max_running: int = 256
    long_prefill_tokens: int = 0
    reserve_full_prompt: bool = True
    watermark_layer_blocks: int = 0

    def __post_init__(self) -> None:
        for field, least in (
            ("max_batch_tokens", 1),
            ("max_running", 1),
            ("long_prefill_tokens", 0),
            ("watermark_layer_blocks", 0),
        ):
            check_whole(getattr(self, field), field, least)
        check_count(self.max_running, "requests at a time", MOST_RUNNING, "lower max_running")


@dataclass(frozen=True, slots=True)
class Batch(Generic[R]):
    """The decision for one iteration; its parts are carried out in this order.

    preempted: running requests that give up their KV, newest first.
    admitted: waiting requests that start to run, in this order.
    scheduled: (request, tokens) for every request of the batch: how many tokens it computes.
    """

    preempted: tuple[R, ...]
    admitted: tuple[R, ...]
    scheduled: tuple[tuple[R, int], ...]


def by_value(waiting: Sequence[R], waits_s: Sequence[float], kv_block_tokens: int) -> list[R]:
    """Return waiting requests in the order of Apt-Serve (arXiv 2504.07494): the most valuable one first.

    The value of a request is how long it has waited, over the KV blocks that its tokens need in one layer. Requests of
    equal value stay in their order.

    Args:
        waiting: requests that hold no KV. waits_s: how long each has waited. kv_block_tokens: tokens of a KV block.
    """
    blocks = (-(-request.target_tokens // kv_block_tokens) for request in waiting)
    values = [wait_s / count for wait_s, count in zip(waits_s, blocks, strict=True)]
    return [waiting[i] for i in sorted(range(len(values)), key=lambda i: -values[i])]


def form_batch(
    scheduler: SchedulerName,
    waiting: Sequence[R],
    running: Sequence[R],
    free_layer_blocks: int,
    layer_blocks: LayerBlocks[R],
    limits: Limits,
    shared: Shared[R] = nothing_shared,
) -> Batch[R]:
    """Return the next batch.

    Args:
        scheduler: ``chunked`` or ``prefill_first``; the table above says how they differ.
        waiting: requests that hold no KV, the next one to admit first. KV that one of them would find counts as free.
        running: requests that hold KV, in the order they were admitted.
        free_layer_blocks: layer blocks that no request holds; below 0 when the pool has shrunk below its use.
        layer_blocks: returns the layer blocks that a request needs for a number of computed tokens.
        limits: bounds of the batch.
        shared: returns the layer blocks that a request shares with others.
    Raises:
        ConfigError: for an unknown scheduler.
    """
    if scheduler == "chunked":
        return _chunked(waiting, running, free_layer_blocks, layer_blocks, limits, shared)
    if scheduler == "prefill_first":
        return _prefill_first(waiting, running, free_layer_blocks, layer_blocks, limits, shared)
    raise ConfigError(f"unknown scheduler {scheduler!r}; {nearest(scheduler, SCHEDULERS)}")


def _chunked(
    waiting: Sequence[R],
    running: Sequence[R],
    free_layer_blocks: int,
    layer_blocks: LayerBlocks[R],
    limits: Limits,
    shared: Shared[R],
) -> Batch[R]:
    budget_tokens = limits.max_batch_tokens
    scheduled, preempted, kept, free = _extend_running(
        running, free_layer_blocks, layer_blocks, budget_tokens, limits.long_prefill_tokens, shared
    )
    budget_tokens -= sum(tokens for _, tokens in scheduled)
    admitted: list[R] = []
    if not preempted:
        for request in waiting:
            if budget_tokens == 0 or kept + len(admitted) >= limits.max_running:
                break
            chunk = _chunk_tokens(request, budget_tokens, limits.long_prefill_tokens)
            already = shared(request, [*running, *admitted])
            need = layer_blocks(request, request.computed_tokens + chunk) - already
            # If nothing else runs, the full prompt must fit: otherwise it would fill the pool, preempt itself, and
            # start over forever.
            full = limits.reserve_full_prompt or not (running or admitted)
            must_fit = layer_blocks(request, request.target_tokens) - already if full else need
            if must_fit + limits.watermark_layer_blocks > free:
                break
            free -= need
            budget_tokens -= chunk
            admitted.append(request)
            scheduled.append((request, chunk))
    return Batch(tuple(preempted), tuple(admitted), tuple(scheduled))


def _prefill_first(
    waiting: Sequence[R],
    running: Sequence[R],
    free_layer_blocks: int,
    layer_blocks: LayerBlocks[R],
    limits: Limits,
    shared: Shared[R],
) -> Batch[R]:
    budget_tokens, free = limits.max_batch_tokens, free_layer_blocks
    admitted: list[R] = []
    for request in waiting:
        if request.swapped or len(running) + len(admitted) >= limits.max_running:
            break
        tokens = request.target_tokens - request.computed_tokens
        if tokens > budget_tokens and admitted:
            break
        need = layer_blocks(request, request.target_tokens) - shared(request, [*running, *admitted])
        if need + limits.watermark_layer_blocks > free:
            break
        free -= need
        budget_tokens -= tokens
        admitted.append(request)
        if budget_tokens <= 0:
            break
    if admitted:
        return Batch((), tuple(admitted), tuple((r, r.target_tokens - r.computed_tokens) for r in admitted))
    scheduled, preempted, kept, free = _extend_running(
        running, free_layer_blocks, layer_blocks, len(running), 0, shared
    )
    back = [] if preempted else _swapped_back(waiting, kept, free, layer_blocks, limits)
    return Batch(tuple(preempted), tuple(back), (*scheduled, *((r, r.target_tokens - r.computed_tokens) for r in back)))


def _swapped_back(
    waiting: Sequence[R], running: int, free: int, layer_blocks: LayerBlocks[R], limits: Limits
) -> list[R]:
    """Return the swapped requests at the head of the queue that fit next to ``running`` others."""
    back: list[R] = []
    for request in waiting:
        need = layer_blocks(request, request.target_tokens)
        full = running + len(back) >= limits.max_running or need + limits.watermark_layer_blocks > free
        if full or not request.swapped:
            break
        free -= need
        back.append(request)
    return back


def _extend_running(
    running: Sequence[R],
    free: int,
    layer_blocks: LayerBlocks[R],
    budget_tokens: int,
    long_prefill_tokens: int,
    shared: Shared[R],
) -> tuple[list[tuple[R, int]], list[R], int, int]:
    """Schedule the running requests, oldest first; preempt the newest ones when KV blocks run out.

    Returns the scheduled requests with their tokens, the preempted ones, how many still run, and the free layer blocks.
    """
    scheduled: list[tuple[R, int]] = []
    preempted: list[R] = []
    kept, index = len(running), 0
    # A pool that shrank below its use is brought back first, before any request gets its tokens.
    while free < 0 and kept:
        kept -= 1
        preempted.append(running[kept])
        free += running[kept].held_layer_blocks - shared(running[kept], running[:kept])
    while index < kept and budget_tokens > 0:
        request = running[index]
        chunk = _chunk_tokens(request, budget_tokens, long_prefill_tokens)
        need = layer_blocks(request, request.computed_tokens + chunk) - request.held_layer_blocks
        while need > free and kept > index:
            kept -= 1
            preempted.append(running[kept])
            free += running[kept].held_layer_blocks - shared(running[kept], running[:kept])
        if kept == index:
            break  # it was itself the newest: it has been preempted
        free -= need
        budget_tokens -= chunk
        scheduled.append((request, chunk))
        index += 1
    return scheduled, preempted, kept, free


def _chunk_tokens(request: Schedulable, budget_tokens: int, long_prefill_tokens: int) -> int:
    """Return how many tokens of a request this iteration computes."""
    chunk = min(request.target_tokens - request.computed_tokens, budget_tokens)
    return min(chunk, long_prefill_tokens) if long_prefill_tokens > 0 else chunk
