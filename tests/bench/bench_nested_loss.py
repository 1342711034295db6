"""What reading half of the bits of resident weights costs, measured on SmolLM2-135M.

    python tests/bench/bench_nested_loss.py [WINDOWS]       # 24

Prints the loss over 16-bit weights in nats per token, on windows of 512 tokens of the test text, with all layers alike.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from hw.elastic.checkpoint import SMOLLM2, load_checkpoint
from hw.elastic.model import ElasticModel
from hw.elastic.text import read_windows
from hw.score.nll import measure_many
from sim.cost.plan import dense_plan
from sim.cost.quality import load_quality

BITS = ((16, 8), (8, 8), (8, 4), (4, 4))
"""Bits of the weights, and those that are read of them."""


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    model, tokenizer = load_checkpoint(SMOLLM2, dtype="float32", device="cpu")
    elastic, quality = ElasticModel(model, name="smollm2_135m"), load_quality("smollm2_135m")
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 24
    windows = read_windows("text/wikitext2_raw_test.txt", tokenizer, tokens=512 * count, window=512, seed=0)
    dense = dense_plan(elastic.spec)
    layers = len(dense.weight_bits)
    plans = [
        dense,
        *(replace(dense, weight_bits=(bits,) * layers, compute_bits=(read,) * layers) for bits, read in BITS),
    ]
    full, *losses = (found.mean for found in measure_many(elastic, plans, windows.tokens))
    print("weights   read   measured   charged")
    for (bits, read), plan, loss in zip(BITS, plans[1:], losses, strict=True):
        charged = quality.nll(plan) - quality.nll(dense)
        print(f"{bits:4} bits   {read:4}   {loss - full:8.4f}   {charged:7.4f}")


if __name__ == "__main__":
    main()
