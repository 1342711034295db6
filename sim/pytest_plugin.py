"""Fixtures for tests of schedulers, routers and policies: a simulated server at a stated use of its KV cache.

pytest finds them once the project is installed; a test names what it needs::

    def test_the_router_avoids_the_fuller_server(server_at):
        full, empty = server_at(kv_share=0.9, waiting=3), server_at(kv_share=0.1)
        assert my_router([full.state, empty.state]) == 1

A server is a ``sim.engine.priced_replica.PricedReplica`` in plain Python, so nothing is compiled and a server takes
about a tenth of a second, less in a smaller memory (``memory_bytes``, ``gpu``). It goes on from there: ``submit``
requests, ``apply`` a plan, ``run_until`` a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sim.cost.plan import Plan
    from sim.engine.priced_replica import PricedReplica
    from sim.engine.protocol import EngineState

OUTPUT_TOKENS = 4096
"""Tokens that the running requests still have to produce, unless the context is shorter: they outlast a test."""
MOST_WAITING = 100_000
"""Requests in the queue of a server; more would take longer than a test may."""


@dataclass(frozen=True)
class ServerAt:
    """A simulated server in a stated condition, at 0 s.

    engine: goes on from it. state: what the server observes of itself; its counters start at 0.
    """

    engine: PricedReplica
    state: EngineState

    @property
    def kv_share(self) -> float:
        """Used over all KV blocks."""
        return self.state.kv_used_layer_blocks / self.state.kv_layer_blocks


@pytest.fixture
def server_at() -> Callable[..., ServerAt]:
    """Return ``make_server``, which builds a simulated server at a stated KV use."""
    return make_server


def make_server(
    *,
    kv_share: float = 0.5,
    running: int | None = None,
    waiting: int = 0,
    prompt_tokens: int = 512,
    memory_bytes: float | None = None,
    plan: Plan | None = None,
    model: str = "llama2_7b",
    gpu: str = "a100_80gb",
    engine: str = "vllm_v1",
    **names: Any,
) -> ServerAt:
    """Return a server whose running requests hold ``kv_share`` of its KV blocks.

    Args:
        kv_share: from 0 to 1; met within one block per running request.
        running: requests that hold it, with their first tokens; None takes as many as prompts of
            ``prompt_tokens`` need.
        waiting: requests in the queue behind them, of ``prompt_tokens`` each: the server runs no more at once.
        memory_bytes: for weights, workspace and KV; None takes the memory of the GPU.
        plan: what runs; None is the dense model.
        model, gpu, engine, names: options of conf/ by name, as ``sim.engine.server_spec.ServerSpec.from_names``.
    Raises:
        ConfigError: for a share outside [0, 1], a count that is negative or no whole number, a use that this number
            of requests cannot have, or waiting requests that the engine refuses.
    """
    # Here, because pytest imports plug-ins before every run, also those that use no fixture of this file.
    from sim.cost.plan import dense_plan
    from sim.engine.protocol import Request
    from sim.engine.server_spec import ServerSpec
    from sim.errors import ConfigError
    from sim.limits import check_count, check_whole

    if not 0.0 <= kv_share <= 1.0:
        raise ConfigError(f"kv_share is {kv_share}; it must be from 0 to 1")
    for name, count, least in (
        ("running", 0 if running is None else running, 0),
        ("waiting", waiting, 0),
        ("prompt_tokens", prompt_tokens, 1),
    ):
        check_whole(count, name, least)
    check_count(waiting, "waiting requests", MOST_WAITING, "lower waiting")
    if memory_bytes is not None and not 1 <= memory_bytes < math.inf:
        raise ConfigError(f"memory_bytes is {memory_bytes}; it must be a number from 1, or None for that of the GPU")
    spec = ServerSpec.from_names(model=model, gpu=gpu, engine=engine, **names)
    plan = plan or dense_plan(spec.model)
    budget_bytes = int(spec.gpu.memory_bytes if memory_bytes is None else memory_bytes)
    empty = spec.build_replica(plan, budget_bytes)
    block_tokens = spec.config.kv_block_tokens
    blocks = empty.run_until(0.0).kv_layer_blocks // max(1, sum(plan.prefill.mha))
    wanted = round(kv_share * blocks)
    if running is None:
        running = math.ceil(wanted / -(-prompt_tokens // block_tokens))
    if running == 0 and (wanted or waiting):
        raise ConfigError(
            f"kv_share is {kv_share} and {waiting} requests wait, but none runs; set running to at least 1"
        )
    longest = spec.config.max_context_tokens or spec.model.max_context_tokens
    if running and not (wanted >= running and -(-wanted // running) * block_tokens < longest):
        raise ConfigError(
            f"{running} running request{'s' if running > 1 else ''} cannot hold {wanted} KV blocks of {block_tokens} "
            f"tokens: each holds from 1 block to {longest} tokens; change running, kv_share or prompt_tokens"
        )
    shares = [wanted // running + (i < wanted % running) for i in range(running)]
    limits = dataclasses.replace(spec.config.limits, max_running=max(1, running))
    full = dataclasses.replace(spec, config=dataclasses.replace(spec.config, limits=limits))
    server = full.build_replica(plan, budget_bytes)
    for i, held in enumerate(shares):
        _join(server, i, held * block_tokens, min(OUTPUT_TOKENS, longest - held * block_tokens))
    if waiting:
        requests = [
            Request(request_id=running + i, arrival_s=0.0, prompt_tokens=prompt_tokens, output_tokens=OUTPUT_TOKENS)
            for i in range(waiting)
        ]
        server.submit(requests)
    state = server.run_until(0.0)
    if state.rejected:
        raise ConfigError(
            f"the engine refuses a prompt of {prompt_tokens} tokens, so it cannot wait; lower prompt_tokens"
        )
    return ServerAt(server, state)


def _join(server: PricedReplica, request_id: int, prompt_tokens: int, output_tokens: int) -> None:
    """Let a request run whose prompt is computed and whose first token is there, as if prefilled elsewhere."""
    from sim.engine.live_request import LiveRequest
    from sim.engine.protocol import Request

    request = Request(request_id=request_id, arrival_s=0.0, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    if server.reserve(request_id, prompt_tokens) is None:
        raise AssertionError(f"no room for {prompt_tokens} tokens of request {request_id}")
    server.join(
        LiveRequest(
            request,
            output_limit=output_tokens,
            computed_tokens=prompt_tokens,
            produced_tokens=1,
            prefill_tokens=prompt_tokens,
            cached_tokens=0,
            admitted_s=0.0,
            first_token_s=0.0,
            last_token_s=0.0,
        )
    )
