"""Feeds recorded episodes to RLlib's offline learners without unpickling any part of a file.

RLlib decodes rows with ``msgpack_numpy``, which unpickles arrays of Python objects. Here ``agents.training.episodes``
decodes each row first, and RLlib gets a row that was packed again from its numbers.
"""

from __future__ import annotations

from typing import Any

import msgpack
import msgpack_numpy
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.offline.offline_prelearner import OfflinePreLearner

from agents.training.episodes import decode_episode


class CheckedPreLearner(OfflinePreLearner):
    """RLlib's own class, which sees checked rows only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return what a learner updates on; ``batch["item"]`` holds packed episodes."""
        return super().__call__({"item": [self.checked(bytes(row)) for row in batch["item"]]})  # type: ignore[dict-item]

    def checked(self, row: bytes) -> bytes:
        """Return a row with the same episode, packed from numbers alone.

        Raises:
            ValueError: if it holds anything else.
        """
        recorded = decode_episode(row)
        episode = SingleAgentEpisode(
            id_=recorded.id_,
            observations=list(recorded.observations),
            actions=list(recorded.actions),
            rewards=recorded.rewards.tolist(),
            infos=[{} for _ in recorded.observations],
            terminated=recorded.terminated,
            truncated=recorded.truncated,
            observation_space=self.observation_space,
            action_space=self.action_space,
            len_lookback_buffer=0,
        )
        packed: bytes = msgpack.packb(episode.to_numpy().get_state(), default=msgpack_numpy.encode)
        return packed
