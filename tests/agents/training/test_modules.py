"""RLlib's modules: no illegal action ever, and the exported network acts as they do on ten thousand observations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from agents.envs.prune import PruneToBudget, PruneToBudgetVector
from agents.training.modules import MaskedDQN, MaskedPPO, network_of_module

torch.set_num_threads(1)
MODEL = {
    "fcnet_hiddens": [84, 84],
    "fcnet_activation": "relu",
    "head_fcnet_hiddens": [],
    "vf_share_layers": False,
    "double_q": False,
    "dueling": False,
    "num_atoms": 1,
    "v_min": -1.0,
    "v_max": 1.0,
    "std_init": 0.1,
    "sigma0": 0.1,
    "epsilon": [(0, 1.0)],
}


def built(kind: type) -> Any:
    env = PruneToBudget()
    torch.manual_seed(0)
    return RLModuleSpec(
        module_class=kind,
        observation_space=env.observation_space,
        action_space=env.action_space,
        model_config=MODEL,
    ).build()


def observations(count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Observations of real episodes under random legal actions."""
    vector = PruneToBudgetVector(100)
    seen, _ = vector.reset(seed=0)
    rng = np.random.default_rng(0)
    found = []
    while sum(map(len, found)) < count:
        found.append(seen)
        legal = seen[:, vector.setting.table.features :]
        seen, *_ = vector.step((rng.random(legal.shape) * legal).argmax(axis=1))
    return np.concatenate(found)[:count]


@pytest.mark.parametrize("kind", [MaskedDQN, MaskedPPO])
def test_the_exported_network_acts_as_the_module_on_ten_thousand_observations(kind: type) -> None:
    module = built(kind)
    network = network_of_module(module.get_state(), "relu")
    assert network.parameters == 18_288  # about 18,000, as RAP's reviewers state
    seen = observations(10_000)
    with torch.no_grad():
        out = module.forward_inference({Columns.OBS: torch.from_numpy(seen)})
    if kind is MaskedDQN:
        actions = out[Columns.ACTIONS].numpy()
    else:
        actions = out[Columns.ACTION_DIST_INPUTS].argmax(dim=-1).numpy()
    features = seen.shape[1] - 60
    np.testing.assert_array_equal(network.act(seen[:, :features], seen[:, features:] > 0.5), actions)
    assert len(set(actions.tolist())) > 5


@pytest.mark.parametrize("kind", [MaskedDQN, MaskedPPO])
def test_exploring_never_draws_an_illegal_action(kind: type) -> None:
    module = built(kind)
    seen = observations(3_000)
    with torch.no_grad():
        if kind is MaskedDQN:
            out = module.forward_exploration({Columns.OBS: torch.from_numpy(seen)}, t=0)
            actions = out[Columns.ACTIONS]
        else:
            out = module.forward_exploration({Columns.OBS: torch.from_numpy(seen)})
            actions = torch.distributions.Categorical(logits=out[Columns.ACTION_DIST_INPUTS]).sample()
    legal = seen[:, -60:]
    assert legal[np.arange(len(seen)), actions.numpy()].all()
    assert (legal.mean(axis=1) < 0.9).any()


def test_the_flags_of_legal_actions_do_not_reach_the_network() -> None:
    module = built(MaskedPPO)
    assert module.get_state()["encoder.actor_encoder.net.mlp.0.weight"].shape == (84, 71)
