"""Turns of sessions with delays: where they arrive, and what is said about it."""

from __future__ import annotations

import json
import math

import pytest

from sim.errors import TraceError
from sim.traces.readers.aiperf import read_aiperf
from sim.traces.readers.mooncake import read_mooncake
from sim.traces.readers.qwen_bailian import read_qwen_bailian

NAN = math.nan


def write(tmp_path, *rows):
    path = tmp_path / "turns.jsonl"
    path.write_text("".join(json.dumps({"input_length": 9, "output_length": 4, **row}) + "\n" for row in rows))
    return path


def turn(session, **row):
    return {"session_id": session, **row}


@pytest.mark.parametrize("read", [read_mooncake, read_aiperf])
def test_a_turn_with_a_delay_follows_the_turn_before_it(tmp_path, read):
    path = write(
        tmp_path,
        turn("a", timestamp=1000, input_length=1),
        turn("a", delay=500, input_length=2),
        turn("a", delay=2500, input_length=5),
        turn("b", timestamp=1200, input_length=3),
        turn("b", input_length=4),  # no delay: at once
        {"timestamp": 1600, "input_length": 6},
    )
    trace = read(path)
    assert trace.arrival_s.tolist() == pytest.approx([0.0, 0.2, 0.2, 0.5, 0.6, 3.0])
    assert trace.prompt_tokens.tolist() == [1, 3, 4, 2, 6, 5]
    assert "3 later turns of sessions arrive their delay after the answer before them" in trace.history
    assert trace.session.tolist() == [0, 1, 1, 0, 2, 0]
    assert trace.think_s.tolist() == pytest.approx([NAN, NAN, 0.0, 0.5, NAN, 2.5], nan_ok=True)


def test_turns_with_times_of_their_own_keep_them_without_a_warning(tmp_path, caplog):
    path = write(tmp_path, turn(1, timestamp=0), turn(1, timestamp=700, delay=100), turn(2, timestamp=800))
    trace = read_mooncake(path)
    assert trace.arrival_s.tolist() == [0.0, 0.7, 0.8]
    assert trace.session is None
    assert not caplog.text


def test_the_ids_of_an_answer_are_those_of_the_prompt_that_holds_it(tmp_path):
    def sized(prompt, ids, **row):
        return turn("a", input_length=prompt, output_length=20, hash_ids=ids, **row)

    path = write(
        tmp_path,
        sized(20, [1, 2], timestamp=0),  # 40 tokens with the answer: block 2 is full then, and its id is that of turn 2
        sized(70, [1, 5, 6, 7, 9], delay=1),  # the next prompt is shorter than this one and its answer
        sized(80, [1, 5, 6, 7, 8], delay=1),  # the next prompt begins otherwise
        sized(200, list(range(20, 33)), delay=1),
    )
    ids = [row.tolist() for row in read_mooncake(path, block_tokens=16).hash_ids]
    assert ids == [[1, 5], [1, 5, 6, 7], [1, 5, 6, 7, 8], list(range(20, 32))]


def test_unix_times_and_units_hold_for_sessions_too(tmp_path):
    path = write(tmp_path, turn("a", timestamp=1_800_000_000), turn("a", delay=2))
    assert read_mooncake(path, time_unit="s").arrival_s.tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([turn("a", delay=5)], "line 1, column 'timestamp': missing value.*an earlier turn of the same session"),
        ([turn("a", timestamp=0), {"delay": 5}], "line 2, column 'timestamp': missing value"),
        ([turn("a", timestamp=9), turn("a", timestamp=3)], "line 2, column 'timestamp': before the turn ahead"),
        ([turn("a", timestamp=9), turn("a", delay=-3)], "line 2, column 'delay': negative"),
        ([turn("a", timestamp=9), turn("a", delay="x")], "line 2, column 'delay': not a number"),
    ],
)
def test_a_turn_without_a_place_in_time_is_a_bad_row(tmp_path, rows, message):
    path = write(tmp_path, *rows, turn("z", timestamp=20))
    with pytest.raises(TraceError, match=message):
        read_mooncake(path)
    assert any("skipped 1 bad row" in step for step in read_mooncake(path, on_bad_row="skip").history)


def test_the_turns_after_a_bad_one_have_no_place_in_time_either(tmp_path):
    path = write(tmp_path, turn("a", timestamp=0), turn("a", delay=1, output_length=0), turn("a", delay=1))
    trace = read_mooncake(path, on_bad_row="skip")
    assert len(trace) == 1
    assert sum("skipped 1 bad row" in step for step in trace.history) == 2


def chat(chat_id, parent, timestamp, prompt=20, output=12, **row):
    lengths = {"input_length": prompt, "output_length": output}
    return {"chat_id": chat_id, "parent_chat_id": parent, "timestamp": timestamp, **lengths, **row}


def qwen(tmp_path, *rows, **more):
    path = tmp_path / "qwen.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_qwen_bailian(path, **more)


def test_a_chat_follows_its_parent_after_the_time_between_them_less_that_of_the_answer(tmp_path):
    rows = (
        chat(5, -1, 10.0, hash_ids=[1, 2]),
        chat(6, 77, 11.0, hash_ids=[3, 4]),  # its parent is not in the file
        chat(7, 5, 14.0, prompt=40, hash_ids=[1, 8, 9]),
        chat(8, 5, 15.0, hash_ids=[1, 5]),  # the second child of its parent
        chat(9, 7, 14.5, prompt=60, hash_ids=[1, 8, 6, 7]),
    )
    recorded = qwen(tmp_path, *rows, sort=True)
    assert recorded.session is None
    trace = qwen(tmp_path, *rows, follow=True, recorded_tpot_s=0.25)
    # 12 tokens took 3 s: chat 7 thinks 4 - 3 s, and chat 9, which came 0.5 s after its parent, not at all.
    assert trace.prompt_tokens.tolist() == [20, 20, 40, 60, 20]
    assert trace.think_s.tolist() == pytest.approx([NAN, NAN, 1.0, 0.0, NAN], nan_ok=True)
    assert trace.arrival_s.tolist() == [0.0, 1.0, 1.0, 1.0, 5.0]
    assert trace.session[0] == trace.session[2] == trace.session[3]
    assert trace.hash_ids[0].tolist() == [1, 8], "its answer fills the second block of the prompt that follows"
    assert "2 chats follow the answer of their parent" in trace.history


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([chat(1, -1, 0.0), chat(1, -1, 1.0)], "line 2, column 'chat_id': repeated: '1'"),
        (
            [chat(1, -1, 5.0), chat(2, 3, 6.0), chat(3, -1, 7.0)],
            "line 2, column 'parent_chat_id': a parent",
        ),
        ([chat(1, 1, 5.0)], "line 1, column 'parent_chat_id': a parent that comes later: '1'"),
        ([{"timestamp": 0, "input_length": 1, "output_length": 1}], "chat_id"),
    ],
)
def test_a_chat_that_can_follow_no_parent_is_a_bad_row(tmp_path, rows, message):
    with pytest.raises(TraceError, match=message):
        qwen(tmp_path, *rows, follow=True)
