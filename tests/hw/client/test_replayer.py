"""The client on loopback: whatever a server sends, each request ends, and the others go on."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("httpx", reason="hw.client needs httpx: pip install -e '.[hw]'")

from hw.client.payload import Payloads
from hw.client.replayer import Answer, Replayer
from hw.client.run import client_figures, gaps_of, records_of, summary_of, warnings_of
from hw.client.settings import ClientSettings
from hw.client.target import target_of
from sim.engine.protocol import Request
from sim.results.metrics import Slo
from sim.results.records import Status
from tests.hw.client.mock_server import (
    DONE,
    MockServer,
    Script,
    Step,
    chat,
    event,
    head,
    plain,
    text,
    usage,
)

CUT = "the connection was cut in the middle of the answer"


def ask(script: Script, *, rows: Iterable[tuple[float, int, int]] = ((0.0, 5, 12),), **settings: Any) -> list[Answer]:
    """Send requests (arrival_s, prompt_tokens, output_tokens) to a server with this script."""

    async def run() -> list[Answer]:
        mock = MockServer(script)
        async with mock.listening():
            return await replayer(mock.url, **settings).run(requests)

    requests = [
        Request(request_id=i, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
        for i, (arrival_s, prompt, output) in enumerate(rows)
    ]
    return asyncio.run(run())


def replayer(url: str, **changed: Any) -> Replayer:
    settings = ClientSettings(**{"url": url, "timeout_s": 60.0, **changed})
    target = target_of(settings.url, chat=settings.chat, key_variable=settings.api_key)
    return Replayer(settings, target, Payloads(settings, "tiny", 97))


def script(*steps: Step) -> Script:
    """Return a script that sends these steps, whatever was requested."""
    return lambda _body: steps


PIECES = b"".join(event(text("a")) for _ in range(12))
END = event(usage(5, 12)) + event(DONE)


@pytest.mark.parametrize(
    "steps",
    [
        (head(), PIECES, END),
        (head(kind="text/event-stream; charset=utf-8"), PIECES, END),
        (head(kind=None), PIECES, END),
        (head(kind="text/plain"), PIECES, END),
        (head(), b": ping\n\n", PIECES, b": ping\n\n: ping\n", END),
        (head(), PIECES.replace(b"\n", b"\r\n"), END),
        (head(), PIECES.replace(b"\n", b"\r"), END),
        (head(), PIECES.replace(b"data: ", b"data:"), END),
        (head(), PIECES.replace(b"data: ", b"event: message\nid: 1\nretry: 10\ndata: "), END),
        (head(), PIECES.replace(b'{"choices": ', b'{"choices":\ndata: '), END),
        (head(), "\ufeff".encode(), PIECES, END),
        (head(), PIECES, event(usage(5, 12))),
        (head(), PIECES, END.rstrip()),
        (head(), PIECES, event(usage(5, 12)).rstrip()),
        (head(), *[bytes([byte]) for byte in PIECES], END),
        (head(**{"content-encoding": "gzip"}), gzip.compress(PIECES + END)),
        (head(), PIECES.replace(b'"a"', '"\u2028\x85é"'.encode()), END),
        (head(), PIECES.replace(b'"a"', b'"\xff\xfe"'), END),
        (head(), event("null"), event(text("")), PIECES, event({"choices": None}), END),
    ],
)
def test_any_stream_of_twelve_tokens_has_twelve_tokens(steps: tuple[Step, ...]) -> None:
    (answer,) = ask(script(*steps))
    assert answer.error is None
    assert answer.timeline is not None
    assert (answer.timeline.tokens, answer.timeline.prompt_tokens) == (12, 5)
    assert sum(answer.timeline.piece_tokens) == 12
    assert answer.arrival_s <= answer.sent_s <= answer.timeline.piece_s[0]


def test_times_are_those_at_which_the_pieces_came() -> None:
    def slow(_body: dict[str, Any]) -> Iterable[Step]:
        yield head()
        yield event(chat({"role": "assistant", "content": ""}))
        yield 0.2
        yield event(chat({"reasoning_content": "hm"}))
        yield 0.3
        yield event(chat({"content": "a"}))
        yield 0.4
        yield event(chat({}, "length")) + event(DONE)

    (answer,) = ask(slow, rows=[(0.0, 5, 2)])
    assert answer.timeline is not None
    first_s, last_s = answer.timeline.piece_s
    assert first_s >= 0.2
    assert last_s >= 0.5
    records = records_of([answer])
    assert records.ttft_s[0] == first_s
    assert records.e2e_s[0] == last_s, "the end of the stream is no token"


HTML = b"<html><head><title>502\n Bad Gateway</title></head><body><h1>nginx</h1></body></html>"


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ((head("400 Bad Request", "application/json"), b'{"error": {"message": "too long"}}'), "HTTP 400: too long"),
        (
            (head("404 Not Found", "application/json"), b'{"detail": "Not Found"}'),
            "HTTP 404: Not Found; check client.url",
        ),
        ((head("401 Unauthorized", None), b"who?"), "HTTP 401: who?; set client.api_key"),
        ((head("429 Too Many Requests", "application/json"), b'{"error": "slow down"}'), "HTTP 429: slow down"),
        ((head("500 Internal Server Error", "text/plain"), b"\x1b[31mred\x00\n\nline"), "HTTP 500: ?[31mred? line"),
        ((head("503 Service Unavailable", None), b""), "HTTP 503: no explanation"),
        ((head("502 Bad Gateway", "text/html"), HTML), "HTTP 502: 502 Bad Gateway"),
        ((head("500 Internal Server Error", "application/json"), b"[" * 70_000), "HTTP 500: [[["),
        ((head("200 OK", "text/html"), HTML), "answered with a web page (502 Bad Gateway); check client.url"),
        (
            (head("307 Temporary Redirect", None, location="https://b/v1/x"), b""),
            "redirects to https://b/v1/x; set client",
        ),
        ((head("200 OK", "application/json"), b'{"choices": [{"text": "aa"}]}'), "answered without streaming"),
        ((head("200 OK", "application/json"), b'{"error": {"message": "no memory"}}'), "no memory"),
        ((head(),), "the answer had no token"),
        ((b"",), "the connection was cut before the first token"),
        ((b"nonsense\r\n\r\n",), "the connection was cut before the first token"),
        ((head(), event(text("a"))), CUT),
        ((head(), event(text("a")), b'data: {"choices"'), "not JSON"),
        (
            (head(**{"transfer-encoding": "chunked"}), b"5\r\n: hi\n\r\n", b"zz"),
            "the connection was cut before the first token",
        ),
        ((head(**{"content-length": "9999"}), event(text("a"))), CUT),
        ((head(**{"content-encoding": "gzip"}), b"not gzip"), "DecodingError"),
        ((head(), event(text("a")), event({"error": {"message": "EngineCore died"}}), END), "EngineCore died"),
        ((head(), event(text("a")), b'event: error\ndata: {"message": "gone"}\n\n'), "gone"),
    ],
)
def test_a_failed_request_names_its_reason_and_is_not_finished(steps: tuple[Step, ...], reason: str) -> None:
    (answer,) = ask(script(*steps))
    assert answer.timeline is None
    assert answer.error is not None
    assert reason in answer.error
    assert answer.error.isprintable()
    assert len(answer.error) < 400
    records = records_of([answer])
    assert records.status.tolist() == [Status.REJECTED]
    assert np.isnan(records.first_token_s).all()


def test_a_connection_that_is_cut_after_the_end_of_the_answer_is_no_failure() -> None:
    chunk = PIECES + event(text("", "length"))
    steps = (head(**{"transfer-encoding": "chunked"}), f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
    (answer,) = ask(script(*steps))
    assert answer.timeline is not None
    assert answer.timeline.tokens == 12


@pytest.mark.parametrize("before", [(), (head(),), (head(), b": ping\n\n"), (head("500 Oh", None), b"because")])
def test_a_server_that_says_nothing_meets_the_timeout(before: tuple[Step, ...]) -> None:
    (answer,) = ask(script(*before, 60.0), timeout_s=0.3)
    assert answer.error == "client.timeout_s=0.3 passed before the first token"


def test_a_trickle_meets_the_timeout_of_the_request() -> None:
    def trickle(_body: dict[str, Any]) -> Iterable[Step]:
        yield head()
        for _ in range(600):
            yield event(text("a"))
            yield 0.05

    (answer,) = ask(trickle, rows=[(0.0, 5, 600)], timeout_s=0.5)
    assert answer.error == "client.timeout_s=0.5 passed before the end of the answer"


def test_waiting_for_a_connection_counts_in_ttft_but_not_in_the_timeout() -> None:
    def slow(body: dict[str, Any]) -> Iterable[Step]:
        return [0.2, *plain(body)]

    answers = ask(slow, rows=[(0.0, 5, 1)] * 8, max_connections=1, timeout_s=1.4)
    ttft_s = records_of(answers).ttft_s
    assert [a.error for a in answers] == [None] * 8
    assert max(ttft_s) >= 1.6


def test_no_answer_ends_the_run_and_equal_reasons_are_counted() -> None:
    def mixed(body: dict[str, Any]) -> Iterable[Step]:
        kind = len(body["prompt"])
        return plain(body) if kind == 1 else [[b""], [head("500 Oh", "application/json"), b'{"error": "no"}']][kind % 2]

    answers = ask(mixed, rows=[(0.0, 1 + i % 3, 3) for i in range(12)])
    assert [a.timeline is not None for a in answers] == [True, False, False] * 4
    figures = client_figures(answers)
    assert figures["failed"] == 8
    assert sorted(error["requests"] for error in figures["errors"]) == [4, 4]
    summary = summary_of(answers, Slo())
    assert (summary["finished"], summary["rejected"]) == (4, 8)


def test_an_answer_without_end_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hw.client.replayer.MOST_ANSWER_CHARACTERS", 10_000)
    (answer,) = ask(script(head(), b"data: ", *[b"x" * 1000] * 100, 60.0))
    assert answer.error == "the answer has more than 10,000 characters"


def test_a_failed_request_is_sent_again_only_with_retries() -> None:
    tries = iter(range(9))

    def third_time(body: dict[str, Any]) -> Iterable[Step]:
        return plain(body) if next(tries) == 2 else [head("503 Busy", None)]

    (answer,) = ask(third_time, retries=5)
    assert (answer.error, answer.retries) == (None, 2)
    (answer,) = ask(script(head("503 Busy", None)), retries=1)
    assert (answer.error, answer.retries) == ("HTTP 503: no explanation", 1)


def test_the_gaps_of_all_answers_are_counted_per_token() -> None:
    def four(_body: dict[str, Any]) -> Iterable[Step]:
        yield head()
        for _ in range(3):
            yield 0.2
            yield event(text("abcd"))
        yield END

    answers = ask(four)
    gaps = gaps_of(answers)
    assert gaps.count.sum() == 8
    assert (gaps.count % 4 == 0).all()
    assert client_figures(answers)["itl"] == "per token"


def test_gaps_between_pieces_are_named_so() -> None:
    answers = ask(script(head(), PIECES, event(text("", "length")), event(DONE)))
    figures = client_figures(answers)
    assert (figures["itl"], figures["inter_chunk_answers"]) == ("inter-chunk", 1)
    assert "inter-chunk" in warnings_of(figures, ClientSettings())[0]


def test_records_state_the_prompt_tokens_of_usage_and_a_large_difference_is_a_warning() -> None:
    answers = ask(script(head(), PIECES, event(usage(43, 12)), event(DONE)), rows=[(0.0, 40, 12)] * 3)
    assert records_of(answers).prompt_tokens.tolist() == [43] * 3
    assert warnings_of(client_figures(answers), ClientSettings()) == []
    (warning,) = warnings_of(
        client_figures(ask(script(head(), PIECES, event(usage(50, 12)), event(DONE)), rows=[(0.0, 40, 12)] * 3)),
        ClientSettings(text="some.txt"),
    )
    assert "counted 150 prompt tokens, the trace has 120 (+25%)" in warning
    assert "client.characters_per_token=3.2" in warning


def test_a_text_that_is_too_short_is_repeated(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("ten tokens")
    settings = ClientSettings(text=str(file), chat=True)
    payloads = Payloads(settings, "tiny", 97)
    sent = [
        payloads(Request(request_id=i, arrival_s=0.0, prompt_tokens=4000, output_tokens=1))["messages"][0]["content"]
        for i in range(8)
    ]
    assert {len(content) for content in sent} == {16_000}
    assert all(content in "ten tokens" * 1602 for content in sent)
    assert len(set(sent)) > 1, "prompts should differ"


def test_a_key_is_sent_but_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "sk-secret ")

    async def run() -> tuple[MockServer, list[Answer]]:
        refused = head("401 Unauthorized", "application/json") + json.dumps({"error": "bad key sk-secret"}).encode()
        mock = MockServer(script(refused))
        async with mock.listening():
            request = Request(request_id=0, arrival_s=0.0, prompt_tokens=1, output_tokens=1)
            sender = replayer(mock.url, api_key="THE_KEY")
            assert "secret" not in repr(sender._target)
            return mock, await sender.run([request])

    mock, (answer,) = asyncio.run(run())
    assert "authorization: bearer sk-secret\r\n" in mock.heads[0].lower()
    assert answer.error is not None
    assert "bad key ***" in answer.error
