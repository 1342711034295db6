"""Runs a replica's decisions on a real model: one forward pass per iteration, and weights that are freed and restored.

* An iteration is one pass over decodes and prompt chunks, with keys and values in a paged pool of real memory
  (hw/elastic/paged_kv.py, hw/elastic/paged_attention.py). Its duration is read from the clock afterwards.
* A dropped block's weights are freed. A restored block's weights are read from the store while iterations run.
* Tokens are real, and greedy unless a request is sampled (hw/engine/sampling.py). A request ends at the length in the
  trace, or at the model's own end of text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from hw.elastic.attention import Attention
from hw.elastic.attention_choice import default_attention
from hw.elastic.blocks import ABSENT, KINDS
from hw.elastic.copies import LayerCopier
from hw.elastic.device_memory import DeviceMemory, attempt
from hw.elastic.forward import NotANumberError, all_finite, forward
from hw.elastic.graphs import OPERATIONS, DecodeGraphs
from hw.elastic.kv_compression.packing import OBSERVED
from hw.elastic.model import ElasticModel
from hw.elastic.paged_attention import Packed, PagedBatch
from hw.elastic.paged_kv import KVArena
from hw.elastic.staging import Staging
from hw.engine.clock import Clock
from hw.engine.iteration_log import MemoryRow, Shape
from hw.engine.prompts import Prompts
from hw.engine.sampling import Draw, Drawn, choose
from sim.cost.memory import logit_rows
from sim.cost.plan import Plan, describe
from sim.engine.executor import Iteration, Ran
from sim.engine.live_request import LiveRequest
from sim.engine.pricing_executor import PricingExecutor
from sim.engine.transition import LayerCopy, Resident
from sim.errors import CalibrationError, RapLabError
from sim.serve.sampling import Sampling

LONGEST_WAIT_S = 60.0
"""Seconds after which an idle engine that waits for a copy checks again."""


class NumericsError(RapLabError):
    """The model gave a value that is not a finite number; the message names block and plan."""


class TorchWeights:
    """The weights of an elastic model, as a replica changes them.

    allocated_bytes: bytes of weights on the device after the last change, without those of a copy under way.
    """

    def __init__(self, elastic: ElasticModel, copier: LayerCopier, clock: Clock, memory: DeviceMemory) -> None:
        """Change this model."""
        self._elastic, self._copier, self._clock, self._memory = elastic, copier, clock, memory
        self.allocated_bytes = elastic.resident_bytes()

    def drop(self, resident: Resident) -> None:
        """Free blocks and channels that are no longer resident; a copy under way continues. Stream what is to be."""
        for kind in KINDS:
            bits = resident.mha_bits if kind == "mha" else resident.ffn_bits
            for block, wanted, streamed in zip(self._elastic.blocks[kind], bits, resident.streamed, strict=True):
                # A block that is being copied in is still absent: to want it ABSENT would lose the copy. The replica
                # abandons a copy that the plan no longer wants before it drops anything.
                if (wanted == ABSENT or streamed) and not self._copier.copies(block):
                    block.want(ABSENT)
        for block, width in zip(self._elastic.blocks["ffn"], resident.ffn_width, strict=True):
            if block.bits != ABSENT and width < block.width:
                block.narrow(width)
        self._elastic.streams.set(
            {layer: (resident.mha_bits[layer], resident.ffn_bits[layer]) for layer in resident.crossing()}
        )
        self._memory.give_back()
        self.allocated_bytes = self._elastic.resident_bytes()

    def start(self, copy: LayerCopy, now_s: float, *, shared: bool = False) -> None:
        """Start to copy a layer in."""
        self._carry_out(lambda: self._copier.start(copy))

    def arrived(self, now_s: float) -> bool:
        """Return whether the copy under way is complete."""
        return self._copier.complete()

    def wait(self, now_s: float, until_s: float) -> None:
        """Wait until ``until_s``, or until the copy under way is complete."""
        waited_s = self._copier.wait(min(until_s - now_s, LONGEST_WAIT_S))
        self._clock.wait_until(now_s + waited_s)  # of a clock that counts this thread's work alone

    def join(self) -> None:
        """Replace the old layer with the one that arrived."""
        self._carry_out(self._copier.join)
        self.allocated_bytes = self._elastic.resident_bytes()

    def _carry_out(self, step: Callable[[], None]) -> None:
        """Run a step of a copy; abandon the copy if memory ran out."""
        try:
            attempt(self._elastic.hardware, step)
        except MemoryError:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Abandon the copy under way."""
        self._copier.abandon()
        self.allocated_bytes = self._elastic.resident_bytes()


class TorchExecutor:
    """Runs iterations on an elastic model.

    arena: memory of the KV blocks. prompts: the token ids of every request. tokens: of each request, its prompt and the
        tokens produced so far.
    shapes, memory_rows: one entry per iteration that has run.
    """

    def __init__(
        self,
        *,
        elastic: ElasticModel,
        arena: KVArena,
        weights: TorchWeights,
        memory: DeviceMemory,
        clock: Clock,
        prompts: Prompts,
        ends: Callable[[int, int], bool] | None = None,
        sampling: Callable[[int], Sampling | None] | None = None,
        during_forward: Callable[[], AbstractContextManager[None]] = nullcontext,
        attention: Attention | None = None,
        graphs: DecodeGraphs | None = None,
        prices: PricingExecutor | None = None,
    ) -> None:
        """Run ``elastic`` over the KV in ``arena``.

        Args:
            weights, memory: report bytes after each iteration. clock: the engine's.
            prompts: the token ids of every request.
            ends: called with (request_id, token); returns whether that token ends the request early. None: never.
            sampling: called with a request_id; returns how its tokens are sampled, None for greedy. None: all greedy.
            during_forward: a context that is entered while the model computes.
            attention: how attention is computed. None: as hw.attention=auto.
            graphs: of decode passes. None: every pass is started operation by operation.
            prices: says what a calibration expects of each iteration. None: no calibration.
        """
        self.arena = arena
        self.tokens: dict[int, list[int]] = {}
        self.shapes: list[Shape] = []
        self.memory_rows: list[MemoryRow] = []
        self._elastic, self._weights, self._memory, self._clock = elastic, weights, memory, clock
        self.prompts, self._ends, self._during_forward = prompts, ends, during_forward
        self._sampling = sampling
        self._staging = Staging(elastic.hardware)
        self._attention, self._graphs = attention or default_attention(arena), graphs
        self._prices = prices
        self._started = OPERATIONS

    def run(self, iteration: Iteration) -> Ran | None:
        """Run one iteration; return None if memory ran out and nothing was computed."""
        self._elastic.hardware.use()
        self._elastic.read(iteration.plan.nested)
        forward_start_s = self._clock.now_s()
        next_tokens = self._guarded_forward(iteration)
        if next_tokens is None:
            return None
        forward_s = self._clock.now_s() - forward_start_s
        decodes = iteration.decodes
        shape = Shape(
            plan=iteration.plan,
            chunks=tuple((tokens, live.computed_tokens) for live, tokens in iteration.prefills),
            decode_batch=len(decodes),
            decode_context_sum=sum(live.computed_tokens for live in decodes),
            sequences=len(next_tokens),
            forward_s=forward_s,
            started=self._started,
        )
        self._clock.ran(shape.prefill_tokens, shape.decode_batch, shape.decode_context_sum)
        end_s = self._clock.now_s()
        self.shapes.append(shape)
        self.memory_rows.append(
            MemoryRow(
                time_s=end_s,
                predicted_bytes=iteration.memory_bytes,
                allocated_bytes=self._weights.allocated_bytes + self.arena.allocated_bytes,
                in_use_bytes=self._memory.sample(),
            )
        )
        for request_id, token in next_tokens.items():
            self.tokens[request_id].append(token)
        ended = self._ends or (lambda _id, _token: False)
        priced_s = self._price(iteration)
        if self._prices is not None:
            self._prices.ended(end_s)
        return Ran(
            end_s=end_s,
            priced_s=priced_s,
            next_tokens=next_tokens,
            stopped=frozenset(request_id for request_id, token in next_tokens.items() if ended(request_id, token)),
        )

    def _price(self, iteration: Iteration) -> float | None:
        """Return the seconds that the calibration expects; None without one, or one that lacks a precision."""
        if self._prices is None:
            return None
        try:
            return self._prices.price(iteration)[0]
        except CalibrationError:
            return None

    def close(self) -> None:
        """Free the memory of recorded passes."""
        if self._graphs is not None:
            self._graphs.clear()

    def stream(self, resident: Resident, now_s: float) -> None:
        """Let the calibration expect what crosses the link; ``TorchWeights.drop`` streams it."""
        if self._prices is not None:
            self._prices.stream(resident, now_s)

    def prepare(self) -> None:
        """Allocate the slots of streamed layers."""
        attempt(self._elastic.hardware, self._elastic.streams.reserve)

    def follow_budget(self, budget_bytes: int) -> None:
        """Let allocations beyond this many bytes fail from now on, where the device can."""
        self._memory.follow(budget_bytes)

    def tokens_of(self, live: LiveRequest) -> list[int]:
        """Return the tokens of a request; its prompt is looked up when it first runs."""
        found = self.tokens.get(live.request_id)
        if found is None:
            found = list(self.prompts(live.request_id, live.request.prompt_tokens))
            assert len(found) == live.request.prompt_tokens
            self.tokens[live.request_id] = found
        return found

    def _guarded_forward(self, iteration: Iteration) -> dict[int, int] | None:
        """Return what ``forward`` does, None if memory ran out."""

        def step() -> dict[int, int]:
            with self._during_forward():
                return self.forward(iteration)

        try:
            return attempt(self._elastic.hardware, step)
        except MemoryError:
            return None

    def forward(self, iteration: Iteration) -> dict[int, int]:
        """Return the next token of every request that catches up with this iteration, by request.

        Raises:
            NumericsError: when the model gives a value that is not a finite number.
        """
        single = [self._packed(live, 1) for live in iteration.decodes]
        way = iteration.plan.kv_compression
        observed = 0 if way is None else OBSERVED.get(way.method, 0)
        chunks = [self._packed(live, tokens, observed) for live, tokens in iteration.prefills]
        # Rows of the pass whose logits count: every decode, and the last token of a chunk that ends its prefill.
        caught_up, rows, row = list(iteration.decodes), list(range(len(single))), len(single)
        for live, tokens in iteration.prefills:
            row += tokens
            if live.computed_tokens + tokens == live.target_tokens:
                caught_up.append(live)
                rows.append(row - 1)
        drawn, plan = Drawn(self._draws(caught_up)), iteration.plan
        fill_to = (self._graphs.rows_of(len(single)) or 0) if self._graphs is not None and not chunks else 0
        batch = self._batch(single, chunks, rows, drawn, plan, fill_to)
        chosen, finite = self._next_tokens(iteration, batch, drawn, recurs=fill_to > 0)
        # The only time that the host waits for the device.
        *read, is_finite = self._staging.read(torch.cat((chosen[: len(rows)], finite))).tolist()
        if not is_finite:
            raise self._not_finite(iteration, self._batch(single, chunks, rows, drawn, plan))
        return {live.request_id: token for live, token in zip(caught_up, read, strict=True)}

    def _draws(self, caught_up: Sequence[LiveRequest]) -> list[Draw]:
        """Return which of some requests, one for each row of logits, sample their next token."""
        if self._sampling is None:
            return []
        wanted = [(row, live, self._sampling(live.request_id)) for row, live in enumerate(caught_up)]
        return [Draw(row, sampling, live.produced_tokens) for row, live, sampling in wanted if sampling is not None]

    def _packed(self, live: LiveRequest, tokens: int, observed: int = 0) -> Packed:
        """Return what a request adds; ``observed``: of how many of its last prompt tokens the queries are kept."""
        start, since = live.computed_tokens, live.target_tokens - observed if observed else None
        return Packed(live.table, self.tokens_of(live)[start : start + tokens], start, since)

    def _batch(
        self,
        single: Sequence[Packed],
        chunks: Sequence[Packed],
        rows: Sequence[int],
        drawn: Drawn,
        plan: Plan,
        fill_to: int = 0,
    ) -> PagedBatch:
        return PagedBatch(
            self.arena,
            single,
            chunks,
            self._elastic.windows,
            rows,
            staging=self._staging,
            attention=self._attention,
            extra=drawn.arrays,
            fill_to=fill_to,
            kv_only=plan.kv_only,
            hidden=plan.kv_hidden,
        )

    def _next_tokens(
        self, iteration: Iteration, batch: PagedBatch, drawn: Drawn, *, recurs: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the next token of the rows that the batch wants, and [1] whether all logits are finite."""
        count, at_once = len(batch.wanted), logit_rows(self._elastic.spec)
        if count <= at_once:
            logits = self._run(iteration, batch, recurs=recurs)
            chosen = choose(logits, drawn, batch.extra)
            return chosen, all_finite(logits)[None].to(chosen.dtype)
        hidden = self._run(iteration, batch, recurs=recurs, head=False)
        tokens: list[Tensor] = []
        finite: list[Tensor] = []
        for first in range(0, count, at_once):
            logits = self._elastic.ends.logits(hidden[first : first + at_once])
            tokens.append(choose(logits, drawn, batch.extra, first))
            finite.append(all_finite(logits))
        return torch.cat(tokens), torch.stack(finite).all()[None].to(tokens[0].dtype)

    def _run(self, iteration: Iteration, batch: PagedBatch, *, recurs: bool, head: bool = True) -> Tensor:
        """Return what ``_pass`` returns, from a CUDA graph if the pass recurs and can have one."""
        self._started = OPERATIONS
        # The slots of streamed layers take turns, so such passes do not use the same addresses.
        if self._graphs is None or not recurs or not batch.uniform or self._elastic.streams.layers:
            return self._pass(iteration, batch, head=head)
        # The arena's memory may grow and shrink, but its addresses stay. Of a plan, a pass over decodes depends on the
        # masks and the bits of products: its limits of admission change often, and other precisions move the weights.
        state = self._staging.version, self._elastic.weights_version
        key = batch.layout, batch.layers, iteration.plan.decode, iteration.plan.prefill, iteration.plan.compute_bits
        logits = self._graphs.run(key, state, lambda: self._pass(iteration, batch, head=head))
        self._started = self._graphs.started
        return logits

    def _pass(self, iteration: Iteration, batch: PagedBatch, *, check: bool = False, head: bool = True) -> Tensor:
        """Return the logits of the rows that the batch wants; without ``head``, the input of the head."""
        plan = iteration.plan
        return forward(self._elastic, batch, prefill=plan.prefill, decode=plan.decode, check=check, head=head)

    def _not_finite(self, iteration: Iteration, batch: PagedBatch) -> NumericsError:
        """Run again to find the block that gave a value that is no finite number."""
        where = "the head"
        try:
            self._pass(iteration, batch, check=True)
        except NotANumberError as error:
            where = str(error)
        return NumericsError(
            f"{where} of {self._elastic.spec.name} gave a value that is no finite number in iteration "
            f"{iteration.number}, under the plan {describe(iteration.plan)!r}; take float32 or bfloat16 instead "
            "of float16, or leave that block at 16 bits"
        )
