"""The kind ``offline_search`` of ``hw.score``: GSI next to searches that sample whole masks, at equal cost.

For every calibration sample and number of removals, each search gets as many forward passes as GSI has candidates. What
it had found by the time that it had used GSI's own CPU seconds is the second comparison: ``gsi`` shares work between
candidates, and needs fewer seconds than its candidates would one by one. All masks are then measured on test text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from hw.elastic.processor import processor_name
from hw.elastic.text import Windows, differing, read_windows
from hw.score.block_numbers import block_name, block_number, check_removals, plan_without
from hw.score.evolution import Evolution, search_evolution
from hw.score.gsi import Round, gsi
from hw.score.job import Job
from hw.score.mask_nll import MaskNll
from hw.score.mask_search import Evaluations, Mask, drop_text, gsi_passes
from hw.score.nll import measure_many
from hw.score.offline_search_page import drops_of, page
from hw.score.policy_gradient import PolicyGradient, search_policy_gradient
from sim.errors import ConfigError
from sim.json_file import read_json_object
from sim.paths import CHECKOUT, RESULTS
from sim.progress import progress
from sim.results.run_folder import provenance, write_json, write_text

Settings = PolicyGradient | Evolution

METHODS: dict[str, Settings] = {
    "policy gradient": PolicyGradient(
        form="bernoulli", samples=4, step_size=0.05, baseline_steps=5, contrast=2.0, check_every=5
    ),
    "policy gradient, exact count": PolicyGradient(
        form="exact_count", samples=4, step_size=2.0, baseline_steps=5, contrast=2.0, check_every=5
    ),
    "evolution": Evolution(parents=8, children=8, crossover=0.4, contrast=2.0),
}
"""The searches. Their settings were chosen on synthetic losses before any ran on a text: the fitted quality model with
random interactions between blocks, as in tests/bench/bench_mask_search.py."""


def search(settings: Settings, evaluate: Evaluations, singles: Mapping[int, float], rng: np.random.Generator) -> None:
    """Run a search until its budget is spent; ``evaluate`` holds what it found."""
    if isinstance(settings, Evolution):
        search_evolution(evaluate, singles, settings, rng)
    else:
        search_policy_gradient(evaluate, singles, settings, rng)


def score_offline_search(job: Job) -> None:
    """Search masks of every size on every sample; saved after each search, and continued if the file is there.

    Raises:
        ConfigError: if the file holds another measurement, or the settings ask for no or impossible masks.
    """
    path, test = figures_path(job.cfg, job.name), job.text("test")
    described = _described(job, test)
    figures = _earlier(job, path, described)
    if figures is None:
        figures = {
            **provenance(job.cfg.seed),
            "weights": job.described(test)["weights"],
            "processor": processor_name(job.elastic.device),
            **described,
            "samples": [],
        }
    with progress("searching", len(described["seeds"]) * _passes_of_a_sample(described), "passes") as report:
        search_of = _SampleSearch(job, figures, test.tokens, lambda: write_json(path, figures), report)
        for at in range(len(described["seeds"])):
            search_of.run(at)
    write_text(path.parent / "index.md", page(figures))
    job.say(f"wrote {path} and its page")


def figures_path(cfg: DictConfig, model: str) -> Path:
    """Return the file of figures; the page is ``index.md`` next to it."""
    folder = RESULTS / "offline_search" if CHECKOUT else Path("score")
    return Path(cfg.out) if cfg.out else folder / f"{model}.json"


def _described(job: Job, test: Windows) -> dict[str, Any]:
    """Return what a measurement is of; a file is only continued where all of it is equal."""
    cfg = job.cfg.offline
    blocks = 2 * job.elastic.spec.num_layers
    sizes, seeds = [int(size) for size in cfg.removals], [int(seed) for seed in cfg.samples]
    if not sizes or not seeds or min(sizes) < 1 or len(set(seeds)) < len(seeds) or sizes != sorted(set(sizes)):
        raise ConfigError(
            f"offline.removals is {sizes} and offline.samples {seeds}; name at least one of each: removals from 1 on "
            "in ascending order, and seeds that differ"
        )
    check_removals("offline.removals", sizes[-1], job.elastic.spec)
    return {
        "model": job.name,
        "dtype": job.cfg.model.dtype,
        "seed": int(job.cfg.seed),
        "text": test.source,
        "blocks": blocks,
        "removals": sizes,
        "seeds": seeds,
        "tokens": [int(cfg.tokens), int(cfg.window)],
        "passes": [gsi_passes(blocks, size) for size in sizes],
        "methods": {name: asdict(settings) for name, settings in METHODS.items()},
    }


def _passes_of_a_sample(described: Mapping[str, Any]) -> int:
    return int(described["passes"][-1] + len(described["methods"]) * sum(described["passes"]))


def _earlier(job: Job, path: Path, described: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return unfinished figures to continue, or None if there is no file yet."""
    if not path.is_file():
        return None
    old = read_json_object(path, ConfigError, "remove the file, or set out=")
    different, _ = differing(described, old)
    if different:
        raise ConfigError(
            f"{path} has the result of another run: {', '.join(different)} differ; remove the file, or set out="
        )
    found = sum(len(sample["searches"]) for sample in old["samples"])
    job.say(f"continuing from {found} searches in {path}")
    return old


class _SampleSearch:
    """Runs and measures what is missing of one sample after another."""

    def __init__(
        self,
        job: Job,
        figures: dict[str, Any],
        test: Tensor,
        save: Callable[[], None],
        report: Callable[[float], None],
    ) -> None:
        self._job, self._figures, self._test, self._save, self._report = job, figures, test, save, report
        self._done = 0  # passes, spent or skipped

    def run(self, at: int) -> None:
        """Complete the sample with this position."""
        samples = self._figures["samples"]
        if at == len(samples):
            samples.append({"seed": self._figures["seeds"][at], "gsi": [], "searches": [], "measured": []})
        sample = samples[at]
        self._done = at * _passes_of_a_sample(self._figures)
        if sample["measured"]:
            return
        windows = self._windows(sample["seed"])
        sample["text"] = windows.source
        loss = MaskNll(self._job.elastic, windows.tokens)
        if not sample["gsi"]:
            self._greedy(sample, windows.tokens, loss)
            self._save()
        self._done += self._figures["passes"][-1]
        for size, passes in zip(self._figures["removals"], self._figures["passes"], strict=True):
            for number, name in enumerate(self._figures["methods"]):
                if not any((row["method"], row["removals"]) == (name, size) for row in sample["searches"]):
                    rng = np.random.default_rng([self._figures["seed"], sample["seed"], size, number])
                    sample["searches"].append(self._searched(name, loss, sample, size, passes, rng))
                    self._save()
                self._done += passes
                self._report(self._done)
        self._measure(sample, windows.tokens)
        self._save()

    def _windows(self, seed: int) -> Windows:
        text, cfg = self._job.cfg.calibration, self._job.cfg.offline
        return read_windows(
            text.path,
            self._job.tokenizer,
            tokens=cfg.tokens,
            window=cfg.window,
            seed=seed,
            keep_newlines=text.keep_newlines,
        )

    def _greedy(self, sample: dict[str, Any], windows: Tensor, loss: MaskNll) -> None:
        """Run GSI up to the largest size, and measure the loss without each block alone."""

        def report(rounds: Sequence[Round]) -> None:
            self._report(self._done + sum(len(found.candidates) for found in rounds))

        rounds = gsi(self._job.elastic, windows, removals=self._figures["removals"][-1], on_round=report)
        began_s = time.process_time()
        singles = loss([frozenset((block,)) for block in range(self._figures["blocks"])])
        sample["singles_cpu_s"] = time.process_time() - began_s
        sample["singles"] = singles
        sample["gsi"] = [
            {"removed": block_name(found.removed), "nll": found.nll, "cpu_s": found.cpu_s} for found in rounds
        ]

    def _searched(
        self,
        name: str,
        loss: MaskNll,
        sample: Mapping[str, Any],
        size: int,
        passes: int,
        rng: np.random.Generator,
    ) -> dict[str, Any]:
        """Run one search and return its row."""

        def counted(masks: Sequence[Mask]) -> Sequence[float]:
            self._report(self._done + evaluate.passes)
            return loss(masks)

        singles = dict(enumerate(sample["singles"]))
        evaluate = Evaluations(
            counted, removals=size, budget_passes=passes, singles=singles, singles_cpu_s=sample["singles_cpu_s"]
        )
        search(METHODS[name], evaluate, singles, rng)
        cpu_s = evaluate.cpu_s
        best = f"{evaluate.incumbents[-1].nll:.4f}" if evaluate.incumbents else "nothing"
        self._job.say(
            f"sample {sample['seed']}, {size} removals, {name}: {best} (GSI {sample['gsi'][size - 1]['nll']:.4f}) nats "
            f"per token, in {evaluate.passes} passes and {cpu_s:.0f} CPU s"
        )
        return {
            "method": name,
            "removals": size,
            "passes": evaluate.passes,
            "cpu_s": cpu_s,
            "incumbents": [
                {"passes": one.passes, "cpu_s": one.cpu_s, "nll": one.nll, "drop": drop_text(one.removed)}
                for one in evaluate.incumbents
            ],
        }

    def _measure(self, sample: dict[str, Any], windows: Tensor) -> None:
        """Measure the masks that the page compares, and the dense model, on both texts."""
        found = {drop for size in self._figures["removals"] for drop in drops_of(sample, size).values()}
        drops = sorted({"", *(drop for drop in found if drop is not None)})
        spec = self._job.elastic.spec
        plans = [plan_without(spec, {block_number(name) for name in drop.split()}) for drop in drops]
        calibration, test = (measure_many(self._job.elastic, plans, text) for text in (windows, self._test))
        sample["measured"] = [
            {"drop": drop, "calibration": own.mean, "test": held_out.mean}
            for drop, own, held_out in zip(drops, calibration, test, strict=True)
        ]
