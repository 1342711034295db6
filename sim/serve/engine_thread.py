"""Runs the engine in its own thread, between an asynchronous server and the iterations of the model.

Commands from other threads wait in a queue and run between two iterations. A command that fails is answered to its
sender, and the engine goes on. So is an iteration that the model or the memory cannot compute: its requests end with
the error. Only an engine that cannot go on ends the thread; ``failure`` then says why.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

from sim.cost.plan import Plan
from sim.engine.live_request import LiveRequest
from sim.engine.protocol import EngineState, Request
from sim.engine.replica import Replica
from sim.errors import RapLabError
from sim.policies import Fixed, Policy
from sim.serve.sampling import Sampling

POLL_S = 0.02
"""How often the engine checks for new requests while it serves others."""
IDLE_POLL_S = 0.0001
"""How long a busy engine waits for a command between two runs."""
STOP_S = 30.0
"""How long ``stop`` waits for the current iteration."""

OnToken = Callable[[int | None, bool], None]
"""Called with a token and whether it is the last one; the token is None if the request ended without one."""

Reason = Literal["stop", "length", "abort", "error"]
"""How a request ended: by the model or a stop string, at its longest, by its client, or refused or failed."""

log = logging.getLogger(__name__)


class Time(Protocol):
    """The time, in seconds since the server started."""

    def now_s(self) -> float:
        """Return the present time."""
        ...


class Observer(Protocol):
    """Measures requests. It is called in the engine's thread."""

    def saw_token(self, live: LiveRequest, gap_s: float | None) -> None:
        """Take note of a token; ``gap_s``: seconds since the token before, None for the first."""
        ...

    def saw_end(self, live: LiveRequest | None, reason: Reason, e2e_s: float) -> None:
        """Take note of the end of a request, ``e2e_s`` after its arrival; ``live`` is None if it never arrived."""
        ...


class QueueFullError(Exception):
    """Too many requests have been submitted and have not ended."""


class EngineStoppedError(Exception):
    """The engine takes no more commands."""


@dataclass(slots=True, eq=False)
class ServedRequest:
    """One request in the engine thread.

    on_token: gets its tokens. sampling: None for greedy.
    min_tokens: no stop string ends it before it has more. hash_ids: of its prompt and answer, for a prefix cache.
    request_id: -1 until it arrives there. arrival_s, last_token_s: on the engine's clock.
    error: why it ended without its last token; None if the plan refused it or it was canceled.
    stopped: whether its text has ended, by a token or a stop string. ended: whether the engine is done with it.
    """

    tokens: Sequence[int]
    max_tokens: int
    ignore_eos: bool
    on_token: OnToken = lambda _token, _last: None
    sampling: Sampling | None = None
    min_tokens: int = 0
    hash_ids: tuple[int, ...] = ()
    request_id: int = -1
    arrival_s: float = math.nan
    last_token_s: float = math.nan
    error: str | None = None
    stopped: bool = False
    ended: bool = False


@dataclass(frozen=True, slots=True)
class _Command:
    """Something to do between two iterations, and who hears that it failed."""

    run: Callable[[], None]
    fail: Callable[[BaseException], None]


class EngineThread:
    """The engine and its thread.

    failure: why the engine ended; None while it serves. state: what the engine showed last.
    observer: measures requests; None measures none.
    """

    def __init__(
        self,
        build: Callable[[EngineThread], Replica],
        policy: Policy,
        clock: Time,
        *,
        eos: int | Collection[int] | None,
        tick_s: float,
    ) -> None:
        """Build the engine and start the thread.

        Args:
            build: makes the engine; its callbacks are this object's ``prompt``, ``sampling``, ``on_token``, ``ends``.
            policy: decides every ``tick_s``, unless it is fixed.
            clock: the engine's.
            eos: the token, or the tokens, that end a text; None if there is none.
            tick_s: seconds between two decisions.
        """
        self._clock, self._tick_s = clock, tick_s
        self._eos = frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
        self.observer: Observer | None = None
        self._policy: Policy | None = None if isinstance(policy, Fixed) else policy
        self._next_tick_s = tick_s
        self._requests: dict[int, ServedRequest] = {}
        self._commands: queue.Queue[tuple[float, _Command]] = queue.Queue()  # each with the time when it was sent
        self._lock = threading.Lock()  # of the next two
        self._in_flight, self._closed = 0, False
        self._next_id = 0
        self._stopping = False
        self.failure: BaseException | None = None
        self.engine = build(self)
        self.state: EngineState = self.engine.run_until(0.0)
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    @property
    def in_flight(self) -> int:
        """Requests that have been submitted and have not ended."""
        return self._in_flight

    # --- Callbacks of the engine

    def prompt(self, request_id: int, tokens: int) -> Sequence[int]:
        """Return the prompt of a request."""
        return self._requests[request_id].tokens

    def sampling(self, request_id: int) -> Sampling | None:
        """Return how the tokens of a request are sampled, None for greedy."""
        return self._requests[request_id].sampling

    def on_token(self, request_id: int, token: int | None, last: bool) -> None:
        """Pass a token to the request that it belongs to."""
        served = self._requests.get(request_id)
        if served is None:
            return  # it has left
        if token is not None:
            live = self.engine.queues.all[request_id]
            gap_s = None if math.isnan(served.last_token_s) else live.last_token_s - served.last_token_s
            served.last_token_s = live.last_token_s
            if self.observer is not None:
                self.observer.saw_token(live, gap_s)
        if last:
            self._end(served, token, "error" if token is None else "stop" if served.stopped else "length")
        else:
            self._tell(served, token, last)

    def ends(self, request_id: int, token: int) -> bool:
        """Return whether a token ends its request."""
        served = self._requests[request_id]
        ends = token in self._eos and not served.ignore_eos
        served.stopped |= ends
        return ends

    # --- Commands, from any thread

    def submit(self, requests: Sequence[ServedRequest], most: int) -> None:
        """Submit requests that arrive now, all of them or none.

        Args:
            requests: what to serve.
            most: requests that may be submitted and not ended, these included.
        Raises:
            QueueFullError: if they would be more than ``most``. EngineStoppedError: if the engine serves no more.
        """
        with self._lock:
            self._check_open()
            if self._in_flight + len(requests) > most:
                raise QueueFullError(f"{self._in_flight} requests are submitted and not ended")
            self._in_flight += len(requests)
            for served in requests:
                self._enqueue(self._arrival(served))

    def _arrival(self, served: ServedRequest) -> _Command:
        def arrive() -> None:
            served.request_id, served.arrival_s = self._next_id, self._now_s()
            self._next_id += 1
            request = Request(
                request_id=served.request_id,
                arrival_s=served.arrival_s,
                prompt_tokens=len(served.tokens),
                output_tokens=served.max_tokens,
                hash_ids=served.hash_ids,
            )
            self._requests[served.request_id] = served
            self.engine.submit([request])

        def fail(error: BaseException) -> None:
            served.error = str(error)
            self._end(served, None, "error")

        return _Command(arrive, fail)

    def cancel(self, served: ServedRequest, reason: Reason = "abort") -> None:
        """End a request whose client has left, or whose text is complete; one that has ended stays as it is."""

        def end() -> None:
            if not served.ended:
                self._leave(served, reason)

        with contextlib.suppress(EngineStoppedError):
            self._put(_Command(end, lambda error: log.warning("a request could not be canceled: %s", error)))

    def set_plan(self, plan: Plan) -> Future[None]:
        """Run a plan from now on; this ends the policy. The result comes when the engine has taken the plan.

        Raises:
            EngineStoppedError: if the engine serves no more; also as the error of the result.
        """
        taken: Future[None] = Future()

        def change() -> None:
            if taken.set_running_or_notify_cancel():  # False once its sender has left
                self.engine.apply(plan)
                self._policy = None
                taken.set_result(None)

        def fail(error: BaseException) -> None:
            if not taken.done():
                taken.set_exception(error)

        self._put(_Command(change, fail))
        return taken

    def stop(self) -> None:
        """End the thread after the current iteration; requests under way end without their last token."""
        self._stopping = True
        with contextlib.suppress(EngineStoppedError):
            self._put(_Command(lambda: None, lambda _: None))
        self._thread.join(timeout=STOP_S)

    def _put(self, command: _Command) -> None:
        with self._lock:
            self._check_open()
            self._enqueue(command)

    def _enqueue(self, command: _Command) -> None:
        """Queue a command; the caller holds the lock, so commands stay in the order of their times."""
        self._commands.put((self._clock.now_s(), command))

    def _check_open(self) -> None:
        if self._closed:
            raise EngineStoppedError(str(self.failure or "the server is stopping"))

    # --- The thread

    def _serve(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except BaseException as failure:
            self.failure = failure
            log.exception("the engine has stopped")
        finally:
            self._close()
            self.engine.close()

    def _now_s(self) -> float:
        """Return the present time, for what happens to requests."""
        return self._clock.now_s()

    def _turn(self) -> None:
        """Run the commands that wait, then the engine for a moment."""
        self._run_commands()
        self._run_engine()
        self._let_policy_decide()
        self.engine.forget_ended()

    def _run_commands(self) -> None:
        """Run the commands that wait; wait a moment for the first."""
        with contextlib.suppress(queue.Empty):
            _, command = self._commands.get(timeout=POLL_S if self.engine.drained else IDLE_POLL_S)
            while True:
                self._run_command(command)
                _, command = self._commands.get_nowait()

    def _run_command(self, command: _Command) -> None:
        try:
            command.run()
        except Exception as error:
            command.fail(error)

    def _run_engine(self) -> None:
        """Run the engine for a moment."""
        self._run_until(self._clock.now_s() + (0.0 if self.engine.drained else POLL_S))

    def _run_until(self, time_s: float) -> None:
        """Run the engine until then; if an iteration cannot be computed, its requests end with the error."""
        try:
            self.state = self.engine.run_until(time_s)
        except RapLabError as error:
            running = [live.request_id for live in self.engine.queues.running]
            if not running:
                raise
            log.warning("an iteration failed, and its requests with it: %s", error)
            for request_id in running:
                self._requests[request_id].error = str(error)
                self._leave(self._requests[request_id], "error")

    def _let_policy_decide(self) -> None:
        """Apply the policy's decision when it is due."""
        if self._policy is not None and self.state.time_s >= self._next_tick_s:
            self._next_tick_s = self.state.time_s + self._tick_s
            self._decide()

    def _decide(self) -> None:
        """Apply the policy's decision; a policy that fails decides no more, and its last plan stays."""
        if self._policy is None:
            return
        try:
            self.engine.apply(self._policy(self.state))
        except Exception as error:
            self._policy = None
            log.warning("the policy failed and decides no more; the plan stays: %s: %s", type(error).__name__, error)

    def _leave(self, served: ServedRequest, reason: Reason) -> None:
        """Take a request out of the engine before its last token."""
        self._end(served, None, reason)
        self.engine.cancel(served.request_id)

    def _end(self, served: ServedRequest, token: int | None, reason: Reason) -> None:
        """Pass the end of a request on, once."""
        if served.ended:
            return
        served.ended = True
        self._requests.pop(served.request_id, None)
        with self._lock:
            self._in_flight -= 1
        if self.observer is not None:
            live = self.engine.queues.all.get(served.request_id)
            self.observer.saw_end(live, reason, self._now_s() - served.arrival_s)
        self._tell(served, token, True)

    def _tell(self, served: ServedRequest, token: int | None, last: bool) -> None:
        try:
            served.on_token(token, last)
        except Exception as error:  # such as the event loop of a server that has stopped
            log.warning("a token could not be passed on: %s", error)

    def _close(self) -> None:
        """Take no more commands; fail those that wait, and the requests under way."""
        with self._lock:
            self._closed = True
        reason = EngineStoppedError(str(self.failure or "the server is stopping"))
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()[1].fail(reason)
        for served in list(self._requests.values()):
            served.error = str(reason)
            self._end(served, None, "error")
