"""``PruneToBudget-v0``: RAP's own setting. Drop blocks, one an action, until a load fits its memory budget.

An episode is one draw of (batch, sequence length, budget), or ``sequence`` of them one after the other. An action drops
a kept block; a draw is settled as soon as the plan fits, or when nothing is left to drop. With ``restore`` an action
may also bring a block back, and a draw is settled when the agent accepts. Without it what is dropped stays dropped over
the draws of a sequence, as in RAP's sessions. An illegal action changes nothing and is counted in ``info``.

``PruneToBudget`` is the plain environment, written with the Plans of ``sim``. ``PruneToBudgetVector`` steps many in one
call on arrays; equal seeds and actions give equal episodes (tests/agents/envs/test_prune.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from agents.envs.prune_loads import Draw, check_split, prune_draws
from agents.envs.render import Pictured
from agents.envs.reward import PruneReward, PruneStep, utility
from agents.envs.surrogate import Text, mask_losses, quality_on, single_losses
from sim.cost.memory import fits, peak_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import KeepMask, dense_plan, keep_all, with_mask
from sim.cost.quality import BEST_FORM
from sim.errors import ConfigError
from sim.policies.observation.prune import (
    Loads,
    load_columns,
    loads,
    mask_of,
    prune_features,
    prune_legal,
    prune_table,
    removed_blocks,
)
from sim.types import Bools, Floats32, Ints

STEPS_A_BLOCK = 4
"""An episode with restoring is cut after this many actions for each block and draw."""


class PruneSetting:
    """What the plain and the vector environment share: model, losses, tables, rules that need no state."""

    def __init__(
        self,
        *,
        model: str = "smollm2_135m",
        text: Text = "calibration",
        form: str = BEST_FORM,
        split: str = "train",
        restore: bool = False,
        sequence: int = 1,
        scores: bool = False,
        hide: Sequence[str] = (),
        reward: PruneReward | Mapping[str, Any] | None = None,
    ) -> None:
        """Set the rules.

        Args:
            model: a measured model of conf/quality. text: on which text its losses were measured. form: of the fit.
            split: train, validation or test of conf/split/prune.yaml.
            restore: blocks may come back. sequence: draws an episode. scores: observe what each block costs alone.
            hide: kinds of entries (``kept``, ``kv_share``, ...) that are observed as 0, for ablations.
            reward: a ``PruneReward``, or its fields.
        """
        if sequence < 1:
            raise ConfigError(f"sequence is {sequence}; an episode has at least 1 draw")
        self.model = load_model(model)
        self.quality, self.quality_name = quality_on(model, text, form), model
        self.split, self.draws = check_split(split), prune_draws()
        self.restore, self.sequence = restore, sequence
        self.table = prune_table(self.model, scores=scores, restore=restore)
        self.scores: Floats32 | None = None
        if scores:
            self.scores = np.clip(single_losses(self.quality), 0.0, 4.0).astype(np.float32)
        kinds = {entry.name.split(".")[0] for entry in self.table.entries}
        if unknown := sorted(set(hide) - kinds):
            raise ConfigError(f"hide: there is no entry {unknown[0]!r}; entries are {', '.join(sorted(kinds))}")
        self.shown = np.array([entry.name.split(".")[0] not in hide for entry in self.table.entries])
        self.reward = reward if isinstance(reward, PruneReward) else PruneReward(**(reward or {}))
        self.blocks = 2 * self.model.num_layers
        self.accept = self.blocks
        self.max_steps = STEPS_A_BLOCK * self.blocks * sequence
        low, high = self.table.bounds()
        self.observation_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.action_space: gym.spaces.Discrete[np.int64] = gym.spaces.Discrete(len(self.table.actions))


def given_draws(draws: Sequence[Draw | Mapping[str, Any]]) -> list[Draw]:
    """Return the draws that a caller gave as ``options``.

    Raises:
        ConfigError: for none, or a budget at which nothing has to go.
    """
    made = [draw if isinstance(draw, Draw) else Draw(**draw) for draw in draws]
    if not made:
        raise ConfigError("options['draws'] is empty; give at least one draw")
    if not made[0].budget_share < 1.0:
        raise ConfigError(
            f"options['draws'] begins with a budget of {made[0].budget_share} of the dense peak, which the dense model "
            "fits; begin with a share below 1"
        )
    return made


def _toggled(mask: KeepMask, block: int) -> KeepMask:
    """Return the mask with one block dropped, or back."""
    removed = removed_blocks(mask)
    removed[block] ^= True
    return mask_of(removed)


class PruneToBudget(Pictured, gym.Env[NDArray[np.float32], np.int64]):
    """One load at a time, in plain steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, render_mode: str | None = None, **words: Any) -> None:
        """Build the environment; ``words`` are those of ``PruneSetting``."""
        self.setting = PruneSetting(**words)
        self.observation_space, self.action_space = self.setting.observation_space, self.setting.action_space
        self.render_mode = render_mode
        self._todo: list[Draw] = []
        self._history: list[tuple[int, float, float]] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode; ``options={"draws": [...]}`` sets its draws instead of sampling them."""
        super().reset(seed=seed)
        given = (options or {}).get("draws")
        if given is not None:
            self._todo = given_draws(given)
        else:
            setting = self.setting
            self._todo = [setting.draws.sample(self.np_random, setting.split) for _ in range(setting.sequence)]
        self._draws = len(self._todo)
        self.mask: KeepMask = keep_all(self.setting.model)
        self._steps = self._illegal = 0
        self._utility = 0.0
        self._history = []
        self._begin_draw(self._todo.pop(0))
        return self._observe(), self._info() | {
            "observation_table": self.setting.table.rows(),
            "actions": self.setting.table.actions,
        }

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Drop or restore one block, or accept."""
        setting = self.setting
        action = int(action)
        before = self._loss()
        self._steps += 1
        settled = False
        if not self.legal()[action]:
            self._illegal += 1
        elif action == setting.accept:
            settled = True
        else:
            self.mask = _toggled(self.mask, action if action < setting.blocks else action - setting.accept - 1)
        if not setting.restore:
            settled = self.fits or not (any(self.mask.mha) or any(self.mask.ffn))
        truncated = self._steps >= setting.max_steps
        after = self._loss()
        fitting = failed = 0
        self._note()
        info = self._info()
        if settled:
            fitting, failed = int(self.fits), int(not self.fits)
            more, ended = self._next_draw()
            fitting += more
        else:
            ended = False
        if truncated and not ended:  # loads that were never settled are lost
            failed += len(self._todo) + 1
            ended = True
        step = PruneStep(
            loss_before=np.array([before]),
            loss_after=np.array([after]),
            fitting=np.array([fitting]),
            failed=np.array([failed]),
            ended=np.array([ended]),
            worst_loss=setting.quality.max_loss,
            draws=self._draws,
        )
        self._utility += float(utility(step)[0])
        info["utility"] = self._utility
        return self._observe(), float(setting.reward(step)[0]), ended and not truncated, truncated, info

    @property
    def fits(self) -> bool:
        """Whether the plan keeps to the budget of the present draw."""
        return fits(self.setting.model, self.mask, self.draw.batch, self.draw.sequence_tokens, self._budget_bytes)

    def legal(self) -> Bools:
        """Return which actions are legal now [a]."""
        legal: Bools = prune_legal(removed_blocks(self.mask)[None], np.array([self.fits]), self.setting.restore)[0]
        return legal

    def _begin_draw(self, draw: Draw) -> None:
        self.draw = draw
        self._budget_bytes = draw.budget_bytes(self.setting.model)
        one = ([draw.batch], [draw.sequence_tokens], [self._budget_bytes])
        self._load = loads(self.setting.model, *one)
        self._columns = load_columns(self._load, self.setting.model.num_layers)
        self._note()

    def _next_draw(self) -> tuple[int, bool]:
        """Go to the next draw that needs a decision; return how many fitted as they came, and whether none is left."""
        fitted = 0
        while self._todo:
            self._begin_draw(self._todo.pop(0))
            if self.setting.restore or not self.fits:
                return fitted, False
            fitted += 1
        return fitted, True

    def _loss(self) -> float:
        return self.setting.quality.loss(with_mask(dense_plan(self.setting.model), self.mask))

    def _note(self) -> None:
        draw, model = self.draw, self.setting.model
        peak = peak_bytes(model, self.mask, draw.batch, draw.sequence_tokens)
        self._history.append((peak, self._budget_bytes, self._loss()))

    def _observe(self) -> NDArray[np.float32]:
        setting = self.setting
        removed = removed_blocks(self.mask)[None]
        peak = np.array([peak_bytes(setting.model, self.mask, self.draw.batch, self.draw.sequence_tokens)])
        features = prune_features(self._load, self._columns, removed, peak, setting.scores)[0] * setting.shown
        return np.concatenate((features, self.legal())).astype(np.float32)

    def _info(self) -> dict[str, Any]:
        return {
            "batch": self.draw.batch,
            "sequence_tokens": self.draw.sequence_tokens,
            "budget_share": self.draw.budget_share,
            "loss": self._loss(),
            "fits": self.fits,
            "utility": self._utility,
            "illegal_actions": self._illegal,
        }

    def _figure(self) -> Any:
        """Draw memory against the budget, the loss, and which blocks are kept."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), dpi=80, layout="constrained")
        FigureCanvasAgg(figure)
        memory, kept = figure.subplots(2, 1, height_ratios=(3, 1))
        steps = range(len(self._history))
        memory.plot(steps, [peak / 1e6 for peak, _, _ in self._history], label="peak of the plan")
        memory.step(steps, [b / 1e6 for _, b, _ in self._history], where="post", label="budget", linestyle="--")
        memory.set(xlabel="actions", ylabel="memory, MB", ylim=(0, None))
        loss = memory.twinx()
        loss.plot(steps, [nats for _, _, nats in self._history], color="C3")
        loss.set_ylabel("loss, nats a token", color="C3")
        memory.legend(loc="lower left")
        memory.set_title(
            f"batch {self.draw.batch}, {self.draw.sequence_tokens} tokens, budget {100 * self.draw.budget_share:.0f} %"
        )
        kept.imshow([self.mask.mha, self.mask.ffn], aspect="auto", cmap="Greens", vmin=0, vmax=1)
        kept.set(yticks=[0, 1], yticklabels=["MHA", "FFN"], xlabel="layer; green is kept")
        return figure


class PruneToBudgetVector(VectorEnv[Any, Any, Any]):
    """Many loads at once, on arrays; the episodes of ``PruneToBudget``, faster.

    An environment whose episode has ended is reset by its next step, whose action is ignored (autoreset NEXT_STEP).
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, num_envs: int = 1, **words: Any) -> None:
        """Build ``num_envs`` environments; ``words`` are those of ``PruneSetting``."""
        self.setting = PruneSetting(**words)
        self.num_envs = num_envs
        self.single_observation_space = self.setting.observation_space
        self.single_action_space = self.setting.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = None
        self._rngs = [np.random.default_rng(s) for s in np.random.SeedSequence().spawn(num_envs)]
        blocks = self.setting.blocks
        self.removed: Bools = np.zeros((num_envs, blocks), dtype=np.bool_)
        self._todo: list[list[Draw]] = [[] for _ in range(num_envs)]
        self._draws = np.ones(num_envs, dtype=np.int64)
        self._steps = np.zeros(num_envs, dtype=np.int64)
        self._illegal = np.zeros(num_envs, dtype=np.int64)
        self._over = np.zeros(num_envs, dtype=np.bool_)
        self.utility = np.zeros(num_envs)
        self.loss = np.zeros(num_envs)
        self._mha = np.zeros(num_envs, dtype=np.int64)
        self._ffn = np.zeros(num_envs, dtype=np.int64)
        zeros = [0] * num_envs
        self._load: Loads = loads(self.setting.model, zeros, zeros, zeros)
        self._columns = load_columns(self._load, self.setting.model.num_layers)
        self._rows = np.arange(num_envs)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Floats32, dict[str, Any]]:
        """Begin an episode everywhere; environment i is seeded with seed + i.

        ``options={"draws": [[...], ...]}`` sets the draws of each environment instead of sampling them.
        """
        if seed is not None:
            seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else list(seed)
            for i, one in enumerate(seeds):
                if one is not None:  # the generator that Env.reset(seed=...) makes
                    self._rngs[i] = np.random.Generator(np.random.PCG64(one))
        given = (options or {}).get("draws")
        for i in range(self.num_envs):
            self._begin(i, None if given is None else given[i])
        self._over[:] = False
        return self._observe(self._peak()), {}

    def step(self, actions: Any) -> tuple[Floats32, NDArray[np.float64], Bools, Bools, dict[str, Any]]:
        """Step every environment; those whose episode has ended begin a new one instead."""
        setting, rows = self.setting, self._rows
        action = np.asarray(actions, dtype=np.int64)
        over = self._over
        peak = self._peak()
        legal = prune_legal(self.removed, peak <= self._load.budget_bytes, setting.restore)[rows, action]
        accepting = legal & (action == setting.accept) if setting.restore else np.zeros_like(over)
        toggling = legal & ~accepting & ~over
        block = np.where(action < setting.blocks, action, action - setting.accept - 1)
        before = self.loss
        at, which = rows[toggling], block[toggling]
        dropped = np.where(self.removed[at, which], -1, 1)
        self.removed[at, which] ^= True
        mha = which % 2 == 0
        self._mha[at] += dropped * mha
        self._ffn[at] += dropped * ~mha
        self.loss = mask_losses(setting.quality, self.removed)
        self._steps += 1
        self._illegal += ~legal
        peak = self._peak()
        fitting: Bools = peak <= self._load.budget_bytes
        settled = accepting & ~over if setting.restore else fitting | (self._mha + self._ffn == setting.blocks)
        settled &= ~over
        truncated: Bools = (self._steps >= setting.max_steps) & ~over
        settled_fitting, settled_failed = (settled & fitting).astype(np.int64), (settled & ~fitting).astype(np.int64)
        ended = np.zeros_like(over)
        loss_after = self.loss
        for i in np.flatnonzero(settled).tolist():
            more, ended[i] = self._next_draw(i)
            settled_fitting[i] += more
        for i in np.flatnonzero(truncated & ~ended).tolist():
            settled_failed[i] += len(self._todo[i]) + 1
            ended[i] = True
        step = PruneStep(
            loss_before=before,
            loss_after=loss_after,
            fitting=settled_fitting,
            failed=settled_failed,
            ended=ended,
            worst_loss=setting.quality.max_loss,
            draws=self._draws,
        )
        reward = setting.reward(step)
        self.utility += utility(step)
        infos = self._ended_infos(ended)
        for i in np.flatnonzero(over).tolist():
            self._begin(i, None)
            reward[i] = 0.0
        self._over = ended
        return self._observe(self._peak()), reward, ended & ~truncated, truncated, infos

    def _ended_infos(self, ended: Bools) -> dict[str, Any]:
        if not ended.any():
            return {}
        values = {"utility": self.utility.copy(), "loss": self.loss.copy(), "illegal_actions": self._illegal.copy()}
        return values | {f"_{name}": ended.copy() for name in values}

    def _begin(self, i: int, draws: Sequence[Draw | Mapping[str, Any]] | None) -> None:
        setting = self.setting
        if draws is None:
            self._todo[i] = [setting.draws.sample(self._rngs[i], setting.split) for _ in range(setting.sequence)]
        else:
            self._todo[i] = given_draws(draws)
        self._draws[i] = len(self._todo[i])
        self.removed[i] = False
        self._mha[i] = self._ffn[i] = self._steps[i] = self._illegal[i] = 0
        self.utility[i] = self.loss[i] = 0.0
        self._begin_draw(i, self._todo[i].pop(0))

    def _begin_draw(self, i: int, draw: Draw) -> bool:
        """Set the load of environment i; return whether its plan fits already."""
        budget_bytes = draw.budget_bytes(self.setting.model)
        one = loads(self.setting.model, [draw.batch], [draw.sequence_tokens], [budget_bytes])
        for name in Loads.__slots__:
            getattr(self._load, name)[i] = getattr(one, name)[0]
        self._columns[i] = load_columns(one, self.setting.model.num_layers)[0]
        peak = one.dense_bytes[0] - self._mha[i] * one.mha_bytes[0] - self._ffn[i] * one.ffn_bytes[0]
        return bool(peak <= budget_bytes)

    def _next_draw(self, i: int) -> tuple[int, bool]:
        """Go to the next draw that needs a decision; return how many fitted as they came, and whether none is left."""
        fitted = 0
        while self._todo[i]:
            if not self._begin_draw(i, self._todo[i].pop(0)) or self.setting.restore:
                return fitted, False
            fitted += 1
        return fitted, True

    def _peak(self) -> Ints:
        load = self._load
        peak: Ints = load.dense_bytes - self._mha * load.mha_bytes - self._ffn * load.ffn_bytes
        return peak

    def _observe(self, peak: Ints) -> Floats32:
        setting, load = self.setting, self._load
        out = np.empty((self.num_envs, setting.table.size), dtype=np.float32)
        features = setting.table.features
        out[:, :features] = prune_features(load, self._columns, self.removed, peak, setting.scores)
        if not setting.shown.all():
            out[:, :features] *= setting.shown
        out[:, features:] = prune_legal(self.removed, peak <= load.budget_bytes, setting.restore)
        return out


def masks_of(vector: PruneToBudgetVector) -> list[KeepMask]:
    """Return the present mask of each environment."""
    return [mask_of(removed) for removed in vector.removed]
