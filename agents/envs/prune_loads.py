"""Which loads an episode of ``PruneToBudget`` may draw: train, validation and test, split in conf/split/prune.yaml."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from omegaconf import OmegaConf

from sim.config import CONF_DIR
from sim.cost.memory import relative_budget_bytes
from sim.cost.model_spec import ModelSpec
from sim.errors import ConfigError, nearest

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One load and the memory there is for it: RAP's (batch, sequence length, budget)."""

    batch: int
    sequence_tokens: int
    budget_share: float

    def budget_bytes(self, model: ModelSpec) -> int:
        """Return the budget: the share of the dense peak at this load."""
        return relative_budget_bytes(model, self.budget_share, self.batch, self.sequence_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """The split. test_pairs are never drawn for training or validation; nor a validation draw for training."""

    test: tuple[Draw, ...]
    validation: tuple[Draw, ...]
    batch: tuple[int, int]
    sequence_tokens: tuple[int, int]
    budget_share: tuple[float, float]

    def sample(self, rng: np.random.Generator, split: Split) -> Draw:
        """Draw one load of a split."""
        if split == "train":
            held_out = {(d.batch, d.sequence_tokens) for d in (*self.test, *self.validation)}
            return _sample(rng, self.batch, self.sequence_tokens, self.budget_share, held_out)
        chosen = self.validation if split == "validation" else self.test
        return chosen[int(rng.integers(len(chosen)))]


def _sample(
    rng: np.random.Generator,
    batch: tuple[int, int],
    sequence_tokens: tuple[int, int],
    budget_share: tuple[float, float],
    held_out: set[tuple[int, int]],
) -> Draw:
    """Draw batch and length log-uniformly, the budget uniformly, until the pair is not held out."""
    while True:
        u, v, w = rng.random(3).tolist()
        pair = (_log_uniform(u, *batch), _log_uniform(v, *sequence_tokens))
        if pair not in held_out:
            low, high = budget_share
            return Draw(batch=pair[0], sequence_tokens=pair[1], budget_share=low + w * (high - low))


def _log_uniform(u: float, low: int, high: int) -> int:
    return min(high, int(low * math.exp(u * math.log((high + 1) / low))))


@cache
def prune_draws(path: Path = CONF_DIR / "split" / "prune.yaml") -> Draws:
    """Read the split.

    Raises:
        ConfigError: if the file is malformed.
    """
    try:
        value: Mapping[str, Any] = OmegaConf.to_container(OmegaConf.load(path), resolve=True)  # type: ignore[assignment]
        test = tuple(
            Draw(batch=int(b), sequence_tokens=int(s), budget_share=float(share))
            for b, s in value["test"]["pairs"]
            for share in value["test"]["budget_shares"]
        )
        ranges = value["train"]
        batch = (int(ranges["batch"][0]), int(ranges["batch"][1]))
        length = (int(ranges["sequence_tokens"][0]), int(ranges["sequence_tokens"][1]))
        share = (float(ranges["budget_share"][0]), float(ranges["budget_share"][1]))
        rng = np.random.default_rng(int(value["validation"]["seed"]))
        pairs = {(d.batch, d.sequence_tokens) for d in test}
        validation = tuple(_sample(rng, batch, length, share, pairs) for _ in range(int(value["validation"]["draws"])))
    except (OSError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"{path} is no split of draws ({type(error).__name__}: {error})") from error
    if not (1 <= batch[0] <= batch[1] and 1 <= length[0] <= length[1] and 0 < share[0] <= share[1] < 1):
        raise ConfigError(f"{path}: train ranges must ascend, batch and length from 1, shares inside (0, 1)")
    return Draws(test=test, validation=validation, batch=batch, sequence_tokens=length, budget_share=share)


def check_split(name: str) -> Split:
    """Return the split of this name.

    Raises:
        ConfigError: for another name.
    """
    for split in SPLITS:
        if split == name:
            return split
    raise ConfigError(f"there is no split {name!r}; {nearest(name, SPLITS)}")
