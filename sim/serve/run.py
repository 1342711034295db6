"""Listens, serves and stops: what the simulated and the real server have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable

from sim.serve.api import Api
from sim.serve.connections import OrderlyServer, bind, exit_on_signal, listen, url_of
from sim.serve.engine_thread import EngineThread
from sim.serve.settings import TOKEN_VARIABLE, ServerConfig


def serve_until_stopped(config: ServerConfig, name: str, build: Callable[[], tuple[Api, EngineThread]]) -> None:
    """Serve until a signal comes and the answers under way are complete.

    Args:
        name: of the model, to greet with. build: makes the HTTP side and the engine, once the port is known to be free.
    Raises:
        ConfigError: for a token that no client could send, or a port in use.
    """
    without_token = config.secret() is None
    # Before the model loads: a port in use is known at once.
    with exit_on_signal(), bind(config) as listener:
        if without_token and config.exposed:
            print(
                f"warning: other machines can reach serve.host={config.host}, and there is no token: set serve.token "
                f"or the environment variable {TOKEN_VARIABLE}",
                file=sys.stderr,
            )
        api, thread = build()
        try:
            listen(listener, config)
            note = f"; {api.note}" if api.note else ""
            greeting = f"serving {name} at {url_of(listener)}{note}"
            OrderlyServer(api.app, listener, config, greeting).serve_until_stopped()
        finally:
            thread.stop()
