"""The engine thread: a bad command or request is answered to its sender, and memory does not grow."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the server needs starlette and uvicorn: pip install -e '.[hw]'")

from hw.engine.torch_executor import NumericsError, TorchExecutor
from sim.cost.plan import Plan, dense_plan, drop, with_mask
from sim.engine.protocol import EngineState
from sim.errors import PlanError
from sim.serve.engine_thread import (
    EngineStoppedError,
    EngineThread,
    QueueFullError,
    ServedRequest,
    _Command,
)
from tests.hw.serve.loopback import alone, engine_thread, eventually
from tests.hw.serving import tiny_spec

MOST = 1000


@pytest.fixture
def thread() -> Iterator[EngineThread]:
    made = engine_thread()
    yield made
    made.stop()


class Asked:
    """A request and what came back."""

    def __init__(self, prompt: list[int], max_tokens: int) -> None:
        self.tokens: list[int] = []
        self.done = threading.Event()
        self.served = ServedRequest(prompt, max_tokens, True, self.on_token)

    def on_token(self, token: int | None, last: bool) -> None:
        if token is not None:
            self.tokens.append(token)
        if last:
            self.done.set()


def answer(thread: EngineThread, prompt: list[int], max_tokens: int) -> list[int]:
    asked = Asked(prompt, max_tokens)
    thread.submit([asked.served], MOST)
    assert asked.done.wait(60)
    return asked.tokens


def serves(thread: EngineThread) -> bool:
    return answer(thread, [5, 9, 20], 4) == alone([5, 9, 20], 4)


def test_a_command_that_fails_is_answered_to_its_sender_and_the_engine_serves_on(thread: EngineThread) -> None:
    heard: list[BaseException] = []
    answered = threading.Event()

    def fails() -> None:
        raise TypeError("no such thing")

    thread._put(_Command(fails, lambda error: (heard.append(error), answered.set())[0]))
    assert answered.wait(60)
    assert str(heard[0]) == "no such thing"
    assert serves(thread)


def test_a_plan_that_the_engine_refuses_is_the_error_of_its_sender(thread: EngineThread) -> None:
    bad = replace(dense_plan(tiny_spec()), weight_bits=(16,))
    with pytest.raises(PlanError, match="entries"):
        thread.set_plan(bad).result(timeout=60)
    assert serves(thread)


def test_a_plan_of_a_sender_that_has_left_is_skipped(thread: EngineThread) -> None:
    go = threading.Event()
    thread._put(_Command(lambda: go.wait(60) and None, lambda _: None))
    taken = thread.set_plan(with_mask(dense_plan(tiny_spec()), drop(tiny_spec(), mha=[1])))
    assert taken.cancel()
    go.set()
    assert serves(thread)
    assert thread.state.target == dense_plan(tiny_spec())


def test_a_request_that_the_engine_cannot_take_ends_with_the_reason(
    thread: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(thread.engine, "submit", lambda _: 1 / 0)
        asked = Asked([1, 2], 3)
        thread.submit([asked.served], MOST)
        assert asked.done.wait(60)
    assert asked.served.error == "division by zero"
    assert thread.in_flight == 0
    assert serves(thread)


def test_an_iteration_that_cannot_be_computed_ends_its_requests_and_the_engine_serves_on(
    thread: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_number(*_: Any) -> Any:
        raise NumericsError("MHA1 gave a value that is no finite number")

    with monkeypatch.context() as patch:
        patch.setattr(TorchExecutor, "forward", no_number)
        asked = Asked([1, 2], 3)
        thread.submit([asked.served], MOST)
        assert asked.done.wait(60)
    assert asked.served.error is not None
    assert "no finite number" in asked.served.error
    assert serves(thread)
    eventually(lambda: thread.state.kv_used_layer_blocks == 0, "KV stays held")


def test_a_reader_that_fails_does_not_end_the_engine(thread: EngineThread) -> None:
    def closed(token: int | None, last: bool) -> None:
        raise RuntimeError("the event loop is closed")

    thread.submit([ServedRequest([1, 2], 3, True, closed)], MOST)
    eventually(lambda: thread.in_flight == 0, "the request never ended")
    assert serves(thread)


def test_a_policy_that_fails_decides_no_more_and_the_engine_serves_on() -> None:
    class Broken:
        first_plan = dense_plan(tiny_spec())

        def __call__(self, state: EngineState) -> Plan:
            raise KeyError("no such layer")

    thread = engine_thread(Broken(), tick_s=0.01)
    try:
        eventually(lambda: thread._policy is None, "the policy never decided")
        assert serves(thread)
    finally:
        thread.stop()


def test_an_engine_that_cannot_go_on_ends_every_request_and_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    thread = engine_thread()
    monkeypatch.setattr(TorchExecutor, "forward", lambda *_: 1 / 0)
    asked = Asked([1, 2], 3)
    thread.submit([asked.served], MOST)
    assert asked.done.wait(60)
    thread._thread.join(60)
    assert isinstance(thread.failure, ZeroDivisionError)
    assert asked.served.error == "division by zero"
    with pytest.raises(EngineStoppedError, match="division by zero"):
        thread.submit([asked.served], MOST)
    with pytest.raises(EngineStoppedError):
        thread.set_plan(dense_plan(tiny_spec()))
    thread.cancel(asked.served)  # nothing to do
    thread.stop()


def test_stopping_ends_the_requests_under_way() -> None:
    thread = engine_thread()
    go = threading.Event()
    thread._put(_Command(lambda: go.wait(60) and None, lambda _: None))
    asked = [Asked([1, 2], 30) for _ in range(5)]
    thread.submit([one.served for one in asked], MOST)
    late = thread.set_plan(dense_plan(tiny_spec()))
    thread._stopping = True
    go.set()
    for one in asked:
        assert one.done.wait(60)
    thread.stop()
    assert late.done()
    assert thread.in_flight == 0


def test_requests_are_refused_exactly_from_the_limit_on_whatever_the_engine_has_seen(thread: EngineThread) -> None:
    go = threading.Event()
    thread._put(_Command(lambda: go.wait(60) and None, lambda _: None))
    asked = [Asked([1, 2], 2) for _ in range(1000)]
    refused = 0
    for one in asked:
        try:
            thread.submit([one.served], 256)
        except QueueFullError:
            refused += 1
    assert refused == 1000 - 256
    assert thread.in_flight == 256
    with pytest.raises(QueueFullError):
        thread.submit([Asked([1], 1).served] * 3, 258)
    go.set()
    for one in asked[:256]:
        assert one.done.wait(60)
    assert thread.in_flight == 0
    thread.submit([one.served for one in [Asked([1], 1)]], 1)


def test_a_canceled_request_ends_at_once_and_frees_its_kv_whether_it_waits_runs_or_has_yet_to_arrive(
    thread: EngineThread,
) -> None:
    asked = [Asked([1 + i, 2], 40) for i in range(20)]
    thread.submit([one.served for one in asked], MOST)
    time.sleep(0.02)
    for one in asked:
        thread.cancel(one.served)
        thread.cancel(one.served)
    for one in asked:
        assert one.done.wait(60)
    assert thread.in_flight == 0
    assert serves(thread)
    eventually(lambda: thread.state.kv_used_layer_blocks == 0, "KV stays held")
    assert thread.state.running == thread.state.waiting == 0


def test_nothing_is_remembered_of_requests_that_have_ended_but_the_counters(thread: EngineThread) -> None:
    plans = [dense_plan(tiny_spec()), with_mask(dense_plan(tiny_spec()), drop(tiny_spec(), ffn=[1]))]
    for i in range(30):
        thread.set_plan(plans[i % 2]).result(timeout=60)
        assert len(answer(thread, [1 + i, 2], 3)) == 3
    eventually(lambda: thread.state.finished == 30, "the state is behind")
    engine = thread.engine
    eventually(lambda: not engine.queues.all, "ended requests are kept")
    thread.set_plan(thread.state.target).result(timeout=60)
    assert len(engine.records()) == len(engine.iterations().start_s) == len(engine.token_gaps().itl_s) == 0
    assert len(engine.transitions().time_s) <= 1
    assert len(engine.kept_share()) == 1
    assert len(engine.shapes()) == len(engine.memory_rows()) == 0
    assert not engine._torch.tokens
    assert not thread._requests
    assert thread.state.arrived == 30
    assert thread.state.produced_tokens == 90
    assert thread.state.iterations >= 30
