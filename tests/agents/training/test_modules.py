"""RLlib modules: they never choose an illegal action, and the exported network acts like the module."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.utils.torch_utils import FLOAT_MIN

from agents.envs.prune import PruneToBudget
from agents.envs.prune_vector import PruneToBudgetVector
from agents.training.algorithms import Setup, ppo
from agents.training.modules import MaskedDQN, MaskedPPO, network_of_module
from sim.errors import ConfigError

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


def build_module(kind: type, **changed: Any) -> Any:
    env = PruneToBudget()
    torch.manual_seed(0)
    return RLModuleSpec(
        module_class=kind,
        observation_space=env.observation_space,
        action_space=env.action_space,
        model_config={**MODEL, **changed},
    ).build()


def setup_of(env: str) -> Setup:
    """Settings of an algorithm for one environment."""
    name = f"agents.envs.registration:{env}"
    return Setup(env=name, env_kwargs={}, seed=0, num_envs=1, runners=0, hidden=(84, 84), activation="relu")


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


LOWEST = np.float32(FLOAT_MIN)


def split(observed: np.ndarray[Any, np.dtype[np.float32]]) -> tuple[Any, Any]:
    """The features of observations, and which actions are legal."""
    return observed[:, :-60], observed[:, -60:] > 0.5


@pytest.mark.parametrize("call", ["forward_inference", "forward_exploration", "forward_train"])
def test_every_forward_pass_of_ppo_masks_the_logits_of_illegal_actions(call: str) -> None:
    module = build_module(MaskedPPO)
    observed = observations(500)
    features, legal = split(observed)
    with torch.no_grad():
        logits = getattr(module, call)({Columns.OBS: torch.from_numpy(observed)})[Columns.ACTION_DIST_INPUTS].numpy()
    assert (~legal).any(axis=1).mean() > 0.5
    np.testing.assert_array_equal(logits[~legal], LOWEST)
    np.testing.assert_allclose(logits[legal], network_of_module(module.get_state(), "relu")(features)[legal], rtol=1e-4)


def test_the_values_and_the_targets_of_dqn_are_masked() -> None:
    for double_q in (False, True):
        module = build_module(MaskedDQN, double_q=double_q)
        module.make_target_networks()
        now, later = observations(600)[:300], observations(600)[300:]
        batch = {Columns.OBS: torch.from_numpy(now), Columns.NEXT_OBS: torch.from_numpy(later)}
        with torch.no_grad():
            out = module.forward_train(batch)
        rows = [("qf_preds", now), ("qf_target_next_preds", later)] + [("qf_next_preds", later)] * double_q
        for name, observed in rows:
            features, legal = split(observed)
            values = out[name].numpy()
            np.testing.assert_array_equal(values[~legal], -np.inf)
            np.testing.assert_allclose(
                values[legal], network_of_module(module.get_state(), "relu")(features)[legal], rtol=1e-4, atol=1e-6
            )


def hand_loss(module: Any, batch: dict[str, Any], clip: float, entropy_share: float) -> float:
    """PPO's loss with a softmax over the legal actions alone, in NumPy."""
    features, legal = split(batch[Columns.OBS])
    logits = np.where(legal, network_of_module(module.get_state(), "relu")(features), -np.inf).astype(np.float64)
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    rows = np.arange(len(log_p))
    ratio = np.exp(log_p[rows, batch[Columns.ACTIONS]] - batch[Columns.ACTION_LOGP])
    gain = batch[Postprocessing.ADVANTAGES]
    surrogate = np.minimum(gain * ratio, gain * np.clip(ratio, 1 - clip, 1 + clip))
    entropy = -np.where(legal, np.exp(log_p) * np.where(legal, log_p, 0.0), 0.0).sum(axis=1)
    with torch.no_grad():
        values = module.compute_values({Columns.OBS: torch.from_numpy(batch[Columns.OBS])}).numpy()
    critic = (values - batch[Postprocessing.VALUE_TARGETS]) ** 2
    return float((-surrogate + critic - entropy_share * entropy).mean())


def test_the_loss_of_ppo_is_that_of_a_softmax_over_the_legal_actions() -> None:
    setup = setup_of("PruneToBudget-v0")
    config = ppo(
        setup,
        lr=1e-3,
        discount=1.0,
        gae_lambda=0.9,
        steps_an_iteration=64,
        minibatch=64,
        epochs=1,
        clip=0.2,
        entropy=0.05,
    )
    env = PruneToBudget()
    learner = config.build_learner(spaces={"default_policy": (env.observation_space, env.action_space)})
    learner.build()
    module = learner.module["default_policy"].unwrapped()
    rng, observed = np.random.default_rng(0), observations(256)
    _, legal = split(observed)
    batch = {
        Columns.OBS: observed,
        Columns.ACTIONS: (rng.random(legal.shape) * legal).argmax(axis=1),
        Columns.ACTION_LOGP: -np.log(legal.sum(axis=1)).astype(np.float32) + rng.normal(size=256).astype(np.float32),
        Columns.ACTION_DIST_INPUTS: np.where(legal, 0.0, LOWEST).astype(np.float32),
        Postprocessing.ADVANTAGES: rng.normal(size=256).astype(np.float32),
        Postprocessing.VALUE_TARGETS: rng.normal(size=256).astype(np.float32),
    }
    tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
    loss = learner.compute_loss_for_module(
        module_id="default_policy", config=config, batch=tensors, fwd_out=module.forward_train(tensors)
    )
    assert float(loss.detach()) == pytest.approx(hand_loss(module, batch, 0.2, 0.05), rel=1e-4)


def test_two_heads_have_the_same_values_in_rllib_and_in_numpy() -> None:
    features, flags = 7, 12
    space = gym.spaces.Box(-4.0, 4.0, (features + flags,), np.float32)
    torch.manual_seed(0)
    module = RLModuleSpec(
        module_class=MaskedPPO,
        observation_space=space,
        action_space=gym.spaces.Discrete(flags),
        model_config={**MODEL, "heads": (4, 3)},
    ).build()
    network = network_of_module(module.get_state(), "relu", module.heads)
    assert (network.actions, network.weights[-1].shape[0]) == (12, 7)
    rng = np.random.default_rng(0)
    observed = rng.normal(size=(400, features + flags)).astype(np.float32)
    # A pair is legal when both its parts are.
    legal = (rng.random((400, 4)) < 0.7)[:, :, None] & (rng.random((400, 3)) < 0.7)[:, None, :]
    observed[:, features:] = legal = legal.reshape(400, 12)
    for call in (module.forward_inference, module.forward_train):
        with torch.no_grad():
            logits = call({Columns.OBS: torch.from_numpy(observed)})[Columns.ACTION_DIST_INPUTS].numpy()
        np.testing.assert_array_equal(logits[~legal], LOWEST)
        np.testing.assert_allclose(logits[legal], network(observed[:, :features])[legal], rtol=1e-4, atol=1e-5)


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


def test_the_critic_alone_reads_what_comes() -> None:
    foreseen, actions = 27, 60
    plain = PruneToBudget().observation_space
    features = plain.shape[0] - actions
    low, high = (np.insert(bound, [features] * foreseen, value) for bound, value in ((plain.low, 0), (plain.high, 16)))
    torch.manual_seed(0)
    module = RLModuleSpec(
        module_class=MaskedPPO,
        observation_space=gym.spaces.Box(low, high, dtype=np.float32),
        action_space=gym.spaces.Discrete(actions),
        model_config={**MODEL, "foreseen": foreseen},
    ).build()
    network = network_of_module(module.get_state(), "relu")
    assert network.weights[0].shape == (84, features)  # the exported network has no such inputs
    observed = observations(200)
    rng = np.random.default_rng(0)
    two = [
        torch.from_numpy(np.insert(observed, [features] * foreseen, rng.random((200, foreseen)) * 5, axis=1))
        for _ in range(2)
    ]
    with torch.no_grad():
        for call in (module.forward_inference, module.forward_exploration, module.forward_train):
            first, second = (call({Columns.OBS: one})[Columns.ACTION_DIST_INPUTS] for one in two)
            assert torch.equal(first, second)
        values = [module.compute_values({Columns.OBS: one}) for one in two]
    assert not torch.isclose(*values).any()
    chosen = network.act(observed[:, :features], observed[:, features:] > 0.5)
    np.testing.assert_array_equal(first.argmax(dim=-1).numpy(), chosen)


def test_only_ppo_of_one_server_has_foresight() -> None:
    numbers: dict[str, Any] = {"lr": 1e-3, "discount": 1.0, "gae_lambda": 0.9, "steps_an_iteration": 64}
    numbers |= {"minibatch": 32, "epochs": 1, "clip": 0.2, "entropy": 0.0}
    with pytest.raises(ConfigError, match=r"algorithm.foresight is for env=serve_trace and env=serve_many alone"):
        ppo(setup_of("ServeCluster-v0"), **numbers, foresight=True)
    config = ppo(setup_of("ServeTrace-v0"), **numbers, foresight=True)
    assert config.env_config == {"foresight": True}
