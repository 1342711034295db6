"""Token times from the events of a stream: what counts as a token, and when it came."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hw.client.stream import AnswerStream, StreamError, Timeline, read_stream
from tests.hw.client.mock_server import DONE, chat, text, usage

ONES = (1,) * 12


def read(*events: tuple[float, Any], requested: int = 12) -> Timeline:
    """Read events (time_s, content)."""
    return read_stream([(s, c if isinstance(c, str) else json.dumps(c)) for s, c in events], requested)


def tokens(count: int = 12, start_s: float = 0.1, **more: Any) -> list[tuple[float, Any]]:
    """Return pieces of one token, one every 50 ms."""
    return [(start_s + 0.05 * i, text("a", **more)) for i in range(count)]


def times(start_s: float = 0.1) -> tuple[float, ...]:
    return tuple(start_s + 0.05 * i for i in range(12))


END: list[tuple[float, Any]] = [(0.7, usage(5, 12)), (0.7, DONE)]


def test_every_piece_of_one_token_counts_and_the_counts_of_usage_are_kept() -> None:
    line = read(*tokens(), *END)
    assert line == Timeline(times(), ONES, 5, 12, True)
    assert sum(count for _, count in line.gaps()) == 11


@pytest.mark.parametrize(
    "keys",
    [
        ("reasoning_content",),
        ("reasoning",),
        ("content",),
        ("tool_calls",),
        ("function_call",),
        ("refusal",),
        ("reasoning", "reasoning_content"),
        ("reasoning_details",),
        ("reasoning", "reasoning_details"),
        ("thinking",),
        ("audio",),
    ],
)
def test_reasoning_and_tool_calls_are_tokens_too(keys: tuple[str, ...]) -> None:
    brought: Any = [{"index": 0, "function": {"arguments": '{"a'}}] if keys == ("tool_calls",) else "hm "
    pieces = [(0.1 + 0.05 * i, chat(dict.fromkeys(keys, brought))) for i in range(10)]
    pieces += [(0.6, chat({"content": "a", "reasoning_content": None})), (0.65, chat({"content": "b"}))]
    role = (0.05, chat({"role": "assistant", "content": ""}))
    line = read(role, *pieces, (0.7, chat({}, "length")), *END)
    assert line.piece_s == pytest.approx(times())
    assert line.piece_tokens == ONES


def with_reasoning(tokens: int, reasoning: int) -> dict[str, Any]:
    counted = usage(5, tokens)
    return counted | {"usage": counted["usage"] | {"completion_tokens_details": {"reasoning_tokens": reasoning}}}


def test_reasoning_that_is_counted_and_hidden_is_no_token_between_those_that_come() -> None:
    hidden = read(*tokens(), (0.7, text("", finish_reason="stop")), (0.7, with_reasoning(212, 200)), (0.7, DONE))
    assert hidden == Timeline(times(), ONES, 5, 12, True)
    grouped = read((0.1, text("abcd")), (0.3, text("abcd")), (0.7, with_reasoning(208, 200)), (0.7, DONE))
    assert grouped.piece_tokens == (4, 4)


def test_reasoning_that_is_shown_counts_once() -> None:
    pieces = [(0.1 + 0.05 * i, chat({"reasoning": "a"} if i < 5 else {"content": "a"})) for i in range(12)]
    shown = read(*pieces, (0.7, chat({}, "stop")), (0.7, with_reasoning(12, 5)), (0.7, DONE))
    assert (shown.tokens, shown.piece_tokens) == (12, ONES)
    as_content = read(*tokens(), (0.7, with_reasoning(12, 5)), (0.7, DONE))
    assert (as_content.tokens, as_content.piece_tokens) == (12, ONES)


def test_the_count_of_groq_is_a_count() -> None:
    line = read(*tokens(), (0.7, {**text("", finish_reason="stop"), "x_groq": usage(5, 12)}), (0.7, DONE))
    assert line == Timeline(times(), ONES, 5, 12, True)


def test_the_tokens_of_a_piece_share_the_gap_before_it() -> None:
    pieces = [(0.3, text("abcd")), (0.5, text("abcd")), (0.7, text("abcd"))]
    line = read(*pieces, *END)
    assert line.piece_tokens == (4, 4, 4)
    assert line.gaps() == [(pytest.approx(0.05), 4), (pytest.approx(0.05), 4)]
    assert line.per_token
    uneven = read((0.3, text("abcd" * 4)), (0.5, text("ab")), (0.7, text("abcd")), *END)
    assert uneven.piece_tokens == (7, 2, 3), "at least one each, the rest by length"


def test_without_counts_a_piece_is_one_token_and_gaps_are_between_pieces() -> None:
    line = read((0.3, text("abcd")), (0.5, text("abcd")), (0.7, text("abcd", "length")), (0.7, DONE))
    assert not line.per_token
    assert line.tokens == 3
    assert line.completion_tokens is None
    assert line.gaps() == [(pytest.approx(0.2), 1), (pytest.approx(0.2), 1)]


def test_usage_on_every_piece_says_how_many_tokens_each_one_has() -> None:
    counts = [1, 5, 6, 12]
    pieces = [(0.1 * i, text("xyz", usage={"prompt_tokens": 5, "completion_tokens": n})) for i, n in enumerate(counts)]
    for end in (END, END[1:]):
        line = read((0.0, chat({"role": "assistant"}, usage=usage(5, 0)["usage"])), *pieces, *end)
        assert line.piece_tokens == (1, 4, 1, 6)
        assert (line.tokens, line.prompt_tokens, line.per_token) == (12, 5, True)


@pytest.mark.parametrize(
    "partial",
    [
        {"prompt_tokens": 5},
        {"prompt_tokens": 5, "completion_tokens": None},
        {"prompt_tokens": 5, "completion_tokens": 0},
        {"completion_tokens": 1},
        {},
        None,
        [],
        "none yet",
    ],
)
def test_counts_that_are_missing_or_partial_before_the_end_do_no_harm(partial: Any) -> None:
    line = read(*tokens(usage=partial), *END)
    assert line == Timeline(times(), ONES, 5, 12, True)
    alone = read(*tokens(usage=partial), (0.7, DONE))
    assert (alone.piece_s, alone.tokens) == (times(), 12)


@pytest.mark.parametrize("count", [-1, 0, True, "12", 1.5, 1e30, None, [12], float("nan")])
def test_counts_that_cannot_be_are_as_if_none_were_sent(count: Any) -> None:
    line = read(*tokens(), (0.7, usage(count, count)), (0.7, DONE))
    assert (line.prompt_tokens, line.completion_tokens, line.tokens) == (None, None, 12)


@pytest.mark.parametrize(
    "extra",
    [
        "null",
        "{}",
        "[]",
        "  ",
        '{"choices": null}',
        '{"object": null, "choices": []}',
        '{"choices": [null]}',
        '{"choices": [{}]}',
        '{"choices": [{"index": 0, "delta": null, "finish_reason": null}]}',
        '{"choices": [{"index": 0, "delta": {}, "finish_reason": ""}]}',
        '{"choices": [], "prompt_filter_results": [{}]}',
        '{"error": null, "choices": []}',
        '{"id": "x", "unknown": [1, 2]}',
    ],
)
@pytest.mark.parametrize("counted", [True, False])
def test_an_event_without_a_piece_is_no_token_wherever_it_stands(extra: str, counted: bool) -> None:
    end = END if counted else [(0.7, text("", "length")), (0.7, DONE)]
    for at in (0, 6, 12):
        pieces = tokens()
        pieces.insert(at, (0.09, extra))
        line = read(*pieces, *end)
        assert (line.piece_s, line.piece_tokens, line.tokens) == (times(), ONES, 12)


def test_an_empty_first_piece_is_no_token() -> None:
    for end in (END, [(0.7, text("", "stop")), (0.7, DONE)]):
        assert read((0.1, text("")), *tokens(start_s=1.1), *end).piece_s == times(1.1)


def test_an_end_in_a_piece_of_its_own_is_no_token_unless_the_count_says_so() -> None:
    assert read(*tokens(), (1.2, text("", "length")), (1.2, DONE)).piece_s == times()
    assert read(*tokens(), (1.2, text("", "length")), (1.2, usage(5, 12)), (1.2, DONE)).piece_s == times()
    stopped = read(*tokens(), (0.7, chat({}, "stop")), (0.7, usage(5, 13)), (0.7, DONE))
    assert stopped.piece_s == (*times(), 0.7), "the end-of-text token"


def test_empty_pieces_are_tokens_if_their_number_is_that_of_the_missing_ones() -> None:
    pieces = tokens()
    for at in (0, 4, 11):  # a special token, a part of a character, the end-of-text token
        pieces[at] = (pieces[at][0], text("", "stop" if at == 11 else None))
    assert read(*pieces, *END).piece_s == times()
    role = (0.05, chat({"role": "assistant", "content": ""}))
    assert read(role, *tokens(), (0.7, usage(5, 13)), (0.7, DONE)).piece_s == (0.05, *times())


def test_an_answer_without_any_text_has_the_tokens_that_are_counted() -> None:
    special = [(0.1 + 0.05 * i, text("", "length" if i == 11 else None)) for i in range(12)]
    assert read(*special, *END).piece_s == times()
    assert read(*special, (0.7, DONE)).piece_s == times()
    only_end = read((0.1, chat({"role": "assistant", "content": ""})), (0.3, chat({}, "stop")), (0.3, DONE))
    assert (only_end.piece_s, only_end.tokens) == ((0.3,), 1)


def test_more_pieces_than_tokens_keep_the_count_but_their_gaps_are_between_pieces() -> None:
    line = read(*tokens(), (0.7, usage(5, 8)), (0.7, DONE))
    assert (line.tokens, line.per_token, len(line.piece_s)) == (8, False, 12)


def test_an_end_on_an_earlier_piece_does_not_end_the_answer() -> None:
    pieces = tokens()
    pieces[6] = (pieces[6][0], text("a", "length"))
    assert read(*pieces, *END).piece_s == times()


def test_nothing_after_done_counts() -> None:
    assert read(*tokens(), *END, (9.0, text("a")), (9.0, "{nonsense")).piece_s == times()


@pytest.mark.parametrize(
    "end",
    [
        [(0.7, DONE)],
        [(0.7, " [DONE] ")],
        [(0.7, usage(5, 5))],
        [(0.7, text("", "stop"))],
        [(0.7, chat({}, "length")), (0.8, usage(5, 5))],
    ],
)
def test_an_answer_is_complete_once_anything_marks_its_end(end: list[tuple[float, Any]]) -> None:
    assert read(*tokens(5), *end).tokens == 5


def test_an_answer_is_complete_with_the_requested_tokens_and_otherwise_cut() -> None:
    assert read(*tokens()).tokens == 12
    with pytest.raises(StreamError, match="cut in the middle"):
        read(*tokens(11))
    counted = [(s, text("a", usage=usage(5, i + 1)["usage"])) for i, (s, _) in enumerate(tokens(5))]
    with pytest.raises(StreamError, match="cut in the middle"):
        read(*counted)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ('{"error": {"message": "EngineCore died", "code": 500}}', "EngineCore died"),
        ('{"error": "no memory"}', "no memory"),
        ('{"error": {"message": "\\ud83d"}}', "ended the answer with an error"),
        ('{"error": {"code": 3}, "choices": []}', '{"code": 3}'),
        ('{"choices": [{"text": "", "finish_reason": "abort"}]}', "finish_reason 'abort'"),
        ('{"object": "error", "message": "EngineCore died", "code": 500}', "EngineCore died"),
        ('{"text": "NETWORK ERROR", "error_code": 50001}', "NETWORK ERROR"),
        ('{"detail": "overloaded"}', "overloaded"),
        ('{"message": "overloaded", "choices": []}', "overloaded"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a": 1' + "0" * 5000 + "}", "not JSON"),
        ("[3]", "not a JSON object"),
        ("3", "not a JSON object"),
        ('"text"', "not a JSON object"),
        ('{"choices": [3]}', "not a list of objects"),
        ('{"choices": {"text": "a"}}', "not a list of objects"),
        ('{"choices": "abc"}', "not a list of objects"),
    ],
)
def test_an_error_or_nonsense_in_the_stream_is_named(event: str, message: str) -> None:
    with pytest.raises(StreamError, match="(?s)" + message.replace("{", r"\{")):
        read(*tokens(2), (0.2, event), *END)


def test_an_event_named_error_is_an_error_whatever_it_holds() -> None:
    with pytest.raises(StreamError, match="overloaded"):
        AnswerStream().add(0.1, '{"message": "overloaded"}', kind="error")


@pytest.mark.parametrize("events", [[], [(0.1, DONE)], [(0.1, chat({"role": "assistant"})), (0.1, DONE)], [END[0]]])
def test_an_answer_without_tokens_has_failed(events: list[tuple[float, Any]]) -> None:
    with pytest.raises(StreamError, match="no token"):
        read(*events)


@pytest.mark.parametrize("value", [None, [], {}, 0, "x", [1], {"a": 1}, True, 1e308, "\ud83d"])
@pytest.mark.parametrize("key", ["text", "delta", "finish_reason", "logprobs", "index"])
def test_any_value_of_any_field_is_a_timeline_or_a_named_error(key: str, value: Any) -> None:
    for content in ({"choices": [{key: value}]}, {"choices": [{"delta": {"content": value, key: value}}]}):
        try:
            line = read(*tokens(), (0.7, content), *END)
        except StreamError:
            continue
        assert len(line.piece_s) in (12, 13)
