"""Any subset of rules and policies is evaluated: the baselines alone, one's own policy alone, or both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import DictConfig
from rich.console import Console

from agents.evaluation.chosen import GLOBS, check_rules, files_of, named, present, replaced
from agents.evaluation.evaluate import evaluate
from agents.evaluation.rules import RULES
from sim.errors import ConfigError
from sim.policies.learned import SHIPPED
from tests.agents.helpers import composed

MINE = str(SHIPPED / "learned_prune_smollm2.json")


def chosen(*overrides: str) -> DictConfig:
    """The configuration of agents.evaluate with these arguments, as the command reads it."""
    arguments = [named(one) for one in overrides]
    return replaced(composed("evaluate", *arguments), arguments)


def default() -> dict[str, Any]:
    return {key: dict(composed("evaluate")[key]) for key in GLOBS}


def test_an_empty_table_on_the_command_line_leaves_no_learned_policy() -> None:
    assert len(chosen().learned) > 0
    assert chosen("learned={}").learned == {}
    assert len(chosen("learned={}").serve_learned) > 0


def test_a_table_on_the_command_line_replaces_the_names_and_a_single_name_adds_one() -> None:
    assert chosen("learned={mine: a.json}").learned == {"mine": "a.json"}
    assert chosen("learned={mine: a.json}", "learned.other=b.json").learned == {"mine": "a.json", "other": "b.json"}
    assert set(chosen("learned.mine=a.json").learned) == {"mine", *composed("evaluate").learned}
    assert "dqn" not in chosen("~learned.dqn").learned


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "learned={greedy_stop: a.json}",
            "learned: greedy_stop is the name of a rule; call it otherwise, such as my_",
        ),
        ("serve_learned.dense=a.json", "serve_learned: dense is the name of a rule"),
        ("serve_learned={oracle_search: a.json}", "serve_learned: oracle_search is the name of a rule"),
        ("roles_learned={fixed_2: a.json}", "roles_learned: fixed_2 is the name of a rule"),
    ],
)
def test_a_learned_policy_cannot_take_the_name_of_a_rule(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(chosen("tasks=[prune]", argument), Console())


def test_published_trainings_that_are_not_here_are_left_out_with_a_note() -> None:
    cfg = chosen("tasks=[prune]")
    cfg.learned = {"ppo": "runs/nowhere/*.json"}
    found, notes = present(cfg, {"learned": {"ppo": "runs/nowhere/*.json"}, "curves": default()["curves"]})
    assert found.learned == {}
    assert notes == ["learned.ppo is left out: no file matches runs/nowhere/*.json"]


@pytest.mark.parametrize("argument", ["learned.mine=/nowhere/*.json", "curves={mine: /nowhere.csv}"])
def test_a_file_that_the_command_line_names_must_be_there(argument: str) -> None:
    with pytest.raises(ConfigError, match=r"mine: /nowhere.* matches no file; .* '~(learned|curves)\.mine'"):
        present(chosen("tasks=[prune]", argument), default())


def test_a_glob_may_be_absolute_or_below_the_current_folder_or_inside_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "policy.json").touch()
    assert files_of(f"{tmp_path}/*.json") == [tmp_path / "policy.json"]
    assert files_of("conf/policy/learned_prune_*.json") == [Path(MINE)]
    monkeypatch.chdir(tmp_path)
    assert files_of("policy.json") == [tmp_path / "policy.json"]
    assert files_of("conf/policy/learned_prune_*.json") == [Path(MINE)]
    own = tmp_path / "conf" / "policy" / "learned_prune_mine.json"
    own.parent.mkdir(parents=True)
    own.touch()
    assert files_of("conf/policy/learned_prune_*.json") == [own]
    assert files_of(str(tmp_path)) == []


def test_an_unknown_rule_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="no rule 'denze'; did you mean 'dense'"):
        check_rules(["denze"], RULES)


@pytest.mark.parametrize(
    ("overrides", "policies"),
    [
        (("baselines=[knapsack,dense]", "learned={}"), ["dense", "knapsack"]),
        (("baselines=[]", f"learned={{mine: {MINE}}}"), ["mine"]),
        (("baselines=[greedy_stop,oracle]", f"learned={{mine: {MINE}}}"), ["greedy_stop", "mine", "oracle"]),
    ],
)
def test_a_subset_is_played_and_its_table_printed(
    overrides: tuple[str, ...], policies: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(chosen("tasks=[prune]", f"out={tmp_path}", "curves={}", *overrides), Console(width=200))
    frame = pd.read_parquet(tmp_path / "prune.parquet")
    assert list(dict.fromkeys(frame["policy"])) == policies
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in policies)
    assert not (tmp_path / "index.md").exists()  # the page compares with rules that were not played


def test_nothing_to_play_or_to_show_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task prune has no policy to play"):
        evaluate(chosen("tasks=[prune]", "baselines=[]", "learned={}", f"out={tmp_path}"), Console())
    with pytest.raises(ConfigError, match="has no results of serve"):
        evaluate(chosen("tasks=[serve]", "measure=false", f"out={tmp_path}"), Console())
    with pytest.raises(ConfigError, match="there is no task 'serv'; did you mean 'serve'"):
        evaluate(chosen("tasks=[serv]", f"out={tmp_path}"), Console())
