"""The loads of ``PruneToBudget``, and which of them each split may use (conf/split/prune.yaml)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from omegaconf import OmegaConf

from sim.config import option_path
from sim.cost.memory import relative_budget_bytes
from sim.cost.model_spec import ModelSpec
from sim.errors import ConfigError, nearest

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneLoad:
    """One load and its memory budget: RAP's (batch, sequence length, budget).

    batch: sequences processed together. sequence_tokens: tokens per sequence.
    budget_share: the budget as a share of the dense model's peak memory at this load.
    """

    batch: int
    sequence_tokens: int
    budget_share: float

    def budget_bytes(self, model: ModelSpec) -> int:
        """Return the budget in bytes."""
        return relative_budget_bytes(model, self.budget_share, self.batch, self.sequence_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneLoads:
    """The loads of each split.

    Training samples from ranges and skips every (batch, sequence_tokens) pair of ``test`` and ``validation``.

    test, validation: fixed loads. batch, sequence_tokens, budget_share: lowest and highest value for training.
    """

    test: tuple[PruneLoad, ...]
    validation: tuple[PruneLoad, ...]
    batch: tuple[int, int]
    sequence_tokens: tuple[int, int]
    budget_share: tuple[float, float]

    def sample(self, rng: np.random.Generator, split: Split) -> PruneLoad:
        """Return one random load of a split."""
        if split == "train":
            held_out = {(load.batch, load.sequence_tokens) for load in (*self.test, *self.validation)}
            return _sample(rng, self.batch, self.sequence_tokens, self.budget_share, held_out)
        loads = self.validation if split == "validation" else self.test
        return loads[int(rng.integers(len(loads)))]


def _sample(
    rng: np.random.Generator,
    batch: tuple[int, int],
    sequence_tokens: tuple[int, int],
    budget_share: tuple[float, float],
    held_out: set[tuple[int, int]],
) -> PruneLoad:
    """Sample batch and length log-uniformly and the budget uniformly; repeat while the pair is held out."""
    while True:
        u, v, w = rng.random(3).tolist()
        pair = (_log_uniform(u, *batch), _log_uniform(v, *sequence_tokens))
        if pair not in held_out:
            low, high = budget_share
            return PruneLoad(batch=pair[0], sequence_tokens=pair[1], budget_share=low + w * (high - low))


def _log_uniform(u: float, low: int, high: int) -> int:
    """Map ``u`` in [0, 1) to an integer from ``low`` to ``high``, log-uniformly."""
    return min(high, int(low * math.exp(u * math.log((high + 1) / low))))


SPLIT = option_path("split", "prune")


@cache
def prune_loads(path: Path = SPLIT) -> PruneLoads:
    """Read the split.

    Raises:
        ConfigError: if the file is malformed.
    """
    try:
        value: Mapping[str, Any] = OmegaConf.to_container(OmegaConf.load(path), resolve=True)  # type: ignore[assignment]
        test = tuple(
            PruneLoad(batch=int(b), sequence_tokens=int(s), budget_share=float(share))
            for b, s in value["test"]["pairs"]
            for share in value["test"]["budget_shares"]
        )
        ranges = value["train"]
        batch = (int(ranges["batch"][0]), int(ranges["batch"][1]))
        length = (int(ranges["sequence_tokens"][0]), int(ranges["sequence_tokens"][1]))
        share = (float(ranges["budget_share"][0]), float(ranges["budget_share"][1]))
        rng = np.random.default_rng(int(value["validation"]["seed"]))
        pairs = {(load.batch, load.sequence_tokens) for load in test}
        validation = tuple(_sample(rng, batch, length, share, pairs) for _ in range(int(value["validation"]["loads"])))
    except (OSError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"{path} is not a valid split of loads ({type(error).__name__}: {error})") from error
    if not (1 <= batch[0] <= batch[1] and 1 <= length[0] <= length[1] and 0 < share[0] <= share[1] < 1):
        raise ConfigError(
            f"{path}: the train ranges are batch {batch}, sequence_tokens {length} and budget_share {share}; each must "
            "ascend, batch and sequence_tokens must be at least 1, and budget_share must lie inside (0, 1)"
        )
    return PruneLoads(test=test, validation=validation, batch=batch, sequence_tokens=length, budget_share=share)


def check_split(name: str) -> Split:
    """Return the split with this name.

    Raises:
        ConfigError: for an unknown name.
    """
    for split in SPLITS:
        if split == name:
            return split
    raise ConfigError(f"there is no split {name!r}; {nearest(name, SPLITS)}")
