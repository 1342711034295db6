"""``ServeTrace-v0`` for training: many windows whose engines one compiled call steps (``sim.engine.batch_step``).

Episodes equal those of ``agents.envs.serve.ServeTrace`` step by step (tests/agents/envs/test_serve.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from agents.envs.checks import RESET_MASK, for_each_row, reset_options, row_actions, rows_to_reset
from agents.envs.serve import ServeSetting
from agents.envs.serve_windows import Window, as_window
from agents.envs.vector import MaskedRows, Replayed, final_infos, reseed
from sim.compiled import compiled
from sim.engine import kernel
from sim.engine.batch_step import OLDEST_WAIT_S, WAITING, VectorEngines
from sim.policies.observation.serve import ServeObservers
from sim.results.metrics import Slo
from sim.types import Bools, Floats, Floats32, Ints

UNKNOWN = -1.0
"""Marks a request whose lost share is not final yet."""


class ServeTraceVector(Replayed, MaskedRows, VectorEnv[Any, Any, Any]):
    """Many windows at once.

    The step after the end of an episode resets that environment and ignores its action (autoreset NEXT_STEP).
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, num_envs: int = 1, **kwargs: Any) -> None:
        """Build ``num_envs`` environments; ``kwargs`` go to ``ServeSetting``."""
        self.setting = setting = ServeSetting(**kwargs)
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = setting.observation_space, setting.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = None
        self._engines = VectorEngines(num_envs, setting.actions.plans)
        tpot_s = setting.slo.tpot_s or math.inf
        self._observers = ServeObservers(setting.model, setting.actions, setting.kv_block_layer_bytes, num_envs, tpot_s)
        self._rngs = [np.random.default_rng(s) for s in np.random.SeedSequence().spawn(num_envs)]
        self._tick = np.zeros(num_envs, dtype=np.int64)
        self._requests = np.zeros(num_envs, dtype=np.int64)
        self._settled = np.full((num_envs, 1), UNKNOWN)
        self._utility, self._lost, self._potential = np.zeros(num_envs), np.zeros(num_envs), np.zeros(num_envs)
        self._over = np.zeros(num_envs, dtype=np.bool_)
        self._seen = np.zeros((0, 0))
        self._begun = False
        self._windows: list[Any] = [None] * num_envs
        self._played: list[Ints] = []
        self._together = False
        self._legal = np.ones((num_envs, len(setting.actions.plans)), dtype=np.bool_)
        self._slo = slo_seconds(setting.slo)
        self._foresight = np.zeros((num_envs, setting.ticks + 1, setting.foreseen), dtype=np.float32)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Floats32, dict[str, Any]]:
        """Begin an episode in every environment; environment i is seeded with seed + i.

        ``options={"windows": [...]}`` sets the window of each environment instead of sampling them;
        ``options={"reset_mask": bool[n]}`` resets only these environments.
        """
        options = reset_options(options, ("windows", RESET_MASK))
        where = rows_to_reset(options, self.num_envs, self._begun)
        requested = for_each_row(options, "windows", self.num_envs)
        windows = [None if requested is None else as_window(one) for one in requested or [None] * self.num_envs]
        reseed(self._rngs, seed, where.tolist())
        self._note_begin(where)
        for i in np.flatnonzero(where).tolist():
            self._begin(i, windows[i])
        self._over[where] = False
        self._begun = True
        return self._serve(np.full(self.num_envs, -1), where), self._mask_infos()

    def _begin(self, i: int, window: Window | None = None) -> None:
        """Give environment i a new window and engine; the caller serves its first tick."""
        setting = self.setting
        window = window or setting.sample_window(self._rngs[i])
        self._windows[i], self._foresight[i] = window, setting.foresight(window)
        graph = setting.graph_for(window)
        first = setting.actions.plans[setting.actions_for(window).start]
        engine = setting.build_engine(window, first, graph=graph, external_clock=True)
        self._engines.place(i, engine)
        self._observers.begin(i, low_bits=window.low_bits, low_loss=setting.low_loss(window.low_bit_cost))
        self._requests[i], self._tick[i] = engine.requests, 0
        self._utility[i] = self._lost[i] = self._potential[i] = 0.0
        if engine.requests > self._settled.shape[1]:
            self._settled = np.full((self.num_envs, 2 * engine.requests), UNKNOWN)
        self._settled[i] = UNKNOWN

    def _serve(self, wanted: Ints, where: Bools | None = None) -> Floats32:
        """Serve one tick in every environment, or where ``where`` says; return the observations, float32[n, entries].

        Elsewhere an engine stays at its time, and what was observed of it stays too.
        """
        self._tick += 1 if where is None else where
        until_s = np.multiply(self._tick, self.setting.tick_s, dtype=np.float64)
        if where is None or where.all():
            self._seen = self._engines.step(wanted, until_s)
        else:
            before = self._seen.copy()
            seen = self._engines.step(wanted, np.where(self._over, math.inf, until_s))
            self._seen = np.where(where[:, None], seen, before)
        features = self._observers(self._seen)
        self._legal = self._observers.legal(self._seen)
        foresight = self._foresight[np.arange(self.num_envs), self._tick]
        return np.concatenate((features, foresight, self._legal), axis=1, dtype=np.float32)

    def step(self, actions: Any) -> tuple[Floats32, Floats, Bools, Bools, dict[str, Any]]:
        """Step every environment; one whose episode has ended begins a new one instead."""
        setting, observers = self.setting, self._observers
        chosen = row_actions(actions, self.num_envs, len(setting.actions.plans))
        legal = observers.legal(self._seen)[np.arange(self.num_envs), chosen]
        observers.choose(self._seen, chosen, legal & ~self._over)
        restarting = self._over.copy()
        self._note_begin(restarting)
        if not restarting.any():
            self._played.append(chosen.copy())
        for i in np.flatnonzero(restarting).tolist():
            self._begin(i)
        observations = self._serve(np.where(restarting, -1, observers.action))
        over = ~restarting & (self._tick >= setting.ticks)
        if over.any():
            self._serve_rest(over)
        utility, lost = np.empty(self.num_envs), np.empty(self.num_envs)
        now_s = np.where(over, math.inf, self._tick * setting.tick_s)
        settle_utility(
            self._engines.tables, self._settled, now_s, self._slo, setting.dense_nll, self._requests, utility, lost
        )
        gained = self._lost - lost if setting.reward.kind == "lost" else utility - self._utility
        self._utility, self._lost = np.where(restarting, 0.0, utility), np.where(restarting, 0.0, lost)
        potential = setting.reward.potentials(
            self._seen[:, OLDEST_WAIT_S], self._seen[:, WAITING], self._requests, setting.slo.ttft_s
        )
        potential[over | restarting] = 0.0
        reward = np.where(restarting, 0.0, setting.reward(gained, self._potential, potential))
        self._potential = potential
        self._over = over
        infos = self._mask_infos() | final_infos(over, utility=np.where(over, utility, 0.0))
        return observations, reward, over, np.zeros(self.num_envs, dtype=np.bool_), infos

    def _serve_rest(self, over: Bools) -> None:
        """Serve the windows that are over to the end of their requests; keep what was observed at their last tick."""
        observed = self._seen.copy()
        until_s = np.where(over, math.inf, self._tick * self.setting.tick_s).astype(np.float64)
        self._engines.step(np.full(self.num_envs, -1), until_s)
        self._seen = observed


def slo_seconds(slo: Slo) -> Floats:
    """Return the targets of TTFT, TPOT and E2E in seconds, float64[3]; ``inf`` where there is none."""
    return np.array([math.inf if target is None else target for target in (slo.ttft_s, slo.tpot_s, slo.e2e_s)])


@compiled(inline=True)
def _share_lost(request: Any, now_s: float, slo_s: Floats, dense_nll: float) -> float:
    """Return the share of a request's worth that is lost: all of it once it misses its SLO, else what pruning costs."""
    produced, arrival_s, first_s = request.produced_tokens, request.arrival_s, request.first_token_s
    in_time = (now_s if np.isnan(first_s) else first_s) - arrival_s <= slo_s[0]
    if request.status == kernel.FINISHED:
        in_time = in_time and request.finish_s - arrival_s <= slo_s[2]
        in_time = in_time and (produced < 2 or (request.finish_s - first_s) / (produced - 1) <= slo_s[1])
    elif np.isinf(now_s):  # it never ends
        in_time = False
    if not in_time or request.status == kernel.REJECTED:
        return 1.0
    loss = request.nll_sum / produced - dense_nll if produced > 0 else 0.0
    return float(1.0 - np.exp(-max(loss, 0.0)))


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
    """Compute the utility of each window so far, and how much of it is out of reach (``agents.envs.reward``).

    Args:
        tables: int64[n, arrays, 3], the engines.
        settled: float64[n, most requests], the share lost by each request that has ended; ``UNKNOWN`` until then.
        now_s: float64[n], seconds since the start of each window; ``inf`` after it has been served.
        slo_s: float64[3], targets of TTFT, TPOT and E2E in seconds. dense_nll: of the dense model, nats per token.
        requests: int64[n], in each window; for a replica, in all windows of its cluster.
        utility, lost: float64[n], written, in [0, 1].
    """
    for at in range(len(tables)):
        s = tables[at]
        requests_here = kernel.requests_of(s)
        kernel.settle(s)
        earned, gone, n = 0.0, 0.0, kernel.counters_of(s)
        in_sessions = n.in_sessions == kernel.OWN_SESSIONS
        for place in range(n.arrived):
            r = kernel.arrival_order_of(s)[place] if in_sessions else place
            share, request = settled[at, r], requests_here[r]
            if share < 0.0:
                ended = request.status == kernel.FINISHED or request.status == kernel.REJECTED
                share = _share_lost(request, now_s[at], slo_s, dense_nll)
                if ended:
                    settled[at, r] = share
            if request.status == kernel.FINISHED:
                earned += 1.0 - share
            gone += share
        if in_sessions and now_s[at] == np.inf:  # turns that never arrived, because the one before them never ended
            gone += requests[at] - n.arrived
        windows = max(requests[at], 1)
        utility[at] = earned / windows if requests[at] > 0 else 1.0
        lost[at] = gone / windows


__all__ = ["ServeTraceVector", "settle_utility", "slo_seconds"]
