"""How the loads and windows of validation and test are found."""

from __future__ import annotations

import json
import math

import pytest

from agents.envs.serve import ServeSetting
from agents.envs.serve_lists import FILE, SCENARIOS, SHARES, memory_of, scenario_kwargs
from agents.envs.serve_pool import reference_attainment
from agents.envs.serve_sources import serve_split, sources_with
from agents.evaluation.windows import (
    ENOUGH_BLOCKS,
    bisected,
    blocks_of,
    chosen_rows,
    decides,
    listed_sources,
    lists_text,
    made_lists,
    row_window,
    seeds_note,
    spread_windows,
)
from sim.errors import ConfigError
from tests.agents.helpers import run_module

ROOMY = "roomy/published"


@pytest.fixture(scope="module")
def setting() -> ServeSetting:
    return ServeSetting(**scenario_kwargs(ROOMY))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_bisection_finds_the_rate_of_a_share(share: float) -> None:
    tried = []

    def attained(rate: float) -> float:
        tried.append(rate)
        return 1.0 / (1.0 + rate**2)

    found = bisected(attained, share, 0.1, 64.0)
    assert found == pytest.approx(math.sqrt(1.0 / share - 1.0), rel=0.03)
    assert max(tried) <= 4.0 * found  # heavy loads, which are slow to play, are not tried


def test_a_share_that_is_attained_at_any_rate_gives_the_highest() -> None:
    assert bisected(lambda _: 1.0, 0.6, 0.1, 3.0) == 3.0


def test_probes_spread_over_the_part_and_the_budgets(setting: ServeSetting) -> None:
    begin_s, end_s = setting.windows.span_s("gamma", "test")
    windows = spread_windows(setting, "gamma", "test", 2.0, memory_of(ROOMY))
    assert windows[0].start_s == begin_s
    assert windows[-1].start_s == pytest.approx(end_s - 240.0)
    assert {window.budget for window in windows} == set(setting.windows.budgets)
    without = spread_windows(setting, "gamma", "test", 2.0, memory_of("tight/none"))
    assert {window.budget for window in without} == {"full"}


def test_a_window_that_every_plan_serves_completely_is_replaced(setting: ServeSetting) -> None:
    rates = [2.4, 1.5, 0.01]  # at the last, all is served in time
    blocks = blocks_of(setting, "gamma", "test", 2.4)
    rows = chosen_rows(setting, "gamma", "test", ROOMY, rates, blocks)
    assert {row[1] for row in rows} <= {0, 1}
    assert len({row[4] for row in rows}) == len(rows)  # blocks of their own
    windows = [row_window(setting, "gamma", "test", ROOMY, rates, row) for row in rows]
    assert all(decides(setting, window) for window in windows)
    for window, row in zip(windows, rows, strict=True):
        begin_s, end_s = blocks[row[4]]
        assert begin_s - 0.001 <= window.start_s <= end_s - 120.0 * window.rate + 0.001


def test_scenarios_use_other_blocks_as_long_as_there_are_some(
    setting: ServeSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.evaluation.windows.decides", lambda *_: True)
    blocks = blocks_of(setting, "gamma", "test", 0.7)
    assert len(blocks) > 200
    rates, used = [0.7, 0.65, 0.6], []
    for scenario in SCENARIOS[:2]:
        used += [row[4] for row in chosen_rows(setting, "gamma", "test", scenario, rates, blocks)][:10]
    assert len(set(used)) == 20


def test_a_new_claim_draws_windows_that_none_had_before(setting: ServeSetting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.evaluation.windows.decides", lambda *_: True)
    blocks, rates = blocks_of(setting, "gamma", "test", 0.7), [0.7, 0.65, 0.6]
    drawn: list[set[tuple[float, int]]] = []
    for first in (0, 500):
        monkeypatch.setattr("agents.evaluation.windows.first_place", lambda _, first=first: first)
        rows = [row for name in SCENARIOS for row in chosen_rows(setting, "gamma", "test", name, rates, blocks)]
        drawn.append({(row[0], row[3]) for row in rows})
    before, after = drawn
    assert not {start_s for start_s, _ in before} & {start_s for start_s, _ in after}
    assert not {seed for _, seed in before} & {seed for _, seed in after}


def test_a_list_beyond_the_budget_seeds_says_that_courses_of_memory_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, end = serve_split()["budget_seeds"]["test"]
    last = end - begin - len(SCENARIOS) * ENOUGH_BLOCKS  # where a list uses the last of them
    for first, repeats in ((0, False), (1500, False), (last, False), (last + 1, True)):
        monkeypatch.setattr("agents.evaluation.windows.first_place", lambda _, first=first: first)
        assert (seeds_note("test") is not None) == repeats


@pytest.mark.skipif(not sources_with("test")[0].count("burstgpt"), reason="needs published traces: set RAP_LAB_DATA")
def test_a_source_that_repeats_one_piece_has_one_block(setting: ServeSetting) -> None:
    assert len(blocks_of(setting, "burstgpt", "test", 20.0)) == 1


def test_a_trace_made_of_others_is_no_test_trace_next_to_them() -> None:
    assert "burst" in listed_sources("validation")
    assert "burst" not in listed_sources("test")


def test_a_lower_rate_lets_the_reference_serve_more(setting: ServeSetting) -> None:
    windows = [spread_windows(setting, "mmpp", "test", rate, memory_of(ROOMY))[4] for rate in (0.3, 3.0)]
    calm, busy = (reference_attainment(setting, window) for window in windows)
    assert calm is not None
    assert busy is not None
    assert calm > busy


def test_a_part_of_the_lists_does_not_replace_all_of_them() -> None:
    before = FILE.read_bytes()
    made = run_module("agents.windows", "sources=[gamma]")
    assert made.returncode == 2
    assert "make a part of the lists of serve_windows.json; set out=FILE.json for it" in made.stderr
    assert FILE.read_bytes() == before


def test_a_source_without_windows_is_named_next_to_those_that_have_some() -> None:
    with pytest.raises(ConfigError, match=r"'gama' has no validation or test windows; did you mean 'gamma'\? allowed"):
        made_lists(["gama", "mmpp"], None)
    with pytest.raises(ConfigError, match=r"sources is \[\]; name at least one"):
        made_lists([], None)


def test_the_file_has_a_line_for_each_source_and_reads_back() -> None:
    content = {"server": ["a"], "rates": {"test": {ROOMY: {"x": [1.0, 0.5, 0.1], "y": [2.0, 1.0, 0.5]}}}}
    text = lists_text(content)
    assert json.loads(text) == content
    assert '    "x": [1.0, 0.5, 0.1],\n    "y": [2.0, 1.0, 0.5]\n' in text
    assert len(SHARES) == 3
