"""A wrong description is named, with the key to change, before anything is fitted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hw.fit.diagnosis import diagnose, find_period, find_steps, find_warm_up
from hw.fit.fitting import Case
from hw.fit.regression import costs, decoding, prompts_in
from hw.fit.server import Server, simulate
from hw.fit.settings_tried import other_settings, sentences_of, try_settings
from sim.cost.memory import budget_for_kv_blocks
from sim.engine.budget import constant_budget
from sim.errors import ConfigError
from sim.results.records import Moments
from tests.hw.fit.truth import a_server, requests, served

FREE = ("front_s", "memory_bound", "compute_bound")


def said(described: Server, real: Server, *, rate_rps: float = 8.0, prompt: float = 1500.0, **values: float) -> str:
    """Return what is said of the run of a server that another one was described as; prices are 10 to 30 % off too."""
    wanted = requests(count=200, rate_rps=rate_rps, prompt=prompt, distinct=real.prompts.distinct)
    run = served(real, wanted, **({"front_s": 0.008, "memory_bound": 1.1, "compute_bound": 1.2} | values))
    found = diagnose(run, described)
    present, tried = try_settings(Case(run=run, server=described, first=found.warm_up), found, FREE)
    return " ".join([*found.sentences, *sentences_of(present, tried)])


def test_sharing_that_is_not_described_is_named_with_its_period() -> None:
    real = a_server(schedules_ahead=True, prefix_caching=True, distinct=50)
    text = said(a_server(schedules_ahead=True), real)
    assert "engine.prefix_caching=true distinct_prompts=50" in text
    assert "another setting explains the run better" in text


def test_sharing_that_the_server_does_not_have_is_named() -> None:
    described = a_server(schedules_ahead=True, prefix_caching=True, distinct=50)
    assert "engine.prefix_caching=false" in said(described, a_server(schedules_ahead=True))


@pytest.mark.parametrize(
    ("changes", "rate", "says"),
    [
        ({"schedules_ahead": True, "max_running": 32}, 20.0, "engine.limits.max_running=32"),
        ({"schedules_ahead": True, "max_batch_tokens": 512}, 12.0, "engine.limits.max_batch_tokens=512"),
        ({"scheduler": "prefill_first"}, 12.0, "engine.scheduler=prefill_first"),
    ],
)
def test_another_limit_or_scheduler_is_named(changes: dict[str, object], rate: float, says: str) -> None:
    assert says in said(a_server(schedules_ahead=True), a_server(**changes), rate_rps=rate)


def test_prompts_in_smaller_pieces_are_not_taken_for_cached_ones() -> None:
    real, described = (a_server(schedules_ahead=True, max_batch_tokens=tokens) for tokens in (256, 8192))
    text = said(described, real, compute_bound=1.0, memory_bound=1.0)
    assert "a prompt that comes in costs the others" in text
    assert "engine.limits.max_batch_tokens" in text
    assert "prefix_caching" not in text


def test_requests_that_wait_for_kv_blocks_are_not_taken_for_cached_or_cut_ones() -> None:
    described = a_server(schedules_ahead=True)
    bytes_ = budget_for_kv_blocks(described.spec.model, described.plan, 600, described.spec.workspace_bytes, 16)
    text = said(described, replace(described, budget=constant_budget(bytes_)), rate_rps=12.0, noise=0.1)
    assert "unit" not in text
    assert "budget=kv_blocks" in text
    assert "prefix_caching" not in text
    assert "max_batch_tokens" not in text


def test_a_server_that_can_take_no_request_is_one_line() -> None:
    run = served(a_server(), requests(count=20))
    with pytest.raises(ConfigError, match="no request of truth fits"):
        diagnose(replace(run, prompt_tokens=run.prompt_tokens + 10**7), a_server())


def test_a_right_description_that_swaps_is_not_tried_with_what_swapping_excludes() -> None:
    server = a_server(scheduler="prefill_first", preemption="swap", host_kv_blocks=512)
    bytes_ = budget_for_kv_blocks(server.spec.model, server.plan, 900, server.spec.workspace_bytes, 16)
    server = replace(server, budget=constant_budget(bytes_))
    run = served(server, requests(count=60))
    tried = dict(other_settings(diagnose(run, server), server))
    assert "engine.scheduler=chunked" in tried
    assert not any("prefix_caching" in keys for keys in tried)


def test_the_first_round_of_prompts_that_a_cache_holds_is_no_warm_up() -> None:
    """Prompts that share only their beginnings show no period of lengths."""
    real, described = a_server(prefix_caching=True, distinct=40), a_server()
    run = served(real, requests(count=300, prompt=3000.0))
    found = diagnose(run, described)
    assert found.period is None
    assert "engine.prefix_caching=true" in " ".join(found.sentences)
    assert found.warm_up == 0


def test_a_right_description_is_not_blamed() -> None:
    server = a_server(schedules_ahead=True)
    assert said(server, server) == ""


def test_more_requests_at_once_than_the_described_limit_allows_are_named() -> None:
    described = a_server(schedules_ahead=True, max_running=8)
    assert "engine.limits.max_running allows 8" in said(described, a_server(schedules_ahead=True))


def test_a_warm_up_is_found_and_named() -> None:
    server = a_server(schedules_ahead=True)
    run = served(server, requests(), slow_first=6)
    found = diagnose(run, server)
    assert 5 <= found.warm_up <= 8
    assert "warming up" in " ".join(found.sentences)
    steady = served(server, requests())
    assert find_warm_up(steady, simulate(server, steady)) == (0, None)


def test_times_in_another_unit_are_named() -> None:
    server = a_server()
    run = served(server, requests(count=50))
    slow = type(run)(
        **{n: getattr(run, n) for n in ("arrival_s", "prompt_tokens", "produced_tokens", "name", "source", "kind")},
        first_token_s=run.arrival_s + 1000 * run.ttft_s,
        finish_s=run.arrival_s + 1000 * run.e2e_s,
    )
    said = diagnose(slow, server).sentences
    assert "unit=ms" in said[0]
    assert len(said) == 1  # all others would follow from it


def test_the_period_of_prompt_lengths_is_found_and_chance_is_not_taken_for_one() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(100, 2000, size=60)
    assert find_period(np.tile(lengths, 5)) == 60
    assert find_period(random.integers(100, 2000, size=300)) is None
    assert find_period(np.full(300, 512)) is None
    assert find_period(np.tile([500, 500, 500, 501], 50)) is None  # hardly different from chance


def test_chunks_show_as_steps_of_ttft() -> None:
    random = np.random.default_rng(0)
    values = np.concatenate([random.normal(at, 0.01, size=100) for at in (1.0, 2.0, 3.0)])
    assert find_steps(values) == pytest.approx([1.0, 2.0, 3.0], rel=0.05)
    assert find_steps(values[:5]) == []


def test_the_regression_finds_the_three_costs_of_a_server_that_has_them() -> None:
    """Two requests overlap by hand: sequences that decode, and prompts that come in."""
    two = Moments(
        arrival_s=np.array([0.0, 1.0]),
        first_token_s=np.array([1.0, 2.0]),
        finish_s=np.array([5.0, 4.0]),
        prompt_tokens=np.array([10, 10]),
        produced_tokens=np.array([5, 3]),
    )
    assert decoding(two) == pytest.approx([1.5, 2.0])
    assert prompts_in(two).tolist() == [1.0, 0.0]
    run = served(a_server(), requests(rate_rps=10.0), noise=0.0)
    found = costs(run)
    assert found is not None
    alone_s = a_server().spec.priced().iteration_s(a_server().plan, [], 1, 700, 1)
    assert found.base_s == pytest.approx(alone_s, rel=0.10)
    assert found.prompt_s > 3 * found.error[2]


def test_prompts_with_equal_texts_are_found_in_the_cache_without_a_key() -> None:
    server = a_server(schedules_ahead=True, prefix_caching=True)
    wanted = replace(requests(count=60, distinct=6), prompts=np.arange(60) % 6)
    done = simulate(server, wanted)
    later = done.cached_tokens[30:]
    assert np.all(later >= wanted.prompt_tokens[30:] - 16)
    text = " ".join(diagnose(replace(served(server, wanted), prompts=wanted.prompts), a_server()).sentences)
    assert "only 6 of 60 prompts differ in their text" in text
