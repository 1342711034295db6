"""The configuration under ``serve``: where to listen, who may ask, and what to refuse."""

from __future__ import annotations

import ipaddress
import math
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from sim.errors import ConfigError

TOKEN_VARIABLE = "RAP_LAB_SERVE_TOKEN"
MOST_PORT = 65_535


@dataclass(kw_only=True)
class ServerConfig:
    """Where to listen, who may ask, and what to refuse.

    host, port: 127.0.0.1 serves this machine alone; port 0 takes a free one.
    hosts: names under which clients may reach the server, besides its addresses, localhost, ``host`` and this machine's
        name; ``[*]`` allows all.
    token: clients must send ``Authorization: Bearer TOKEN``. The environment variable RAP_LAB_SERVE_TOKEN sets it
        without a trace in a process list or a file; null and no variable: no token.
    max_body_bytes: of one request. max_tokens: of one answer. max_prompt_tokens: of one prompt; null takes the model's.
    max_choices: answers of one request: its prompts times n.
    max_waiting: requests that may be submitted and not ended, waiting and running; more are refused (HTTP 429).
    max_connections: open at once; more are refused (HTTP 503).
    header_timeout_s, read_timeout_s: how long the head and the body of a request may take.
    drain_s: how long answers under way may take once the server is stopped.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    hosts: list[str] = field(default_factory=list)
    token: str | None = None
    max_body_bytes: int = 1 << 20
    max_tokens: int = 1024
    max_prompt_tokens: int | None = None
    max_choices: int = 128
    max_waiting: int = 256
    max_connections: int = 2048
    header_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: for one that is not allowed.
        """
        if not 0 <= self.port <= MOST_PORT:
            raise ConfigError(f"serve.port is {self.port}; set it to 1 to {MOST_PORT}, or 0 for any free port")
        for name in ("max_body_bytes", "max_tokens", "max_choices", "max_waiting", "max_connections"):
            if getattr(self, name) < 1:
                raise ConfigError(f"serve.{name} is {getattr(self, name)}; set it to at least 1")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ConfigError(f"serve.max_prompt_tokens is {self.max_prompt_tokens}; set it to at least 1, or null")
        for name in ("header_timeout_s", "read_timeout_s", "drain_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"serve.{name} is {getattr(self, name)}; set it to a number of seconds above 0")

    @classmethod
    def of(cls, values: Mapping[Any, Any]) -> Self:
        """Return the configuration of the keys under ``serve``."""
        known = {field.name for field in fields(cls)}
        return cls(**{str(key): value for key, value in values.items() if key in known})

    def secret(self) -> str | None:
        """Return the token that clients must bring, None for no token.

        Raises:
            ConfigError: for a token that no client could send.
        """
        secret = os.environ.get(TOKEN_VARIABLE) if self.token is None else self.token
        if secret is not None and (not secret or not secret.isascii() or not secret.isprintable() or " " in secret):
            raise ConfigError(
                f"serve.token or {TOKEN_VARIABLE} is empty or has a character that no HTTP header takes; use letters, "
                "digits and signs of ASCII, or null for no token"
            )
        return secret

    def host_names(self) -> list[str]:
        """Return the names under which clients may reach the server."""
        return ["localhost", self.host, socket.gethostname(), *self.hosts]

    @property
    def exposed(self) -> bool:
        """Whether other machines can reach the server."""
        if self.host == "localhost":
            return False
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return True
