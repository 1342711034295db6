"""Tokens without a tokenizer: how those of a text are counted, and the words of answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.serve.filler import END, WORDS, FillerTokenizer, answer_key, filler_token, hash_ids

VOCABULARY = 32_000


def tokens(text: str) -> list[int]:
    return FillerTokenizer(VOCABULARY)(text).input_ids


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("The lighthouse", 3),
        ("Hello, world!", 4),
        ("a  b", 3),
        ("x" * 17, 3),
        ("\n\n", 1),
        ("日本", 2),
        ("\ud800", 1),
    ],
)
def test_a_token_is_up_to_eight_letters_or_a_sign_or_a_run_of_white_space(text: str, count: int) -> None:
    assert len(tokens(text)) == count


@given(st.text(min_size=1))
def test_every_text_has_tokens_and_no_more_than_characters(text: str) -> None:
    assert 1 <= len(tokens(text)) <= len(text)
    assert all(END < token < VOCABULARY for token in tokens(text))


@given(st.lists(st.integers(1, len(WORDS)), min_size=1))
def test_an_answer_that_comes_back_has_the_tokens_that_were_produced(answer: list[int]) -> None:
    tokenizer = FillerTokenizer(VOCABULARY)
    assert tokens(tokenizer.decode([*answer, END])) == answer


def test_answers_depend_on_the_prompt_and_the_seed_alone() -> None:
    def answer(prompt: list[int], *seed: int) -> list[int]:
        return [filler_token(answer_key(prompt, seed), index) for index in range(200)]

    assert answer([1, 2], 0) == answer([1, 2], 0)
    assert len({tuple(answer(*which)) for which in (([1, 2], 0), ([1, 2], 1), ([2, 1], 0), ([1, 2, 0], 0))}) == 4
    assert len(set(answer([1, 2], 0))) > len(WORDS) / 2


@given(st.lists(st.integers(0, 9), max_size=40), st.lists(st.integers(0, 9), max_size=40))
def test_prompts_share_the_ids_of_the_full_blocks_that_they_begin_with_alike(one: list[int], other: list[int]) -> None:
    found, others = hash_ids(one, 4), hash_ids(other, 4)
    assert len(found) == len(one) // 4
    assert len(set(found)) == len(found)
    for block, (mine, theirs) in enumerate(zip(found, others, strict=False)):
        assert (mine == theirs) == (one[: 4 * block + 4] == other[: 4 * block + 4])
