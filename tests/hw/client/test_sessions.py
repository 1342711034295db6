"""The client in sessions: turns come after answers and think times, and prompts begin with what was said."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("httpx", reason="hw.client needs httpx: pip install -e '.[hw]'")
pytest.importorskip("uvicorn", reason="the server needs starlette and uvicorn: pip install -e '.[hw]'")

from hw.client.payload import Payloads
from hw.client.replayer import Answer, Replayer
from hw.client.run import main, records_of
from hw.client.settings import ClientSettings
from hw.client.target import target_of
from hw.serve.server import ServerConfig
from sim.engine.protocol import sessions_of
from sim.replay.loop import requests_of
from sim.results.records import Status
from sim.traces.chats import chat_users
from sim.traces.generate import fixed_lengths
from sim.traces.sessions import next_turns, turn_numbers, waiting_sessions
from sim.traces.trace import Trace
from tests.commands import exit_status
from tests.hw.client.mock_server import DONE, MockServer, Step, chat, event, head, text, usage
from tests.hw.serve.loopback import serving
from tests.hw.serving import VOCABULARY

SHORT = partial(fixed_lengths, prompt_tokens=3, output_tokens=2)


def some_users(users: int = 3, **more: Any) -> Trace:
    arguments = {"lengths": SHORT, "think_s": 0.02, "pause_s": 0.03, "ramp_up_s": 0.06, "turns": 3.0}
    return chat_users(users=users, sessions_per_user=2, max_context_tokens=30, **(arguments | more))


def send(trace: Trace, url: str, vocabulary: int = VOCABULARY, **changed: Any) -> list[Answer]:
    settings = ClientSettings(**{"url": url, "timeout_s": 60.0, **changed})
    target = target_of(settings.url, chat=settings.chat, key_variable=None)
    replayer = Replayer(settings, target, Payloads(settings, "tiny", vocabulary))
    return asyncio.run(replayer.run(requests_of(trace), sessions=sessions_of(trace)))


def listen(trace: Trace, bodies: list[dict[str, Any]], *, fails: bool = False, **changed: Any) -> list[Answer]:
    """Send a trace to a server that keeps the bodies and answers each with its number."""

    def script(body: dict[str, Any]) -> Iterator[Step]:
        bodies.append(body)
        if fails and len(bodies) % 2 == 0:
            yield head("500 Internal Server Error", "application/json")
            return
        yield head()
        for _ in range(body["max_tokens"]):
            said = f" ({len(bodies)})"
            yield event(chat({"content": said}) if changed.get("chat") else text(said))
        yield event(usage(10, body["max_tokens"]))
        yield event(DONE)

    async def run() -> list[Answer]:
        mock = MockServer(script)
        async with mock.listening():
            settings = ClientSettings(**{"url": mock.url, "timeout_s": 60.0, **changed})
            target = target_of(settings.url, chat=settings.chat, key_variable=None)
            replayer = Replayer(settings, target, Payloads(settings, "tiny", 97))
            return await replayer.run(requests_of(trace), sessions=sessions_of(trace))

    return asyncio.run(run())


@pytest.mark.parametrize("fails", [False, True])
def test_every_turn_is_sent_once_after_the_answer_before_it_and_the_think_time(fails: bool) -> None:
    trace = some_users()
    assert trace.session is not None
    assert trace.think_s is not None
    answers = listen(trace, [], fails=fails)
    by_row = {answer.request.request_id: answer for answer in answers}
    assert sorted(by_row) == list(range(len(trace)))
    assert len(answers) == len(trace)
    assert any(answer.error for answer in answers) == fails
    after = next_turns(trace.session, trace.think_s)
    for before, following in enumerate(after.tolist()):
        if following >= 0:
            assert by_row[following].arrival_s == by_row[before].ended_s + trace.think_s[following]
    assert all(answer.sent_s >= answer.arrival_s for answer in answers)
    # A waiting session begins when some user's session has ended, and no end begins two. Users whose sessions end
    # within the same millisecond may take waiting sessions in either order.
    ends = [by_row[i].ended_s for i in np.flatnonzero(after < 0).tolist()]
    for first in waiting_sessions(trace.session, trace.think_s).tolist():
        ends.remove(next(end for end in ends if by_row[first].arrival_s == end + trace.think_s[first]))
    # Never more under way than there are users.
    spans = [(answer.sent_s, answer.ended_s) for answer in answers]
    assert max(sum(begin <= at < end for begin, end in spans) for at, _ in spans) <= 3


@pytest.mark.parametrize("chats", [False, True])
def test_a_prompt_of_text_begins_with_the_prompt_and_the_real_answer_before_it(tmp_path: Path, chats: bool) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 50)
    trace, bodies = some_users(users=1), []
    answers = listen(trace, bodies, chat=chats, text=str(tmp_path / "text.txt"))
    assert trace.session is not None
    turns = turn_numbers(trace.session)
    assert turns.max() >= 2
    for i, (body, answer) in enumerate(zip(bodies, answers, strict=True)):
        row = answer.request.request_id
        if chats:
            contents = [message["content"] for message in body["messages"]]
            roles = [message["role"] for message in body["messages"]]
            assert roles == (["user", "assistant"] * 99)[: 2 * turns[row] + 1]
            if turns[row]:
                assert contents[:-2] == [message["content"] for message in bodies[i - 1]["messages"]]
                assert contents[-2] == answers[i - 1].text == f" ({i}) ({i})"
        elif turns[row]:
            assert body["prompt"].startswith(bodies[i - 1]["prompt"] + f" ({i}) ({i})")
        else:
            assert "(" not in body["prompt"], "another session begins with nothing said"


def test_prompts_of_token_ids_have_the_lengths_of_the_trace_and_begin_alike_within_a_session() -> None:
    trace, bodies = some_users(users=1), []
    answers = listen(trace, bodies)
    assert trace.session is not None
    turns = turn_numbers(trace.session)
    for i, (body, answer) in enumerate(zip(bodies, answers, strict=True)):
        row, before = answer.request.request_id, bodies[i - 1]["prompt"]
        assert len(body["prompt"]) == trace.prompt_tokens[row]
        assert (body["prompt"][: len(before)] == before) == bool(turns[row])


def test_the_real_engine_serves_a_closed_loop() -> None:
    trace = some_users()
    with serving(config=ServerConfig(max_tokens=60)) as server:
        answers = send(trace, server.url)
    records = records_of(answers)
    assert (records.status == Status.FINISHED).all()
    assert sorted(records.prompt_tokens) == sorted(trace.prompt_tokens)
    assert sorted(records.produced_tokens) == sorted(trace.output_tokens)


def test_the_command_writes_which_turn_each_record_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lengths = {"prompt_tokens_p50": 3, "prompt_sigma": 0, "output_tokens_p50": 2, "output_sigma": 0}
    trace = ["trace=chat_users", "trace.users=2", "trace.sessions_per_user=2"]
    trace += [f"trace.lengths.{key}={value}" for key, value in lengths.items()]
    quick = ["trace.think_s=0.01", "trace.pause_s=0.01", "trace.ramp_up_s=0.01", "trace.max_context_tokens=30"]
    with serving(config=ServerConfig(max_tokens=60)) as server:
        arguments = [f"client.url={server.url}", "client.served_model=tiny", "model.vocab_size=97", *trace, *quick]
        assert exit_status(main, *arguments, "client.loop=closed") == 2
        assert exit_status(main, *arguments, "hydra.run.dir=run") == 0
    frame = pd.read_parquet(tmp_path / "run" / "records.parquet")
    assert frame.session.nunique() == 4
    assert sorted(frame.trace_row) == list(range(len(frame)))
    for _, turns in frame.groupby("session"):
        assert turns.turn.tolist() == list(range(len(turns)))
        assert (turns.arrival_s.to_numpy()[1:] >= turns.finish_s.to_numpy()[:-1]).all()
