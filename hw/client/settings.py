"""The settings of the client, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from sim.config import ReplayConfig
from sim.errors import ConfigError, nearest

LOOPS = ("open", "closed")


@dataclass(kw_only=True)
class ClientSettings:
    """How requests are sent.

    url: where the server listens, with or without /v1. served_model: the model's name there; null takes the name of
        model=.
    api_key: the name of an environment variable that holds the key, such as OPENAI_API_KEY; null sends no key. The key
        itself is never written to the run folder.
    loop: open or closed. users: of a closed loop. A trace with sessions has its own users and needs loop=open.
    max_connections: most requests under way, also in an open loop; a request that has to wait is late, and its wait
        counts in its TTFT. Each request has a connection of its own, and connecting counts too.
    timeout_s: of one request, from connecting to the last token; inf for none. Each retry has the same time.
    retries: how often to send a request again that failed.
    chat: send text to /v1/chat/completions, as one user message, instead of /v1/completions; the server adds the tokens
        of its template. A turn of a session also has the messages and answers before it.
    text: cut prompts from this file; null sends random token ids. A text that is too short for a prompt is repeated.
    characters_per_token: of the text, to cut prompts of the trace's lengths.
    ignore_eos: request exactly the trace's output length, as vLLM and hw.serve support it.
    """

    url: str = "http://127.0.0.1:8000"
    served_model: str | None = None
    api_key: str | None = None
    loop: str = "open"
    users: int = 4
    max_connections: int = 256
    timeout_s: float = 600.0
    retries: int = 0
    chat: bool = False
    text: str | None = None
    characters_per_token: float = 4.0
    ignore_eos: bool = True

    def check(self) -> None:
        """Check the values.

        Raises:
            ConfigError: for an unknown loop, or a number out of range.
        """
        if self.loop not in LOOPS:
            raise ConfigError(f"unknown client.loop {self.loop!r}; {nearest(self.loop, LOOPS)}")
        for name, value, least in (
            ("users", self.users, 1),
            ("max_connections", self.max_connections, 1),
            ("retries", self.retries, 0),
        ):
            if value < least:
                raise ConfigError(f"client.{name} is {value}; it must be at least {least}")
        if not self.timeout_s > 0:
            raise ConfigError(f"client.timeout_s is {self.timeout_s}; it must be above 0 seconds, or inf for none")
        if not 0 < self.characters_per_token <= 1000:
            raise ConfigError(
                f"client.characters_per_token is {self.characters_per_token}; it must be above 0, and at most 1000"
            )


@dataclass(kw_only=True)
class ClientConfig(ReplayConfig):
    """The configuration of ``python -m hw.client``."""

    client: ClientSettings = field(default_factory=ClientSettings)


ConfigStore.instance().store(name="client_schema", node=ClientConfig)
