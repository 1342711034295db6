"""The compiled engine equals the plain one, request by request and transition by transition (law 6)."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from sim.compare import variants
from sim.config import CONF_DIR
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.plan import Plan, dense_plan, drop, with_mask
from sim.engine.budget import Budget
from sim.engine.executor import Iteration
from sim.engine.pricing_executor import PricingExecutor
from sim.engine.protocol import EngineState
from sim.engine.sim_engine import SimEngine
from sim.errors import BudgetError, ConfigError, PlanError
from sim.paths import REPOSITORY
from sim.policies.schedule import Schedule
from sim.replay.loop import replay
from sim.replay.run import build_engine, build_trace, replay_with
from sim.results.records import Records
from sim.traces.trace import Trace
from tests.sample import quick
from tests.sim.engine import streamed_cases
from tests.sim.engine.kernel_cases import LATE_S, Case, differences, merged, random_case, serve, shrunk, unequal
from tests.sim.engine.plain_engine import PlainEngine
from tests.sim.serving import TINY, linear_latency, requests, tiny_engine

DENSE = dense_plan(TINY)


@pytest.mark.parametrize("first", quick(range(0, 400, 20), 7))
def test_the_compiled_engine_leaves_the_records_of_the_plain_one(first: int) -> None:
    for seed in range(first, first + 20):
        assert differences(random_case(seed)) == [], f"seed {seed}; `make fuzz FIRST={seed} CASES=1` shrinks it"


@pytest.mark.parametrize("first", quick(range(0, 200, 20), 3))
def test_the_engines_agree_on_eight_layers_of_which_most_plans_stream_some(first: int) -> None:
    for seed in range(first, first + 20):
        assert streamed_cases.differences(streamed_cases.random_case(seed)) == [], f"seed {seed}"


@pytest.mark.parametrize("first", quick([1000, 1020], 1))
def test_the_engines_agree_when_the_compiled_one_forgets_plans_all_the_time(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sim.engine.sim_engine.MEMORY_OF_PLANS", 2)
    for seed in range(first, first + 20):
        assert differences(random_case(seed)) == [], f"seed {seed}"


def test_the_engines_agree_on_a_model_of_more_layers_than_fit_a_word() -> None:
    deep = dataclasses.replace(TINY, num_layers=130)
    plans = [with_mask(dense_plan(deep), drop(deep, mha=mha)) for mha in ([0, 59], [60, 61, 129], [119, 120])]
    engines = []
    for kind in (PlainEngine, SimEngine):
        engine = kind(
            model=deep,
            latency=linear_latency(0.1, 0.001, 0.0001),
            config=tiny_engine().config,
            plan=dense_plan(deep),
            budget_bytes=budget_for_kv_blocks(deep, dense_plan(deep), 60, 0, 16),
            host_to_device_bytes_per_s=1e5,
        )
        engine.submit(requests(*[(0.3 * i, 30, 40) for i in range(40)]))
        engine.apply_at([1.0, 2.0, 4.0, 5.5, 7.0], [plans[0], plans[1], dense_plan(deep), plans[2], plans[0]])
        engine.run_until(math.inf)
        engines.append(engine)
    plain, fast = engines
    assert len(fast.transitions()) == 5
    for name in ("records", "iterations", "transitions"):
        assert list(unequal(getattr(plain, name)(), getattr(fast, name)())) == [], name


def test_decisions_known_beforehand_are_those_made_at_their_moments() -> None:
    pruned = with_mask(DENSE, drop(TINY, mha=[0], ffn=[1]))
    moments = [(2.0, pruned), (5.0, DENSE), (5.5, DENSE), (9.0, pruned)]
    found: list[SimEngine] = []
    for beforehand in (True, False):
        engine = tiny_engine()
        engine.submit(requests(*[(0.5 * i, 20, 10) for i in range(30)]))
        if beforehand:
            engine.apply_at([time_s for time_s, _ in moments], [plan for _, plan in moments])
        else:
            for time_s, plan in moments:
                engine.run_until(time_s)
                engine.apply(plan)
        engine.run_until(math.inf)
        found.append(engine)
    assert len(found[0].transitions()) == 3
    for name in ("records", "iterations", "transitions"):
        assert_equal(getattr(found[0], name)(), getattr(found[1], name)())


def test_a_schedule_leaves_the_records_of_a_policy_that_decides_at_each_tick() -> None:
    pruned = with_mask(DENSE, drop(TINY, mha=[0], ffn=[1]))
    schedule = Schedule((0.0, 1.1, 1.2, 4.0, 30.0, 1e6), (DENSE, pruned, DENSE, pruned, DENSE, pruned))
    trace = Trace(arrival_s=np.arange(30) * 0.5, prompt_tokens=np.full(30, 20), output_tokens=np.arange(1, 31) % 7 + 1)
    found: list[SimEngine] = []
    for policy in (schedule, Unscheduled(schedule)):
        engine = tiny_engine()
        replay(trace, engine, policy, tick_s=0.75, also_at_s=[3.9, 4.1])
        found.append(engine)
    assert found[0].transitions().time_s.tolist() == [4.1]
    for name in ("records", "iterations", "transitions"):
        assert_equal(getattr(found[0], name)(), getattr(found[1], name)())


@dataclasses.dataclass
class Unscheduled:
    """A schedule that the replay sees only as a policy."""

    schedule: Schedule

    @property
    def first_plan(self) -> Plan:
        return self.schedule.first_plan

    def __call__(self, state: EngineState) -> Plan:
        return self.schedule(state)


def test_decisions_out_of_order_or_illegal_are_refused_and_none_is_taken() -> None:
    engine = tiny_engine()
    engine.submit(requests((0.0, 20, 10)))
    pruned = with_mask(DENSE, drop(TINY, mha=[0]))
    with pytest.raises(ConfigError, match="decision 1 is for"):
        engine.apply_at([2.0, 1.0], [pruned, DENSE])
    with pytest.raises(ConfigError, match="2 moments for 1 plans"):
        engine.apply_at([1.0, 2.0], [pruned])
    with pytest.raises(PlanError):
        engine.apply_at([1.0, 2.0], [pruned, dataclasses.replace(DENSE, weight_bits=(3, 3))])
    engine.run_until(math.inf)
    assert len(engine.transitions()) == 0


@pytest.mark.parametrize("policy", ["dense", "greedy_stop", "morphserve"])
def test_the_engines_agree_on_a_real_model_under_a_policy_and_memory_that_moves(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["trace.duration_s=60", "budget.mean_away_s=8", "budget.mean_stay_s=8", "budget.cotenant_bytes=62e9"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = variants(compose("compare", overrides=[*overrides, "tick_s=0.5", f"only=[{policy}]"]))[policy]
    trace, engines = build_trace(cfg), []
    for kind in (PlainEngine, SimEngine):
        monkeypatch.setattr("sim.replay.run.SimEngine", kind)
        engine, decider = build_engine(cfg)
        replay_with(cfg, trace, engine, decider)
        engines.append(engine)
    plain, fast = engines
    for name in ("records", "iterations", "transitions"):
        assert list(unequal(getattr(plain, name)(), getattr(fast, name)())) == [], name
    assert list(unequal(merged(plain.token_gaps()), merged(fast.token_gaps()))) == []
    assert fast.budget_violation_s == pytest.approx(plain.budget_violation_s, rel=1e-9)
    assert fast.records().preemptions.sum() > 0


def test_the_random_cases_meet_everything_that_has_rules() -> None:
    """The comparison above covers only what some random case reaches."""
    met = dict.fromkeys(
        [
            *("preempted", "recomputed", "copied", "over budget", "rejected", "cut KV", "a KV hole", "known"),
            *("quantized KV", "hidden states", "ahead", "swapped", "swapped, prompts first", "waited for a copy"),
        ],
        0,
    )
    for seed in range(120):
        case = random_case(seed)
        try:
            engine, _ = serve(SimEngine, case)
        except BudgetError:
            continue
        records, transitions = engine.records(), engine.transitions()
        met["preempted"] += bool(records.preemptions.any())
        met["recomputed"] += bool(transitions.recomputed_tokens.any())
        met["copied"] += bool(transitions.bytes_in.any())
        met["over budget"] += engine.budget_violation_s > 0
        met["rejected"] += bool((records.status == 3).any())
        met["cut KV"] += any("KV " in plan for plan in transitions.to_plan)
        met["quantized KV"] += any("KV8" in plan or "KV4" in plan for plan in transitions.to_plan)
        met["hidden states"] += any("hidden states" in plan for plan in transitions.to_plan)
        swapped = case.config.preemption == "swap" and bool(records.preemptions.any())
        met["swapped"] += swapped
        met["swapped, prompts first"] += swapped and case.config.scheduler == "prefill_first"
        met["waited for a copy"] += case.config.copying == "blocking" and bool(transitions.bytes_in.any())
        met["ahead"] += case.config.schedules_ahead
        met["known"] += bool(case.scheduled) and len(transitions) > 0
        met["a KV hole"] += len(set(np.round(records.kept_params_share, 9))) > 2
    assert min(met.values()) >= 5, met


def test_a_difference_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: a plain engine that prices each iteration 1 ppm higher is detected."""
    original = PricingExecutor.price

    def dearer(executor: PricingExecutor, iteration: Iteration) -> tuple[float, bool]:
        seconds, extrapolated = original(executor, iteration)
        return seconds * (1 + 1e-6), extrapolated

    monkeypatch.setattr(PricingExecutor, "price", dearer)
    case = next(case for case in map(random_case, range(50)) if differences(case))
    small = shrunk(case)
    assert differences(small)
    assert len(small.requests) == 1
    assert small.plans == small.scheduled == small.ticks_s == ()


def play(engine: SimEngine, case: Case, from_s: float) -> None:
    changes = dict(case.plans)
    for time_s in sorted(time_s for time_s in {*changes, *case.ticks_s} if time_s > from_s):
        engine.run_until(time_s)
        if time_s in changes:
            engine.apply(changes[time_s])
    engine.run_until(math.inf)
    engine.run_until(LATE_S)


def assert_equal(ours: object, theirs: object) -> None:
    assert type(ours) is type(theirs)
    for field in dataclasses.fields(ours):  # type: ignore[arg-type]
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(a, np.ndarray):
            assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), field.name
        else:
            assert a == b, field.name


@pytest.mark.parametrize("seed", quick(range(60), 20))
def test_a_restored_engine_goes_on_as_if_nothing_had_happened_since(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if seed % 3 == 0:
        monkeypatch.setattr("sim.engine.sim_engine.MEMORY_OF_PLANS", 3)
    case = random_case(seed)
    try:
        straight, _ = serve(SimEngine, case)
    except BudgetError:
        pytest.skip("the budget of this seed holds no engine")
    engine = SimEngine(
        model=case.model,
        latency=case.latency,
        config=case.config,
        plan=case.first_plan,
        budget_bytes=case.budget(),
        host_to_device_bytes_per_s=case.host_to_device_bytes_per_s,
        slowdown=case.slowdown,
        copy_slowdown=case.copy_slowdown,
        copy_layer_s=case.copy_layer_s,
    )
    engine.submit(case.submitted())
    engine.apply_at([time_s for time_s, _ in case.scheduled], [plan for _, plan in case.scheduled])
    changes = dict(case.plans)
    moment_s = float(np.random.default_rng(seed).uniform(0, 30))
    before = sorted(time_s for time_s in {*changes, *case.ticks_s} if time_s <= moment_s)
    for time_s in before:
        engine.run_until(time_s)
        if time_s in changes:
            engine.apply(changes[time_s])
    engine.run_until(moment_s)
    here = engine.snapshot()
    for other in (with_mask(DENSE, drop(TINY, mha=[1], ffn=[0])), DENSE):  # two futures that did not happen
        engine.apply(other)
        engine.submit(requests((1e5, 5, 5)))  # and where prompts are shared, one that takes what is in the cache
        if case.config.prefix_caching:
            engine.submit([dataclasses.replace(one, arrival_s=2e5 + i) for i, one in enumerate(case.submitted())])
        engine.run_until(math.inf)
        engine.restore(here)
    play(engine, case, moment_s)
    for name in ("records", "iterations", "token_gaps", "transitions"):
        ours, theirs = getattr(straight, name)(), getattr(engine, name)()
        if name == "records":
            ours = dataclasses.replace(ours, quality_nll=theirs.quality_nll)
        assert_equal(ours, theirs)
    assert engine.budget_violation_s == pytest.approx(straight.budget_violation_s, abs=1e-9)


def test_a_snapshot_grows_with_what_is_live_and_not_with_what_is_done() -> None:
    engine = tiny_engine(max_running=4)
    engine.submit(requests(*[(float(i), 4, 2) for i in range(500)]))
    engine.run_until(490.0)
    assert len(engine.snapshot().live) < 10


def test_a_snapshot_of_another_engine_and_a_shared_clock_are_refused() -> None:
    engine, other = tiny_engine(), tiny_engine()
    with pytest.raises(ConfigError, match="another engine"):
        engine.restore(other.snapshot())
    shared = SimEngine(
        model=TINY,
        latency=linear_latency(),
        config=engine.config,
        plan=DENSE,
        budget_bytes=10**9,
        env=other.env,
    )
    with pytest.raises(ConfigError, match="shares its SimPy environment"):
        shared.restore(shared.snapshot())


def test_without_iterations_the_records_are_the_same() -> None:
    rows = [(0.3 * i, 30, 20) for i in range(40)]
    found: list[Records] = []
    for keep in (True, False):
        engine = SimEngine(
            model=TINY,
            latency=linear_latency(0.1, 0.001, 0.0001),
            config=tiny_engine().config,
            plan=DENSE,
            budget_bytes=10**7,
            keep_iterations=keep,
        )
        engine.submit(requests(*rows))
        engine.run_until(math.inf)
        assert (len(engine.iterations()) > 0) == keep
        found.append(engine.records())
    assert_equal(*found)


def test_a_waiting_prompt_that_outgrew_the_pool_does_not_keep_the_engine_busy_forever() -> None:
    """The pool shrank after it was accepted: it waits, since memory may come back, and no loop runs forever."""
    twenty, eleven = (budget_for_kv_blocks(TINY, DENSE, blocks, 0, 4) for blocks in (20, 11))
    engine = tiny_engine(
        budget=Budget((0.0, 2.0), (twenty, eleven)), reserve_full_prompt=False, max_batch_tokens=8, kv_block_tokens=4
    )
    engine.submit(requests((5.0, 60, 4)))
    engine.run_until(math.inf)
    assert engine.records().status.tolist() == [0]
    assert len(engine.iterations()) == 0


def test_a_complete_copy_joins_before_a_decision_that_an_idle_engine_takes() -> None:
    """In this case the clock reaches the end of the copy in two steps; between them no decision may be taken."""
    assert differences(random_case(2317)) == []


def test_it_works_where_the_compile_cache_cannot_be_written_and_says_so() -> None:
    program = (
        "import numba.core.caching as c\n"
        "c.CacheImpl._locator_classes = []\n"
        "from sim.compiled import compiled\n"
        "print(compiled()(lambda x: x + 1)(1))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout == "2\n"
    assert "NUMBA_CACHE_DIR" in done.stderr


def test_what_was_compiled_is_not_used_again_once_a_function_that_it_calls_has_changed(tmp_path: Path) -> None:
    """Numba checks only the file of the caller; stale prices in a cached kernel would go unnoticed."""
    shutil.copytree(REPOSITORY / "sim", tmp_path / "sim", ignore=shutil.ignore_patterns("__pycache__"))
    program = (
        "import numba\n"
        "from sim.engine import kernel\n"
        "kernel.settle.compile((numba.int64[:, ::1],))\n"
        "print(sum(kernel.settle.stats.cache_hits.values()))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}

    def hits() -> int:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
        return int(done.stdout)

    assert (hits(), hits()) == (0, 1)
    with (tmp_path / "sim" / "cost" / "latency.py").open("a") as file:
        file.write("# changed\n")
    assert hits() == 0
