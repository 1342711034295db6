"""ServeRoles: both forms play equal episodes, masks are what a system can do, and policies decide alike in a replay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.envs.roles import RolesCore, RolesSetting, ServeRoles
from agents.envs.roles_vector import ServeRolesVector
from agents.envs.serve_windows import Window, serve_windows
from agents.training.validation import serve_systems, validation_systems
from sim.disaggregate.learned_roles import learned_roles
from sim.disaggregate.roles import ByLoad
from sim.errors import ConfigError, RapLabError
from sim.policies.learned import read_learned
from sim.results.metrics import met_slo
from tests.agents.helpers import check_environment, write_roles_policy

KWARGS: dict[str, Any] = {
    "replicas": 4,
    "prefill": 2,
    "traffic": [{"gamma_code": 2, "gamma": 2}],
    "phases": [2, 3],
    "tick_s": 6.0,
    "slo": "ttft_2s_tpot_100ms",
}
FAILING: dict[str, Any] = {**KWARGS, "outages": {"share": 1.0, "mean_up_s": 40.0, "mean_away_s": 10.0, "notice_s": 3.0}}


@pytest.fixture(scope="module")
def setting() -> RolesSetting:
    return RolesSetting(**KWARGS)


def some_windows(setting: RolesSetting, seed: int = 0) -> tuple[Window, ...]:
    return setting.sample(np.random.default_rng(seed))


def play(core: RolesCore, windows: Sequence[Window], seed: int) -> tuple[list[float], list[int]]:
    """Play an episode with random legal actions; return its rewards and actions."""
    rng, over, rewards, actions = np.random.default_rng(seed), False, [], []
    core.begin(windows)
    while not over:
        actions.append(int(rng.choice(np.flatnonzero(core.legal()))))
        reward, over = core.step(actions[-1])
        rewards.append(reward)
    return rewards, actions


def test_both_forms_are_registered_and_pass_the_check_of_gymnasium() -> None:
    check_environment("ServeRoles-v0", 2, **KWARGS)


@pytest.mark.parametrize("kwargs", [KWARGS, {**FAILING, "reward": {"kind": "earned", "late_weight": 1.0}}])
def test_the_vector_rows_equal_the_plain_environments_at_every_step(kwargs: dict[str, Any]) -> None:
    envs, vector = [ServeRoles(**kwargs) for _ in range(2)], ServeRolesVector(2, **kwargs)
    plain = np.stack([env.reset(seed=5 + i)[0] for i, env in enumerate(envs)])
    fast, _ = vector.reset(seed=5)
    rng, ended = np.random.default_rng(1), False
    for _ in range(vector.setting.ticks + 2):
        np.testing.assert_array_equal(fast, plain)
        actions = rng.integers(vector.setting.action_space.n, size=2)  # illegal ones too
        fast, rewards, terminated, _, infos = vector.step(actions)
        if ended:
            plain, ended = np.stack([env.reset()[0] for env in envs]), False
            assert not rewards.any()
            continue
        steps = [env.step(action) for env, action in zip(envs, actions, strict=True)]
        plain = np.stack([step[0] for step in steps])
        assert rewards.tolist() == [step[1] for step in steps]
        if terminated.any():
            ended = True
            assert infos["utility"].tolist() == [step[4]["utility"] for step in steps]


@pytest.mark.parametrize("kwargs", [KWARGS, FAILING])
def test_the_mask_is_what_leaves_each_role_a_replica_and_the_system_takes_it(kwargs: dict[str, Any]) -> None:
    core, refused = RolesCore(RolesSetting(**kwargs)), 0
    for seed in range(3):
        core.begin(some_windows(core.setting, seed))
        rng, over = np.random.default_rng(seed), False
        while not over:
            legal, members = core.legal(), core.system._members.all
            assert legal[core.state.to_prefill - 1]
            action = int(rng.integers(len(legal)))
            there = sum(not member.away for member in members)
            if legal[action]:
                core.system.set_prefill(action + 1)
                present = {member.role for member in members if not member.away}
                assert len(present) == 2 or there < 2 or action + 1 == core.state.to_prefill
            refused += int((~legal).sum())
            core.step(action)
            assert legal[action] or core.state.to_prefill != action + 1
            over = core.tick >= core.setting.ticks
    assert (refused > 0) == (kwargs is FAILING)
    for count in (0, core.setting.replicas):
        with pytest.raises(ConfigError, match="each role needs at least one"):
            core.system.set_prefill(count)


@pytest.mark.parametrize(("kind", "expected"), [("lost", -1.0), ("earned", 0.0)])
def test_rewards_add_up_to_the_utility_of_the_records(kind: str, expected: float) -> None:
    core = RolesCore(RolesSetting(**FAILING, reward={"kind": kind, "scale": 10.0, "late_weight": 0.5}))
    rewards, _ = play(core, some_windows(core.setting), 3)
    records = core.system.records()
    assert len(records) == core.requests == len(core.system.trace)
    assert core.utility == pytest.approx(met_slo(records, core.setting.slo).mean())
    assert sum(rewards) / 10.0 == pytest.approx(core.utility + expected, abs=1e-9)


def test_one_seed_gives_one_episode(setting: RolesSetting) -> None:
    found = []
    for seed in (4, 4, 5):
        env = ServeRoles(**FAILING)
        first, info = env.reset(seed=seed)
        steps = [env.step(action) for action in (2, 1, 0, 1)]
        found.append((info["windows"], first.tolist(), [(step[0].tolist(), step[1]) for step in steps]))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_in_each_phase_the_streams_of_one_source_play_and_part_of_the_others(setting: RolesSetting) -> None:
    windows = some_windows(setting)
    count, first = setting.phases_of(windows)
    assert count in (2, 3)
    length_s = setting.windows.window_s / count
    full = [serve_windows().arrays(window)[0] for window in windows]
    for k, (window, part) in enumerate(zip(windows, setting.parts(windows), strict=True)):
        for phase in range(count):
            source = ("gamma_code", "gamma")[(first + phase) % 2]
            assert setting.source_at(windows, (phase + 0.5) * length_s) == source
            inside = (part.arrival_s >= phase * length_s) & (part.arrival_s < (phase + 1) * length_s)
            here = (full[k] >= phase * length_s) & (full[k] < (phase + 1) * length_s)
            assert inside.sum() == (here.sum() if window.source == source else 0)
    both = RolesSetting(**{**KWARGS, "rest": 0.5}).parts(windows)  # the first stream of each source always plays
    assert [len(part) == len(own) for part, own in zip(both, full, strict=True)] == [True, False] * 2


def test_streams_of_training_and_validation_do_not_overlap_in_time(setting: RolesSetting) -> None:
    windows = serve_windows()
    for source in setting.sources:
        assert windows.span_s(source, "train")[1] <= windows.span_s(source, "validation")[0]
    for episode in validation_systems(setting):
        assert setting.check_windows(episode) == episode
        assert len({window.source for window in episode}) == 2
        for window in episode:
            begin_s, end_s = windows.span_s(window.source, "validation")
            assert begin_s <= window.start_s <= window.start_s + windows.window_s * window.rate <= end_s


def test_a_learned_policy_decides_in_a_replay_as_in_the_environment(tmp_path: Path) -> None:
    setting = RolesSetting(**FAILING, hide=["arrivals_60s"])
    windows = some_windows(setting, 2)
    core = RolesCore(setting)
    play(core, windows, 0)
    path = write_roles_policy(tmp_path, setting, core.features, 1)
    network, over = read_learned(path, "ServeRoles").network, False
    core.begin(windows)
    while not over:
        features = core.observe()[: setting.table.features]
        _, over = core.step(int(network.act(features, core.legal())))
    counts = np.array([state.to_prefill for state in core.history])
    assert (counts[1:] != counts[:-1]).sum() > 2
    system = setting.build_system(windows, roles=learned_roles(path=str(path)))
    system.run()
    ours, theirs = core.system.records(), system.records()
    for name in ("first_token_s", "finish_s", "prefill_replica", "decode_replica", "moves"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert core.system.events() == system.events()
    assert serve_systems(network.act, {**FAILING, "hide": ["arrivals_60s"]}, [windows]) == pytest.approx([core.utility])


def test_a_fixed_number_plays_the_episode_of_a_system_that_begins_with_it(setting: RolesSetting) -> None:
    core, windows = RolesCore(setting), some_windows(setting, 3)
    core.begin(windows)
    over = False
    while not over:
        _, over = core.step(setting.prefill - 1)
    system = setting.build_system(windows)
    system.run()
    assert core.utility == setting.earned(system, len(system.trace))
    system = setting.build_system(windows, roles=ByLoad(most_wait_s=0.5, most_kv_share=0.8))
    system.run()
    assert 0.0 < setting.earned(system, len(system.trace)) <= 1.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"replicas": 1}, "replicas is 1; it must be a whole number from 2"),
        ({"prefill": 4}, "prefill is 4 of 4 replicas"),
        ({"traffic": []}, "traffic is "),
        ({"traffic": [{"gamma": 0}]}, "number of streams of gamma is 0"),
        ({"traffic": [{"gama": 1}]}, "did you mean 'gamma'"),
        ({"phases": [0, 2]}, "phases is "),
        ({"phases": [3, 2]}, "phases is "),
        ({"rest": 1.5}, "rest is 1.5"),
        ({"outages": {"share": 2.0}}, r"outages\.share is 2.0"),
        ({"outages": {"mean_up": 2.0}}, "outages has no field 'mean_up'; did you mean 'mean_up_s'"),
        ({"outages": {"mean_up_s": 0.0}}, r"outages\.mean_up_s is 0.0"),
        ({"turn_s": -1.0}, "turn_s is -1"),
        ({"hide": ["waitng"]}, "hide: there is no entry 'waitng'; did you mean 'waiting'"),
        ({"actions": {}}, "ServeRoles has no argument 'actions'"),
        ({"budget_bytes": 1e9}, "in a budget of 0.93 GiB"),
        ({"slo": "chatt"}, "did you mean 'chat'"),
    ],
)
def test_an_argument_that_does_not_fit_is_refused_in_one_sentence(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RapLabError, match=message) as caught:
        RolesSetting(**{**KWARGS, **wrong})
    assert "\n" not in str(caught.value)


def test_streams_with_sessions_are_refused_in_one_sentence() -> None:
    setting = RolesSetting(**{**KWARGS, "traffic": [{"chats": 2, "gamma": 2}]})
    with pytest.raises(ConfigError, match="traffic names chats, which has sessions"):
        setting.sample(np.random.default_rng(0))


def test_windows_of_other_streams_are_refused(setting: RolesSetting) -> None:
    windows = some_windows(setting)
    with pytest.raises(ConfigError, match="one for each stream: 2 of gamma_code, 2 of gamma"):
        setting.check_windows(windows[:3])
    with pytest.raises(ConfigError, match="options has windows of none"):
        setting.check_windows(3)  # type: ignore[arg-type]


def test_render_returns_an_image_that_changes(tmp_path: Path) -> None:
    env = ServeRoles(render_mode="rgb_array", **KWARGS)
    env.reset(seed=0)
    before = env.render()
    for _ in range(3):
        env.step(0)
    assert (before != env.render()).any()
    env.save_render(tmp_path / "episode.png")
    assert (tmp_path / "episode.png").read_bytes().startswith(b"\x89PNG")
