"""Time of the attention of decodes over hidden states, and over keys and values, of one layer without GQA.

python tests/bench/bench_hidden.py [MODEL ...]      # smollm2_135m llama2_7b

On a CUDA device if there is one, else on one thread of the CPU. The rounds alternate; times are medians. The simulator
prices what hidden states add as half of the products of an MHA block over as many tokens, here q, k, v and output.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from hw.elastic.device import device_of
from hw.elastic.hidden_kv import HiddenKV, Project
from hw.elastic.kv_storage import ArenaStorage
from hw.elastic.paged_attention import Packed, PagedBatch
from hw.elastic.paged_kv import KVArena
from hw.elastic.processor import processor_name
from sim.cost.kv_format import kv_formats
from sim.cost.latency_tables import KV_SHARE
from sim.cost.model_spec import ModelSpec, load_model
from sim.cost.plan import dense_plan
from sim.engine.block_table import BlockTable
from sim.engine.kv_pool import KVPool

BLOCK_TOKENS, ROUNDS = 16, 15
SHAPES = ((1, 512), (1, 4096), (16, 512), (16, 2048))
"""Requests and the tokens of each."""
PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def attention(spec: ModelSpec, requests: int, context: int, hidden: bool) -> Callable[[], None]:
    """Return what computes the attention of one layer for some decodes; what they store is random."""
    hardware, size = device_of(PLACE), spec.hidden_size
    formats = kv_formats(spec, replace(dense_plan(spec), kv_hidden=hidden), BLOCK_TOKENS)
    blocks = requests * (-(-context // BLOCK_TOKENS) + 1)
    arena = KVArena(
        hardware,
        capacity=blocks,
        block_tokens=BLOCK_TOKENS,
        heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=torch.bfloat16,
    )
    pool, packed = KVPool(blocks, ArenaStorage(arena)), []
    for _ in range(requests):
        table = BlockTable(mha=frozenset([0]), block_tokens=BLOCK_TOKENS)
        table.formats = None if formats is None else formats[:1]
        table.hold(pool, context)
        packed.append(Packed(table, [0], context - 1))
    states = HiddenKV(arena, 2 * BLOCK_TOKENS)
    every = torch.arange(pool.used_layer_blocks * 2 * BLOCK_TOKENS, device=PLACE)
    states.write(every, random(len(every), size))
    batch = PagedBatch(arena, packed, [], [None], hidden=hidden)
    qkv, normed, weight = random(requests, 3 * size), random(requests, size), random(2 * size, size)
    shape = {"heads": spec.num_heads, "kv_heads": spec.num_kv_heads, "scale": spec.head_dim**-0.5}

    def project(normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        both = functional.linear(normed, weight).view(-1, 2 * spec.num_kv_heads, spec.head_dim)
        return both[:, : spec.num_kv_heads], both[:, spec.num_kv_heads :]

    given: Project | None = project if hidden else None

    def run() -> None:
        batch.attend(0, qkv, None, **shape, q_norm=None, k_norm=None, eps=0.0, offset=0.0, normed=normed, project=given)  # type: ignore[arg-type]
        hardware.synchronize()

    return run


def products(spec: ModelSpec, tokens: int) -> Callable[[], None]:
    """Return what multiplies tokens with q, k and v, and the result with the output weights."""
    size, hardware = spec.hidden_size, device_of(PLACE)
    x, qkv, out = random(tokens, size), random(3 * size, size), random(size, size)

    def run() -> None:
        functional.linear(functional.linear(x, qkv)[:, :size], out)
        hardware.synchronize()

    return run


def random(*shape: int) -> Tensor:
    """Return normal values in bfloat16."""
    return torch.randn(*shape).to(PLACE, torch.bfloat16)


@torch.inference_mode()
def main() -> None:
    """Print a table for every model."""
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ["smollm2_135m"]:
        spec = load_model(name)
        spec = replace(spec, num_kv_heads=spec.num_heads)
        print(f"{name} without GQA, one layer, {processor_name(PLACE)}")
        print("requests x tokens   keys and values (us)   hidden states (us)   added   priced")
        for requests, context in SHAPES:
            runs = {
                "kv": attention(spec, requests, context, False),
                "hidden": attention(spec, requests, context, True),
                "products": products(spec, requests * context),
            }
            seconds: dict[str, list[float]] = {each: [] for each in runs}
            for _ in range(ROUNDS):
                for each, run in runs.items():
                    start_s = time.perf_counter()
                    run()
                    seconds[each].append(time.perf_counter() - start_s)
            us = {each: 1e6 * statistics.median(times[1:]) for each, times in seconds.items()}
            print(
                f"{requests:8} x {context:<8} {us['kv']:20,.0f} {us['hidden']:20,.0f} {us['hidden'] - us['kv']:9,.0f} "
                f"{KV_SHARE * us['products']:8,.0f}"
            )


if __name__ == "__main__":
    main()
