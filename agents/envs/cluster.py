"""``ServeCluster-v0``: choose the next plan of every replica, tick by tick, while a router shares traffic among them.

An episode is one window of a trace for each replica (``agents.envs.serve_windows``), at one load: the requests of all windows
arrive together at the router, and each replica lives under the budget of its own window, so that some are pressed while
others are not. A router that looks at the KV pool sends more to where plans leave room. The sum of rewards is the
utility of the cluster: over all requests that arrived, the share that met its SLO, each weighted by the quality kept.

Two views of the same episodes: `ServeCluster` is one agent that chooses for all replicas at once;
``agents.envs.cluster_vector`` has a row a replica, for one policy that all of them share. A cluster of one replica plays the
episodes of ``ServeTrace``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import simpy
from numpy.typing import NDArray
from omegaconf import OmegaConf

from agents.envs.prune_loads import Split
from agents.envs.render import Pictured
from agents.envs.serve import ServeSetting
from agents.envs.serve_windows import Window
from sim.cluster.cluster import Cluster, Replica
from sim.cluster.routers import Router
from sim.config import CONF_DIR, build
from sim.engine.plan_graph import PlanBook
from sim.engine.protocol import EngineState
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError, nearest
from sim.policies.base import Policy
from sim.policies.fixed import Fixed
from sim.policies.observation.cluster import cluster_table, replica_features, shown_entries
from sim.policies.observation.serve import Choice, ServeObserver
from sim.traces.trace import Trace
from sim.types import Floats32

ROUTERS = ("round_robin", "least_outstanding", "power_of_two", "least_kv", "shortest_expected_wait")
"""Of conf/router; the windows have no prefixes that a sixth could look at."""


class ClusterSetting(ServeSetting):
    """What all clusters of one configuration share."""

    def __init__(
        self,
        *,
        replicas: int = 4,
        router: str = "least_kv",
        own_share: float = 0.0,
        hide: Sequence[str] = (),
        **words: Any,
    ) -> None:
        """Set what is served, and by how many.

        Args:
            replicas: of a cluster, all alike but for their budgets. router: one of ``ROUTERS``.
            hide: names of entries of the observation that stay 0, for ablations.
            own_share: how much of what its own requests earn beyond the cluster's mean a replica is paid in
                `ServeReplicas`, beside what the cluster earns; the mean over the replicas is that, whatever it is.
            words: those of ``ServeSetting``.
        """
        super().__init__(**words)
        if replicas < 1 or not 0.0 <= own_share <= 1.0:
            raise ConfigError(
                f"replicas is {replicas} and own_share {own_share}; the first must be at least 1, the second in [0, 1]"
            )
        if router not in ROUTERS:
            raise ConfigError(f"there is no router {router!r}; {nearest(router, ROUTERS)}")
        self.replicas, self.own_share = replicas, own_share
        self.router: Router = build(OmegaConf.load(CONF_DIR / "router" / f"{router}.yaml"))
        self.table = cluster_table(self.actions)
        self.shown = shown_entries(self.table, hide)
        low, high = self.table.bounds()
        self.observation_space = gym.spaces.Box(low, high, dtype=np.float32)

    def sample(self, rng: np.random.Generator, split: Split | None = None) -> tuple[Window, ...]:
        """Draw the windows of an episode, one for each replica, all at one load; in some of them something arrives."""
        load = float(rng.uniform())
        windows = self.windows.at_load(load, load)
        while True:
            drawn = tuple(windows.sample(rng, split or self.split, self.sources) for _ in range(self.replicas))
            if any(len(windows.arrays(window)[0]) for window in drawn):
                return drawn

    def check_windows(self, windows: Sequence[Window | dict[str, Any]]) -> tuple[Window, ...]:
        """Return windows that were given, as many as replicas.

        Raises:
            ConfigError: for another number of them.
        """
        if len(windows) != self.replicas:
            raise ConfigError(f"{len(windows)} windows for {self.replicas} replicas; give one for each")
        return tuple(one if isinstance(one, Window) else Window(**one) for one in windows)

    def trace(self, windows: Sequence[Window]) -> Trace:
        """Return what arrives: the requests of all windows, those of one moment in the order of the windows."""
        arrival_s, prompts, outputs = (
            np.concatenate(columns) for columns in zip(*map(self.windows.arrays, windows), strict=True)
        )
        order = np.argsort(arrival_s, kind="stable")
        return Trace(arrival_s=arrival_s[order], prompt_tokens=prompts[order], output_tokens=outputs[order])

    def build_cluster(
        self,
        windows: Sequence[Window],
        policies: Sequence[Policy],
        *,
        asked: bool = True,
        book: PlanBook | None = None,
    ) -> Cluster:
        """Return a cluster in which replica i lives under the budget of window i.

        Args:
            windows, policies: one each for every replica. asked: whether policies are, every tick; else somebody else
                applies plans. book: shared by all engines.
        """
        book = PlanBook(self.model, self.nll) if book is None else book

        def made(window: Window, policy: Policy, env: simpy.Environment) -> tuple[SimEngine, Policy]:
            return self.idle_engine(window, policy.first_plan, book=book, env=env, driven=True), policy

        replicas = [
            Replica(
                name=f"replica_{i}",
                build=partial(made, window, policy),
                decisions_s=self.decisions_s if asked and not isinstance(policy, Fixed) else None,
            )
            for i, (window, policy) in enumerate(zip(windows, policies, strict=True))
        ]
        return Cluster(self.trace(windows), replicas, self.router, seed=windows[0].budget_seed)

    def decisions_s(self) -> Iterator[float]:
        """Return when policies decide."""
        return (tick * self.tick_s for tick in range(1, self.ticks))


class ClusterCore:
    """One cluster that serves; the plain form of what ``agents.envs.cluster_vector`` does with many at once."""

    def __init__(self, setting: ClusterSetting) -> None:
        self.setting = setting

    def begin(self, windows: Sequence[Window]) -> None:
        """Begin to serve with the first plan of the table everywhere."""
        setting, count = self.setting, len(windows)
        self.windows = windows
        first = Fixed(setting.actions.plans[0])
        self.cluster = setting.build_cluster(windows, [first] * count, asked=False)
        self.requests = len(self.cluster.trace)
        self.observers = [
            ServeObserver(setting.model, setting.actions, setting.kv_block_layer_bytes) for _ in range(count)
        ]
        self.choices = [Choice()] * count
        self.tick, self.illegal = 0, 0
        self.utility = self.potential = self.lost = 0.0
        self.history: list[tuple[float, list[EngineState], list[int]]] = []
        self._serve()

    def _serve(self) -> None:
        """Serve a tick, and look."""
        self.tick += 1
        self.cluster.run_until(self.tick * self.setting.tick_s)
        self.states = [self.cluster.observe(i) for i in range(len(self.windows))]

    def observe(self) -> Floats32:
        """Return the observation of each replica, legal flags included [k, o]."""
        actions, rows = self.setting.actions, []
        for i, (state, choice) in enumerate(zip(self.states, self.choices, strict=True)):
            others = [*self.states[:i], *self.states[i + 1 :]]
            observer = self.observers[i]
            among = replica_features(state, others, observer.dense_bytes)
            features = np.concatenate((observer(state, choice), among)) * self.setting.shown
            rows.append(np.concatenate((features, actions.legal(state, choice))))
        return np.stack(rows).astype(np.float32)

    def step(self, actions: Sequence[int]) -> tuple[float, bool]:
        """Choose a plan for every replica; return the cluster's reward and whether the episode is over."""
        setting, table = self.setting, self.setting.actions
        for i, (action, state, choice) in enumerate(zip(actions, self.states, self.choices, strict=True)):
            if table.legal(state, choice)[action]:
                self.choices[i] = table.chosen(state, choice, action)
            else:
                self.illegal += 1
            self.cluster.apply(i, table.plans[self.choices[i].action])
        self._serve()
        over = self.tick >= setting.ticks
        if over:
            self.cluster.run()
        earned = setting.earned(self.cluster, self.requests)
        lost = setting.lost(self.cluster, self.requests, math.inf if over else self.tick * setting.tick_s)
        gained = self.lost - lost if setting.reward.kind == "lost" else earned - self.utility
        self.utility, self.lost = earned, lost
        each = self.requests / len(self.states)
        waits = [setting.reward.potential(state, each, setting.slo.ttft_s) for state in self.states]
        potential = 0.0 if over else float(np.mean(waits))
        reward = setting.reward(gained, self.potential, potential)
        self.potential = potential
        self.history.append((self.tick * setting.tick_s, self.states, [choice.action for choice in self.choices]))
        return reward, over

    def info(self) -> dict[str, Any]:
        """Return what happened so far."""
        return {
            "windows": [asdict(window) for window in self.windows],
            "requests": self.requests,
            "utility": self.utility,
            "illegal_actions": self.illegal,
        }


class ServeCluster(Pictured, gym.Env[NDArray[np.float32], NDArray[np.integer[Any]]]):
    """One agent for all replicas: a row of the observation and an action for each."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, render_mode: str | None = None, **words: Any) -> None:
        """Build the environment; ``words`` are those of ``ClusterSetting``."""
        self.setting = setting = ClusterSetting(**words)
        one = setting.observation_space
        rows = (setting.replicas, 1)
        self.observation_space = gym.spaces.Box(np.tile(one.low, rows), np.tile(one.high, rows), dtype=np.float32)
        each = [len(setting.actions.plans)] * setting.replicas
        self.action_space = gym.spaces.MultiDiscrete(each)
        self.render_mode = render_mode
        self.core = ClusterCore(setting)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode; ``options={"windows": [...]}`` sets its windows, one a replica, instead of drawing them."""
        super().reset(seed=seed)
        setting, given = self.setting, (options or {}).get("windows")
        self.core.begin(setting.sample(self.np_random) if given is None else setting.check_windows(given))
        return self.core.observe(), self.core.info() | {
            "observation_table": setting.table.rows(),
            "actions": setting.table.actions,
        }

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Run the chosen plans for one tick; where one is not legal, what runs goes on."""
        reward, over = self.core.step([int(one) for one in action])
        return self.core.observe(), reward, over, False, self.core.info()

    def _figure(self) -> Any:
        """Draw queue, KV use, memory and plan of every replica over time."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        core, levels = self.core, self.setting.actions.levels
        figure = Figure(figsize=(8, 8), dpi=80, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(4, 1, sharex=True)
        rows = core.history or [(0.0, core.states, [choice.action for choice in core.choices])]
        time_s = [row[0] for row in rows]
        for i in range(len(core.states)):
            states = [row[1][i] for row in rows]
            panels[0].plot(time_s, [state.waiting for state in states], label=f"replica {i}")
            used = [state.kv_used_layer_blocks / max(state.kv_layer_blocks, 1) for state in states]
            panels[1].plot(time_s, used)
            panels[2].step(time_s, [state.budget_bytes / 2**30 for state in states], where="post")
            plans = [levels[row[2][i]] for row in rows]
            panels[3].step(time_s, [low + drop for drop, low, _ in plans], where="post")
        panels[0].legend(fontsize=7)
        panels[0].set(ylabel="waiting", title=f"{len(core.states)} replicas: utility {core.utility:.3f}")
        panels[1].set(ylabel="KV pool used", ylim=(-0.05, 1.05))
        panels[2].set(ylabel="budget, GiB", ylim=(0, None))
        panels[3].set(ylabel="levels of bits and drops", xlabel="s", ylim=(-0.05, 2.05))
        return figure


__all__ = ["ClusterCore", "ClusterSetting", "ServeCluster"]
