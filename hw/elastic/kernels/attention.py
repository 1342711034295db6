"""Attention over the paged KV pool: decodes, and prompt chunks that follow a stored prefix.

Both read keys and values where they lie, by block number (Kwon et al., PagedAttention, SOSP 2023, section 4.3). They
keep a running maximum and sum of the softmax in FP32, so that no score is ever written to memory (Dao,
FlashAttention-2, arXiv 2307.08691, section 3.1). All query heads that share a KV head are rows of one tile, so each key
is loaded once. A tile has at least 16 rows, the least that the matrix units take, even where one head has its own keys:
sums in place of products take almost five times as many instructions then (compute capability 9.0, head_dim 128).

Decode splits each context over several programs and then combines their parts (Dao et al., Flash-Decoding, Stanford
CRFM blog, 2023): a small batch would leave most multiprocessors without work. How many programs there are depends on
the number of requests and the width of the table; how many tokens each gets, on the context found on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hw.elastic.kernels.launch import ceil_div, dot, launch, multiprocessors, power_of_two

# Shapes as in hw.elastic.ops; g = H / h query heads share a KV head.

TILE_BYTES = 16 << 10
"""Bytes of the keys of a tile, half as many in FP32, which takes more registers."""
PROGRAMS_PER_MULTIPROCESSOR = 4
SPLIT_TOKENS = 2048
"""A program of decode reads about this many tokens at most: one long context must not outlast the rest of a batch."""
LEAST_SPLIT_TOKENS = 128
MOST_SPLITS = 64
LOG2_E = 1.4426950408889634


def paged_decode(
    query: Tensor,
    kv: Tensor,
    table: Tensor,
    tokens: Tensor,
    first: Tensor,
    last: Tensor,
    scale: float,
    window: int,
    out: Tensor | None = None,
) -> Tensor:
    """Return what ``hw.elastic.ops.paged_decode`` describes."""
    requests, heads, d = query.shape
    p, kv_heads = kv.shape[2:4]
    _check(query, kv, table)
    out = _output(query, out)
    splits = decode_splits(requests, kv_heads, table.shape[1] * p, multiprocessors(query.device))
    part, sums = out, out
    if splits > 1:
        part = torch.empty((requests, heads, splits, d), dtype=torch.float32, device=query.device)
        sums = torch.empty((requests, heads, splits), dtype=torch.float32, device=query.device)
    group = heads // kv_heads
    tile = tile_tokens(d, kv.element_size())
    launch(
        _decode_kernel,
        (kv_heads, splits, requests),
        query,
        kv,
        table,
        tokens,
        first,
        last,
        part,
        sums,
        query.stride(0),
        query.stride(1),
        table.stride(0),
        *kv.stride()[:4],
        out.stride(0),
        out.stride(1),
        scale * LOG2_E,
        window,
        splits,
        HEADS=heads,
        GROUP=group,
        GROUP_BLOCK=power_of_two(group, 16),
        DIM=d,
        DIM_BLOCK=power_of_two(d, 16),
        TILE=tile,
        LEAST=max(LEAST_SPLIT_TOKENS, tile),
        KV_BLOCK_TOKENS=p,
        WINDOW=window > 0,
        SPLIT=splits > 1,
        num_stages=5,  # two tiles under way, 64 KiB; the table, which is read before the keys, takes stages too
    )
    if splits > 1:
        launch(
            _combine_kernel,
            (heads, requests),
            part,
            sums,
            out,
            out.stride(0),
            out.stride(1),
            splits,
            HEADS=heads,
            DIM=d,
            DIM_BLOCK=power_of_two(d, 16),
            SPLITS_BLOCK=power_of_two(splits),
        )
    return out


def decode_splits(requests: int, kv_heads: int, most_tokens: int, processors: int) -> int:
    """Return over how many programs to split each context of at most ``most_tokens`` tokens."""
    busy = ceil_div(PROGRAMS_PER_MULTIPROCESSOR * processors, max(requests * kv_heads, 1))
    wanted = max(busy, ceil_div(most_tokens, SPLIT_TOKENS))
    return max(min(wanted, ceil_div(most_tokens, LEAST_SPLIT_TOKENS), MOST_SPLITS), 1)


def tile_tokens(head_dim: int, element_bytes: int) -> int:
    """Return the keys of a tile: a power of two from 16 to 128."""
    elements = TILE_BYTES // 2 if element_bytes == 2 else TILE_BYTES // 8
    return min(max(elements // power_of_two(head_dim, 16), 16), 128)


def _check(query: Tensor, kv: Tensor, table: Tensor) -> None:
    assert query.stride(2) == kv.stride(4) == table.stride(1) == 1
    assert query.dtype == kv.dtype
    assert query.shape[1] % kv.shape[3] == 0
    assert query.shape[2] == kv.shape[4]


def _output(query: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    assert out.shape == query.shape
    assert out.dtype == query.dtype
    assert out.stride(2) == 1
    return out


@triton.jit
def _softmax_step(scores, seen, scale, most, total):
    """Return the shares of these scores, the new maximum and sum of each row, and what earlier shares shrink by."""
    scores = tl.where(seen, scores * scale, float("-inf"))
    new = tl.maximum(most, tl.max(scores, axis=1))
    # A row that has seen no key yet has the maximum -inf, and -inf - -inf is no number.
    base = tl.where(new == float("-inf"), 0.0, new)
    share = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(most - base)
    return share, new, total * shrink + tl.sum(share, axis=1), shrink


@triton.jit
def _place_offset(table, place, valid, kv_block, kv_place, KV_BLOCK_TOKENS: tl.constexpr):
    """Return where the keys of these places of a request start in the pool; ``table`` points to its blocks."""
    block = tl.load(table + place // KV_BLOCK_TOKENS, mask=valid, other=0).to(tl.int64)
    return block * kv_block + (place % KV_BLOCK_TOKENS) * kv_place


@triton.jit(do_not_specialize=["table", "tokens", "first", "last", "table_row", "window", "splits"])
def _decode_kernel(
    query,
    kv,
    table,
    tokens,
    first,
    last,
    part,
    sums,
    query_row,
    query_head,
    table_row,
    kv_block,
    kv_half,
    kv_place,
    kv_head,
    out_row,
    out_head,
    scale,
    window,
    splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    LEAST: tl.constexpr,
    KV_BLOCK_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
):
    shared = tl.program_id(0)  # the KV head: programs that run at the same time read keys that lie side by side
    split = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    count = tl.load(tokens + request)
    keep_first = tl.load(first + request)
    keep_last = tl.load(last + request)
    ring = keep_last > 0
    kept = tl.minimum(count, keep_first) + tl.minimum(tl.maximum(count - keep_first, 0), keep_last)
    kept = tl.where(ring, kept, count)
    low = kept * 0
    if WINDOW:
        low = tl.where(ring, 0, tl.maximum(count - window, 0))
    each = tl.maximum(tl.cdiv(tl.cdiv(kept - low, splits), TILE) * TILE, LEAST)
    begin = low + split * each
    end = tl.minimum(begin + each, kept)

    column = tl.arange(0, DIM_BLOCK)
    member = tl.arange(0, GROUP_BLOCK)
    head = shared * GROUP + member
    here = (member < GROUP)[:, None] & (column < DIM)[None, :]
    q = tl.load(
        query + request * query_row + head[:, None] * query_head + column[None, :], mask=here, other=0.0
    )  # [GROUP_BLOCK, DIM_BLOCK]
    most = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    gathered = tl.zeros((GROUP_BLOCK, DIM_BLOCK), tl.float32)
    keys = kv + shared * kv_head + column[None, :]
    for at in tl.range(begin, end, TILE):
        place = at + tl.arange(0, TILE)
        valid = place < end
        offset = _place_offset(table + request * table_row, place, valid, kv_block, kv_place, KV_BLOCK_TOKENS)
        loaded = valid[:, None] & (column < DIM)[None, :]
        k = tl.load(keys + offset[:, None], mask=loaded, other=0.0)  # [TILE, DIM_BLOCK]
        v = tl.load(keys + offset[:, None] + kv_half, mask=loaded, other=0.0)
        seen = valid
        if WINDOW:
            # A place of the ring holds the newest token t with (t - first) % last == place - first.
            in_ring = count - 1 - (count - 1 - place) % tl.maximum(keep_last, 1)
            position = tl.where(ring & (place >= keep_first), in_ring, place)
            seen = valid & (position > count - 1 - window)
        share, most, total, shrink = _softmax_step(dot(q, tl.trans(k)), seen[None, :], scale, most, total)
        gathered = gathered * shrink[:, None] + dot(share.to(v.dtype), v)

    known = total > 0  # else no key was seen
    result = gathered / tl.where(known, total, 1.0)[:, None]
    if SPLIT:
        at_part = (request * HEADS + head) * splits + split
        tl.store(part + at_part[:, None] * DIM + column[None, :], result, mask=here & known[:, None])
        weight = tl.where(known, most + tl.log2(tl.where(known, total, 1.0)), float("-inf"))
        tl.store(sums + at_part, weight, mask=member < GROUP)
    else:
        target = part + request * out_row + head[:, None] * out_head + column[None, :]
        tl.store(target, result.to(part.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["splits"])
def _combine_kernel(
    part,
    sums,
    out,
    out_row,
    out_head,
    splits,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
):
    head = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, DIM_BLOCK)
    split = tl.arange(0, SPLITS_BLOCK)
    at = (request * HEADS + head) * splits + split
    weight = tl.load(sums + at, mask=split < splits, other=float("-inf"))
    inside = (weight > float("-inf"))[:, None] & (column < DIM)[None, :]  # a part without keys was not stored
    most = tl.max(weight, axis=0)
    weight = tl.exp2(weight - tl.where(most == float("-inf"), 0.0, most))
    values = tl.load(part + at[:, None] * DIM + column[None, :], mask=inside, other=0.0)
    total = tl.sum(weight, axis=0)
    result = tl.sum(values * weight[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    target = out + request * out_row + head * out_head + column
    tl.store(target, result.to(out.dtype.element_ty), mask=column < DIM)


def paged_prefill(
    query: Tensor,
    kv: Tensor,
    table: Tensor,
    starts: Tensor,
    prefix: Tensor,
    scale: float,
    window: int,
    out: Tensor | None = None,
) -> Tensor:
    """Return what ``hw.elastic.ops.paged_prefill`` describes."""
    rows, heads, d = query.shape
    chunks, kv_heads = table.shape[0], kv.shape[3]
    _check(query, kv, table)
    out = _output(query, out)
    group = heads // kv_heads
    most_rows = 16 if kv.element_size() > 2 else 128 if d <= 128 else 64
    block = power_of_two(max(min(rows * group, most_rows), group), 16)
    tile_rows = block // group  # tokens of a tile
    launch(
        _prefill_kernel,
        # Every chunk may end with a tile that is not full: this many are enough, however the rows are divided.
        (rows // tile_rows + chunks, kv_heads),
        query,
        kv,
        table,
        starts,
        prefix,
        out,
        query.stride(0),
        query.stride(1),
        table.stride(0),
        *kv.stride()[:4],
        out.stride(0),
        out.stride(1),
        scale * LOG2_E,
        window,
        chunks,
        GROUP=group,
        DIM=d,
        DIM_BLOCK=power_of_two(d, 16),
        ROWS_BLOCK=block,
        TOKENS=tile_rows,
        TILE=min(tile_tokens(d, kv.element_size()), 64),
        CHUNKS_BLOCK=power_of_two(chunks, 16),
        KV_BLOCK_TOKENS=kv.shape[2],
        WINDOW=window > 0,
        num_warps=8 if block == 128 else 4,
    )
    return out


@triton.jit(do_not_specialize=["table", "starts", "prefix", "table_row", "window", "chunks"])
def _prefill_kernel(
    query,
    kv,
    table,
    starts,
    prefix,
    out,
    query_row,
    query_head,
    table_row,
    kv_block,
    kv_half,
    kv_place,
    kv_head,
    out_row,
    out_head,
    scale,
    window,
    chunks,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    KV_BLOCK_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    # Chunk j has the tiles from starts[j] // TOKENS + j on: each has enough, and some have one that stays empty.
    # The last tiles go first, because they look back the furthest.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    shared = tl.program_id(1)
    each = tl.arange(0, CHUNKS_BLOCK)
    start_of_each = tl.load(starts + each, mask=each < chunks, other=0)
    chunk = tl.sum(((each < chunks) & (start_of_each // TOKENS + each <= tile)).to(tl.int32), axis=0) - 1
    if chunk < 0:  # rows before the first chunk
        return
    start = tl.load(starts + chunk)
    length = tl.load(starts + chunk + 1) - start
    from_token = (tile - start // TOKENS - chunk) * TOKENS
    if from_token >= length:
        return
    before = tl.load(prefix + chunk)

    line = tl.arange(0, ROWS_BLOCK)  # tokens of the tile, each with all heads of the group
    token = from_token + line // GROUP
    head = shared * GROUP + line % GROUP
    column = tl.arange(0, DIM_BLOCK)
    here = ((line < TOKENS * GROUP) & (token < length))[:, None] & (column < DIM)[None, :]
    row = (start + token).to(tl.int64)
    q = tl.load(
        query + row[:, None] * query_row + head[:, None] * query_head + column[None, :], mask=here, other=0.0
    )  # [ROWS_BLOCK, DIM_BLOCK]
    position = before + token
    low = before * 0
    if WINDOW:
        low = tl.maximum(before + from_token + 1 - window, 0)
    high = before + tl.minimum(from_token + TOKENS, length)

    most = tl.full((ROWS_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS_BLOCK,), tl.float32)
    gathered = tl.zeros((ROWS_BLOCK, DIM_BLOCK), tl.float32)
    keys = kv + shared * kv_head + column[None, :]
    blocks = table + chunk.to(tl.int64) * table_row
    for at in tl.range(low, high, TILE):
        place = at + tl.arange(0, TILE)
        valid = place < high
        offset = _place_offset(blocks, place, valid, kv_block, kv_place, KV_BLOCK_TOKENS)
        loaded = valid[:, None] & (column < DIM)[None, :]
        k = tl.load(keys + offset[:, None], mask=loaded, other=0.0)  # [TILE, DIM_BLOCK]
        v = tl.load(keys + offset[:, None] + kv_half, mask=loaded, other=0.0)
        seen = valid[None, :] & (place[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (place[None, :] > position[:, None] - window)
        share, most, total, shrink = _softmax_step(dot(q, tl.trans(k)), seen, scale, most, total)
        gathered = gathered * shrink[:, None] + dot(share.to(v.dtype), v)

    result = gathered / tl.where(total > 0, total, 1.0)[:, None]
    target = out + row[:, None] * out_row + head[:, None] * out_head + column[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=here)
