"""The Engine protocol: the calls an engine accepts, the state it shows, and the rules of serving of all engines.

Three engines follow these rules. For equal decisions they admit the same requests in the same order:

* ``sim.engine.sim_engine.SimEngine``: compiled, on simulated time;
* ``sim.engine.replica.Replica`` with the executor of ``sim.engine.pricing_executor``: plain Python, the reference that
  tests compare the compiled engine with;
* ``hw.engine.hw_engine.HwEngine``: the same ``Replica`` over a real model.

**Order at one instant.** The budget changes; requests arrive; an iteration ends; the policy decides; plans and memory
follow; the next iteration starts. Requests that arrive together keep the order of the trace.

**Rules for changing plans** (sim/engine/transition.py says what is copied when):

1. Everything takes effect between two iterations. An idle engine is always between two.
2. A dropped block leaves at once, an MHA block together with the KV that requests hold of it. So do the channels that a
   narrower ``ffn_width`` does not run; a wider one copies those that are missing, next to those that stay.
3. A request carries the set of MHA blocks whose KV it holds: those that prefill runs when it is admitted. The set only
   shrinks: when the plan drops a block, and at the end of prefill, to the blocks that decode runs.
4. A restored block runs for requests that are admitted later. With ``restore=recompute``, running requests that lack it
   give up their KV and are prefilled again.
5. A request's ``kv_keep``, ``kv_bits`` and ``kv_hidden`` are fixed when its prefill ends; later plans affect only later
   requests. One that keeps hidden states reads KV that each of its decodes computes, whatever the plan is then.
6. The KV pool is the budget minus resident weights, the layer that is being copied in, and the workspace. When the pool
   shrinks below its use, the newest requests are preempted until it fits. When not even the weights fit, nothing that
   needs KV runs; the seconds over budget are counted.
7. A streamed layer (``sim.cost.streaming``) has no weights on the device: its blocks run at once, at any precision.
   For MHA blocks that did not run before, rule 4 holds. When the streamed layers or their bytes change, the copies
   begin again with the first of them. Such copies and those of a plan change share the link: both take twice as long.
8. ``compute_bits`` frees and copies nothing: products run at other bits from the next iteration on. KV that is there
   stays, in requests and in the prefix cache.
9. A later plan never loses a copy that is under way and that it still wants: if it lacks exactly the blocks of that
   layer that are being copied in, the copy goes on and serves the new plan. Otherwise the copy is abandoned.

**Rules of sessions** (sim/traces/sessions.py says which request follows which).

1. A request that follows another arrives its think time after that one has ended: with its last token, or when it is
   rejected. At one instant requests arrive in the order of the trace.
2. A request that has waited too long is rejected at the end of its longest wait, or when a plan with a shorter limit
   comes into force, though the engine may see it only later.
3. When a request ends, the prefix blocks of its answer enter the prefix cache too, as far as the trace has hash ids for
   them, so the next turn finds them. Its last token has no KV. (vLLM V1 caches each block as soon as it is full; before
   a request ends only it could use them.)

**Rules of the prefix cache** (``prefix_caching``). They are those of vLLM V1, but requests find KV by the hash ids of
the trace. A **prefix block** is the KV of one hash id, ``hash_block_tokens`` tokens of a prompt. Equal ids mean that
these tokens and all tokens before them are the same.

1. Once a prefill has passed the end of a prefix block, requests that are admitted later find it. A request finds the
   longest run of leading prefix blocks of its prompt and holds them together with every other holder; each is in the
   pool once. What is found is not computed, but at least one token is: a prefix block that ends exactly with the prompt
   is computed again. A prefix block that lies only partly in a prompt does not count.
2. When two requests compute the same prefix block at once, the second keeps its copy as its own. Later prefix blocks of
   that prompt are cached if they are new.
3. A request that ends or is preempted frees its own KV blocks first, then its prefix blocks from the last to the first.
   A prefix block without holders is free but still found. Blocks that have been free longest are taken first; a prefix
   block is gone as soon as one of its KV blocks is taken. With ``reuse_preempted_kv`` a preempted request also finds
   its own blocks again, after all its prefix blocks.
4. When the MHA blocks that prefill runs change, no earlier prefix block is found again, because the KV would differ.
   Running requests keep theirs, without the layers that prefill drops, and add nothing more to the cache. A change of
   precision or of FFN blocks does not clear the cache, as it does not clear the KV of running requests.
5. While prefill and decode run different MHA blocks, or a plan cuts or quantizes KV or keeps hidden states
   (``kv_keep``, ``kv_bits``, ``kv_hidden``), nothing is cached or found; the cache is cleared when such a plan starts
   and when it ends. A request that holds cached prefix blocks keeps every token at 16 bits and, for those blocks, every
   layer that prefill runs.

**Rules of scheduling ahead** (``schedules_ahead``). They are those of vLLM V1's asynchronous scheduling: the batch of
an iteration is formed when the iteration before it starts, so that the device never waits for the scheduler.

1. A request that comes while iteration i runs is not in the batch of i + 1, which is formed already. It can be in that
   of i + 2: it waits one more iteration for its first token.
2. What iteration i frees at its end (KV blocks, the places of requests that end) can be used from i + 2 on. The batch
   of i + 1 preempts requests if it does not fit without. A token that an iteration under way computes for a preempted
   request counts.
3. The scheduler knows when a request reaches its last token, as vLLM does for ``max_tokens``: the request is in no
   further batch.
4. If the batch formed ahead is empty, the next one is formed when the iteration ends, with all that is known then. An
   idle engine starts a request at once.
5. Plan and memory changes happen between two iterations as always; the batch that was formed ahead follows them.

Source: ``step_with_batch_queue`` in vllm/v1/engine/core.py and vllm/v1/core/sched/async_scheduler.py, added by
https://github.com/vllm-project/vllm/pull/19970. There a request that ends by its stop token is computed once more in
iteration i + 1, and that token is dropped; here it is not, which changes the duration of one iteration by one decode.

**Rules of swapping** (``preemption=swap``). They are those of vLLM V0 and SwiftLLM.

1. A preempted request keeps its computed KV: its KV blocks are copied to host memory, and its blocks in the pool are
   free at once. If the host has too few free blocks, its KV is freed and computed again as without swapping.
2. A swapped request waits at the head of the queue, where preempted requests wait, and comes back before any new
   request is admitted. It needs KV blocks for the tokens that it has and those that it computes next, above the
   watermark as any admission does. It goes on where it stopped, in the batch for which it came back. With
   ``prefill_first``, no prompt is computed while the head of the queue is a swapped request, and it comes back only
   into a batch of decodes from which no request was preempted.
3. The copies out and back are made on the stream that computes, so they take time: the next iteration takes longer by
   the copied bytes, out and in together, over the speed of the host link.
4. KV that lacks an MHA block that runs, or that is cut or quantized (``kv_keep``, ``kv_bits``), and hidden states are
   not swapped but computed again. When the MHA blocks that run change, KV on the host is of no use and is dropped; its
   requests are computed again. A change of precision or of FFN blocks leaves it.

Source: ``get_next_batch`` in swiftllm/server/scheduler.py and csrc/src/block_swapping.cpp (interestingLSY/swiftLLM);
``_schedule_swapped`` in vllm/core/scheduler.py and vllm/worker/cache_engine.py of vLLM 0.6. Both copy on the current
stream. SwiftLLM lets prompts in beyond ``max_batch_size`` and then swaps the surplus; here ``max_running`` is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from sim.cost.plan import Plan
from sim.engine.scheduler import ADMISSION_ORDERS, SCHEDULERS, AdmissionOrder, Limits, SchedulerName
from sim.errors import ConfigError, nearest
from sim.limits import MOST_HOST_BLOCKS, check_count, check_whole
from sim.results.records import Records
from sim.traces.sessions import next_turns, waiting_sessions
from sim.traces.trace import HASH_BLOCK_TOKENS, Trace
from sim.types import Floats, Ints

RESTORE_MODES = ("new_requests", "recompute")
Restore = Literal["new_requests", "recompute"]
PREEMPTION_MODES = ("recompute", "swap")
Preemption = Literal["recompute", "swap"]
COPY_MODES = ("overlapped", "blocking")
Copying = Literal["overlapped", "blocking"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request of a trace. Engines use ``output_tokens``; policies never see it.

    hash_ids: one per ``hash_block_tokens`` tokens of the prompt (``sim.traces.trace.Trace``); empty if the trace has
        none.
    """

    request_id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


def late_request(request_id: int, arrival_s: float, before_s: float) -> ConfigError:
    """Return the error for a request that arrives before ``before_s``, an earlier request or the present time."""
    return ConfigError(
        f"request {request_id} arrives at {arrival_s} s, before {before_s} s; "
        "submit requests in order of arrival and not in the past"
    )


SUBMITTED = ("arrival_s", "prompt_tokens", "output_tokens")
"""Fields of a ``Request`` that ``check_submitted`` checks, in its order."""


def check_submitted(ids: Sequence[int], arrival_s: Floats, prompt_tokens: Ints, output_tokens: Ints) -> None:
    """Check the numbers of requests that are handed to an engine; their order is checked by the engine.

    Args:
        ids: of the requests, for the error.
    Raises:
        ConfigError: for a value that is no number of 64 bits, an arrival that is not finite, or a prompt or output that
            is not a whole number from 1.
    """
    if not len(arrival_s) == len(prompt_tokens) == len(output_tokens):
        raise ConfigError(
            f"{len(arrival_s)} arrivals, {len(prompt_tokens)} prompts and {len(output_tokens)} outputs; "
            "submit one of each per request"
        )
    for name, column in zip(SUBMITTED, (arrival_s, prompt_tokens, output_tokens), strict=True):
        if np.asarray(column).dtype.kind not in "iuf":
            texts = [repr(value)[:40] for value in np.asarray(column).tolist()]
            raise ConfigError(f"{name} of the requests is {', '.join(texts[:5])}; each must be a number of 64 bits")
    if not np.isfinite(arrival_s).all():
        at = int(np.flatnonzero(~np.isfinite(arrival_s))[0])
        raise ConfigError(f"request {ids[at]} arrives at {arrival_s[at]} s; give a finite time in seconds")
    for name, tokens in (("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens)):
        wrong = np.flatnonzero(~((tokens >= 1) & (tokens < 2**53) & (tokens == np.floor(tokens))))
        if len(wrong):
            raise ConfigError(
                f"request {ids[int(wrong[0])]}: {name} is {tokens[wrong[0]]}; it must be a whole number from 1"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Sessions:
    """Which request arrives after which, and how long after it has ended (sim/traces/sessions.py).

    after: int64[n], the request that follows each; -1 for none. think_s: float64[n], NaN where a request arrives at its
        own time. starts: int64[s], first requests of the sessions that wait for a user, in order.
    """

    after: Ints
    think_s: Floats
    starts: Ints


def sessions_of(trace: Trace) -> Sessions | None:
    """Return the sessions of a trace; None if it has none."""
    if trace.session is None or trace.think_s is None:
        return None
    return Sessions(
        next_turns(trace.session, trace.think_s), trace.think_s, waiting_sessions(trace.session, trace.think_s)
    )


def refuse_sessions(trace: Trace, what: str) -> None:
    """Refuse a trace with sessions where requests can only arrive at given times.

    Args:
        what: takes the trace, for the error.
    Raises:
        ConfigError: for a trace with sessions.
    """
    if trace.session is not None:
        raise ConfigError(
            f"{trace.name} has sessions, whose requests arrive when others have ended; {what} takes requests at given "
            "times only. Take another trace, or workload=open_loop (a step sim.traces.loops.open_loop), under which no "
            "request waits for another"
        )


def requests_next_to_sessions() -> ConfigError:
    """Return the error for requests that are submitted next to those of sessions."""
    return ConfigError(
        "a trace with sessions is submitted to an engine alone, before any other request and once; build another "
        "engine for other requests"
    )


def check_decisions(time_s: Sequence[float], plans: Sequence[Plan], least_s: float) -> None:
    """Check scheduled decisions: one time per plan, ascending from ``least_s``.

    Raises:
        ConfigError: if they are not.
    """
    if len(time_s) != len(plans):
        raise ConfigError(f"{len(time_s)} moments for {len(plans)} plans; give one for each")
    for number, moment_s in enumerate(time_s):
        if not moment_s >= least_s:
            raise ConfigError(
                f"decision {number} is for {moment_s} s, before another one or the present; "
                "give the moments in ascending order"
            )
        least_s = moment_s


def missing_hash_ids() -> ConfigError:
    """Return the error for a prefix cache whose requests have no hash ids."""
    return ConfigError(
        "engine.prefix_caching is true, but the requests have no hash ids to find KV by; take a trace that has some "
        "(trace=mooncake_conversation, trace=mooncake_synthetic, or trace=file with a column hash_ids), or set "
        "engine.prefix_caching=false"
    )


def check_hash_ids(hash_ids: Sequence[int] | Ints) -> None:
    """Check that the hash ids of a prompt are whole numbers of 64 bits.

    Raises:
        ConfigError: if they are not; texts and larger numbers must be numbered first, as the readers of traces do.
    """
    if len(hash_ids) and np.asarray(hash_ids).dtype.kind != "i":
        raise ConfigError(
            f"hash ids of a prompt are {str(list(hash_ids[:3]))[:60]}; each must be a whole number of 64 bits with sign"
        )


def repeated_hash_id(request_id: int, hash_id: int) -> ConfigError:
    """Return the error for a prompt that contains a hash id twice."""
    return ConfigError(
        f"hash id {hash_id} comes twice in the prompt of request {request_id}; with engine.prefix_caching each id "
        "stands for its tokens and all tokens before them, so it can come only once"
    )


def requests_from_arrays(
    arrival_s: Floats,
    prompt_tokens: Ints,
    output_tokens: Ints,
    hash_ids: Sequence[Ints] | None = None,
    *,
    first_id: int = 0,
) -> list[Request]:
    """Return one request per entry of the arrays, all of length n; ids count up from ``first_id``."""
    ids = [()] * len(arrival_s) if hash_ids is None else [tuple(row.tolist()) for row in hash_ids]
    columns = zip(arrival_s.tolist(), prompt_tokens.tolist(), output_tokens.tolist(), ids, strict=True)
    return [
        Request(request_id=first_id + i, arrival_s=at_s, prompt_tokens=prompt, output_tokens=output, hash_ids=row)
        for i, (at_s, prompt, output, row) in enumerate(columns)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine serves: the settings that a real engine takes on its command line.

    scheduler: ``chunked`` or ``prefill_first`` (sim/engine/scheduler.py says which engine each follows).
    limits: token budget, concurrent requests, chunking and admission rules.
    admission_order: ``fcfs``, first come, first served; or ``value``, first what has waited longest for each KV
        block that it needs (Apt-Serve; docs/concepts.md).
    kv_block_tokens: tokens of one KV block.
    kv_watermark_share: share of the KV pool that an admission must leave free (vLLM V0: 0.01).
    reuse_preempted_kv: whether a preempted request reuses its KV blocks that others have not overwritten, as with
        vLLM's prefix caching; if False, everything is computed again.
    max_context_tokens: longest prompt plus output of one request, at most the model's own limit; None takes that.
    restore: what a restored MHA block does to running requests: ``new_requests`` or ``recompute`` (rule 4 above).
    prefix_caching: whether requests reuse the KV that others computed for the same beginning of a prompt (rules above).
    hash_block_tokens: tokens of a prompt that one hash id of the trace stands for (Mooncake: 512).
    schedules_ahead: whether a batch is formed when the iteration before it starts, as with vLLM's asynchronous
        scheduling (rules above). A request then waits one iteration more for its first token.
    preemption: what becomes of the KV of a preempted request: ``recompute`` frees it, ``swap`` copies it to host memory
        and back (rules above; vLLM V0's ``preemption_mode``, SwiftLLM).
    host_kv_blocks: KV blocks over all layers that the host holds for ``swap`` (vLLM V0's ``swap_space``, SwiftLLM's
        ``num_cpu_blocks``).
    copying: whether the engine serves while weights are copied in (``overlapped``) or waits for them (``blocking``).
    """

    scheduler: SchedulerName = "chunked"
    limits: Limits = field(default_factory=Limits)
    admission_order: AdmissionOrder = "fcfs"
    kv_block_tokens: int = 16
    kv_watermark_share: float = 0.0
    reuse_preempted_kv: bool = False
    max_context_tokens: int | None = None
    restore: Restore = "new_requests"
    prefix_caching: bool = False
    hash_block_tokens: int = HASH_BLOCK_TOKENS
    schedules_ahead: bool = False
    preemption: Preemption = "recompute"
    host_kv_blocks: int = 0
    copying: Copying = "overlapped"

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise ConfigError(f"unknown engine.scheduler {self.scheduler!r}; {nearest(self.scheduler, SCHEDULERS)}")
        if self.admission_order not in ADMISSION_ORDERS:
            raise ConfigError(
                f"unknown engine.admission_order {self.admission_order!r}; "
                f"{nearest(self.admission_order, ADMISSION_ORDERS)}"
            )
        if self.restore not in RESTORE_MODES:
            raise ConfigError(f"unknown engine.restore {self.restore!r}; {nearest(self.restore, RESTORE_MODES)}")
        if self.copying not in COPY_MODES:
            raise ConfigError(f"unknown engine.copying {self.copying!r}; {nearest(self.copying, COPY_MODES)}")
        self._check_preemption()
        check_whole(self.kv_block_tokens, "engine.kv_block_tokens", 1)
        check_whole(self.hash_block_tokens, "engine.hash_block_tokens", 1)
        if self.max_context_tokens is not None:
            check_whole(self.max_context_tokens, "engine.max_context_tokens", 2)
        if not 0.0 <= self.kv_watermark_share < 1.0:
            raise ConfigError(f"engine.kv_watermark_share is {self.kv_watermark_share}; it must be in [0, 1)")
        if self.prefix_caching and self.hash_block_tokens % self.kv_block_tokens:
            raise ConfigError(
                f"engine.prefix_caching shares complete KV blocks: engine.kv_block_tokens, {self.kv_block_tokens}, "
                f"must divide engine.hash_block_tokens, {self.hash_block_tokens}"
            )

    def _check_preemption(self) -> None:
        """Check ``preemption`` and ``host_kv_blocks`` together."""
        if self.preemption not in PREEMPTION_MODES:
            raise ConfigError(
                f"unknown engine.preemption {self.preemption!r}; {nearest(self.preemption, PREEMPTION_MODES)}"
            )
        check_whole(self.host_kv_blocks, "engine.host_kv_blocks", 0)
        check_count(self.host_kv_blocks, "KV blocks in host memory", MOST_HOST_BLOCKS, "lower engine.host_kv_blocks")
        if self.preemption == "swap" and not self.host_kv_blocks:
            raise ConfigError(
                "engine.preemption is swap, but engine.host_kv_blocks is 0, so the host has no room; set it to the KV "
                "blocks that fit its memory, e.g. engine.host_kv_blocks=4096, or engine.preemption=recompute"
            )
        if self.preemption == "recompute" and self.host_kv_blocks:
            raise ConfigError(
                f"engine.host_kv_blocks is {self.host_kv_blocks}, but engine.preemption is recompute, which uses none; "
                "set engine.preemption=swap, or engine.host_kv_blocks=0"
            )
        if self.preemption == "swap" and self.prefix_caching:
            raise ConfigError(
                "engine.preemption=swap with engine.prefix_caching=true is not simulated: KV that several requests "
                "hold would be copied out once for each; set one of them otherwise"
            )


def check_hash_blocks(config: EngineConfig, trace: Trace) -> None:
    """Check that the prefix cache reads the hash ids of a trace in its own unit.

    Raises:
        ConfigError: if an id of the trace stands for another number of tokens than the engine takes it for.
    """
    stated = trace.hash_block_tokens if config.prefix_caching and trace.hash_ids is not None else None
    if stated not in (None, config.hash_block_tokens):
        raise ConfigError(
            f"{trace.name} has one hash id for each {stated} tokens of a prompt, but engine.hash_block_tokens is "
            f"{config.hash_block_tokens}; set engine.hash_block_tokens={stated}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """What a server can observe of itself at one moment; it contains no output length.

    Counters (arrived, finished, ...) run from the start: the difference of two states, divided by the time between
    them, is a rate.

    waiting, running: requests. waiting_tokens: prompt tokens and already produced tokens of the waiting requests.
    oldest_wait_s: how long the head of the queue has waited, 0 for an empty queue.
    running_tokens: tokens of running requests whose KV is held.
    kv_layer_blocks, kv_used_layer_blocks: size and use of the pool, in KV blocks of one layer.
    ttft_sum_s: sum of TTFT over the first tokens so far. busy_s: time spent in iterations that have ended.
    priced_s: what the calibration says that these iterations take; busy_s / priced_s is how much slower than calibrated
        the server runs. Equal to busy_s on a real engine without a calibration.
    budget_bytes, weight_bytes: the present budget, and the bytes of the resident weights.
    next_budget_bytes, next_budget_s: the next step of the budget once it is announced; before that, the present budget
        and ``inf``.
    budget_violation_s: seconds in which the held bytes exceeded the budget.
    plan: what runs. target: the plan last decided on. incoming_bytes: bytes of the layer that is being copied in.
    """

    time_s: float
    waiting: int
    waiting_tokens: int
    oldest_wait_s: float
    running: int
    running_tokens: int
    kv_layer_blocks: int
    kv_used_layer_blocks: int
    budget_bytes: int
    weight_bytes: int
    arrived: int
    arrived_prompt_tokens: int
    first_tokens: int
    ttft_sum_s: float
    produced_tokens: int
    finished: int
    rejected: int
    preemptions: int
    iterations: int
    busy_s: float
    priced_s: float
    next_budget_bytes: int
    next_budget_s: float
    budget_violation_s: float
    incoming_bytes: int
    plan: Plan
    target: Plan


class Engine(Protocol):
    """Serves requests. ``SimEngine`` lives on SimPy's clock, ``HwEngine`` on the wall clock."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Hand over requests, sorted by arrival; each is served from its own ``arrival_s`` on."""
        ...

    def submit_arrays(
        self,
        arrival_s: Floats,
        prompt_tokens: Ints,
        output_tokens: Ints,
        hash_ids: Sequence[Ints] | None = None,
        *,
        sessions: Sessions | None = None,
    ) -> None:
        """Hand over n requests as arrays of length n; ids continue from the last request submitted.

        sessions: which requests follow which; the engine must have no others, before or after.
        """
        ...

    def apply(self, plan: Plan) -> None:
        """Switch to ``plan``; the change begins between two iterations."""
        ...

    def apply_at(self, time_s: Sequence[float], plans: Sequence[Plan]) -> None:
        """Schedule plans: each is applied at its time, as a call of ``apply`` would do then.

        If no request is queued or scheduled to arrive, scheduled decisions are skipped.
        """
        ...

    def run_until(self, time_s: float) -> EngineState:
        """Serve until ``time_s`` (``inf``: until nothing is left to do) and return the state observed then."""
        ...

    @property
    def drained(self) -> bool:
        """Whether no submitted request can make progress without another call."""
        ...

    def records(self) -> Records:
        """Return one row per request that has arrived, in order of arrival."""
        ...

    def arrival_order(self) -> Ints:
        """Return the place in the order of submission of each row of ``records``: int64[arrived]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A running request and the KV it holds: for debugging and tests; policies do not see it.

    mha: layers whose KV it holds. tokens: tokens whose KV exists. layer_blocks: its own KV blocks over all layers,
    including those of the tokens being computed, without prefix blocks, which it may share (an engine's
    ``shared_layer_blocks`` counts those). decoding: whether its prefill has ended.
    """

    request_id: int
    mha: frozenset[int]
    tokens: int
    layer_blocks: int
    decoding: bool
