"""The rule that decides how many replicas prefill."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import simpy

from sim.disaggregate.roles import ByLoad, SystemState, kv_share
from sim.engine.protocol import EngineState
from sim.errors import ConfigError
from tests.sim.serving import tiny_engine

RULE = ByLoad(most_wait_s=0.5, most_kv_share=0.8)


def one(**shown: Any) -> EngineState:
    """Return the state of an idle replica, with these entries changed."""
    return replace(tiny_engine(env=simpy.Environment(), external_clock=True).observe(0.0), **shown)


def seen(*, wait_s: float = 0.0, held_blocks: int = 0, prefill: int = 2, decode: int = 2, **shown: Any) -> SystemState:
    """Return a system of which each decode replica holds this many of 100 KV blocks."""
    return SystemState(
        time_s=0.0,
        prefill=(one(oldest_wait_s=wait_s),) * prefill,
        decode=(one(kv_layer_blocks=100, kv_used_layer_blocks=held_blocks),) * decode,
        **{"to_prefill": prefill, "replicas": prefill + decode, "turning": 0, "held": 0, "ready": 0, "in_flight": 0}
        | shown,
    )


@pytest.mark.parametrize(
    ("state", "wanted"),
    [
        (seen(), 2),
        (seen(wait_s=0.4), 2),
        (seen(wait_s=0.5), 3),
        (seen(held=1, prefill=1, to_prefill=1), 2),
        (seen(wait_s=0.5, held_blocks=40), 3),  # one replica would hold 80 of 100
        (seen(wait_s=0.5, held_blocks=41), 2),
        (seen(wait_s=0.5, decode=1), 2),
        (seen(held_blocks=80), 2),
        (seen(held_blocks=81), 1),
        (seen(ready=1), 1),
        (seen(ready=1, prefill=1), 1),
        (seen(ready=1, wait_s=0.5), 2),  # both are short
        (seen(wait_s=9.0, turning=1), 2),
        (seen(held=1, prefill=0, to_prefill=2, replicas=4), 3),  # both prefill replicas are down
        (seen(ready=1, decode=0, replicas=4), 1),
    ],
)
def test_a_replica_goes_to_the_side_that_is_short_if_the_other_can_spare_it(state: SystemState, wanted: int) -> None:
    assert RULE(state) == wanted


def test_no_replica_counts_as_full() -> None:
    assert kv_share([]) == 1.0
    assert kv_share([one(kv_layer_blocks=100, kv_used_layer_blocks=25)] * 2) == 0.25


@pytest.mark.parametrize(
    "wrong", [{"most_wait_s": 0.0}, {"most_kv_share": 0.0}, {"most_kv_share": 1.1}, {"period_s": 0}]
)
def test_a_rule_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ByLoad(**{"most_wait_s": 0.5, "most_kv_share": 0.8, **wrong})
