"""PruneToBudget: rules, observation, seeds and splits; the vector environment plays the same episodes as the plain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.envs.prune import PruneToBudget
from agents.envs.prune_loads import PruneLoad, prune_loads
from agents.envs.prune_vector import PruneToBudgetVector
from agents.envs.surrogate import mask_losses, quality_on
from sim.cost.memory import peak_bytes
from sim.cost.plan import dense_plan, drop, keep_all, with_mask
from sim.cost.quality import FORMS
from sim.errors import ConfigError
from sim.policies.observation.prune import mask_of
from tests.agents.helpers import check_environment

ONE = PruneLoad(batch=8, sequence_tokens=2048, budget_share=0.8)


def test_both_environments_are_registered_and_pass_the_check_of_gymnasium() -> None:
    check_environment("PruneToBudget-v0", 3)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"scores": True, "hide": ("kept", "kv_share")},
        {"sequence": 3, "reward": {"kind": "utility", "shaping": False}},
        {"restore": True, "sequence": 2, "reward": {"kind": "utility"}},
        {"restore": True, "form": "warped_neighbours"},
    ],
)
def test_the_vector_environment_equals_the_plain_one_at_every_step(kwargs: dict[str, Any]) -> None:
    envs = [PruneToBudget(**kwargs) for _ in range(4)]
    vector = PruneToBudgetVector(4, **kwargs)
    rng = np.random.default_rng(7)
    plain = np.stack([env.reset(seed=50 + i)[0] for i, env in enumerate(envs)])
    fast, _ = vector.reset(seed=50)
    over = [False] * 4
    ends = 0
    for _ in range(500):  # more than the step limit of an episode
        np.testing.assert_array_equal(fast, plain)
        legal = plain[:, vector.setting.table.features :]
        # One action in ten is random among all, so some are illegal.
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


def test_equal_seeds_give_equal_episodes_and_other_seeds_others() -> None:
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


def test_blocks_stay_dropped_over_a_sequence_and_loads_that_fit_need_no_action() -> None:
    env = PruneToBudget(sequence=3)
    env.reset(options={"loads": [ONE, replace(ONE, budget_share=0.95), replace(ONE, budget_share=0.5)]})
    ended, mask_at_50 = False, None
    while not ended:
        _, _, ended, _, _ = env.step(int(env.legal().argmax()))
        if env.load.budget_share == 0.5 and mask_at_50 is None:
            mask_at_50 = env.mask
    assert mask_at_50 is not None
    assert mask_at_50 != keep_all(env.setting.model)
    assert mask_at_50.contains(env.mask)


def test_a_restored_block_runs_again_and_accepting_is_legal_only_if_the_plan_fits() -> None:
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


def test_a_budget_that_needs_no_pruning_is_an_error() -> None:
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


def test_training_and_validation_never_sample_a_test_load() -> None:
    split = prune_loads()
    rng = np.random.default_rng(0)
    held_out = {(load.batch, load.sequence_tokens) for load in split.test}
    assert len(split.test) == 50
    assert len(held_out) == 10
    sampled = [split.sample(rng, "train") for _ in range(20_000)]
    trained = {(load.batch, load.sequence_tokens) for load in sampled}
    validated = {(load.batch, load.sequence_tokens) for load in split.validation}
    assert not trained & held_out
    assert not trained & validated
    assert not validated & held_out
    # The training ranges contain every test load: without the exclusion some would be sampled.
    assert all(split.batch[0] <= b <= split.batch[1] for b, _ in held_out)
    assert all(split.sequence_tokens[0] <= s <= split.sequence_tokens[1] for _, s in held_out)


def test_the_training_split_skips_a_held_out_pair() -> None:
    # The range contains only two pairs, and one of them is a test pair: only the other is sampled.
    split = replace(prune_loads(), batch=(8, 8), sequence_tokens=(1023, 1024), validation=())
    rng = np.random.default_rng(0)
    assert {split.sample(rng, "train").sequence_tokens for _ in range(50)} == {1023}


@pytest.mark.parametrize("form", FORMS)
def test_the_losses_of_many_masks_equal_those_of_the_quality_model_one_by_one(form: str) -> None:
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


def test_render_returns_an_image_that_changes_and_save_render_writes_it(tmp_path: Path) -> None:
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
