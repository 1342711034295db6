"""The rules without learning: what of them is searched, that all get the same search, and where its result is read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from agents.baselines.serve import policy_context
from agents.envs.cluster import ClusterSetting
from agents.envs.serve import DEFAULT_ACTIONS, ServeSetting
from agents.envs.serve_lists import SHARES
from agents.envs.serve_windows import Window
from agents.evaluation.evaluate import EvaluateConfig
from agents.evaluation.rule_tables import _edges, best_table, plans_without_limits, serve_all
from agents.evaluation.rules import (
    BASES,
    RULES,
    build_rule,
    check_parameters,
    default_parameters,
    left_out,
    parts_of,
    rule_config,
    runnable,
    sampled_parameters,
)
from agents.evaluation.serve import play_window
from agents.evaluation.tuning import (
    Games,
    file_for,
    rules_tuned_to,
    served_of,
    settings_of,
    train_windows,
    trials_of,
    tune,
    tune_all,
    tune_rule,
    tuned_folder,
    tuned_rules,
)
from sim.config import check_overrides
from sim.errors import ConfigError
from sim.policies.base import PolicyContext
from sim.policies.tuned import FOLDER, tuned
from sim.results.run_folder import write_json
from tests.agents.helpers import composed, run_module

SETTING = ServeSetting()
NO_LOW = ServeSetting(actions={**DEFAULT_ACTIONS, "low_layers": [0], "drops": [0, 4, 8, 12]})
CONTEXT = policy_context(SETTING)
WINDOWS = [
    Window(source="burst", start_s=s, rate=1.3, budget="cotenant", budget_seed=1) for s in (100.0, 900.0, 1700.0)
]


def small_games(setting: ServeSetting = SETTING, count: int = 3) -> Games:
    return Games(
        setting,
        [(window,) for window in WINDOWS[:count]],
        SHARES,
        lambda build, game: float(play_window(setting, game[0], build(policy_context(setting)))["utility"]),
    )


@pytest.mark.parametrize("setting", [SETTING, NO_LOW], ids=["low bits", "none"])
def test_every_rule_that_can_run_is_built_with_its_defaults_and_with_random_parameters(setting: ServeSetting) -> None:
    rng = np.random.default_rng(3)
    made = {"table": [[[0, 0]]], "rates": [], "budgets": []}
    for name in runnable(setting):
        more = made if name.startswith("load_table") else {}
        for parameters in (
            default_parameters(setting, name),
            sampled_parameters(setting, name, rng),
        ):
            check_parameters(setting, name, parameters)
            config = rule_config(setting, name, parameters, more)
            assert json.loads(json.dumps(config)) == config  # a file of conf/rules holds it
            policy = build_rule(config)(policy_context(setting))
            limit = parts_of(name)[1]
            # Those that change plans start with the same weights, so the engine refuses the same prompts.
            if BASES[parts_of(name)[0]].changes:
                start = setting.actions.plans[setting.actions.start]
                assert (policy.first_plan.decode, policy.first_plan.weight_bits) == (start.decode, start.weight_bits)
            if name == "lookahead":  # the plans of its table have limits
                continue
            assert (policy.first_plan.max_wait_s is not None) == (limit in ("+wait", "+saber"))
            assert (policy.first_plan.max_waiting is not None) == (limit in ("+queue", "+saber_queue"))


def test_the_defaults_of_a_rule_are_those_of_its_file() -> None:
    for name in ("greedy_stop", "random_stop", "precision", "morphserve_default", "pressure_stop", "memory_ladder"):
        base = BASES[name]
        tuned_policy, shipped = (
            build_rule(config)(CONTEXT)
            for config in (
                rule_config(SETTING, name, default_parameters(SETTING, name))["policy"],
                {"name": base.file},
            )
        )
        for key in base.space:
            if hasattr(shipped, key):
                assert getattr(tuned_policy, key) == getattr(shipped, key), (name, key)


def test_parameters_outside_the_declared_space_are_refused() -> None:
    right = default_parameters(SETTING, "greedy_stop+wait")
    check_parameters(SETTING, "greedy_stop+wait", right)
    for part, key, value in (("policy", "headroom", 3.0), ("limit", "max_wait_s", 2.5), ("policy", "patience", True)):
        wrong = {**right, part: {**right[part], key: value}}
        with pytest.raises(ConfigError, match=rf"rule greedy_stop\+wait: {part}\.\w+ is "):
            check_parameters(SETTING, "greedy_stop+wait", wrong)
    with pytest.raises(ConfigError, match="limit has \\[\\]; tuning searches \\['max_running', 'max_wait_s'\\]"):
        check_parameters(SETTING, "greedy_stop+wait", {**right, "limit": {}})


def test_an_unknown_rule_is_an_error_with_the_nearest_name() -> None:
    for call in (
        lambda: parts_of("greedy_stop+wiat"),
        lambda: runnable(SETTING, ["greedy_stop+wiat"]),
        lambda: tune({}, names=["greedy_stop+wiat"]),
        lambda: tuned_rules(SETTING, ["greedy_stop+wiat"]),
    ):
        with pytest.raises(ConfigError, match=r"no rule 'greedy_stop\+wiat'; did you mean 'greedy_stop\+wait'"):
            call()


def test_a_rule_that_needs_low_precision_is_left_out_with_the_reason_where_there_is_none() -> None:
    missing = left_out(NO_LOW)
    assert missing["int4+wait"] == missing["precision"] == "there are no copies of the weights at low precision"
    assert {"dense+saber", "greedy_stop+wait", "load_ladder+wait", "load_table", "static"} <= set(runnable(NO_LOW))
    assert left_out(SETTING)["int8"] == "there are copies at 4 bits, not at 8"
    assert set(runnable(SETTING)) | set(left_out(SETTING)) == set(RULES)
    assert all(plan.weight_bits == (16,) * 32 for plan in _plans_of(NO_LOW, "load_ladder"))


def _plans_of(setting: ServeSetting, name: str) -> Any:
    policy: Any = build_rule(rule_config(setting, name, default_parameters(setting, name)))(policy_context(setting))
    return policy.plans


def test_every_rule_gets_the_same_number_of_trials_its_defaults_first() -> None:
    for name in runnable(SETTING):
        tried = trials_of(SETTING, name, 24, 0)
        finite = name in ("dense", "int4", "static")
        assert len(tried) == (len(plans_without_limits(SETTING)) if name == "static" else 1 if finite else 24)
        assert tried[0] == default_parameters(SETTING, name)
        assert tried == trials_of(SETTING, name, 24, 0)
    assert trials_of(SETTING, "dense+wait", 24, 1)[1:] != trials_of(SETTING, "dense+wait", 24, 0)[1:]


@given(seed=st.integers(0, 2**32 - 1))
def test_samples_lie_in_their_ranges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name in ("greedy_stop+queue", "precision+saber", "pressure_stop+wait", "load_table"):
        check_parameters(SETTING, name, sampled_parameters(SETTING, name, rng))


def test_tuning_finds_parameters_no_worse_than_the_defaults_and_finds_them_again() -> None:
    games = small_games()
    first = tune_rule(games, "dense+wait", 6, 0)
    assert first["score"] >= first["default_score"] > 0
    assert first == tune_rule(small_games(), "dense+wait", 6, 0)
    best = build_rule(first["policy"])
    assert round(games.score(games.utilities(best, games.games)), 5) == first["score"]
    check_parameters(SETTING, "dense+wait", first["parameters"])


def test_the_score_averages_over_traces_not_over_windows() -> None:
    other = Window(source="azure_conv", start_s=0.0, rate=1.0, budget="full", budget_seed=0)
    games = Games(SETTING, [(WINDOWS[0],), (WINDOWS[1],), (other,)], SHARES, lambda build, game: 0.0)
    assert games.by_source([0.2, 0.4, 0.9]) == pytest.approx({"burst": 0.3, "azure_conv": 0.9})
    assert games.score([0.2, 0.4, 0.9]) == pytest.approx(0.6)
    assert games.score([0.2]) == pytest.approx(0.2)


def test_the_table_holds_the_plan_that_earns_most_at_each_rate_and_budget() -> None:
    served = serve_all(SETTING, WINDOWS, 1.5)
    found = best_table(SETTING, served, 2, 2, 10.0)
    names, dense_bytes = list(plans_without_limits(SETTING)), 2 * 6_738_415_616
    rates, budgets = [], []
    for states in served.states:  # the smoothed rate and the budget at every tick, computed again
        rate, before, row = 0.0, 0, []
        for number, state in enumerate(states):
            tokens, before = state.arrived_prompt_tokens - before, state.arrived_prompt_tokens
            rate = float(tokens) if not number else rate + (1 - np.exp(-0.1)) * (tokens - rate)
            row.append(rate)
        rates.append(row)
        budgets.append([state.budget_bytes / dense_bytes for state in states])
    at = served.window, served.tick
    column = (np.array(rates)[at] >= found["rates"][0]).astype(int)
    row_of = (np.array(budgets)[at] >= found["budgets"][0]).astype(int)
    for i, entries in enumerate(found["table"]):
        for j, entry in enumerate(entries):
            earned = served.earned[:, (row_of == i) & (column == j)].sum(axis=1)
            assert earned[names.index(tuple(entry))] == earned.max()


@pytest.mark.parametrize(
    ("values", "count", "edges"),
    [
        ([0.445, 1.187, 1.187, 1.187], 2, [1.18]),  # not 1.19, above which no budget lies
        ([1.0, 2.0, 3.0, 4.0], 1, []),
        ([5.0, 5.0, 5.0], 3, []),
        ([10.0, 20.0, 123456.0, 123456.0], 4, [20.0, 123000.0]),
    ],
)
def test_every_part_between_the_edges_of_a_table_holds_a_value(
    values: list[float], count: int, edges: list[float]
) -> None:
    found = _edges(np.array(values), count)
    assert found == pytest.approx(edges)
    assert set(np.searchsorted(found, values, side="right")) == set(range(len(found) + 1))


def test_training_windows_cover_sources_budgets_and_loads_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    # The search for the rate of a window plays it several times; here the load is only written down.
    monkeypatch.setattr(
        "agents.evaluation.tuning.at_attainment",
        lambda setting, window, split, share: dataclasses.replace(window, rate=share),
    )
    setting = ServeSetting(sources=["burst", "gamma", "mmpp"])
    windows = train_windows(setting)
    assert windows == train_windows(setting)
    for part in (windows, windows[:9], windows[:3]):
        for name in ("source", "budget", "rate"):
            kinds = [getattr(window, name) for window in part]
            assert sorted(kinds.count(kind) for kind in set(kinds)) == [len(part) // 3] * 3
    for window in windows:
        begin_s, end_s = setting.windows.span_s(window.source, "train")
        assert begin_s <= window.start_s < end_s
    assert all(window.low_bits for window in windows)
    assert not any(window.low_bits for window in train_windows(NO_LOW))


def test_rules_that_need_no_tuning_are_built_without_a_file(tmp_path: Path) -> None:
    rules, summary = tuned_rules(SETTING, ["int4", "dense"], tmp_path)
    assert list(rules) == ["dense", "int4"]
    assert rules["int4"](CONTEXT).first_plan.weight_bits == (4,) * 32
    assert list(rules_tuned_to(summary)) == ["dense", "int4"]
    with pytest.raises(ConfigError, match="from an earlier version"):
        rules_tuned_to({"saber_margin": 0.4})


def a_file(folder: Path, **changed: Any) -> tuple[Path, dict[str, Any]]:
    """A file of tuned rules, made as the command makes it but on two windows, and its content."""
    entries = tune_all(small_games(count=2), ["dense+wait", "load_table+wait"], 2, 0)
    content = {"made": {"commit": "0" * 40}, "served": served_of(SETTING), "rules": entries, **changed}
    path = folder / "mine.json"
    write_json(path, content)
    return path, content


def test_the_file_of_a_setting_is_read_instead_of_tuning_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, content = a_file(tmp_path)
    assert file_for(SETTING, tmp_path) == path
    assert file_for(NO_LOW, tmp_path) is None
    monkeypatch.setattr("agents.evaluation.tuning.tune_rule", None)  # nothing is tuned
    rules, summary = tuned_rules(SETTING, ["load_table+wait", "dense+wait", "dense"], tmp_path)
    assert list(rules) == ["dense", "dense+wait", "load_table+wait"]
    assert summary["file"] == "mine.json"
    wait_s = content["rules"]["dense+wait"]["parameters"]["limit"]["max_wait_s"]
    assert rules["dense+wait"](CONTEXT).first_plan.max_wait_s == wait_s
    assert tuned(CONTEXT, rule="dense+wait", file=str(path)).first_plan.max_wait_s == wait_s
    with pytest.raises(ConfigError, match=r"mine\.json has no rule 'dense\+wiat'; did you mean 'dense\+wait'"):
        tuned(CONTEXT, rule="dense+wiat", file=str(path))
    with pytest.raises(ConfigError, match="there are no tuned rules 'nowhere'"):
        tuned(CONTEXT, rule="dense+wait", file="nowhere")


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ([], "holds no tuned rules"),
        ({"dense+wait": {"policy": "dense"}}, "rules.dense\\+wait.policy has no name"),
        ({"x": {"policy": {"name": "limited", "policy": {"_target_": "os.system"}}}}, "has a key _target_"),
        ({"x": {"policy": {"name": "lookahead", "factors": [{"_args_": []}]}}}, "has a key _args_"),
    ],
)
def test_a_file_that_names_what_to_run_is_refused(rules: Any, named: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    write_json(path, {"rules": rules})
    with pytest.raises(ConfigError, match=named):
        tuned(PolicyContext(model=SETTING.model), rule="x", file=str(path))


def test_a_file_without_parameters_is_refused_and_one_that_does_not_say_how_it_was_made_is_read(tmp_path: Path) -> None:
    path, content = a_file(tmp_path)
    write_json(path, {key: value for key, value in content.items() if key != "made"})
    assert tuned_rules(SETTING, ["dense+wait"], tmp_path)[1]["commit"] == ""
    del content["rules"]["dense+wait"]["parameters"]
    write_json(path, content)
    with pytest.raises(ConfigError, match=r"mine\.json has no parameters of dense\+wait; python -m agents.tune_rules"):
        tuned_rules(SETTING, ["dense+wait"], tmp_path)


def test_rules_are_added_to_a_file_of_the_same_search_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, kwargs = tmp_path / "mine.json", {"sources": ["gamma"]}
    with pytest.raises(ConfigError, match=r"mine\.json holds no tuned rules"):
        tune(kwargs, names=["dense"], file=path)
    first = tune(kwargs, names=["dense"])
    write_json(path, first)
    content = tune(kwargs, names=["int4"], file=path)
    assert [*content["rules"]] == ["dense", "int4"]
    assert content["rules"]["dense"] == first["rules"]["dense"]
    assert content["rules"]["int4"] == tune(kwargs, names=["int4"])["rules"]["int4"]
    assert (content["made"], content["added"][0]["rules"]) == (first["made"], ["int4"])
    write_json(path, content)
    assert [each["rules"] for each in tune(kwargs, names=["dense"], file=path)["added"]] == [["int4"], ["dense"]]
    monkeypatch.setattr("agents.evaluation.tuning.tune_rule", None)  # an error comes before the search
    with pytest.raises(ConfigError, match=r"mine\.json was made with other windows, trials; .* add=false"):
        tune(kwargs, names=["int4"], trials=3, each=2, file=path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("label=../mine",), "label is '../mine'; it must be a file name of letters, digits"),
        (("baselines=[]",), "baselines is empty; name at least one rule, or null"),
        (("out=README.md",), "README.md: File exists; name a file that can be read, or a folder"),
    ],
)
def test_a_mistake_is_found_before_the_search(arguments: tuple[str, ...], message: str) -> None:
    made = run_module(
        "agents.tune_rules", "scenarios=[tight/none]" if "label" not in arguments[0] else "seed=1", *arguments
    )
    assert made.returncode != 0
    assert message in made.stderr
    assert "Traceback" not in made.stderr
    assert "tuning rules" not in made.stderr


def test_in_clusters_a_slow_rule_has_its_defaults_alone_and_tries_fewer_limits() -> None:
    limits = {"waits": [1.0, 1.5], "runs": [None, 48, 28, 16, 9, 5]}
    cluster = ClusterSetting(actions={**DEFAULT_ACTIONS, **limits}, slo="ttft_2s_tpot_100ms")
    assert trials_of(cluster, "lookahead", 12, 0) == [default_parameters(cluster, "lookahead")]
    assert len(trials_of(SETTING, "lookahead", 12, 0)) == 12
    tried = rule_config(cluster, "lookahead", {})["actions"]
    assert (tried["waits"], tried["runs"]) == ([1.0], [None, 16])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_file_on_any_number_of_processes() -> None:
    names = ["dense+wait", "load_table+saber", "memory_ladder+wait"]
    one, two = (tune({"sources": ["burst"]}, names=names, trials=2, workers=workers) for workers in (1, 2))
    for content in (one, two):
        content.pop("made")
    assert json.dumps(one) == json.dumps(two)


def test_a_label_names_the_file_of_a_setting_of_ones_own_and_scenarios_have_files_of_their_own() -> None:
    found = settings_of(composed("tune_rules", "scenarios=[tight/none,roomy/published]"))
    assert list(found) == ["tight_none", "roomy_published"]
    assert left_out(ServeSetting(**{**found["tight_none"], "sources": ["burst"]}))["int4"]
    mine = settings_of(composed("tune_rules", "label=mine", "scenario=mid", "env.kwargs.slo=chat"))
    assert (mine["mine"]["slo"], mine["mine"]["budget"]["high_share"]) == ("chat", 1.484)
    with pytest.raises(ConfigError, match="set one of the two"):
        settings_of(composed("tune_rules", "label=mine", "scenarios=[tight/none]"))
    with pytest.raises(ConfigError, match="no scenario 'tight/nane'; did you mean 'tight/none'"):
        settings_of(composed("tune_rules", "scenarios=[tight/nane]"))
    assert composed("tune_rules", "baselines=[dense+wait]").baselines == ["dense+wait"]


def test_an_evaluation_reads_the_rules_of_the_folder_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tuned_folder(OmegaConf.structured(EvaluateConfig())) == FOLDER
    (tmp_path / "searched_longer").mkdir()
    cfg = OmegaConf.structured(EvaluateConfig(tuned_rules="searched_longer"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="tuned_rules is 'searched_longer', no folder of tuned rules; python -m "):
        tuned_folder(cfg)
    path, _ = a_file(tmp_path / "searched_longer")
    assert tuned_folder(cfg) == path.parent


def test_a_sweep_into_one_folder_is_refused() -> None:
    message = r"seed has several values, but .* out=runs/rules; .*'out=runs/seed_\$\{seed\}'"
    with pytest.raises(ConfigError, match=message):
        check_overrides(["seed=0,1", "out=runs/rules"], "tune_rules")
    check_overrides(["seed=0,1", "out=runs/rules_${seed}"], "tune_rules")
    check_overrides(["out=runs/a,runs/b"], "tune_rules")
    check_overrides(["seed=0,1"], "train")  # each job has a folder of its own
