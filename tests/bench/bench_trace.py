"""Seconds to write and read a million requests in each kind of the project's own format.

python tests/bench/bench_trace.py [REQUESTS]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from sim.traces.readers.native import read_trace, write_trace
from sim.traces.trace import Trace


def main(requests: int) -> None:
    """Print one line for each kind of file."""
    rng = np.random.default_rng(0)
    trace = Trace(
        arrival_s=np.cumsum(rng.exponential(0.1, requests)),
        prompt_tokens=rng.integers(1, 8192, requests),
        output_tokens=rng.integers(1, 1024, requests),
    )
    with tempfile.TemporaryDirectory() as folder:
        for ending in ("csv", "csv.gz", "jsonl", "parquet"):
            path = Path(folder) / f"trace.{ending}"
            seconds = []
            for work in (lambda path=path: write_trace(trace, path), lambda path=path: read_trace(path)):
                start = time.perf_counter()
                result = work()
                seconds.append(time.perf_counter() - start)
            assert result == trace
            print(f"{ending:8} {requests:,} requests: write {seconds[0]:.2f} s, read {seconds[1]:.2f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
