"""PruneToBudget: its rules, its observation, its seeds, and that the vector environment is the plain one, faster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from agents.envs.prune import PruneToBudget, PruneToBudgetVector
from agents.envs.prune_loads import PruneLoad, prune_loads
from agents.envs.surrogate import mask_losses, quality_on
from sim.cost.memory import peak_bytes
from sim.cost.plan import dense_plan, drop, keep_all, with_mask
from sim.cost.quality import FORMS
from sim.errors import ConfigError
from sim.policies.observation.prune import mask_of

ONE = PruneLoad(batch=8, sequence_tokens=2048, budget_share=0.8)


def test_both_environments_are_registered_and_pass_gymnasiums_check() -> None:
    check_env(gym.make("agents.envs.registration:PruneToBudget-v0", render_mode="rgb_array").unwrapped)
    vector = gym.make_vec("PruneToBudget-v0", num_envs=3, vectorization_mode="vector_entry_point")
    observations, _ = vector.reset(seed=1)
    assert vector.observation_space.contains(observations)


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"scores": True, "hide": ("kept", "kv_share")},
        {"sequence": 3, "reward": {"kind": "utility", "shaping": False}},
        {"restore": True, "sequence": 2, "reward": {"kind": "utility"}},
        {"restore": True, "form": "warped_neighbours"},
    ],
)
def test_the_vector_environment_plays_the_plain_one_step_by_step(words: dict[str, Any]) -> None:
    envs = [PruneToBudget(**kwargs) for _ in range(4)]
    vector = PruneToBudgetVector(4, **kwargs)
    rng = np.random.default_rng(7)
    plain = np.stack([env.reset(seed=50 + i)[0] for i, env in enumerate(envs)])
    fast, _ = vector.reset(seed=50)
    over = [False] * 4
    ends = 0
    for _ in range(500):  # beyond the step limit of an episode
        np.testing.assert_array_equal(fast, plain)
        legal = plain[:, vector.setting.table.features :]
        # One action in ten is drawn from all, so that illegal ones are among them.
        actions = np.where(
            rng.random(4) < 0.9, (rng.random(legal.shape) * legal).argmax(1), rng.integers(legal.shape[1])
        )
        fast, reward, terminated, truncated, _ = vector.step(actions)
        rows = []
        for i, env in enumerate(envs):
            if over[i]:
                rows.append(env.reset()[0])
                over[i] = False
                assert not terminated[i]
                assert reward[i] == 0.0
                continue
            observation, plain_reward, end, cut, info = env.step(actions[i])
            rows.append(observation)
            assert (end, cut) == (terminated[i], truncated[i])
            assert plain_reward == pytest.approx(reward[i], abs=1e-9)
            if end or cut:
                ends += 1
                assert info["utility"] == pytest.approx(vector.utility[i], abs=1e-9)
                over[i] = True
        plain = np.stack(rows)
    assert ends >= 3


def test_the_same_seed_draws_the_same_episode_and_another_seed_another() -> None:
    env = PruneToBudget()
    first, again, other = (env.reset(seed=seed)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_an_episode_ends_with_the_first_plan_that_fits() -> None:
    env = PruneToBudget()
    env.reset(options={"loads": [ONE]})
    model, budget_bytes = env.setting.model, ONE.budget_bytes(env.setting.model)
    ended, action = False, 0
    while not ended:
        assert peak_bytes(model, env.mask, 8, 2048) > budget_bytes
        _, _, ended, _, info = env.step(action)
        action += 1
    assert peak_bytes(model, env.mask, 8, 2048) <= budget_bytes
    loss = env.setting.quality.loss(with_mask(dense_plan(model), env.mask))
    assert info["utility"] == pytest.approx(np.exp(-loss))


def test_what_was_dropped_stays_dropped_over_a_sequence_and_loads_that_fit_are_settled_without_an_action() -> None:
    env = PruneToBudget(sequence=3)
    env.reset(options={"loads": [ONE, replace(ONE, budget_share=0.95), replace(ONE, budget_share=0.5)]})
    steps, ended, at_80 = 0, False, None
    while not ended:
        _, _, ended, _, _ = env.step(int(env.legal().argmax()))
        steps += 1
        if env.draw.budget_share == 0.5 and at_80 is None:
            at_80 = env.mask
    assert at_80 is not None
    assert at_80 != keep_all(env.setting.model)
    assert at_80.contains(env.mask)


def test_a_restored_block_runs_again_and_accepting_is_legal_only_once_the_plan_fits() -> None:
    env = PruneToBudget(restore=True)
    env.reset(options={"loads": [ONE]})
    accept = env.setting.accept
    env.step(4)
    assert env.mask == drop(env.setting.model, mha=[2])
    assert not env.legal()[accept]
    _, _, ended, _, info = env.step(accept)
    assert (ended, info["illegal_actions"]) == (False, 1)
    env.step(accept + 1 + 4)
    assert env.mask == keep_all(env.setting.model)
    for block in range(env.setting.blocks):
        if not env.fits:
            env.step(block)
    *_, ended, _, info = env.step(accept)
    assert ended
    assert info["utility"] > 0


def test_an_illegal_action_changes_nothing_and_is_counted() -> None:
    env = PruneToBudget()
    first, _ = env.reset(options={"loads": [ONE]})
    env.step(0)
    mask = env.mask
    _, reward, _, _, info = env.step(0)
    assert (env.mask, reward, info["illegal_actions"]) == (mask, 0.0, 1)
    assert first[-env.setting.blocks :].all()


def test_a_budget_that_needs_no_pruning_is_refused() -> None:
    with pytest.raises(ConfigError, match="below 1"):
        PruneToBudget().reset(options={"loads": [replace(ONE, budget_share=1.0)]})


def test_the_table_names_every_entry_and_is_in_info() -> None:
    env = PruneToBudget(scores=True, restore=True)
    observation, info = env.reset(seed=0)
    rows = info["observation_table"]
    assert len(rows) == len(observation) == env.observation_space.shape[0]
    assert len({row["name"] for row in rows}) == len(rows)
    assert all(row["low"] <= value <= row["high"] for row, value in zip(rows, observation, strict=True))
    named = {row["name"]: value for row, value in zip(rows, observation, strict=True)}
    assert named["budget_share"] == pytest.approx(info["budget_share"], abs=1e-6)
    assert named["peak_share"] == 1.0
    assert named["missing_share"] == pytest.approx(1 - info["budget_share"], abs=1e-6)
    assert named["legal.accept"] == 0.0


def test_training_and_validation_never_draw_a_test_load() -> None:
    draws = prune_loads()
    rng = np.random.default_rng(0)
    held_out = {(d.batch, d.sequence_tokens) for d in draws.test}
    assert len(draws.test) == 50
    assert len(held_out) == 10
    trained = {(d.batch, d.sequence_tokens) for d in (draws.sample(rng, "train") for _ in range(20_000))}
    validated = {(d.batch, d.sequence_tokens) for d in draws.validation}
    assert not trained & held_out
    assert not trained & validated
    assert not validated & held_out
    # The range itself holds every test load: without the exclusion some would be drawn.
    assert all(draws.batch[0] <= b <= draws.batch[1] for b, _ in held_out)
    assert all(draws.sequence_tokens[0] <= s <= draws.sequence_tokens[1] for _, s in held_out)


def test_the_training_split_refuses_a_held_out_pair_when_it_comes_up() -> None:
    # A range that holds nothing but two pairs, one of them a test pair: only the other is ever drawn.
    draws = replace(prune_loads(), batch=(8, 8), sequence_tokens=(1023, 1024), validation=())
    rng = np.random.default_rng(0)
    assert {draws.sample(rng, "train").sequence_tokens for _ in range(50)} == {1023}


@pytest.mark.parametrize("form", FORMS)
def test_losses_of_many_masks_equal_the_quality_model_one_by_one(form: str) -> None:
    quality = quality_on("smollm2_135m", "calibration", form)
    removed = np.random.default_rng(1).random((20, 60)) < np.linspace(0.0, 1.0, 20)[:, None]
    dense = dense_plan(PruneToBudget().setting.model)
    expected = [quality.loss(with_mask(dense, mask_of(row))) for row in removed]
    np.testing.assert_allclose(mask_losses(quality, removed), expected, rtol=1e-9, atol=1e-12)


def test_decisions_and_reports_use_the_losses_on_different_texts() -> None:
    calibration, test = quality_on("smollm2_135m", "calibration"), quality_on("smollm2_135m", "test")
    assert np.corrcoef(calibration.blocks, test.blocks)[0, 1] > 0.9
    assert not np.allclose(calibration.blocks, test.blocks)
    assert calibration.dense_nll != test.dense_nll


def test_render_shows_the_episode_and_writes_its_picture(tmp_path: Path) -> None:
    env = PruneToBudget(render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    env.step(3)
    after = env.render()
    assert before is not None
    assert after is not None
    assert before.shape == after.shape
    assert (before != after).any()
    env.save_render(tmp_path / "episode.png")
    assert (tmp_path / "episode.png").read_bytes().startswith(b"\x89PNG")
