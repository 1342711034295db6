"""Workload steps: pure functions from a trace to a trace, composed in YAML (conf/workload) or in code.

Every step takes the trace and keyword arguments, and a ``seed`` if and only if it draws random numbers. It does not
change its input, and adds a line to the history of its result. Arrivals stay sorted and never go below 0.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import numpy as np

from sim.errors import WorkloadError, nearest
from sim.limits import MOST_REQUESTS, check_count
from sim.traces.loops import sessions_from
from sim.traces.sessions import turns_to_keep, waiting_sessions
from sim.traces.trace import Trace, sorted_trace
from sim.types import Ints

Step = Callable[..., Trace]
HashIds = tuple[Ints, ...]
MOST_HASH_IDS = 20_000_000
"""Of ``repeat_prompts``; they take 160 MB."""
LARGEST_ID = 2**53
"""Ids above this are numbered before anything is added to them."""


def apply_steps(trace: Trace, steps: Iterable[Step], *, seed: int = 0) -> Trace:
    """Return the trace after all steps, in order.

    A step that takes a seed and has none set gets its own, derived from ``seed`` and its place in the list, so that
    two random steps never use the same random numbers.

    Args:
        steps: callables from a trace to a trace, such as ``partial(window, start_s=0.0, duration_s=60.0)``.
    Raises:
        WorkloadError: if a step is impossible for its trace, or returns something other than a trace.
    """
    for place, step in enumerate(steps):
        if not callable(step):
            raise WorkloadError(f"step {place} is {step!r}; in YAML give it _target_ and _partial_: true")
        keywords = step.keywords if isinstance(step, partial) else {}
        if "seed" in inspect.signature(step).parameters and "seed" not in keywords:
            step = partial(step, seed=int(np.random.SeedSequence([seed, place]).generate_state(1)[0]))
        try:
            result = step(trace)
        except WorkloadError as error:
            raise WorkloadError(f"workload.steps.{place}: {error}") from error
        if not isinstance(result, Trace):
            raise WorkloadError(f"step {place} ({step!r}) returned {type(result).__name__}; a step must return a Trace")
        trace = result
    return trace


def window(trace: Trace, *, start_s: float = 0.0, duration_s: float | None = None) -> Trace:
    """Return the requests that arrive in [start_s, start_s + duration_s), with time 0 at start_s.

    Args:
        duration_s: None takes everything from start_s on.
    Raises:
        WorkloadError: if no request arrives in the window.
    """
    _check_number("start_s", start_s, minimum=0.0)
    end_s = math.inf
    if duration_s is not None:
        _check_number("duration_s", duration_s, above=0.0)
        end_s = start_s + duration_s
    first, last = np.searchsorted(trace.arrival_s, [start_s, end_s], side="left")
    if first == last:
        raise WorkloadError(
            f"no request of {trace.name} arrives from {start_s:g} s to {end_s:g} s; it has requests from "
            f"{trace.arrival_s[0]:g} s to {trace.arrival_s[-1]:g} s, {_nearest_arrival(trace, start_s)}"
        )
    part = trace.take(np.arange(first, last))
    shifted = replace(part, arrival_s=part.arrival_s - start_s)
    shown = "the end" if duration_s is None else f"{end_s:g} s"
    return shifted.with_history(f"window from {start_s:g} s to {shown}: {len(part):,} of {len(trace):,} requests")


def burstiest(trace: Trace, *, duration_s: float, by: Literal["requests", "tokens"] = "requests") -> Trace:
    """Return the busiest window of this length, with time 0 at its first request.

    Only windows that start at a request need checking: no other window holds more. The earliest wins a tie.

    Args:
        by: "requests" counts requests, "tokens" their prompt and output tokens.
    Raises:
        WorkloadError: if duration_s is not positive.
    """
    _check_number("duration_s", duration_s, above=0.0)
    if by not in get_args(Literal["requests", "tokens"]):
        raise WorkloadError(f"by is {by!r}; {nearest(str(by), ['requests', 'tokens'])}")
    weight = np.ones(len(trace), dtype=np.int64) if by == "requests" else trace.prompt_tokens + trace.output_tokens
    before = np.concatenate(([0], np.cumsum(weight)))
    last = np.searchsorted(trace.arrival_s, trace.arrival_s + duration_s, side="left")
    first = int(np.argmax(before[last] - before[:-1]))
    start_s = float(trace.arrival_s[first])
    part = trace.take(np.arange(first, last[first]))
    shifted = replace(part, arrival_s=part.arrival_s - start_s)
    return shifted.with_history(
        f"burstiest {duration_s:g} s by {by}, from {start_s:.9g} s on: {len(part):,} of {len(trace):,} requests"
    )


def repeat_prompts(
    trace: Trace,
    *,
    distinct: int | None = None,
    shared_tokens: int = 0,
    block_tokens: int = 16,
    same_lengths: bool = False,
) -> Trace:
    """Return the trace with hash ids of prompts that come again, for ``engine.prefix_caching``.

    Benchmark clients often have a fixed number of prompts and send them in turn. Request i then has the prompt of
    request i - ``distinct``, as far as both reach.

    Args:
        distinct: how many prompts come in turn; None makes every prompt a new one.
        shared_tokens: how many tokens all prompts begin with, such as a system prompt.
        block_tokens: prompt tokens per hash id; set ``engine.hash_block_tokens`` to the same.
        same_lengths: give each prompt the length that it has the first time, as a client does; else lengths stay.
    Raises:
        WorkloadError: for numbers out of range.
    """
    for name, value, least in (("distinct", distinct, 1), ("shared_tokens", shared_tokens, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise WorkloadError(f"{name} is {value!r}; it must be a whole number from {least}")
    _check_open(trace, "repeat_prompts")
    if isinstance(block_tokens, bool) or not isinstance(block_tokens, int) or block_tokens < 1:
        raise WorkloadError(f"block_tokens is {block_tokens!r}; it must be a whole number from 1")
    prompts = np.arange(len(trace)) % (len(trace) if distinct is None else distinct)
    if same_lengths:
        trace = replace(trace, prompt_tokens=trace.prompt_tokens[prompts], hash_ids=None)
    blocks = -(-trace.prompt_tokens // block_tokens)
    check_count(int(blocks.sum()), "hash ids", MOST_HASH_IDS, "raise block_tokens, or take fewer requests")
    common = shared_tokens // block_tokens
    most = int(blocks.max())
    ids = []
    for prompt, count in zip(prompts.tolist(), blocks.tolist(), strict=True):
        block = np.arange(count, dtype=np.int64)
        ids.append(np.where(block < common, block, block + most * (prompt + 1)))
    repeated = replace(trace, hash_ids=tuple(ids), hash_block_tokens=block_tokens)
    kinds = "every prompt is new" if distinct is None else f"{distinct:,} prompts come in turn"
    return repeated.with_history(f"{kinds}, {shared_tokens:,} tokens begin all prompts")


def scale_rate(trace: Trace, *, factor: float) -> Trace:
    """Return the same requests arriving ``factor`` times as fast: every arrival divided by it.

    In a trace with sessions, sessions begin that much faster; users think as long as before.

    Papers raise the load of a trace this way: gaps shrink, their CV and all lengths stay the same, and the trace gets
    shorter. To keep the duration, lower the rate with ``keep_share`` or overlay traces with ``merge``.

    Args:
        factor: 2 doubles the rate, 0.5 halves it.
    Raises:
        WorkloadError: if factor is not a positive number.
    Source:
        Kwon et al., PagedAttention (SOSP 2023), section 6.1, and DistServe (OSDI 2024), section 6.1, vary the rate
        of a Poisson process; Qin et al., Mooncake (FAST 2025), section 8, replay a trace faster.
    """
    _check_number("factor", factor, above=0.0)
    step = f"rate scaled by {factor:g}: arrivals divided by it"
    if trace.session is None or trace.think_s is None:
        return _timed(trace, 1.0 / factor, step)
    if len(waiting_sessions(trace.session, trace.think_s)):
        raise WorkloadError(
            f"{trace.name} is a closed loop, whose rate follows from its users and the server; change the number of "
            "users or their think times instead of scaling its rate"
        )
    return sessions_from(trace, trace.arrival_s / factor, step)


def spread_ties(trace: Trace, *, quantum_s: float | None = None, seed: int = 0) -> Trace:
    """Return the trace with each arrival moved to a random time within its clock step.

    A clock with steps of q seconds only says that a request arrived in [t, t + q). Each arrival is moved uniformly
    within that step, but never to or past the next time stamp of the trace, so the order of requests stays.

    Args:
        quantum_s: the clock's step; None takes the trace's own.
    Raises:
        WorkloadError: if the trace has a fine clock and quantum_s is None.
    """
    quantum = trace.time_quantum_s if quantum_s is None else quantum_s
    if quantum_s is None and quantum == 0:
        raise WorkloadError(
            f"{trace.name} has a fine clock (time_quantum_s=0), so it has no ties to spread; remove spread_ties, or "
            "set quantum_s"
        )
    _check_number("quantum_s", quantum, above=0.0)
    _check_open(trace, "spread_ties")
    stamps_s, stamp = np.unique(trace.arrival_s, return_inverse=True)
    room_s = np.minimum(np.diff(stamps_s, append=np.inf), quantum)
    uniform = np.random.default_rng(seed).random(len(trace))
    # Sorting by stamp, then by random number, keeps each group in place and its arrivals ascending.
    in_order = uniform[np.lexsort((uniform, stamp))]
    ties = len(trace) - len(stamps_s)
    return replace(
        trace,
        # Rounding up may reach the next stamp; that is harmless, since equal arrivals keep their order.
        arrival_s=trace.arrival_s + in_order * room_s[stamp],
        time_quantum_s=0.0,
        history=(*trace.history, f"spread arrivals ({ties:,} ties) inside steps of {quantum:g} s, seed={seed}"),
    )


def clip_lengths(
    trace: Trace,
    *,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
    max_total_tokens: int | None = None,
) -> Trace:
    """Return the trace with prompts and outputs cut to the limits; every request stays.

    Prompt and output are first cut to their own limits. If their sum still exceeds ``max_total_tokens``, the output is
    cut, down to 1 token, as a server does at the end of its context; only then the prompt. Prefix ids of removed
    blocks are removed too.

    Raises:
        WorkloadError: if no limit is set, or one is too small for any request.
    """
    _check_limits(max_prompt_tokens, max_output_tokens, max_total_tokens)
    prompt_tokens, output_tokens = trace.prompt_tokens, trace.output_tokens
    if max_prompt_tokens is not None:
        prompt_tokens = np.minimum(prompt_tokens, max_prompt_tokens)
    if max_output_tokens is not None:
        output_tokens = np.minimum(output_tokens, max_output_tokens)
    if max_total_tokens is not None:
        prompt_tokens = np.minimum(prompt_tokens, max_total_tokens - 1)
        output_tokens = np.minimum(output_tokens, max_total_tokens - prompt_tokens)
    cut_prompts = int((prompt_tokens < trace.prompt_tokens).sum())
    cut_outputs = int((output_tokens < trace.output_tokens).sum())
    limits = _limits_shown(max_prompt_tokens, max_output_tokens, max_total_tokens)
    return replace(
        trace,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        hash_ids=_cut_hash_ids(trace, prompt_tokens),
        history=(*trace.history, f"clipped {cut_prompts:,} prompts and {cut_outputs:,} outputs to {limits}"),
    )


def drop_long(
    trace: Trace,
    *,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
    max_total_tokens: int | None = None,
) -> Trace:
    """Return the requests within every limit that is set; the others are dropped and counted.

    A session ends before its first turn that is too long: later turns contain that one.

    Raises:
        WorkloadError: if no limit is set, or no request is within them.
    """
    _check_limits(max_prompt_tokens, max_output_tokens, max_total_tokens)
    keep = np.ones(len(trace), dtype=bool)
    if max_prompt_tokens is not None:
        keep &= trace.prompt_tokens <= max_prompt_tokens
    if max_output_tokens is not None:
        keep &= trace.output_tokens <= max_output_tokens
    if max_total_tokens is not None:
        keep &= trace.prompt_tokens + trace.output_tokens <= max_total_tokens
    limits = _limits_shown(max_prompt_tokens, max_output_tokens, max_total_tokens)
    if trace.session is not None:
        keep = turns_to_keep(trace.session, keep)
    if not keep.any():
        shortest = int((trace.prompt_tokens + trace.output_tokens).min())
        raise WorkloadError(
            f"every request of {trace.name} is longer than {limits}; its shortest has {shortest:,} tokens in total; "
            "raise the limit"
        )
    return trace.take(keep).with_history(f"dropped {int((~keep).sum()):,} of {len(trace):,} requests over {limits}")


def inject_burst(
    trace: Trace,
    *,
    start_s: float,
    duration_s: float,
    rate_rps: float,
    prompt_tokens: int | None = None,
    output_tokens: int | None = None,
    seed: int = 0,
) -> Trace:
    """Return the trace with extra requests in [start_s, start_s + duration_s), from a Poisson process.

    If the trace has prefix ids, the new requests get fresh ones, so that they share no prefix.

    Args:
        rate_rps: of the burst alone.
        prompt_tokens, output_tokens: one length for every new request; None samples requests of the trace, with
            replacement.
    Raises:
        WorkloadError: if the burst starts after the last arrival, or a number is out of range.
    """
    _check_number("start_s", start_s, minimum=0.0)
    _check_number("duration_s", duration_s, above=0.0)
    _check_number("rate_rps", rate_rps, above=0.0)
    if start_s > trace.arrival_s[-1]:
        raise WorkloadError(
            f"the burst starts at {start_s:g} s but the last request of {trace.name} arrives at "
            f"{trace.arrival_s[-1]:g} s; lower start_s"
        )
    _check_limits(prompt_tokens, output_tokens, None, needed=False)
    _check_open(trace, "inject_burst")
    check_count(rate_rps * duration_s, "requests", MOST_REQUESTS, "lower rate_rps or duration_s", WorkloadError)
    rng = np.random.default_rng(seed)
    requests = int(rng.poisson(rate_rps * duration_s))
    arrival_s = start_s + rng.random(requests) * duration_s
    drawn = rng.integers(len(trace), size=requests)
    prompts = trace.prompt_tokens[drawn] if prompt_tokens is None else np.full(requests, prompt_tokens)
    outputs = trace.output_tokens[drawn] if output_tokens is None else np.full(requests, output_tokens)
    hash_ids = None
    if trace.hash_ids is not None:
        own = _small_ids(trace.hash_ids)
        hash_ids = (*own, *_fresh_hash_ids(prompts, trace.block_tokens, first_id=_next_id(own)))
    step = (
        f"injected {requests:,} requests from {start_s:g} s to {start_s + duration_s:g} s ({rate_rps:g}/s), seed={seed}"
    )
    return sorted_trace(
        arrival_s=np.concatenate([trace.arrival_s, arrival_s]),
        prompt_tokens=np.concatenate([trace.prompt_tokens, prompts]),
        output_tokens=np.concatenate([trace.output_tokens, outputs]),
        hash_ids=hash_ids,
        name=trace.name,
        source=trace.source,
        history=(*trace.history, step),
        time_quantum_s=trace.time_quantum_s,
        hash_block_tokens=trace.hash_block_tokens,
    )


def merge(traces: Sequence[Trace], *, name: str | None = None) -> Trace:
    """Return all requests of several traces on one clock; ties keep the order of the traces.

    Prefix ids of different traces stay distinct. If any trace has none, or ids of another number of tokens, the result
    has none, and its history says so.

    Raises:
        WorkloadError: if there is no trace.
    """
    if not traces:
        raise WorkloadError("merge got no trace; pass at least one")
    for trace in traces:
        _check_open(trace, "merge")
    names = " + ".join(trace.name for trace in traces)
    steps = [f"{trace.name}: {step}" for trace in traces for step in trace.history]
    steps.append(f"merged {names}: {sum(map(len, traces)):,} requests")
    hash_ids: HashIds | None = ()
    block_tokens = traces[0].block_tokens
    for trace in traces:
        if hash_ids is None or trace.hash_ids is None or trace.block_tokens != block_tokens:
            hash_ids = None
            continue
        first_id = _next_id(hash_ids)
        hash_ids += tuple(ids + first_id for ids in _small_ids(trace.hash_ids))
    if hash_ids is None and all(trace.hash_ids is not None for trace in traces):
        steps.append("left out the prefix ids, because the traces have ids of different numbers of tokens")
    elif hash_ids is None and any(trace.hash_ids is not None for trace in traces):
        without = ", ".join(trace.name for trace in traces if trace.hash_ids is None)
        steps.append(f"left out the prefix ids, because {without} has none")
    return sorted_trace(
        arrival_s=np.concatenate([trace.arrival_s for trace in traces]),
        prompt_tokens=np.concatenate([trace.prompt_tokens for trace in traces]),
        output_tokens=np.concatenate([trace.output_tokens for trace in traces]),
        hash_ids=hash_ids,
        name=name or names.replace(" ", ""),
        source=" + ".join(dict.fromkeys(trace.source for trace in traces)),
        history=tuple(steps),
        # The coarsest clock; spread a coarse trace before merging it with a fine one.
        time_quantum_s=max(trace.time_quantum_s for trace in traces),
        hash_block_tokens=None if hash_ids is None else block_tokens,
    )


def add(trace: Trace, *, other: Trace) -> Trace:
    """Return ``trace`` merged with ``other``: ``merge`` as a step, for YAML that builds ``other`` in place."""
    return merge([trace, other])


def repeat(trace: Trace, *, times: int, period_s: float | None = None, share_prefixes: bool = False) -> Trace:
    """Return the trace repeated ``times`` times, one round after the other.

    Args:
        period_s: seconds from the start of one round to the next; None takes the last arrival plus one mean gap,
            which keeps the rate.
        share_prefixes: repeated requests keep the prefix ids of the first round, as if users sent the same prompts
            again; False gives fresh ids, as if the prompts were new.
    Raises:
        WorkloadError: if the next round would start before the last arrival of this one.
    """
    if times < 1:
        raise WorkloadError(f"times is {times}; it must be at least 1")
    _check_open(trace, "repeat")
    check_count(times * len(trace), "requests", MOST_REQUESTS, "lower times", WorkloadError)
    last_s = float(trace.arrival_s[-1])
    period = last_s + trace.duration_s / max(len(trace) - 1, 1) if period_s is None else period_s
    if not (math.isfinite(period) and period >= last_s):
        raise WorkloadError(f"period_s is {period:g}; it must be at least the last arrival, {last_s:g} s")
    hash_ids = None
    if trace.hash_ids is not None:
        own = _small_ids(trace.hash_ids)
        offset = 0 if share_prefixes else _next_id(own)
        hash_ids = tuple(ids + k * offset for k in range(times) for ids in own)
    return replace(
        trace,
        arrival_s=(np.arange(times)[:, None] * period + trace.arrival_s).ravel(),
        prompt_tokens=np.tile(trace.prompt_tokens, times),
        output_tokens=np.tile(trace.output_tokens, times),
        hash_ids=hash_ids,
        history=(*trace.history, f"repeated {times} times, every {period:.9g} s"),
    )


def shuffle_lengths(trace: Trace, *, seed: int = 0) -> Trace:
    """Return the same arrivals with the requests (prompt, output and prefix ids together) in random order."""
    _check_open(trace, "shuffle_lengths")
    order = np.random.default_rng(seed).permutation(len(trace))
    return replace(
        trace,
        prompt_tokens=trace.prompt_tokens[order],
        output_tokens=trace.output_tokens[order],
        hash_ids=None if trace.hash_ids is None else tuple(trace.hash_ids[i] for i in order),
        history=(*trace.history, f"shuffled lengths, seed={seed}"),
    )


def keep_share(trace: Trace, *, share: float, seed: int = 0) -> Trace:
    """Return a random share of the requests at their original times: a lower rate over the same duration.

    It keeps exactly round(share x requests).

    Raises:
        WorkloadError: if share is not in (0, 1], or so small that no request is left.
    """
    _check_number("share", share, above=0.0)
    if share > 1:
        raise WorkloadError(f"share is {share:g}; it must be at most 1; to raise the load, use scale_rate or merge")
    kept = round(share * len(trace))
    if kept == 0:
        raise WorkloadError(
            f"share={share:g} of {len(trace):,} requests leaves none; use at least {1 / len(trace):.2g}"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(len(trace))[:kept])
    return trace.take(chosen).with_history(f"kept {kept:,} of {len(trace):,} requests at random, seed={seed}")


def _check_open(trace: Trace, step: str) -> None:
    """Refuse a trace with sessions, whose turns a step would tear from each other.

    Raises:
        WorkloadError: for a trace with sessions.
    """
    if trace.session is not None:
        raise WorkloadError(
            f"{step} does not take a trace with sessions ({trace.name}), whose turns follow each other; apply it to "
            "the trace before closed_loop, or take clip_lengths, drop_long or scale_rate"
        )


def _timed(trace: Trace, factor: float, step: str) -> Trace:
    return replace(
        trace,
        arrival_s=trace.arrival_s * factor,
        time_quantum_s=trace.time_quantum_s * factor,
        history=(*trace.history, step),
    )


def _check_number(name: str, value: float, *, minimum: float | None = None, above: float | None = None) -> None:
    low = value < minimum if minimum is not None else above is not None and value <= above
    if not math.isfinite(value) or low:
        allowed = f"at least {minimum:g}" if minimum is not None else f"more than {above or 0:g}"
        raise WorkloadError(f"{name} is {value}; it must be a finite number, {allowed}")


def _check_limits(prompt: int | None, output: int | None, total: int | None, *, needed: bool = True) -> None:
    if needed and prompt is None and output is None and total is None:
        raise WorkloadError("no limit is set; set max_prompt_tokens, max_output_tokens or max_total_tokens")
    # A request has at least one prompt token and one output token.
    for name, value, minimum in (
        ("prompt_tokens", prompt, 1),
        ("output_tokens", output, 1),
        ("total_tokens", total, 2),
    ):
        if value is not None and value < minimum:
            raise WorkloadError(f"the limit on {name} is {value}; it must be at least {minimum}")


def _limits_shown(prompt: int | None, output: int | None, total: int | None) -> str:
    limits = {"prompt": prompt, "output": output, "total": total}
    return ", ".join(f"{value:,} {name} tokens" for name, value in limits.items() if value is not None)


def _nearest_arrival(trace: Trace, time_s: float) -> str:
    after = trace.arrival_s[trace.arrival_s >= time_s]
    return f"the next at {after[0]:g} s" if len(after) else "none later: lower start_s"


def _cut_hash_ids(trace: Trace, prompt_tokens: Ints) -> HashIds | None:
    if trace.hash_ids is None:
        return None
    blocks = -(-prompt_tokens // trace.block_tokens)
    if trace.session is not None:  # ids beyond an uncut prompt are those of its answer
        blocks = np.where(prompt_tokens < trace.prompt_tokens, blocks, np.iinfo(np.int64).max)
    return tuple(ids[:count] for ids, count in zip(trace.hash_ids, blocks.tolist(), strict=True))


def _small_ids(hash_ids: HashIds) -> HashIds:
    """Return the ids, numbered from 0 if some are so large that adding to them would overflow."""
    if _next_id(hash_ids) <= LARGEST_ID:
        return hash_ids
    flat = np.unique(np.concatenate(hash_ids), return_inverse=True)[1]
    ends = np.cumsum([len(ids) for ids in hash_ids]).tolist()
    return tuple(flat[end - len(ids) : end] for ids, end in zip(hash_ids, ends, strict=True))


def _next_id(hash_ids: Iterable[Ints]) -> int:
    return max((int(ids.max()) + 1 for ids in hash_ids if len(ids)), default=0)


def _fresh_hash_ids(prompt_tokens: Ints, block_tokens: int, *, first_id: int) -> HashIds:
    blocks = -(-prompt_tokens // block_tokens)
    ends = first_id + np.cumsum(blocks)
    return tuple(np.arange(end - count, end) for end, count in zip(ends.tolist(), blocks.tolist(), strict=True))
