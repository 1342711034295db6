"""The listed windows of validation and test: independent, at stated loads, in every scenario."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest

from agents.envs.serve import ServeSetting
from agents.envs.serve_lists import (
    FILE,
    SCENARIOS,
    SHARES,
    check_scenarios,
    listed_windows,
    memory_of,
    read_lists,
    scenario_kwargs,
    server_of,
    windows_sha256,
)
from agents.envs.serve_sources import source_of, source_span_s, sources_with
from agents.envs.serve_windows import serve_windows
from sim.errors import ConfigError


def test_there_are_500_independent_test_windows_of_six_traces_and_validation_has_every_source() -> None:
    content = read_lists()
    blocks = {
        (source, row[4])
        for lists in content["windows"]["test"].values()
        for source, rows in lists.items()
        for row in rows
    }
    assert len(blocks) >= 500
    assert len({source for source, _ in blocks}) >= 6
    assert set(content["windows"]["test"]) == set(content["windows"]["validation"]) == set(SCENARIOS)
    for lists in content["windows"]["validation"].values():
        assert len(lists) >= 9
        assert len({len(rows) for rows in lists.values()}) == 1  # equal numbers


@pytest.mark.parametrize("split", ["validation", "test"])
def test_windows_lie_in_their_part_and_those_of_different_blocks_do_not_overlap(split: Any) -> None:
    windows, spans = serve_windows(), defaultdict(list)
    for one in listed_windows(split):
        window = one.window
        end_s = window.start_s + windows.window_s * window.rate
        begin_s, last_s = source_span_s(window.source, split)
        assert begin_s - 0.001 <= window.start_s < end_s <= last_s + 0.001
        spans[window.source].append((window.start_s, end_s, one.block))
    if split == "test":
        for source, found in spans.items():
            for earlier, later in itertools.pairwise(sorted(found)):
                assert later[0] >= earlier[1] - 0.001 or later[2] == earlier[2], source


def test_every_scenario_has_every_load_and_budget_of_every_source() -> None:
    content, budgets = read_lists(), range(len(serve_windows().budgets))
    for scenario, lists in content["windows"]["test"].items():
        for source, rows in lists.items():
            found = {(row[1], row[2]) for row in rows}
            missing = len(SHARES) * len(budgets) - len(found)
            assert missing <= 5, (scenario, source)  # windows that decide nothing are left out


def test_loads_fall_as_rates_rise() -> None:
    for by_scenario in read_lists()["rates"].values():
        for rates in by_scenario.values():
            for source, (busy, usual, calm) in rates.items():
                assert busy >= usual >= calm > 0, source


def test_the_file_was_made_for_the_scenarios_and_the_server_of_the_configuration() -> None:
    for scenario in SCENARIOS:
        setting = ServeSetting(**scenario_kwargs(scenario))
        assert server_of(setting) == read_lists()["server"]
        memory = memory_of(scenario)
        assert (setting.budget.high_share, setting.budget.low_share) == (memory["high_share"], memory["low_share"])
        assert any(setting.actions.low) == memory["low_bits"]


def test_windows_are_those_of_the_chosen_scenarios_and_sources_and_carry_their_memory() -> None:
    listed = listed_windows("test", scenarios=["tight/none"], sources=["gamma", "mmpp"])
    assert {one.scenario for one in listed} == {"tight/none"}
    assert list(dict.fromkeys(one.window.source for one in listed)) == ["gamma", "mmpp"]
    assert {(one.window.high_share, one.window.low_bits) for one in listed} == {(1.187, False)}
    assert {one.share for one in listed} == set(SHARES)
    assert {one.window.source for one in listed_windows("test")} == set(sources_with("test")[0]) - {"burst"}


def test_the_hash_of_windows_changes_with_any_field_and_with_their_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = listed_windows("validation", scenarios=["mid/none"], sources=["gamma"])
    hashes = {
        windows_sha256(listed),
        windows_sha256(listed[:-1]),
        windows_sha256([replace(listed[0], block=99), *listed[1:]]),
        windows_sha256([replace(listed[0], window=replace(listed[0].window, budget_seed=7)), *listed[1:]]),
    }
    arrays = type(serve_windows()).arrays
    monkeypatch.setattr(
        type(serve_windows()), "arrays", lambda self, one: (*arrays(self, one)[:2], arrays(self, one)[2] + 1)
    )
    hashes.add(windows_sha256(listed))
    assert len(hashes) == 5


def test_an_unknown_scenario_or_a_source_without_windows_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="no scenario 'tight/nothing'; did you mean"):
        check_scenarios(["tight/nothing"])
    with pytest.raises(ConfigError, match="scenarios is empty"):
        check_scenarios([])
    with pytest.raises(ConfigError, match=r"mmpp_slow has no test windows"):
        listed_windows("test", sources=["mmpp_slow"])


def test_a_file_that_is_no_list_says_how_to_make_one(tmp_path: Any) -> None:
    path = tmp_path / "mine.json"
    for text in ("{}", "not JSON"):
        path.write_text(text)
        read_lists.cache_clear()
        with pytest.raises(ConfigError, match=r"python -m agents\.windows"):
            read_lists(path)


def test_every_listed_source_is_one_of_the_split() -> None:
    assert FILE.is_file()
    for split, by_scenario in read_lists()["windows"].items():
        for lists in by_scenario.values():
            assert all(split in source_of(name).lent_to for name in lists)
