"""The state of a replica, and how it is shown: records, tables, and the state that a policy observes.

``sim.engine.replica.Replica`` extends this class with the rules that change the state; nothing here changes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sim.cost.memory import kv_block_layer_bytes, weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan, dense_plan
from sim.engine.block_table import BlockTable
from sim.engine.budget import Budget, BudgetMeter
from sim.engine.executor import Weights
from sim.engine.iteration_log import IterationLog
from sim.engine.kv_manager import KVManager
from sim.engine.kv_pool import KVPool, KVStorage
from sim.engine.live_request import RequestQueues, records_of
from sim.engine.plan_changes import PlanChanges
from sim.engine.prefix_cache import held_prefix_blocks
from sim.engine.protocol import EngineConfig, EngineState, Holder
from sim.results.records import Iterations, Records, Status, TokenGaps, Transitions
from sim.types import Ints


class ReplicaState:
    """Everything that one replica remembers.

    model, config, budget: as passed to the constructor. queues: its requests.
    out_of_memory: how often the device had no memory for an iteration, or for a step between two.
    """

    def __init__(
        self,
        *,
        model: ModelSpec,
        config: EngineConfig,
        plan: Plan,
        budget: Budget,
        weights: Weights,
        storage: KVStorage | None,
        workspace_bytes: int,
        priced: bool,
        start_s: float,
    ) -> None:
        """Begin without requests; ``priced`` is whether requests are charged a quality loss."""
        self.model, self.config, self.budget = model, config, budget
        self.queues = RequestQueues()
        self._changes = PlanChanges(model, plan, weights)
        self._kv = KVManager(config, self.queues, storage, model)
        self._meter = BudgetMeter(budget, start_s)
        self._log = IterationLog()
        self._kept_share: list[tuple[float, float]] = []
        self._workspace_bytes, self._priced = workspace_bytes, priced
        self._block_bytes = kv_block_layer_bytes(model, config.kv_block_tokens)
        self._dense_weight_bytes = weight_bytes(model, dense_plan(model))
        self._context_limit = 0
        self._arrived_prompt_tokens = self._first_tokens = self._produced_tokens = 0
        self._finished = self._rejected = self._preemptions = self.out_of_memory = 0
        self._ttft_sum_s = self._busy_s = self._priced_s = 0.0
        self._forgotten = 0

    def forget_ended(self) -> None:
        """Drop the requests that have ended and the rows of all logs, so that a server's memory stays bounded.

        The counters of ``EngineState`` stay; ``records`` and the tables lose what is dropped.
        """
        queues = self.queues
        ended = [i for i, live in queues.all.items() if live.status in (Status.FINISHED, Status.REJECTED)]
        for request_id in ended:
            del queues.all[request_id]
        self._forgotten += len(ended)
        self._log.forget()
        self._changes.log.forget()
        del self._kept_share[:-1]

    def records(self, request_ids: Sequence[int] | None = None) -> Records:
        """Return one row per request: ``request_ids``, or all that have arrived, in order of arrival."""
        known = self.queues.all
        live = list(known.values()) if request_ids is None else [known[i] for i in request_ids]
        return records_of(live, self.model, priced=self._priced)

    def arrival_order(self) -> Ints:
        """Return the id of each row of ``records``: int64[arrived]."""
        return np.array(list(self.queues.all), dtype=np.int64)

    def iterations(self) -> Iterations:
        """Return one row per iteration."""
        return self._log.table()

    def token_gaps(self) -> TokenGaps:
        """Return every gap between two tokens of one request."""
        return self._log.token_gaps()

    def transitions(self) -> Transitions:
        """Return one row per plan change."""
        return self._changes.log.table()

    def kept_share(self) -> tuple[tuple[float, float], ...]:
        """Return (time_s, resident bytes as a share of the dense weights' bytes), one entry per change."""
        return tuple(self._kept_share)

    @property
    def budget_violation_s(self) -> float:
        """Seconds so far in which the held bytes exceeded the budget."""
        return self._meter.violation_s

    @property
    def context_limit(self) -> int:
        """Largest sum of prompt and output tokens of one request."""
        return self._context_limit

    @property
    def request_ids(self) -> list[int]:
        """The requests that have arrived, in the order of ``records``."""
        return list(self.queues.all)

    @property
    def pool(self) -> KVPool:
        """The pool of KV blocks."""
        return self._kv.pool

    @property
    def outside(self) -> dict[int, BlockTable]:
        """Block tables, by request id, of requests that hold KV here without running here."""
        return self._kv.outside

    @property
    def host_layer_blocks(self) -> tuple[int, int]:
        """KV blocks of one layer in host memory: those that swapped requests hold, and the free ones."""
        free = self._kv.host_free_layer_blocks
        return self._kv.host_layer_blocks - free, free

    def holders(self) -> list[Holder]:
        """Return the running requests, in order of admission, and the KV that each holds."""
        return [
            Holder(
                request_id=live.request_id,
                mha=live.mha,
                tokens=live.computed_tokens,
                layer_blocks=live.table.own_layer_blocks,
                decoding=live.decoding,
            )
            for live in self.queues.running
        ]

    @property
    def shared_layer_blocks(self) -> int:
        """KV blocks of the prefix blocks that requests hold, each counted once even if several requests hold it."""
        return len(held_prefix_blocks(self.queues.running))

    def check(self) -> None:
        """Check that every KV block is either held once or free once, and that tables and pool agree."""
        self._kv.check()

    @property
    def held_bytes(self) -> int:
        """Bytes of weights, workspace, KV, and the layer that is being copied in."""
        weights = self._changes.weight_bytes + self._changes.incoming_bytes
        return weights + self._workspace_bytes + self.pool.used_layer_blocks * self._block_bytes

    @property
    def counted_bytes(self) -> int:
        """Bytes that may be taken now: those of weights, workspace, the layer to be copied in, and the entire pool."""
        weights = self._changes.weight_bytes + self._changes.incoming_bytes
        return weights + self._workspace_bytes + self.pool.stored_layer_blocks * self._block_bytes

    def _state(self, time_s: float) -> EngineState:
        """Return the state at ``time_s``, to which everything has been advanced."""
        queues, changes = self.queues, self._changes
        next_bytes, next_s = self._meter.announced(time_s)
        return EngineState(
            time_s=time_s,
            waiting=len(queues.waiting),
            waiting_tokens=sum(live.target_tokens for live in queues.waiting),
            oldest_wait_s=time_s - queues.waiting[0].request.arrival_s if queues.waiting else 0.0,
            running=len(queues.running),
            running_tokens=sum(live.computed_tokens for live in queues.running),
            kv_layer_blocks=self.pool.layer_blocks,
            kv_used_layer_blocks=self.pool.used_layer_blocks,
            budget_bytes=self._meter.now_bytes,
            weight_bytes=changes.weight_bytes,
            arrived=self._forgotten + len(queues.all),
            arrived_prompt_tokens=self._arrived_prompt_tokens,
            first_tokens=self._first_tokens,
            ttft_sum_s=self._ttft_sum_s,
            produced_tokens=self._produced_tokens,
            finished=self._finished,
            rejected=self._rejected,
            preemptions=self._preemptions,
            iterations=len(self._log),
            busy_s=self._busy_s,
            priced_s=self._priced_s,
            next_budget_bytes=next_bytes,
            next_budget_s=next_s,
            budget_violation_s=self._meter.violation_s,
            incoming_bytes=changes.incoming_bytes,
            plan=changes.plan,
            target=changes.wanted,
        )
