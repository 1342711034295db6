"""``ServeTrace-v0``: choose the plan of a server every ``tick_s`` seconds while the memory budget moves.

Episode: one window of a trace (``agents.envs.serve_windows``), ``window_s`` seconds long. After the last tick, the last
plan serves the remaining requests to their end.

Observation: float32[entries], what a server can observe of itself (``sim.policies.observation.serve.serve_table`` lists
each entry with its unit and range), and at the end one flag (0 or 1) for each legal action. With ``foresight``, entries
for a critic lie between the two.

Action: the number of a plan in a table of blocks to drop, layers at low precision and queue limit, and if the
configuration asks for them streamed layers and bits of KV (``sim.policies.observation.serve.serve_actions``). Illegal
are a plan whose weights do not fit the budget, and a change of weights within ``dwell_s`` seconds of the last one. An
illegal action keeps the running plan; ``info["illegal_actions"]`` counts them.

Reward: the change of utility per tick times a scale, no unit (``agents.envs.reward.ServeReward``). Utility is the share
of arrived requests that met the SLO, each weighted by the quality kept, exp(-loss) of the plans it ran under.

The environment uses only the Engine protocol (submit, apply, run_until, records).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import simpy
from numpy.typing import NDArray

from agents.envs.checks import mask_info, one_action, reset_options
from agents.envs.prune_loads import check_split
from agents.envs.render import RenderMixin
from agents.envs.reward import ServeReward, built_reward, kept_quality, utility_lost
from agents.envs.serve_budgets import BudgetRange, budget_range, window_budget
from agents.envs.serve_foresight import ENTRIES as FORESEEN
from agents.envs.serve_foresight import MOST, foresight
from agents.envs.serve_pool import drawn, pool_options, window_pool
from agents.envs.serve_windows import Window, as_window, check_sources, serve_windows, source_trace
from sim.config import build_option
from sim.cost.gpu import Gpu
from sim.cost.memory import kv_block_layer_bytes, weight_bytes
from sim.cost.model_spec import ModelSpec, load_model
from sim.cost.plan import Plan, dense_plan
from sim.engine.budget import Budget
from sim.engine.plan_graph import PlanGraph
from sim.engine.protocol import EngineConfig, EngineState
from sim.engine.server_spec import ServerSpec, find_calibration, named_calibration, named_quality
from sim.engine.sim_engine import MEMORY_OF_PLANS, SimEngine
from sim.errors import ConfigError, RapLabError
from sim.policies.observation.serve import (
    Choice,
    ServeActions,
    ServeObserver,
    Terms,
    actions_from,
    low_precision_loss,
    serve_table,
)
from sim.policies.orders import own_order
from sim.results.metrics import Slo, met_slo
from sim.results.records import Records
from sim.types import GIB, Bools, Floats32


class Served(Protocol):
    """What has records of requests: an engine, a cluster, or a system with separate prefill and decode."""

    def records(self) -> Records:
        """Return one row per request."""
        ...


def with_order(model: ModelSpec, actions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of ``serve_actions`` with the model's own order, or with one that names the same model.

    Raises:
        ConfigError: for an order that names no model, or if the model has none and blocks are to be dropped.
    """
    order = actions.get("order")
    if not order and not any(actions.get("drops", ())):
        return {**actions, "order": [], "made_for": model.name}
    if not order:
        return {**actions, "order": list(own_order(model)), "made_for": model.name}
    if actions.get("made_for") is None:
        raise ConfigError(
            f"actions.order does not say for which model it was made; add actions.made_for, such as {model.name}, or "
            "leave out both for the model's own order"
        )
    return dict(actions)


def nearest_cost(low_bit_cost: float) -> float:
    """Return a cost of low precision, rounded to a power of 4 on a logarithmic scale.

    Each cost needs its own graph of plans, which takes a minute to fill, so there are few.
    """
    return float(4.0 ** round(math.log(low_bit_cost, 4.0)))


class ServeSetting:
    """What all environments of one configuration share: the server, its traffic, and the plans to choose from."""

    def __init__(
        self,
        *,
        model: str = "llama2_7b",
        gpu: str = "a100_80gb",
        tp: int = 1,
        latency: str | None = "llama2_7b_a100_trtllm",
        quality: str = "llama2_7b_published",
        engine: str = "vllm_v1",
        prefix_caching: bool = False,
        slo: str = "ttft_2s",
        workspace_bytes: float = 1.24e9,
        budget: BudgetRange | Mapping[str, Any] | None = None,
        tick_s: float = 1.0,
        actions: Mapping[str, Any] | None = None,
        split: str = "train",
        randomize: bool | Mapping[str, Sequence[float]] = False,
        pool: Mapping[str, Any] | None = None,
        sources: Sequence[str] = ("burst",),
        load: Sequence[float] = (0.0, 1.0),
        reward: ServeReward | Mapping[str, Any] | None = None,
        foresight: bool = False,
    ) -> None:
        """Set the server and its traffic.

        Args:
            model, gpu, quality, engine, slo: names of files in the folders of conf with these names.
            prefix_caching: whether requests reuse KV of the same beginning of a prompt, above all turns of a session;
                the sources must have hash ids, all of one number of tokens.
            tp: GPUs among which the model is divided; budgets are those of one of them.
            latency: name of a file of conf/calibration; None takes that of the model on these GPUs.
            workspace_bytes: memory that neither weights nor KV can use.
            budget: fields of ``agents.envs.serve_budgets.BudgetRange``, or None for its defaults.
            tick_s: seconds between two decisions.
            actions: arguments of ``sim.policies.observation.serve.serve_actions``. Without ``order`` it is the model's
                own (``sim.policies.orders``); with it, ``made_for`` names the model.
            split: "train", "validation" or "test" of conf/split/serve.yaml.
            randomize: what training windows randomize (``agents.envs.serve_windows.Windows.randomized``).
            pool: options of a pool of training windows (``agents.envs.serve_pool.PoolOptions``); None samples windows
                one by one.
            sources: names of its traces.
            load: lowest and highest position in each source's range of rates, on a logarithmic scale in [0, 1].
            reward: as in ``built_reward``.
            foresight: show also the requests and the memory to come, between what the server observes and the flags
                (``agents.envs.serve_foresight``); for a critic in training, never for a policy.
        """
        if not tick_s > 0:
            raise ConfigError(f"tick_s is {tick_s}; it must be above 0 seconds, such as 1.0")
        self.gpu: Gpu = replace(build_option("gpu", gpu), tp=tp)
        self.model = load_model(model).shard(self.gpu.tp)
        latency = latency or find_calibration(model, gpu, tp)
        self.latency, self.quality, self.quality_name = named_calibration(latency), named_quality(quality), quality
        self.sources = check_sources(sources)
        self.engine = _engine(engine, self.sources, prefix_caching)
        self.slo: Slo = build_option("slo", slo)
        self.workspace_bytes, self.tick_s = int(workspace_bytes), tick_s
        self.budget = budget_range(budget)
        self.action_options = with_order(self.model, DEFAULT_ACTIONS if actions is None else actions)
        self.actions = actions_from(self.model, self.action_options, self.workspace_bytes)
        self.table = serve_table(self.actions)
        self.stated = {
            "server": [model, gpu, latency, quality, engine, slo, workspace_bytes, *([tp] if tp > 1 else [])],
            **({"prefix_caching": True} if prefix_caching else {}),
            "order": self.action_options["order"],
            "windows": [asdict(self.budget), tick_s, list(sources), list(load), str(randomize)],
        }
        self.pool = pool_options(pool)
        self._pooled: tuple[Window, ...] | None = None
        self.split, self.windows = check_split(split), serve_windows().at_load(*load).randomized(randomize)
        self.reward = built_reward(reward, ServeReward)
        self.kv_block_layer_bytes = kv_block_layer_bytes(self.model, self.engine.kv_block_tokens)
        self.dense_nll = self.quality.nll(dense_plan(self.model))
        self._nll: dict[tuple[Any, ...], float] = {}
        self._costs: dict[float, Callable[[Plan], float]] = {1.0: self.nll}
        self._graphs: dict[float, PlanGraph] = {}
        self._low_loss = low_precision_loss(self.model, self.actions, self.nll)
        if self.actions.extra_entries:
            _check_known(self.actions, self.nll, quality)
        self.server = ServerSpec(
            model=self.model,
            gpu=self.gpu,
            config=self.engine,
            workspace_bytes=self.workspace_bytes,
            latency=self.latency,
            quality_nll=self.nll,
        )
        self.ticks = max(2, math.ceil(self.windows.window_s / tick_s))
        low, high = self.table.bounds()
        self.foreseen = FORESEEN if foresight else 0
        if foresight:
            at = self.table.features
            low, high = np.insert(low, [at] * FORESEEN, 0.0), np.insert(high, [at] * FORESEEN, MOST)
        self.observation_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.action_space: gym.spaces.Discrete[np.int64] = gym.spaces.Discrete(len(self.actions.plans))

    def nll(self, plan: Plan) -> float:
        """Return the NLL of a plan in nats per token; computed once for all plans that differ in limits alone."""
        runs = (
            *(plan.decode, plan.prefill, plan.weight_bits, plan.compute_bits),
            *(plan.kv_keep, plan.kv_bits, plan.kv_only, plan.kv_compression, plan.ffn_width),
        )
        found = self._nll.get(runs)
        if found is None:
            found = self._nll[runs] = self.quality.nll(plan)
        return found

    def sample_window(self, rng: np.random.Generator) -> Window:
        """Return a random window of the setting's split: of the pool, if it has one and trains."""
        if self.pool is None or self.split != "train":
            return self.windows.sample(rng, self.split, self.sources)
        if self._pooled is None:
            self._pooled = window_pool(self, self.pool, "train")
        return drawn(self._pooled, rng, self.windows.budget_seeds["train"], self.pool.notices_s)

    def nll_at(self, low_bit_cost: float) -> Callable[[Plan], float]:
        """Return the NLL of plans where low precision costs ``low_bit_cost`` times what the quality table says."""
        cost = nearest_cost(low_bit_cost)
        if cost not in self._costs:
            self._costs[cost] = partial(self._nll_with_cost, cost)
        return self._costs[cost]

    def _nll_with_cost(self, cost: float, plan: Plan) -> float:
        full = self.nll(replace(plan, weight_bits=(self.model.weight_bits,) * self.model.num_layers, compute_bits=None))
        return full + cost * (self.nll(plan) - full)

    def low_loss(self, low_bit_cost: float) -> float:
        """Return the nats per token that all layers at low precision lose."""
        return nearest_cost(low_bit_cost) * self._low_loss

    def graph_for(self, window: Window) -> PlanGraph:
        """Return the plan graph of windows in which low precision costs as much as in this one; it is kept and shared.

        A graph that has grown too large is replaced by an empty one.
        """
        cost = nearest_cost(window.low_bit_cost)
        graph = self._graphs.get(cost)
        if graph is None or len(graph) > MEMORY_OF_PLANS // 2:
            graph = self._graphs[cost] = PlanGraph(self.model, self.nll_at(cost))
        return graph

    def foresight(self, window: Window) -> Floats32:
        """Return what comes after each tick of a window, float32[ticks + 1, ``foreseen``]."""
        if not self.foreseen:
            return np.zeros((self.ticks + 1, 0), dtype=np.float32)
        budget = self.budget_of(window, self.server_for(window), self.actions.plans[self.actions_for(window).start])
        dense_bytes = weight_bytes(self.model, dense_plan(self.model))
        return foresight(self.windows.cut(window), budget, window.slowdown, dense_bytes, self.tick_s, self.ticks)

    def actions_for(self, window: Window) -> ServeActions:
        """Return the plans to choose from in a window."""
        return self.actions if window.low_bits else self.actions.without_low_bits()

    def observer_for(self, window: Window) -> ServeObserver:
        """Return a new observer of a window's server."""
        terms = Terms(self.slo.tpot_s or math.inf, self.low_loss(window.low_bit_cost))
        return ServeObserver(self.model, self.actions_for(window), self.kv_block_layer_bytes, terms)

    def server_for(self, window: Window) -> ServerSpec:
        """Return the server of a window: as fast, and with low precision as costly, as the window says."""
        if window.slowdown == window.low_bit_cost == 1.0:
            return self.server
        return replace(self.server, slowdown=window.slowdown, quality_nll=self.nll_at(window.low_bit_cost))

    def build_engine(self, window: Window, plan: Plan, **kwargs: Any) -> SimEngine:
        """Return an engine with the budget and requests of a window; ``kwargs`` go to ``idle_engine``."""
        engine = self.idle_engine(window, plan, **kwargs)
        self.submit(engine, window)
        return engine

    def submit(self, engine: SimEngine, window: Window) -> int:
        """Hand the requests of a window to an engine that has none; return how many they are."""
        requests = self.windows.cut(window, with_ids=self.engine.prefix_caching)
        engine.submit_arrays(
            requests.arrival_s,
            requests.prompt_tokens,
            requests.output_tokens,
            requests.hash_ids,
            sessions=requests.sessions,
        )
        return len(requests)

    def idle_engine(
        self,
        window: Window,
        plan: Plan,
        *,
        graph: PlanGraph | None = None,
        env: simpy.Environment | None = None,
        external_clock: bool = False,
    ) -> SimEngine:
        """Return an engine with the budget of a window, without requests; for the options see ``SimEngine``."""
        server = self.server_for(window)
        budget = self.budget_of(window, server, plan)
        return server.build_engine(
            plan, budget, keep_iterations=False, graph=graph, env=env, external_clock=external_clock
        )

    def budget_of(self, window: Window, server: ServerSpec, plan: Plan) -> Budget:
        """Return the budget of a window on its server, which begins with a plan."""
        limits = self.budget
        if window.high_share is not None or window.low_share is not None:
            high_share = window.high_share or limits.high_share
            limits = replace(limits, high_share=high_share, low_share=min(high_share, window.low_share or high_share))
        if window.notice_s is not None:
            limits = replace(limits, notice_s=window.notice_s)
        context = server.budget_context(plan)
        return window_budget(context, limits, window.budget, window.budget_seed, self.windows.window_s)

    def earned(self, engine: Served, requests: int) -> float:
        """Return the utility so far, in [0, 1]: the quality kept by requests that met the SLO, over ``requests``."""
        if not requests:
            return 1.0
        records = engine.records()
        met = met_slo(records, self.slo)
        loss = np.where(met, records.quality_nll - self.dense_nll, 0.0)
        return float((kept_quality(loss) * met).sum()) / requests

    def lost(self, engine: Served, requests: int, now_s: float) -> float:
        """Return the utility that is out of reach at ``now_s``, in [0, 1] (``agents.envs.reward.utility_lost``)."""
        return utility_lost(engine.records(), self.slo, self.dense_nll, now_s, requests) if requests else 0.0


def _engine(name: str, sources: Sequence[str], prefix_caching: bool) -> EngineConfig:
    """Return the engine of conf/engine, with a prefix cache in the unit of the sources if it is to have one.

    Raises:
        ConfigError: for a prefix cache with sources that have no hash ids, or ids of different numbers of tokens.
    """
    config: EngineConfig = build_option("engine", name)
    if not prefix_caching and not config.prefix_caching:
        return config
    traces = {source: source_trace(source) for source in sources}
    if without := [source for source, trace in traces.items() if trace.hash_ids is None]:
        raise ConfigError(
            f"prefix_caching needs hash ids, and the source {without[0]} has none; take sources that have them, such "
            "as sources=[chats], or set prefix_caching=false"
        )
    units = {source: trace.block_tokens for source, trace in traces.items()}
    if len(set(units.values())) > 1:
        raise ConfigError(
            f"one hash id stands for different numbers of tokens in the sources: {units}; take sources of one number"
        )
    return replace(config, prefix_caching=True, hash_block_tokens=units[sources[0]])


def _check_known(actions: ServeActions, nll: Callable[[Plan], float], quality: str) -> None:
    """Check that a quality table knows what every plan of a table loses.

    Raises:
        ConfigError: for a plan that it does not know.
    """
    for name, plan in zip(actions.names, actions.plans, strict=True):
        try:
            known = math.isfinite(nll(plan))
        except RapLabError as error:
            raise ConfigError(f"actions: {name}: {error}") from error
        if not known:
            raise ConfigError(
                f"actions: quality={quality} does not know what the plan {name} loses; take kv_bits, compute_bits, "
                "kv_only and kv_compression out of actions, or a table that has them, such as smollm2_135m"
            )


DEFAULT_ACTIONS: Mapping[str, Any] = {
    "drops": [0, 2, 4, 6, 10, 20],
    "low_layers": [0, 16, 32],
    "low_bits": 4,
    "waits": [1.0, 1.5],
    "runs": [None, 48, 28, 16, 9, 5],
    "start_drops": 6,
    "dwell_s": 4.0,
}


class ServeCore:
    """One window being served, without Gymnasium; ``ServeTrace``, the lookahead clone and the oracle use it."""

    def __init__(self, setting: ServeSetting) -> None:
        self.setting = setting

    def begin(self, window: Window) -> None:
        """Start a window with the first plan of its server (``ServeActions.start``)."""
        setting = self.setting
        self.window, self.foresight = window, setting.foresight(window)
        self.actions, self.observer = setting.actions_for(window), setting.observer_for(window)
        first = setting.actions.plans[self.actions.start]
        self.engine = setting.build_engine(window, first, graph=setting.graph_for(window))
        self.requests = self.engine.requests
        # The first decision comes after one tick, as in sim.replay.
        self.state: EngineState = self.engine.run_until(setting.tick_s)
        self.tick, self.choice, self.illegal = 1, Choice(self.actions.start), 0
        self.utility = self.potential = self.lost = 0.0
        self.history: list[tuple[float, int, int, float, float, int]] = []

    def observe(self) -> Floats32:
        """Return the observation, legal flags included, float32[entries]."""
        features = self.observer(self.state, self.choice)
        legal = self.actions.legal(self.state, self.choice)
        return np.concatenate((features, self.foresight[self.tick], legal)).astype(np.float32)

    def step(self, action: int) -> tuple[float, bool]:
        """Run the plan of an action for one tick; return the reward and whether the window is over."""
        setting = self.setting
        if self.actions.legal(self.state, self.choice)[action]:
            self.choice = self.actions.chosen(self.state, self.choice, action)
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
        """Return the window, and what happened in it so far."""
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


class ServeTrace(RenderMixin, gym.Env[NDArray[np.float32], np.int64]):
    """The plain environment: one window at a time."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, render_mode: str | None = None, **kwargs: Any) -> None:
        """Build the environment; ``kwargs`` go to ``ServeSetting``."""
        self.setting = ServeSetting(**kwargs)
        self.observation_space, self.action_space = self.setting.observation_space, self.setting.action_space
        self.render_mode = render_mode
        self.core = ServeCore(self.setting)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode; ``options={"window": ...}`` sets its window instead of sampling it."""
        requested = reset_options(options, ("window",)).get("window")
        super().reset(seed=seed)
        setting = self.setting
        window = setting.sample_window(self.np_random) if requested is None else as_window(requested)
        self.core.begin(window)
        return self.core.observe(), self.core.info() | mask_info(self.action_masks()) | {
            "observation_table": setting.table.rows(),
            "actions": setting.table.actions,
        }

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Run the chosen plan for one tick; return the step as Gymnasium defines it."""
        reward, over = self.core.step(one_action(action, len(self.setting.actions.plans)))
        return self.core.observe(), reward, over, False, self.core.info() | mask_info(self.action_masks())

    def action_masks(self) -> Bools:
        """Return which actions are legal now, bool[actions]; sb3-contrib's MaskablePPO calls this."""
        return self.core.actions.legal(self.core.state, self.core.choice)

    def _figure(self) -> Any:
        """Plot the queue, the oldest wait, the budget and the chosen plans over time."""
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
        memory.step(time_s, [b / GIB for b in budget], where="post")
        memory.set(ylabel="budget, GiB", ylim=(0, None))
        levels = [self.setting.actions.levels[action] for action in chosen]
        for k, name in enumerate(("blocks dropped", "low layers", "queue limit")):
            plan.step(time_s, [level[k] for level in levels], where="post", label=name)
        plan.set(xlabel="s", ylabel="level", ylim=(-0.05, 1.05))
        plan.legend(fontsize=7)
        return figure


__all__ = ["DEFAULT_ACTIONS", "ServeSetting", "ServeTrace"]
