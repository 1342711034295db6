"""``python -m hw.disaggregate``: a prefill and a decode process, and the run folder that both of them fill.

The parent gives both the configuration, introduces them to each other (a loopback socket of which only they know the
key), starts their clock, and writes down what they tell as they go; so what is known of a run outlives each of them.
"""

from __future__ import annotations

import contextlib
import hmac
import math
import multiprocessing
import platform
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from hw.disaggregate.kv_link import Channel, LinkError, check_link
from hw.disaggregate.sides import Connection, DecodeSide, GuardedEngine, PrefillSide, serve
from hw.elastic.model import ElasticModel, RequestKV
from hw.engine.clock import RealClock
from hw.engine.iteration_log import IterationLog, Shape
from hw.engine.prompts import read_prompts
from hw.replay.run import HwReplayConfig, load_elastic
from sim.config import build, one_thread, run_command
from sim.cost.plan import Plan, describe
from sim.disaggregate.disaggregate import StagedRecords, decode_side, with_prefill
from sim.disaggregate.run import perplexity_ratio, plan_of, print_staged, staged_frame, transfer_figures
from sim.errors import ConfigError, RapLabError
from sim.replay.run import Parts, build_parts, build_trace, quality_of
from sim.results.metrics import iterations_frame, merged_gaps, merged_iterations, summarise
from sim.results.records import Iterations, Records, Status, TokenGaps
from sim.results.report import plot_replay
from sim.results.run_folder import provenance, write_json, write_parquet, write_text
from sim.traces.trace import Trace
from sim.types import Floats

if TYPE_CHECKING:
    import pandas as pd

STAGES = ("prefill", "decode")
STOP = ("stop", None)
LOOPBACK = "127.0.0.1"
START_S = 0.2
"""From the moment at which both are ready until the first request may arrive."""
HELLO_S = 10.0
POLL_S = 0.1
WARM_TOKENS = 64


@dataclass(kw_only=True)
class HwDisaggregateConfig(HwReplayConfig):
    """A replay on the real model with prefill and decode in two processes.

    link_bytes_per_s: the bandwidth that transfers share, kept by the sender; null for as fast as the socket goes.
    link_latency_s: how long after it was asked for the first byte of a transfer leaves, beside what that takes anyway.
    """

    link_bytes_per_s: float | None = None
    link_latency_s: float = 0.0


ConfigStore.instance().store(name="hw_disaggregate_schema", node=HwDisaggregateConfig)


@dataclass(frozen=True, slots=True)
class SideLog:
    """What a side knows at its end, beside its records.

    shapes: what each iteration computed. cpu_s: processor seconds of its process. difference_bytes: the most by which
    weights and KV that are allocated differ from what the memory model says. header_bytes: sent beside the KV.
    """

    iterations: Iterations
    gaps: TokenGaps
    shapes: tuple[Shape, ...]
    cpu_s: float
    difference_bytes: int
    header_bytes: int


# --- What runs in a process of its own -------------------------------------------------------------------------------


def child(stage: str, pipe: Pipe) -> None:
    """Load a model and serve one configuration after another, as the parent says."""
    loaded: tuple[ElasticModel, Any] | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has gone
        while (message := pipe.recv()) is not None:
            word, told = message
            if word != "serve":
                continue  # told to stop what had ended by itself
            try:
                cfg = OmegaConf.create(told["config"])
                assert isinstance(cfg, DictConfig)
                loaded = loaded or load_elastic(build(cfg.model), cfg.hw)
                (_prefill if stage == "prefill" else _decode)(cfg, told["key"], *loaded, pipe)
                pipe.send(("ended", None))
            except KeyboardInterrupt:
                pipe.send(("ended", None))
            except (EOFError, BrokenPipeError):
                raise
            except Exception as error:
                if not isinstance(error, RapLabError):
                    traceback.print_exc()
                pipe.send(("failed", str(error) if isinstance(error, RapLabError) else repr(error)))


def _stopped(pipe: Pipe) -> bool:
    """Return whether the parent wants this side to end early."""
    return pipe.poll() and pipe.recv() == STOP


def _prefill(cfg: DictConfig, key: str, elastic: ElasticModel, tokenizer: Any, pipe: Pipe) -> None:
    message = pipe.recv()
    if message == STOP:
        return
    channel = Channel(socket.create_connection((LOOPBACK, message[1])), "the decode process")
    channel.send({"kind": "hello", "key": key})
    connection = Connection(channel, bytes_per_s=cfg.link_bytes_per_s, latency_s=float(cfg.link_latency_s))
    with _closed(connection):
        limit = int(channel.receive()["context_limit"])
        parts, clock, quality = build_parts(cfg), RealClock(), quality_of(cfg)
        config = replace(parts.config, max_context_tokens=min(limit, parts.config.max_context_tokens or limit))
        parts = replace(parts, config=config)
        prompts = read_prompts(cfg.hw.text, tokenizer, parts.model.vocab_size, cfg.seed)
        plan, nll = parts.policy.first_plan, quality.nll if quality is not None else None
        side = PrefillSide(
            build=_engine_of(cfg, parts, elastic, plan, clock, prompts=prompts, quality_nll=nll),
            trace=build_trace(cfg),
            decode_limit=limit,
            connection=connection,
            clock=clock,
            report=lambda kind, value: pipe.send((kind, value)),
        )
        _serve(side, channel, elastic, clock, pipe)


def _decode(cfg: DictConfig, key: str, elastic: ElasticModel, _tokenizer: Any, pipe: Pipe) -> None:
    with socket.create_server((LOOPBACK, 0)) as server:
        pipe.send(("listening", server.getsockname()[1]))
        channel = _accept(server, key, pipe)
    if channel is None:
        return
    connection = Connection(channel)
    with _closed(connection):
        parts, clock, quality = build_parts(cfg), RealClock(), quality_of(cfg)
        plan = parts.policy.first_plan
        nll = with_prefill(quality.nll if quality is not None else None, plan.prefill)
        side = DecodeSide(
            build=_engine_of(cfg, parts, elastic, decode_side(plan), clock, quality_nll=nll),
            elastic=elastic,
            plan=plan,
            connection=connection,
            clock=clock,
            report=lambda kind, value: pipe.send((kind, value)),
        )
        connection.tell({"kind": "hello", "context_limit": side.engine.context_limit})
        side.listen()
        _serve(side, channel, elastic, clock, pipe)


@contextlib.contextmanager
def _closed(connection: Connection) -> Iterator[None]:
    """Close a connection whatever happens: else the other side would wait for ever."""
    try:
        yield
    finally:
        connection.close(whole=False)


def _accept(server: socket.socket, key: str, pipe: Pipe) -> Channel | None:
    """Wait for the prefill process, who knows the key; None when the parent wants to end."""
    server.settimeout(0.1)
    while not _stopped(pipe):
        with contextlib.suppress(TimeoutError):
            connection, _ = server.accept()
            connection.settimeout(HELLO_S)  # whoever connects and says nothing is not the one
            channel = Channel(connection, "the prefill process")
            with contextlib.suppress(LinkError):
                if hmac.compare_digest(str(channel.receive().get("key")), key):
                    connection.settimeout(None)
                    return channel
            channel.close()
    return None


def _engine_of(
    cfg: DictConfig, parts: Parts, elastic: ElasticModel, plan: Plan, clock: RealClock, **words: Any
) -> Callable[..., GuardedEngine]:
    """Return what builds the engine of a side from the words that only the side knows."""
    return partial(
        GuardedEngine,
        elastic=elastic,
        config=parts.config,
        plan=plan,
        budget_bytes=parts.budget,
        workspace_bytes=int(cfg.workspace_bytes),
        clock=clock,
        **words,
    )


def _serve(
    side: PrefillSide | DecodeSide, channel: Channel, elastic: ElasticModel, clock: RealClock, pipe: Pipe
) -> None:
    """Serve from the moment that the parent names; whatever happens, tell it all that is known then."""
    engine, connection, whole = side.engine, side.connection, False
    for tokens in (WARM_TOKENS, 1):  # the first pass of a process takes many times as long as those that follow
        elastic.forward([[0] * tokens], [RequestKV()])
    started_cpu_s = time.process_time()
    try:
        pipe.send(("ready", engine.context_limit))
        word, zero_s = pipe.recv()
        if word != "start":
            raise KeyboardInterrupt
        clock.start_at(zero_s)
        serve(side, clock, partial(_stopped, pipe))
        whole = True
    finally:
        connection.close(whole=whole)
        rows = engine.memory_rows()
        log = SideLog(
            iterations=engine.iterations(),
            gaps=engine.token_gaps(),
            shapes=engine.shapes(),
            cpu_s=time.process_time() - started_cpu_s,
            difference_bytes=max((abs(row.allocated_bytes - row.predicted_bytes) for row in rows), default=0),
            header_bytes=channel.header_bytes,
        )
        with connection.guard:  # the listener tells the parent things too
            pipe.send(("records", (engine.request_ids, engine.records())))
            pipe.send(("log", log))
        engine.close()


# --- The parent ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Heard:
    """What the two processes have told of one run so far, and how they ended."""

    ready: dict[str, int] = field(default_factory=dict)
    rows: dict[str, dict[int, Records]] = field(default_factory=lambda: {stage: {} for stage in STAGES})
    transfers: dict[int, dict[str, Any]] = field(default_factory=dict)
    released_s: dict[int, float] = field(default_factory=dict)
    logs: dict[str, SideLog] = field(default_factory=dict)
    port: int | None = None
    over: dict[str, str | None] = field(default_factory=dict)  # stage -> why it failed; None when it did not

    def take(self, stage: str, word: str, value: Any) -> None:
        """Write down a message."""
        if word == "listening":
            self.port = value
        elif word == "ready":
            self.ready[stage] = value
        elif word == "records":
            ids, records = value
            self.rows[stage].update((i, _row(records, at)) for at, i in enumerate(ids))
        elif word == "transfer":
            self.transfers[value["request_id"]] = value
        elif word == "released":
            self.released_s[value[0]] = value[1]
        elif word == "log":
            self.logs[stage] = value
        else:
            self.over[stage] = value if word == "failed" else None


def _row(records: Records, at: int) -> Records:
    return Records(**{f.name: getattr(records, f.name)[at : at + 1] for f in fields(Records)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run. transfers: one row a prompt whose KV has joined. logs: stage -> what it knew at its end.

    failure: what went wrong; None when nothing did.
    """

    records: StagedRecords
    transfers: pd.DataFrame
    logs: Mapping[str, SideLog]
    not_arrived: int
    interrupted: bool
    failure: str | None


class Pair:
    """A prefill and a decode process, each with the model loaded, that serve one configuration after another.

    They are given their model with the first one; later ones have the same model, ``hw`` and workspace.
    """

    def __init__(self) -> None:
        """Start both."""
        context = multiprocessing.get_context("spawn")
        self.processes: dict[str, BaseProcess] = {}
        self._pipes: dict[str, Pipe] = {}
        # Ctrl-C reaches all processes of a terminal. The parent decides: those that start now ignore it for good.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for stage in STAGES:
                ours, theirs = context.Pipe()
                process = context.Process(target=child, args=(stage, theirs), name=stage, daemon=True)
                process.start()
                theirs.close()  # else nobody would hear of its end
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
            ConfigError: for what cannot be served apart.
            KeyboardInterrupt: at the second Ctrl-C.
        """
        _check(cfg)
        trace, heard, key = build_trace(cfg), _Heard(), secrets.token_hex()
        zero_s = math.inf
        told = {"config": OmegaConf.to_yaml(cfg, resolve=True), "key": key}
        with _ctrl_c() as interrupts:
            for stage in STAGES:
                self._tell(heard, stage, ("serve", told))
            stopped = introduced = False
            while len(heard.over) < len(STAGES):
                self._hear(heard)
                if not stopped and (interrupts or (heard.over and math.isinf(zero_s))):
                    stopped = True
                    for stage in STAGES:
                        self._tell(heard, stage, STOP)
                if stopped:
                    continue
                if heard.port is not None and not introduced:
                    introduced = True
                    self._tell(heard, "prefill", ("connect", heard.port))
                if len(heard.ready) == len(STAGES) and math.isinf(zero_s):
                    zero_s = time.perf_counter() + START_S
                    for stage in STAGES:
                        self._tell(heard, stage, ("start", zero_s))
        until_s = time.perf_counter() - zero_s if stopped or any(heard.over.values()) else math.inf
        records = staged_records(trace, heard.rows, heard.transfers, heard.ready.get("decode", 0), until_s)
        failures = [f"the {stage} process: {why}" for stage, why in heard.over.items() if why is not None]
        return Outcome(
            records=records,
            transfers=_transfers_frame(heard),
            logs=heard.logs,
            not_arrived=len(trace) - len(records),
            interrupted=bool(interrupts),
            failure="; ".join(failures) or None,
        )

    def _tell(self, heard: _Heard, stage: str, message: tuple[str, Any]) -> None:
        if stage not in heard.over:
            with contextlib.suppress(BrokenPipeError):  # its end is heard of when it is read from
                self._pipes[stage].send(message)

    def _hear(self, heard: _Heard) -> None:
        """Take in what there is, waiting a moment for it."""
        open_ = {self._pipes[stage]: stage for stage in STAGES if stage not in heard.over}
        for pipe in wait(list(open_), timeout=POLL_S):
            assert isinstance(pipe, Pipe)
            stage = open_[pipe]
            try:
                heard.take(stage, *pipe.recv())
            except (EOFError, OSError):  # also in the middle of a message
                process = self.processes[stage]
                process.join()
                heard.over[stage] = f"it ended by itself, with exit code {process.exitcode}"


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Collect the first Ctrl-C in the list that is given; a second one ends everything at once."""
    interrupts: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupts.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def _check(cfg: DictConfig) -> None:
    """Check what can be wrong before a process is told.

    Raises:
        ConfigError: for a policy that changes plans, a budget that changes, another clock than the wall's, a link.
    """
    plan_of(cfg)
    check_link(cfg.link_bytes_per_s, float(cfg.link_latency_s))
    if len(build_parts(cfg).budget.change_s) > 1:
        raise ConfigError("budgets that change are not served with prefill and decode apart; give a constant one")
    if cfg.hw.clock != "wall" or cfg.hw.skip_idle or cfg.hw.to_eos:
        raise ConfigError(
            "two processes have one clock only in the wall's, with idle time slept through, and requests end at the "
            "trace's length; leave hw.engine.clock=wall, hw.skip_idle=false and hw.to_eos=false"
        )


def staged_records(
    trace: Trace,
    rows: Mapping[str, Mapping[int, Records]],
    transfers: Mapping[int, Mapping[str, Any]],
    decode_limit: int,
    until_s: float,
) -> StagedRecords:
    """Put together what is known of the requests that had arrived by a moment.

    Args:
        rows: stage -> request -> what that side says of it. transfers: request -> its KV's way, once it has joined.
        decode_limit: tokens that prompt and output may have together at the decode side.
    """
    n = int(np.searchsorted(trace.arrival_s, until_s, side="right"))
    prompts, outputs = trace.prompt_tokens[:n].copy(), trace.output_tokens[:n].copy()
    columns: dict[str, Any] = {
        f.name: np.zeros(n, dtype=np.int64) if f.name in _COUNTED else np.full(n, math.nan) for f in fields(Records)
    }
    columns |= {name: np.full(n, -1, dtype=np.int64) for name in ("prefill_replica", "decode_replica")}
    columns |= {"sent_bytes": np.zeros(n, dtype=np.int64)}
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
    # What ended at prefill and has more to come has not ended.
    under_way = (columns["decode_replica"] < 0) & (columns["status"] == Status.FINISHED)
    under_way &= np.minimum(outputs, decode_limit - prompts) > 1
    columns["status"][under_way] = Status.RUNNING
    columns["finish_s"][under_way] = math.nan
    given = {"arrival_s": trace.arrival_s[:n].copy(), "prompt_tokens": prompts, "output_tokens": outputs}
    return StagedRecords(**{**columns, **given})


_COUNTED = ("prompt_tokens", "produced_tokens", "output_tokens", "preemptions", "status", "cached_tokens")


def _transfers_frame(heard: _Heard) -> pd.DataFrame:
    """Return the table that ``transfers.parquet`` holds: one row a prompt whose KV has joined."""
    import pandas as pd

    names = ["request_id", "sent_bytes", "send_s", "sent_s", "joined_s"]
    frame = pd.DataFrame([heard.transfers[i] for i in sorted(heard.transfers)], columns=names)
    frame["released_s"] = [heard.released_s.get(i, math.nan) for i in sorted(heard.transfers)]
    return frame


def figures(cfg: DictConfig, outcome: Outcome) -> dict[str, Any]:
    """Return the figures of a run, as ``sim.disaggregate`` gives them."""
    records, plan = outcome.records, plan_of(cfg)
    logs = list(outcome.logs.values())
    end_s = max(float(np.nanmax(records.finish_s, initial=0.0)), 1e-9)
    summary = summarise(
        records,
        merged_iterations([log.iterations for log in logs] or [IterationLog().table()]),
        merged_gaps([log.gaps for log in logs] or [IterationLog().token_gaps()]),
        build(cfg.slo),
        not_arrived=outcome.not_arrived,
        cpu_s=sum(log.cpu_s for log in logs),
    )
    summary["perplexity_ratio"] = perplexity_ratio(cfg, summary["quality_nll"])
    summary |= {"plan": describe(plan), **transfer_figures(records, plan, build(cfg.model))}
    summary["link_busy_share"] = _busy_s(records.send_s, records.sent_s) / end_s
    return summary | {"interrupted": outcome.interrupted, "failure": outcome.failure}


def _busy_s(send_s: Floats, sent_s: Floats) -> float:
    """Return in how many seconds at least one transfer was under way."""
    busy_s, until_s = 0.0, -math.inf
    for start_s, end_s in sorted(zip(send_s.tolist(), sent_s.tolist(), strict=True)):
        if math.isfinite(end_s):
            busy_s += max(0.0, end_s - max(start_s, until_s))
            until_s = max(until_s, end_s)
    return busy_s


def hardware(cfg: DictConfig, outcome: Outcome) -> dict[str, Any]:
    """Return what ``hardware.json`` holds: devices, link, and what each process took."""
    cuda = torch.cuda.is_available() and cfg.hw.device != "cpu"
    return {
        "device": torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()} CPU, {cfg.hw.threads} thread(s) each",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "clock": "wall",
        "link": "loopback TCP socket",
        "link_bytes_per_s": cfg.link_bytes_per_s,
        "link_latency_s": float(cfg.link_latency_s),
        "header_bytes": {stage: log.header_bytes for stage, log in outcome.logs.items()},
        "cpu_s": {stage: log.cpu_s for stage, log in outcome.logs.items()},
        "largest_difference_bytes": max((log.difference_bytes for log in outcome.logs.values()), default=0),
    }


def write_run(folder: Path, cfg: DictConfig, outcome: Outcome) -> dict[str, Any]:
    """Write the run folder; return the summary."""
    summary, slo = figures(cfg, outcome), build(cfg.slo)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_json(folder / "provenance.json", provenance(cfg.seed))
    write_parquet(folder / "records.parquet", staged_frame(outcome.records, slo))
    write_parquet(folder / "transfers.parquet", outcome.transfers)
    if outcome.logs:
        iterations = merged_iterations([log.iterations for log in outcome.logs.values()])
        if cfg.iterations:
            write_parquet(folder / "iterations.parquet", iterations_frame(iterations))
        if cfg.plot:
            plot_replay(folder / "replay.png", outcome.records, iterations, slo, summary["plan"])
    write_json(folder / "hardware.json", hardware(cfg, outcome))
    write_json(folder / "summary.json", summary)  # last: a folder with a summary is complete
    return summary


def disaggregate_command() -> None:
    """Run ``python -m hw.disaggregate``."""
    one_thread()
    run_command(_disaggregate, "hw_disaggregate")


def _disaggregate(cfg: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    label = cfg.label or str(HydraConfig.get().runtime.choices["trace"])
    with Pair() as pair:
        outcome = pair.serve(cfg)
    summary = write_run(folder, cfg, outcome)
    print_staged(summary, f"{label}: a prefill and a decode process of {cfg.model.name}")
    if outcome.failure is not None and not outcome.interrupted:
        raise LinkError(f"{outcome.failure}; records of {len(outcome.records)} requests so far are in {folder}")
    if outcome.interrupted:
        print(f"interrupted: kept the records of {len(outcome.records)} requests that had arrived, in {folder}")
        sys.exit(130)
    print(f"files: {folder}")
