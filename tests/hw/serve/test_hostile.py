"""Clients that leave, come all at once, or send what is no request: the server refuses, and serves on."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="the server's tests need httpx and uvicorn: pip install -e '.[hw]'")
pytest.importorskip("uvicorn", reason="the server needs starlette and uvicorn: pip install -e '.[hw]'")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from hw.serve.server import ServerConfig  # noqa: E402
from sim.serve.engine_thread import _Command  # noqa: E402
from tests.hw.serve.loopback import Server, eventually, serving  # noqa: E402


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(config=ServerConfig(max_tokens=60, max_waiting=20, max_body_bytes=200_000)) as running:
        yield running


class Held:
    """Holds the engine between two iterations for the length of a block."""

    def __init__(self, server: Server) -> None:
        self._server, self._go = server, threading.Event()

    def __enter__(self) -> None:
        self._server.thread._put(_Command(lambda: self._go.wait(60) and None, lambda _: None))

    def __exit__(self, *_: object) -> None:
        self._go.set()


def idle(server: Server) -> bool:
    state = server.thread.state
    return not (server.thread.in_flight or state.running or state.waiting or state.kv_used_layer_blocks)


def send(server: Server, path: str, body: Any) -> socket.socket:
    """Send a request and return its open connection."""
    raw = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/{path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_its_first_token_is_noticed_and_its_request_canceled(
    server: Server, stream: bool
) -> None:
    with Held(server):
        for _ in range(5):
            body = {"prompt": [1, 2, 3], "max_tokens": 60, "ignore_eos": True, "stream": stream}
            send(server, "completions", body).close()
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "stream": stream}
        send(server, "chat/completions", chat).close()
        canceled = server.thread._commands
        eventually(lambda: canceled.qsize() >= 12, "six requests and six cancels never came")
    produced = server.thread.state.produced_tokens
    eventually(lambda: idle(server), "a request of a client that left goes on")
    assert server.thread.state.produced_tokens == produced


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_request_runs_frees_its_kv(server: Server, stream: bool) -> None:
    body = {"prompt": [1, 2, 3], "max_tokens": 60, "ignore_eos": True, "stream": stream}
    connections = [send(server, "completions", body) for _ in range(6)]
    eventually(lambda: server.thread.in_flight == 6 or server.thread.state.finished > 0, "nothing was submitted")
    for connection in connections:
        connection.close()
    eventually(lambda: idle(server), "a request of a client that left goes on")
    assert server.ask(prompt=[1], max_tokens=2).status_code == 200


def test_a_burst_of_a_thousand_is_refused_exactly_beyond_the_limit(server: Server) -> None:
    async def burst() -> list[int]:
        transport = httpx.ASGITransport(app=server.api.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:
            asked = [
                asyncio.create_task(client.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": 2}))
                for _ in range(1000)
            ]
            done = 0
            while done < 980:
                await asyncio.sleep(0.01)
                done = sum(task.done() for task in asked)
            held.__exit__()
            return [(await task).status_code for task in asked]

    held = Held(server)
    held.__enter__()
    statuses = asyncio.run(burst())
    assert statuses.count(429) == 980
    assert statuses.count(200) == 20
    assert server.ask(prompt=[1], max_tokens=2).status_code == 200


def test_an_engine_that_has_stopped_is_reported_with_its_reason_everywhere() -> None:
    with serving() as server:
        assert server.http.get("/health").status_code == 200
        server.thread.engine.run_until = lambda _: 1 / 0  # type: ignore[method-assign,assignment]
        server.thread._thread.join(60)
        for response in (
            server.http.get("/health"),
            server.ask(prompt="a", max_tokens=3),
            server.http.put("/plan", json={}),
        ):
            assert response.status_code == 503
            assert "division by zero" in response.json()["error"]["message"]


def test_a_client_that_still_sends_a_body_too_large_reads_why_it_is_refused(server: Server) -> None:
    connection = send(server, "completions", {"prompt": "a" * 3_000_000})
    connection.settimeout(60)
    assert connection.recv(1000).startswith(b"HTTP/1.1 413")


DEEP = "[" * 50_000 + "]" * 50_000


@pytest.mark.parametrize(
    "raw",
    [
        '{"prompt": "\\ud83d"}',
        '{"prompt": ["a\\udc00"]}',
        '{"prompt": "a", "stop": "\\ud83d"}',
        '{"prompt": "a", "user": "\\ud83d"}',
        '{"prompt": "a", "stream_options": 7}',
        '{"prompt": "a", "stream_options": "x"}',
        '{"prompt": "a", "stream": true, "stream_options": {"include_usage": "yes"}}',
        '{"prompt": "a", "stream": "false"}',
        '{"prompt": "a", "stream": 0}',
        '{"prompt": "a", "ignore_eos": "no"}',
        '{"prompt": "a", "max_tokens": "3"}',
        '{"prompt": "a", "max_tokens": 3.0}',
        '{"prompt": "a", "max_tokens": true}',
        f'{{"prompt": "a", "max_tokens": {"9" * 5000}}}',
        f'{{"prompt": [{"9" * 5000}]}}',
        '{"prompt": "a", "max_tokens": NaN}',
        '{"prompt": "a", "temperature": "hot"}',
        '{"prompt": [1.0]}',
        '{"prompt": [true]}',
        '{"prompt": [null]}',
        '{"prompt": {}}',
        DEEP,
        f'{{"prompt": {DEEP}}}',
        f'{{"prompt": "a", "logit_bias": {DEEP}}}',
        '{"prompt": "a"',
        "\x00",
    ],
    ids=lambda raw: raw[:60],
)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_what_is_no_request_is_refused_before_anything_is_submitted(server: Server, path: str, raw: str) -> None:
    if path.startswith("chat"):
        raw = raw.replace('"prompt": "', '"messages": [{"role": "user", "content": "hi"}], "user": "')
    before = server.thread._next_id
    response = server.http.post(f"/v1/{path}", content=raw)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert 0 < len(error["message"]) < 400
    assert server.thread._next_id == before


@pytest.mark.parametrize(
    "raw",
    [
        '{"kv_first_tokens": 2.0, "kv_last_tokens": 3.0}',
        '{"kv_first_tokens": 2, "kv_last_tokens": true}',
        '{"kv_first_tokens": 2, "kv_last_tokens": 99999999999999999999}',
        '{"kv_first_tokens": 2, "kv_last_tokens": 3, "kv_layers": [1.0]}',
        '{"drop_mha": [1.0]}',
        '{"drop_mha": [true]}',
        '{"drop_mha": "1"}',
        '{"drop_ffn": {"1": 2}}',
        '{"drop_ffn": null}',
        '{"prefill_drop_mha": [false]}',
        '{"weight_bits": 8.0}',
        '{"weight_bits": [16, 8.0, 16, 16]}',
        '{"weight_bits": true}',
        '{"weight_bits": {"a": 1}}',
        '{"max_running": 1.5}',
        '{"max_running": true}',
        '{"max_running": "3"}',
        '{"max_waiting": NaN}',
        '{"max_waiting": Infinity}',
        '{"max_waiting": 1e999}',
        f'{{"max_waiting": {"9" * 5000}}}',
        '{"admit": 1}',
        '{"drop_mha": ["\\ud800"]}',
        f'{{"drop_mha": {DEEP}}}',
    ],
    ids=lambda raw: raw[:60],
)
def test_a_plan_that_is_not_made_of_whole_numbers_is_refused_and_the_next_request_served(
    server: Server, raw: str
) -> None:
    response = server.http.put("/plan", content=raw)
    assert response.status_code == 400
    assert 0 < len(response.json()["error"]["message"]) < 400
    assert server.ask(prompt=[1, 2], max_tokens=2).status_code == 200
    assert server.http.get("/plan").json()["wanted"] == "dense"


FIELDS = [
    *("prompt", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options", "n", "stop", "seed"),
    *("temperature", "top_p", "ignore_eos", "model", "echo", "logprobs", "logit_bias", "user", "tools", "suffix"),
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 100),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["hi", "tiny", {"include_usage": True}, [1, 2], ["a", "b"], [{"role": "user", "content": "hi"}]]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "type", "text", "include_usage"]), inner, max_size=3),
    ),
    max_leaves=6,
)


@given(
    body=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6),
    base=st.booleans(),
    path=st.sampled_from(["completions", "chat/completions"]),
)
def test_nothing_that_a_client_sends_is_an_error_of_the_server(
    server: Server, body: dict[str, Any], base: bool, path: str
) -> None:
    if base:
        body = {"prompt": [1, 2], "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2} | body
    raw = json.dumps(body)
    response = server.http.post(f"/v1/{path}", content=raw)
    assert response.status_code in (200, 400, 404), raw
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
