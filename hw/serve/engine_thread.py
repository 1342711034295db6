"""Runs the engine in its own thread, between an asynchronous server and the iterations of the model."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hw.engine.clock import Clock
from hw.engine.hw_engine import HwEngine
from sim.cost.plan import Plan
from sim.engine.protocol import EngineState, Request
from sim.policies import Fixed, Policy

POLL_S = 0.02
"""How often the engine checks for new requests while it serves others."""
IDLE_POLL_S = 0.0001
"""How long a busy engine waits for a command between two runs."""

OnToken = Callable[[int | None, bool], None]
"""Called with a token and whether it is the last one; the token is None if the request was refused."""


@dataclass(slots=True)
class ServedRequest:
    """One request in the engine thread. request_id: -1 until it arrives there."""

    tokens: Sequence[int]
    max_tokens: int
    ignore_eos: bool
    on_token: OnToken
    request_id: int = -1


class EngineThread:
    """The engine and its thread. Commands from other threads wait in a queue and run between two iterations."""

    def __init__(
        self, build: Callable[[EngineThread], HwEngine], policy: Policy, clock: Clock, *, eos: int | None, tick_s: float
    ) -> None:
        """Build the engine and start the thread.

        Args:
            build: makes the engine, with this object's ``prompt``, ``on_token`` and ``ends`` as its callbacks.
            policy: decides every ``tick_s``, unless it is fixed.
            clock: the engine's.
            eos: token that ends a text; None if there is none.
            tick_s: seconds between two decisions.
        """
        self._clock, self._eos, self._tick_s = clock, eos, tick_s
        self._policy: Policy | None = None if isinstance(policy, Fixed) else policy
        self._requests: dict[int, ServedRequest] = {}
        self._commands: queue.Queue[Callable[[], None]] = queue.Queue()
        self._next_id = 0
        self._stopping = False
        self.failure: BaseException | None = None
        self.engine = build(self)
        self.state: EngineState = self.engine.run_until(0.0)
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    # --- Callbacks of the engine

    def prompt(self, request_id: int, tokens: int) -> Sequence[int]:
        """Return the prompt of a request."""
        return self._requests[request_id].tokens

    def on_token(self, request_id: int, token: int | None, last: bool) -> None:
        """Pass a token to the request that it belongs to."""
        self._requests[request_id].on_token(token, last)
        if last:
            del self._requests[request_id]

    def ends(self, request_id: int, token: int) -> bool:
        """Return whether a token ends its request."""
        return token == self._eos and not self._requests[request_id].ignore_eos

    # --- Commands, from any thread

    def submit(self, served: ServedRequest) -> None:
        """Submit a request that arrives now."""

        def arrive() -> None:
            served.request_id = self._next_id
            self._next_id += 1
            self._requests[served.request_id] = served
            request = Request(
                request_id=served.request_id,
                arrival_s=self._clock.now_s(),
                prompt_tokens=len(served.tokens),
                output_tokens=served.max_tokens,
            )
            self.engine.submit([request])

        self._commands.put(arrive)

    def cancel(self, served: ServedRequest) -> None:
        """End a request whose client has disconnected."""
        self._commands.put(lambda: self.engine.cancel(served.request_id))

    def set_plan(self, plan: Plan) -> None:
        """Run a plan from now on; this ends the policy."""

        def change() -> None:
            self._policy = None
            self.engine.apply(plan)

        self._commands.put(change)

    def stop(self) -> None:
        """End the thread after the current iteration."""
        self._stopping = True
        self._commands.put(lambda: None)
        self._thread.join(timeout=30.0)

    def _serve(self) -> None:
        next_tick_s = self._tick_s
        try:
            while not self._stopping:
                idle = self.engine.drained
                with contextlib.suppress(queue.Empty):
                    self._commands.get(timeout=POLL_S if idle else IDLE_POLL_S)()
                    while True:
                        self._commands.get_nowait()()
                self.state = self.engine.run_until(self._clock.now_s() + (0.0 if self.engine.drained else POLL_S))
                if self._policy is not None and self.state.time_s >= next_tick_s:
                    next_tick_s = self.state.time_s + self._tick_s
                    self.engine.apply(self._policy(self.state))
        except BaseException as failure:
            self.failure = failure
            for served in self._requests.values():
                served.on_token(None, True)
            raise
        finally:
            self.engine.close()
