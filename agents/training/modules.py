"""RLlib modules that never choose an illegal action.

The last entries of an observation flag the legal actions (``sim.policies.observation.prune.ObservationSpec``). The
network reads only the features before them; its outputs for illegal actions are masked. ``network_of_module`` extracts
the weights, to run the network in NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.algorithms.dqn.torch.default_dqn_torch_rl_module import DefaultDQNTorchRLModule
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.core.columns import Columns
from ray.rllib.utils.torch_utils import FLOAT_MIN

from sim.errors import ConfigError
from sim.policies.learned import Network, network_of, pair_values

Batch = dict[str, Any]


def _features_space(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> gym.spaces.Box:
    assert isinstance(observation_space, gym.spaces.Box)
    assert isinstance(action_space, gym.spaces.Discrete)
    features = observation_space.shape[0] - int(action_space.n)
    return gym.spaces.Box(observation_space.low[:features], observation_space.high[:features], dtype=np.float32)


class _ReadsFeatures:
    """Builds networks that read the features alone; the module itself still takes full observations."""

    def __init__(self, *args: Any, observation_space: Any = None, action_space: Any = None, **kwargs: Any) -> None:
        self._features = _features_space(observation_space, action_space).shape[0]
        super().__init__(
            *args,
            observation_space=_features_space(observation_space, action_space),  # type: ignore[call-arg]
            action_space=action_space,
            **kwargs,
        )
        self.observation_space = observation_space

    def _split(self, batch: Batch) -> tuple[Batch, torch.Tensor]:
        """Return the batch with only the features, and which actions are illegal, bool[..., actions]."""
        observations = batch[Columns.OBS]
        features = self._features
        return {**batch, Columns.OBS: observations[..., :features]}, observations[..., features:] < 0.5


class MaskedDQN(_ReadsFeatures, DefaultDQNTorchRLModule):
    """For DQN: Q-values are minus infinity for illegal actions; epsilon-greedy exploration skips these too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def _qf_forward_helper(self, batch: Batch, encoder: Any, head: Any) -> Batch:
        batch, illegal = self._split(batch)
        out: Batch = super()._qf_forward_helper(batch, encoder, head)
        out["qf_preds"] = out["qf_preds"].masked_fill(illegal, -torch.inf)
        return out


def _first_entries(count: int, encoder: Any, arguments: tuple[Batch]) -> tuple[Batch]:
    """Return the arguments of an encoder with only the first entries of each observation."""
    (batch,) = arguments
    return ({**batch, Columns.OBS: batch[Columns.OBS][..., :count]},)


class _MaskedActorCritic(_ReadsFeatures):
    """Action logits are the lowest float for illegal actions.

    With ``heads`` (n, m) in ``model_config``, an action is a pair: the actor has n + m outputs, and the logit of action
    i * m + j is the sum of outputs i and n + j. The flags are those of pairs, so both heads are masked.

    With ``foreseen`` in ``model_config``, the critic alone reads that many entries, the last before the flags
    (``agents.envs.serve_foresight``).
    """

    def setup(self) -> None:
        """Build the networks."""
        super().setup()  # type: ignore[misc]
        self.heads: tuple[int, int] | None = self.model_config.get("heads")  # type: ignore[attr-defined]
        if self.heads is not None:
            catalog = self.catalog  # type: ignore[attr-defined]
            catalog.pi_head_config.output_layer_dim = sum(self.heads)
            self.pi = catalog.pi_head_config.build(framework="torch")
        foreseen = int(self.model_config.get("foreseen", 0))  # type: ignore[attr-defined]
        if foreseen:
            seen = self._features - foreseen
            config = self.catalog._encoder_config  # type: ignore[attr-defined]
            self.encoder.actor_encoder = replace(config, input_dims=[seen]).build(framework="torch")  # type: ignore[attr-defined]
            self.encoder.actor_encoder.register_forward_pre_hook(partial(_first_entries, seen))  # type: ignore[attr-defined]

    def _masked(self, out: Batch, illegal: torch.Tensor) -> Batch:
        logits = out[Columns.ACTION_DIST_INPUTS]
        if self.heads is not None:
            logits = pair_values(logits, self.heads)
        out[Columns.ACTION_DIST_INPUTS] = logits.masked_fill(illegal, FLOAT_MIN)
        return out

    def _forward(self, batch: Batch, **kwargs: Any) -> Batch:
        batch, illegal = self._split(batch)
        return self._masked(super()._forward(batch, **kwargs), illegal)  # type: ignore[misc]

    def _forward_train(self, batch: Batch, **kwargs: Any) -> Batch:
        batch, illegal = self._split(batch)
        return self._masked(super()._forward_train(batch, **kwargs), illegal)  # type: ignore[misc]

    def compute_values(self, batch: Batch, embeddings: Any = None) -> Any:
        """Return the critic's value of each observation, in units of reward."""
        return super().compute_values(self._split(batch)[0], embeddings)  # type: ignore[misc]


class MaskedPPO(_MaskedActorCritic, DefaultPPOTorchRLModule):
    """For PPO and MARWIL."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def actor_layers(state: Mapping[str, Any]) -> list[str]:
    """Return the names of the layers from features to actions, in order; ``state`` is a module's state."""
    encoder = "encoder.actor_encoder.net.mlp." if any(k.startswith("encoder.actor_") for k in state) else None
    if encoder is None:
        encoder = "encoder.encoder.net.mlp." if any(k.startswith("encoder.encoder.") for k in state) else None
    found = []
    for prefix in (encoder or "encoder.net.mlp.", "pi.net.mlp." if "pi.net.mlp.0.weight" in state else "af.net.mlp."):
        numbers = sorted(int(k[len(prefix) :].split(".")[0]) for k in state if k.startswith(prefix) and "weight" in k)
        found += [f"{prefix}{number}" for number in numbers]
    return found


def network_of_module(state: Mapping[str, Any], activation: str, heads: tuple[int, int] | None = None) -> Network:
    """Return the network that chooses actions, from the state of one of these modules; ``heads`` as in ``Network``.

    Raises:
        ConfigError: if the state is not a plain multilayer perceptron (dueling or distributional heads).
    """
    layers = []
    for prefix in actor_layers(state):
        weight, bias = (np.asarray(state[f"{prefix}.{part}"], dtype=np.float32) for part in ("weight", "bias"))
        layers.append((weight.copy(), bias.copy()))
    if not layers or any(k.startswith("vf.") and "af.net.mlp.0.weight" in state for k in state):
        raise ConfigError("only plain multilayer perceptrons can be exported; train without a dueling head")
    return network_of(layers, activation, heads)


def learner_module(algorithm: Any) -> Any:
    """Return the module that an algorithm trains."""
    module = algorithm.learner_group._learner.module["default_policy"]
    return module.unwrapped() if hasattr(module, "unwrapped") else module


def actor_logits(module: Any, observations: torch.Tensor) -> torch.Tensor:
    """Return the masked action logits (for DQN: Q-values), [n, actions]; observations are [n, entries]."""
    batch: Batch = {Columns.OBS: observations}
    if isinstance(module, MaskedDQN):
        values: Any = module.compute_q_values(batch)["qf_preds"]
    else:
        values = module._forward(batch)[Columns.ACTION_DIST_INPUTS]
    assert isinstance(values, torch.Tensor)
    return values
