"""The same run under other settings of the server, each with its own small fit: which one explains the run better?

Prices and settings can stand in for each other, so each setting is judged at its own best prices. One simulation takes
milliseconds, so that all of them take seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hw.fit.diagnosis import Diagnosis
from hw.fit.fitting import Case, fit, loss
from hw.fit.parameters import Point, server_at
from hw.fit.server import Prompts, Server
from sim.cost.memory import budget_for_kv_blocks
from sim.engine.budget import constant_budget
from sim.engine.scheduler import SchedulerName
from sim.errors import RapLabError

BATCH_TOKENS = (512, 2048, 8192, 16384)
USUAL_RUNNING = (8, 16, 32, 64, 128, 256, 512, 1024)
USUAL_PROMPTS = (1, 10, 20, 50, 100, 200, 500)
BETTER = 0.6
"""Another setting is named if it leaves at most this share of the loss."""
NEAR = 1.25
"""Settings whose losses differ by no more stand in for each other, as a limit on requests and one on memory."""
SMALL_LOSS = 0.08
"""A loss that needs no other setting: TTFT is off by 6 % or gaps by 1.5 %."""
QUICK_STEPS, QUICK_STEPS_OF_SEVERAL = 4, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """Another description: the keys that make it, and the losses of the fitted part at its own best prices."""

    keys: str
    loss: float


def other_settings(found: Diagnosis, server: Server) -> Iterator[tuple[str, Server | None]]:
    """Yield other descriptions of a server, each with the keys that make it; None where they exclude each other."""
    config = server.config
    for tokens in BATCH_TOKENS:
        if tokens != config.limits.max_batch_tokens and _matters(found, config.limits.max_batch_tokens, tokens):
            yield f"engine.limits.max_batch_tokens={tokens}", _limited(server, max_batch_tokens=tokens)
    other: SchedulerName = "prefill_first" if config.scheduler == "chunked" else "chunked"
    ahead = config.schedules_ahead and other == "chunked"
    yield f"engine.scheduler={other}", _changed(server, scheduler=other, schedules_ahead=ahead)
    if config.scheduler == "chunked":
        value = not config.schedules_ahead
        yield f"engine.schedules_ahead={str(value).lower()}", _changed(server, schedules_ahead=value)
    for most in _other_limits(found, server):
        yield f"engine.limits.max_running={most}", _limited(server, max_running=most)
    yield from _other_memory(found, server)
    if config.prefix_caching:
        yield "engine.prefix_caching=false", _changed(server, prefix_caching=False)
    else:
        yield from _with_caches(found, server)


def _changed(server: Server, **changes: Any) -> Server | None:
    """Return a server with other engine settings; None where they exclude each other."""
    try:
        return server.with_config(replace(server.config, **changes))
    except RapLabError:
        return None


def _limited(server: Server, **changes: Any) -> Server | None:
    try:
        return _changed(server, limits=replace(server.config.limits, **changes))
    except RapLabError:
        return None


def _other_limits(found: Diagnosis, server: Server) -> list[int]:
    """Return limits on running requests near the number that decoded at once, if the simulation has more or none."""
    real, ours = found.peak
    present = server.config.limits.max_running
    if server.replicas > 1 or real < 2 or not (ours > 1.15 * real or real > 0.9 * present):
        return []
    near = {real, *(most for most in USUAL_RUNNING if 0.75 * real <= most <= 1.35 * real)}
    return sorted(near - {present})


def _other_memory(found: Diagnosis, server: Server) -> Iterator[tuple[str, Server]]:
    """Yield a server whose KV cache holds just what the run's requests held at once, if that may be the limit."""
    if server.replicas > 1 or found.kv_peak_tokens <= 0:
        return
    room, tokens = server.kv_tokens(), server.config.kv_block_tokens
    larger = found.simulated_run.preemptions > 0 and found.kv_peak_tokens > room
    smaller = found.peak[1] > 1.1 * found.peak[0] and found.kv_peak_tokens < 0.9 * room
    if larger or smaller:
        blocks = -(-found.kv_peak_tokens // tokens) + found.peak[0]
        bytes_ = budget_for_kv_blocks(server.spec.model, server.plan, blocks, server.spec.workspace_bytes, tokens)
        yield f"budget=kv_blocks budget.blocks={blocks}", replace(server, budget=constant_budget(bytes_))


def _matters(found: Diagnosis, before: int, after: int) -> bool:
    """Return whether a limit of tokens changes anything: none of the prompts that come together reaches the smaller."""
    return min(before, after) < 2 * int(found.run.prompt_tokens.max()) + found.peak[0]


def _with_caches(found: Diagnosis, server: Server) -> Iterator[tuple[str, Server]]:
    cached = _changed(server, prefix_caching=True, hash_block_tokens=server.config.kv_block_tokens)
    if cached is None:
        return
    counts = [found.period] if found.period is not None else []
    if not counts and np.ptp(found.run.prompt_tokens) == 0:  # no length shows which prompt it is
        counts = [count for count in USUAL_PROMPTS if 2 * count <= len(found.run)]
    for count in counts:
        prompts = Prompts(distinct=count, shared_tokens=server.prompts.shared_tokens)
        yield (
            f"engine.prefix_caching=true distinct_prompts={count}",
            replace(cached, prompts=prompts),
        )
    if found.distinct is not None and found.distinct < 0.9 * len(found.run):
        yield "engine.prefix_caching=true", cached


def best_loss(case: Case, free: Sequence[str]) -> float:
    """Return the loss of the fitted part at the best prices that a few steps find."""
    steps = QUICK_STEPS if case.matched else QUICK_STEPS_OF_SEVERAL
    point = fit([case], free, most_steps=steps, polish=False)[0] if free else Point(values={})
    return loss(case, server_at(case.server, point), case.fitted)


def try_settings(case: Case, found: Diagnosis, free: Sequence[str]) -> tuple[float, list[Tried]]:
    """Return the loss of the description at its best prices, and other descriptions, the best first, if it is large."""
    case = replace(case, quick=True)
    present = best_loss(case, free)
    if present <= SMALL_LOSS:
        return present, []
    tried = []
    for keys, server in other_settings(found, case.server):
        if server is None:
            continue
        try:
            tried.append(Tried(keys=keys, loss=best_loss(replace(case, server=server), free)))
        except RapLabError:
            continue  # such a server cannot be built, as one with too little memory for a request
    return present, sorted(tried, key=lambda one: one.loss)


def sentences_of(present: float, tried: Sequence[Tried]) -> list[str]:
    """Return a sentence that names the settings that explain a run much better."""
    if present <= SMALL_LOSS or not tried or tried[0].loss > BETTER * present:
        return []
    near = [one for one in tried if one.loss <= NEAR * tried[0].loss]
    keys = " or ".join(one.keys for one in near[:3])
    return [
        f"another setting explains the run better, each at its own best prices: {keys} leaves a loss of "
        f"{tried[0].loss:.2g} where the description leaves {present:.2g}; check it in the server's configuration"
    ]
