"""What the simulation of each feature costs: CPU time of an iteration with the feature on, over the time without it.

python tests/bench/bench_features.py [ROUNDS]

ROUNDS (5): every figure is the best of this many; runs with and without a feature alternate. Figures are CPU seconds of
one process with one thread, from the built engine to its records. A feature changes what is served, so the times of an
iteration are compared, not those of a run.
"""

from __future__ import annotations

import math
import sys
import time

from sim.config import compose_config, one_thread
from sim.replay.run import build_engine, build_trace, replay_with

PRESSURE = ("trace.duration_s=1800", "budget=kv_blocks", "budget.blocks=3000")
CHATS = ("trace=chats", "trace.arrivals.duration_s=1800", "budget=kv_blocks", "budget.blocks=7300")
USERS = ("trace=chat_users", "budget=kv_blocks", "budget.blocks=7300")
FIXED = (*PRESSURE, "policy=fixed")
CACHE = ("engine.prefix_caching=true", "engine.hash_block_tokens=16")
FEATURES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "swap in place of recomputation": (PRESSURE, ("engine.preemption=swap", "engine.host_kv_blocks=20000")),
    "two GPUs (tp=2)": (PRESSURE, ("gpu.tp=2",)),
    "turns that wait for answers": ((*CHATS, "workload=open_loop"), ("workload=none",)),
    "users in a closed loop": ((*USERS, "workload=open_loop"), ("workload=none",)),
    "prefix cache, with turns": (CHATS, CACHE),
    "prefix cache, without turns": ((*CHATS, "workload=open_loop"), CACHE),
    "KV at 8 bits": (FIXED, ("policy.kv_bits=8",)),
    "hidden states": (FIXED, ("policy.kv_hidden=true",)),
    "KV cut to 512 tokens": (FIXED, ("policy.kv_first_tokens=64", "policy.kv_last_tokens=448")),
    "8 streamed layers": (FIXED, ("policy.streamed=[3,7,11,15,19,23,27,31]",)),
    "prompts through half of the layers": (FIXED, ("policy.kv_only=[" + ",".join(map(str, range(16, 32))) + "]",)),
}
"""Feature -> overrides of the run without it, and what to add to turn it on."""


def one_run(overrides: tuple[str, ...]) -> tuple[float, int, int]:
    """Return the CPU seconds of one replay, its iterations and its requests."""
    cfg = compose_config("replay", overrides)
    trace = build_trace(cfg)
    engine, policy = build_engine(cfg)
    start_s = time.process_time()
    replay_with(cfg, trace, engine, policy)
    records = engine.records()
    return time.process_time() - start_s, engine.run_until(math.inf).iterations, len(records)


def main(rounds: int) -> None:
    """Measure every feature and print the table."""
    one_thread()
    print(f"{'feature':36} {'off, us':>9} {'on, us':>9} {'ratio':>7} {'requests/CPU s, off':>20} {'on':>10}")
    for name, (off, added) in FEATURES.items():
        sides = (off, (*(text for text in off if text.split("=")[0] not in {a.split("=")[0] for a in added}), *added))
        for side in sides:
            one_run(side)  # what must be compiled or loaded is
        best: list[tuple[float, int, int]] = [(math.inf, 1, 0)] * 2
        for _ in range(rounds):
            for at, side in enumerate(sides):
                best[at] = min(best[at], one_run(side))
        each = [seconds / iterations for seconds, iterations, _ in best]
        rates = [requests / seconds for seconds, _, requests in best]
        row = f"{name:36} {1e6 * each[0]:9.3f} {1e6 * each[1]:9.3f} {each[1] / each[0]:7.2f}"
        print(f"{row} {rates[0]:20,.0f} {rates[1]:10,.0f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
