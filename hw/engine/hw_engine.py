"""The Engine protocol over a real model: the rules of ``sim.engine.replica`` on a real clock.

    engine = HwEngine(elastic=ElasticModel(model), config=config, plan=plan, budget_bytes=budget, prompts=prompts)
    replay(trace, engine, policy, tick_s=1.0)       # as with SimEngine; nothing else changes

The replica decides; hw/engine/torch_executor.py runs its decisions on the model. For equal decisions of the policy, the
simulated and the real engine admit the same requests in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from hw.elastic.attention import Attention
from hw.elastic.attention_choice import find_attention
from hw.elastic.compressed_kv import PromptCompressor
from hw.elastic.copies import LayerCopier
from hw.elastic.device import Accelerator
from hw.elastic.device_memory import DeviceMemory
from hw.elastic.graphs import DecodeGraphs
from hw.elastic.kv_storage import ArenaStorage
from hw.elastic.model import ElasticModel
from hw.elastic.paged_kv import KVArena
from hw.engine.clock import Clock, RealClock
from hw.engine.iteration_log import MemoryRow, Shape
from hw.engine.prompts import Prompts, RandomPrompts, SessionPrompts
from hw.engine.torch_executor import TorchExecutor, TorchWeights
from hw.engine.workspace import fit_batches, needed_bytes
from sim.cost.gpu import Gpu
from sim.cost.memory import fixed_weight_bytes, kv_block_layer_bytes
from sim.cost.plan import WEIGHT_BITS, Plan, check_plan
from sim.engine.budget import Budget, constant_budget
from sim.engine.live_request import LiveRequest
from sim.engine.pricing_executor import PricingExecutor
from sim.engine.protocol import EngineConfig, Request, Sessions
from sim.engine.replica import Replica
from sim.errors import ConfigError
from sim.serve.sampling import Sampling
from sim.types import Floats, Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """A request whose prompt was computed by another engine, as this engine continues it.

    tokens: its prompt and the first token. output_limit: most tokens that it may produce, the first included.
    kept_params, nll_sum: of its first token. preemptions: before the handover.
    """

    request: Request
    tokens: tuple[int, ...]
    output_limit: int
    admitted_s: float
    first_token_s: float
    kept_params: int
    nll_sum: float
    preemptions: int


def check_gpu(gpu: Gpu) -> None:
    """Check that the real engine can serve on the configured devices.

    Raises:
        ConfigError: for a model that is divided among several GPUs.
    """
    if gpu.tp > 1:
        raise ConfigError(
            f"gpu.tp is {gpu.tp}, but the real engine serves on one GPU; set gpu.tp=1, or simulate with "
            "python -m sim.replay"
        )


def check_config(config: EngineConfig) -> None:
    """Check that the real engine has what a configuration wants; callers do it before they load a model.

    Raises:
        ConfigError: for ``prefix_caching``, ``schedules_ahead`` or ``copying=blocking``, which only the simulated
            engine has.
    """
    if config.prefix_caching:
        raise ConfigError("engine.prefix_caching is true; the real engine has no prefix cache: set it to false")
    if config.schedules_ahead:
        raise ConfigError(
            "engine.schedules_ahead is true; the real engine forms a batch when the iteration before it has ended: "
            "set it to false"
        )
    if config.copying == "blocking":
        raise ConfigError(
            "engine.copying is blocking; the real engine serves while it copies weights in: set it to overlapped"
        )


class HwEngine(Replica):
    """A replica that computes with a real model.

    attention: how it is computed. notes: what the engine changed about its settings.
    """

    executor_type: type[TorchExecutor] = TorchExecutor

    def __init__(
        self,
        *,
        elastic: ElasticModel,
        config: EngineConfig,
        plan: Plan,
        budget_bytes: int | Budget,
        workspace_bytes: int = 0,
        prompts: Prompts | None = None,
        clock: Clock | None = None,
        copier: LayerCopier | None = None,
        arena: KVArena | None = None,
        ends: Callable[[int, int], bool] | None = None,
        sampling: Callable[[int], Sampling | None] | None = None,
        on_token: Callable[[int, int | None, bool], None] | None = None,
        holds: Callable[[int], bool] | None = None,
        quality_nll: Callable[[Plan], float] | None = None,
        during_forward: Callable[[], AbstractContextManager[None]] = nullcontext,
        plans: Iterable[Plan] | None = None,
        attention: str = "auto",
        cuda_graphs: bool = True,
        prices: PricingExecutor | None = None,
    ) -> None:
        """Build an idle engine over a dense model and apply its first plan.

        Args:
            elastic: the model; it belongs to the engine from now on.
            config: how it serves. plan: what runs first.
            budget_bytes: limit of weights, workspace and KV cache together, constant or over time.
            workspace_bytes: part of the budget for activations and the like.
            prompts: the token ids of every request; random by default. clock: the wall clock by default.
            copier: copies weights from the host. arena: memory of the KV blocks. The default of both fits the device.
            ends: called with (request_id, token); returns whether that token ends the request early. None: never.
            sampling: called with a request_id; returns how its tokens are sampled, None for greedy. None: all greedy.
            on_token: called with (request_id, token, whether it is the last) for each token; the token is None if the
                request was rejected.
            holds: called with a request_id when it ends; returns whether its KV is held until ``release``. None: never.
            quality_nll: nats per token that a plan costs (``sim.cost.quality``), charged to requests; None for none.
            during_forward: a context that is entered while the model computes, for example to release a lock.
            plans: those that may run. What they need is stored now, so that no plan change has to quantize a block.
                None: any, so all blocks are stored at 16, 8 and 4 bits; parts of FFN blocks when they are first needed.
            attention: which code computes it, a value of hw.attention.
            cuda_graphs: whether decode passes that recur are recorded; only where the device and that code can.
            prices: what a calibration expects of each iteration, for ``EngineState.priced_s``. None: what it takes.
        Raises:
            ConfigError: as ``check_config``.
            PlanError: for a plan that is not legal for the model.
            BudgetError: if the first budget cannot hold the weights and one request, or the host not the KV that
                ``config.host_kv_blocks`` asks for.
        """
        check_config(config)
        budget = budget_bytes if isinstance(budget_bytes, Budget) else constant_budget(budget_bytes)
        clock = clock or RealClock()
        self.elastic = elastic
        elastic.most_context_tokens = min(
            config.max_context_tokens or elastic.spec.max_context_tokens, elastic.spec.max_context_tokens
        )
        _prepare(elastic, plan, plans)
        self.memory = DeviceMemory(elastic.hardware, elastic.bytes() - elastic.streams.missing_bytes)
        self.arena = arena or _default_arena(elastic, budget, workspace_bytes, config.kv_block_tokens)
        self.attention = found = find_attention(
            attention,
            self.arena.device,
            head_dim=elastic.spec.head_dim,
            dtype=elastic.dtype,
            block_tokens=config.kv_block_tokens,
        )
        self.notes: list[str] = []
        graph_bytes = 0
        if isinstance(elastic.hardware, Accelerator):
            config, problem = fit_batches(elastic.spec, config, found, workspace_bytes, sampled=sampling is not None)
            if problem is not None:
                self.notes.append(problem)
                print(f"warning: {problem}", file=sys.stderr)
            tokens = max(config.limits.max_batch_tokens, config.limits.max_running)
            graph_bytes = workspace_bytes - needed_bytes(elastic.spec, config, found, tokens)
        self._storage = ArenaStorage(
            self.arena,
            host_blocks=elastic.spec.num_layers * config.host_kv_blocks,
            compressor=PromptCompressor(self.arena, elastic),
        )
        self._copier = copier or LayerCopier(elastic, clock.source)
        elastic.streams.clock = clock
        weights = TorchWeights(elastic, self._copier, clock, self.memory)
        self._torch = self.executor_type(
            elastic=elastic,
            arena=self.arena,
            weights=weights,
            memory=self.memory,
            clock=clock,
            prompts=prompts or RandomPrompts(elastic.spec.vocab_size),
            ends=ends,
            sampling=sampling,
            during_forward=during_forward,
            attention=found,
            graphs=_graphs_of(elastic, found, graph_bytes) if cuda_graphs else None,
            prices=prices,
        )
        super().__init__(
            model=elastic.spec,
            config=config,
            plan=plan,
            budget=budget,
            executor=self._torch,
            weights=weights,
            clock=clock,
            storage=self._storage,
            workspace_bytes=workspace_bytes,
            # Plans recur, and evaluating a fitted quality model may take longer than an iteration's share of a token.
            quality_nll=lru_cache(maxsize=4096)(quality_nll) if quality_nll is not None else None,
            check_bits=partial(elastic.check, hidden=plan.kv_hidden),
            late_arrivals=True,
            on_token=on_token,
            holds=holds,
        )

    def submit_arrays(
        self,
        arrival_s: Floats,
        prompt_tokens: Ints,
        output_tokens: Ints,
        hash_ids: Sequence[Ints] | None = None,
        *,
        sessions: Sessions | None = None,
    ) -> None:
        """Hand over n requests as arrays of length n; prompts of turns begin with the real answers before them."""
        first = len(self.queues.all) + len(self.queues.arrivals)
        super().submit_arrays(arrival_s, prompt_tokens, output_tokens, hash_ids, sessions=sessions)
        if sessions is not None:
            self._torch.prompts = SessionPrompts.of(
                self._torch.prompts, sessions, prompt_tokens, output_tokens, self._torch.tokens, first
            )

    # -- prefill and decode in two processes (hw/disaggregate/sides.py) ------------------------------------------------

    def handover(self, request_id: int, output_tokens: int, output_limit: int) -> Handover:
        """Return what the other replica needs to continue a request whose prompt was computed here.

        Args:
            output_tokens: its length in the trace. output_limit: most tokens it may produce there, the first included.
        """
        live = self.queues.all[request_id]
        return Handover(
            request=replace(live.request, output_tokens=output_tokens),
            tokens=tuple(self._torch.tokens[request_id]),
            output_limit=output_limit,
            admitted_s=live.admitted_s,
            first_token_s=live.first_token_s,
            kept_params=live.kept_params,
            nll_sum=live.nll_sum,
            preemptions=live.preemptions,
        )

    def take_over(self, handover: Handover) -> None:
        """Start to decode a request whose KV has arrived in the room that ``reserve`` held for it."""
        request = handover.request
        self._torch.tokens[request.request_id] = list(handover.tokens)
        self.join(
            LiveRequest(
                request,
                output_limit=handover.output_limit,
                computed_tokens=request.prompt_tokens,
                produced_tokens=1,
                prefill_tokens=request.prompt_tokens,
                kept_params=handover.kept_params,
                nll_sum=handover.nll_sum,
                admitted_s=handover.admitted_s,
                first_token_s=handover.first_token_s,
                last_token_s=handover.first_token_s,
                preemptions=handover.preemptions,
            )
        )

    # -- what a real run logs besides records ---------------------------------------------------------------------

    def tokens(self, request_id: int) -> list[int]:
        """Return the tokens that a request has produced so far."""
        live = self.queues.all[request_id]
        prompt = live.request.prompt_tokens
        return self._torch.tokens.get(request_id, [])[prompt : prompt + live.produced_tokens]

    def memory_rows(self) -> tuple[MemoryRow, ...]:
        """Return one row per iteration: predicted, allocated and used bytes."""
        return tuple(self._torch.memory_rows)

    def shapes(self) -> tuple[Shape, ...]:
        """Return what each iteration that has ended computed."""
        return tuple(self._torch.shapes[: self._log.kept])

    def forget_ended(self) -> None:
        """Drop the requests that have ended with their tokens, and the rows of all logs."""
        dropped = self._log.kept
        super().forget_ended()
        del self._torch.shapes[:dropped], self._torch.memory_rows[:dropped]
        for request_id in [i for i in self._torch.tokens if i not in self.queues.all]:
            del self._torch.tokens[request_id]

    def check(self) -> None:
        """Check that allocated memory equals counted memory: every KV block, and the bytes of the weights."""
        super().check()
        assert self._changes.copy is not None or self.elastic.bytes() == self._changes.weight_bytes

    def close(self) -> None:
        """Abandon the copy under way, end its thread, and let the process use the memory of the device again."""
        self._copier.close()
        self.elastic.streams.close()
        self._torch.close()
        self._storage.host.close()
        if isinstance(self.elastic.hardware, Accelerator):
            self.arena.close()
        self.memory.close()


def _prepare(elastic: ElasticModel, plan: Plan, plans: Iterable[Plan] | None) -> None:
    """Bring a dense model to the plan, with every copy that a later plan may need in the store."""
    check_plan(elastic.spec, plan)
    later = [] if plans is None else list(plans)
    elastic.find_directions([plan, *later])
    if plans is None:
        elastic.prepare(WEIGHT_BITS)
    else:
        for one in later:  # or it would be refused in the middle of a run
            elastic.check(one, hidden=plan.kv_hidden)
        elastic.prepare_for([plan, *later])
    elastic.apply(plan)


def _default_arena(elastic: ElasticModel, budget: Budget, workspace_bytes: int, block_tokens: int) -> KVArena:
    """Return an arena that can hold all that the largest budget leaves for KV."""
    spec = elastic.spec
    block_bytes = kv_block_layer_bytes(spec, block_tokens)
    most = (max(budget.budget_bytes) - workspace_bytes - fixed_weight_bytes(spec)) // block_bytes
    return arena_of(elastic, most, block_tokens=block_tokens)


def _graphs_of(elastic: ElasticModel, attention: Attention, most_bytes: int) -> DecodeGraphs | None:
    """Return CUDA graphs, which may take what a pass leaves of the workspace, if the device has them."""
    if not attention.in_graphs or not isinstance(elastic.hardware, Accelerator) or most_bytes <= 0:
        return None
    return DecodeGraphs(elastic.hardware, most_bytes)


def arena_of(elastic: ElasticModel, capacity: int, *, block_tokens: int) -> KVArena:
    """Return an arena on the model's device, which can hold ``capacity`` KV blocks of one layer and has none yet."""
    spec = elastic.spec
    return KVArena(
        elastic.hardware,
        capacity=capacity,
        block_tokens=block_tokens,
        heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=elastic.dtype,
    )
