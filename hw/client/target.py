"""Where requests go: the server's address, a proxy on the way, and the key that it wants."""

from __future__ import annotations

import ipaddress
import os
import urllib.request
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit, urlunsplit

import httpx

from sim.errors import ConfigError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
EXAMPLE = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server.

    base: its address without /v1. path: the endpoint that requests go to.
    proxy_name, proxy: the environment variable that names a proxy, and the proxy; None to connect directly.
    key: sent as ``Authorization: Bearer``; None for none.
    """

    base: str
    path: str
    proxy_name: str | None = None
    proxy: str | None = field(default=None, repr=False)
    key: str | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """Address of the endpoint."""
        return self.base + self.path

    @property
    def shown_proxy(self) -> str:
        """The proxy as messages name it, without a password."""
        return f"{self.proxy_name}={_without_password(self.proxy or '')}"

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        # A server that compresses a stream delivers tokens in groups.
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity", "Cache-Control": "no-store"}
        return headers | ({"Authorization": f"Bearer {self.key}"} if self.key is not None else {})

    def transport(self, max_connections: int) -> httpx.AsyncHTTPTransport:
        """Return what opens connections.

        Raises:
            ConfigError: for a proxy that cannot be used.
        """
        # A connection that waits for a later request may be closed by the server just when that is sent.
        limits = httpx.Limits(max_connections=max_connections, max_keepalive_connections=0)
        try:
            return httpx.AsyncHTTPTransport(proxy=self.proxy, limits=limits)
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            if self.proxy is None:
                raise
            host = urlsplit(self.base).hostname
            reason = " ".join(str(error).split()).replace(self.proxy, _without_password(self.proxy))
            raise ConfigError(
                f"the environment sets the proxy {self.shown_proxy}, which cannot be used: {reason}; unset it, add "
                f"{host} to NO_PROXY, or set an http:// proxy"
            ) from error


def target_of(url: str, *, chat: bool, key_variable: str | None) -> Target:
    """Read where requests go.

    Args:
        url: of the server, with or without a scheme, /v1 and the endpoint's path.
        chat: send chats.
        key_variable: the environment variable that holds the key; None for no key.
    Raises:
        ConfigError: for a URL, a key or a proxy that cannot be used.
    """
    parts = _split(url.strip())
    base = urlunsplit((parts.scheme, parts.netloc, _base_path(parts.path, chat=chat), "", ""))
    name, proxy = (None, None) if _is_loopback(parts.hostname or "") else _proxy_for(parts)
    return Target(
        base=base, path=CHAT if chat else COMPLETIONS, proxy_name=name, proxy=proxy, key=_read_key(key_variable)
    )


def _split(url: str) -> SplitResult:
    """Return the parts of a URL, which may lack the scheme."""
    if url.isdigit():
        raise ConfigError(f"client.url is {url!r}, a port without a host; set it like {EXAMPLE}")
    if url.lower().startswith(("http:", "https:")) and "://" not in url:
        raise ConfigError(f"client.url is {_without_password(url)!r}; write two slashes, like {EXAMPLE}")
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        port = parts.port
        httpx.URL(full)
    except (ValueError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"client.url is {_without_password(url)!r}, which is no address: {error}; set it like {EXAMPLE}"
        ) from error
    if "@" in parts.netloc:
        raise ConfigError(
            "client.url holds a user name or a password, which the run folder would show; remove it, and set "
            "client.api_key to the name of an environment variable that holds a key"
        )
    if parts.scheme not in ("http", "https"):
        raise ConfigError(f"client.url is {url!r}; it must start with http:// or https://, like {EXAMPLE}")
    if not parts.hostname or any(c.isspace() for c in full) or port == 0:
        raise ConfigError(f"client.url is {url!r}; it needs a host and a port from 1 to 65535, like {EXAMPLE}")
    if parts.query or parts.fragment:
        raise ConfigError(f"client.url is {url!r}; leave out what follows the path, like {EXAMPLE}")
    return parts


def _base_path(path: str, *, chat: bool) -> str:
    """Return the path before /v1."""
    path = path.rstrip("/")
    for endpoint, is_chat in (("/chat/completions", True), ("/completions", False)):
        if path.endswith(endpoint):
            if is_chat != chat:
                wanted = "client.chat=true client.text=FILE" if is_chat else "client.chat=false"
                raise ConfigError(f"client.url ends with {endpoint}; set {wanted}, or leave out this ending")
            path = path.removesuffix(endpoint).rstrip("/")
            break
    return path.removesuffix("/v1").rstrip("/")


def _is_loopback(host: str) -> bool:
    """Return whether a host is this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _proxy_for(parts: SplitResult) -> tuple[str | None, str | None]:
    """Return the variable that sets a proxy for this server, and the proxy; (None, None) for a direct connection."""
    if urllib.request.proxy_bypass(parts.netloc):
        return None, None
    proxies = urllib.request.getproxies()
    scheme = next((scheme for scheme in (parts.scheme, "all") if proxies.get(scheme)), None)
    if scheme is None:
        return None, None
    variable = f"{scheme}_proxy"
    name = next((name for name in os.environ if name.lower() == variable and os.environ[name]), variable.upper())
    proxy = proxies[scheme]
    return name, proxy if "://" in proxy else f"http://{proxy}"


def _without_password(url: str) -> str:
    """Return a URL with a user name and password replaced."""
    scheme, separator, rest = url.rpartition("://")
    authority, slash, path = rest.partition("/")
    return scheme + separator + ("***@" if "@" in authority else "") + authority.rpartition("@")[2] + slash + path


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        # The value is not shown: it may be the key itself.
        raise ConfigError(
            "client.api_key must be the name of an environment variable that holds the key, and no variable of that "
            "name is set; for example: export OPENAI_API_KEY=..., then client.api_key=OPENAI_API_KEY"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the key in {variable} has characters that an HTTP header cannot hold; set it again")
    return key
