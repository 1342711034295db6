"""The parent of a prefill and a decode process: starts them, connects them, and collects what they report."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import secrets
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from hw.disaggregate.kv_link import check_link
from hw.disaggregate.processes import STAGES, STOP, SideLog, run_process
from sim.disaggregate.disaggregate import StagedRecords
from sim.disaggregate.run import plan_of
from sim.errors import ConfigError
from sim.replay.run import build_parts, build_trace
from sim.results.records import Records, Status
from sim.traces.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

START_S = 0.2
"""Seconds from the moment when both processes are ready until the first request may arrive."""
POLL_S = 0.1
"""How long the parent waits for a report at a time."""


@dataclass(slots=True)
class Reports:
    """What the two processes have reported of one run so far.

    ready: stage -> its context limit in tokens, once it is ready. rows: stage -> request -> its record.
    transfers: request -> times and bytes of its KV transfer, once it has joined.
    released_s: request -> when prefill freed its KV.
    logs: stage -> its log at the end of the run. port: where decode listens.
    ended: stage -> why it failed, None if it did not.
    """

    ready: dict[str, int] = field(default_factory=dict)
    rows: dict[str, dict[int, Records]] = field(default_factory=lambda: {stage: {} for stage in STAGES})
    transfers: dict[int, dict[str, Any]] = field(default_factory=dict)
    released_s: dict[int, float] = field(default_factory=dict)
    logs: dict[str, SideLog] = field(default_factory=dict)
    port: int | None = None
    ended: dict[str, str | None] = field(default_factory=dict)

    def add(self, stage: str, kind: str, content: Any) -> None:
        """Add one report of a process."""
        if kind == "listening":
            self.port = content
        elif kind == "ready":
            self.ready[stage] = content
        elif kind == "records":
            ids, records = content
            self.rows[stage].update((i, _row(records, at)) for at, i in enumerate(ids))
        elif kind == "transfer":
            self.transfers[content["request_id"]] = content
        elif kind == "released":
            self.released_s[content[0]] = content[1]
        elif kind == "log":
            self.logs[stage] = content
        else:
            self.ended[stage] = content if kind == "failed" else None

    def transfers_frame(self) -> pd.DataFrame:
        """Return the table in ``transfers.parquet``: one row for each prompt whose KV has joined."""
        import pandas as pd

        names = ["request_id", "sent_bytes", "send_s", "sent_s", "joined_s"]
        frame = pd.DataFrame([self.transfers[i] for i in sorted(self.transfers)], columns=names)
        frame["released_s"] = [self.released_s.get(i, math.nan) for i in sorted(self.transfers)]
        return frame


def _row(records: Records, at: int) -> Records:
    return Records(**{f.name: getattr(records, f.name)[at : at + 1] for f in fields(Records)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run.

    transfers: one row for each prompt whose KV has joined. logs: stage -> its log at the end of the run.
    not_arrived: requests of the trace that had not arrived when the run ended.
    failure: what went wrong; None if nothing did.
    """

    records: StagedRecords
    transfers: pd.DataFrame
    logs: Mapping[str, SideLog]
    not_arrived: int
    interrupted: bool
    failure: str | None


class Pair:
    """A prefill and a decode process, each with the model loaded, that serve one configuration after another.

    They load the model of the first configuration; later ones must have the same model, ``hw`` and workspace.
    """

    def __init__(self) -> None:
        """Start both processes."""
        context = multiprocessing.get_context("spawn")
        self.processes: dict[str, BaseProcess] = {}
        self._pipes: dict[str, Pipe] = {}
        # Ctrl-C reaches all processes of a terminal, but only the parent should act on it. A process that starts while
        # Ctrl-C is ignored ignores it for good.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for stage in STAGES:
                ours, theirs = context.Pipe()
                process = context.Process(target=run_process, args=(stage, theirs), name=stage, daemon=True)
                process.start()
                theirs.close()  # otherwise the end of the process would not close the pipe
                self.processes[stage], self._pipes[stage] = process, ours
        finally:
            signal.signal(signal.SIGINT, before)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for stage, process in self.processes.items():
            with contextlib.suppress(OSError):
                self._pipes[stage].send(None)
            process.join(timeout=5.0)
            if process.is_alive():
                process.terminate()
                process.join()
            self._pipes[stage].close()

    def serve(self, cfg: DictConfig) -> Outcome:
        """Serve one configuration; the first Ctrl-C ends it between two iterations.

        Raises:
            ConfigError: for a configuration that two processes cannot serve.
            KeyboardInterrupt: at the second Ctrl-C.
        """
        check_config(cfg)
        trace, reports = build_trace(cfg), Reports()
        content = {"config": OmegaConf.to_yaml(cfg, resolve=True), "key": secrets.token_hex()}
        with _ctrl_c() as interrupts:
            for stage in STAGES:
                self._send(reports, stage, ("serve", content))
            zero_s, stopped = self._run(reports, interrupts)
        ended_early = stopped or any(reports.ended.values())
        until_s = time.perf_counter() - zero_s if ended_early else math.inf
        records = staged_records(trace, reports.rows, reports.transfers, reports.ready.get("decode", 0), until_s)
        failures = [f"the {stage} process: {why}" for stage, why in reports.ended.items() if why is not None]
        return Outcome(
            records=records,
            transfers=reports.transfers_frame(),
            logs=reports.logs,
            not_arrived=len(trace) - len(records),
            interrupted=bool(interrupts),
            failure="; ".join(failures) or None,
        )

    def _run(self, reports: Reports, interrupts: list[int]) -> tuple[float, bool]:
        """Connect and start the processes, and collect reports until both have ended.

        Returns the clock's zero (infinite if the run never started), and whether it was stopped early.
        """
        zero_s, stopped, connected = math.inf, False, False
        while len(reports.ended) < len(STAGES):
            self._receive(reports)
            if not stopped and (interrupts or (reports.ended and math.isinf(zero_s))):
                stopped = True
                for stage in STAGES:
                    self._send(reports, stage, STOP)
            if stopped:
                continue
            if reports.port is not None and not connected:
                connected = True
                self._send(reports, "prefill", ("connect", reports.port))
            if len(reports.ready) == len(STAGES) and math.isinf(zero_s):
                zero_s = time.perf_counter() + START_S
                for stage in STAGES:
                    self._send(reports, stage, ("start", zero_s))
        return zero_s, stopped

    def _send(self, reports: Reports, stage: str, message: tuple[str, Any]) -> None:
        """Send a message to a process that has not ended."""
        if stage not in reports.ended:
            with contextlib.suppress(BrokenPipeError):  # _receive finds out why the process has ended
                self._pipes[stage].send(message)

    def _receive(self, reports: Reports) -> None:
        """Add the reports that have come, waiting up to POLL_S for them."""
        running = {self._pipes[stage]: stage for stage in STAGES if stage not in reports.ended}
        for pipe in wait(list(running), timeout=POLL_S):
            assert isinstance(pipe, Pipe)
            stage = running[pipe]
            try:
                reports.add(stage, *pipe.recv())
            except (EOFError, OSError):  # the process ended, perhaps in the middle of a message
                process = self.processes[stage]
                process.join()
                reports.ended[stage] = f"it exited with code {process.exitcode}"


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Collect the first Ctrl-C in the list that this yields; a second one raises KeyboardInterrupt."""
    interrupts: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupts.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def check_config(cfg: DictConfig) -> None:
    """Check a configuration before a process gets it.

    Raises:
        ConfigError: for a policy that changes plans, hidden states, compressed KV, a budget that changes, another clock
            than the wall's, or a link that is out of range.
    """
    if plan_of(cfg).kv_hidden:
        raise ConfigError(
            "the plan keeps hidden states in place of keys and values (kv_hidden), which one process cannot send the "
            "other; leave policy.kv_hidden out, or simulate (python -m sim.disaggregate)"
        )
    if (way := plan_of(cfg).kv_compression) is not None:
        raise ConfigError(
            f"the plan compresses KV by {way.method} (kv_compression), and one process does not send the other how a "
            "prompt is packed; leave policy.kv_method and policy.kv_percent out, use policy.kv_bits, or simulate "
            "(python -m sim.disaggregate)"
        )
    check_link(cfg.link_bytes_per_s, float(cfg.link_latency_s))
    steps = len(build_parts(cfg).budget.change_s)
    if steps > 1:
        raise ConfigError(
            f"the budget has {steps} steps, but prefill and decode in two processes need a constant budget; "
            "choose budget=small or budget=kv_blocks"
        )
    if cfg.hw.clock != "wall" or cfg.hw.skip_idle or cfg.hw.to_eos:
        raise ConfigError(
            f"hw.clock is {cfg.hw.clock}, hw.skip_idle {cfg.hw.skip_idle} and hw.to_eos {cfg.hw.to_eos}; two processes "
            "share only the wall clock, sleep through idle time, and end requests at the trace's length, so set "
            "hw.clock=wall, hw.skip_idle=false and hw.to_eos=false"
        )


def staged_records(
    trace: Trace,
    rows: Mapping[str, Mapping[int, Records]],
    transfers: Mapping[int, Mapping[str, Any]],
    decode_limit: int,
    until_s: float,
) -> StagedRecords:
    """Return the records of all requests that had arrived by a moment, from what both sides know of them.

    Args:
        trace: the requests.
        rows: stage -> request -> its record on that side. Decode's columns replace those of prefill.
        transfers: request -> the times and bytes of its KV transfer, once it has joined.
        decode_limit: most tokens that prompt and output may have together on the decode side.
        until_s: the moment.
    """
    n = int(np.searchsorted(trace.arrival_s, until_s, side="right"))
    prompts, outputs = trace.prompt_tokens[:n].copy(), trace.output_tokens[:n].copy()
    columns: dict[str, Any] = {
        f.name: np.zeros(n, dtype=np.int64) if f.name in _COUNTS else np.full(n, math.nan) for f in fields(Records)
    }
    columns |= {name: np.full(n, -1, dtype=np.int64) for name in ("prefill_replica", "decode_replica")}
    columns |= {name: np.zeros(n, dtype=np.int64) for name in ("sent_bytes", "moves")}
    columns |= {name: np.full(n, math.nan) for name in ("send_s", "sent_s")}
    for stage in STAGES:
        for i, row in rows[stage].items():
            if i < n:
                columns[f"{stage}_replica"][i] = 0
                for f in fields(Records):
                    columns[f.name][i] = getattr(row, f.name)[0]
    for i, transfer in transfers.items():
        for name in ("sent_bytes", "send_s", "sent_s"):
            columns[name][i] = transfer[name]
    # A request that finished at prefill but has more tokens to produce is still running.
    under_way = (columns["decode_replica"] < 0) & (columns["status"] == Status.FINISHED)
    under_way &= np.minimum(outputs, decode_limit - prompts) > 1
    columns["status"][under_way] = Status.RUNNING
    columns["finish_s"][under_way] = math.nan
    columns["prefilled_s"] = columns["first_token_s"].copy()
    arrived = {"arrival_s": trace.arrival_s[:n].copy(), "prompt_tokens": prompts, "output_tokens": outputs}
    return StagedRecords(**{**columns, **arrived})


_COUNTS = ("prompt_tokens", "produced_tokens", "output_tokens", "preemptions", "status", "cached_tokens")
"""The integer columns of Records; all others are NaN until they are known."""
