"""How long the fitted loss of a plan takes: python -m tests.bench.bench_quality

A policy that compares 1,000 plans in a step wants about 20 us for each. Prints the least CPU time of nine rounds over
1,000 random plans of SmolLM2-135M, for each form of the fit.
"""

from __future__ import annotations

import time

import numpy as np

from sim.config import one_thread
from sim.cost.quality import FORMS
from tests.sim.cost.test_quality import shipped, some_plan

PLANS, ROUNDS = 1000, 9


def main() -> None:
    """Measure and print."""
    one_thread()
    rng = np.random.default_rng(4)
    plans = [some_plan(rng) for _ in range(PLANS)]
    for form in FORMS:
        quality, spent_s = shipped(form), []
        for _ in range(ROUNDS):
            started_s = time.process_time()
            quality.loss_many(plans)
            spent_s.append((time.process_time() - started_s) / PLANS)
        print(f"{form}: {1e6 * min(spent_s):.1f} us for a plan")


if __name__ == "__main__":
    main()
