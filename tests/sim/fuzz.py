"""Compare the compiled engine with the plain one on very many random cases: ``make fuzz``.

usage: python -m tests.sim.fuzz [CASES [FIRST [WORKERS]]]

Prints how far it is; at the first difference the seed, what differs and the smallest case it shrinks to, and exits 1.
"""

from __future__ import annotations

import multiprocessing
import pprint
import sys
import time

from tests.sim.kernel_cases import differences, random_case, shrunk

BATCH = 250


def first_difference(seeds: range) -> int | None:
    """Return the first seed at which the engines differ (or one of them fails)."""
    for seed in seeds:
        try:
            if differences(random_case(seed)):
                return seed
        except Exception:
            return seed
    return None


def main() -> int:
    """Run the command."""
    cases, first, workers = (int(a) for a in [*sys.argv[1:], *["50000", "0", "2"][len(sys.argv) - 1 :]][:3])
    seeds = range(first, first + cases)
    jobs = [range(start, min(start + BATCH, seeds.stop)) for start in range(first, seeds.stop, BATCH)]
    started_s, done = time.monotonic(), 0
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as pool:
        for job, seed in zip(jobs, pool.imap(first_difference, jobs), strict=True):
            if seed is not None:
                case = random_case(seed)
                print(f"\nseed {seed}: the engines differ", flush=True)
                print(*differences(case), sep="\n")
                print("the smallest case that does:")
                pprint.pprint(shrunk(case), width=120)
                return 1
            done += len(job)
            print(f"\r{done:,} of {cases:,} cases equal, {time.monotonic() - started_s:,.0f} s", end="", flush=True)
    print(f"\nall {cases:,} cases equal (seeds {seeds.start} to {seeds.stop - 1})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
