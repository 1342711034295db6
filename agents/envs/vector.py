"""What the vector environments share: seeding, masks of legal actions, and the infos of episodes that ended."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.envs.checks import mask_info
from sim.errors import ConfigError
from sim.types import Bools


class MaskedRows:
    """Flags the legal actions of every row, as Gymnasium's and Stable-Baselines3's masked algorithms ask for them."""

    num_envs: int
    _legal: Bools

    def action_masks(self) -> Bools:
        """Return which actions are legal now, bool[n, actions]."""
        return self._legal.copy()

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return a method's result or an attribute for every row, as Gymnasium's ``SyncVectorEnv.call`` does."""
        value = getattr(self, name)
        rows = value(*args, **kwargs) if callable(value) else value
        if not isinstance(rows, np.ndarray | list | tuple) or len(rows) != self.num_envs:
            rows = [rows] * self.num_envs
        return tuple(rows)

    def env_method(self, name: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Return ``call`` as a list, under the name that Stable-Baselines3 uses."""
        return list(self.call(name, *args, **kwargs))

    def _mask_infos(self) -> dict[str, Any]:
        """Return Gymnasium's vector infos that flag the legal actions, int8[n, actions]."""
        return mask_info(self._legal) | {"_action_mask": np.ones(self.num_envs, dtype=np.bool_)}


class Replayed:
    """Saves the running episodes of a serving environment as their windows and the actions so far.

    An engine cannot be saved, but equal windows and actions give equal episodes. All rows must have begun together; an
    environment of which some rows were reset alone saves nothing.
    """

    _rngs: list[np.random.Generator]
    _windows: list[Any]
    _played: list[NDArray[np.int64]]
    _together: bool

    def episodes_state(self) -> dict[str, Any] | None:
        """Return the running episodes and the generators, for ``restore_episodes`` of an equal environment."""
        if not self._together:
            return None
        return {"rngs": deepcopy(self._rngs), "windows": list(self._windows), "played": list(self._played)}

    def restore_episodes(self, state: dict[str, Any]) -> None:
        """Play the episodes of ``episodes_state`` again, up to where they were."""
        self.reset(options={"windows": state["windows"]})  # type: ignore[attr-defined]
        for actions in state["played"]:
            self.step(actions)  # type: ignore[attr-defined]
        self._rngs[:] = deepcopy(state["rngs"])

    def _note_begin(self, where: Bools) -> None:
        """Note which rows or clusters begin now: all of them, or some, or none."""
        if where.all():
            self._played, self._together = [], True
        elif where.any():
            self._together = False


def reseed(
    rngs: list[np.random.Generator], seed: int | Sequence[int | None] | None, where: Sequence[bool] | None = None
) -> None:
    """Replace the generators of the environments as Gymnasium's vector ``reset(seed=...)`` defines.

    Args:
        rngs: one generator for each environment; replaced in place.
        seed: an integer seeds environment i with ``seed + i``. A sequence holds one seed for each environment, and None
            in it keeps that generator. None keeps all.
        where: which environments; None means all.
    Raises:
        ConfigError: for a sequence of another length, or a seed that is no whole number of at least 0.
    """
    if seed is None:
        return
    seeds: list[Any] = []
    if isinstance(seed, int | np.integer):
        seeds = [seed + i for i in range(len(rngs))] if _is_seed(seed) else []
    elif isinstance(seed, Sequence):
        seeds = list(seed)
    if len(seeds) != len(rngs) or any(one is not None and not _is_seed(one) for one in seeds):
        raise ConfigError(f"seed is {seed}; pass a whole number of at least 0, or a list with {len(rngs)} of them")
    for i, one in enumerate(seeds):
        if one is not None and (where is None or where[i]):
            # The same generator that Env.reset(seed=...) makes, so that plain and vector episodes are equal.
            rngs[i] = np.random.Generator(np.random.PCG64(one))


def _is_seed(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 0


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
