"""Masks of legal actions, actions and options that do not fit, and a reset of some environments only."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import VectorEnv

import agents  # noqa: F401 - registers the environments
from sim.errors import ConfigError
from tests.agents.helpers import run_python

SMALL: dict[str, dict[str, Any]] = {
    "PruneToBudget-v0": {},
    "ServeTrace-v0": {},
    "ServeCluster-v0": {"replicas": 2, "sources": ["burst"]},
    "ServeRoles-v0": {"replicas": 3, "prefill": 1, "traffic": [{"gamma_code": 1, "gamma": 1}]},
}
NAMES = list(SMALL)
WRONG_ACTIONS = [-1, 10_000, 2.0, math.nan, "1", None, [1, 2, 3], True, np.float32(1.0), 2**70]


def plain(name: str) -> Any:
    return gym.make(name, **SMALL[name])


def vector(name: str, rows: int = 4) -> Any:
    return gym.make_vec(name, num_envs=rows, vectorization_mode="vector_entry_point", **SMALL[name])


def flags(env: Any, info: dict[str, Any]) -> Any:
    """The legal actions that an info flags, as ``action_masks`` returns them."""
    return np.concatenate([np.ravel(info["action_mask"])]) == 1


@pytest.mark.parametrize("name", NAMES)
def test_import_agents_alone_registers_the_environment(name: str) -> None:
    assert gym.spec(name).entry_point is not None


def test_registering_loads_no_environment() -> None:
    code = "import sys, agents, gymnasium; gymnasium.spec('ServeTrace-v0'); print('agents.envs.serve' in sys.modules)"
    assert run_python("-c", code).stdout.strip() == "False"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_gymnasiums_own_checks_pass(name: str) -> None:
    check_env(gym.make(name, render_mode="rgb_array", **SMALL[name]).unwrapped)


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_of_an_info_is_the_legal_flags_of_the_observation_and_action_masks(name: str) -> None:
    env = plain(name)
    observation, info = env.reset(seed=3)
    for _ in range(4):
        masks = env.get_wrapper_attr("action_masks")()
        assert masks.dtype == np.bool_
        assert masks.shape == (int(np.sum(env.get_wrapper_attr("action_space").nvec)),) if name[5] == "C" else True
        np.testing.assert_array_equal(np.ravel(info["action_mask"]), masks)
        rows = np.atleast_2d(observation)
        np.testing.assert_array_equal(np.ravel(rows[:, -masks.size // len(rows) :]) > 0.5, masks)
        action = env.action_space.sample(mask=info["action_mask"])
        assert masks.any()
        observation, _, over, _, info = env.step(action)
        assert info["illegal_actions"] == 0
        if over:
            break


@pytest.mark.parametrize("mode", ["sync", "vector_entry_point"])
@pytest.mark.parametrize("name", ["PruneToBudget-v0", "ServeTrace-v0", "ServeRoles-v0"])
def test_both_vector_forms_flag_the_legal_actions_of_every_environment(name: str, mode: str) -> None:
    envs = gym.make_vec(name, num_envs=3, vectorization_mode=mode, **SMALL[name])
    observations, infos = envs.reset(seed=1)
    for _ in range(3):
        masks = np.stack(envs.call("action_masks"))
        np.testing.assert_array_equal(infos["action_mask"], masks)
        np.testing.assert_array_equal(observations[:, -masks.shape[1] :] > 0.5, masks)
        assert infos["_action_mask"].all()
        observations, _, _, _, infos = envs.step(masks.argmax(axis=1))


def test_the_vector_environments_flag_the_actions_of_every_row() -> None:
    for name in NAMES:
        envs = vector(name)
        _, infos = envs.reset(seed=1)
        assert np.stack(envs.env_method("action_masks")).shape == envs.action_masks().shape
        np.testing.assert_array_equal(infos["action_mask"], envs.action_masks())


@pytest.mark.parametrize("action", WRONG_ACTIONS)
@pytest.mark.parametrize("name", ["PruneToBudget-v0", "ServeTrace-v0", "ServeRoles-v0"])
def test_an_action_outside_the_space_is_refused(name: str, action: Any) -> None:
    env = plain(name).unwrapped
    env.reset(seed=0)
    with pytest.raises(ConfigError, match=r"action is .*; it must be"):
        env.step(action)
    envs = vector(name)
    envs.reset(seed=0)
    with pytest.raises(ConfigError, match="action"):
        envs.step([action] * 4)


def test_an_action_outside_the_space_of_one_replica_is_refused_and_names_it() -> None:
    env, envs = plain("ServeCluster-v0").unwrapped, vector("ServeCluster-v0")
    env.reset(seed=0)
    envs.reset(seed=0)
    for actions in ([0, -1], [0, 24], [0.0, 1.0], [0], [[0, 0]], [True, False], None):
        with pytest.raises(ConfigError, match="action"):
            env.step(actions)
        with pytest.raises(ConfigError, match="action"):
            envs.step(actions)
    with pytest.raises(ConfigError, match="action of row 1 is -1"):
        env.step(np.array([0, -1]))


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_number_of_any_type_is_an_action(name: str) -> None:
    env = plain(name).unwrapped
    rewards = []
    for kind in (int, np.int32, np.uint8, np.int64):
        env.reset(seed=0)
        action = np.array([kind(1)] * 2) if name == "ServeCluster-v0" else kind(1)
        rewards.append(env.step(action)[1])
    assert len(set(rewards)) == 1


def reset_some(envs: VectorEnv[Any, Any, Any], steps: int) -> tuple[Any, Any, Any]:
    """Play some steps, reset the first two rows, play on; return the observations around the reset and the masks."""
    observations, _ = envs.reset(seed=5)
    for _ in range(steps):
        observations, *_ = envs.step(envs.action_masks().argmax(axis=1))  # type: ignore[attr-defined]
    where = np.array([True, True, False, False])
    after, _ = envs.reset(options={"reset_mask": where})
    return observations, after, where


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [3, 119])
def test_a_masked_reset_begins_these_environments_again_and_leaves_the_others_alone(name: str, steps: int) -> None:
    envs, untouched = vector(name), vector(name)
    before, after, where = reset_some(envs, steps)
    np.testing.assert_array_equal(before[~where], after[~where])
    assert (before[where] != after[where]).any()
    untouched.reset(seed=5)
    for _ in range(steps):
        untouched.step(untouched.action_masks().argmax(axis=1))
    for _ in range(5):
        actions = np.where(where, envs.action_masks().argmax(axis=1), untouched.action_masks().argmax(axis=1))
        ours, theirs = envs.step(actions), untouched.step(untouched.action_masks().argmax(axis=1))
        for one, other in zip(ours[:4], theirs[:4], strict=True):
            np.testing.assert_array_equal(one[~where], other[~where])


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_reset_seeds_only_the_environments_that_it_resets(name: str) -> None:
    first, second = vector(name), vector(name)
    first.reset(seed=5)
    second.reset(seed=9)
    where = np.array([True, True, False, False])
    one, _ = first.reset(seed=7, options={"reset_mask": where})
    other, _ = second.reset(seed=7, options={"reset_mask": where})
    np.testing.assert_array_equal(one[where], other[where])
    assert (one[~where] != other[~where]).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", [[1, 0, 0, 0], np.zeros(4, np.bool_), np.ones(3, np.bool_), "all", 1])
def test_a_reset_mask_that_does_not_fit_is_refused(name: str, mask: Any) -> None:
    envs = vector(name)
    envs.reset(seed=0)
    with pytest.raises(ConfigError, match="reset_mask"):
        envs.reset(options={"reset_mask": mask})


def test_a_masked_reset_before_the_first_full_one_is_refused() -> None:
    for name in NAMES:
        with pytest.raises(ConfigError, match="never began"):
            vector(name).reset(options={"reset_mask": np.array([True, True, False, False])})


def test_a_mask_that_splits_a_cluster_is_refused() -> None:
    envs = vector("ServeCluster-v0")
    envs.reset(seed=0)
    with pytest.raises(ConfigError, match="some replicas of a cluster"):
        envs.reset(options={"reset_mask": np.array([True, False, False, False])})


WINDOW = {"source": "burst", "start_s": 300.0, "rate": 1.0, "budget": "full", "budget_seed": 1}
LOAD = {"batch": 4, "sequence_tokens": 2048, "budget_share": 0.7}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ServeTrace-v0", {"windw": WINDOW}),
        ("ServeTrace-v0", {"reset_mask": np.array([True])}),
        ("ServeTrace-v0", {"window": {**WINDOW, "source": "no such trace"}}),
        ("ServeTrace-v0", {"window": {**WINDOW, "rate": -1.0}}),
        ("ServeTrace-v0", {"window": {**WINDOW, "start_s": math.nan}}),
        ("ServeTrace-v0", {"window": {**WINDOW, "budget": "none"}}),
        ("ServeTrace-v0", {"window": {**WINDOW, "budget_seed": 1.5}}),
        ("ServeTrace-v0", {"window": {"source": "burst"}}),
        ("ServeTrace-v0", {"window": 3}),
        ("PruneToBudget-v0", {"loads": []}),
        ("PruneToBudget-v0", {"loads": [{**LOAD, "batch": 0}]}),
        ("PruneToBudget-v0", {"loads": [{**LOAD, "batch": 1.5}]}),
        ("PruneToBudget-v0", {"loads": [{**LOAD, "budget_share": math.nan}]}),
        ("PruneToBudget-v0", {"loads": [{"batch": 1}]}),
        ("ServeCluster-v0", {"windows": [WINDOW]}),
        ("ServeCluster-v0", {"windows": 7}),
        ("ServeRoles-v0", {"windows": [WINDOW]}),
        ("ServeRoles-v0", {"windows": 7}),
    ],
)
def test_options_of_reset_that_do_not_fit_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"."):
        plain(name).unwrapped.reset(options=options)


@pytest.mark.parametrize("seed", [-1, [1, 2], [1, 2, 3, 1.5], "7", True])
def test_a_seed_that_does_not_fit_is_refused(seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed is"):
        vector("PruneToBudget-v0").reset(seed=seed)


def test_windows_for_another_number_of_environments_are_refused() -> None:
    with pytest.raises(ConfigError, match="one for each of 4"):
        vector("ServeTrace-v0").reset(options={"windows": [WINDOW]})
    observations, _ = vector("ServeTrace-v0").reset(options={"windows": [WINDOW] * 4})
    assert (observations == observations[0]).all()


@pytest.mark.parametrize("steps", [0, 4, 119, 125])
@pytest.mark.parametrize("name", NAMES)
def test_episodes_that_were_saved_go_on_as_those_that_were_not(name: str, steps: int) -> None:
    unbroken, other = vector(name).unwrapped, vector(name).unwrapped
    unbroken.reset(seed=5)
    for _ in range(steps):
        unbroken.step(unbroken.action_masks().argmax(axis=1))
    other.restore_episodes(unbroken.episodes_state())
    for _ in range(8):
        np.testing.assert_array_equal(unbroken.action_masks(), other.action_masks())
        ours, theirs = (one.step(one.action_masks().argmax(axis=1)) for one in (unbroken, other))
        np.testing.assert_array_equal(ours[0], theirs[0])
        # An engine that meets plans in another order adds equal losses in another order: 1e-33 of a reward.
        np.testing.assert_allclose(ours[1], theirs[1], rtol=0.0, atol=1e-15)
        np.testing.assert_array_equal(ours[2], theirs[2])


def test_serving_episodes_of_which_some_were_reset_alone_are_not_saved() -> None:
    envs = vector("ServeTrace-v0")
    envs.reset(seed=5)
    assert envs.episodes_state() is not None
    envs.reset(options={"reset_mask": np.array([True, False, False, False])})
    assert envs.episodes_state() is None
