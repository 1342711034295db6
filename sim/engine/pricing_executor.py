"""The simulated seams of a replica: iterations take the time of a latency model, copies that of a constant link speed.

``Replica`` with these parts is the plain-Python simulator that tests compare the compiled engine with. The protocols
are in sim/engine/executor.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from sim.cost.ffn_width import FULL_WIDTH
from sim.cost.latency import LatencyModel, chunk_context_sum
from sim.cost.latency_tables import kv_only_in_range, projected_in_range
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import WEIGHT_BITS, Plan
from sim.cost.streaming import SHARED_LINK, slowed_s, stream_ready_s, stream_rows, streamed_end_s
from sim.engine.executor import Iteration, Ran
from sim.engine.live_request import LiveRequest
from sim.engine.transition import LayerCopy, Resident
from sim.errors import ConfigError
from sim.limits import check_slowdown
from sim.types import Ints


class SimulatedClock:
    """A clock that moves only by ``wait_until``."""

    def __init__(self, start_s: float = 0.0) -> None:
        """Start at ``start_s``."""
        self._time_s = start_s

    def now_s(self) -> float:
        """Return the present time."""
        return self._time_s

    def wait_until(self, time_s: float) -> None:
        """Advance to ``time_s``, if that is later."""
        self._time_s = max(self._time_s, time_s)


class PricingExecutor:
    """Computes nothing: an iteration takes as long as the latency model predicts."""

    def __init__(
        self,
        latency: LatencyModel,
        copy_slowdown: float = 0.0,
        host_to_device_bytes_per_s: float = 25e9,
        slowdown: float = 1.0,
        token_of: Callable[[int, int], int] | None = None,
        model: ModelSpec | None = None,
        copy_layer_s: float = 0.0,
    ) -> None:
        """Use ``latency``; an iteration that starts during a copy takes 1 + ``copy_slowdown`` times as long.

        ``host_to_device_bytes_per_s``: how fast KV is copied to the host and back, and streamed layers are copied in.
        ``model``: what runs; without it no layer can be streamed or be one of ``kv_only``.
        ``copy_layer_s``: of each layer's copy in addition.
        ``slowdown``: an iteration takes this times as long as priced.
        ``token_of``: called with a request_id and how many tokens the request has; returns its next token. None: no
        tokens.
        """
        if not copy_slowdown >= 0:
            raise ConfigError(f"copy_slowdown is {copy_slowdown}; it must be at least 0")
        check_slowdown(slowdown)
        self._latency, self._copy_slowdown, self._slowdown = latency, copy_slowdown, slowdown
        self._bytes_per_s = host_to_device_bytes_per_s
        self._token_of, self._model, self._layer_s = token_of, model, copy_layer_s
        self._crossing: list[tuple[int, int]] = []
        self._stream_bytes, self._stream_shares = stream_rows([], [], [])
        self._ready_s = (0.0, 0.0)
        self._said_end_s = math.nan

    def stream(self, resident: Resident, now_s: float) -> None:
        """Let the layers that ``resident`` streams cross the link from now on."""
        layers = resident.crossing()
        if not layers:
            self._crossing = []
            return
        if self._model is None:
            raise ConfigError("a plan streams layers, but the executor was built without its model; pass model=")
        sizes = resident.layer_bytes(self._model)
        self._stream_bytes, self._stream_shares = stream_rows(sizes, resident.blocks(), resident.streamed)
        crossing = [(layer, sizes[layer]) for layer in layers]
        if crossing != self._crossing:
            first_s, second_s = stream_ready_s(
                self._stream_bytes, 0, len(layers), now_s, self._bytes_per_s, self._layer_s, self._slowdown
            )
            self._crossing, self._ready_s = crossing, (float(first_s), float(second_s))
            self._said_end_s = math.nan

    def run(self, iteration: Iteration) -> Ran:
        """Return when the iteration ends."""
        priced_s, extrapolated = self.price(iteration)
        end_s = iteration.start_s + priced_s * self._slowdown
        tokens = {} if self._token_of is None else self._next_tokens(iteration, self._token_of)
        return Ran(end_s=end_s, priced_s=priced_s, extrapolated=extrapolated, next_tokens=tokens)

    def _next_tokens(self, iteration: Iteration, token_of: Callable[[int, int], int]) -> dict[int, int]:
        """Return the tokens of the requests of which everything is computed after this iteration."""
        return {
            live.request_id: token_of(live.request_id, live.produced_tokens)
            for live, tokens in iteration.batch.scheduled
            if live.computed_tokens + tokens == live.target_tokens
        }

    def prepare(self) -> None:
        """Do nothing: nothing is allocated."""

    def ended(self, end_s: float) -> None:
        """Say when the iteration that was priced last has really ended: copies go on from there."""
        if self._crossing and math.isfinite(self._said_end_s):
            first_s, second_s = self._ready_s
            self._ready_s = first_s + (end_s - self._said_end_s), second_s + (end_s - self._said_end_s)
            self._said_end_s = end_s

    def follow_budget(self, budget_bytes: int) -> None:
        """Do nothing: simulated KV blocks have no memory."""

    def price(self, iteration: Iteration) -> tuple[float, bool]:
        """Return the seconds of an iteration, and whether they are extrapolated."""
        plan, decodes = iteration.plan, iteration.decodes
        chunks = [(tokens, live.computed_tokens) for live, tokens in iteration.prefills]
        contexts = sum(live.computed_tokens for live in decodes)
        scheduled = iteration.batch.scheduled
        # Only requests whose tokens are all computed after this iteration reach the LM head and get a next token.
        sequences = sum(live.computed_tokens + tokens == live.target_tokens for live, tokens in scheduled)
        shape = (chunks, len(decodes), contexts, sequences)
        # If some request lacks KV of a layer, or keeps only a part of it, the layers differ and are priced one by one.
        alike = all(live.table.formats is None and live.mha == _mha_run(plan, live) for live, _ in scheduled)
        inside = self._latency.in_range(*shape)
        if skips := any(plan.kv_only) and bool(chunks):
            ends = [live.target_tokens for live, _ in _ending(iteration)]
            inside = inside and kv_only_in_range(self._latency.tables, len(decodes) + len(ends), contexts + sum(ends))
        if alike and not skips and not plan.cuts_ffn:
            seconds = self._latency.iteration_s(plan, *shape)
        else:
            tokens = sum(chunk for chunk, _ in chunks) + len(decodes)
            rows = _layers_seen(iteration)
            seconds = self._latency.layered_iteration_s(rows, tokens, sequences, self._qkv_share(plan))
            inside = inside and projected_in_range(self._latency.tables, rows)
        if iteration.copying:
            seconds *= 1.0 + self._copy_slowdown
        if self._crossing:
            seconds = self._with_streams(seconds, iteration)
        if iteration.moved_bytes:
            seconds += iteration.moved_bytes / self._bytes_per_s
        return seconds, not inside

    def _qkv_share(self, plan: Plan) -> float:
        """Return the share of an MHA block that tokens run which only write KV."""
        if self._model is not None:
            return self._model.qkv_share
        if any(plan.kv_only):
            raise ConfigError("a plan has layers of kv_only, but the executor was built without its model; pass model=")
        return 1.0

    def _with_streams(self, compute_s: float, iteration: Iteration) -> float:
        """Return the seconds of an iteration that waits for streamed layers, on a machine of slowdown 1."""
        count = len(self._crossing)
        if not iteration.copying:  # a plan change that copies slows computing down all the time
            compute_s = slowed_s(
                self._stream_bytes, 0, count, compute_s, self._bytes_per_s, self._layer_s, self._copy_slowdown
            )
        end_s, *ready_s = streamed_end_s(
            self._stream_bytes,
            self._stream_shares,
            0,
            count,
            iteration.start_s,
            compute_s * self._slowdown,
            self._bytes_per_s,
            self._layer_s,
            self._slowdown * (SHARED_LINK if iteration.copying else 1.0),
            *self._ready_s,
        )
        self._ready_s, self._said_end_s = (ready_s[0], ready_s[1]), end_s
        return float((end_s - iteration.start_s) / self._slowdown)


def _mha_run(plan: Plan, live: LiveRequest) -> frozenset[int]:
    mask = plan.decode.mha if live.decoding else plan.prefill.mha
    return frozenset(layer for layer, keep in enumerate(mask) if keep)


def _ending(iteration: Iteration) -> list[tuple[LiveRequest, int]]:
    """Return the requests in prefill that end it with this iteration."""
    return [
        (live, tokens) for live, tokens in iteration.prefills if live.computed_tokens + tokens == live.target_tokens
    ]


def _layers_seen(iteration: Iteration) -> Ints:
    """Return int64[k, 10], the load of each layer; layers with equal loads share a row, in order of first appearance.

    Columns: layers, index of the products' bits, prefill tokens, their context, decodes, their context, FFN tokens,
    prompt tokens that only write KV, eighths of the FFN block's channels that do not run, tokens stored as hidden
    states. In a layer of `kv_only` the last token of a prompt counts as a decode.
    """
    plan, decodes, prefills = iteration.plan, iteration.decodes, iteration.prefills
    rows: dict[tuple[int, ...], int] = {}
    ending = _ending(iteration)
    prefill_tokens = sum(tokens for _, tokens in prefills)
    for layer, bits in enumerate(plan.product_bits):
        chunks = [(tokens, live.computed_tokens) for live, tokens in prefills if layer in live.mha]
        reading = [live for live in decodes if layer in live.mha]
        queries, context, writing, feeding = len(reading), _read_tokens(reading, layer), 0, prefill_tokens
        if plan.kv_only[layer]:
            last = [live.target_tokens for live, _ in ending if layer in live.mha]
            writing, feeding = sum(tokens for tokens, _ in chunks) - len(last), len(ending)
            queries, context, chunks = queries + len(last), context + sum(last), []
        seen = (
            WEIGHT_BITS.index(bits),
            sum(tokens for tokens, _ in chunks),
            sum(chunk_context_sum(tokens, prefix) for tokens, prefix in chunks),
            queries,
            context,
            feeding * plan.prefill.ffn[layer] + len(decodes) * plan.decode.ffn[layer],
            writing,
            FULL_WIDTH - plan.ffn_width[layer],
            sum(live.computed_tokens for live in reading if live.table.stores_hidden),
        )
        rows[seen] = rows.get(seen, 0) + 1
    return np.array([(count, *seen) for seen, count in rows.items()], dtype=np.int64)


def _read_tokens(decodes: Sequence[LiveRequest], layer: int) -> int:
    """Return how many tokens at 16 bits have the bytes that decodes read of a layer, rounded down."""
    tokens, stored_bytes, full_bytes = 0, 0, 1
    for live in decodes:
        if live.table.formats is None:
            tokens += live.computed_tokens
        else:
            form = live.table.formats[layer]
            stored_bytes += form.read_bytes(live.computed_tokens - live.table.saved_tokens)
            full_bytes = form.full_token_bytes
    return tokens + stored_bytes // full_bytes


class PricedWeights:
    """Copies layers over a link of constant speed; dropping blocks takes no time.

    end_s: when the copy under way is complete; ``inf`` for none.
    """

    def __init__(self, host_to_device_bytes_per_s: float, clock: SimulatedClock, copy_layer_s: float = 0.0) -> None:
        """Copy at this speed, on this clock; each layer takes ``copy_layer_s`` in addition."""
        if not host_to_device_bytes_per_s > 0:
            raise ConfigError(f"host_to_device_bytes_per_s is {host_to_device_bytes_per_s}; it must be above 0")
        self._bytes_per_s, self._clock, self._layer_s = host_to_device_bytes_per_s, clock, copy_layer_s
        self.end_s = math.inf

    def drop(self, resident: Resident) -> None:
        """Do nothing: the replica counts what is resident."""

    def start(self, copy: LayerCopy, now_s: float, *, shared: bool = False) -> None:
        """Start to copy a layer in."""
        copy_s = copy.copied_bytes / self._bytes_per_s + self._layer_s
        self.end_s = now_s + (copy_s * SHARED_LINK if shared else copy_s)

    def arrived(self, now_s: float) -> bool:
        """Return whether the copy under way is complete."""
        return self.end_s <= now_s

    def wait(self, now_s: float, until_s: float) -> None:
        """Wait until ``until_s``, or until the copy is complete."""
        self._clock.wait_until(min(self.end_s, until_s))

    def join(self) -> None:
        """End the copy."""
        self.end_s = math.inf

    def abandon(self) -> None:
        """Abandon the copy."""
        self.end_s = math.inf
