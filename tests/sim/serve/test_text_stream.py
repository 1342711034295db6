"""From tokens to text: characters stay in one piece, and nothing of a stop string is sent."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="the server needs transformers: pip install -e '.[hw]'")

from sim.serve.text_stream import Detokenizer, StopStrings


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def __call__(self, text: str, verbose: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=list(text.encode()))

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(tokens).decode(errors="replace")


def pieces(tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(Bytes())
    return [detokenizer.add(token, i == len(tokens) - 1) for i, token in enumerate(tokens)]


@given(st.text(min_size=1))
def test_the_pieces_add_up_to_the_text_and_none_splits_a_character(text: str) -> None:
    found = pieces(list(text.encode()))
    assert "".join(found) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)


@given(st.lists(st.integers(0, 255), min_size=1))
def test_bytes_that_are_no_text_are_written_as_the_tokenizer_writes_them(tokens: list[int]) -> None:
    assert "".join(pieces(tokens)) == bytes(tokens).decode(errors="replace")


def test_a_character_that_never_ends_is_written_at_the_end() -> None:
    assert pieces([0x61, 0xF0, 0x9F]) == ["a", "", "\ufffd"]


def send(stops: list[str], parts: list[str]) -> tuple[str, bool, list[str]]:
    """Return the text sent, whether a stop string was found, and the pieces."""
    finder, sent = StopStrings(stops), []
    for i, part in enumerate(parts):
        text, stopped = finder.add(part, i == len(parts) - 1)
        sent.append(text)
        if stopped:
            return "".join(sent), True, sent
    return "".join(sent), False, sent


@pytest.mark.parametrize(
    ("stops", "parts", "sent", "stopped"),
    [
        (["stop"], ["no end"], "no end", False),
        (["stop"], ["a s", "t", "op b"], "a ", True),
        (["stop"], ["a s", "t", "ay"], "a stay", False),
        (["stop"], ["a sto"], "a sto", False),
        (["aab"], ["aa", "ab"], "a", True),
        (["b", "abc"], ["a", "bc"], "", True),
        (["x\n\n", "\n"], ["one", "\n", "two"], "one", True),
        (["é"], ["caf", "é", "!"], "caf", True),
        ([], ["a", "b"], "ab", False),
    ],
)
def test_a_text_ends_before_the_first_stop_string(stops: list[str], parts: list[str], sent: str, stopped: bool) -> None:
    assert send(stops, parts)[:2] == (sent, stopped)


@given(
    stops=st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=4), max_size=3),
    parts=st.lists(st.text(st.sampled_from("abc"), max_size=3), min_size=1, max_size=12),
)
def test_however_a_text_is_cut_it_ends_before_the_first_stop_string(stops: list[str], parts: list[str]) -> None:
    text = ""
    for part in parts:  # a longer stop string may begin earlier, but ends later: the one that is complete first counts
        text += part
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            assert send(stops, parts)[:2] == (text[: min(found)], True)
            return
    assert send(stops, parts)[:2] == (text, False)


@given(
    stop=st.text(st.sampled_from("ab"), min_size=1, max_size=4),
    parts=st.lists(st.text(st.sampled_from("abc"), max_size=3), min_size=1, max_size=12),
)
def test_what_is_held_back_is_the_beginning_of_a_stop_string_alone(stop: str, parts: list[str]) -> None:
    finder, text, sent = StopStrings([stop]), "", ""
    for part in parts:
        text += part
        piece, stopped = finder.add(part, False)
        sent += piece
        if stopped:
            return
        assert stop.startswith(text[len(sent) :])
