"""Runs the simulated engine in step with the clock, so that every token leaves when the simulator says it does.

The engine itself lives on simulated time: an iteration starts exactly where the one before it ended, whatever the
thread was doing then. A request arrives when it is submitted. Records therefore equal those of a replay of the same
arrivals; only the moment at which a token leaves is late, by as long as the thread takes to wake up and to compute what
was due.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sim.engine.priced_replica import PricedReplica
from sim.policies import Policy
from sim.replay.loop import decisions
from sim.serve.engine_thread import EngineThread, ServedRequest, _Command
from sim.serve.filler import END, filler_token

IDLE_S = 0.05
"""How often the thread looks at the clock while nothing is due, so that metrics are fresh."""
LAG_S = 0.25
"""A warning says that the simulation cannot keep up once tokens leave this late."""

log = logging.getLogger(__name__)


class ScaledClock:
    """The wall clock, ``speed`` times as fast, from 0 on."""

    def __init__(self, speed: float) -> None:
        """Start."""
        self.speed = speed
        self._zero_s = time.perf_counter()

    def now_s(self) -> float:
        """Return the simulated seconds since the start."""
        return (time.perf_counter() - self._zero_s) * self.speed


@dataclass(slots=True, eq=False)
class SimulatedRequest(ServedRequest):
    """A request to the simulated engine.

    key: what the words of its answer depend on. ends: whether its last token ends the text, as a model would.
    """

    key: int = 0
    ends: bool = False


class SimulatedThread(EngineThread):
    """The simulated engine and its thread.

    clock: wall-clock time, scaled. lag_s: the longest time so far, in real seconds, by which tokens left late.
    """

    def __init__(
        self,
        build: Callable[[SimulatedThread], PricedReplica],
        policy: Policy,
        clock: ScaledClock,
        *,
        tick_s: float,
        keep_records: bool = False,
    ) -> None:
        """Build the engine and start the thread.

        Args:
            build: makes the engine; its callbacks are this object's ``token_of`` and ``on_token``.
            policy: decides at the multiples of ``tick_s`` and whenever the budget changes, unless it is fixed.
            clock: what the engine keeps in step with.
            tick_s: simulated seconds between two decisions.
            keep_records: whether to keep the records of requests that have ended; they take memory.
        """
        self.clock, self.lag_s, self._keeps_records = clock, 0.0, keep_records
        self._moments_s: Iterator[float] = itertools.repeat(math.inf)
        self._next_decision_s = math.inf

        def build_paced(_: EngineThread) -> PricedReplica:
            self.replica = build(self)
            self.replica.expects_more = True
            # A later prompt may begin with an answer, as in a chat, and who sends it is not known before.
            self.replica.queues.caches_answers = self.replica.config.prefix_caching
            if self._policy is not None:
                self._moments_s = decisions(tick_s, self.replica.budget.change_s[1:])
                self._next_decision_s = next(self._moments_s)
            return self.replica

        super().__init__(build_paced, policy, clock, eos=END, tick_s=tick_s)

    def token_of(self, request_id: int, index: int) -> int:
        """Return a token of the answer of a request."""
        served = self._requests[request_id]
        assert isinstance(served, SimulatedRequest)
        token = filler_token(served.key, index)
        if served.ends and index == served.max_tokens - 1:
            token = END
        self.ends(request_id, token)
        return token

    def _now_s(self) -> float:
        return self.replica.now_s

    def _turn(self) -> None:
        """Wait until something is due, then carry out all that is due, each at its own time."""
        due_s = min(self.replica.next_event_s, self._next_decision_s)
        now_s, commands = self._due_commands(due_s)
        for sent_s, command in commands:
            self._advance(sent_s)
            self._run_command(command)
        self._advance(now_s)
        if not self._keeps_records:
            self.replica.forget_ended()
        first_s = min(due_s, now_s, *(sent_s for sent_s, _ in commands))
        self._note_lag((self.clock.now_s() - first_s) / self.clock.speed)

    def _due_commands(self, due_s: float) -> tuple[float, list[tuple[float, _Command]]]:
        """Wait for a command, or until ``due_s``; return the time then and the commands that were sent before it."""
        wait_s = (due_s - self.clock.now_s()) / self.clock.speed
        commands = []
        with contextlib.suppress(queue.Empty):
            commands.append(self._commands.get(timeout=min(max(wait_s, 0.0), IDLE_S)))
        with self._lock:  # a command that comes later is sent later too
            now_s = self.clock.now_s()
            while not self._commands.empty():
                commands.append(self._commands.get_nowait())
        return now_s, commands

    def _advance(self, time_s: float) -> None:
        """Run the engine until then, with the policy's decisions on the way."""
        while self._next_decision_s <= time_s:
            self._run_until(self._next_decision_s)
            self._decide()
            self._next_decision_s = next(self._moments_s) if self._policy is not None else math.inf
        self._run_until(time_s)

    def _note_lag(self, lag_s: float) -> None:
        if lag_s > LAG_S >= self.lag_s:
            log.warning(
                "the simulation is %.2f s behind the clock: it cannot keep up; lower serve.speed, or send less", lag_s
            )
        self.lag_s = max(self.lag_s, lag_s)
