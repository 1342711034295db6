"""The KV cache of a replica: which KV blocks each request holds, when they are freed, and which are found again.

It works on block numbers and combines three modules: ``sim.engine.kv_pool`` (which blocks are free),
``sim.engine.block_table`` (what each block of a request holds) and ``sim.engine.prefix_cache`` (blocks that several
requests share). On a device, memory lies behind the numbers (hw/elastic/paged_kv.py); in simulation, none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sim.cost.kv_format import kv_formats, saved_tokens
from sim.cost.memory import kv_blocks
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan
from sim.engine.block_table import BlockTable
from sim.engine.kv_pool import NO_OWNER, KVPool, KVStorage
from sim.engine.live_request import LiveRequest, RequestQueues
from sim.engine.prefix_cache import PrefixCache, held_prefix_blocks
from sim.engine.protocol import EngineConfig
from sim.results.records import Status


class KVManager:
    """The KV blocks of a replica, and the requests that hold them.

    prefill_mha, decode_mha: layers whose MHA block the running plan runs in prefill and in decode.
    outside: block tables, by request id, of requests that hold KV here without running here (prefill and decode on
        different replicas).
    host_layer_blocks, host_free_layer_blocks: KV blocks of one layer in host memory, all and free ones.
    moved_layer_blocks: KV blocks copied to the host and back that no iteration has taken the time for yet.

    Between the admission of a request that comes back from the host and the moment when it takes the blocks for its
    KV, in the same batch, ``_arriving`` says how many blocks of each layer were saved.
    """

    def __init__(
        self, config: EngineConfig, queues: RequestQueues, storage: KVStorage | None, model: ModelSpec
    ) -> None:
        """Begin with an empty pool; call ``follow_plan`` and ``resize`` next."""
        self.host_layer_blocks = self.host_free_layer_blocks = model.num_layers * config.host_kv_blocks
        self.moved_layer_blocks = 0
        self._config, self._queues, self._storage, self._model = config, queues, storage, model
        self.pool = KVPool(0, storage)
        self.prefix_cache = PrefixCache(config, self.pool)
        self.prefill_mha: frozenset[int] = frozenset()
        self.decode_mha: frozenset[int] = frozenset()
        self.outside: dict[int, BlockTable] = {}
        self._arriving: dict[int, int] = {}

    # -- what the scheduler needs --------------------------------------------------------------------------------

    def look_up_waiting(self) -> None:
        """Set ``computed_tokens`` of each waiting request to the tokens that it would find if it were admitted now."""
        for live in self._queues.waiting:
            live.computed_tokens = max(live.left_tokens, self.prefix_cache.found_tokens(live))

    def layer_blocks(self, live: LiveRequest, tokens: int) -> int:
        """Return the KV blocks, over all layers, that a request needs for ``tokens`` computed tokens."""
        if live.status is not Status.RUNNING:
            mha = self.mha_of(live) if live.swapped else self.prefill_mha
            return len(mha) * kv_blocks(tokens, self._config.kv_block_tokens)
        return live.table.own_blocks_needed(tokens) + live.table.cached_layer_blocks

    def new_table(self, mha: frozenset[int]) -> BlockTable:
        """Return the empty table of a request that runs these MHA blocks."""
        size = self._config.kv_block_tokens
        return BlockTable(mha, size, prefix_layer_blocks=self._config.hash_block_tokens // size)

    def table_after_prefill(self, plan: Plan, tokens: int) -> BlockTable:
        """Return the empty table of a request whose first ``tokens`` tokens another replica has computed."""
        table = self.new_table(self.decode_mha)
        table.formats = kv_formats(self._model, plan, self._config.kv_block_tokens)
        table.saved_tokens = saved_tokens(plan, tokens)
        return table

    # -- taking and freeing --------------------------------------------------------------------------------------

    def admit(self, live: LiveRequest) -> None:
        """Let an admitted request hold the KV that it finds: prefix blocks, and what it left when it was preempted."""
        if live.swapped:
            self._swap_in(live)
            return
        live.table = self.new_table(self.prefill_mha)
        self.prefix_cache.hold(live)
        own = live.table.own_blocks_needed(live.computed_tokens)
        live.table.found(self.pool.claim(live.request_id, own))

    def hold(self, live: LiveRequest, tokens: int) -> None:
        """Take or free KV blocks so that a request holds what ``tokens`` computed tokens need."""
        if not live.table.holds_exactly(tokens):
            self._overwritten(live.table.hold(self.pool, tokens))
        if self._arriving and (saved := self._arriving.pop(live.request_id, 0)):
            assert self._storage is not None
            self._storage.load_from_host(live.request_id, live.table.leading_blocks(saved))

    def hold_outside(self, request_id: int, table: BlockTable, tokens: int) -> None:
        """Hold KV blocks for ``tokens`` tokens of a request that does not run here, until it joins or is released."""
        self._overwritten(table.hold(self.pool, tokens))
        self.outside[request_id] = table

    def end_prefill(self, live: LiveRequest, plan: Plan) -> None:
        """Free the KV that decode will not read: layers that it does not run, tokens and bits that the plan drops.

        Raises:
            MemoryError: if there is no memory to move the tokens that stay; the KV of the request is of no use then.
        """
        table = live.table
        table.mha = table.mha & self.decode_mha
        formats = kv_formats(self._model, plan, self._config.kv_block_tokens)
        if formats is not None and not table.prefix:  # a request that holds prefix blocks keeps all of its KV
            saved = saved_tokens(plan, live.computed_tokens)
            if self._storage is not None and saved:
                assert plan.kv_compression is not None
                table.packed = self._storage.compress(table, live.computed_tokens, plan.kv_compression, formats)
            elif self._storage is not None:
                for layer in sorted(table.blocks):
                    source, target = table.end_prefill(layer, live.computed_tokens, formats[layer])
                    if source:
                        self._storage.copy(source, target, formats[layer].bits, hidden=formats[layer].hidden)
            table.formats, table.saved_tokens = formats, saved
        table.observed = None
        self.hold(live, live.computed_tokens)

    def let_go(self, live: LiveRequest, owner: int = NO_OWNER) -> None:
        """Free what a request holds: first its own blocks, then its prefix blocks from the last to the first.

        ``owner``: the request id if the freed blocks stay readable for it, else ``NO_OWNER``.
        """
        self.pool.release(live.table.own_blocks(), owner)
        self.prefix_cache.let_go(live)
        live.table = self.new_table(frozenset())

    def _can_swap(self, live: LiveRequest) -> bool:
        """Return whether the KV of a running request is complete and fits into host memory."""
        table = live.table
        complete = table.formats is None and table.mha == self.mha_of(live)
        return complete and 0 < table.held_layer_blocks <= self.host_free_layer_blocks

    def _swap_in(self, live: LiveRequest) -> None:
        """Bring a swapped request back: its table is filled when it takes the KV blocks of its next tokens."""
        live.table = self.new_table(self.mha_of(live))
        self.moved_layer_blocks += live.host_layer_blocks
        if self._storage is not None:  # real KV is copied back when the blocks for it are taken
            self._arriving[live.request_id] = live.host_layer_blocks // len(live.table.mha)
        self._free_host_kv(live)

    def _free_host_kv(self, live: LiveRequest) -> None:
        self.host_free_layer_blocks += live.host_layer_blocks
        live.host_layer_blocks = 0

    def drop_host_kv(self, live: LiveRequest) -> None:
        """Free the KV that a request holds in host memory, if any, with its content."""
        self._free_host_kv(live)
        if self._storage is not None:
            self._storage.forget_on_host(live.request_id)

    def preempt(self, live: LiveRequest, *, usable: bool = True) -> bool:
        """Copy the KV of a preempted request to the host or free it; return whether it was copied.

        With ``reuse_preempted_kv`` a request whose KV is freed may find it again if it is usable.
        """
        assert not self._arriving
        table, cache = live.table, self.prefix_cache
        if usable and self._storage is not None and self.host_layer_blocks:
            self.hold(live, live.computed_tokens)  # a failed pass leaves blocks for what it did not compute
        if usable and self._can_swap(live):
            if self._storage is not None:
                self._storage.save_on_host(live.request_id, table.leading_blocks())
            live.host_layer_blocks = table.held_layer_blocks
            self.host_free_layer_blocks -= live.host_layer_blocks
            self.moved_layer_blocks += live.host_layer_blocks
            self.let_go(live)
            live.left_tokens = live.computed_tokens
            return True
        # It can resume only from complete KV: every token and bit, every layer of prefill, every prefix block.
        complete = usable and table.formats is None and table.mha == self.prefill_mha
        complete = complete and len(table.prefix) == cache.blocks_within(live, live.computed_tokens)
        complete = complete and all(block.known for block in table.prefix.values())
        self.let_go(live, live.request_id if self._config.reuse_preempted_kv and complete else NO_OWNER)
        live.left_tokens = live.computed_tokens
        live.left_tokens = live.computed_tokens = self._found_again(live)
        return False

    def _found_again(self, live: LiveRequest) -> int:
        """Return the leading tokens of a preempted request whose KV is still there, in complete KV blocks.

        At least one token is computed again, as in vLLM, because the next token is sampled from its output.
        """
        kept = self.pool.kept_layer_blocks(live.request_id)
        if not kept:
            return 0
        block_tokens = self._config.kv_block_tokens
        # Its prefix blocks were freed after its own blocks, so all of them remain while one own block does.
        cached = self.prefix_cache.blocks_within(live, live.left_tokens)
        cached *= self._config.hash_block_tokens // block_tokens
        # The last block may be partly filled; such a block is never found again.
        blocks = min(cached + kept // len(self.prefill_mha), live.left_tokens // block_tokens)
        return min(blocks, (live.target_tokens - 1) // block_tokens) * block_tokens

    def _overwritten(self, owners: Iterable[int]) -> None:
        """Handle the loss of freed content, by owner: a preempted request finds less, a prefix block is forgotten."""
        for owner in owners:
            if owner > NO_OWNER:
                live = self._queues.all[owner]
                live.left_tokens = self._found_again(live)
            else:
                self.prefix_cache.overwritten(owner)

    def forget_left_behind(self) -> None:
        """Let no preempted request find again what it left behind."""
        self.pool.forget()
        for live in self._queues.waiting:
            if not live.swapped:
                live.left_tokens = 0

    def _forget_host_kv(self) -> None:
        """Let every swapped request be computed again."""
        for live in self._queues.waiting:
            if live.swapped:
                self.drop_host_kv(live)
                live.left_tokens = 0

    # -- when the plan or the budget changes ---------------------------------------------------------------------

    def follow_plan(self, plan: Plan) -> None:
        """Adapt to the plan that runs from now on: what may be found again, and which held KV is useless now."""
        prefill_mha = frozenset(layer for layer, keep in enumerate(plan.prefill.mha) if keep)
        one_set = bool(prefill_mha) and plan.prefill.mha == plan.decode.mha
        formats = kv_formats(self._model, plan, self._config.kv_block_tokens)
        caching = self._config.prefix_caching and formats is None and one_set
        if prefill_mha != self.prefill_mha or caching != self.prefix_cache.active:
            self.forget_left_behind()  # that KV lacks a layer, or has one too many
            self.prefix_cache.forget(self._queues.running)
        decode_mha = frozenset(layer for layer, keep in enumerate(plan.decode.mha) if keep)
        if (prefill_mha, decode_mha) != (self.prefill_mha, self.decode_mha):
            self._forget_host_kv()
        self.prefill_mha, self.prefix_cache.active, self.decode_mha = prefill_mha, caching, decode_mha
        for live in self._queues.running:  # free the KV of MHA blocks that no longer run
            kept = live.mha & self.mha_of(live)
            if kept != live.mha:
                live.table.mha = kept
                self.hold(live, live.computed_tokens)
        self.prefix_cache.drop_layers(self._queues.running, prefill_mha)

    def mha_of(self, live: LiveRequest) -> frozenset[int]:
        """Return the MHA blocks that the plan runs at a request's stage, whether or not it holds their KV."""
        return self.decode_mha if live.decoding else self.prefill_mha

    def resize(self, layer_blocks: int) -> bool:
        """Grow or shrink the pool; return whether its size changed.

        Raises:
            MemoryError: if there is no memory to grow; the size stays.
        """
        if layer_blocks == self.pool.layer_blocks:
            return False
        self._overwritten(self.pool.resize(layer_blocks))
        return True

    def settle(self) -> None:
        """Free the memory that the pool has lost, and rename the blocks that moved to make that possible.

        Raises:
            MemoryError: if there is no memory to move them, or to free all of it; the next call tries again.
        """
        moved = self.pool.settle()
        if moved:
            for table in self._tables():
                table.rename(moved)
            self.prefix_cache.rename(self._queues.running, moved)
        if self._storage is not None and self.pool.free_layer_blocks >= 0 and not self.pool.settled:
            raise MemoryError("a part of the KV pool could not be freed")

    def _tables(self) -> Sequence[BlockTable]:
        return [*(live.table for live in self._queues.running), *self.outside.values()]

    def check(self) -> None:
        """Check that every KV block is either held once or free once, and that tables and pool agree."""
        held = [block for table in self._tables() for ids in table.blocks.values() for block in ids]
        held += held_prefix_blocks(self._queues.running)
        self.pool.check(held)
        assert len(held) == self.pool.used_layer_blocks
        assert not any(live.table.blocks or live.table.prefix for live in self._queues.waiting)
        on_host = sum(live.host_layer_blocks for live in self._queues.waiting)
        assert on_host + self.host_free_layer_blocks == self.host_layer_blocks
        assert self.host_free_layer_blocks >= 0
        assert not any(live.swapped for live in self._queues.running)
