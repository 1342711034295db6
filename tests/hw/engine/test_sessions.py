"""Sessions on the real engine: turns follow real answers, prompts hold them, and the schedule is the simulator's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hw.engine.hw_engine import HwEngine
from hw.engine.prompts import RandomPrompts, SessionPrompts
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.plan import dense_plan
from sim.engine.protocol import Sessions, sessions_of
from sim.engine.sim_engine import SimEngine
from sim.policies import Fixed
from sim.replay.loop import replay
from sim.results.records import Status
from sim.traces.chats import chat_users, chats
from sim.traces.generate import lognormal_lengths
from sim.traces.sessions import next_turns, turn_numbers
from sim.traces.trace import Trace
from tests.hw.serving import VOCABULARY, engine_config, flat_latency, hw_engine, tiny_spec


def lengths(rng: np.random.Generator, count: int) -> Any:
    return lognormal_lengths(rng, count, prompt_tokens_p50=5, prompt_sigma=0.6, output_tokens_p50=4, output_sigma=0.6)


def conversations(kind: str) -> Trace:
    if kind == "closed":
        return chat_users(
            users=6, sessions_per_user=3, pause_s=1.0, ramp_up_s=2.0, turns=3.0, lengths=lengths, think_s=3.0,
            max_context_tokens=60, block_tokens=4, seed=2,
        )  # fmt: skip
    starts = np.array([0.0, 0.5, 1.0, 6.0, 6.0])
    return chats(
        arrivals=lambda _: starts,
        turns=4.0,
        lengths=lengths,
        think_s=3.0,
        max_context_tokens=60,
        block_tokens=4,
        seed=3,
    )


def served(trace: Trace, kv_blocks: int, **more: Any) -> tuple[HwEngine, SimEngine]:
    """Serve a trace on the real engine, whose clock advances by the simulator's prices, and in simulation."""
    config, plan = engine_config(**more), dense_plan(tiny_spec())
    real = hw_engine(config=config, plan=plan, kv_blocks=kv_blocks)
    budget = budget_for_kv_blocks(tiny_spec(), plan, kv_blocks, 0, config.kv_block_tokens)
    simulated = SimEngine(
        model=tiny_spec(),
        latency=flat_latency(),
        config=config,
        plan=plan,
        budget_bytes=budget,
        host_to_device_bytes_per_s=1e30,  # swapping takes no time on the clock of the real engine
    )
    for engine in real, simulated:
        replay(trace, engine, Fixed(plan))
        assert engine.drained
    return real, simulated


@pytest.mark.parametrize("more", [{}, {"scheduler": "prefill_first", "preemption": "swap", "host_kv_blocks": 400}])
@pytest.mark.parametrize("kind", ["open", "closed"])
def test_turns_follow_real_answers_at_the_times_of_the_simulator(kind: str, more: dict[str, Any]) -> None:
    trace = conversations(kind)
    assert trace.session is not None
    assert trace.think_s is not None
    real, simulated = served(trace, 16, **more)
    order, records = real.arrival_order(), real.records()
    np.testing.assert_array_equal(order, simulated.arrival_order())
    for name in ("arrival_s", "first_token_s", "finish_s", "prompt_tokens", "produced_tokens", "preemptions", "status"):
        np.testing.assert_allclose(getattr(records, name), getattr(simulated.records(), name), rtol=1e-12, err_msg=name)
    assert records.preemptions.sum() > 0
    at_s, ended_s = np.empty(len(trace)), np.empty(len(trace))
    at_s[order], ended_s[order] = records.arrival_s, records.finish_s
    after = next_turns(trace.session, trace.think_s)
    before = np.flatnonzero(after >= 0)
    assert len(before) >= 8
    np.testing.assert_allclose(at_s[after[before]], ended_s[before] + trace.think_s[after[before]], rtol=1e-12)
    real.check()
    real.close()


def test_the_prompt_of_a_turn_begins_with_the_prompt_and_the_real_answer_before_it() -> None:
    trace = conversations("open")
    assert trace.session is not None
    real, _ = served(trace, 200)
    tokens, numbers = real._torch.tokens, turn_numbers(trace.session)
    for row in range(len(trace)):
        prompt = tokens[row][: trace.prompt_tokens[row]]
        assert len(tokens[row]) == trace.prompt_tokens[row] + trace.output_tokens[row]
        if numbers[row]:
            before = np.flatnonzero((trace.session == trace.session[row]) & (numbers == numbers[row] - 1))[0]
            said = tokens[int(before)]
            assert prompt[: len(said)] == said
            assert prompt[len(said) :] == RandomPrompts(VOCABULARY)(row, len(prompt) - len(said))
        else:
            assert prompt == RandomPrompts(VOCABULARY)(row, len(prompt))
    assert numbers.max() >= 2
    real.close()


def test_a_turn_whose_prompt_cannot_hold_what_was_said_has_a_prompt_of_its_own() -> None:
    sessions = Sessions(np.array([1, 2, -1]), np.array([np.nan, 1.0, 1.0]), np.zeros(0, dtype=np.int64))
    own, said = RandomPrompts(VOCABULARY), {10: [1, 2, 3, 4, 5, 6], 11: [7] * 8}
    prompts = SessionPrompts.of(own, sessions, np.array([4, 7, 9]), np.array([2, 5, 1]), said, first_id=10)
    assert prompts(10, 4) == own(10, 4)
    assert prompts(11, 7) == [1, 2, 3, 4, 5, 6, *own(11, 1)]
    assert prompts(12, 9) == own(12, 9)  # 7 + 5 tokens were said
    del said[10]  # it was rejected: nothing was said
    assert prompts(11, 7) == own(11, 7)


def test_a_rejected_turn_ends_and_the_next_one_has_new_tokens_only() -> None:
    trace = Trace(
        arrival_s=np.array([0.0, 1.0]),
        prompt_tokens=np.array([120, 10]),  # more than the pool ever holds
        output_tokens=np.array([2, 3]),
        session=np.array([0, 0]),
        think_s=np.array([np.nan, 2.0]),
    )
    real, simulated = served(trace, 20)
    for engine in real, simulated:
        assert engine.records().status.tolist() == [Status.REJECTED, Status.FINISHED]
        assert engine.records().arrival_s.tolist() == [0.0, 2.0]
    assert sessions_of(trace) is not None
    real.close()
