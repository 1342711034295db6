"""``ServeCluster-v0`` for training one policy that all replicas share: many clusters, one row for each replica.

Episodes equal those of ``agents.envs.cluster`` step by step, and with one replica per cluster those of ``ServeTrace``
(tests/agents/envs/test_cluster.py).

The reward of a row is the cluster's reward, plus ``own_share`` times the difference between what its own requests
earned and what as many average requests of the cluster earned. These differences sum to 0 over a cluster. Because they
compare equal numbers of requests, a replica gains nothing by receiving fewer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from agents.envs.checks import RESET_MASK, for_each_row, reset_options, row_actions, rows_to_reset
from agents.envs.cluster import ClusterSetting
from agents.envs.serve_vector import UNKNOWN, settle_utility, slo_seconds
from agents.envs.serve_windows import Window
from agents.envs.vector import MaskedRows, Replayed, final_infos, reseed
from sim.cluster.cluster import Cluster
from sim.engine.batch_step import ARRIVED, OLDEST_WAIT_S, SEEN_COLUMNS, WAITING
from sim.errors import ConfigError
from sim.policies.observation.cluster import cluster_features
from sim.policies.observation.serve import ServeObservers
from sim.types import Bools, Floats, Floats32, Ints

# Shapes: c clusters of k replicas, r = c * k rows; the rows of a cluster are adjacent.


class ServeReplicas(Replayed, MaskedRows, VectorEnv[Any, Any, Any]):
    """The replicas of many clusters; each row is an environment with one agent.

    The step after the end of an episode resets that cluster and ignores its actions (autoreset NEXT_STEP).
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, num_envs: int | None = None, **kwargs: Any) -> None:
        """Build ``num_envs / replicas`` clusters, by default one; ``kwargs`` go to ``ClusterSetting``.

        Raises:
            ConfigError: unless ``num_envs`` is a multiple of ``replicas``.
        """
        self.setting = setting = ClusterSetting(**kwargs)
        self.num_envs = rows = setting.replicas if num_envs is None else num_envs
        if rows < 1 or rows % setting.replicas:
            raise ConfigError(
                f"num_envs is {rows}; it must be a multiple of replicas, {setting.replicas}: a row is a replica"
            )
        self.single_observation_space, self.single_action_space = setting.observation_space, setting.action_space
        self.observation_space = batch_space(self.single_observation_space, rows)
        self.action_space = batch_space(self.single_action_space, rows)
        self.render_mode = None
        self.clusters = clusters = rows // setting.replicas
        self._served: list[Cluster] = []
        self._windows: list[Any] = [None] * clusters
        self._played: list[Ints] = []
        self._together = False
        tpot_s = setting.slo.tpot_s or math.inf
        self._observers = ServeObservers(setting.model, setting.actions, setting.kv_block_layer_bytes, rows, tpot_s)
        self._rngs = [np.random.default_rng(s) for s in np.random.SeedSequence().spawn(clusters)]
        self._tick, self._requests = np.zeros(clusters, dtype=np.int64), np.zeros(clusters, dtype=np.int64)
        self._settled = np.full((rows, 1), UNKNOWN)
        self._seen = np.zeros((rows, SEEN_COLUMNS))
        self._standing, self._potential = np.zeros(rows), np.zeros(rows)
        self._over = np.zeros(clusters, dtype=np.bool_)
        self._legal = np.ones((rows, len(setting.actions.plans)), dtype=np.bool_)
        self._slo_s = slo_seconds(setting.slo)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Floats32, dict[str, Any]]:
        """Begin an episode in every cluster; cluster c is seeded with seed + c.

        ``options={"windows": [...]}`` sets the windows of each cluster, a list with one for each replica;
        ``options={"reset_mask": bool[r]}`` resets only these rows.

        Raises:
            ConfigError: for options that do not fit, or a mask that resets some replicas of a cluster and not others.
        """
        options = reset_options(options, ("windows", RESET_MASK))
        rows = rows_to_reset(options, self.num_envs, bool(self._served)).reshape(self.clusters, -1)
        where: Bools = np.asarray(rows.all(axis=1))
        if (where != rows.any(axis=1)).any():
            raise ConfigError(
                f"options['{RESET_MASK}'] resets some replicas of a cluster and not others; each "
                f"{self.setting.replicas} rows of a cluster need the same value"
            )
        requested = for_each_row(options, "windows", self.clusters)
        windows = [self.setting.check_windows(one) for one in requested] if requested is not None else None
        reseed(self._rngs, seed, where.tolist())
        self._note_begin(where)
        begun = {c: self._begin(c, None if windows is None else windows[c]) for c in np.flatnonzero(where).tolist()}
        self._served = [begun[c] if c in begun else self._served[c] for c in range(self.clusters)]
        self._over[where] = False
        return self._serve(where), self._mask_infos()

    def _rows(self, c: int) -> slice:
        return slice(c * self.setting.replicas, (c + 1) * self.setting.replicas)

    def _begin(self, c: int, windows: Sequence[Window] | None = None) -> Cluster:
        """Return a new cluster for place c; the caller serves its first tick."""
        setting, rows = self.setting, self._rows(c)
        windows = setting.sample(self._rngs[c]) if windows is None else windows
        self._windows[c] = windows
        cluster = setting.build_cluster(windows, setting.first_plans(windows), decide=False)
        for row, window in zip(range(rows.start, rows.stop), windows, strict=True):
            self._observers.begin(row, low_bits=window.low_bits, low_loss=setting.low_loss(window.low_bit_cost))
        self._requests[c], self._tick[c] = len(cluster.trace), 0
        self._standing[rows] = self._potential[rows] = 0.0
        if len(cluster.trace) > self._settled.shape[1]:
            self._settled = np.full((self.num_envs, 2 * len(cluster.trace)), UNKNOWN)
        self._settled[rows] = UNKNOWN
        return cluster

    def _serve(self, where: Bools | None = None) -> Floats32:
        """Serve one tick in every cluster, or where ``where`` says, bool[c]; return the observations, float32[r, o]."""
        for c, cluster in enumerate(self._served):
            if where is None or where[c]:
                self._tick[c] += 1
                cluster.run_until(float(self._tick[c] * self.setting.tick_s))
                cluster.observe_into(self._seen[self._rows(c)])
        observed = self._seen.reshape(self.clusters, self.setting.replicas, SEEN_COLUMNS)
        compared = cluster_features(observed, self._observers.dense_bytes).reshape(self.num_envs, -1)
        features = np.concatenate((self._observers(self._seen), compared), axis=1) * self.setting.visible
        self._legal = self._observers.legal(self._seen)
        return np.concatenate((features, self._legal), axis=1, dtype=np.float32)

    def step(self, actions: Any) -> tuple[Floats32, Floats, Bools, Bools, dict[str, Any]]:
        """Step every replica; a cluster whose episode has ended begins a new one instead."""
        setting, observers, k = self.setting, self._observers, self.setting.replicas
        chosen = row_actions(actions, self.num_envs, len(setting.actions.plans))
        restarting = self._over.copy()
        self._note_begin(restarting)
        if not restarting.any():
            self._played.append(chosen.copy())
        running = ~np.repeat(restarting, k)
        legal = observers.legal(self._seen)[np.arange(self.num_envs), chosen]
        changed = legal & running & (chosen != observers.action)
        observers.choose(self._seen, chosen, legal & running)
        for row in np.flatnonzero(changed).tolist():
            self._served[row // k].apply(row % k, setting.actions.plans[chosen[row]])
        for c in np.flatnonzero(restarting).tolist():
            self._served[c] = self._begin(c)
        observed = self._serve()
        over = ~restarting & (self._tick >= setting.ticks)
        for c in np.flatnonzero(over).tolist():
            self._served[c].run()
        reward, utility = self._pay(over, running)
        self._over = over
        ended = np.repeat(over, k)
        infos = self._mask_infos() | final_infos(ended, utility=np.where(ended, np.repeat(utility, k), 0.0))
        return observed, reward, ended, np.zeros(self.num_envs, dtype=np.bool_), infos

    def _pay(self, over: Bools, running: Bools) -> tuple[Floats, Floats]:
        """Return the reward of every row, float64[r], and the utility of every cluster so far, float64[c]."""
        setting, k = self.setting, self.setting.replicas
        ended, requests = np.repeat(over, k), np.repeat(self._requests, k)
        tables = np.concatenate([cluster.tables for cluster in self._served])
        now_s = np.where(ended, math.inf, np.repeat(self._tick, k) * setting.tick_s)
        earned, lost = np.empty(self.num_envs), np.empty(self.num_envs)
        settle_utility(tables, self._settled, now_s, self._slo_s, setting.dense_nll, requests, earned, lost)
        for c in np.flatnonzero(over).tolist():  # turns that never arrived, because the one before them never ended
            missing = self._requests[c] - len(self._served[c].arrival_order())
            lost[self._rows(c)] += missing / max(self._requests[c], 1) / k
        standing = -lost if setting.reward.kind == "lost" else earned
        arrived = self._seen[:, ARRIVED].reshape(-1, k)
        total = np.repeat(standing.reshape(-1, k).sum(axis=1), k)
        # What as many average requests of the cluster earned as this replica has received.
        mean = total * (arrived / np.maximum(arrived.sum(axis=1, keepdims=True), 1.0)).ravel()
        standing = total + setting.own_share * k * (standing - mean)
        gained, self._standing = standing - self._standing, np.where(running, standing, 0.0)
        waits = (self._seen[:, OLDEST_WAIT_S], self._seen[:, WAITING])
        potential = setting.reward.potentials(*waits, requests / k, setting.slo.ttft_s)
        potential[ended | ~running] = 0.0
        reward = np.where(running, setting.reward(gained, self._potential, potential), 0.0)
        self._potential = potential
        return reward, earned.reshape(-1, k).sum(axis=1)


__all__ = ["ServeReplicas"]
