"""What a learned policy observes of a disaggregated system: every entry by hand, and which numbers are possible."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simpy

from sim.cluster.outages import schedule
from sim.disaggregate.learned_roles import learned_roles
from sim.disaggregate.observation import ROLE_ENTRIES, RolesObserver, possible_flags, roles_table
from sim.disaggregate.roles import SystemState, Totals
from sim.engine.protocol import EngineState
from sim.errors import ConfigError
from tests.sim.disaggregate.test_disaggregate import system, trace_of
from tests.sim.serving import tiny_engine


def one(**shown: Any) -> EngineState:
    """Return the state of an idle replica with 100 KV blocks, with these entries changed."""
    idle = tiny_engine(env=simpy.Environment(), external_clock=True).observe(0.0)
    return replace(idle, **{"kv_layer_blocks": 100, "kv_used_layer_blocks": 0, **shown})


STATE = SystemState(
    time_s=10.0,
    prefill=(
        one(waiting=3, waiting_tokens=500, oldest_wait_s=1.0, running=2, kv_used_layer_blocks=50),
        one(waiting=2, waiting_tokens=100, oldest_wait_s=0.5, running=1, kv_used_layer_blocks=10),
    ),
    decode=(one(running=4, waiting=1, kv_used_layer_blocks=90), one(running=3, kv_used_layer_blocks=20)),
    to_prefill=3,
    replicas=8,
    turning=1,
    held=2,
    ready=6,
    in_flight=1,
    away=2,
    held_tokens=400,
    ending=5,
    possible=(2, 3, 4),
    totals=Totals(
        arrived=40,
        arrived_prompt_tokens=8000,
        first_tokens=20,
        ttft_sum_s=10.0,
        produced_tokens=600,
        finished=12,
        prefill_busy_s=16.0,
        decode_busy_s=20.0,
        decode_iterations=500,
        link_busy_s=3.0,
        link_s=20.0,
    ),
)


def log(value: float, scale: float) -> float:
    return math.log2(1.0 + value) / scale


def test_every_entry_of_a_state_made_by_hand() -> None:
    observed = dict(zip((entry.name for entry in ROLE_ENTRIES), RolesObserver()(STATE).tolist(), strict=True))
    ten, sixty = ((1.0 - math.exp(-10.0 / scale_s)) / 10.0 for scale_s in (10.0, 60.0))  # of a counter, its rate
    expected = {
        "to_prefill": 3 / 8,
        "prefill": 2 / 8,
        "decode": 2 / 8,
        "turning": 1 / 8,
        "away": 2 / 8,
        "ending": log(5, 10),
        "waiting": log(7, 10),
        "waiting_tokens": log(1000, 20),
        "oldest_wait": 0.5,
        "prefill_running": log(3, 10),
        "prefill_kv": 0.3,
        "ready": log(6, 10),
        "in_flight": log(1, 10),
        "decode_running": log(7, 10),
        "decode_waiting": log(1, 10),
        "decode_kv": 0.55,
        "decode_kv_most": 0.9,
        "arrivals_10s": log(40 * ten, 8),
        "arrivals_60s": log(40 * sixty, 8),
        "prompts_10s": log(8000 * ten, 18),
        "prompts_60s": log(8000 * sixty, 18),
        "prompt_tokens_10s": log(200, 14),
        "produced_10s": log(600 * ten, 16),
        "produced_60s": log(600 * sixty, 16),
        "answer_tokens_60s": log(50, 12),
        "first_tokens_10s": log(20 * ten, 8),
        "ttft_10s": 0.25,
        "prefill_busy_10s": 16.0 * ten / 8,
        "decode_busy_10s": 20.0 * ten / 8,
        "decode_iteration_10s": 0.4,
        "link_busy_10s": 0.15,
    }
    assert observed == pytest.approx(expected, rel=1e-6)


def test_values_stay_in_their_ranges_and_nothing_is_known_before_the_first_request() -> None:
    table = roles_table(8)
    low, high = table.bounds()
    many = one(waiting=10**6, waiting_tokens=10**9, oldest_wait_s=900.0, running=10**6, kv_used_layer_blocks=200)
    full = Totals(*(1e12,) * 11)  # type: ignore[arg-type]
    crowded = replace(STATE, prefill=(many,), decode=(many,), ready=10**6, ending=10**6, totals=full)
    empty = replace(STATE, prefill=(), decode=(), totals=Totals())
    for state in (crowded, empty):
        values = RolesObserver()(state)
        assert (values >= low[: table.features]).all()
        assert (values <= high[: table.features]).all()
    observed = RolesObserver()(replace(empty, time_s=0.0))
    assert np.isfinite(observed).all()


def test_rates_follow_what_was_counted_since_the_last_state() -> None:
    observer, names = RolesObserver(), [entry.name for entry in ROLE_ENTRIES]
    observer(STATE)
    before = observer.rates.copy()
    same = observer(STATE)  # the same moment again
    np.testing.assert_array_equal(observer.rates, before)
    later = observer(replace(STATE, time_s=100.0))
    assert later[names.index("arrivals_10s")] < same[names.index("arrivals_10s")] / 10


def test_flags_and_actions_are_numbers_of_prefill_replicas_from_one() -> None:
    assert roles_table(4).actions == ("1 prefill", "2 prefill", "3 prefill")
    assert possible_flags(STATE).tolist() == [False, True, True, True, False, False, False]


def test_counters_are_kept_when_replicas_fail_and_change_their_roles() -> None:
    rows = [(0.5 * k, 8, 4) for k in range(20)]
    made = system(trace_of(*rows), prefill=2, decode=2, more={"outages": schedule(rows=[[0, 3.0, 6.0]])})
    before = made.observe().totals
    for time_s, count in ((2.0, 1), (8.0, 2), (12.0, 3), (15.0, 1)):
        made.run_until(time_s)
        now = made.observe().totals
        assert all(new >= old for new, old in zip(_values(now), _values(before), strict=True))
        before = now
        made.set_prefill(count)
    made.run()
    done, records = made.observe().totals, made.records()
    assert (done.arrived, done.arrived_prompt_tokens) == (20, 160)
    assert done.finished == 20
    # A request that is computed again gets one more token at prefill.
    assert done.first_tokens == 20
    assert done.produced_tokens <= records.produced_tokens.sum() - 20


def _values(totals: Totals) -> list[float]:
    return [float(getattr(totals, name)) for name in Totals.__dataclass_fields__]


def test_a_replica_in_an_outage_is_away_from_its_notice_until_it_serves() -> None:
    more = {"outages": schedule(rows=[[0, 5.0, 9.0]], notice_s=2.0), "start_s": 1.0}
    made = system(trace_of((0.0, 8, 2), (20.0, 8, 2)), prefill=2, decode=2, more=more)
    seen = []
    for time_s in (1.0, 4.0, 6.0, 9.5, 12.0):
        made.run_until(time_s)
        state = made.observe()
        seen.append((state.away, state.possible))
    # Of three others one is left to each role, however many are to prefill.
    assert [away for away, _ in seen] == [0, 1, 1, 1, 0]
    assert seen[0][1] == seen[-1][1] == (1, 2, 3)
    # Replica 1 turns first, so only replica 0, which is away, would prefill.
    assert [possible for _, possible in seen[1:4]] == [(2, 3)] * 3


def test_a_policy_for_another_system_or_with_another_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no learned policy 'mine'"):
        learned_roles(path="mine")
    with pytest.raises(ConfigError, match="it was trained for 'ServeTrace'; expected 'ServeRoles'"):
        learned_roles(path="learned_serve_llama2")
