"""How near searches of whole masks come to greedy removal on synthetic losses: how their settings were chosen.

python tests/bench/bench_mask_search.py [SEEDS]

The loss is the fitted quality model of SmolLM2-135M with random factors on each block and random interactions between
each two, so no text is involved and an evaluation takes microseconds. Rows are settings, columns numbers of removals:
loss less that of greedy removal, nats per token, mean over SEEDS losses (2), with as many passes as greedy removal.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence

import numpy as np

from hw.score.block_numbers import plan_without
from hw.score.evolution import Evolution
from hw.score.mask_search import Evaluations, Mask, gsi_passes
from hw.score.offline_search import Settings, search
from hw.score.policy_gradient import PolicyGradient
from sim.config import one_thread
from sim.cost.model_spec import load_model
from sim.cost.quality import load_quality
from sim.progress import progress
from sim.types import Floats

SIZES = (4, 8, 12, 20, 30)
CURVE = 0.1
INTERACTION = 0.3
"""Standard deviation of an interaction, as a share of the geometric mean of its two blocks' costs."""


def block_costs() -> Floats:
    """Return what each block costs in the fitted model, before its curve is applied."""
    quality, spec = load_quality("smollm2_135m"), load_model("smollm2_135m")
    loss = [quality.predicted_loss(plan_without(spec, {block})) for block in range(2 * spec.num_layers)]
    return np.asarray(np.log1p(CURVE * np.array(loss)) / CURVE)


def synthetic_loss(seed: int) -> Callable[[Sequence[Mask]], list[float]]:
    """Return a loss of masks; it does not depend on the order of anything."""
    rng, cost = np.random.default_rng(seed), block_costs()
    size = np.maximum(cost, 0.005)
    pairs = np.tril(rng.normal(size=(len(cost), len(cost))), -1) * np.sqrt(size[:, None] * size) * INTERACTION
    cost = cost * np.exp(0.2 * rng.normal(size=len(cost)))

    def loss(masks: Sequence[Mask]) -> list[float]:
        removed = np.array([[block in mask for block in range(len(cost))] for mask in masks], dtype=np.float64)
        total = removed @ cost + ((removed @ pairs) * removed).sum(1)
        return [float(nll) for nll in 3.9 + np.expm1(CURVE * total) / CURVE]

    return loss


def greedy(loss: Callable[[Sequence[Mask]], list[float]], blocks: int, removals: int) -> float:
    """Return the loss after greedy removal."""
    mask: Mask = frozenset()
    for _ in range(removals):
        candidates = [mask | {block} for block in range(blocks) if block not in mask]
        mask = candidates[int(np.argmin(loss(candidates)))]
    return loss([mask])[0]


def gap(settings: Settings, removals: int, seed: int) -> float:
    """Return the loss that a search finds less that of greedy removal."""
    loss, blocks = synthetic_loss(seed), len(block_costs())
    singles = dict(enumerate(loss([frozenset((block,)) for block in range(blocks)])))
    evaluate = Evaluations(loss, removals=removals, budget_passes=gsi_passes(blocks, removals), singles=singles)
    search(settings, evaluate, singles, np.random.default_rng(seed))
    return evaluate.incumbents[-1].nll - greedy(loss, blocks, removals)


def main() -> None:
    """Print a row for every setting, the best first."""
    one_thread()
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    tried: list[Settings] = [
        Evolution(parents=parents, children=children, crossover=share, contrast=contrast)
        for parents, children, share, contrast in itertools.product((1, 4, 8), (8, 16), (0.0, 0.4), (1.0, 2.0))
    ]
    for samples, contrast in itertools.product((2, 4, 8), (1.0, 2.0, 3.0)):
        shared = {"samples": samples, "contrast": contrast, "baseline_steps": 5, "check_every": 5}
        tried += [PolicyGradient(form="bernoulli", step_size=step, **shared) for step in (0.03, 0.05, 0.1, 0.3)]  # type: ignore[arg-type]
        tried += [PolicyGradient(form="exact_count", step_size=step, **shared) for step in (0.5, 2.0, 6.0)]  # type: ignore[arg-type]
    rows = []
    with progress("searching", len(tried), "settings") as report:
        for settings in tried:
            gaps = [float(np.mean([gap(settings, size, seed) for seed in range(seeds)])) for size in SIZES]
            rows.append((sum(gaps), gaps, settings))
            report(len(rows))
    for _, gaps, settings in sorted(rows, key=lambda row: row[0]):
        print("  ".join(f"{value:+.3f}" for value in gaps), settings)


if __name__ == "__main__":
    main()
