"""Sessions in an engine: when turns arrive, and what they find in the prefix cache; both engines are equal."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from sim.cost.plan import dense_plan
from sim.engine.protocol import sessions_of
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError
from sim.results.records import Records, Status
from sim.traces.chats import chat_users, chats
from sim.traces.generate import lognormal_lengths, poisson_arrivals
from sim.traces.loops import closed_loop
from sim.traces.sessions import next_turns, waiting_sessions
from sim.traces.trace import Trace
from tests.sample import quick
from tests.sim.engine import session_cases
from tests.sim.serving import TINY, linear_latency, requests, tiny_engine

LENGTHS = partial(lognormal_lengths, prompt_tokens_p50=15, prompt_sigma=0.8, output_tokens_p50=10, output_sigma=0.8)
LATENCY = linear_latency(0.25, 0.0078125, 0.001)
NAN = math.nan


def served(trace: Trace, **settings: object) -> SimEngine:
    engine = tiny_engine(latency=LATENCY, **settings)  # type: ignore[arg-type]
    engine.submit_trace(trace)
    engine.run_until(math.inf)
    assert engine.drained
    return engine


def rows(*turns: tuple[int, float, int, int, float], ids: list[list[int]] | None = None) -> Trace:
    """(session, arrival_s, prompt, output, think_s) rows as a trace; arrivals in order."""
    session, arrival_s, prompts, outputs, think_s = (np.array(column) for column in zip(*turns, strict=True))
    return Trace(
        arrival_s=arrival_s.astype(np.float64),
        prompt_tokens=prompts,
        output_tokens=outputs,
        session=session,
        think_s=think_s.astype(np.float64),
        hash_ids=None if ids is None else tuple(np.array(row) for row in ids),
        hash_block_tokens=8,
    )


def ended_s(records: Records, max_wait_s: float = math.inf) -> np.ndarray:
    """Return when each request ended; a rejected one at its arrival, or at the end of its longest wait."""
    waited = np.minimum(max_wait_s, math.inf)
    rejected = records.arrival_s + (waited if math.isfinite(waited) else 0.0)
    return np.where(records.status == Status.REJECTED, rejected, records.finish_s)


@pytest.mark.parametrize("seed", quick(range(400), 40))
def test_the_compiled_engine_serves_sessions_like_the_plain_one(seed: int) -> None:
    assert session_cases.differences(session_cases.random_case(seed)) == []


def test_a_turn_comes_its_think_time_after_the_answer_before_it() -> None:
    engine = served(rows((0, 1.0, 8, 3, NAN), (0, 1.5, 16, 2, 0.5), (0, 1.5, 24, 2, 0.0)))
    records = engine.records()
    assert records.arrival_s[0] == 1.0
    assert records.arrival_s[1] == records.finish_s[0] + 0.5
    assert records.arrival_s[2] == records.finish_s[1]
    # It can be in the very iteration that begins when the one before it ends.
    assert records.admitted_s[2] == records.finish_s[1]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("users", [None, 3])
def test_law_every_turn_arrives_once_and_exactly_when_the_one_before_it_lets_it(seed: int, users: int | None) -> None:
    starts = partial(poisson_arrivals, rate_rps=0.3, duration_s=60.0)
    trace = chats(arrivals=starts, lengths=LENGTHS, think_s=4.0, max_context_tokens=200, block_tokens=8, seed=seed)
    if users is not None:
        trace = closed_loop(trace, users=users, think_s=3.0, think_cv=1.0, ramp_up_s=5.0, seed=seed)
    assert trace.session is not None
    assert trace.think_s is not None
    # Two thirds of the context: some conversations end in rejections.
    engine = served(trace, prefix_caching=seed % 2 == 0, max_context_tokens=130, schedules_ahead=seed % 3 == 0)
    records, order = engine.records(), engine.arrival_order()
    assert sorted(order.tolist()) == list(range(len(trace)))
    assert (np.diff(records.arrival_s) >= 0).all()
    assert (records.status == Status.REJECTED).any()
    assert (records.status == Status.FINISHED).any()
    row = np.argsort(order)  # of each request of the trace
    arrival_s, end_s = records.arrival_s[row], ended_s(records)[row]
    after = next_turns(trace.session, trace.think_s)
    for before, following in enumerate(after.tolist()):
        if following >= 0:
            assert arrival_s[following] == end_s[before] + trace.think_s[following]
    own = np.isnan(trace.think_s)
    assert arrival_s[own].tolist() == trace.arrival_s[own].tolist()
    assert (arrival_s >= trace.arrival_s - 1e-9).all()
    # The k-th session that waits begins after the k-th end of a session.
    ends = np.sort(end_s[after < 0])
    waiting = waiting_sessions(trace.session, trace.think_s)
    assert arrival_s[waiting] - trace.think_s[waiting] == pytest.approx(ends[: len(waiting)])


@pytest.mark.parametrize("users", [1, 4, 9])
def test_law_a_closed_loop_never_has_more_requests_in_the_system_than_users(users: int) -> None:
    trace = chat_users(users=users, lengths=LENGTHS, think_s=2.0, ramp_up_s=6.0, max_context_tokens=200, seed=1)
    records = served(trace, kv_blocks=80, max_running=4).records()
    assert (records.status == Status.FINISHED).all()
    events = np.concatenate([records.arrival_s, ended_s(records)])
    change = np.concatenate([np.ones(len(records)), -np.ones(len(records))])
    order = np.lexsort((change, events))  # at one instant one ends before another comes
    most = int(np.cumsum(change[order]).max())
    assert most <= users
    assert most >= users - 1  # and the loop is busy


def test_law_the_same_seed_gives_the_same_records_byte_for_byte() -> None:
    def records() -> Records:
        return served(chat_users(users=5, lengths=LENGTHS, max_context_tokens=200, seed=3)).records()

    one, two = records(), records()
    for name in ("arrival_s", "admitted_s", "first_token_s", "finish_s", "produced_tokens", "status"):
        assert getattr(one, name).tobytes() == getattr(two, name).tobytes(), name


def test_law_looking_at_an_engine_changes_no_turn() -> None:
    trace = chat_users(users=5, lengths=LENGTHS, max_context_tokens=200, seed=4)
    plan = replace(dense_plan(TINY), max_wait_s=0.6)  # some turns are rejected in the middle of iterations
    engines = [tiny_engine(latency=LATENCY, plan=plan, max_running=2) for _ in range(2)]
    for engine in engines:
        engine.submit_trace(trace)
    for time_s in np.arange(0.0, 300.0, 0.37).tolist():
        engines[1].run_until(time_s)
    for engine in engines:
        engine.run_until(math.inf)
    one, two = (engine.records() for engine in engines)
    assert (one.status == Status.REJECTED).sum() > 3
    assert one.arrival_s.tolist() == two.arrival_s.tolist()
    assert one.finish_s.tobytes() == two.finish_s.tobytes()


def test_a_rejected_turn_ends_at_the_end_of_its_longest_wait() -> None:
    plan = replace(dense_plan(TINY), max_wait_s=0.125)
    engine = tiny_engine(latency=linear_latency(1.0), plan=plan, max_running=1)
    engine.submit_trace(rows((0, 0.0, 4, 5, NAN), (1, 0.25, 4, 1, NAN), (1, 1.25, 4, 1, 1.0), (1, 1.25, 4, 1, 9.0)))
    engine.run_until(math.inf)
    records = engine.records()
    assert records.status.tolist() == [Status.FINISHED, Status.REJECTED, Status.REJECTED, Status.FINISHED]
    assert records.arrival_s.tolist() == [0.0, 0.25, 0.25 + 0.125 + 1.0, 1.375 + 0.125 + 9.0]


def test_a_turn_finds_the_prompt_and_the_answer_before_it() -> None:
    # 20 + 13 tokens: the last token of the answer has no KV, so four prefix blocks of 8 are full.
    ids = [[1, 2, 3, 4], [1, 2, 3, 4, 5]]
    trace = rows((0, 0.0, 20, 13, NAN), (0, 1.0, 40, 2, 1.0), ids=ids)
    assert served(trace, prefix_caching=True).records().cached_tokens.tolist() == [0, 32]
    # Without ids of the answer only the prompt is found, as without sessions.
    trace = rows((0, 0.0, 20, 13, NAN), (0, 1.0, 40, 2, 1.0), ids=[[1, 2], [1, 2, 3, 4, 5]])
    assert served(trace, prefix_caching=True).records().cached_tokens.tolist() == [0, 16]


def test_requests_next_to_sessions_are_refused() -> None:
    trace = rows((0, 0.0, 8, 3, NAN), (0, 1.5, 16, 2, 0.5))
    engine = tiny_engine()
    engine.submit_trace(trace)
    with pytest.raises(ConfigError, match="a trace with sessions is submitted to an engine alone"):
        engine.submit(requests((9.0, 8, 3)))
    engine = tiny_engine()
    engine.submit(requests((9.0, 8, 3)))
    with pytest.raises(ConfigError, match="a trace with sessions is submitted to an engine alone"):
        engine.submit_arrays(trace.arrival_s, trace.prompt_tokens, trace.output_tokens, sessions=sessions_of(trace))


@pytest.mark.parametrize("seed", range(4))
def test_an_engine_that_is_restored_serves_the_same_turns_again(seed: int) -> None:
    trace = chat_users(users=4, lengths=LENGTHS, max_context_tokens=200, block_tokens=8, seed=seed)
    engine = tiny_engine(latency=LATENCY, prefix_caching=True, kv_blocks=120)
    engine.submit_trace(trace)
    engine.run_until(20.0 + seed)
    saved = engine.snapshot()
    engine.run_until(math.inf)
    first, order = engine.records(), engine.arrival_order().tolist()
    engine.restore(saved)
    engine.run_until(math.inf)
    assert engine.arrival_order().tolist() == order
    for name in ("arrival_s", "finish_s", "cached_tokens"):
        assert getattr(engine.records(), name).tobytes() == getattr(first, name).tobytes(), name
