"""``PruneToBudget-v0``: RAP's setting. Drop one block per action until a load fits its memory budget.

Episode: one load (batch, sequence length, budget), or ``sequence`` loads in a row. A load is settled when the plan fits
its budget or no block is left to drop. With ``restore``, an action may also bring a dropped block back, and the agent
settles a load by accepting its plan. Blocks stay dropped for the next load of a sequence, as in RAP's sessions.

Observation: float32[entries]; ``sim.policies.observation.prune.prune_table`` lists each entry with its range. They are
the load, peak memory and missing memory as shares of the dense model's peak, which blocks are kept, and last one flag
(0 or 1) for each legal action.

Action: the number of a block in the order MHA0, FFN0, MHA1, ...: drop it. With ``restore``, the next action accepts and
the ones after it restore a block. An illegal action changes nothing; ``info["illegal_actions"]`` counts them.

Reward: ``agents.envs.reward.PruneReward``, in nats per token or as a share of the quality kept (no unit).

``PruneToBudget`` is the plain environment, written with the Plans of ``sim``.
``agents.envs.prune_vector.PruneToBudgetVector`` steps many environments in one call; equal seeds and actions give equal
episodes (tests/agents/envs/test_prune.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from agents.envs.checks import mask_info, one_action, reset_options
from agents.envs.prune_loads import PruneLoad, check_split, prune_loads
from agents.envs.render import RenderMixin
from agents.envs.reward import PruneReward, PruneStep, built_reward, utility
from agents.envs.surrogate import quality_on, single_losses
from sim.cost.memory import fits, peak_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import KeepMask, dense_plan, keep_all, with_mask
from sim.cost.quality import BEST_FORM, Text
from sim.errors import ConfigError
from sim.policies.observation.prune import (
    load_columns,
    loads,
    mask_of,
    prune_features,
    prune_legal,
    prune_table,
    removed_blocks,
)
from sim.types import Bools, Floats32

STEPS_PER_BLOCK = 4
"""An episode is truncated after this many actions for each block and load; only ``restore`` episodes get that far."""


class PruneSetting:
    """What the plain and the vector environment share: the model, its losses, spaces, and the rules without state."""

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
            model: a model with a measured table in conf/quality.
            text: the text on which losses were measured, "calibration" or "test".
            form: the form of the surrogate that is fitted to them (``sim.cost.quality``).
            split: "train", "validation" or "test" of conf/split/prune.yaml.
            restore: allow actions that bring blocks back.
            sequence: loads per episode.
            scores: also observe the loss of dropping each block alone, in nats per token.
            hide: kinds of entries (``kept``, ``kv_share``, ...) that are always observed as 0, for ablations.
            reward: as in ``built_reward``.
        """
        if sequence < 1:
            raise ConfigError(f"sequence is {sequence}; an episode needs at least 1 load, so set sequence=1 or more")
        self.model = load_model(model)
        self.quality, self.quality_name = quality_on(model, text, form), model
        self.split, self.loads = check_split(split), prune_loads()
        self.restore, self.sequence = restore, sequence
        self.table = prune_table(self.model, scores=scores, restore=restore)
        self.scores: Floats32 | None = None
        if scores:
            self.scores = np.clip(single_losses(self.quality), 0.0, 4.0).astype(np.float32)
        kinds = {entry.name.split(".")[0] for entry in self.table.entries}
        if unknown := sorted(set(hide) - kinds):
            raise ConfigError(f"hide: there is no entry {unknown[0]!r}; entries are {', '.join(sorted(kinds))}")
        self.visible = np.array([entry.name.split(".")[0] not in hide for entry in self.table.entries])
        self.reward = built_reward(reward, PruneReward)
        self.blocks = 2 * self.model.num_layers
        self.accept = self.blocks
        self.max_steps = STEPS_PER_BLOCK * self.blocks * sequence
        low, high = self.table.bounds()
        self.observation_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.action_space: gym.spaces.Discrete[np.int64] = gym.spaces.Discrete(len(self.table.actions))


def check_loads(loads: Sequence[PruneLoad | Mapping[str, Any]]) -> list[PruneLoad]:
    """Return ``options["loads"]`` of ``reset`` as PruneLoads.

    Raises:
        ConfigError: if there are none, if one is out of range, or if the dense model fits the first.
    """
    try:
        checked = [load if isinstance(load, PruneLoad) else PruneLoad(**load) for load in loads]
    except TypeError as error:
        raise ConfigError(f"options['loads'] holds what is no load ({error})") from error
    for load in checked:
        counts = (load.batch, load.sequence_tokens)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in counts) or not (
            0.0 < load.budget_share < math.inf
        ):
            raise ConfigError(
                f"options['loads'] has {load}; batch and sequence_tokens must be whole numbers of at least 1, and "
                "budget_share above 0"
            )
    if not checked:
        raise ConfigError("options['loads'] is empty; pass at least one load")
    if not checked[0].budget_share < 1.0:
        raise ConfigError(
            f"the first of options['loads'] has budget_share {checked[0].budget_share}, which the dense model fits; "
            "use a share below 1"
        )
    return checked


def _toggled(mask: KeepMask, block: int) -> KeepMask:
    """Return the mask with one block dropped, or restored if it was."""
    removed = removed_blocks(mask)
    removed[block] ^= True
    return mask_of(removed)


class PruneToBudget(RenderMixin, gym.Env[NDArray[np.float32], np.int64]):
    """The plain environment: one load at a time, one block per step."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, render_mode: str | None = None, **kwargs: Any) -> None:
        """Build the environment; ``kwargs`` go to ``PruneSetting``."""
        self.setting = PruneSetting(**kwargs)
        self.observation_space, self.action_space = self.setting.observation_space, self.setting.action_space
        self.render_mode = render_mode
        self._pending: list[PruneLoad] = []
        self._history: list[tuple[int, float, float]] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode; ``options={"loads": [...]}`` sets its loads instead of sampling them."""
        requested = reset_options(options, ("loads",)).get("loads")
        super().reset(seed=seed)
        if requested is not None:
            self._pending = check_loads(requested)
        else:
            setting = self.setting
            self._pending = [setting.loads.sample(self.np_random, setting.split) for _ in range(setting.sequence)]
        self._load_count = len(self._pending)
        self.mask: KeepMask = keep_all(self.setting.model)
        self._steps = self._illegal = 0
        self._utility = 0.0
        self._history = []
        self._begin_load(self._pending.pop(0))
        return self._observe(), self._info() | mask_info(self.legal()) | {
            "observation_table": self.setting.table.rows(),
            "actions": self.setting.table.actions,
        }

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Drop or restore one block, or accept the plan; return the step as Gymnasium defines it."""
        setting = self.setting
        action = one_action(action, len(setting.table.actions))
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
        self._record()
        info = self._info()
        if settled:
            fitting, failed = int(self.fits), int(not self.fits)
            # Later loads that fit without another action count for this step.
            more, ended = self._next_load()
            fitting += more
        else:
            ended = False
        if truncated and not ended:  # the loads that were never settled count as failed
            failed += len(self._pending) + 1
            ended = True
        step = PruneStep(
            loss_before=np.array([before]),
            loss_after=np.array([after]),
            fitting=np.array([fitting]),
            failed=np.array([failed]),
            ended=np.array([ended]),
            worst_loss=setting.quality.max_loss,
            loads=self._load_count,
        )
        self._utility += float(utility(step)[0])
        info |= {"utility": self._utility, **mask_info(self.legal())}
        return self._observe(), float(setting.reward(step)[0]), ended and not truncated, truncated, info

    @property
    def fits(self) -> bool:
        """Whether the plan fits the budget of the current load."""
        return fits(self.setting.model, self.mask, self.load.batch, self.load.sequence_tokens, self._budget_bytes)

    def legal(self) -> Bools:
        """Return which actions are legal now, bool[actions]."""
        legal: Bools = prune_legal(removed_blocks(self.mask)[None], np.array([self.fits]), self.setting.restore)[0]
        return legal

    def action_masks(self) -> Bools:
        """Return ``legal()`` under the name that sb3-contrib's MaskablePPO calls."""
        return self.legal()

    def _begin_load(self, load: PruneLoad) -> None:
        self.load = load
        self._budget_bytes = load.budget_bytes(self.setting.model)
        self._load_arrays = loads(self.setting.model, [load.batch], [load.sequence_tokens], [self._budget_bytes])
        self._columns = load_columns(self._load_arrays, self.setting.model.num_layers)
        self._record()

    def _next_load(self) -> tuple[int, bool]:
        """Go to the next load that needs an action.

        Returns:
            How many loads on the way the plan fitted already, and whether no load is left.
        """
        fitted = 0
        while self._pending:
            self._begin_load(self._pending.pop(0))
            if self.setting.restore or not self.fits:
                return fitted, False
            fitted += 1
        return fitted, True

    def _loss(self) -> float:
        return self.setting.quality.loss(with_mask(dense_plan(self.setting.model), self.mask))

    def _record(self) -> None:
        """Append peak bytes, budget bytes and loss to the history that ``render`` shows."""
        load, model = self.load, self.setting.model
        peak = peak_bytes(model, self.mask, load.batch, load.sequence_tokens)
        self._history.append((peak, self._budget_bytes, self._loss()))

    def _observe(self) -> NDArray[np.float32]:
        setting = self.setting
        removed = removed_blocks(self.mask)[None]
        peak = np.array([peak_bytes(setting.model, self.mask, self.load.batch, self.load.sequence_tokens)])
        features = prune_features(self._load_arrays, self._columns, removed, peak, setting.scores)[0]
        features = features * setting.visible
        return np.concatenate((features, self.legal())).astype(np.float32)

    def _info(self) -> dict[str, Any]:
        return {
            "batch": self.load.batch,
            "sequence_tokens": self.load.sequence_tokens,
            "budget_share": self.load.budget_share,
            "loss": self._loss(),
            "fits": self.fits,
            "utility": self._utility,
            "illegal_actions": self._illegal,
        }

    def _figure(self) -> Any:
        """Plot peak memory against the budget, the loss, and which blocks are kept."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), dpi=80, layout="constrained")
        FigureCanvasAgg(figure)
        memory, kept = figure.subplots(2, 1, height_ratios=(3, 1))
        steps = range(len(self._history))
        memory.plot(steps, [peak / 1e6 for peak, _, _ in self._history], label="peak memory of the plan")
        memory.step(steps, [b / 1e6 for _, b, _ in self._history], where="post", label="budget", linestyle="--")
        memory.set(xlabel="actions", ylabel="memory, MB", ylim=(0, None))
        loss = memory.twinx()
        loss.plot(steps, [nats for _, _, nats in self._history], color="C3")
        loss.set_ylabel("loss, nats per token", color="C3")
        memory.legend(loc="lower left")
        memory.set_title(
            f"batch {self.load.batch}, {self.load.sequence_tokens} tokens, budget {100 * self.load.budget_share:.0f} %"
        )
        kept.imshow([self.mask.mha, self.mask.ffn], aspect="auto", cmap="Greens", vmin=0, vmax=1)
        kept.set(yticks=[0, 1], yticklabels=["MHA", "FFN"], xlabel="layer (green: kept)")
        return figure
