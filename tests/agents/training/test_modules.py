"""RLlib modules: they never choose an illegal action, and the exported network acts like the module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.torch_utils import FLOAT_MIN

from agents.envs.prune import PruneToBudget
from agents.envs.prune_vector import PruneToBudgetVector
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


def build_module(kind: type, **more: Any) -> Any:
    env = PruneToBudget()
    torch.manual_seed(0)
    return RLModuleSpec(
        module_class=kind,
        observation_space=env.observation_space,
        action_space=env.action_space,
        model_config=MODEL | more,
    ).build()


def observations(count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Observations of episodes under random legal actions."""
    vector = PruneToBudgetVector(100)
    observed, _ = vector.reset(seed=0)
    rng = np.random.default_rng(0)
    rows = []
    while sum(map(len, rows)) < count:
        rows.append(observed)
        legal = observed[:, vector.setting.table.features :]
        observed, *_ = vector.step((rng.random(legal.shape) * legal).argmax(axis=1))
    return np.concatenate(rows)[:count]


@pytest.mark.parametrize("kind", [MaskedDQN, MaskedPPO])
def test_the_exported_network_acts_like_the_module_on_10_000_observations(kind: type) -> None:
    module = build_module(kind)
    network = network_of_module(module.get_state(), "relu")
    assert network.parameters == 18_288  # RAP's reviewers state about 18,000
    observed = observations(10_000)
    with torch.no_grad():
        out = module.forward_inference({Columns.OBS: torch.from_numpy(observed)})
    if kind is MaskedDQN:
        actions = out[Columns.ACTIONS].numpy()
    else:
        actions = out[Columns.ACTION_DIST_INPUTS].argmax(dim=-1).numpy()
    features = observed.shape[1] - 60
    np.testing.assert_array_equal(network.act(observed[:, :features], observed[:, features:] > 0.5), actions)
    assert len(set(actions.tolist())) > 5


@pytest.mark.parametrize("kind", [MaskedDQN, MaskedPPO])
def test_exploration_never_chooses_an_illegal_action(kind: type) -> None:
    module = build_module(kind)
    observed = observations(3_000)
    with torch.no_grad():
        if kind is MaskedDQN:
            out = module.forward_exploration({Columns.OBS: torch.from_numpy(observed)}, t=0)
            actions = out[Columns.ACTIONS]
        else:
            out = module.forward_exploration({Columns.OBS: torch.from_numpy(observed)})
            actions = torch.distributions.Categorical(logits=out[Columns.ACTION_DIST_INPUTS]).sample()
    legal = observed[:, -60:]
    assert legal[np.arange(len(observed)), actions.numpy()].all()
    assert (legal.mean(axis=1) < 0.9).any()


def test_the_flags_of_legal_actions_do_not_reach_the_network() -> None:
    module = build_module(MaskedPPO)
    assert module.get_state()["encoder.actor_encoder.net.mlp.0.weight"].shape == (84, 71)


@pytest.mark.parametrize("heads", [(6, 10), (20, 3)])
def test_two_heads_give_pairs_the_sum_of_their_outputs_and_are_both_masked(heads: tuple[int, int]) -> None:
    module = build_module(MaskedPPO, heads=heads)
    observed = observations(500)
    flags = observed[:, -60:] > 0.5
    network = network_of_module(module.get_state(), "relu", heads)
    assert network.weights[-1].shape[0] == sum(heads)
    values = network(observed[:, :-60])
    first, second = heads
    pair = np.random.default_rng(0).integers(60, size=len(observed))
    outputs = network_of_module(module.get_state(), "relu")(observed[:, :-60])
    rows = np.arange(len(observed))
    np.testing.assert_allclose(
        values[rows, pair], outputs[rows, pair // second] + outputs[rows, first + pair % second], rtol=1e-5, atol=1e-6
    )
    for forward in (module.forward_inference, module.forward_exploration, module.forward_train):
        logits = forward({Columns.OBS: torch.from_numpy(observed)})[Columns.ACTION_DIST_INPUTS].detach().numpy()
        np.testing.assert_allclose(logits[flags], values[flags], rtol=1e-4, atol=1e-5)
        assert (logits[~flags] == FLOAT_MIN).all()
    assert not flags.all()
