"""Windows of traces with sessions: which turns they hold, that turns follow answers, and that both forms are equal."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from agents.baselines.serve import conf_policy, policy_context
from agents.envs import serve_sources
from agents.envs.cluster import ClusterSetting, ServeCluster
from agents.envs.cluster_vector import ServeReplicas
from agents.envs.serve import ServeSetting, ServeTrace
from agents.envs.serve_requests import chains_of, cut, joined
from agents.envs.serve_sources import load_source, source_span_s
from agents.envs.serve_vector import ServeTraceVector
from agents.envs.serve_windows import Window, serve_windows
from agents.evaluation.serve import play_window
from sim.cost.gpu import Gpu
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError
from sim.policies.lookahead import lookahead
from sim.traces.trace import Trace

NAN = math.nan
WINDOW = Window(source="chats", start_s=700.0, rate=1.6, budget="cotenant", budget_seed=4)
BUSY = replace(WINDOW, rate=2.5, high_share=1.187, low_share=0.5)

# Session 0 begins at 0 s, session 1 at 40 s, session 2 at 95 s; each thinks 20 s, as if every answer came at once.
TRACE = Trace(
    arrival_s=np.array([0.0, 20.0, 40.0, 40.0, 60.0, 60.0, 95.0, 115.0]),
    prompt_tokens=np.array([10, 20, 30, 11, 40, 21, 12, 22]),
    output_tokens=np.full(8, 5),
    session=np.array([0, 0, 0, 1, 0, 1, 2, 2]),
    think_s=np.array([NAN, 20.0, 20.0, NAN, 20.0, 20.0, NAN, 20.0]),
)


def prompts(start_s: float, rate: float, from_s: float = 0.0) -> tuple[list[int], list[float], list[float]]:
    """Return the prompts, arrivals and think times of a window of 60 s of ``TRACE``."""
    found = cut(TRACE, chains_of(TRACE), start_s=start_s, rate=rate, window_s=60.0, from_s=from_s)
    assert found.think_s is not None
    return found.prompt_tokens.tolist(), found.arrival_s.tolist(), np.nan_to_num(found.think_s, nan=-1.0).tolist()


def test_a_session_that_began_before_the_window_goes_on_in_it_and_ends_with_it() -> None:
    # Two turns of session 0 lie before 30 s; the third begins the session there. The last turn of session 2, at 115 s,
    # lies behind the end.
    assert prompts(30.0, 1.0) == ([30, 11, 40, 21], [10.0, 10.0, 30.0, 30.0], [-1.0, -1.0, 20.0, 20.0])
    assert prompts(90.0, 1.0)[0] == [12, 22]


def test_a_faster_window_begins_sessions_faster_and_leaves_the_think_times_alone() -> None:
    # At rate 2, the 60 s of the window are 120 s of the trace: sessions begin at 0, 20 and 47.5 s.
    found, at_s, think_s = prompts(0.0, 2.0)
    assert found == [10, 20, 11, 30, 21, 12]
    assert at_s == [0.0, 20.0, 20.0, 40.0, 40.0, 47.5]
    assert think_s == [-1.0, 20.0, -1.0, 20.0, 20.0, -1.0]


def test_a_session_that_began_before_the_split_is_left_out() -> None:
    assert prompts(30.0, 1.0, from_s=30.0)[0] == [11, 21]


def test_a_later_turn_with_a_time_of_its_own_waits_for_no_answer() -> None:
    think_s = TRACE.think_s.copy() if TRACE.think_s is not None else np.zeros(0)
    think_s[2] = NAN  # the third turn of session 0
    own = replace(TRACE, think_s=think_s)
    found = cut(own, chains_of(own), start_s=0.0, rate=2.0, window_s=60.0, from_s=0.0)
    sessions = found.sessions
    assert sessions is not None
    # Sped up, it comes with the second turn; the turn after it follows it, and that of session 1 its own.
    assert found.prompt_tokens.tolist() == [10, 20, 30, 11, 40, 21, 12]
    assert sessions.after.tolist() == [1, -1, 4, 5, -1, -1, -1]


def test_windows_join_with_sessions_of_their_own_in_order_of_arrival() -> None:
    chains = chains_of(TRACE)
    parts = [cut(TRACE, chains, start_s=start_s, rate=1.0, window_s=30.0, from_s=0.0) for start_s in (0.0, 35.0)]
    plain = cut(replace(TRACE, session=None, think_s=None), None, start_s=0.0, rate=1.0, window_s=30.0, from_s=0.0)
    trace = joined([*parts, plain])
    assert trace.session is not None
    assert trace.prompt_tokens.tolist() == [10, 10, 30, 11, 20, 20, 40, 21]
    assert trace.session.tolist() == [0, 6, 2, 3, 0, 7, 2, 3]


def test_every_session_of_a_source_belongs_to_the_split_in_which_it_begins() -> None:
    windows, rng, source = serve_windows(), np.random.default_rng(0), load_source("chats")
    assert source.chains is not None
    for split in ("train", "validation", "test"):
        begin_s, end_s = source_span_s("chats", split)
        begun_s = dict(zip(source.chains.number, source.chains.begun_s, strict=True))
        for _ in range(8):
            window = windows.sample(rng, split, ("chats",))  # type: ignore[arg-type]
            session = windows.cut(window).session
            assert session is not None
            assert len(session) > 100
            assert all(begin_s <= begun_s[number] < end_s for number in session.tolist())


def test_the_blocks_of_tokens_of_two_splits_are_different_ones() -> None:
    source = load_source("chats")
    assert source.trace.hash_ids is not None
    assert source.chains is not None
    spans = [source_span_s("chats", split) for split in ("train", "test")]
    ids = [
        {int(source.trace.hash_ids[row][0]) for row in np.flatnonzero((begun >= low) & (begun < high)).tolist()
         if len(source.trace.hash_ids[row])}
        for begun in [source.chains.begun_s] for low, high in spans
    ]  # fmt: skip
    assert min(map(len, ids)) > 1000
    assert not ids[0] & ids[1]


def follows_answers(env: ServeTrace, window: Window) -> None:
    """Check that each turn arrived its think time after the one before it had ended."""
    engine, found = env.core.engine, env.setting.windows.cut(window)
    assert found.sessions is not None
    assert found.think_s is not None
    records, order = engine.records(), engine.arrival_order()
    assert sorted(order.tolist()) == list(range(len(found)))
    assert (np.diff(records.arrival_s) >= 0).all()
    at_s, ended_s, rejected = np.empty(len(found)), np.empty(len(found)), np.empty(len(found), dtype=bool)
    at_s[order], ended_s[order] = records.arrival_s, records.finish_s
    rejected[order] = ~np.isfinite(records.finish_s)
    before = np.flatnonzero((found.sessions.after >= 0) & ~rejected)
    later = found.sessions.after[before]
    assert len(before) > 100
    np.testing.assert_allclose(at_s[later], ended_s[before] + found.think_s[later], rtol=1e-12)
    first = np.isnan(found.think_s)
    np.testing.assert_allclose(at_s[first], found.arrival_s[first])


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("kind", ["earned", "lost"])
def test_the_vector_environment_equals_the_plain_one_on_sessions_at_every_step(caching: bool, kind: str) -> None:
    kwargs: dict[str, Any] = {
        "sources": ["chats"],
        "prefix_caching": caching,
        "slo": "ttft_2s_tpot_100ms",
        "reward": {"kind": kind},
    }
    windows, rng = [WINDOW, BUSY], np.random.default_rng(3)
    envs, vector = [ServeTrace(**kwargs) for _ in windows], ServeTraceVector(2, **kwargs)
    plain = np.stack([env.reset(options={"window": window})[0] for env, window in zip(envs, windows, strict=True)])
    fast, _ = vector.reset(seed=0, options={"windows": windows})
    actions, total, over = np.zeros(2, dtype=np.int64), np.zeros(2), False
    while not over:
        np.testing.assert_allclose(fast, plain, rtol=1e-6, atol=1e-7)
        actions = np.where(rng.random(2) < 0.2, rng.integers(vector.setting.action_space.n, size=2), actions)
        fast, reward, terminated, _, infos = vector.step(actions)
        steps = [env.step(action) for env, action in zip(envs, actions, strict=True)]
        plain, over = np.stack([step[0] for step in steps]), steps[0][2]
        np.testing.assert_allclose(reward, [step[1] for step in steps], rtol=1e-9, atol=1e-9)
        assert terminated.tolist() == [step[2] for step in steps]
        total += reward
    utility = np.array([step[4]["utility"] for step in steps])
    np.testing.assert_allclose(infos["utility"], utility, rtol=1e-12)
    constant = 1.0 if kind == "lost" else 0.0
    np.testing.assert_allclose(total / vector.setting.reward.scale, utility - constant, atol=1e-9)
    assert 0.0 < utility.min() < 0.98
    for env, window in zip(envs, windows, strict=True):
        follows_answers(env, window)
    hits = sum(env.core.engine.records().cached_tokens.sum() for env in envs)
    assert (hits > 10_000) == caching


def test_a_turn_that_never_arrives_is_lost_in_both_forms() -> None:
    kwargs: dict[str, Any] = {"sources": ["chats"], "actions": {"drops": [0], "low_layers": [0], "waits": [None]}}
    env, vector = ServeTrace(**kwargs), ServeTraceVector(1, **kwargs)
    moving = replace(WINDOW, budget="random_walk")
    env.reset(options={"window": moving})
    vector.reset(seed=0, options={"windows": [moving]})
    _shrink(env.core.engine)
    _shrink(vector._engines.engine(0))
    total, over = np.zeros(2), False
    while not over:
        _, reward, over, _, info = env.step(0)
        total += reward, vector.step(np.zeros(1, dtype=np.int64))[1][0]
    arrived = len(env.core.engine.records())
    assert 0 < arrived < info["requests"]
    np.testing.assert_allclose(total / env.setting.reward.scale, info["utility"] - 1.0, atol=1e-9)


def _shrink(engine: SimEngine) -> None:
    """Leave an engine no memory from some second on, for good: requests that wait stay, and no turn follows them."""
    budget = engine._state.budget
    late = budget["from_s"] >= 20.0
    assert late.any()
    budget["budget_bytes"][late] = 1


def test_replicas_of_a_cluster_equal_the_plain_cluster_on_sessions_and_keep_them() -> None:
    kwargs: dict[str, Any] = {
        "replicas": 2,
        "sources": ["chats"],
        "router": "session_affinity",
        "prefix_caching": True,
        "own_share": 0.5,
    }
    windows = [replace(WINDOW, rate=2.0), replace(BUSY, start_s=2500.0)]
    env, vector, rng = ServeCluster(**kwargs), ServeReplicas(2, **kwargs), np.random.default_rng(1)
    plain, _ = env.reset(options={"windows": windows})
    fast, _ = vector.reset(options={"windows": [windows]})
    actions, total, over = np.zeros(2, dtype=np.int64), 0.0, False
    while not over:
        np.testing.assert_allclose(fast, plain, rtol=1e-6, atol=1e-7)
        actions = np.where(rng.random(2) < 0.2, rng.integers(vector.setting.action_space.n, size=2), actions)
        fast, rewards, _, _, infos = vector.step(actions)
        plain, reward, over, _, info = env.step(actions)
        assert rewards.mean() == pytest.approx(reward, abs=1e-9)
        total += reward
    assert infos["utility"][0] == pytest.approx(info["utility"], rel=1e-12)
    assert total / env.setting.reward.scale == pytest.approx(info["utility"] - 1.0, abs=1e-9)
    records, trace = env.core.cluster.records(), env.core.cluster.trace
    assert len(records) == info["requests"] == len(trace)
    assert records.cached_tokens.sum() > 10_000
    assert trace.session is not None
    session, moved = trace.session[env.core.cluster.arrival_order()], 0
    for number in np.unique(session):
        replica = records.replica[session == number]
        moved += int((np.diff(replica) != 0).sum())
    assert moved < 0.1 * len(records)


def test_a_policy_that_looks_ahead_plays_sessions() -> None:
    setting = ServeSetting(sources=["chats"], quality="llama2_7b_transferred", prefix_caching=True)
    actions = {"order": setting.action_options["order"], "made_for": setting.model.name, "drops": [0, 6],
               "low_layers": [0, 32], "waits": [1.5]}  # fmt: skip
    context = policy_context(setting)
    window = replace(BUSY, rate=3.0)
    looking = lookahead(context, actions=actions, horizon_s=4.0, factors=[1.0])
    ahead, dense = (play_window(setting, window, policy) for policy in (looking, conf_policy("dense")(context)))
    assert ahead["utility"] > dense["utility"] + 0.05


def test_a_closed_loop_is_refused_and_a_step_that_lets_no_turn_wait_opens_it() -> None:
    made: dict[str, Any] = {"trace": "chat_users", "rate": (1.0, 1.0), "overrides": {"seed": 1}, "splits": {}}
    made["parts"] = {"train": (0.0, 1.0)}
    with pytest.raises(ConfigError, match=r"sources\.loop of conf/split/serve\.yaml: chat_users is a closed loop"):
        serve_sources._built("loop", serve_sources.Source(**made, steps=()), {})
    opened = {"_target_": "sim.traces.loops.open_loop", "_partial_": True}
    trace = serve_sources._built("loop", serve_sources.Source(**made, steps=(opened,)), {})
    assert trace.session is None
    assert len(trace) > 100


@pytest.mark.parametrize("kind", [ServeSetting, ClusterSetting])
def test_a_prefix_cache_needs_sources_with_hash_ids(kind: Any) -> None:
    with pytest.raises(ConfigError, match="prefix_caching needs hash ids, and the source burst has none"):
        kind(sources=["chats", "burst"], prefix_caching=True)
    setting = kind(sources=["chats"], prefix_caching=True)
    assert setting.engine.hash_block_tokens == 16
    assert isinstance(setting.gpu, Gpu)
