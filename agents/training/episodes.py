"""Episodes that somebody wrote, as RLlib's offline data: a Parquet file, a row an episode, packed with msgpack."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import msgpack_numpy
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sim.errors import ConfigError
from sim.results.run_folder import write_whole
from sim.types import Floats32

FILE = "episodes.parquet"


def write_episodes(path: Path, states: list[Mapping[str, Any]]) -> None:
    """Write states of RLlib's SingleAgentEpisode, whole or not at all."""
    rows = [msgpack.packb(state, default=msgpack_numpy.encode) for state in states]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: pq.write_table(pa.table({"item": pa.array(rows, type=pa.binary())}), part))


def read_episodes(path: Path, shape: tuple[int, ...]) -> tuple[Floats32, NDArray[np.int64]]:
    """Return observations [n, *shape] and actions [n] of all episodes of a file.

    Raises:
        ConfigError: if there is no such file, it is none, or its observations have another shape.
    """
    from ray.rllib.env.single_agent_episode import SingleAgentEpisode

    try:
        rows = pq.read_table(io.BytesIO(path.read_bytes())).column("item").to_pylist()
        states = [msgpack.unpackb(row, object_hook=msgpack_numpy.decode) for row in rows]
        played = [SingleAgentEpisode.from_state(state) for state in states]
        seen = np.concatenate([np.asarray(episode.get_observations())[:-1] for episode in played])
        actions = np.concatenate([np.asarray(episode.get_actions()) for episode in played])
    except (OSError, KeyError, ValueError, pa.ArrowInvalid) as error:
        raise ConfigError(
            f"{path} holds no episodes ({type(error).__name__}: {error}); write some: python -m agents.offline by=..."
        ) from error
    if seen.shape[1:] != shape:
        raise ConfigError(
            f"{path} holds observations of shape {seen.shape[1:]}, this environment has {shape}; write the episodes "
            "with the same env="
        )
    return seen.astype(np.float32), actions.astype(np.int64)
