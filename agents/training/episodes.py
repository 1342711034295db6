"""Files of episodes in RLlib's offline format: Parquet with one row for each episode, packed with msgpack.

RLlib's own reader decodes rows with ``msgpack_numpy``, which unpickles arrays of Python objects, so a file can run any
command. ``decode_episode`` reads arrays of numbers alone and refuses everything else. Training reads with it too
(``agents.training.prelearner``), so no part of a file is ever unpickled.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import msgpack_numpy
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sim.atomic import write_whole
from sim.errors import ConfigError
from sim.types import Floats32

FILE = "episodes.parquet"
MAX_BYTES = 512 * 2**20
"""A file of episodes may unpack to this many bytes; 10,000 episodes of ``ServeTrace`` are 280 MB."""
NUMBERS = "fiub"
"""Kinds of NumPy types that are numbers: float, signed and unsigned integer, bool."""


@dataclass(frozen=True, slots=True)
class RecordedEpisode:
    """One complete episode.

    id_: a name, unique in a file. observations: [t + 1, ...]. actions: int64[t]. rewards: float64[t].
    terminated, truncated: how it ended.
    """

    id_: str
    observations: Floats32
    actions: NDArray[np.int64]
    rewards: NDArray[np.float64]
    terminated: bool
    truncated: bool


def write_episodes(path: Path, states: list[Mapping[str, Any]]) -> None:
    """Write the states of RLlib's SingleAgentEpisode; a failed write leaves no partial file."""
    rows = [msgpack.packb(state, default=msgpack_numpy.encode) for state in states]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: pq.write_table(pa.table({"item": pa.array(rows, type=pa.binary())}), part))


def decode_episode(row: bytes) -> RecordedEpisode:
    """Return the episode of a row.

    Raises:
        ValueError: for a row that is no complete episode, or holds anything but numbers where numbers belong.
    """
    try:
        state = msgpack.unpackb(row, object_hook=_array)
        # A number beyond float32 becomes inf, which is refused below.
        with np.errstate(over="ignore"):
            episode = RecordedEpisode(
                id_=str(state["id_"]),
                observations=_numbers(state, "observations").astype(np.float32),
                actions=_numbers(state, "actions", "iu").astype(np.int64),
                rewards=_numbers(state, "rewards").astype(np.float64),
                terminated=bool(state["is_terminated"]),
                truncated=bool(state["is_truncated"]),
            )
    except (KeyError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"not an episode ({type(error).__name__}: {error})") from error
    steps = len(episode.actions)
    if episode.actions.ndim != 1 or not steps or len(episode.rewards) != steps:
        raise ValueError(f"{steps} actions and {len(episode.rewards)} rewards; an episode has one of each a step")
    if len(episode.observations) != steps + 1:
        raise ValueError(f"{len(episode.observations)} observations for {steps} actions; it must be one more")
    if not (np.isfinite(episode.observations).all() and np.isfinite(episode.rewards).all()):
        raise ValueError("an observation or a reward is not a finite number")
    if not (episode.terminated or episode.truncated):
        raise ValueError("the episode has not ended")
    return episode


def _numbers(state: Any, key: str, kinds: str = NUMBERS) -> NDArray[Any]:
    values = state[key]["data"]
    if not isinstance(values, np.ndarray) or not values.ndim or values.dtype.kind not in kinds:
        raise ValueError(f"{key} is not an array of {'whole ' if 'f' not in kinds else ''}numbers")
    return values


def _array(value: Mapping[Any, Any]) -> Any:
    """Return the array that a map stands for, or the map itself; no other Python object is ever made.

    ``msgpack_numpy`` packs an array as {nd: True, type, kind, shape, data} and a scalar as {nd: False, type, data}. It
    packs an array of Python objects as a pickle.
    """
    if b"nd" not in value:
        return value
    text, data = value.get(b"type"), value.get(b"data")
    if value.get(b"kind", b"") != b"" or not isinstance(text, str) or not isinstance(data, bytes):
        raise ValueError("an array that is not of numbers; such arrays are pickles, which are never read")
    try:
        dtype = np.dtype(text)
    except (TypeError, SyntaxError) as error:
        raise ValueError(f"there is no type {text[:20]!r}") from error
    if dtype.kind not in NUMBERS or dtype.subdtype is not None:
        raise ValueError(f"an array of type {text[:20]!r}; only numbers are read")
    shape = value.get(b"shape", ()) if value[b"nd"] is True else ()
    if not isinstance(shape, list | tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("an array without a shape")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"an array of shape {tuple(shape)} and type {text} with {len(data)} bytes")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def read_rows(path: Path) -> Iterator[bytes]:
    """Yield the packed rows of a file.

    Raises:
        ValueError: if it has no binary column ``item``, or unpacks to more than ``MAX_BYTES``.
        OSError, pyarrow.ArrowException: if it cannot be read.
    """
    with pq.ParquetFile(io.BytesIO(path.read_bytes())) as file:
        fields = file.schema_arrow
        # Ray registers a Parquet type that holds pickles; a column of plain bytes is none.
        if "item" not in fields.names or fields.field("item").type not in (pa.binary(), pa.large_binary()):
            raise ValueError("it has no column 'item' of bytes")
        size = 0
        for batch in file.iter_batches(batch_size=16, columns=["item"]):
            size += batch.nbytes
            if size > MAX_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_BYTES // 2**20} MiB, the limit; write fewer episodes")
            for row in batch.column(0):
                if not row.is_valid:
                    raise ValueError("a row is empty")
                yield row.as_py()


def read_recorded(path: Path, shape: tuple[int, ...], actions: int | None = None) -> list[RecordedEpisode]:
    """Return the episodes of a file.

    Args:
        path: the file. shape: of one observation. actions: how many actions there are; None does not check them.
    Raises:
        ConfigError: if the file is missing, damaged, or of another environment; it names the row.
    """
    episodes: list[RecordedEpisode] = []
    try:
        for row in read_rows(path):
            try:
                episodes.append(decode_episode(row))
            except ValueError as error:
                raise ValueError(f"row {len(episodes) + 1}: {error}") from error
        if not episodes:
            raise ValueError("it has no rows")
    except (OSError, ValueError, pa.ArrowException, MemoryError) as error:
        text = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{path} holds no episodes ({type(error).__name__}: {text}); write some: python -m agents.offline by=..."
        ) from error
    for number, episode in enumerate(episodes, start=1):
        if episode.observations.shape[1:] != shape:
            raise ConfigError(
                f"{path} holds observations of shape {episode.observations.shape[1:]}, but this environment has "
                f"{shape}; write the episodes with the same env="
            )
        low, high = int(episode.actions.min()), int(episode.actions.max())
        if actions is not None and not (low >= 0 and high < actions):
            raise ConfigError(
                f"{path} row {number} has actions from {low} to {high}, but this environment has 0 to {actions - 1}; "
                "write the episodes with the same env="
            )
    return episodes


def read_episodes(path: Path, shape: tuple[int, ...], actions: int | None = None) -> tuple[Floats32, NDArray[np.int64]]:
    """Return the observations, float32[n, *shape], and actions, int64[n], of all episodes of a file.

    Arguments and errors: as ``read_recorded``. The observation after the last action has no action and is left out.
    """
    episodes = read_recorded(path, shape, actions)
    observations = np.concatenate([episode.observations[:-1] for episode in episodes])
    return observations, np.concatenate([episode.actions for episode in episodes])
