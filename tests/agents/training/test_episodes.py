"""Files of episodes: numbers are read back as they were, and nothing else is ever decoded."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import msgpack
import msgpack_numpy
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agents.training.episodes import FILE, decode_episode, read_episodes, write_episodes
from sim.errors import ConfigError

STEPS, ENTRIES = 3, 2


class RunsACommand:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def state(**changes: Any) -> dict[str, Any]:
    """What RLlib's SingleAgentEpisode writes of an episode of three steps."""
    rng = np.random.default_rng(0)
    return {
        "id_": "a",
        "observations": {"data": rng.random((STEPS + 1, ENTRIES)).astype(np.float32)},
        "actions": {"data": np.arange(STEPS)},
        "rewards": {"data": rng.random(STEPS)},
        "is_terminated": True,
        "is_truncated": False,
        "custom_data": {},
        **changes,
    }


def packed(value: dict[str, Any]) -> bytes:
    row: bytes = msgpack.packb(value, default=msgpack_numpy.encode)
    return row


def test_an_episode_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write_episodes(tmp_path / FILE, [state(), state(id_="b")])
    observations, actions = read_episodes(tmp_path / FILE, (ENTRIES,), STEPS)
    np.testing.assert_array_equal(observations, np.tile(state()["observations"]["data"][:-1], (2, 1)))
    assert actions.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("where", ["observations", "actions", "rewards", "custom_data"])
def test_a_pickle_in_any_array_of_a_row_is_refused_and_never_loaded(tmp_path: Path, where: str) -> None:
    trap = tmp_path / "it_ran"
    hostile = np.array([RunsACommand(trap)] * (STEPS + 1), dtype=object)
    pickle.loads(pickle.dumps(RunsACommand(tmp_path / "control")))
    assert (tmp_path / "control").exists()  # the trap works
    write_episodes(tmp_path / FILE, [state(**{where: {"data": hostile}})])
    with pytest.raises(ConfigError, match=r"row 1: .*pickles, which are never read"):
        read_episodes(tmp_path / FILE, (ENTRIES,))
    assert not trap.exists()


def test_a_pickle_behind_the_kind_of_a_plain_array_is_refused_too(tmp_path: Path) -> None:
    trap = tmp_path / "it_ran"
    data = pickle.dumps(RunsACommand(trap))
    for fields in ({b"kind": b"O", b"type": "<f4"}, {b"kind": "O", b"type": "|O"}, {b"type": "|O"}):
        row = packed(state(rewards={"data": {b"nd": True, b"shape": (1,), b"data": data, **fields}}))
        with pytest.raises(ValueError, match=r"pickles|only numbers"):
            decode_episode(row)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observations": {"data": np.zeros((STEPS, ENTRIES), np.float32)}}, "one more"),
        ({"observations": {"data": np.full((STEPS + 1, ENTRIES), np.nan, np.float32)}}, "finite"),
        ({"observations": {"data": np.full((STEPS + 1, ENTRIES), 1e300)}}, "finite"),
        ({"observations": {"data": [1.0, 2.0]}}, "observations is not an array"),
        ({"actions": {"data": np.zeros(STEPS)}}, "whole numbers"),
        ({"actions": {"data": np.zeros((STEPS, 2), np.int64)}}, "one of each a step"),
        ({"rewards": {"data": np.array(["a"] * STEPS)}}, "only numbers"),
        ({"rewards": None}, "not an episode"),
        ({"is_terminated": False}, "has not ended"),
    ],
)
def test_a_row_that_is_no_complete_episode_is_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_episode(packed(state(**changes)))


@pytest.mark.parametrize(
    "array",
    [
        {b"nd": True, b"type": "<f4", b"shape": (2**40,), b"data": b"abcd"},
        {b"nd": True, b"type": "<f4", b"shape": (-1,), b"data": b"abcd"},
        {b"nd": True, b"type": "<f4", b"shape": 1, b"data": b"abcd"},
        {b"nd": True, b"type": "(100,)f4", b"shape": (1,), b"data": b"abcd"},
        {b"nd": True, b"type": "f4,f4", b"shape": (1,), b"data": b"abcdabcd"},
        {b"nd": True, b"type": "no such type", b"shape": (1,), b"data": b"abcd"},
        {b"nd": True, b"type": None, b"shape": (1,), b"data": b"abcd"},
        {b"nd": True, b"type": "<f4", b"data": "text", b"shape": (1,)},
    ],
)
def test_an_array_whose_shape_type_and_bytes_do_not_fit_is_refused(array: dict[bytes, Any]) -> None:
    with pytest.raises(ValueError, match=r"array|type"):
        decode_episode(packed(state(rewards={"data": array})))


@pytest.mark.parametrize("row", [b"", b"\xc1", b"\x91" * 5000, b"\x81\x01\x01", packed(state())[:-40], b"\xa1a"])
def test_bytes_that_are_no_msgpack_of_an_episode_are_refused(row: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_episode(row)


def test_a_file_with_other_columns_or_none_is_refused(tmp_path: Path) -> None:
    for number, table in enumerate(
        (
            pa.table({"other": [b"x"]}),
            pa.table({"item": ["text"]}),
            pa.table({"item": pa.array([None], type=pa.binary())}),
            pa.table({"item": pa.array([], type=pa.binary())}),
        )
    ):
        pq.write_table(table, tmp_path / f"{number}.parquet")
        with pytest.raises(ConfigError, match=r"holds no episodes .*agents\.offline"):
            read_episodes(tmp_path / f"{number}.parquet", (ENTRIES,))


def test_a_small_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.training.episodes.MAX_BYTES", 2**20)
    rows = pa.array([packed(state(custom_data={"pad": bytes(2**18)}))] * 40, type=pa.binary())
    pq.write_table(pa.table({"item": rows}), tmp_path / FILE, compression="zstd")
    assert (tmp_path / FILE).stat().st_size < 2**20
    with pytest.raises(ConfigError, match="more than 1 MiB"):
        read_episodes(tmp_path / FILE, (ENTRIES,))


def test_an_action_that_the_environment_does_not_have_is_refused(tmp_path: Path) -> None:
    for action in (-1, STEPS):
        write_episodes(tmp_path / FILE, [state(actions={"data": np.array([0, 1, action])})])
        with pytest.raises(ConfigError, match=r"row 1 has actions from .* this environment has 0 to 2"):
            read_episodes(tmp_path / FILE, (ENTRIES,), STEPS)


def test_rllibs_reader_gets_only_rows_that_were_packed_again_from_numbers(tmp_path: Path) -> None:
    import gymnasium as gym

    from agents.training.prelearner import CheckedPreLearner

    reader = CheckedPreLearner.__new__(CheckedPreLearner)
    reader.observation_space = gym.spaces.Box(0.0, 1.0, (ENTRIES,), np.float32)
    reader.action_space = gym.spaces.Discrete(STEPS)
    again = decode_episode(reader.checked(packed(state())))
    np.testing.assert_array_equal(again.observations, state()["observations"]["data"])
    assert again.actions.tolist() == [0, 1, 2]
    trap = tmp_path / "it_ran"
    for where in ("rewards", "custom_data"):
        with pytest.raises(ValueError, match="pickles"):
            reader.checked(packed(state(**{where: {"data": np.array([RunsACommand(trap)], dtype=object)}})))
    assert not trap.exists()
