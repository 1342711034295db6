"""``ServeRoles-v0``: choose every ``tick_s`` seconds how many replicas prefill while the others decode.

Episode: requests of several windows of ``agents.envs.serve_windows`` at once, its *streams*, all at one load. What
arrives changes within an episode: its time is divided into equal phases, and in each phase the streams of one source
play, and of the other sources a part (``RolesSetting.traffic``). So a side that was short may soon have replicas to
spare. In some episodes replicas fail and return (``outages``). After the last tick, the last roles serve the remaining
requests to their end.

Observation: float32[entries], what can be observed of the system (``sim.disaggregate.observation`` lists each entry
with its unit and range), and at the end one flag (0 or 1) for each legal action.

Action: i stands for i + 1 prefill replicas. A replica that changes its role first completes what it has begun, then
takes ``turn_s`` seconds. Illegal are numbers that leave a role without a replica that is not in an outage
(``Disaggregated.possible``). An illegal action keeps the present number; ``info["illegal_actions"]`` counts them.

Reward: the change of utility per tick times a scale, no unit (``agents.envs.reward.ServeReward``). The model is dense,
so utility is the share of arrived requests that met the SLO.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
import simpy
from numpy.typing import NDArray

from agents.envs.checks import episode_info, mask_info, one_action, reset_options
from agents.envs.prune_loads import Split
from agents.envs.render import RenderMixin
from agents.envs.serve import ServeSetting
from agents.envs.serve_requests import WindowRequests, joined
from agents.envs.serve_windows import Window, as_window
from sim.cluster.outages import Outages, markov, none
from sim.disaggregate.disaggregate import Disaggregated, decode_side, with_prefill
from sim.disaggregate.members import check_times
from sim.disaggregate.observation import RolesObserver, possible_flags, roles_table
from sim.disaggregate.roles import Roles, SystemState, kv_share
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError, nearest
from sim.limits import check_whole
from sim.policies.observation.cluster import shown_entries
from sim.traces.trace import Trace
from sim.types import Bools, Floats32

TRAFFIC: Sequence[Mapping[str, int]] = ({"gamma_code": 4, "gamma": 4},)
"""The traffic without another one; it needs no file."""
SERVE_KEYS = (
    *("model", "gpu", "tp", "latency", "quality", "engine", "slo", "workspace_bytes"),
    *("tick_s", "split", "load", "reward"),
)
"""Arguments of ``ServeSetting`` that this environment takes too; budgets and plans stay as they are here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomOutages:
    """When replicas fail: in a share of the episodes, at exponential times (``sim.cluster.outages.markov``)."""

    share: float = 0.0
    mean_up_s: float = 120.0
    mean_away_s: float = 30.0
    notice_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ConfigError(f"outages.share is {self.share}; it must be a share of the episodes, from 0 to 1")
        if not 0.0 <= self.notice_s < math.inf:
            raise ConfigError(f"outages.notice_s is {self.notice_s}; it must be at least 0 seconds and finite")
        self.of(0, 1.0)  # checks the times

    def of(self, seed: int, horizon_s: float) -> Outages:
        """Return the outages of an episode."""
        rng = np.random.default_rng([seed, 2])
        some = markov(
            mean_up_s=self.mean_up_s,
            mean_away_s=self.mean_away_s,
            horizon_s=horizon_s,
            seed=seed,
            notice_s=self.notice_s,
        )
        return some if rng.random() < self.share else none()


class RolesSetting(ServeSetting):
    """What all systems of one configuration share: replicas, links, their traffic, and when replicas fail."""

    def __init__(
        self,
        *,
        replicas: int = 6,
        prefill: int = 3,
        traffic: Sequence[Mapping[str, int]] = TRAFFIC,
        phases: Sequence[int] = (1, 3),
        rest: float = 0.25,
        budget_bytes: float = 40e9,
        link_bytes_per_s: float = 12.5e9,
        link_latency_s: float = 1e-4,
        load_bytes_per_s: float = 2e9,
        start_s: float = 10.0,
        turn_s: float = 2.0,
        outages: Mapping[str, float] | None = None,
        hide: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        """Set the system and its traffic.

        Args:
            replicas: of the system, equal ones. prefill: how many of them prefill at first.
            traffic: what may arrive in an episode, one of which is sampled: for each source, its number of streams.
            phases: lowest and highest number of phases of an episode. In each, the streams of one source play, of the
                next source in the next phase.
            rest: share of the streams of each other source that play too, rounded to a whole number.
            budget_bytes: memory of each replica for weights, workspace and KV.
            link_bytes_per_s, link_latency_s: of the link out of each replica.
            load_bytes_per_s, start_s, turn_s: as in ``sim.disaggregate.members.Members``.
            outages: fields of ``RandomOutages``; None for no outages.
            hide: names of entries that are always observed as 0, for ablations.
            kwargs: those arguments of ``ServeSetting`` that ``SERVE_KEYS`` names.
        """
        for key in kwargs:
            if key not in SERVE_KEYS:
                raise ConfigError(f"ServeRoles has no argument {key!r}; {nearest(key, SERVE_KEYS)}")
        self.traffic = _checked_traffic(traffic)
        sources = list(dict.fromkeys(source for mix in self.traffic for source in mix))
        super().__init__(**{"quality": "llama2_7b_published", **kwargs}, actions={"drops": [0]}, sources=sources)
        check_whole(replicas, "replicas", 2)
        check_whole(prefill, "prefill", 1)
        if prefill >= replicas:
            raise ConfigError(f"prefill is {prefill} of {replicas} replicas; at least one must be left to decode")
        if not 0.0 <= rest <= 1.0:
            raise ConfigError(f"rest is {rest}; it must be a share of the streams, from 0 to 1")
        if len(phases) != 2 or not 1 <= phases[0] <= phases[1]:
            raise ConfigError(f"phases is {list(phases)}; it must be the lowest number, at least 1, and the highest")
        check_times(load_bytes_per_s, start_s, turn_s)
        self.replicas, self.prefill, self.rest = replicas, prefill, rest
        self.phases = int(phases[0]), int(phases[1])
        self.budget_bytes = int(budget_bytes)
        self.link_bytes_per_s, self.link_latency_s = float(link_bytes_per_s), float(link_latency_s)
        self.load_bytes_per_s, self.start_s, self.turn_s = float(load_bytes_per_s), float(start_s), float(turn_s)
        self.outages = _outages(outages)
        self.plan = self.actions.plans[0]
        self.server.build_engine(self.plan, self.budget_bytes)  # refuses a budget that is too small
        self.table = roles_table(replicas)
        self.visible = shown_entries(self.table, hide)
        low, high = self.table.bounds()
        self.observation_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.action_space = gym.spaces.Discrete(len(self.table.actions))

    def sample(
        self, rng: np.random.Generator, split: Split | None = None, mix: Mapping[str, int] | None = None
    ) -> tuple[Window, ...]:
        """Return random windows, one for each stream, all at one load; at least one request arrives.

        Args:
            mix: one of ``traffic``; None samples it.
        """
        load = float(rng.uniform())
        windows = self.windows.at_load(load, load)
        chosen = self.traffic[int(rng.integers(len(self.traffic)))] if mix is None else mix
        while True:
            streams = [source for source, count in chosen.items() for _ in range(count)]
            sampled = tuple(windows.sample(rng, split or self.split, (source,), budget="full") for source in streams)
            if any(map(len, self.parts(sampled))):
                return sampled

    def check_windows(self, windows: Sequence[Window | dict[str, Any]]) -> tuple[Window, ...]:
        """Return ``options["windows"]`` of ``reset`` as Windows.

        Raises:
            ConfigError: unless there is one for each stream of one of ``traffic``, in its order.
        """
        found = tuple(as_window(one) for one in windows) if isinstance(windows, Sequence) else ()
        known = [[source for source, count in mix.items() for _ in range(count)] for mix in self.traffic]
        if [one.source for one in found] not in known:
            wanted = " or ".join(
                ", ".join(f"{count} of {source}" for source, count in mix.items()) for mix in self.traffic
            )
            passed = ", ".join(one.source for one in found) or "none"
            raise ConfigError(f"options has windows of {passed}; pass one for each stream: {wanted}")
        return found

    def parts(self, windows: Sequence[Window]) -> list[WindowRequests]:
        """Return what arrives of each stream: its window, without the phases in which it does not play.

        Raises:
            ConfigError: for a source with sessions.
        """
        sources = list(dict.fromkeys(window.source for window in windows))
        count, first = self.phases_of(windows)
        seen, parts = dict.fromkeys(sources, 0), []
        for window in windows:
            found = self.windows.cut(window)
            if found.session is not None:
                raise ConfigError(
                    f"traffic names {window.source}, which has sessions; replicas that prefill or decode take requests "
                    "at given times only. Take another source, or give it the step sim.traces.loops.open_loop in "
                    "conf/split/serve.yaml"
                )
            total, before = sum(one.source == window.source for one in windows), seen[window.source]
            seen[window.source] += 1
            if before >= round(self.rest * total):
                phase = (found.arrival_s * count / self.windows.window_s).astype(np.int64)
                found = _kept(found, (first + phase) % len(sources) == sources.index(window.source))
            parts.append(found)
        return parts

    def phases_of(self, windows: Sequence[Window]) -> tuple[int, int]:
        """Return how many phases an episode has, and the number of the source that plays in the first."""
        rng = np.random.default_rng([windows[0].budget_seed, 1])
        sources = len({window.source for window in windows})
        return int(rng.integers(self.phases[0], self.phases[1] + 1)), int(rng.integers(sources))

    def source_at(self, windows: Sequence[Window], time_s: float) -> str:
        """Return the source that plays at a time within an episode; a policy does not see it."""
        sources, (count, first) = list(dict.fromkeys(window.source for window in windows)), self.phases_of(windows)
        phase = min(int(time_s * count / self.windows.window_s), count - 1)
        return sources[(first + phase) % len(sources)]

    def trace(self, windows: Sequence[Window]) -> Trace:
        """Return the requests of all streams in order of arrival."""
        return joined(self.parts(windows))

    def build_system(
        self, windows: Sequence[Window], *, prefill: int | None = None, roles: Roles | None = None
    ) -> Disaggregated:
        """Return the system that serves an episode.

        Args:
            prefill: replicas that prefill at first; None takes the setting's.
            roles: decides on the roles; None if the caller does.
        """
        first = self.prefill if prefill is None else prefill

        def side(plan: Any, nll: Any) -> Any:
            def make(env: simpy.Environment) -> SimEngine:
                return self.server.build_engine(
                    plan, self.budget_bytes, env=env, external_clock=True, keep_iterations=False, quality_nll=nll
                )

            return make

        computes = side(self.plan, self.nll)
        produces = side(decode_side(self.plan), with_prefill(self.nll, self.plan.prefill))
        return Disaggregated(
            self.trace(windows),
            plan=self.plan,
            prefill=[computes] * first,
            decode=[produces] * (self.replicas - first),
            turned=[produces] * first + [computes] * (self.replicas - first),
            outages=self.outages.of(windows[0].budget_seed, self.windows.window_s),
            roles=roles,
            link_bytes_per_s=self.link_bytes_per_s,
            link_latency_s=self.link_latency_s,
            load_bytes_per_s=self.load_bytes_per_s,
            start_s=self.start_s,
            turn_s=self.turn_s,
        )


def _checked_traffic(traffic: Sequence[Mapping[str, int]]) -> tuple[dict[str, int], ...]:
    """Return the traffic as plain values.

    Raises:
        ConfigError: unless each entry has a source, and at least one stream of each.
    """
    if not isinstance(traffic, Sequence) or not traffic or not all(isinstance(mix, Mapping) and mix for mix in traffic):
        raise ConfigError(f"traffic is {traffic!r}; list tables SOURCE: STREAMS, such as [{{gamma_code: 4, gamma: 4}}]")
    for mix in traffic:
        for source, streams in mix.items():
            check_whole(streams, f"traffic: the number of streams of {source}", 1)
    return tuple({str(source): int(streams) for source, streams in mix.items()} for mix in traffic)


def _outages(value: Mapping[str, float] | None) -> RandomOutages:
    fields = dict(value or {})
    for name in fields:
        known = tuple(RandomOutages.__dataclass_fields__)
        if name not in known:
            raise ConfigError(f"outages has no field {name!r}; {nearest(str(name), known)}")
    return RandomOutages(**fields)


def _kept(found: WindowRequests, rows: Bools) -> WindowRequests:
    """Return some of the requests of a window."""
    return replace(
        found,
        arrival_s=found.arrival_s[rows],
        prompt_tokens=found.prompt_tokens[rows],
        output_tokens=found.output_tokens[rows],
    )


class RolesCore:
    """One system being served, without Gymnasium; ``agents.envs.roles_vector`` steps many of them."""

    def __init__(self, setting: RolesSetting) -> None:
        self.setting = setting

    def begin(self, windows: Sequence[Window]) -> None:
        """Start an episode with the setting's number of prefill replicas."""
        self.windows, self.observer = windows, RolesObserver()
        self.system = self.setting.build_system(windows)
        self.requests = len(self.system.trace)
        self.tick, self.illegal = 0, 0
        self.utility = self.potential = self.lost = 0.0
        self.history: list[SystemState] = []
        self._serve()

    def _serve(self) -> None:
        """Serve one tick and observe the system."""
        self.tick += 1
        self.system.run_until(self.tick * self.setting.tick_s)
        self.state = self.system.observe()
        self.features = self.observer(self.state) * self.setting.visible
        self.history.append(self.state)

    def observe(self) -> Floats32:
        """Return the observation, legal flags included, float32[entries]."""
        return np.concatenate((self.features, self.legal())).astype(np.float32)

    def legal(self) -> Bools:
        """Return which actions are legal now, bool[actions]."""
        return possible_flags(self.state)

    def step(self, action: int) -> tuple[float, bool]:
        """Serve one tick with the roles of an action; return the reward and whether the episode is over."""
        setting = self.setting
        if self.legal()[action]:
            self.system.set_prefill(action + 1)
        else:
            self.illegal += 1
        self._serve()
        over = self.tick >= setting.ticks
        if over:
            self.system.run()
        if over or setting.reward.kind == "earned":
            earned = setting.earned(self.system, self.requests)
            gained, self.utility = earned - self.utility, earned
        if setting.reward.kind == "lost":
            lost = setting.lost(self.system, self.requests, math.inf if over else self.state.time_s)
            gained, self.lost = self.lost - lost, lost
        potential = 0.0 if over else self._potential()
        reward = setting.reward(gained, self.potential, potential)
        self.potential = potential
        return reward, over

    def _potential(self) -> float:
        prefill = self.state.prefill
        oldest_s = np.array([max((one.oldest_wait_s for one in prefill), default=0.0)])
        waiting = np.array([float(self.state.held + sum(one.waiting for one in prefill))])
        reward, slo = self.setting.reward, self.setting.slo
        return float(reward.potentials(oldest_s, waiting, [self.requests], slo.ttft_s)[0])

    def info(self) -> dict[str, Any]:
        """Return the windows, and what happened in them so far."""
        return episode_info(self.windows, self.requests, self.utility, self.illegal)


class ServeRoles(RenderMixin, gym.Env[NDArray[np.float32], np.int64]):
    """The plain environment: one system at a time."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, render_mode: str | None = None, **kwargs: Any) -> None:
        """Build the environment; ``kwargs`` go to ``RolesSetting``."""
        self.setting = RolesSetting(**kwargs)
        self.observation_space, self.action_space = self.setting.observation_space, self.setting.action_space
        self.render_mode = render_mode
        self.core = RolesCore(self.setting)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode; ``options={"windows": [...]}`` sets the window of each stream instead of sampling it."""
        setting, requested = self.setting, reset_options(options, ("windows",)).get("windows")
        super().reset(seed=seed)
        windows = setting.sample(self.np_random) if requested is None else setting.check_windows(requested)
        self.core.begin(windows)
        return self.core.observe(), self.core.info() | mask_info(self.action_masks()) | {
            "observation_table": setting.table.rows(),
            "actions": setting.table.actions,
        }

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Serve one tick with the chosen roles; return the step as Gymnasium defines it."""
        reward, over = self.core.step(one_action(action, len(self.setting.table.actions)))
        return self.core.observe(), reward, over, False, self.core.info() | mask_info(self.action_masks())

    def action_masks(self) -> Bools:
        """Return which actions are legal now, bool[actions]; sb3-contrib's MaskablePPO calls this."""
        return self.core.legal()

    def _figure(self) -> Any:
        """Plot the roles, what waits and runs, and the KV use of decode over time."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 6), dpi=80, layout="constrained")
        FigureCanvasAgg(figure)
        roles, requests, held = figure.subplots(3, 1, sharex=True)
        states = self.core.history
        time_s = [state.time_s for state in states]
        roles.step(time_s, [state.to_prefill for state in states], where="post", label="are to prefill")
        roles.step(time_s, [len(state.prefill) for state in states], where="post", label="prefill")
        roles.step(time_s, [len(state.decode) for state in states], where="post", label="decode")
        roles.legend(fontsize=7)
        roles.set(ylabel="replicas", title=f"utility {self.core.utility:.3f}", ylim=(-0.2, self.setting.replicas + 0.2))
        waiting = [state.held + sum(one.waiting for one in state.prefill) for state in states]
        requests.plot(time_s, waiting, label="prompts that wait")
        requests.plot(time_s, [state.ready for state in states], label="wait for room at decode")
        requests.plot(time_s, [sum(one.running for one in state.decode) for state in states], label="decode")
        requests.legend(fontsize=7)
        requests.set(ylabel="requests")
        held.plot(time_s, [kv_share(state.decode) for state in states])
        held.set(ylabel="KV pools of decode used", xlabel="s", ylim=(-0.05, 1.05))
        return figure


__all__ = ["RolesCore", "RolesSetting", "ServeRoles"]
