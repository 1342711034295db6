"""Values of overrides are checked before a command starts: its type, its range, in the words of the key."""

from __future__ import annotations

import re
import sys

import pytest

import sim.replay.__main__  # noqa: F401  registers the keys of sim.replay
from sim.config import CONF_DIR, build_option, check_overrides
from sim.config.options import load_option, option_names
from sim.config.overrides import _check_target_of
from sim.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tick_s=abc", "tick_s is 'abc'; it must be a number"),
        ("tick_s=-1", "tick_s is -1; it must be at least 0.0001 seconds"),
        ("tick_s=nan", "tick_s is nan; it must be at least 0.0001 seconds"),
        ("tick_s=0", "tick_s is 0; it must be at least 0.0001 seconds"),
        ("seed=1.5", "seed is 1.5; it must be a whole number"),
        ("seed=true", "seed is True; it must be a number"),
        ("seed=-1", "seed is -1; it must be at least 0"),
        ("seeds=[a]", "seeds is ['a']; it must be a whole number"),
        ("seeds=[1.5]", "it must be a whole number"),
        ("workers=0", "workers is 0; it must be at least 1"),
        ("window_s=-3", "window_s is -3; it must be above 0 seconds"),
        ("workspace_bytes=inf", "it must be at least 0 bytes, and finite"),
        ("iterations=maybe", "iterations is 'maybe'; it must be true or false"),
        ("slo.ttft_s=x", "slo.ttft_s is 'x'; it must be a number"),
        ("slo.tpot_s=x", "slo.tpot_s is 'x'; it must be a number or null"),
        ("engine.limits.max_running=1.5", "engine.limits.max_running is 1.5; it must be a whole number"),
        ("engine.prefix_caching=1", "engine.prefix_caching is 1; it must be true or false"),
        ("model.name=7", "model.name is 7; it must be text"),
        ("budget.share=much", "budget.share is 'much'; it must be a number, such as 0.9"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_with_what_is_allowed(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_overrides([override], "replay")
    assert said in str(refused.value)


@pytest.mark.parametrize("value", ["abc", "[a]", "{a: 1}", "1.5"])
def test_a_keyword_that_a_policy_passes_on_is_checked_too(value: str) -> None:
    with pytest.raises(ConfigError, match=r"policy\.drop_mha is .*; it must be a list"):
        check_overrides(["policy=fixed", f"policy.drop_mha={value}"], "replay")


@pytest.mark.parametrize(
    "overrides",
    [
        ["seeds=[0,1]", "tick_s=2", "slo.ttft_s=1", "slo.tpot_s=null", "workload=none"],
        ["policy=fixed", "policy.drop_mha=[1,2]", "policy.weight_bits=8"],
        ["policy=fixed", f"policy.weight_bits=[{','.join(['8'] * 32)}]"],
        ["trace=poisson", "trace.rate_rps=7", "trace.duration_s=3", "label=x"],
        ["policy=dense,int4", "seed=range(3)", "tick_s=0.5,1"],
        ["policy=glob(rap*)"],
        ["hydra.run.dir=x", "+new.key=1"],
    ],
)
def test_values_of_the_right_type_are_taken(overrides: list[str]) -> None:
    check_overrides(overrides, "replay")


def test_of_several_values_each_is_checked() -> None:
    with pytest.raises(ConfigError, match="tick_s is -1"):
        check_overrides(["tick_s=0.5,-1"], "replay")
    with pytest.raises(ConfigError, match="seed has several values, 0,1; add --multirun"):
        check_overrides(["seed=0,1"], "replay", multirun=False)


def test_a_number_is_checked_without_the_import_of_what_it_configures(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gymnasium")
    import agents.training.train  # noqa: F401  registers the keys

    monkeypatch.setitem(sys.modules, "agents.training.algorithms", None)  # an import of it would fail
    for experiment, said in (
        ("ppo_prune", r"a number or a list, such as \[\[0, 0\.001\]"),
        ("dqn_prune", "a number, such as"),
    ):
        with pytest.raises(ConfigError, match=rf"algorithm\.lr is 'fast'; it must be {said}"):
            check_overrides([f"experiment={experiment}", "algorithm.lr=fast"], "train")


@pytest.mark.parametrize("group", ["engine", "gpu", "model", "slo", "trace", "budget", "policy", "router", "outages"])
def test_the_values_of_every_option_fit_the_types_that_its_target_states(group: str) -> None:
    from omegaconf import OmegaConf

    for name in option_names(group, [CONF_DIR]):
        node = load_option(group, name)
        root = OmegaConf.create({"seed": 0, "workers": 1, group: node})
        for key in node:
            if not str(key).startswith("_") and not OmegaConf.is_missing(node, key):
                _check_target_of(root, f"{group}.{key}")


def test_build_names_a_target_that_cannot_be_imported() -> None:
    with pytest.raises(ConfigError, match=r"_target_: nowhere\.Thing cannot be imported .*; name MODULE\.FUNCTION"):
        build_option("slo", "ttft_2s", {"_target_": "nowhere.Thing"})


def test_several_values_of_a_list_are_refused_with_the_list() -> None:
    for typed, listed in (("seeds=0,1", "'seeds=[0,1]'"), ("seeds=range(0,3)", "'seeds=[0,1,2]'")):
        with pytest.raises(ConfigError, match=re.escape(f"write a list: {listed}, ")):
            check_overrides([typed], "replay", multirun=False)


def test_a_mapping_with_a_key_that_its_group_lacks_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"trace\.columns has no 'arival'; did you mean 'arrival'"):
        check_overrides(["trace=file", "trace.columns={arival: ts}"], "replay")
