"""``ServeRoles-v0`` for training: many systems, one row each.

Episodes equal those of ``agents.envs.roles.ServeRoles`` step by step (tests/agents/envs/test_roles.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from agents.envs.checks import RESET_MASK, for_each_row, reset_options, row_actions, rows_to_reset
from agents.envs.roles import RolesCore, RolesSetting
from agents.envs.vector import MaskedRows, Replayed, final_infos, reseed
from sim.errors import ConfigError
from sim.types import Bools, Floats, Floats32, Ints


class ServeRolesVector(Replayed, MaskedRows, VectorEnv[Any, Any, Any]):
    """Many systems at once.

    The step after the end of an episode resets that environment and ignores its action (autoreset NEXT_STEP).
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, num_envs: int = 1, **kwargs: Any) -> None:
        """Build ``num_envs`` environments; ``kwargs`` go to ``RolesSetting``."""
        if num_envs < 1:
            raise ConfigError(f"num_envs is {num_envs}; it must be at least 1")
        self.setting = setting = RolesSetting(**kwargs)
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = setting.observation_space, setting.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = None
        self._cores = [RolesCore(setting) for _ in range(num_envs)]
        self._windows: list[Any] = [None] * num_envs
        self._played: list[Ints] = []
        self._together = False
        self._rngs = [np.random.default_rng(s) for s in np.random.SeedSequence().spawn(num_envs)]
        self._over = np.zeros(num_envs, dtype=np.bool_)
        self._legal = np.ones((num_envs, len(setting.table.actions)), dtype=np.bool_)

    @property
    def windows(self) -> list[Any]:
        """The windows of each row, in the order of its streams."""
        return list(self._windows)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Floats32, dict[str, Any]]:
        """Begin an episode in every environment; environment i is seeded with seed + i.

        ``options={"windows": [...]}`` sets the windows of each row, a list with one for each stream;
        ``options={"reset_mask": bool[n]}`` resets only these rows.
        """
        options = reset_options(options, ("windows", RESET_MASK))
        where = rows_to_reset(options, self.num_envs, all(one is not None for one in self._windows))
        requested = for_each_row(options, "windows", self.num_envs)
        windows = (
            [None] * self.num_envs if requested is None else [self.setting.check_windows(one) for one in requested]
        )
        reseed(self._rngs, seed, where.tolist())
        self._note_begin(where)
        for row in np.flatnonzero(where).tolist():
            self._begin(row, windows[row])
        self._over[where] = False
        return self._observe(), self._mask_infos()

    def _begin(self, row: int, windows: Any = None) -> None:
        self._windows[row] = self.setting.sample(self._rngs[row]) if windows is None else windows
        self._cores[row].begin(self._windows[row])

    def _observe(self) -> Floats32:
        """Return the observations, float32[n, o]."""
        self._legal = np.stack([core.legal() for core in self._cores])
        return np.stack([core.observe() for core in self._cores])

    def step(self, actions: Any) -> tuple[Floats32, Floats, Bools, Bools, dict[str, Any]]:
        """Step every environment; one whose episode has ended begins a new one instead."""
        chosen = row_actions(actions, self.num_envs, len(self.setting.table.actions))
        restarting, reward = self._over.copy(), np.zeros(self.num_envs)
        self._note_begin(restarting)
        if not restarting.any():
            self._played.append(chosen.copy())
        over = np.zeros(self.num_envs, dtype=np.bool_)
        for row, core in enumerate(self._cores):
            if restarting[row]:
                self._begin(row)
            else:
                reward[row], over[row] = core.step(int(chosen[row]))
        self._over = over
        observed = self._observe()
        utility = np.where(over, [core.utility for core in self._cores], 0.0)
        infos = self._mask_infos() | final_infos(over, utility=utility)
        return observed, reward, over.copy(), np.zeros(self.num_envs, dtype=np.bool_), infos


__all__ = ["ServeRolesVector"]
