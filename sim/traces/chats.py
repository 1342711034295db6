"""Conversations that need no file: turns whose prompts hold everything said before, with think times between them.

    turn 1: prompt = first message            answer
    turn 2: prompt = turn 1, its answer, next message       answer
    ...

Each prefix block has one hash id in all turns of its conversation, so with ``engine.prefix_caching=true`` a turn finds
the KV of the prompt and the answer before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from sim.errors import WorkloadError
from sim.limits import MOST_REQUESTS, check_count
from sim.traces.generate import Lengths, table_lengths
from sim.traces.loops import closed_loop, think_times
from sim.traces.sessions import earliest_arrivals
from sim.traces.trace import Trace, sorted_trace
from sim.traces.transforms import MOST_HASH_IDS
from sim.types import Floats, Ints

Arrivals = Callable[[np.random.Generator], Floats]


def chats(
    *,
    arrivals: Arrivals,
    turns: float = 4.0,
    lengths: Lengths = table_lengths,
    think_s: float = 10.0,
    think_cv: float = 1.0,
    shared_tokens: int = 0,
    max_context_tokens: int = 4096,
    block_tokens: int = 16,
    seed: int = 0,
) -> Trace:
    """Return conversations that begin at given times, whatever the server does; their later turns follow answers.

    Args:
        arrivals: the process of the conversations' starts (``sim.traces.generate``).
        turns: mean turns of a conversation, geometric from 1 on.
        lengths: of each message and answer; a message is what a turn adds to the prompt.
        think_s, think_cv: mean seconds from an answer to the next message, and their coefficient of variation: Gamma
            distributed, 0 for a constant, 1 for exponential.
        shared_tokens: tokens that all prompts begin with, such as a system prompt.
        max_context_tokens: a conversation ends before the turn that would be longer, prompt and answer; a first turn is
            cut to it.
        block_tokens: prompt tokens per hash id; set ``engine.hash_block_tokens`` to the same.
        seed: the same seed gives the same trace.
    Raises:
        WorkloadError: if a number is out of range, or no conversation begins.
    """
    starts_rng, turns_rng = np.random.default_rng(seed).spawn(2)
    start_s = arrivals(starts_rng)
    if not len(start_s):
        raise WorkloadError("no conversation begins; raise the rate or the duration of trace.arrivals")
    return _conversations(
        start_s,
        turns_rng,
        turns=turns,
        lengths=lengths,
        think_s=think_s,
        think_cv=think_cv,
        shared_tokens=shared_tokens,
        max_context_tokens=max_context_tokens,
        block_tokens=block_tokens,
        name="chats",
        step=f"{len(start_s):,} conversations, seed={seed}",
    )


def chat_users(
    *,
    users: int,
    sessions_per_user: float = 4.0,
    pause_s: float = 10.0,
    ramp_up_s: float = 0.0,
    seed: int = 0,
    turns: float = 4.0,
    lengths: Lengths = table_lengths,
    think_s: float = 10.0,
    think_cv: float = 1.0,
    shared_tokens: int = 0,
    max_context_tokens: int = 4096,
    block_tokens: int = 16,
) -> Trace:
    """Return conversations of a fixed number of users: each begins the next one when the last has ended.

    Args:
        users: how many. sessions_per_user: conversations are users x this, rounded; who is free takes the next.
        pause_s: mean seconds from the end of a user's conversation to the next one; ``think_cv`` holds for it too.
        ramp_up_s: seconds in which the users begin, one after the other.
        turns, lengths, think_s, think_cv, shared_tokens, max_context_tokens, block_tokens, seed: as ``chats``.
    Raises:
        WorkloadError: if a number is out of range.
    """
    if isinstance(users, bool) or not isinstance(users, int) or users < 1:
        raise WorkloadError(f"users is {users!r}; it must be a whole number from 1")
    if not (math.isfinite(sessions_per_user) and sessions_per_user >= 1):
        raise WorkloadError(f"sessions_per_user is {sessions_per_user}; it must be at least 1")
    count = round(users * sessions_per_user)
    check_count(count * turns, "requests", MOST_REQUESTS, "lower users, sessions_per_user or turns", WorkloadError)
    _, turns_rng, pauses_rng = np.random.default_rng(seed).spawn(3)
    trace = _conversations(
        np.zeros(count),
        turns_rng,
        turns=turns,
        lengths=lengths,
        think_s=think_s,
        think_cv=think_cv,
        shared_tokens=shared_tokens,
        max_context_tokens=max_context_tokens,
        block_tokens=block_tokens,
        name="chat_users",
        step=f"{count:,} conversations, seed={seed}",
    )
    pauses_seed = int(pauses_rng.integers(2**31))
    loop = closed_loop(trace, users=users, think_s=pause_s, think_cv=think_cv, ramp_up_s=ramp_up_s, seed=pauses_seed)
    users_step = (
        f"{users:,} users in a closed loop, {pause_s:g} s between conversations, all there after {ramp_up_s:g} s"
    )
    return replace(loop, history=(*trace.history, f"{users_step}, seed={seed}"))


def _conversations(
    start_s: Floats,
    rng: np.random.Generator,
    *,
    turns: float,
    lengths: Lengths,
    think_s: float,
    think_cv: float,
    shared_tokens: int,
    max_context_tokens: int,
    block_tokens: int,
    name: str,
    step: str,
) -> Trace:
    """Return one conversation per start; arguments as in ``chats``."""
    if not (math.isfinite(turns) and turns >= 1):
        raise WorkloadError(f"turns is {turns}; it must be at least 1")
    for key, value, least in (
        ("shared_tokens", shared_tokens, 0),
        ("max_context_tokens", max_context_tokens, shared_tokens + 2),
        ("block_tokens", block_tokens, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise WorkloadError(f"{key} is {value!r}; it must be a whole number from {least}")
    check_count(len(start_s) * turns, "requests", MOST_REQUESTS, "lower the conversations or turns", WorkloadError)
    # A stream for each, so that another think time changes no length.
    turns_rng, lengths_rng, think_rng = rng.spawn(3)
    counts = turns_rng.geometric(1.0 / turns, len(start_s))
    session = np.repeat(np.arange(len(start_s)), counts)
    first = np.concatenate([[True], session[1:] != session[:-1]])
    messages, answers = lengths(lengths_rng, len(session))
    # Before turn k lie the messages and answers of turns 0 to k - 1.
    said = np.cumsum(messages + answers) - (messages + answers)
    said -= np.repeat(said[first], counts)
    prompts = shared_tokens + said + messages
    prompts[first] = np.minimum(prompts[first], max_context_tokens - 1)
    answers[first] = np.minimum(answers[first], max_context_tokens - prompts[first])
    pauses_s = think_times(think_rng, len(session), think_s=think_s, think_cv=think_cv)
    pauses_s[first] = math.nan
    fits = prompts + answers <= max_context_tokens
    fits &= np.cumsum(~fits) == np.repeat((np.cumsum(~fits) - ~fits)[first], counts)
    session, prompts, answers, pauses_s = session[fits], prompts[fits], answers[fits], pauses_s[fits]
    return sorted_trace(
        arrival_s=earliest_arrivals(start_s[session], session, pauses_s),
        prompt_tokens=prompts,
        output_tokens=answers,
        hash_ids=_hash_ids(session, prompts + answers, shared_tokens, block_tokens),
        session=session,
        think_s=pauses_s,
        name=name,
        source=f"sim.traces.chats.{name}",
        history=(f"{step}: {len(session):,} turns of at most {max_context_tokens:,} tokens",),
        hash_block_tokens=block_tokens,
    )


def _hash_ids(session: Ints, tokens: Ints, shared_tokens: int, block_tokens: int) -> tuple[Ints, ...]:
    """Return the ids of the full prefix blocks of each turn, prompt and answer: the same for all turns of a session."""
    counts = tokens // block_tokens
    check_count(int(counts.sum()), "hash ids", MOST_HASH_IDS, "raise block_tokens, or take fewer conversations")
    common, most = shared_tokens // block_tokens, int(counts.max(initial=0))
    ids = []
    for number, count in zip(session.tolist(), counts.tolist(), strict=True):
        block = np.arange(count, dtype=np.int64)
        ids.append(np.where(block < common, block, block + most * (number + 1)))
    return tuple(ids)
