"""``ServeTrace-v0`` for training: many windows, their engines stepped by one compiled call (``sim.engine.batch_step``).

Its episodes are those of ``ServeTrace``, step by step (tests/agents/envs/test_serve.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from agents.envs.serve import ServeSetting
from agents.envs.serve_windows import Window
from sim.compiled import compiled
from sim.engine import kernel
from sim.engine.batch_step import OLDEST_WAIT_S, WAITING, Fleet
from sim.engine.plan_graph import PlanBook
from sim.engine.sim_engine import MEMORY_OF_PLANS
from sim.policies.observation.serve import ServeObservers
from sim.results.metrics import Slo
from sim.types import Bools, Floats, Floats32, Ints

UNKNOWN = -1.0


class ServeTraceVector(VectorEnv[Any, Any, Any]):
    """Many windows at once.

    An environment whose episode has ended is reset by its next step, whose action is ignored (autoreset NEXT_STEP).
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, num_envs: int = 1, **words: Any) -> None:
        """Build ``num_envs`` environments; ``words`` are those of ``ServeSetting``."""
        self.setting = setting = ServeSetting(**words)
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = setting.observation_space, setting.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = None
        self._fleet = Fleet(num_envs, setting.actions.plans)
        self._observers = ServeObservers(setting.model, setting.actions, setting.kv_block_layer_bytes, num_envs)
        self._book = PlanBook(setting.model, setting.nll)
        self._rngs = [np.random.default_rng(s) for s in np.random.SeedSequence().spawn(num_envs)]
        self._tick = np.zeros(num_envs, dtype=np.int64)
        self._requests = np.zeros(num_envs, dtype=np.int64)
        self._settled = np.full((num_envs, 1), UNKNOWN)
        self._utility, self._lost, self._potential = np.zeros(num_envs), np.zeros(num_envs), np.zeros(num_envs)
        self._over = np.zeros(num_envs, dtype=np.bool_)
        self._seen = np.zeros((0, 0))
        self._slo = slo_seconds(setting.slo)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Floats32, dict[str, Any]]:
        """Begin an episode everywhere; environment i is seeded with seed + i.

        ``options={"windows": [...]}`` sets the window of each environment instead of sampling them.
        """
        if seed is not None:
            seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else list(seed)
            for i, one in enumerate(seeds):
                if one is not None:  # the generator that Env.reset(seed=...) makes
                    self._rngs[i] = np.random.Generator(np.random.PCG64(one))
        given = (options or {}).get("windows")
        for i in range(self.num_envs):
            self._begin(i, None if given is None else given[i])
        self._over[:] = False
        return self._serve(np.full(self.num_envs, -1)), {}

    def _begin(self, i: int, window: Window | None = None) -> None:
        """Put an engine for another window in a place; its first tick is served next."""
        setting = self.setting
        window = window or setting.windows.sample(self._rngs[i], setting.split, setting.sources)
        if len(self._book) > MEMORY_OF_PLANS // 2:
            self._book = PlanBook(setting.model, setting.nll)
        engine = setting.build_engine(window, setting.actions.plans[0], book=self._book, driven=True)
        self._fleet.place(i, engine)
        self._observers.begin(i)
        self._requests[i], self._tick[i] = engine.requests, 0
        self._utility[i] = self._lost[i] = self._potential[i] = 0.0
        if engine.requests > self._settled.shape[1]:
            self._settled = np.full((self.num_envs, 2 * engine.requests), UNKNOWN)
        self._settled[i] = UNKNOWN

    def _serve(self, wanted: Ints) -> Floats32:
        """Serve one tick everywhere; return the observations."""
        self._tick += 1
        self._seen = self._fleet.step(wanted, np.multiply(self._tick, self.setting.tick_s, dtype=np.float64))
        features = self._observers(self._seen)
        return np.concatenate((features, self._observers.legal(self._seen)), axis=1, dtype=np.float32)

    def step(self, actions: Any) -> tuple[Floats32, Floats, Bools, Bools, dict[str, Any]]:
        """Step every environment; those whose episode has ended begin a new one instead."""
        setting, observers = self.setting, self._observers
        chosen = np.asarray(actions, dtype=np.int64)
        legal = observers.legal(self._seen)[np.arange(self.num_envs), chosen]
        observers.choose(self._seen, chosen, legal & ~self._over)
        begun = self._over.copy()
        for i in np.flatnonzero(begun).tolist():
            self._begin(i)
        seen = self._serve(np.where(begun, -1, observers.action))
        over = ~begun & (self._tick >= setting.ticks)
        if over.any():
            self._serve_rest(over)
        utility, lost = np.empty(self.num_envs), np.empty(self.num_envs)
        moments_s = np.where(over, math.inf, self._tick * setting.tick_s)
        settle_utility(
            self._fleet.tables, self._settled, moments_s, self._slo, setting.dense_nll, self._requests, utility, lost
        )
        gained = self._lost - lost if setting.reward.kind == "lost" else utility - self._utility
        self._utility, self._lost = np.where(begun, 0.0, utility), np.where(begun, 0.0, lost)
        potential = setting.reward.potentials(
            self._seen[:, OLDEST_WAIT_S], self._seen[:, WAITING], self._requests, setting.slo.ttft_s
        )
        potential[over | begun] = 0.0
        reward = np.where(begun, 0.0, setting.reward(gained, self._potential, potential))
        self._potential = potential
        self._over = over
        infos: dict[str, Any] = {}
        if over.any():
            infos = {"utility": np.where(over, utility, 0.0), "_utility": over.copy()}
        return seen, reward, over, np.zeros(self.num_envs, dtype=np.bool_), infos

    def _serve_rest(self, over: Bools) -> None:
        """Serve what is left of the windows that are over; what was seen at their last tick stays."""
        seen = self._seen.copy()
        until_s = np.where(over, math.inf, self._tick * self.setting.tick_s).astype(np.float64)
        self._fleet.step(np.full(self.num_envs, -1), until_s)
        self._seen = seen


def slo_seconds(slo: Slo) -> Floats:
    """Return the targets of TTFT, TPOT and E2E, float64[3]; ``inf`` where there is none."""
    return np.array([math.inf if target is None else target for target in (slo.ttft_s, slo.tpot_s, slo.e2e_s)])


@compiled()
def settle_utility(
    tables: NDArray[np.int64],
    settled: Floats,
    now_s: Floats,
    slo_s: Floats,
    dense_nll: float,
    requests: Ints,
    utility: Floats,
    lost: Floats,
) -> None:
    """Work out the utility so far of each window, and how much of it is out of reach (``agents.envs.reward``).

    Args:
        tables: int64[n, arrays, 3], the engines. now_s: float64[n], ``inf`` where a window has been served.
        settled: float64[n, most requests], the share lost by each request that has ended; ``UNKNOWN`` at first.
        slo_s: float64[3], targets of TTFT, TPOT and E2E. dense_nll: nats a token of the dense model.
        requests: int64[n], in each window. utility, lost: float64[n], written.
    """
    for at in range(len(tables)):
        s = tables[at]
        n, request_i, request_f = kernel.ints_of(s), kernel.request_i_of(s), kernel.request_f_of(s)
        kernel.settle(s)
        earned, gone = 0.0, 0.0
        for r in range(n[kernel.NEXT_ARRIVAL]):
            share = settled[at, r]
            if share < 0.0:
                status, produced = request_i[r, kernel.STATUS], request_i[r, kernel.PRODUCED]
                arrival_s, first_s = request_f[r, kernel.ARRIVAL_S], request_f[r, kernel.FIRST_S]
                share = 1.0
                in_time = (now_s[at] if np.isnan(first_s) else first_s) - arrival_s <= slo_s[0]
                if status == kernel.FINISHED:
                    finish_s = request_f[r, kernel.FINISH_S]
                    in_time = in_time and finish_s - arrival_s <= slo_s[2]
                    in_time = in_time and (produced < 2 or (finish_s - first_s) / (produced - 1) <= slo_s[1])
                if in_time and status != kernel.REJECTED:
                    loss = request_f[r, kernel.NLL_SUM] / produced - dense_nll if produced > 0 else 0.0
                    share = 1.0 - np.exp(-max(loss, 0.0))
                if status == kernel.FINISHED or status == kernel.REJECTED:
                    settled[at, r] = share
            if request_i[r, kernel.STATUS] == kernel.FINISHED:
                earned += 1.0 - share
            gone += share
        windows = max(requests[at], 1)
        utility[at] = earned / windows if requests[at] > 0 else 1.0
        lost[at] = gone / windows


__all__ = ["ServeTraceVector", "settle_utility", "slo_seconds"]
