"""The server as it is described, and the simulation of a measured run on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import simpy

from hw.fit.measured import MeasuredRun
from sim.cluster.cluster import Cluster, Replica
from sim.cluster.routers import Router
from sim.cost.front_end import FrontEnd
from sim.cost.latency import LatencyModel
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.plan import Plan
from sim.engine.budget import Budget, constant_budget
from sim.engine.protocol import EngineConfig
from sim.engine.server_spec import ServerSpec
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError
from sim.policies import Fixed
from sim.results.records import Iterations, Moments, Records, TokenGaps
from sim.traces.trace import Trace
from sim.traces.transforms import repeat_prompts
from sim.types import Floats, Ints

FULL_SHARE = 0.5
"""Share of the time in which some request must wait, so that a rate counts as the server's maximum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Which prompts of a client are the same: ``distinct`` ones in turn, all with ``shared_tokens`` equal first tokens.

    Both None and 0 mean that every prompt is new.
    """

    distinct: int | None = None
    shared_tokens: int = 0

    @property
    def repeat(self) -> bool:
        """Whether any two prompts have something in common."""
        return self.distinct is not None or self.shared_tokens > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The servers of a run, all alike, behind a router.

    front_end: what lies between clients and the engine; not used for runs that the engine measured.
    prompts: which prompts the client repeats, for the prefix cache.
    """

    spec: ServerSpec
    plan: Plan
    budget: Budget
    front_end: FrontEnd
    prompts: Prompts = Prompts()
    replicas: int = 1
    router: Router | None = None
    seed: int = 0

    @property
    def config(self) -> EngineConfig:
        """The engine's settings."""
        return self.spec.config

    def with_config(self, config: EngineConfig) -> Server:
        """Return the server with other engine settings."""
        return replace(self, spec=replace(self.spec, config=config))

    def with_latency(self, latency: LatencyModel) -> Server:
        """Return the server with other prices."""
        return replace(self, spec=replace(self.spec, latency=latency))

    def kv_tokens(self) -> int:
        """Return the tokens of KV that one replica can hold."""
        engine = self.spec.build_engine(self.plan, self.budget, keep_iterations=False)
        blocks = engine.observe(0.0).kv_layer_blocks // engine.model.num_layers
        return blocks * self.config.kv_block_tokens


def as_stated(server: Server, run: MeasuredRun) -> Server:
    """Return a server with the engine settings and KV blocks that a run's own files state."""
    if run.config is None:
        return server
    # The run has no texts, so its prefix cache can only hold what a preempted request left.
    changed = server.with_config(run.config)
    if run.kv_blocks is None:
        return changed
    spec = replace(changed.spec, workspace_bytes=0)
    blocks = budget_for_kv_blocks(spec.model, server.plan, run.kv_blocks, 0, run.config.kv_block_tokens)
    return replace(changed, spec=spec, budget=constant_budget(blocks))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Simulated(Moments):
    """A simulated run, in the order of the measured one, as its clients (or its engine) would have seen it.

    cached_tokens: of each prompt. rejected: requests that the simulated server could not take.
    iterations, gaps: of one replica; None if they were not kept.
    """

    cached_tokens: Ints
    preemptions: int
    rejected: int
    iterations: Iterations | None = None
    gaps: TokenGaps | None = None


def trace_of(run: MeasuredRun, server: Server) -> Trace:
    """Return the requests of a run as a trace, with hash ids if the server has a prefix cache.

    Raises:
        ConfigError: if it has one and nothing says which prompts repeat.
    """
    trace = Trace(
        arrival_s=run.arrival_s,
        prompt_tokens=run.prompt_tokens,
        output_tokens=run.produced_tokens,
        name=run.name,
        source=run.source,
    )
    if not server.config.prefix_caching:
        return trace
    if run.prompts is not None and server.prompts.distinct is None:
        return _same_texts(trace, run.prompts, server)
    if not server.prompts.repeat:
        raise ConfigError(
            "engine.prefix_caching is true, but nothing says which prompts repeat; set distinct_prompts= to the number "
            "of prompts that the client sends in turn, or shared_tokens= to the tokens that all prompts begin with, or "
            "engine.prefix_caching=false"
        )
    return repeat_prompts(
        trace,
        distinct=server.prompts.distinct,
        shared_tokens=server.prompts.shared_tokens,
        block_tokens=server.config.hash_block_tokens,
    )


def _same_texts(trace: Trace, prompts: Ints, server: Server) -> Trace:
    """Return a trace in which requests with the same text have the same hash ids."""
    block = server.config.hash_block_tokens
    repeated = repeat_prompts(trace, shared_tokens=server.prompts.shared_tokens, block_tokens=block)
    assert repeated.hash_ids is not None
    first = {number: i for i, number in reversed(list(enumerate(prompts.tolist())))}
    ids = [repeated.hash_ids[first[number]] for number in prompts.tolist()]
    own = [repeated.hash_ids[i] for i in range(len(trace))]
    # The client counts tokens, so equal texts have equal lengths; if not, the shorter prefix is shared.
    rows = [row[: len(mine)] if len(row) >= len(mine) else mine for row, mine in zip(ids, own, strict=True)]
    return replace(repeated, hash_ids=tuple(rows))


def simulate(server: Server, run: MeasuredRun, *, keep_iterations: bool = False, at_once: bool = False) -> Simulated:
    """Serve the requests of a run.

    Args:
        keep_iterations: also return iterations and gaps between tokens; of one replica only.
        at_once: all requests come at 0 s, without a front end.
    """
    trace = trace_of(run, server)
    front = server.front_end if run.side == "client" and not at_once else FrontEnd()
    way_in_s = front.way_in_s(trace.prompt_tokens)
    queue_s = np.zeros(len(trace)) if at_once else trace.arrival_s + way_in_s
    order = np.argsort(queue_s, kind="stable")
    queued = replace(trace.take(order) if len(trace) else trace, arrival_s=queue_s[order])
    if server.replicas == 1:
        engine = server.spec.build_engine(server.plan, server.budget, keep_iterations=keep_iterations)
        engine.submit_trace(queued)
        engine.run_until(math.inf)
        records, kept = engine.records(), (engine.iterations(), engine.token_gaps()) if keep_iterations else None
    else:
        records, kept = _on_replicas(server, queued), None
    back = np.empty(len(trace), dtype=np.int64)
    back[order] = np.arange(len(trace))
    return _as_seen(records, back, trace.arrival_s if not at_once else np.zeros(len(trace)), front, kept)


def _on_replicas(server: Server, trace: Trace) -> Records:
    def build(env: simpy.Environment) -> tuple[SimEngine, Fixed]:
        engine = server.spec.build_engine(
            server.plan, server.budget, env=env, external_clock=True, keep_iterations=False
        )
        return engine, Fixed(server.plan)

    assert server.router is not None
    replicas = [Replica(name=str(i), build=build) for i in range(server.replicas)]
    cluster = Cluster(trace, replicas, server.router, seed=server.seed)
    cluster.run()
    return cluster.records()


def _as_seen(
    records: Records, back: Ints, sent_s: Floats, front: FrontEnd, kept: tuple[Iterations, TokenGaps] | None
) -> Simulated:
    return Simulated(
        arrival_s=sent_s,
        first_token_s=records.first_token_s[back] + front.back_s,
        finish_s=records.finish_s[back] + front.back_s,
        prompt_tokens=records.prompt_tokens[back],
        produced_tokens=records.produced_tokens[back],
        cached_tokens=records.cached_tokens[back],
        preemptions=int(records.preemptions.sum()),
        rejected=int((~np.isfinite(records.finish_s)).sum()),
        iterations=kept[0] if kept is not None else None,
        gaps=kept[1] if kept is not None else None,
    )


def most_rate_rps(server: Server, run: MeasuredRun) -> tuple[float | None, bool]:
    """Return the requests per second that the server finishes if all come at once, and whether they fill it.

    They do if some request waits for more than half of the time; else the rate says how long the last ones take.
    """
    done = simulate(server, run, at_once=True)
    finished = np.isfinite(done.finish_s)
    if not finished.any():
        return None, False
    end_s = float(done.finish_s[finished].max())
    full = float(done.first_token_s[finished].max()) >= FULL_SHARE * end_s
    return float(finished.sum()) / end_s, full
