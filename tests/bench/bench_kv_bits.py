"""Time of the attention of decodes over KV at 8 and 4 bits, over that at 16 bits, of one layer.

python tests/bench/bench_kv_bits.py [MODEL ...]     # smollm2_135m qwen2_7b

On a CUDA device if there is one, else on one thread of the CPU. The rounds of the three alternate; times are medians.
The simulator prices these decodes by the bytes that they read, whose ratio is the last column.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from hw.elastic.device import device_of
from hw.elastic.kv_storage import ArenaStorage
from hw.elastic.paged_attention import Packed, PagedBatch
from hw.elastic.paged_kv import KVArena
from hw.elastic.processor import processor_name
from sim.cost.kv_format import kv_formats
from sim.cost.model_spec import ModelSpec, load_model
from sim.cost.plan import KV_BITS, dense_plan
from sim.engine.block_table import BlockTable
from sim.engine.kv_pool import KVPool

BLOCK_TOKENS, ROUNDS = 16, 15
SHAPES = ((1, 512), (1, 4096), (16, 512), (16, 2048))
"""Requests and the tokens of each."""


def attention(spec: ModelSpec, requests: int, context: int, bits: int) -> Callable[[], None]:
    """Return what computes the attention of one layer for some decodes; their KV is random."""
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = device_of(place)
    plan = replace(dense_plan(spec), kv_bits=(bits,) * spec.num_layers)
    formats = kv_formats(spec, plan, BLOCK_TOKENS)
    blocks = requests * (-(-context // BLOCK_TOKENS) + 1)
    arena = KVArena(
        hardware,
        capacity=2 * blocks,
        block_tokens=BLOCK_TOKENS,
        heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=torch.bfloat16,
    )
    storage = ArenaStorage(arena)
    pool, packed = KVPool(2 * blocks, storage), []
    for _ in range(requests):
        table = BlockTable(mha=frozenset([0]), block_tokens=BLOCK_TOKENS)
        table.hold(pool, context)
        arena.kv[table.blocks[0]] = torch.randn(len(table.blocks[0]), *arena.kv.shape[1:]).to(arena.kv)
        if formats is not None:
            source, target = table.end_prefill(0, context, formats[0])
            storage.copy(source, target, bits)
            table.formats = formats[:1]
            table.hold(pool, context)
        packed.append(Packed(table, [0], context - 1))
    batch = PagedBatch(arena, packed, [], [None])
    qkv = torch.randn(requests, (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim).to(place, torch.bfloat16)
    shape = {"heads": spec.num_heads, "kv_heads": spec.num_kv_heads, "scale": spec.head_dim**-0.5}

    def run() -> None:
        batch.attend(0, qkv, None, **shape, q_norm=None, k_norm=None, eps=0.0, offset=0.0)  # type: ignore[arg-type]
        hardware.synchronize()

    return run


@torch.inference_mode()
def main() -> None:
    """Print a table for every model."""
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ["smollm2_135m"]:
        spec = load_model(name)
        print(f"{name}, one layer, {processor_name(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}")
        print("requests x tokens   16 bits (us)   8 bits   4 bits   bytes: 8 bits   4 bits")
        for requests, context in SHAPES:
            runs = {bits: attention(spec, requests, context, bits) for bits in KV_BITS}
            seconds: dict[int, list[float]] = {bits: [] for bits in KV_BITS}
            for _ in range(ROUNDS):
                for bits, run in runs.items():
                    start_s = time.perf_counter()
                    run()
                    seconds[bits].append(time.perf_counter() - start_s)
            full_s = statistics.median(seconds[16][1:])
            times = [statistics.median(seconds[bits][1:]) / full_s for bits in (8, 4)]
            read = [spec.kv_bytes_per_token_layer_at(bits) / spec.kv_bytes_per_token_layer for bits in (8, 4)]
            print(
                f"{requests:8} x {context:<8} {full_s * 1e6:12,.0f} {times[0]:8.2f} {times[1]:8.2f} "
                f"{read[0]:15.2f} {read[1]:8.2f}"
            )


if __name__ == "__main__":
    main()
