"""The utility of a network on validation episodes, without ray or torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.envs.cluster import ClusterSetting
from agents.envs.cluster_vector import ServeReplicas
from agents.envs.prune_loads import PruneLoad, prune_loads
from agents.envs.prune_vector import PruneToBudgetVector
from agents.envs.roles import RolesSetting
from agents.envs.roles_vector import ServeRolesVector
from agents.envs.serve import ServeSetting
from agents.envs.serve_pool import window_pool
from agents.envs.serve_sources import own_sources, sources_with
from agents.envs.serve_vector import ServeTraceVector
from agents.envs.serve_windows import Window, serve_windows
from sim.policies.learned import Network
from sim.types import Bools, Floats32

VALIDATION_WINDOWS, VALIDATION_CLUSTERS, VALIDATION_SYSTEMS, VALIDATION_SEED = 30, 24, 12, 20250602
Act = Callable[[Floats32, Bools], NDArray[np.int64]]
"""Chooses one legal action for each row: (features float32[n, o], legal bool[n, a]) -> int64[n]."""


def play(act: Act, env_kwargs: Mapping[str, Any], episodes: Sequence[Sequence[PruneLoad]]) -> PruneToBudgetVector:
    """Play one episode of ``PruneToBudget`` for each list of loads.

    Returns:
        The environment; its ``removed``, ``loss`` and ``utility`` are those at the end of each episode.
    """
    vector = PruneToBudgetVector(len(episodes), **env_kwargs)
    # The seed is for what a row plays after its end, which its network acts in too.
    observations, _ = vector.reset(seed=0, options={"loads": episodes})
    features = vector.setting.table.features
    over = np.zeros(len(episodes), dtype=np.bool_)
    removed, loss, utility = vector.removed.copy(), vector.loss.copy(), vector.utility.copy()
    while not over.all():
        actions = act(observations[:, :features], observations[:, features:] > 0.5)
        observations, _, terminated, truncated, _ = vector.step(actions)
        # An environment that ends is reset by its next step, so its results are copied now.
        for i in np.flatnonzero((terminated | truncated) & ~over).tolist():
            removed[i], loss[i], utility[i] = vector.removed[i], vector.loss[i], vector.utility[i]
            over[i] = True
    vector.removed, vector.loss, vector.utility = removed, loss, utility
    return vector


def serve(act: Act, env_kwargs: Mapping[str, Any], windows: Sequence[Window]) -> NDArray[np.float64]:
    """Play every window once; return the utility of each, float64[n]."""
    return _utilities(act, _environments(len(windows), json.dumps(env_kwargs, sort_keys=True)), windows)


@lru_cache(maxsize=1)
def _environments(count: int, env_kwargs: str) -> ServeTraceVector:
    """Return environments by their arguments in JSON; they are kept, because what they learned of plans is worth a lot.

    A training validates again and again, and all its networks choose from the same plans.
    """
    return ServeTraceVector(count, **json.loads(env_kwargs))


def serve_clusters(
    act: Act, env_kwargs: Mapping[str, Any], clusters: Sequence[Sequence[Window]]
) -> NDArray[np.float64]:
    """Play every cluster once; return the utility of each, float64[n].

    Args:
        act: chooses the actions. env_kwargs: of ``ServeCluster``. clusters: for each, the windows of its replicas.
    """
    vector = ServeReplicas(sum(map(len, clusters)), **env_kwargs)
    return _utilities(act, vector, clusters)[:: vector.setting.replicas]


def serve_systems(act: Act, env_kwargs: Mapping[str, Any], episodes: Sequence[Sequence[Window]]) -> NDArray[np.float64]:
    """Play every episode of ``ServeRoles`` once; return the utility of each, float64[n].

    Args:
        act: chooses the actions. env_kwargs: of ``ServeRoles``. episodes: for each, the windows of its streams.
    """
    return _utilities(act, ServeRolesVector(len(episodes), **env_kwargs), episodes)


def _utilities(
    act: Act, vector: ServeTraceVector | ServeReplicas | ServeRolesVector, windows: Sequence[Any]
) -> NDArray[np.float64]:
    """Play one episode in every environment; return the utility of each row."""
    observations, _ = vector.reset(options={"windows": windows})
    features = vector.setting.table.features
    over = False
    while not over:  # all windows have the same number of ticks
        actions = act(observations[:, :features], observations[:, features:] > 0.5)
        observations, _, terminated, _, infos = vector.step(actions)
        over = bool(terminated.all())
    utility: NDArray[np.float64] = infos["utility"]
    return utility


def validation_windows(count: int | None = None, sources: Sequence[str] | None = None) -> list[Window]:
    """Return validation windows of every source in equal numbers, the same in every call.

    So their mean utility is the mean over traces, whatever traces a training uses.

    Args:
        count: at least this many. sources: None for all that have a validation part and whose data is here.
    """
    names = sources_with("validation")[0] if sources is None else list(sources)
    rng, windows = np.random.default_rng(VALIDATION_SEED), serve_windows()
    each = -(-(count or VALIDATION_WINDOWS) // len(names))
    return [windows.sample(rng, "validation", (name,)) for _ in range(each) for name in names]


def validation_clusters(setting: ClusterSetting) -> list[tuple[Window, ...]]:
    """Return the validation clusters, the same in every call: of every source in equal numbers.

    Sources are those of ``validation_windows``, or the setting's if they suit its model alone.
    """
    names = own_sources(setting.sources) or sources_with("validation")[0]
    rng, each = np.random.default_rng(VALIDATION_SEED), -(-VALIDATION_CLUSTERS // len(names))
    return [setting.sample(rng, "validation", (name,)) for _ in range(each) for name in names]


def validation_systems(setting: RolesSetting) -> list[tuple[Window, ...]]:
    """Return the validation episodes of ``ServeRoles``, the same in every call, equally many of each traffic."""
    rng = np.random.default_rng(VALIDATION_SEED)
    each = -(-VALIDATION_SYSTEMS // len(setting.traffic))
    return [setting.sample(rng, "validation", mix) for _ in range(each) for mix in setting.traffic]


def validation_episodes(sequence: int) -> list[list[PruneLoad]]:
    """Return the validation loads in episodes of ``sequence``; the first loads repeat to fill the last episode."""
    loads = prune_loads().validation
    count = -(-len(loads) // sequence)
    return [[loads[(i * sequence + k) % len(loads)] for k in range(sequence)] for i in range(count)]


@dataclass(slots=True)
class CountedActs:
    """A network's best actions, counted."""

    network: Network
    counts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros(self.network.actions, dtype=np.int64)

    def __call__(self, features: Floats32, legal: Bools) -> NDArray[np.int64]:
        """Return the best legal action of each row."""
        chosen = self.network.act(features, legal)
        self.counts += np.bincount(chosen, minlength=len(self.counts))
        return chosen

    @property
    def top_share(self) -> float:
        """The share of decisions that were the most frequent action: 1 where the network always chooses the same."""
        return float(self.counts.max() / max(self.counts.sum(), 1))


@lru_cache(maxsize=1)
def pool_windows(env_kwargs: str) -> tuple[Window, ...]:
    """Return the validation windows of an environment that has a pool; its arguments are in JSON."""
    setting = ServeSetting(**json.loads(env_kwargs))
    assert setting.pool is not None
    return window_pool(setting, setting.pool, "validation")


def validation_utilities(
    env: str, env_kwargs: Mapping[str, Any], network: Network, act: Act | None = None
) -> NDArray[np.float64]:
    """Return the utility of every validation episode of an environment, float64[n].

    The network plays its best action, as the exported policy does; ``act`` plays instead of it if set.
    """
    env_kwargs, act = {**env_kwargs, "split": "validation"}, act or network.act
    if env == "ServeTrace-v0" and env_kwargs.get("pool"):
        return serve(act, env_kwargs, pool_windows(json.dumps(env_kwargs, sort_keys=True)))
    if env == "ServeTrace-v0":
        return serve(act, env_kwargs, validation_windows(sources=own_sources(env_kwargs.get("sources", ()))))
    if env == "ServeCluster-v0":
        return serve_clusters(act, env_kwargs, validation_clusters(ClusterSetting(**env_kwargs)))
    if env == "ServeRoles-v0":
        return serve_systems(act, env_kwargs, validation_systems(RolesSetting(**env_kwargs)))
    return play(act, env_kwargs, validation_episodes(int(env_kwargs.get("sequence", 1)))).utility
