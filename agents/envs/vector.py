"""What the vector environments share: seeding, and the infos of episodes that ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def reseed(rngs: list[np.random.Generator], seed: int | Sequence[int | None] | None) -> None:
    """Replace the generators of the environments as Gymnasium's vector ``reset(seed=...)`` defines.

    Args:
        rngs: one generator for each environment; replaced in place.
        seed: an integer seeds environment i with ``seed + i``. A sequence holds one seed for each environment, and None
            in it keeps that generator. None keeps all.
    """
    if seed is None:
        return
    seeds = [seed + i for i in range(len(rngs))] if isinstance(seed, int) else list(seed)
    for i, one in enumerate(seeds):
        if one is not None:
            # The same generator that Env.reset(seed=...) makes, so that plain and vector episodes are equal.
            rngs[i] = np.random.Generator(np.random.PCG64(one))


def final_infos(ended: NDArray[np.bool_], **values: NDArray[Any]) -> dict[str, Any]:
    """Return Gymnasium's vector infos of the episodes that ended in this step.

    Args:
        ended: bool[n], whether the episode of environment i ended.
        values: arrays [n]; each is copied and comes with the mask ``_NAME``, as Gymnasium defines it.
    """
    if not ended.any():
        return {}
    infos: dict[str, Any] = {name: value.copy() for name, value in values.items()}
    return infos | {f"_{name}": ended.copy() for name in values}
