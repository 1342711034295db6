"""``PruneToBudget-v0`` for training: many environments stepped in one call on arrays.

Episodes equal those of ``agents.envs.prune.PruneToBudget`` for equal seeds and actions
(tests/agents/envs/test_prune.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from agents.envs.checks import RESET_MASK, for_each_row, reset_options, row_actions, rows_to_reset
from agents.envs.prune import PruneSetting, check_loads
from agents.envs.prune_loads import PruneLoad
from agents.envs.reward import PruneStep, utility
from agents.envs.surrogate import mask_losses
from agents.envs.vector import MaskedRows, final_infos, reseed
from sim.policies.observation.prune import Loads, load_columns, loads, prune_features, prune_legal
from sim.types import Bools, Floats32, Ints

# Shapes: n environments, b blocks in the order MHA0, FFN0, MHA1, ...


class PruneToBudgetVector(MaskedRows, VectorEnv[Any, Any, Any]):
    """Many loads at once.

    The step after the end of an episode resets that environment and ignores its action (autoreset NEXT_STEP).

    removed: bool[n, b], the dropped blocks. loss: float64[n], nats per token more than dense. utility: float64[n], of
    the episode so far.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, num_envs: int = 1, **kwargs: Any) -> None:
        """Build ``num_envs`` environments; ``kwargs`` go to ``PruneSetting``."""
        self.setting = PruneSetting(**kwargs)
        self.num_envs = num_envs
        self.single_observation_space = self.setting.observation_space
        self.single_action_space = self.setting.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = None
        self._rngs = [np.random.default_rng(s) for s in np.random.SeedSequence().spawn(num_envs)]
        blocks = self.setting.blocks
        self.removed: Bools = np.zeros((num_envs, blocks), dtype=np.bool_)
        self._pending: list[list[PruneLoad]] = [[] for _ in range(num_envs)]
        self._load_count = np.ones(num_envs, dtype=np.int64)
        self._steps = np.zeros(num_envs, dtype=np.int64)
        self._illegal = np.zeros(num_envs, dtype=np.int64)
        self._over = np.zeros(num_envs, dtype=np.bool_)
        self._begun = False
        self._legal = np.ones((num_envs, len(self.setting.table.actions)), dtype=np.bool_)
        self.utility = np.zeros(num_envs)
        self.loss = np.zeros(num_envs)
        # How many MHA and FFN blocks each environment has dropped.
        self._mha = np.zeros(num_envs, dtype=np.int64)
        self._ffn = np.zeros(num_envs, dtype=np.int64)
        zeros = [0] * num_envs
        self._load_arrays: Loads = loads(self.setting.model, zeros, zeros, zeros)
        self._columns = load_columns(self._load_arrays, self.setting.model.num_layers)
        self._rows = np.arange(num_envs)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Floats32, dict[str, Any]]:
        """Begin an episode in every environment; environment i is seeded with seed + i.

        ``options={"loads": [[...], ...]}`` sets the loads of each environment instead of sampling them;
        ``options={"reset_mask": bool[n]}`` resets only these environments.
        """
        options = reset_options(options, ("loads", RESET_MASK))
        where = rows_to_reset(options, self.num_envs, self._begun)
        requested = for_each_row(options, "loads", self.num_envs)
        reseed(self._rngs, seed, where.tolist())
        for i in np.flatnonzero(where).tolist():
            self._begin(i, None if requested is None else requested[i])
        self._over[where] = False
        self._begun = True
        return self._observe(self._peak()), self._mask_infos()

    def step(self, actions: Any) -> tuple[Floats32, NDArray[np.float64], Bools, Bools, dict[str, Any]]:
        """Step every environment; one whose episode has ended begins a new one instead."""
        setting, over = self.setting, self._over
        loss_before = self.loss
        accepting = self._act(row_actions(actions, self.num_envs, len(setting.table.actions)))
        self._steps += 1
        fitting: Bools = self._peak() <= self._load_arrays.budget_bytes
        settled = accepting if setting.restore else fitting | (self._mha + self._ffn == setting.blocks)
        settled &= ~over
        truncated: Bools = (self._steps >= setting.max_steps) & ~over
        settled_fitting, settled_failed = (settled & fitting).astype(np.int64), (settled & ~fitting).astype(np.int64)
        ended = np.zeros_like(over)
        loss_after = self.loss
        for i in np.flatnonzero(settled).tolist():
            more, ended[i] = self._next_load(i)
            settled_fitting[i] += more
        for i in np.flatnonzero(truncated & ~ended).tolist():
            settled_failed[i] += len(self._pending[i]) + 1
            ended[i] = True
        step = PruneStep(
            loss_before=loss_before,
            loss_after=loss_after,
            fitting=settled_fitting,
            failed=settled_failed,
            ended=ended,
            worst_loss=setting.quality.max_loss,
            loads=self._load_count,
        )
        reward = setting.reward(step)
        self.utility += utility(step)
        infos = final_infos(ended, utility=self.utility, loss=self.loss, illegal_actions=self._illegal)
        for i in np.flatnonzero(over).tolist():
            self._begin(i, None)
            reward[i] = 0.0
        self._over = ended
        observations = self._observe(self._peak())
        return observations, reward, ended & ~truncated, truncated, infos | self._mask_infos()

    def episodes_state(self) -> dict[str, Any]:
        """Return the running episodes and the generators, for ``restore_episodes`` of an equal environment."""
        shared = ("setting", "single_observation_space", "single_action_space", "observation_space", "action_space")
        return {name: deepcopy(value) for name, value in vars(self).items() if name not in shared}

    def restore_episodes(self, state: dict[str, Any]) -> None:
        """Go on with the episodes of ``episodes_state``."""
        vars(self).update(deepcopy(state))

    def _act(self, action: Ints) -> Bools:
        """Apply the legal actions to ``removed`` and ``loss``; return which environments accept their plan, bool[n]."""
        setting, rows, over = self.setting, self._rows, self._over
        load_fits = self._peak() <= self._load_arrays.budget_bytes
        legal = prune_legal(self.removed, load_fits, setting.restore)[rows, action]
        accepting = legal & (action == setting.accept) if setting.restore else np.zeros_like(over)
        toggling = legal & ~accepting & ~over
        block = np.where(action < setting.blocks, action, action - setting.accept - 1)
        at, which = rows[toggling], block[toggling]
        dropped = np.where(self.removed[at, which], -1, 1)
        self.removed[at, which] ^= True
        mha = which % 2 == 0
        self._mha[at] += dropped * mha
        self._ffn[at] += dropped * ~mha
        self.loss = mask_losses(setting.quality, self.removed)
        self._illegal += ~legal
        return accepting

    def _begin(self, i: int, requested: Sequence[PruneLoad | Mapping[str, Any]] | None) -> None:
        """Begin an episode of environment i with these loads, or with sampled ones."""
        setting = self.setting
        if requested is None:
            self._pending[i] = [setting.loads.sample(self._rngs[i], setting.split) for _ in range(setting.sequence)]
        else:
            self._pending[i] = check_loads(requested)
        self._load_count[i] = len(self._pending[i])
        self.removed[i] = False
        self._mha[i] = self._ffn[i] = self._steps[i] = self._illegal[i] = 0
        self.utility[i] = self.loss[i] = 0.0
        self._begin_load(i, self._pending[i].pop(0))

    def _begin_load(self, i: int, load: PruneLoad) -> bool:
        """Set the load of environment i; return whether its plan fits already."""
        budget_bytes = load.budget_bytes(self.setting.model)
        one = loads(self.setting.model, [load.batch], [load.sequence_tokens], [budget_bytes])
        for name in Loads.__slots__:
            getattr(self._load_arrays, name)[i] = getattr(one, name)[0]
        self._columns[i] = load_columns(one, self.setting.model.num_layers)[0]
        peak = one.dense_bytes[0] - self._mha[i] * one.mha_bytes[0] - self._ffn[i] * one.ffn_bytes[0]
        return bool(peak <= budget_bytes)

    def _next_load(self, i: int) -> tuple[int, bool]:
        """Go to the next load of environment i that needs an action.

        Returns:
            How many loads on the way the plan fitted already, and whether no load is left.
        """
        fitted = 0
        while self._pending[i]:
            if not self._begin_load(i, self._pending[i].pop(0)) or self.setting.restore:
                return fitted, False
            fitted += 1
        return fitted, True

    def _peak(self) -> Ints:
        """Return the peak memory of each plan at its load in bytes, int64[n]."""
        load = self._load_arrays
        peak: Ints = load.dense_bytes - self._mha * load.mha_bytes - self._ffn * load.ffn_bytes
        return peak

    def _observe(self, peak: Ints) -> Floats32:
        setting, load = self.setting, self._load_arrays
        out = np.empty((self.num_envs, setting.table.size), dtype=np.float32)
        features = setting.table.features
        out[:, :features] = prune_features(load, self._columns, self.removed, peak, setting.scores)
        if not setting.visible.all():
            out[:, :features] *= setting.visible
        self._legal = prune_legal(self.removed, peak <= load.budget_bytes, setting.restore)
        out[:, features:] = self._legal
        return out
