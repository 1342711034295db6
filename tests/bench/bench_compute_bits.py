"""What products at half of the resident bits save, by the prices of the simulator.

    python tests/bench/bench_compute_bits.py

Prints the time of a pass at all bits over that at half of them, of decodes over 1,000 tokens of KV and of a prompt.
"""

from __future__ import annotations

from sim.cost.latency import load_calibration
from sim.cost.model_spec import load_model
from sim.policies.fixed import static_plan

CASES = (("llama3.1_8b", "llama3.1_8b_h100", 16, 8), ("llama2_7b", "llama2_7b_a100_trtllm", 8, 4))
DECODES = (1, 16, 64, 256)
PROMPT_TOKENS, CONTEXT_TOKENS = 2048, 1000


def ratios(model: str, calibration: str, weight_bits: int, compute_bits: int) -> list[tuple[str, float]]:
    """Return what runs, and how many times faster it is at ``compute_bits``."""
    latency, spec = load_calibration(calibration), load_model(model)
    full, half = (static_plan(spec, weight_bits=weight_bits, compute_bits=bits) for bits in (weight_bits, compute_bits))
    found = []
    for decodes in DECODES:
        load = [], decodes, decodes * CONTEXT_TOKENS, decodes
        found.append((f"{decodes} decodes", latency.iteration_s(full, *load) / latency.iteration_s(half, *load)))
    prompt = [(PROMPT_TOKENS, 0)], 0, 0, 1
    found.append(
        (f"a prompt of {PROMPT_TOKENS:,}", latency.iteration_s(full, *prompt) / latency.iteration_s(half, *prompt))
    )
    return found


if __name__ == "__main__":
    for model, calibration, weight_bits, compute_bits in CASES:
        print(f"{calibration}, weights of {weight_bits} bits computed at {compute_bits}")
        for name, ratio in ratios(model, calibration, weight_bits, compute_bits):
            print(f"  {name}: {ratio:.2f} times faster")
