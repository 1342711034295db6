"""What this project adds to RLlib's losses: DQN that keeps a margin, and PPO that reports its divergence."""

from __future__ import annotations

from typing import Any

import torch
from ray.rllib.algorithms.dqn.torch.dqn_torch_learner import DQNTorchLearner
from ray.rllib.algorithms.ppo.ppo import LEARNER_RESULTS_KL_KEY
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core.columns import Columns

from agents.training.modules import actor_logits
from sim.types import Bools, Floats32

Batch = dict[str, Any]
KEPT = "kept_demonstrations"


class KeepsMargin(DQNTorchLearner):
    """DQN that goes on to value the actions of demonstrations above all others, if it was given any.

    This is the supervised part of DQfD's loss (arXiv 1704.03732, section 4). Without it, errors of the values that are
    larger than the differences between actions soon decide what the network does.

    Demonstrations are a part of the learner's state, so a resumed training has them.
    """

    def build(self) -> None:
        """Build the learner, without demonstrations."""
        super().build()
        self.kept: dict[str, Any] | None = None

    def keep(self, observations: Floats32, shown: Bools, *, margin: float, weight: float, batch: int) -> None:
        """Add ``weight`` times the mean margin loss of ``batch`` random rows to every later update.

        Args:
            observations: float32[n, entries]. shown: bool[n, actions], the actions of the demonstrations.
            margin, weight: in units of reward, and without unit. batch: rows an update.
        """
        self.kept = {
            "observations": torch.from_numpy(observations),
            "shown": torch.from_numpy(shown),
            "margin": margin,
            "weight": weight,
            "batch": batch,
        }

    def compute_loss_for_module(self, *, module_id: str, config: Any, batch: Batch, fwd_out: Batch) -> Any:
        """Return the loss of DQN plus that of the margin."""
        loss = super().compute_loss_for_module(module_id=module_id, config=config, batch=batch, fwd_out=fwd_out)
        if self.kept is None:
            return loss
        # By torch's global generator, whose state a checkpoint holds (agents.training.runner_state).
        rows = torch.randint(len(self.kept["observations"]), (self.kept["batch"],))
        values = actor_logits(self.module[module_id].unwrapped(), self.kept["observations"][rows])
        missed = margin_loss(values, self.kept["shown"][rows], self.kept["margin"])
        self.metrics.log_value((module_id, "margin_loss"), missed.detach(), window=1)
        return loss + self.kept["weight"] * missed

    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Return the state, with the demonstrations unless only other parts are asked for."""
        state: dict[str, Any] = super().get_state(components, not_components=not_components, **kwargs)
        if self._check_component(KEPT, components, not_components):
            state[KEPT] = self.kept
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over a state; one that was saved without demonstrations leaves them as they are."""
        super().set_state(state)
        self.kept = state.get(KEPT, self.kept)


def margin_loss(values: torch.Tensor, shown: torch.Tensor, margin: float) -> torch.Tensor:
    """Return by how much the best shown action misses being ``margin`` above every other legal one, mean over rows.

    Args:
        values: [n, actions], minus infinity for illegal actions. shown: bool[n, actions], at least one in each row.
        margin: in units of ``values``, as is what is returned. A row without another legal action misses nothing.
    """
    best = values.masked_fill(~shown, -torch.inf).amax(dim=-1)
    other = values.masked_fill(shown, -torch.inf).amax(dim=-1)
    return (other + margin - best).clamp(min=0.0).mean()


class ReportsDivergence(PPOTorchLearner):
    """PPO that reports the mean KL divergence from the sampling policy to the present one, in nats.

    RLlib computes it only as a part of the loss, and else reports 0. It is no part of the loss here.
    """

    def compute_loss_for_module(self, *, module_id: str, config: Any, batch: Batch, fwd_out: Batch) -> Any:
        """Return the loss of PPO."""
        loss = super().compute_loss_for_module(module_id=module_id, config=config, batch=batch, fwd_out=fwd_out)
        distribution = self.module[module_id].unwrapped().get_train_action_dist_cls()
        with torch.no_grad():
            old, new = (distribution.from_logits(one[Columns.ACTION_DIST_INPUTS]) for one in (batch, fwd_out))
            divergence = old.kl(new)
            if Columns.LOSS_MASK in batch:
                divergence = divergence[batch[Columns.LOSS_MASK]]
        self.metrics.log_value((module_id, LEARNER_RESULTS_KL_KEY), divergence.mean(), window=1)
        return loss
