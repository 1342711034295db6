"""The log of plan changes."""

from __future__ import annotations

import math

from sim.cost.plan import dense_plan, drop, with_mask
from sim.engine.transition_log import TransitionLog
from tests.sim.serving import TINY


def test_what_happens_while_no_plan_changes_is_charged_to_no_change() -> None:
    log = TransitionLog()
    log.charge(bytes_freed=7, preempted=1)
    log.look(1.0, 9, ready=True)
    assert len(log) == len(log.table()) == 0


def test_a_change_is_open_until_all_of_it_runs_or_another_supersedes_it() -> None:
    dense, log = dense_plan(TINY), TransitionLog()
    pruned = with_mask(dense, drop(TINY, ffn=[1]))
    log.begin(1.0, dense, pruned, 10)
    log.charge(bytes_freed=5)
    log.look(1.5, 12, ready=False)
    log.begin(2.0, pruned, dense, 12)
    log.charge(bytes_in=5, preempted=1, recomputed_tokens=30)
    log.look(3.0, 11, ready=True)
    log.charge(bytes_freed=99)  # of no change any more
    log.look(4.0, 13, ready=True)
    rows = log.table()
    assert rows.time_s.tolist() == [1.0, 2.0]
    assert rows.to_plan == ("-FFN 1", "dense")
    assert math.isnan(rows.ready_s[0])
    assert rows.ready_s[1] == 3.0
    assert rows.bytes_freed.tolist() == [5, 0]
    assert rows.bytes_in.tolist() == [0, 5]
    assert (rows.preempted.tolist(), rows.recomputed_tokens.tolist()) == ([0, 1], [0, 30])
    assert (rows.kv_blocks_before.tolist(), rows.kv_blocks_after.tolist()) == ([10, 12], [12, 11])
