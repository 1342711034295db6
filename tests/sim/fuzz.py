"""Compare compiled code with the plain one on many random cases: ``make fuzz``, ``make fuzz KIND=cluster``.

usage: python -m tests.sim.fuzz [CASES [FIRST [WORKERS [KIND]]]]

KIND is ``engine`` (one replica), ``streamed`` (one replica of eight layers, where most plans stream some), ``sessions``
(one replica, whose requests arrive after others have ended), ``cluster``, or ``disaggregated`` (prefill and decode on
separate replicas). Prints progress. At the first difference it prints the
seed, what differs and the smallest case that still differs, and exits with status 1.
"""

from __future__ import annotations

import multiprocessing
import pprint
import sys
import time
from functools import partial

from tests.sim.cluster import cluster_cases
from tests.sim.disaggregate import disaggregated_cases
from tests.sim.engine import kernel_cases, session_cases, streamed_cases

BATCH = 250
KINDS = {
    "engine": (kernel_cases.random_case, kernel_cases.differences, kernel_cases.shrunk),
    "streamed": (streamed_cases.random_case, streamed_cases.differences, streamed_cases.shrunk),
    "sessions": (session_cases.random_case, session_cases.differences, session_cases.shrunk),
    "cluster": (cluster_cases.random_cluster, cluster_cases.differences, cluster_cases.shrunk),
    "session_cluster": (
        cluster_cases.random_session_cluster,
        cluster_cases.differences,
        cluster_cases.shrunk,
    ),
    "disaggregated": (
        disaggregated_cases.random_disaggregated,
        disaggregated_cases.differences,
        disaggregated_cases.shrunk,
    ),
}


def first_difference(kind: str, seeds: range) -> int | None:
    """Return the first seed at which compiled and plain differ (or one of them fails)."""
    random_case, differences, _ = KINDS[kind]
    for seed in seeds:
        try:
            if differences(random_case(seed)):
                return seed
        except Exception:
            return seed
    return None


def main() -> int:
    """Run the command."""
    *numbers, kind = [*sys.argv[1:], *["50000", "0", "2", "engine"][len(sys.argv) - 1 :]][:4]
    cases, first, workers = map(int, numbers)
    random_case, differences, shrunk = KINDS[kind]
    seeds = range(first, first + cases)
    jobs = [range(start, min(start + BATCH, seeds.stop)) for start in range(first, seeds.stop, BATCH)]
    started_s, done = time.monotonic(), 0
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as pool:
        for job, seed in zip(jobs, pool.imap(partial(first_difference, kind), jobs), strict=True):
            if seed is not None:
                case = random_case(seed)
                print(f"\nseed {seed}: the {kind}s differ", flush=True)
                print(*differences(case), sep="\n")
                print("the smallest case that still differs:")
                pprint.pprint(shrunk(case), width=120)
                return 1
            done += len(job)
            print(f"\r{done:,} of {cases:,} cases equal, {time.monotonic() - started_s:,.0f} s", end="", flush=True)
    print(f"\nall {cases:,} cases equal (seeds {seeds.start} to {seeds.stop - 1})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
