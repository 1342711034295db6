"""How fast the simulator is next to another version of it: the ratio of their speeds, measured in one run.

python tests/bench/bench_against.py CHECKOUT [ROUNDS]

CHECKOUT: a folder with the other version, e.g. from `git worktree add ../before COMMIT`.
ROUNDS (40): how many times each replay is served; the versions alternate. The trace and the replays are those of each
    version's `tests/bench/bench_speed.py`.

One process for each version serves when it is asked. Figures are CPU seconds of these processes with one thread, from
building the engine to its records. Both serve the same requests at the same prices: those of the other version, and
requests that fit the model's context, since an earlier version served longer ones too. If they still need different
numbers of iterations, a line says so. The interval holds the middle half of the ratios of runs that follow each other.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

REPLAYS = ("fixed plan", "control tick each second", "plan change each second")
HERE = Path(__file__).parents[2]
CALIBRATION = "conf/calibration/llama2_7b_a100.json"

SERVE = """
import math, sys
sys.path.insert(0, "")
import tests.bench.bench_speed as bench
from sim.config import one_thread

one_thread()
bench.LATENCY = bench.load_calibration(sys.argv[1])
azure = bench.find_data(bench.AZURE)
trace = bench.read_azure(azure) if azure is not None else bench.made_up(15_606)
fits = trace.prompt_tokens + trace.output_tokens <= bench.MODEL.max_context_tokens
trace = bench.Trace(
    **{name: getattr(trace, name)[fits] for name in ("arrival_s", "prompt_tokens", "output_tokens")}
)
replays = [(bench.Always, None), (bench.Always, 1.0), (bench.Alternating, 1.0)]
for policy, tick_s in replays:
    bench.one_run(trace, policy(), tick_s)
print("ready", flush=True)
for line in sys.stdin:
    policy, tick_s = replays[int(line)]
    seconds, served = bench.one_run(trace, policy(), tick_s)
    print(seconds, served.run_until(math.inf).iterations, flush=True)
"""


class Version:
    """A process that serves the replays with the code of one checkout."""

    def __init__(self, checkout: Path, calibration: Path) -> None:
        """Start it and wait until it has compiled and served each replay once, at the prices of a calibration."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(calibration)],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def serve(self, replay: int) -> tuple[float, int]:
        """Serve one of `REPLAYS` and return its CPU seconds and its iterations."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{replay}\n")
        self._process.stdin.flush()
        seconds, iterations = self._answer().split()
        return float(seconds), int(iterations)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a version ended; its error is above")
        return line

    def end(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main(checkout: Path, rounds: int) -> None:
    """Measure both versions and print the table."""
    calibration = checkout / CALIBRATION
    for needed in (checkout / "tests/bench/bench_speed.py", calibration):
        if not needed.is_file():
            raise SystemExit(f"there is no {needed}; give a checkout of this repository")
    versions = (Version(checkout, calibration), Version(HERE, calibration))
    seconds = np.full((len(REPLAYS), rounds, 2), math.nan)
    iterations = np.zeros((len(REPLAYS), 2), np.int64)
    for turn in range(rounds):
        for replay in range(len(REPLAYS)):
            for version in (0, 1) if turn % 2 else (1, 0):
                seconds[replay, turn, version], iterations[replay, version] = versions[version].serve(replay)
    for version in versions:
        version.end()
    print(f"{'':28} {'other us':>9} {'this us':>9} {'speed of this over that of the other, one iteration':>52}")
    for name, counts, own in zip(REPLAYS, iterations, seconds / iterations[:, None], strict=True):
        low, middle, high = np.quantile(own[:, 0] / own[:, 1], (0.25, 0.5, 0.75))
        best = own.min(axis=0)
        print(
            f"{name:28} {1e6 * best[0]:9.3f} {1e6 * best[1]:9.3f}   best runs {best[0] / best[1]:.3f}, "
            f"middle {middle:.3f} ({low:.3f} to {high:.3f})"
        )
        if counts[0] != counts[1]:
            print(f"{'':28} the other needs {counts[0]} iterations, this {counts[1]}: not quite the same work")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 40)
