"""The address of a server as people write it, proxies on the way, and keys."""

from __future__ import annotations

import pytest

pytest.importorskip("httpx", reason="hw.client needs httpx: pip install -e '.[hw]'")

from hw.client.target import target_of
from sim.errors import ConfigError

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("url", "completions"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1/completions"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1/completions"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1/completions"),
        ("http://127.0.0.1:8000/v1//", "http://127.0.0.1:8000/v1/completions"),
        (" http://127.0.0.1:8000/v1/completions ", "http://127.0.0.1:8000/v1/completions"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000/v1/completions"),
        ("localhost:8000/v1", "http://localhost:8000/v1/completions"),
        ("HTTP://Host", "http://Host/v1/completions"),
        ("[::1]:8000", "http://[::1]:8000/v1/completions"),
        ("https://host/gateway/v1/", "https://host/gateway/v1/completions"),
    ],
)
def test_an_address_is_taken_as_people_write_it(url: str, completions: str) -> None:
    assert target_of(url, chat=False, key_variable=None).url == completions
    for ending in ("/chat/completions", ""):
        chat = target_of(url.strip().removesuffix("/completions") + ending, chat=True, key_variable=None)
        if ending and "/v1" not in url:
            continue
        assert chat.url == completions.replace("/completions", "/chat/completions")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "needs a host"),
        ("http://", "needs a host"),
        ("http://:8000", "needs a host"),
        ("http://h:0", "needs a host and a port"),
        ("http://h:99999", "no address"),
        ("http://h:port", "no address"),
        ("http://[::1:8000", "no address"),
        ("8000", "a port without a host"),
        ("http:/127.0.0.1:8000", "two slashes"),
        ("https:host", "two slashes"),
        ("ftp://h", "must start with http"),
        ("http://a b", "client.url is"),
        ("http://h/?version=2", "leave out what follows"),
        ("http://h/#top", "leave out what follows"),
        ("http://h/v1/chat/completions", "client.chat=true"),
    ],
)
def test_an_address_that_cannot_be_is_refused_with_one_that_can(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        target_of(url, chat=False, key_variable=None)


def test_an_address_of_completions_is_refused_for_chats() -> None:
    with pytest.raises(ConfigError, match=r"client\.chat=false"):
        target_of("http://h/v1/completions", chat=True, key_variable=None)


@pytest.mark.parametrize("url", ["http://me:pw@h", "http://me@h:1", "me:pw@h"])
def test_a_password_in_an_address_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"client\.api_key") as caught:
        target_of(url, chat=False, key_variable=None)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "http://127.9.9.9", "localhost:1", "http://[::1]:1", "http://a.localhost"]
)
def test_loopback_is_reached_without_the_proxy(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    target = target_of(url, chat=False, key_variable=None)
    assert target.proxy is None
    target.transport(4)


@pytest.mark.parametrize(
    ("variable", "value", "shown"),
    [
        ("ALL_PROXY", "socks9://me:pw@proxy:9/x", "ALL_PROXY=socks9://***@proxy:9/x"),
        ("all_proxy", "http://proxy:port", "all_proxy=http://proxy:port"),
        ("http_proxy", "ftp://proxy", "http_proxy=ftp://proxy"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, shown: str
) -> None:
    monkeypatch.setenv(variable, value)
    target = target_of("http://server.example", chat=False, key_variable=None)
    with pytest.raises(ConfigError, match=r"add server\.example to NO_PROXY") as caught:
        target.transport(4)
    assert shown in str(caught.value)
    assert "pw" not in str(caught.value)


def test_the_proxy_of_the_scheme_is_used_unless_no_proxy_names_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "proxy:3128")
    monkeypatch.setenv("ALL_PROXY", "http://other")
    for url, proxy in (("http://server.example", "http://proxy:3128"), ("https://server.example", "http://other")):
        target = target_of(url, chat=False, key_variable=None)
        assert target.proxy == proxy
        target.transport(4)
    monkeypatch.setenv("NO_PROXY", "server.example")
    assert target_of("http://server.example:80", chat=False, key_variable=None).proxy is None


def test_the_key_comes_from_the_named_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", " sk-1\n")
    assert target_of("h", chat=False, key_variable="SOME_KEY").headers["Authorization"] == "Bearer sk-1"
    assert "Authorization" not in target_of("h", chat=False, key_variable=None).headers
    for variable, value in (("SOME_KEY", " "), ("SOME_KEY", "schlüssel"), ("sk-typed-here", None)):
        if value is not None:
            monkeypatch.setenv(variable, value)
        with pytest.raises(ConfigError) as caught:
            target_of("h", chat=False, key_variable=variable)
        assert "sk-typed" not in str(caught.value)
