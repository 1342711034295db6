"""What the prefill and the decode process run: load the model, connect to the other process, serve, and report.

Parent and child exchange pairs (kind, content) over a pipe. The parent sends

    serve       {config, key}       the configuration to serve, and the secret with which both sides authenticate
    connect     port                to prefill: where decode listens
    start       moment              the clock's zero, on CLOCK_MONOTONIC
    stop        None                end early
    None instead of a pair ends the process

and a child answers with ``listening``, ``ready``, ``records``, ``transfer``, ``released``, ``log``, then ``ended`` or
``failed``; ``hw.disaggregate.pair.Reports`` lists the content of each.
"""

from __future__ import annotations

import contextlib
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection as Pipe
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hw.disaggregate.hello import accept_with_key, connect_with_key, key_of, welcome
from hw.disaggregate.kv_link import Channel, Header, LinkError
from hw.disaggregate.sides import Connection, DecodeSide, GuardedEngine, PrefillSide, serve
from hw.elastic.kv import RequestKV
from hw.elastic.model import ElasticModel
from hw.engine.clock import RealClock
from hw.engine.iteration_log import Shape
from hw.engine.prompts import read_prompts
from hw.replay.run import load_elastic
from sim.config import build
from sim.cost.plan import Plan
from sim.disaggregate.disaggregate import decode_side, with_prefill
from sim.errors import RapLabError
from sim.replay.run import Parts, build_parts, build_trace, quality_of
from sim.results.records import Iterations, TokenGaps

STAGES = ("prefill", "decode")
STOP = ("stop", None)
LOOPBACK = "127.0.0.1"
WARM_UP_TOKENS = (64, 1)


@dataclass(frozen=True, slots=True)
class SideLog:
    """What a process knows at the end of a run, in addition to its records.

    shapes: what each iteration computed. cpu_s: processor seconds of the process.
    difference_bytes: largest difference between the allocated weights and KV and the memory model.
    header_bytes: bytes sent in addition to the KV.
    """

    iterations: Iterations
    gaps: TokenGaps
    shapes: tuple[Shape, ...]
    cpu_s: float
    difference_bytes: int
    header_bytes: int


def run_process(stage: str, pipe: Pipe) -> None:
    """Load the model once and serve one configuration after another, as the parent requests."""
    loaded: tuple[ElasticModel, Any] | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has ended
        while (message := pipe.recv()) is not None:
            kind, content = message
            if kind != "serve":
                continue  # a stop that arrived after the run had ended
            try:
                cfg = OmegaConf.create(content["config"])
                assert isinstance(cfg, DictConfig)
                loaded = loaded or load_elastic(build(cfg.model), cfg.hw, cfg.model)
                (_prefill if stage == "prefill" else _decode)(cfg, content["key"], *loaded, pipe)
                pipe.send(("ended", None))
            except KeyboardInterrupt:
                pipe.send(("ended", None))
            except (EOFError, BrokenPipeError):
                raise
            except Exception as error:
                if not isinstance(error, RapLabError):
                    traceback.print_exc()
                pipe.send(("failed", str(error) if isinstance(error, RapLabError) else repr(error)))


def _prefill(cfg: DictConfig, key: str, elastic: ElasticModel, tokenizer: Any, pipe: Pipe) -> None:
    """Connect to the decode process and compute prompts for it."""
    message = pipe.recv()
    if message == STOP:
        return
    channel = connect_with_key((LOOPBACK, message[1]), key, "the decode process")
    connection = Connection(channel, bytes_per_s=cfg.link_bytes_per_s, latency_s=float(cfg.link_latency_s))
    with _closed(connection):
        limit = _context_limit(channel.receive())
        parts, clock, quality = build_parts(cfg), RealClock(), None if elastic.note else quality_of(cfg)
        config = replace(parts.config, max_context_tokens=min(limit, parts.config.max_context_tokens or limit))
        parts = replace(parts, server=replace(parts.server, config=config))
        prompts = read_prompts(cfg.hw.text, tokenizer, parts.model.vocab_size, cfg.seed)
        plan, nll = parts.policy.first_plan, quality.charge if quality is not None else None
        side = PrefillSide(
            build=_engine_builder(cfg, parts, elastic, plan, clock, prompts=prompts, quality_nll=nll),
            trace=build_trace(cfg),
            decode_limit=limit,
            connection=connection,
            clock=clock,
            report=lambda kind, content: pipe.send((kind, content)),
        )
        _serve(side, channel, elastic, clock, pipe)


def _decode(cfg: DictConfig, key: str, elastic: ElasticModel, _tokenizer: Any, pipe: Pipe) -> None:
    """Listen for the prefill process and produce the tokens after the first."""
    with socket.create_server((LOOPBACK, 0)) as server:
        pipe.send(("listening", server.getsockname()[1]))
        channel = accept_peer(server, key_of(key, "prefill"), pipe)
    if channel is None:
        return
    connection = Connection(channel)
    with _closed(connection):
        welcome(channel, key)
        parts, clock, quality = build_parts(cfg), RealClock(), None if elastic.note else quality_of(cfg)
        plan = parts.policy.first_plan
        nll = with_prefill(quality.charge if quality is not None else None, plan.prefill)
        side = DecodeSide(
            build=_engine_builder(cfg, parts, elastic, decode_side(plan), clock, quality_nll=nll),
            elastic=elastic,
            plan=plan,
            connection=connection,
            clock=clock,
            report=lambda kind, content: pipe.send((kind, content)),
        )
        connection.send({"kind": "ready", "context_limit": side.engine.context_limit})
        side.listen()
        _serve(side, channel, elastic, clock, pipe)


@contextlib.contextmanager
def _closed(connection: Connection) -> Iterator[None]:
    """Close a connection in any case; otherwise the other process would wait forever."""
    try:
        yield
    finally:
        connection.close(complete=False)


def _context_limit(header: Header) -> int:
    """Return the context limit of the decode process, which it sends when its engine is built."""
    limit = header.get("context_limit")
    if header.get("kind") != "ready" or not isinstance(limit, int) or limit < 1:
        raise LinkError(f"the decode process sent {header}, but its context limit was due")
    return limit


def accept_peer(server: socket.socket, key: str, pipe: Pipe) -> Channel | None:
    """Wait for the prefill process, which has the key; return None if the parent wants to end first."""
    return accept_with_key(server, key, "the prefill process", partial(_stopped, pipe))


def _stopped(pipe: Pipe) -> bool:
    """Return whether the parent wants this process to end early."""
    return pipe.poll() and pipe.recv() == STOP


def _engine_builder(
    cfg: DictConfig, parts: Parts, elastic: ElasticModel, plan: Plan, clock: RealClock, **options: Any
) -> Callable[..., GuardedEngine]:
    """Return a function that builds the engine of a side from the arguments that only the side has."""
    return partial(
        GuardedEngine,
        elastic=elastic,
        config=parts.config,
        plan=plan,
        budget_bytes=parts.budget,
        workspace_bytes=int(cfg.workspace_bytes),
        clock=clock,
        attention=cfg.hw.attention,
        cuda_graphs=bool(cfg.hw.cuda_graphs),
        **options,
    )


def _serve(
    side: PrefillSide | DecodeSide, channel: Channel, elastic: ElasticModel, clock: RealClock, pipe: Pipe
) -> None:
    """Serve from the moment that the parent sends; in any case, report everything that is known at the end."""
    engine, connection, complete = side.engine, side.connection, False
    for tokens in WARM_UP_TOKENS:  # the first pass of a process takes many times as long as later ones
        elastic.forward([[0] * tokens], [RequestKV()])
    started_cpu_s = time.process_time()
    try:
        pipe.send(("ready", engine.context_limit))
        kind, zero_s = pipe.recv()
        if kind != "start":
            raise KeyboardInterrupt
        clock.start_at(zero_s)
        serve(side, clock, partial(_stopped, pipe))
        complete = True
    finally:
        connection.close(complete=complete)
        rows = engine.memory_rows()
        log = SideLog(
            iterations=engine.iterations(),
            gaps=engine.token_gaps(),
            shapes=engine.shapes(),
            cpu_s=time.process_time() - started_cpu_s,
            difference_bytes=max((abs(row.allocated_bytes - row.predicted_bytes) for row in rows), default=0),
            header_bytes=channel.header_bytes,
        )
        with connection.guard:  # the listener thread writes to this pipe too
            pipe.send(("records", (engine.request_ids, engine.records())))
            pipe.send(("log", log))
        engine.close()
