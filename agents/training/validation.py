"""How good a network is on the draws that validate it: no ray, no torch, a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.envs.cluster import ClusterSetting
from agents.envs.cluster_vector import ServeReplicas
from agents.envs.prune import PruneToBudgetVector
from agents.envs.prune_loads import Draw, prune_draws
from agents.envs.serve_vector import ServeTraceVector
from agents.envs.serve_windows import Window, serve_windows
from sim.policies.learned import Network
from sim.types import Bools, Floats32

VALIDATION_WINDOWS, VALIDATION_CLUSTERS, VALIDATION_SEED = 24, 24, 20250602
Act = Callable[[Floats32, Bools], NDArray[np.int64]]
"""Chooses one legal action a row."""


def play(act: Act, words: Mapping[str, Any], episodes: Sequence[Sequence[Draw]]) -> PruneToBudgetVector:
    """Play one episode of ``PruneToBudget`` for each list of draws, return where they ended.

    ``removed``, ``loss`` and ``utility`` of the result are those of the ends.
    """
    vector = PruneToBudgetVector(len(episodes), **words)
    observations, _ = vector.reset(options={"draws": episodes})
    features = vector.setting.table.features
    over = np.zeros(len(episodes), dtype=np.bool_)
    removed, loss, utility = vector.removed.copy(), vector.loss.copy(), vector.utility.copy()
    while not over.all():
        actions = act(observations[:, :features], observations[:, features:] > 0.5)
        observations, _, terminated, truncated, _ = vector.step(actions)
        # One that ends begins anew at its next step; what it reached is kept here.
        for i in np.flatnonzero((terminated | truncated) & ~over).tolist():
            removed[i], loss[i], utility[i] = vector.removed[i], vector.loss[i], vector.utility[i]
            over[i] = True
    vector.removed, vector.loss, vector.utility = removed, loss, utility
    return vector


def serve(act: Act, words: Mapping[str, Any], windows: Sequence[Window]) -> NDArray[np.float64]:
    """Play every window once; return the utility of each."""
    return _served(act, ServeTraceVector(len(windows), **words), windows)


def serve_clusters(act: Act, words: Mapping[str, Any], clusters: Sequence[Sequence[Window]]) -> NDArray[np.float64]:
    """Play every cluster once, each given by the windows of its replicas; return the utility of each."""
    vector = ServeReplicas(sum(map(len, clusters)), **words)
    return _served(act, vector, clusters)[:: vector.setting.replicas]


def _served(act: Act, vector: ServeTraceVector | ServeReplicas, windows: Sequence[Any]) -> NDArray[np.float64]:
    """Play an episode everywhere; return the utility of each row."""
    observations, _ = vector.reset(options={"windows": windows})
    features = vector.setting.table.features
    over = False
    while not over:  # all windows take as many ticks
        actions = act(observations[:, :features], observations[:, features:] > 0.5)
        observations, _, terminated, _, infos = vector.step(actions)
        over = bool(terminated.all())
    utility: NDArray[np.float64] = infos["utility"]
    return utility


def validation_windows(sources: tuple[str, ...], count: int | None = None) -> list[Window]:
    """Return the windows that validate, the same every time."""
    rng = np.random.default_rng(VALIDATION_SEED)
    return [serve_windows().sample(rng, "validation", sources) for _ in range(count or VALIDATION_WINDOWS)]


def validation_clusters(setting: ClusterSetting) -> list[tuple[Window, ...]]:
    """Return the clusters that validate, the same every time."""
    rng = np.random.default_rng(VALIDATION_SEED)
    return [setting.sample(rng, "validation") for _ in range(VALIDATION_CLUSTERS)]


def validation_episodes(sequence: int) -> list[list[Draw]]:
    """Return the validation draws, ``sequence`` an episode; the first come again to make the last episode whole."""
    draws = list(prune_draws().validation)
    count = -(-len(draws) // sequence)
    return [[draws[(i * sequence + k) % len(draws)] for k in range(sequence)] for i in range(count)]


def validation_utilities(env: str, words: Mapping[str, Any], network: Network) -> NDArray[np.float64]:
    """Return the utility of every validation episode of an environment."""
    words = {**words, "split": "validation"}
    if env == "ServeTrace-v0":
        return serve(network.act, words, validation_windows(tuple(words.get("sources", ("burst",)))))
    if env == "ServeCluster-v0":
        return serve_clusters(network.act, words, validation_clusters(ClusterSetting(**words)))
    return play(network.act, words, validation_episodes(int(words.get("sequence", 1)))).utility
