"""The evaluation of roles: every rule on the same episodes, a claim before they are played, and its section."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from omegaconf import DictConfig

from agents.envs.prune_loads import Split
from agents.envs.roles import RolesCore, RolesSetting
from agents.envs.serve_windows import serve_windows
from agents.evaluation import claim as claims
from agents.evaluation import measure_roles, roles
from agents.evaluation.chosen import named, replaced
from agents.evaluation.evaluate import EvaluateConfig  # noqa: F401 - registers the schema of conf/evaluate.yaml
from agents.evaluation.roles import episodes, play, roles_setting, rules, tune_by_load
from agents.evaluation.roles_report import roles_context, roles_table_markdown, roles_verdict
from sim.errors import ConfigError
from tests.agents.helpers import begin_checkout, commit_claim, composed, write_roles_policy
from tests.sim.pages.test_render import cells

SMALL: dict[str, Any] = {"replicas": 3, "prefill": 1, "traffic": [{"gamma_code": 1, "gamma": 1}], "tick_s": 20.0}
TUNED = {"most_wait_s": 0.5, "most_kv_share": 0.8}


def small_setting(split: Split) -> RolesSetting:
    return RolesSetting(**SMALL, split=split, slo="ttft_2s_tpot_100ms")


def test_every_fixed_number_and_both_kinds_of_by_load_are_played() -> None:
    setting = small_setting("validation")
    found = rules(setting, TUNED)
    assert [*found] == ["fixed_1", "fixed_2", "by_load", "by_load (tuned)"]
    ((_, windows),) = episodes(setting, 1)
    figures = {name: play(setting, windows, start) for name, start in found.items()}
    core, over = RolesCore(setting), False
    core.begin(windows)
    while not over:
        _, over = core.step(0)
    assert figures["fixed_1"]["utility"] == core.utility == figures["fixed_1"]["slo_attainment"]
    assert figures["fixed_1"]["role_changes"] == figures["fixed_2"]["role_changes"] == 0
    assert figures["by_load"] == figures["by_load (tuned)"]


def test_episodes_are_the_same_in_every_call_and_inside_their_split() -> None:
    test = small_setting("test")
    played = episodes(test, 3)
    assert played == episodes(test, 3)
    assert [traffic for traffic, _ in played] == ["gamma_code + gamma"] * 3
    for _, windows in played:
        for window in windows:
            assert window.start_s >= serve_windows().span_s(window.source, "test")[0]
    assert roles_setting("validation").replicas == 6


def test_the_thresholds_with_the_highest_utility_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "WAITS_S", (0.05, 5.0))
    monkeypatch.setattr(roles, "KV_SHARES", (0.9,))
    monkeypatch.setattr(roles, "TUNING_EPISODES", 1)
    setting = small_setting("train")
    found = tune_by_load(setting)
    ((_, windows),) = episodes(setting, 1)
    for trial in found["trials"]:
        start = partial(roles.by_load, most_wait_s=trial["most_wait_s"], most_kv_share=0.9)
        assert trial["utility"] == pytest.approx(play(setting, windows, start)["utility"], abs=1e-6)
    best = max(trial["utility"] for trial in found["trials"])
    assert {**found["tuned"], "utility": best} in found["trials"]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout for claims, in place of the project's, and a small system."""
    begin_checkout(tmp_path)
    monkeypatch.setattr(claims, "REPOSITORY", tmp_path)
    monkeypatch.setattr(measure_roles, "roles_setting", small_setting)
    monkeypatch.setattr(roles, "WAITS_S", (0.5,))
    monkeypatch.setattr(roles, "KV_SHARES", (0.8,))
    return tmp_path


def configuration(folder: Path, *more: str) -> DictConfig:
    arguments = [f"roles_learned={{learned_mine: {folder}/p.json}}", "roles_compared=learned_mine", "tasks=[roles]"]
    arguments = [named(one) for one in (*arguments, "roles_each=2", "roles_claim=roles_claim.json", *more)]
    return replaced(composed("evaluate", *arguments), arguments)


def test_the_test_episodes_are_played_once_for_a_committed_claim_that_fits(checkout: Path) -> None:
    setting = small_setting("test")
    write_roles_policy(checkout, setting, np.zeros(setting.table.features, dtype=np.float32), 0)
    cfg, out = configuration(checkout), checkout / "out"
    path = commit_claim(
        checkout,
        "'tasks=[roles]'",
        play=lambda: measure_roles.measure_roles(cfg, out),
        write=lambda: measure_roles.write_roles_claim(cfg),
    )
    with pytest.raises(ConfigError, match="claims other episodes than are about to be played"):
        measure_roles.measure_roles(configuration(checkout, "roles_each=1"), out)
    with pytest.raises(ConfigError, match="roles_compared is 'other'"):
        measure_roles.write_roles_claim(configuration(checkout, "roles_compared=other"))
    with pytest.raises(ConfigError, match="roles_each is 0"):
        measure_roles.roles_played(configuration(checkout, "roles_each=0"), "test")
    measure_roles.measure_roles(cfg, out)
    made = json.loads((out / "roles.json").read_text())
    assert made["claim"]["date"] == json.loads(path.read_text())["date"]
    assert made["by_load"] == json.loads(path.read_text())["by_load"]
    frame = _read(out)
    assert set(frame["policy"]) == {"fixed_1", "fixed_2", "by_load", "by_load (tuned)", "learned_mine"}
    assert (frame.groupby("policy").size() == 2).all()
    context = roles_context(out)
    assert context is not None
    assert context["verdict"]["compared"] == "learned_mine"
    assert context["table"] == roles_table_markdown(frame, "learned_mine")
    with pytest.raises(ConfigError, match="which is played once"):
        measure_roles.measure_roles(cfg, out)
    measure_roles.measure_roles(configuration(checkout, "only=[fixed_2]"), out)
    again = [one.sort_values(["policy", "window"], ignore_index=True) for one in (frame, _read(out))]
    pd.testing.assert_frame_equal(*again)
    with pytest.raises(ConfigError, match=r"has results of other episodes \(split test\)"):
        measure_roles.measure_roles(configuration(checkout, "only=[fixed_2]", "roles_claim=none"), out)


def _read(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "roles.parquet")


def test_the_table_and_the_verdict_say_who_is_above_whom() -> None:
    means = {"fixed_1": 0.2, "by_load": 0.8, "learned_roles": 0.7}
    noise = np.random.default_rng(0).normal(0.0, 0.02, 20)
    columns = ("goodput_rps", "ttft_p95_s", "tpot_p95_s", "role_changes")
    frame = pd.DataFrame(
        [
            {"policy": name, "seed": 0, "window": window, "source": "ab"[window % 2], "utility": mean + noise[window],
             **dict.fromkeys(columns, 1.0)}
            for name, mean in means.items()
            for window in range(20)
        ]
    )  # fmt: skip
    found = roles_verdict(frame, "learned_roles")
    assert (found["best"], found["beats"], found["loses_to"]) == ("by_load", ["fixed_1"], ["by_load"])
    table = {row[0]: row for row in cells(roles_table_markdown(frame))}
    assert table["fixed_1"][2].startswith("+0.5000")
    assert table["learned_roles"][2] == "-"
    assert roles_verdict(frame[frame["policy"] != "learned_roles"], "learned_roles") == {
        "best": "by_load",
        "best_utility": pytest.approx(0.8 + noise.mean()),
    }
