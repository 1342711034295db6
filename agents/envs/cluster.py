"""``ServeCluster-v0``: choose the plan of every replica every ``tick_s`` seconds while a router distributes requests.

Episode: one window of a trace for each replica (``agents.envs.serve_windows``), all at one load. The requests of all
windows arrive together at the router. Each replica has the budget of its own window, so some are short of memory while
others are not. A cluster of one replica plays the episodes of ``ServeTrace``.

Observation: float32[replicas, entries]. A row holds the entries of ``ServeTrace`` for that replica, then how it
compares with the others (``sim.policies.observation.cluster`` lists each entry with its unit and range), and last one
flag (0 or 1) for each legal action.

Action: one plan number for each replica, from the table of ``ServeTrace``. An illegal one keeps the running plan.

Reward: the change of the cluster's utility per tick times a scale, no unit (``agents.envs.reward.ServeReward``).
Utility is the share of all arrived requests that met the SLO, each weighted by the quality kept.

There are two views of the same episodes. ``ServeCluster`` is one agent that chooses for all replicas at once;
``agents.envs.cluster_vector`` has a row for each replica, to train one policy that all replicas share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import simpy
from numpy.typing import NDArray

from agents.envs.checks import episode_info, reset_options, row_actions
from agents.envs.prune_loads import Split
from agents.envs.render import RenderMixin
from agents.envs.serve import ServeSetting
from agents.envs.serve_requests import joined
from agents.envs.serve_windows import Window, as_window
from sim.cluster.cluster import Cluster, Replica
from sim.cluster.routers import Router
from sim.config import build_option
from sim.engine.protocol import EngineState
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError, nearest
from sim.policies.base import Policy
from sim.policies.fixed import Fixed
from sim.policies.observation.cluster import cluster_table, replica_features, shown_entries
from sim.policies.observation.serve import Choice
from sim.traces.trace import Trace
from sim.types import GIB, Bools, Floats32

ROUTERS = (
    "round_robin",
    "least_outstanding",
    "power_of_two",
    "least_kv",
    "shortest_expected_wait",
    "prefix_affinity",
    "session_affinity",
)
"""Names of files of conf/router."""


CLUSTER_ACTIONS: Mapping[str, Any] = {
    "drops": [0, 4, 8],
    "low_layers": [0, 32],
    "low_bits": 4,
    "admits": [None, 4, 8, 16],
    "dwell_s": 8.0,
}
"""The default table of plans."""


class ClusterSetting(ServeSetting):
    """What all clusters of one configuration share: the servers, the router, their traffic, and the plans."""

    def __init__(
        self,
        *,
        replicas: int = 4,
        router: str = "least_kv",
        own_share: float = 0.0,
        hide: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        """Set the cluster and its traffic.

        Args:
            replicas: servers in a cluster, equal except for what their windows say: budget, speed, low precision.
            router: one of ``ROUTERS``.
            own_share: weight in [0, 1] of a replica's own requests in its reward in ``ServeReplicas``. 0 pays each
                replica the cluster's reward; 1 adds how much more its own requests earned than the cluster's average
                ones. The mean over replicas is the cluster's reward for any value.
            hide: names of entries that are always observed as 0, for ablations.
            kwargs: arguments of ``ServeSetting``; the default ``actions`` are ``CLUSTER_ACTIONS``.
        """
        super().__init__(**{"actions": CLUSTER_ACTIONS, **kwargs})
        if self.foreseen:
            raise ConfigError("foresight is for ServeTrace alone; leave it out")
        if replicas < 1 or not 0.0 <= own_share <= 1.0:
            raise ConfigError(
                f"replicas is {replicas} and own_share is {own_share}; replicas must be at least 1, own_share in [0, 1]"
            )
        if router not in ROUTERS:
            raise ConfigError(f"there is no router {router!r}; {nearest(router, ROUTERS)}")
        self.replicas, self.own_share = replicas, own_share
        self.router: Router = build_option("router", router)
        self.table = cluster_table(self.actions)
        self.visible = shown_entries(self.table, hide)
        low, high = self.table.bounds()
        self.observation_space = gym.spaces.Box(low, high, dtype=np.float32)

    def sample(
        self, rng: np.random.Generator, split: Split | None = None, sources: Sequence[str] | None = None
    ) -> tuple[Window, ...]:
        """Return random windows, one for each replica, all at one load; at least one of them has requests.

        Args:
            split: None for the setting's. sources: traces to sample from; None for the setting's.
        """
        load = float(rng.uniform())
        windows = self.windows.at_load(load, load)
        while True:
            sampled = tuple(
                windows.sample(rng, split or self.split, sources or self.sources) for _ in range(self.replicas)
            )
            if any(len(windows.arrays(window)[0]) for window in sampled):
                return sampled

    def check_windows(self, windows: Sequence[Window | dict[str, Any]]) -> tuple[Window, ...]:
        """Return ``options["windows"]`` of ``reset`` as Windows.

        Raises:
            ConfigError: unless there is one for each replica.
        """
        if not isinstance(windows, Sequence) or len(windows) != self.replicas:
            count = len(windows) if isinstance(windows, Sequence) else "no list of"
            raise ConfigError(f"options has {count} windows for {self.replicas} replicas; pass one for each")
        return tuple(as_window(one) for one in windows)

    def trace(self, windows: Sequence[Window]) -> Trace:
        """Return the requests of all windows in order of arrival; requests at the same time keep the windows' order."""
        caching = self.engine.prefix_caching
        parts = [self.windows.cut(window, with_ids=caching) for window in windows]
        return joined(parts, self.engine.hash_block_tokens if caching else None)

    def build_cluster(
        self,
        windows: Sequence[Window],
        policies: Sequence[Policy],
        *,
        decide: bool = True,
    ) -> Cluster:
        """Return a cluster in which replica i has the server and budget of window i.

        Args:
            windows, policies: one each for every replica.
            decide: whether the policies decide every tick; if not, the caller applies plans.
        """

        def make(window: Window, policy: Policy, env: simpy.Environment) -> tuple[SimEngine, Policy]:
            graph = self.graph_for(window)
            return self.idle_engine(window, policy.first_plan, graph=graph, env=env, external_clock=True), policy

        replicas = [
            Replica(
                name=f"replica_{i}",
                build=partial(make, window, policy),
                decisions_s=self.decisions_s if decide and not isinstance(policy, Fixed) else None,
            )
            for i, (window, policy) in enumerate(zip(windows, policies, strict=True))
        ]
        return Cluster(self.trace(windows), replicas, self.router, seed=windows[0].budget_seed)

    def first_plans(self, windows: Sequence[Window]) -> list[Policy]:
        """Return for each replica the plan that it starts with (``ServeActions.start``), as a policy."""
        return [Fixed(self.actions.plans[self.actions_for(window).start]) for window in windows]

    def decisions_s(self) -> Iterator[float]:
        """Return the times at which policies decide, in seconds."""
        return (tick * self.tick_s for tick in range(1, self.ticks))


class ClusterCore:
    """One cluster being served, without Gymnasium; ``agents.envs.cluster_vector`` steps many of them."""

    def __init__(self, setting: ClusterSetting) -> None:
        self.setting = setting

    def begin(self, windows: Sequence[Window]) -> None:
        """Start the windows with the first plan (``ServeActions.start``) on every replica."""
        self.windows, setting = windows, self.setting
        self.cluster = setting.build_cluster(windows, setting.first_plans(windows), decide=False)
        self.requests = len(self.cluster.trace)
        self.actions = [setting.actions_for(window) for window in windows]
        self.observers = [setting.observer_for(window) for window in windows]
        self.choices = [Choice(actions.start) for actions in self.actions]
        self.tick, self.illegal = 0, 0
        self.utility = self.potential = self.lost = 0.0
        self.history: list[tuple[float, list[EngineState], list[int]]] = []
        self._serve()

    def _serve(self) -> None:
        """Serve one tick and observe every replica."""
        self.tick += 1
        self.cluster.run_until(self.tick * self.setting.tick_s)
        self.states = [self.cluster.observe(i) for i in range(len(self.windows))]

    def observe(self) -> Floats32:
        """Return the observation of each replica, legal flags included, float32[replicas, entries]."""
        rows = []
        for i, (state, choice, legal) in enumerate(zip(self.states, self.choices, self.legal(), strict=True)):
            others = [*self.states[:i], *self.states[i + 1 :]]
            observer = self.observers[i]
            compared = replica_features(state, others, observer.dense_bytes)
            features = np.concatenate((observer(state, choice), compared)) * self.setting.visible
            rows.append(np.concatenate((features, legal)))
        return np.stack(rows).astype(np.float32)

    def legal(self) -> list[Bools]:
        """Return which actions of each replica are legal now, bool[actions] each."""
        each = zip(self.actions, self.states, self.choices, strict=True)
        return [actions.legal(state, choice) for actions, state, choice in each]

    def step(self, actions: Sequence[int]) -> tuple[float, bool]:
        """Run the plans of the actions for one tick; return the cluster's reward and whether the episode is over."""
        setting = self.setting
        for i, (action, legal) in enumerate(zip(actions, self.legal(), strict=True)):
            if legal[action]:
                self.choices[i] = self.actions[i].chosen(self.states[i], self.choices[i], action)
            else:
                self.illegal += 1
            self.cluster.apply(i, setting.actions.plans[self.choices[i].action])
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
        """Return the windows, and what happened in them so far."""
        return episode_info(self.windows, self.requests, self.utility, self.illegal)


class ServeCluster(RenderMixin, gym.Env[NDArray[np.float32], NDArray[np.integer[Any]]]):
    """The plain environment: one agent for all replicas, with an observation row and an action for each."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, render_mode: str | None = None, **kwargs: Any) -> None:
        """Build the environment; ``kwargs`` go to ``ClusterSetting``."""
        self.setting = setting = ClusterSetting(**kwargs)
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
        """Begin an episode; ``options={"windows": [...]}`` sets the window of each replica instead of sampling it."""
        setting, requested = self.setting, reset_options(options, ("windows",)).get("windows")
        super().reset(seed=seed)
        windows = setting.sample(self.np_random) if requested is None else setting.check_windows(requested)
        self.core.begin(windows)
        return self.core.observe(), self.core.info() | self._mask_info() | {
            "observation_table": setting.table.rows(),
            "actions": setting.table.actions,
        }

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Run the chosen plans for one tick; return the step as Gymnasium defines it."""
        setting = self.setting
        chosen = row_actions(action, setting.replicas, len(setting.actions.plans))
        reward, over = self.core.step(chosen.tolist())
        return self.core.observe(), reward, over, False, self.core.info() | self._mask_info()

    def action_masks(self) -> Bools:
        """Return which actions are legal now, bool[replicas * actions]: one replica after the other.

        This is the form that sb3-contrib's MaskablePPO expects of a MultiDiscrete space.
        """
        return np.concatenate(self.core.legal())

    def _mask_info(self) -> dict[str, Any]:
        """Return the flags of the legal actions, int8[actions] for each replica.

        They come as a tuple, as ``MultiDiscrete.sample(mask=...)`` takes them.
        """
        return {"action_mask": tuple(legal.astype(np.int8) for legal in self.core.legal())}

    def _figure(self) -> Any:
        """Plot the queue, KV use, budget and plan of every replica over time."""
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
            panels[2].step(time_s, [state.budget_bytes / GIB for state in states], where="post")
            plans = [levels[row[2][i]] for row in rows]
            panels[3].step(time_s, [low + drop for drop, low, _ in plans], where="post")
        panels[0].legend(fontsize=7)
        panels[0].set(ylabel="waiting", title=f"{len(core.states)} replicas: utility {core.utility:.3f}")
        panels[1].set(ylabel="KV pool used", ylim=(-0.05, 1.05))
        panels[2].set(ylabel="budget, GiB", ylim=(0, None))
        panels[3].set(ylabel="level: drops + low bits", xlabel="s", ylim=(-0.05, 2.05))
        return figure


__all__ = ["ClusterCore", "ClusterSetting", "ServeCluster"]
