"""``ServeTrace-v0``: choose the next plan, tick by tick, while a window of a trace is served under a budget that moves.

An episode is one window (``agents.envs.serve_windows``). At each tick the agent sees what a server could observe of itself
(``sim.policies.observation.serve``) and picks one plan of a table; plans whose weights do not fit the budget are not legal. After
the last tick the last plan serves what is left. The sum of rewards is the episode's utility: over all requests that
arrived, the share that met its SLO, each weighted by the quality kept, exp(-loss) of the plans it ran under.

The engine is reached through the public protocol alone (submit, apply, run_until, records).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import simpy
from numpy.typing import NDArray
from omegaconf import OmegaConf

from agents.envs.prune_loads import check_split
from agents.envs.render import Pictured
from agents.envs.reward import ServeReward, kept_quality, utility_lost
from agents.envs.serve_windows import Window, check_sources, serve_windows, window_budget
from sim.config import CONF_DIR, build
from sim.cost.latency import LatencyModel, copy_speed, load_calibration
from sim.cost.memory import kv_block_layer_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import Plan, dense_plan
from sim.cost.quality import FittedQuality, PublishedQuality, load_quality
from sim.engine.budget import BudgetContext
from sim.engine.plan_graph import PlanBook
from sim.engine.protocol import EngineState
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError
from sim.policies.observation.serve import Choice, ServeObserver, actions_from, serve_table
from sim.results.metrics import Slo, met_slo
from sim.types import Floats32

if TYPE_CHECKING:
    from sim.cluster.cluster import Cluster


@cache
def _latency(name: str) -> LatencyModel:
    return load_calibration(name)


@cache
def _quality(name: str) -> FittedQuality | PublishedQuality:
    return load_quality(name)


def published_order() -> list[str]:
    """Return the order of conf/policy/greedy_stop.yaml."""
    order: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "policy" / "greedy_stop.yaml"))
    return [str(name) for name in order["order"]]


class ServeSetting:
    """What all environments of one configuration share: what is served, on what, and what may be chosen."""

    def __init__(
        self,
        *,
        model: str = "llama2_7b",
        gpu: str = "a100_80gb",
        latency: str = "llama2_7b_a100_trtllm",
        quality: str = "llama2_7b_published",
        engine: str = "vllm_v1",
        slo: str = "ttft_2s",
        workspace_bytes: float = 1.24e9,
        tick_s: float = 1.0,
        actions: Mapping[str, Any] | None = None,
        split: str = "train",
        sources: Sequence[str] = ("burst",),
        load: Sequence[float] = (0.0, 1.0),
        reward: ServeReward | Mapping[str, Any] | None = None,
    ) -> None:
        """Set what is served.

        Args:
            model, gpu, latency, quality, engine, slo: files of the folders of conf with these names.
            workspace_bytes: memory that neither weights nor KV can use. tick_s: seconds between two decisions.
            actions: the words of ``sim.policies.observation.serve.serve_actions``; an order left out is that of greedy_stop.
            split: train, validation or test of conf/split/serve.yaml. sources: which of its traces.
            load: which part of each source's range of rates, on a logarithmic scale.
            reward: a ``ServeReward``, or its fields.
        """
        if not tick_s > 0:
            raise ConfigError(f"tick_s is {tick_s}; it must be above 0 seconds")
        self.model = load_model(model)
        self.gpu = build(OmegaConf.load(CONF_DIR / "gpu" / f"{gpu}.yaml"))
        self.latency, self.quality, self.quality_name = _latency(latency), _quality(quality), quality
        self.engine = build(OmegaConf.load(CONF_DIR / "engine" / f"{engine}.yaml"))
        self.slo: Slo = build(OmegaConf.load(CONF_DIR / "slo" / f"{slo}.yaml"))
        self.workspace_bytes, self.tick_s = int(workspace_bytes), tick_s
        words = dict(DEFAULT_ACTIONS if actions is None else actions)
        if not words.get("order"):
            words["order"] = published_order()
        self.action_words = words
        self.actions = actions_from(self.model, words, self.workspace_bytes)
        self.table = serve_table(self.actions)
        self.split, self.windows = check_split(split), serve_windows().at_load(*load)
        self.sources = check_sources(sources)
        self.reward = reward if isinstance(reward, ServeReward) else ServeReward(**(reward or {}))
        self.kv_block_layer_bytes = kv_block_layer_bytes(self.model, self.engine.kv_block_tokens)
        self.dense_nll = self.quality.nll(dense_plan(self.model))
        self._nll: dict[Plan, float] = {}
        self.ticks = max(2, math.ceil(self.windows.window_s / tick_s))
        low, high = self.table.bounds()
        self.observation_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.action_space: gym.spaces.Discrete[np.int64] = gym.spaces.Discrete(len(self.actions.plans))

    def nll(self, plan: Plan) -> float:
        """Return the NLL a token of a plan; each is worked out once."""
        found = self._nll.get(plan)
        if found is None:
            found = self._nll[plan] = self.quality.nll(plan)
        return found

    def build_engine(self, window: Window, plan: Plan, **words: Any) -> SimEngine:
        """Return an engine under the budget of a window, its requests submitted; ``words``: as ``idle_engine``."""
        engine = self.idle_engine(window, plan, **words)
        engine.submit_arrays(*self.windows.arrays(window))
        return engine

    def idle_engine(
        self,
        window: Window,
        plan: Plan,
        *,
        book: PlanBook | None = None,
        env: simpy.Environment | None = None,
        driven: bool = False,
    ) -> SimEngine:
        """Return an engine under the budget of a window; ``book``, ``env``, ``driven``: as SimEngine."""
        context = BudgetContext(
            model=self.model,
            gpu=self.gpu,
            plan=plan,
            workspace_bytes=self.workspace_bytes,
            kv_block_tokens=self.engine.kv_block_tokens,
        )
        copying = copy_speed(self.latency, self.gpu)
        return SimEngine(
            model=self.model,
            latency=self.latency,
            config=self.engine,
            plan=plan,
            budget_bytes=window_budget(context, window, self.windows.window_s),
            workspace_bytes=self.workspace_bytes,
            host_to_device_bytes_per_s=copying.host_to_device_bytes_per_s,
            copy_slowdown=copying.slowdown,
            quality_nll=self.nll,
            keep_iterations=False,
            book=book,
            env=env,
            driven=driven,
        )

    def earned(self, engine: SimEngine | Cluster, requests: int) -> float:
        """Return the utility so far: over all requests of the window, those that met the SLO at the quality kept."""
        if not requests:
            return 1.0
        records = engine.records()
        met = met_slo(records, self.slo)
        loss = np.where(met, records.quality_nll - self.dense_nll, 0.0)
        return float((kept_quality(loss) * met).sum()) / requests

    def lost(self, engine: SimEngine | Cluster, requests: int, now_s: float) -> float:
        """Return the utility that is out of reach."""
        return utility_lost(engine.records(), self.slo, self.dense_nll, now_s, requests) if requests else 0.0


DEFAULT_ACTIONS: Mapping[str, Any] = {
    "drops": [0, 4, 8],
    "low_layers": [0, 32],
    "low_bits": 4,
    "admits": [None, 4, 8, 16],
    "dwell_s": 8.0,
}


class ServeCore:
    """One window being served; what the plain and the vector environment have in common."""

    def __init__(self, setting: ServeSetting) -> None:
        self.setting = setting

    def begin(self, window: Window) -> None:
        """Begin to serve a window with the first plan of the table."""
        setting = self.setting
        self.window = window
        self.engine = setting.build_engine(window, setting.actions.plans[0])
        self.requests = len(setting.windows.arrays(window)[0])
        self.observer = ServeObserver(setting.model, setting.actions, setting.kv_block_layer_bytes)
        # The first decision comes after one tick, as in sim.replay.
        self.state: EngineState = self.engine.run_until(setting.tick_s)
        self.tick, self.choice, self.illegal = 1, Choice(), 0
        self.utility = self.potential = self.lost = 0.0
        self.history: list[tuple[float, int, int, float, float, int]] = []

    def observe(self) -> Floats32:
        """Return the observation, legal flags included."""
        features = self.observer(self.state, self.choice)
        return np.concatenate((features, self.setting.actions.legal(self.state, self.choice))).astype(np.float32)

    def step(self, action: int) -> tuple[float, bool]:
        """Choose a plan for the next tick; return the reward and whether the window is over."""
        setting = self.setting
        if setting.actions.legal(self.state, self.choice)[action]:
            self.choice = setting.actions.chosen(self.state, self.choice, action)
        else:
            self.illegal += 1
        self.engine.apply(setting.actions.plans[self.choice.action])
        self.tick += 1
        self.state = self.engine.run_until(self.tick * setting.tick_s)
        over = self.tick >= setting.ticks
        if over:
            self.engine.run_until(math.inf)
        if over or setting.reward.kind == "earned":
            earned = setting.earned(self.engine, self.requests)
            gained, self.utility = earned - self.utility, earned
        if setting.reward.kind == "lost":
            now_s = math.inf if over else self.state.time_s
            lost = setting.lost(self.engine, self.requests, now_s)
            gained, self.lost = self.lost - lost, lost
        potential = 0.0 if over else setting.reward.potential(self.state, self.requests, setting.slo.ttft_s)
        reward = setting.reward(gained, self.potential, potential)
        self.potential = potential
        state = self.state
        self.history.append(
            (
                state.time_s,
                state.waiting,
                state.running,
                state.oldest_wait_s,
                float(state.budget_bytes),
                self.choice.action,
            )
        )
        return reward, over

    def info(self) -> dict[str, Any]:
        """Return what happened so far."""
        window = self.window
        return {
            "source": window.source,
            "start_s": window.start_s,
            "rate": window.rate,
            "budget": window.budget,
            "requests": self.requests,
            "utility": self.utility,
            "illegal_actions": self.illegal,
        }


class ServeTrace(Pictured, gym.Env[NDArray[np.float32], np.int64]):
    """One window at a time."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, render_mode: str | None = None, **words: Any) -> None:
        """Build the environment; ``words`` are those of ``ServeSetting``."""
        self.setting = ServeSetting(**words)
        self.observation_space, self.action_space = self.setting.observation_space, self.setting.action_space
        self.render_mode = render_mode
        self.core = ServeCore(self.setting)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode; ``options={"window": ...}`` sets its window instead of sampling it."""
        super().reset(seed=seed)
        setting = self.setting
        window = (options or {}).get("window")
        if window is None:
            window = setting.windows.sample(self.np_random, setting.split, setting.sources)
        self.core.begin(window if isinstance(window, Window) else Window(**window))
        return self.core.observe(), self.core.info() | {
            "observation_table": setting.table.rows(),
            "actions": setting.table.actions,
        }

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Run the chosen plan for one tick."""
        reward, over = self.core.step(int(action))
        return self.core.observe(), reward, over, False, self.core.info()

    def _figure(self) -> Any:
        """Draw queue, wait and budget over time, and what was chosen."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 6), dpi=80, layout="constrained")
        FigureCanvasAgg(figure)
        queue, memory, plan = figure.subplots(3, 1, sharex=True)
        rows = self.core.history or [(0.0, 0, 0, 0.0, float(self.core.state.budget_bytes), 0)]
        time_s, waiting, running, wait_s, budget, chosen = zip(*rows, strict=True)
        queue.plot(time_s, waiting, label="waiting")
        queue.plot(time_s, running, label="running")
        queue.plot(time_s, wait_s, label="oldest wait, s")
        queue.legend(fontsize=7)
        queue.set(ylabel="requests", title=f"{self.core.window.source}: utility {self.core.utility:.3f}")
        memory.step(time_s, [b / 2**30 for b in budget], where="post")
        memory.set(ylabel="budget, GiB", ylim=(0, None))
        levels = [self.setting.actions.levels[action] for action in chosen]
        for k, name in enumerate(("blocks dropped", "low layers", "queue limit")):
            plan.step(time_s, [level[k] for level in levels], where="post", label=name)
        plan.set(xlabel="s", ylabel="level", ylim=(-0.05, 1.05))
        plan.legend(fontsize=7)
        return figure


__all__ = ["DEFAULT_ACTIONS", "ServeSetting", "ServeTrace"]
