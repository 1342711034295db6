"""Ports, hosts, tokens, slow clients and signals: everything around the answers."""

from __future__ import annotations

import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="the server's tests need httpx and uvicorn: pip install -e '.[hw]'")
pytest.importorskip("uvicorn", reason="the server needs starlette and uvicorn: pip install -e '.[hw]'")

from starlette.applications import Starlette  # noqa: E402
from starlette.datastructures import Headers  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import PlainTextResponse, StreamingResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402

from sim.errors import ConfigError  # noqa: E402
from sim.serve.connections import OrderlyServer, bind, listen, most_connections, url_of  # noqa: E402
from sim.serve.guard import Guard  # noqa: E402
from sim.serve.settings import TOKEN_VARIABLE, ServerConfig  # noqa: E402
from tests.hw.serve.loopback import eventually, serving  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]


# --- Configuration and ports -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": 99_999}, r"serve\.port is 99999; set it to 1 to 65535, or 0"),
        ({"port": -1}, r"serve\.port is -1"),
        ({"max_waiting": 0}, r"serve\.max_waiting is 0"),
        ({"max_connections": 0}, r"serve\.max_connections is 0"),
        ({"max_prompt_tokens": 0}, r"serve\.max_prompt_tokens is 0"),
        ({"drain_s": 0.0}, r"serve\.drain_s is 0"),
        ({"header_timeout_s": float("nan")}, r"serve\.header_timeout_s is nan"),
        ({"read_timeout_s": float("inf")}, r"serve\.read_timeout_s is inf"),
    ],
)
def test_a_value_that_cannot_be_served_is_refused_at_once(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig.of(values)


@pytest.mark.parametrize("token", ["", " ", "two words", "caf\u00e9", "line\nbreak"])
def test_a_token_that_no_client_could_send_is_refused(token: str) -> None:
    with pytest.raises(ConfigError, match=TOKEN_VARIABLE):
        ServerConfig(token=token).secret()


def test_a_port_in_use_is_an_error_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on port {port} of 127\.0\.0\.1 \(Address already"):
            bind(ServerConfig(port=port))


def test_a_port_that_another_server_took_while_the_model_loaded_is_an_error_too() -> None:
    with bind(ServerConfig(port=0)) as first:
        config = ServerConfig(port=first.getsockname()[1])
        with bind(config) as second:  # neither listens yet
            listen(first, config)
            with pytest.raises(ConfigError, match="cannot listen on port"):
                listen(second, config)


def test_a_host_without_an_address_is_an_error() -> None:
    for host in ("no.such.host.invalid", "x" * 80, "300.1.1.1"):
        with pytest.raises(ConfigError, match=r"serve\.host is"):
            bind(ServerConfig(host=host))


@pytest.mark.parametrize(
    ("host", "exposed"),
    [("127.0.0.1", False), ("127.3.4.5", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("::", True),
     ("10.0.0.1", True), ("gpu7", True)],
)  # fmt: skip
def test_a_server_that_other_machines_can_reach_is_known(host: str, exposed: bool) -> None:
    assert ServerConfig(host=host).exposed is exposed


def test_the_limit_of_open_files_is_raised_for_the_connections() -> None:
    assert 1 <= most_connections(100) <= 100


# --- Hosts and tokens ------------------------------------------------------------------------------------------------


def guarded(hosts: list[str], token: str | None = None) -> Any:
    async def hello(_: Request) -> PlainTextResponse:
        return PlainTextResponse("hello")

    names = ServerConfig(hosts=hosts).host_names()
    return Starlette(
        routes=[Route("/health", hello), Route("/plan", hello, methods=["GET", "PUT"])],
        middleware=[Middleware(Guard, hosts=names, token=token)],
    )


def asks(app: Any, path: str = "/plan", method: str = "PUT", **headers: str) -> Any:
    import asyncio

    async def ask() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:8000", "localhost", "LocalHost:8000", "localhost.", "[::1]:8000", "10.1.2.3", "mine"],
)
def test_an_address_or_a_name_of_the_server_is_served(host: str) -> None:
    assert asks(guarded(["mine"]), host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "", "127.0.0.1.evil.example", "localhost.evil.example", "[::1", "::1", "a b",
     "localhost:80:evil.example", "localhost:evil", "localhost@evil.example", "[::1].evil.example"],
)  # fmt: skip
def test_another_name_is_refused_before_it_reaches_the_plan(host: str) -> None:
    answer = asks(guarded(["mine"]), host=host)
    assert answer.status_code == 400
    assert "serve.hosts" in answer.json()["error"]["message"]


def test_a_probe_of_http_1_0_without_a_host_reaches_health_alone() -> None:
    guard = Guard(guarded([]), hosts=[], token="secret")
    assert guard._refusal(Headers({}), "/health") is None
    refused = guard._refusal(Headers({}), "/plan")
    assert refused is not None
    assert refused.status == 400


def test_all_names_can_be_allowed() -> None:
    assert asks(guarded(["*"]), host="any.example").status_code == 200


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer ", "Bearer wrong", "secret", "Basic secret"])
def test_without_the_token_a_request_is_refused_in_openais_shape(authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    answer = asks(guarded([], "secret"), **headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "secret" not in answer.text


def test_with_the_token_a_request_is_served_and_health_needs_none() -> None:
    assert asks(guarded([], "secret"), authorization="Bearer secret").status_code == 200
    assert asks(guarded([], "secret"), "/health", "GET").status_code == 200


def test_the_token_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "from-outside")
    assert ServerConfig().secret() == "from-outside"
    assert ServerConfig(token="own").secret() == "own"
    assert "from-outside" not in repr(ServerConfig())


def test_every_path_of_the_server_is_guarded() -> None:
    with serving(config=ServerConfig(max_tokens=60, token="secret")) as server:
        assert server.http.get("/health").status_code == 200
        for path in ("/metrics", "/plan", "/v1/models", "/nothing"):
            assert server.http.get(path).status_code == 401
            assert server.http.get(path, headers={"host": "evil.example"}).status_code == 400
        assert server.ask(prompt="a", max_tokens=2).status_code == 401
        server.http.headers["authorization"] = "Bearer secret"
        assert server.ask(prompt="a", max_tokens=2).status_code == 200


# --- Slow clients ----------------------------------------------------------------------------------------------------


@contextmanager
def orderly(config: ServerConfig) -> Iterator[tuple[str, int]]:
    """Run an app that echoes the length of a body under the server's own rules."""

    async def echo(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(len(await request.body())))

    async def hello(_: Request) -> PlainTextResponse:
        return PlainTextResponse("hello")

    async def burst(_: Request) -> StreamingResponse:
        return StreamingResponse(events())

    async def events() -> AsyncIterator[str]:
        yield "first"
        time.sleep(0.5)  # the event loop is busy, so it does not hear that the client leaves
        for _ in range(50):
            yield "another"

    with bind(config) as listener:
        listen(listener, config)
        more = [Route("/echo", echo, methods=["POST"]), Route("/burst", burst)]
        app = Starlette(routes=[*more, Route("/", hello, methods=["GET", "POST"])])
        server = OrderlyServer(app, listener, config, "ready")
        thread = threading.Thread(target=server.serve_until_stopped, daemon=True)
        thread.start()
        eventually(lambda: server.started, "the server never started")
        yield listener.getsockname()[:2]
        server.should_exit = True
        thread.join(30)


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.01)
    try:
        return connection.recv(65_536) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /echo HTTP/1.1\r\nhost: a\r\n", b"GET / HTTP/1.1\r\nhost: a\r\n\r\nGET", b"\r\n"],
    ids=["nothing", "half a head", "half a second head", "an empty line"],
)
def test_connections_that_send_no_complete_head_are_closed(sent: bytes) -> None:
    with orderly(ServerConfig(port=0, header_timeout_s=0.3)) as address:
        slow = [socket.create_connection(address) for _ in range(60)]
        for connection in slow:
            connection.sendall(sent)
        for connection in slow:
            eventually(lambda connection=connection: is_closed(connection), "a slow connection stays open")
        assert httpx.get(f"http://{address[0]}:{address[1]}/").text == "hello"


def test_nothing_is_logged_when_a_client_breaks_off_a_stream(caplog: pytest.LogCaptureFixture) -> None:
    with orderly(ServerConfig(port=0)) as address:
        connection = socket.create_connection(address)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with a reset
        connection.sendall(b"GET /burst HTTP/1.1\r\nhost: a\r\n\r\n")
        assert connection.recv(65_536)
        connection.close()
        time.sleep(0.7)
        assert httpx.get(f"http://{address[0]}:{address[1]}/").text == "hello"
    # The client of this test logs its own request where another test has turned that on.
    assert [record.message for record in caplog.records if record.name != "httpx"] == []


def drip_closes(connection: socket.socket, byte: bytes) -> bool:
    """Send one more byte; return whether the server has closed the connection."""
    try:
        connection.sendall(byte)
    except OSError:
        return True
    return is_closed(connection)


def test_a_connection_that_drips_its_head_is_closed_at_the_deadline() -> None:
    with orderly(ServerConfig(port=0, header_timeout_s=0.3)) as address:
        dripping = socket.create_connection(address)
        eventually(lambda: drip_closes(dripping, b"G"), "a dripping connection stays open")


def test_a_connection_that_drips_a_body_after_its_answer_is_closed() -> None:
    with orderly(ServerConfig(port=0, header_timeout_s=0.3)) as address:
        dripping = socket.create_connection(address)
        dripping.sendall(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n")
        eventually(lambda: drip_closes(dripping, b"x"), "a dripping connection stays open")


def test_a_connection_in_use_is_not_closed_by_the_deadline_of_its_head() -> None:
    with orderly(ServerConfig(port=0, header_timeout_s=0.2)) as address:
        connection = socket.create_connection(address)
        connection.sendall(b"POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nab")
        time.sleep(0.5)
        connection.sendall(b"cd")
        answer = b""
        while not answer.endswith(b"\r\n\r\n4"):
            part = connection.recv(1000)
            assert part, "the connection was closed"
            answer += part


def test_a_body_that_does_not_come_is_answered_at_the_deadline() -> None:
    with serving(config=ServerConfig(max_tokens=60, read_timeout_s=0.2)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n{")
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_more_connections_than_allowed_are_refused() -> None:
    with orderly(ServerConfig(port=0, max_connections=5)) as address:
        held = [socket.create_connection(address) for _ in range(10)]
        url = f"http://{address[0]}:{address[1]}/"
        eventually(lambda: httpx.get(url).status_code == 503, "an eleventh connection was served")
        for connection in held:
            connection.close()
        eventually(lambda: httpx.get(url).status_code == 200, "the server never recovered")


# --- Signals ---------------------------------------------------------------------------------------------------------

PROGRAM = """
import asyncio, sys
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route
from sim.serve.connections import OrderlyServer, bind, listen, url_of
from sim.serve.settings import ServerConfig

async def slow(request):
    async def parts():
        yield "begin "
        for _ in range(int(request.query_params["tenths"])):
            await asyncio.sleep(0.1)
        yield "end"
    return StreamingResponse(parts())

config = ServerConfig(port=0, drain_s=float(sys.argv[1]))
listener = bind(config)
listen(listener, config)
OrderlyServer(Starlette(routes=[Route("/slow", slow)]), listener, config, url_of(listener)).serve_until_stopped()
print("drained")
"""


@contextmanager
def program(drain_s: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    running = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(drain_s)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert running.stdout is not None
        yield running, running.stdout.readline().strip()
    finally:
        running.kill()
        running.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_answers_under_way_end_and_the_exit_status_is_zero(number: signal.Signals) -> None:
    with program(60) as (running, url), httpx.stream("GET", f"{url}/slow?tenths=10", timeout=60) as response:
        parts = response.iter_text()
        assert next(parts) == "begin "
        running.send_signal(number)
        assert "".join(parts) == "end"
        output, errors = running.communicate(timeout=60)
        assert running.returncode == 0, errors
        assert output.strip() == "drained"
        assert "a second signal ends at once" in errors


def test_a_second_signal_ends_at_once() -> None:
    with program(60) as (running, url), httpx.stream("GET", f"{url}/slow?tenths=600", timeout=60) as response:
        parts = response.iter_text()  # the connection closes with this generator
        assert next(parts) == "begin "
        running.send_signal(signal.SIGTERM)
        assert running.stderr is not None
        running.stderr.readline()
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=30) == 128 + signal.SIGTERM


def test_an_answer_that_takes_too_long_does_not_hold_the_exit() -> None:
    with program(1) as (running, url), httpx.stream("GET", f"{url}/slow?tenths=600", timeout=60) as response:
        parts = response.iter_text()  # the connection closes with this generator
        assert next(parts) == "begin "
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=50) == 0


def test_the_url_of_a_socket_can_be_called() -> None:
    with bind(ServerConfig(port=0)) as listener:
        assert url_of(listener).startswith("http://127.0.0.1:")
