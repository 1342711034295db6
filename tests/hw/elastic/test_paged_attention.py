"""Attention over the paged pool, in parts: what one call takes for a moment is bounded."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import hw.elastic.attention as paged  # noqa: E402
from hw.elastic.attention import masked_attention  # noqa: E402
from hw.elastic.device import Cpu  # noqa: E402
from hw.elastic.kv_storage import ArenaStorage  # noqa: E402
from hw.elastic.paged_attention import Packed, PagedBatch  # noqa: E402
from hw.elastic.paged_kv import KVArena  # noqa: E402
from sim.cost.kv_format import KVFormat  # noqa: E402
from sim.cost.plan import KVKeep  # noqa: E402
from sim.engine.block_table import BlockTable  # noqa: E402
from sim.engine.kv_pool import KVPool  # noqa: E402

HEADS, KV_HEADS, DIM, TOKENS = 6, 2, 8, 4


class Largest(TorchDispatchMode):
    """Remembers the most bytes of a tensor that an operation returned, without views of an arena."""

    nbytes = 0

    def __init__(self, arena: KVArena) -> None:
        super().__init__()
        self._arena = arena.kv.untyped_storage()._cdata

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata != self._arena:
                self.nbytes = max(self.nbytes, leaf.nbytes)
        return out


@pytest.mark.parametrize("window", [None, 9])
def test_attention_in_parts_is_that_of_one_call_and_takes_less_for_a_moment(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    torch.manual_seed(3)
    arena = KVArena(Cpu(), capacity=400, block_tokens=TOKENS, heads=KV_HEADS, head_dim=DIM, dtype=torch.float32)
    pool = KVPool(400, ArenaStorage(arena))
    arena.kv.normal_()
    decodes, chunks = [], []
    for tokens in (60, 61, 62, 17, 3, 59, 64, 33):
        table = BlockTable(mha=frozenset([0]), block_tokens=TOKENS)
        table.hold(pool, tokens)
        decodes.append(Packed(table, [0], tokens - 1))
    kept = KVFormat(KVKeep(first_tokens=2, last_tokens=9), 16, TOKENS, 1, 1)
    short = BlockTable(mha=frozenset([0]), block_tokens=TOKENS, formats=(kept,))
    short.hold(pool, 40)
    decodes.append(Packed(short, [0], 39))
    for prefix, new in ((0, 20), (37, 30)):
        table = BlockTable(mha=frozenset([0]), block_tokens=TOKENS)
        table.hold(pool, prefix + new)
        chunks.append(Packed(table, [0] * new, prefix))
    count = len(decodes) + 50
    qkv = torch.randn(count, (HEADS + 2 * KV_HEADS) * DIM)

    def attend() -> tuple[Any, int]:
        batch = PagedBatch(arena, decodes, chunks, [window])
        batch.rows(0)
        shape = {"heads": HEADS, "kv_heads": KV_HEADS, "scale": DIM**-0.5}
        with Largest(arena) as seen:
            found = batch.attend(0, qkv, None, **shape, q_norm=None, k_norm=None, eps=0.0, offset=0.0)
        return found, seen.nbytes

    at_once, large = attend()
    monkeypatch.setattr(paged, "PART_BYTES", 2 * 16 * arena.block_bytes)
    in_parts, small = attend()
    torch.testing.assert_close(in_parts, at_once)
    assert small < large
    assert small <= max(paged.PART_BYTES, qkv.nbytes)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_heads_that_share_a_kv_head_can_be_folded_into_its_queries(kv_heads: int, fold: bool) -> None:
    torch.manual_seed(4)
    query = torch.randn(1, 7, HEADS, DIM).transpose(1, 2)
    key, value = torch.randn(2, 1, kv_heads, 19, DIM)
    seen = torch.arange(19)[None] <= torch.arange(12, 19)[:, None]
    shared = [half.repeat_interleave(HEADS // kv_heads, dim=1) for half in (key, value)]
    scores = (query @ shared[0].transpose(2, 3) * 0.3).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(masked_attention(query, key, value, seen, 0.3, fold), scores.softmax(-1) @ shared[1])
