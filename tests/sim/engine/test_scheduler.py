"""Batches, decision by decision, against the rules of the published engines (table of sim/engine/scheduler.py)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.engine.scheduler import Batch, Limits, by_value, form_batch
from sim.errors import ConfigError

BLOCK_TOKENS = 4


@dataclass(eq=False)
class Row:
    """A request as a scheduler sees it."""

    target_tokens: int
    computed_tokens: int = 0
    held_layer_blocks: int = 0
    swapped: bool = False


def layer_blocks(_: Row, tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def run(row_tokens: int, computed: int) -> Row:
    return Row(row_tokens, computed, layer_blocks(Row(0), computed))


def chunked(waiting: list[Row], running: list[Row], free: int, **limits: object) -> Batch[Row]:
    return form_batch("chunked", waiting, running, free, layer_blocks, Limits(**limits))  # type: ignore[arg-type]


def prefill_first(waiting: list[Row], running: list[Row], free: int, **limits: object) -> Batch[Row]:
    return form_batch("prefill_first", waiting, running, free, layer_blocks, Limits(**limits))  # type: ignore[arg-type]


def test_chunked_gives_running_requests_their_tokens_before_waiting_ones() -> None:
    decode, prompt = run(9, 8), Row(100)
    batch = chunked([prompt], [decode], 100, max_batch_tokens=10)
    assert batch.scheduled == ((decode, 1), (prompt, 9))
    assert batch.admitted == (prompt,)


def test_chunked_continues_a_cut_prompt_in_the_next_iteration() -> None:
    cut = run(100, 9)
    assert chunked([], [cut], 100, max_batch_tokens=64).scheduled == ((cut, 64),)


def test_a_long_prompt_takes_at_most_its_threshold_of_one_iteration() -> None:
    long, short = Row(100), Row(5)
    batch = chunked([long, short], [], 100, max_batch_tokens=64, long_prefill_tokens=20)
    assert batch.scheduled == ((long, 20), (short, 5))


def test_admission_stops_at_the_first_waiting_request_that_does_not_fit() -> None:
    big, small = Row(40), Row(4)
    assert chunked([big, small], [], 5).scheduled == ()


def test_the_most_valuable_request_has_waited_longest_for_each_kv_block() -> None:
    long, short, new, other = Row(40), Row(8), Row(4), Row(7)
    order = by_value([long, short, new, other], [6.0, 2.0, 0.5, 2.0], BLOCK_TOKENS)
    assert order == [short, other, long, new]  # 2 / 2, 2 / 2, 6 / 10, 0.5 / 1
    assert by_value([long, short], [11.0, 2.0], BLOCK_TOKENS) == [long, short]  # its turn comes
    assert by_value([long, short], [0.0, 0.0], BLOCK_TOKENS) == [long, short]
    assert by_value(list[Row](), [], BLOCK_TOKENS) == []


def test_a_full_prompt_must_fit_before_its_first_chunk_is_admitted() -> None:
    prompt = Row(40)
    assert chunked([prompt], [], 5, max_batch_tokens=8).admitted == ()
    other = run(9, 8)
    batch = chunked([prompt], [other], 5, max_batch_tokens=8, reserve_full_prompt=False)
    assert batch.scheduled == ((other, 1), (prompt, 7))


def test_a_prompt_that_would_be_alone_must_fit_in_full() -> None:
    """Otherwise it would fill the pool, preempt itself and start over forever."""
    prompt = Row(40)
    assert chunked([prompt], [], 5, max_batch_tokens=8, reserve_full_prompt=False).admitted == ()
    assert chunked([prompt], [], 10, max_batch_tokens=8, reserve_full_prompt=False).scheduled == ((prompt, 8),)


def test_the_newest_request_is_preempted_when_an_older_one_needs_a_kv_block() -> None:
    old, middle, newest = run(9, 8), run(7, 6), run(6, 5)
    batch = chunked([Row(1)], [old, middle, newest], 0)
    assert batch.preempted == (newest,)
    assert batch.scheduled == ((old, 1), (middle, 1))
    assert batch.admitted == (), "no admission in an iteration that preempted"


def test_a_request_that_is_itself_the_newest_preempts_itself() -> None:
    old, newest = run(6, 5), run(9, 8)
    batch = chunked([], [old, newest], 0)
    assert batch.preempted == (newest,)
    assert batch.scheduled == ((old, 1),)


def test_a_pool_that_shrank_below_its_use_is_brought_back_first() -> None:
    old, newest = run(6, 5), run(6, 5)
    assert chunked([], [old, newest], -2).preempted == (newest,)


def test_no_more_than_max_running_requests_hold_kv() -> None:
    rows = [Row(1) for _ in range(5)]
    assert len(chunked(rows, [run(2, 1)], 100, max_running=3).admitted) == 2


def test_a_watermark_is_left_free_by_admissions_and_used_by_running_requests() -> None:
    assert chunked([Row(16)], [], 5, watermark_layer_blocks=2).admitted == ()
    assert chunked([], [run(9, 8)], 1, watermark_layer_blocks=2).scheduled != ()


def test_prefill_first_lets_decodes_wait_while_a_prompt_can_be_admitted() -> None:
    decode, prompt = run(9, 8), Row(10)
    batch = prefill_first([prompt], [decode], 100)
    assert batch.scheduled == ((prompt, 10),)


def test_prefill_first_decodes_all_running_when_no_prompt_fits() -> None:
    a, b = run(9, 8), run(6, 5)
    batch = prefill_first([Row(4000)], [a, b], 100)
    assert batch.scheduled == ((a, 1), (b, 1))


def test_prefill_first_takes_full_prompts_up_to_the_token_budget() -> None:
    a, b, c = Row(30), Row(30), Row(30)
    assert prefill_first([a, b, c], [], 100, max_batch_tokens=64).admitted == (a, b)


def test_prefill_first_runs_a_prompt_above_the_token_budget_alone() -> None:
    a, b = Row(100), Row(3)
    assert prefill_first([a, b], [], 100, max_batch_tokens=64).scheduled == ((a, 100),)


def test_an_unknown_scheduler_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'chunked'"):
        form_batch("chunkd", [], [], 0, layer_blocks, Limits())  # type: ignore[arg-type]


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_batch_tokens is 0"):
        Limits(max_batch_tokens=0)


@given(
    name=st.sampled_from(["chunked", "prefill_first"]),
    waiting=st.lists(st.integers(1, 60), max_size=6),
    running=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 59)), max_size=8),
    free=st.integers(-20, 60),
    max_batch_tokens=st.integers(8, 80),
    max_running=st.integers(1, 8),
    threshold=st.integers(0, 30),
)
def test_every_batch_keeps_to_its_limits(
    name: str,
    waiting: list[int],
    running: list[tuple[int, int]],
    free: int,
    max_batch_tokens: int,
    max_running: int,
    threshold: int,
) -> None:
    running_rows = [run(max(target, computed + 1), computed) for target, computed in running]
    waiting_rows = [Row(target) for target in waiting]
    limits = Limits(max_batch_tokens=max_batch_tokens, max_running=max_running, long_prefill_tokens=threshold)
    batch = form_batch(name, waiting_rows, running_rows, free, layer_blocks, limits)  # type: ignore[arg-type]
    rows = [row for row, _ in batch.scheduled]
    assert len({id(row) for row in rows}) == len(rows), "no request twice"
    assert not {id(r) for r in rows} & {id(r) for r in batch.preempted}, "no request both runs and is preempted"
    assert list(batch.admitted) == waiting_rows[: len(batch.admitted)], "first come, first served"
    assert list(batch.preempted) == running_rows[::-1][: len(batch.preempted)], "newest first"
    for row, tokens in batch.scheduled:
        assert 1 <= tokens <= row.target_tokens - row.computed_tokens
    if name == "chunked":
        assert sum(tokens for _, tokens in batch.scheduled) <= max_batch_tokens
    freed = sum(row.held_layer_blocks for row in batch.preempted)
    taken = sum(layer_blocks(r, r.computed_tokens + t) - r.held_layer_blocks for r, t in batch.scheduled)
    if free + freed >= 0:
        assert taken <= free + freed, "KV blocks that no request holds"
    if batch.admitted:
        assert len(running_rows) + len(batch.admitted) <= max_running
