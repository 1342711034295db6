"""Who may talk to the server: the host that a request names, and the token that it brings."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sim.serve.requests import ApiError, short

HOST = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[^\s:/@\[\]]+))(?::[0-9]+)?")
"""A Host header: an IPv6 address in brackets or another name, and a port."""
OPEN_PATHS = ("/health",)
"""Paths that need no token and no Host header: a load balancer may have neither."""


class Guard:
    """Refuses requests for another host, and requests without the token.

    A web page can make a browser send requests to this server under the page's own name (DNS rebinding). Such a request
    names a host that is neither an address nor ours.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], token: str | None) -> None:
        """Guard an app.

        Args:
            hosts: names that a request may name, besides any IP address; ``*`` allows all.
            token: what ``Authorization: Bearer`` has to bring; None asks for none.
        """
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)
        self._expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an allowed request on."""
        if scope["type"] == "http":
            refused = self._refusal(Headers(scope=scope), scope["path"])
            if refused is not None:
                headers = {"www-authenticate": "Bearer"} if refused.status == 401 else None
                await JSONResponse(refused.body(), refused.status, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers, path: str) -> ApiError | None:
        """Return why a request is refused, None if it is allowed."""
        host = headers.get("host", "")
        if not headers.getlist("host") and path in OPEN_PATHS:
            return None  # probes of HTTP/1.0 name no host
        if len(headers.getlist("host")) != 1 or not self._serves(host):
            return ApiError(400, f"the host {short(host)} is not served here; add its name to serve.hosts")
        if self._expected is None or path in OPEN_PATHS:
            return None
        brought = headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(brought, self._expected):
            return ApiError(
                401, "the token is missing or wrong; send Authorization: Bearer TOKEN", code="invalid_api_key"
            )
        return None

    def _serves(self, host: str) -> bool:
        """Return whether a Host header names this server: an IP address, or one of its names."""
        if "*" in self._hosts:
            return True
        found = HOST.fullmatch(host.lower())
        if found is None:
            return False
        name = found["address"] or found["name"].removesuffix(".")
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
