"""Speed-up of a prompt by layers of ``kv_only`` on the real engine, next to the price of the simulator.

python tests/bench/bench_kv_only.py [PROMPT_TOKENS ...]     # 128 512

SmolLM2-135M in BF16 on one thread of the CPU: passes over one prompt, with none, a third and two thirds of the layers.
The rounds alternate; times are medians. The price is that of the calibration ``smollm2_135m_cpu_epyc_1thread``.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from hw.elastic.checkpoint import SMOLLM2, load_checkpoint
from hw.elastic.forward import forward
from hw.elastic.kv_storage import ArenaStorage
from hw.elastic.model import ElasticModel
from hw.elastic.paged_attention import Packed, PagedBatch
from hw.elastic.processor import processor_name
from hw.engine.hw_engine import arena_of
from hw.score.pop import kv_only_plan
from sim.cost.latency import load_calibration
from sim.engine.block_table import BlockTable
from sim.engine.kv_pool import KVPool

ROUNDS, BLOCK_TOKENS = 7, 16
CALIBRATION = "smollm2_135m_cpu_epyc_1thread"


@torch.inference_mode()
def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    elastic = ElasticModel(load_checkpoint(SMOLLM2, dtype="bfloat16", device="cpu")[0], name="smollm2_135m")
    spec, latency = elastic.spec, load_calibration(CALIBRATION)
    layers = spec.num_layers
    print(f"{spec.name}, {processor_name(elastic.device)}")
    print("prompt tokens   layers   measured (ms)   faster   priced faster")
    for tokens in [int(text) for text in sys.argv[1:]] or [128, 512]:
        blocks = layers * -(-tokens // BLOCK_TOKENS)
        arena = arena_of(elastic, blocks, block_tokens=BLOCK_TOKENS)
        table = BlockTable(mha=frozenset(range(layers)), block_tokens=BLOCK_TOKENS)
        table.hold(KVPool(blocks, ArenaStorage(arena)), tokens)
        prompt = Packed(table, torch.randint(1, spec.vocab_size, (tokens,)).tolist(), 0)
        plans = {
            count: kv_only_plan(spec, range(layers - count, layers)) for count in (0, layers // 3, 2 * layers // 3)
        }
        seconds: dict[int, list[float]] = {count: [] for count in plans}
        for _ in range(ROUNDS):
            for count, plan in plans.items():
                start_s = time.perf_counter()
                batch = PagedBatch(arena, [], [prompt], elastic.windows, [tokens - 1], kv_only=plan.kv_only)
                forward(elastic, batch, prefill=plan.prefill, decode=plan.decode)
                seconds[count].append(time.perf_counter() - start_s)
        took = {count: statistics.median(listed[1:]) for count, listed in seconds.items()}
        priced = {
            count: latency.iteration_s(plan, [(tokens, 0)], 0, 0, 1, qkv_share=spec.qkv_share)
            for count, plan in plans.items()
        }
        for count in plans:
            print(
                f"{tokens:13} {count:8} {1e3 * took[count]:15.1f} {took[0] / took[count]:8.2f} "
                f"{priced[0] / priced[count]:15.2f}"
            )
        arena.close()


if __name__ == "__main__":
    main()
