"""Time of FFN blocks at fewer channels on one thread of a CPU, next to the price of the simulator.

python tests/bench/bench_ffn_width.py [MODEL]     # smollm2_135m

All FFN blocks of a model's shape in BF16, with random weights: norm, gate and up projection in one product, activation,
down projection with a bias. The rounds alternate; times are the least of each. The price is the width's share.
"""

from __future__ import annotations

import sys
import time

import torch
from torch.nn.functional import linear, rms_norm, silu

from hw.elastic.processor import processor_name
from sim.cost.ffn_width import FFN_WIDTHS, FULL_WIDTH, ffn_channels
from sim.cost.model_spec import load_model

ROUNDS = 25


@torch.inference_mode()
def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    spec = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2_135m")
    size, made = spec.hidden_size, torch.Generator().manual_seed(0)

    def weights(channels: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        shapes = (2 * channels, size), (size, channels), (size,)
        return [tuple(torch.randn(s, generator=made).bfloat16() for s in shapes) for _ in range(spec.num_layers)]  # type: ignore[misc]

    blocks = {width: weights(ffn_channels(spec.intermediate_size, width)) for width in FFN_WIDTHS}
    print(f"{spec.name}, {processor_name(torch.device('cpu'))}: {spec.num_layers} FFN blocks")
    print("tokens   eighths   measured (ms)   share of the time   priced")
    for tokens in (1, 16, 128):
        hidden = torch.randn(tokens, size, generator=made).bfloat16()
        took = dict.fromkeys(FFN_WIDTHS, float("inf"))
        for _ in range(ROUNDS):
            for width in FFN_WIDTHS:
                start_s = time.perf_counter()
                for up, down, bias in blocks[width]:
                    gate, value = linear(rms_norm(hidden, (size,)), up).chunk(2, -1)
                    linear(silu(gate) * value, down, bias)
                took[width] = min(took[width], time.perf_counter() - start_s)
        for width in FFN_WIDTHS:
            share, priced = took[width] / took[FULL_WIDTH], width / FULL_WIDTH
            print(f"{tokens:6} {width:9} {1e3 * took[width]:15.2f} {share:19.3f} {priced:8.3f}")


if __name__ == "__main__":
    main()
