"""What one decode iteration starts, waits for and moves on a GPU, counted on a device without memory.

python -m tests.bench.count_operations [MODEL]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache

from hw.engine.hw_engine import HwEngine
from hw.engine.prompts import RandomPrompts
from hw.engine.sampling import Sampling
from sim.cost.memory import budget_for_kv_blocks, kv_blocks
from sim.cost.plan import dense_plan
from sim.engine.protocol import EngineConfig, Request
from sim.engine.scheduler import Limits
from tests.hw.meta_device import MetaDevice, Operations, meta_model, meta_model_of
from tests.hw.serving import PricedClock, flat_latency
from tests.hw.tiny_models import FAMILIES, tiny_config

WORKSPACE_BYTES = 8 << 30
BLOCK_TOKENS = 16


@cache
def _model(name: str, bits: int) -> tuple[MetaDevice, object]:
    device = MetaDevice()
    if name in FAMILIES:
        return device, meta_model_of(tiny_config(name), device, bits=bits)
    return device, meta_model(name, device, bits=bits)


def count(
    name: str, bits: int, *, requests: int = 8, context: int = 300, sampled: bool = False, kv_only: bool = False
) -> tuple[Operations, Operations]:
    """Return what the first iteration does, which computes all prompts, and what the next one does, which decodes.

    name: of a model of conf/model, or of a tiny family (tests/hw/tiny_models.py). bits: of the linear layers.
    sampled: whether tokens are sampled, with temperature and top_p. kv_only: whether prompts only write KV in the
    second half of the layers.
    """
    device, elastic = _model(name, bits)
    model = elastic.spec  # type: ignore[attr-defined]
    plan = replace(dense_plan(model), weight_bits=(bits,) * model.num_layers)
    if kv_only:
        plan = replace(plan, kv_only=tuple(2 * layer >= model.num_layers for layer in range(model.num_layers)))
    blocks = requests * kv_blocks(context + 8, BLOCK_TOKENS)
    limits = Limits(max_batch_tokens=requests * context, max_running=requests)
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=(1,))
    engine = HwEngine(
        elastic=elastic,  # type: ignore[arg-type]
        config=EngineConfig(scheduler="chunked", limits=limits, kv_block_tokens=BLOCK_TOKENS),
        plan=plan,
        plans=[plan],
        budget_bytes=budget_for_kv_blocks(model, plan, blocks, WORKSPACE_BYTES, BLOCK_TOKENS),
        workspace_bytes=WORKSPACE_BYTES,
        prompts=RandomPrompts(model.vocab_size),
        clock=PricedClock(flat_latency(), plan),
        sampling=(lambda _: sampling) if sampled else None,
        cuda_graphs=False,
    )
    engine.submit(
        [Request(request_id=i, arrival_s=0.0, prompt_tokens=context, output_tokens=4) for i in range(requests)]
    )
    found = []
    for kv_tokens in (0, requests * (context + 1)):
        ran = len(engine._torch.shapes)
        with Operations(device, kv_tokens * model.kv_bytes_per_token_layer) as seen:
            while len(engine._torch.shapes) == ran:
                engine.run_until(engine._now_s() + 1e-3)
        found.append(seen)
    assert not engine._torch.shapes[-1].chunks
    return found[0], found[1]


def main() -> None:
    """Print a table for 16, 8 and 4 bits."""
    name = sys.argv[1] if len(sys.argv) > 1 else "llama2_7b"
    print(f"one decode iteration of {name}; weights are BF16 where they have 16 bits")
    print("| bits | requests | context | operations | a layer | waits | copies in | KiB in | GB moved | MiB taken |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for bits in (16, 8, 4):
        for requests, context in ((8, 300), (32, 300), (8, 4000)):
            _, seen = count(name, bits, requests=requests, context=context)
            layers = _model(name, bits)[1].spec.num_layers  # type: ignore[attr-defined]
            print(
                f"| {bits} | {requests} | {context} | {seen.total} | {seen.total / layers:.1f} | {seen.waits} "
                f"| {seen.uploads} | {seen.uploaded_bytes / 1024:.0f} | {seen.moved_bytes / 1e9:.2f} "
                f"| {seen.peak_bytes / 2**20:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
