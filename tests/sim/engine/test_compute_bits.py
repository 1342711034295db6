"""Products at fewer bits than the resident weights: what changes between two iterations, and what does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sim.cost.latency import LatencyModel, calibration_from_dict
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.plan import Plan, dense_plan
from sim.engine.protocol import EngineConfig
from sim.engine.scheduler import Limits
from sim.engine.sim_engine import SimEngine
from sim.results.records import Status
from tests.sim.engine.plain_engine import PlainEngine
from tests.sim.serving import TINY, requests

DENSE = dense_plan(TINY)
LOWER = replace(DENSE, compute_bits=(8,) * TINY.num_layers)
LAYER_S = {16: 2.0, 8: 1.25, 4: 1.0}
"""Seconds of both blocks of a layer, at any number of tokens."""


def latency() -> LatencyModel:
    """Return prices by which a layer takes `LAYER_S`, an iteration 1 s more, and a token of context nothing."""
    flat, nothing = [0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]]
    return calibration_from_dict(
        {
            "schema": 1, "name": "by_bits", "model": TINY.name, "device": "none", "kind": "composed",
            "fixed_us": 1e6, "fixed_source": "by hand", "errors": {}, "validation": "none", "sources": [], "notes": [],
            "tables": {
                "tokens": [1, 4096],
                "linear_us": {
                    str(bits): {"mha": [0.4e6 * each] * 2, "ffn": [0.6e6 * each] * 2} for bits, each in LAYER_S.items()
                },
                "token_us": flat, "sequences": [1, 4096], "head_us": flat,
                "prefill_attention": {"tokens": [1, 4096], "context": [1.0, 4096], "us": nothing},
                "decode_attention": {"batch": [1, 4096], "context": [1.0, 4096], "us": nothing},
            },
        }
    )  # fmt: skip


def serving(kind: type[Any], plan: Plan, **config: Any) -> Any:
    """Return an engine of the kind with three requests, one of which comes later."""
    engine = kind(
        model=TINY,
        latency=latency(),
        config=EngineConfig(limits=Limits(max_batch_tokens=64, max_running=8), kv_block_tokens=4, **config),
        plan=plan,
        budget_bytes=budget_for_kv_blocks(TINY, DENSE, 100, 0, 4),
        host_to_device_bytes_per_s=1e3,
    )
    engine.submit(requests((0.0, 30, 40), (0.0, 12, 20), (60.0, 20, 9)))
    return engine


@pytest.mark.parametrize("kind", [SimEngine, PlainEngine])
def test_products_run_at_other_bits_from_the_next_iteration_on_and_nothing_is_copied(kind: type[Any]) -> None:
    engine = serving(kind, DENSE)
    engine.run_until(10.0)  # in the second iteration, from 7 to 14
    before = engine.run_until(10.0)
    engine.apply(LOWER)
    engine.run_until(14.5)
    engine.apply(DENSE)
    after = engine.run_until(20.0)
    engine.run_until(1e9)
    assert np.diff(engine.iterations().start_s)[:5].tolist() == [7.0, 7.0, 1.0 + 3 * 1.25, 7.0, 7.0]
    changes = engine.transitions()
    assert changes.bytes_in.tolist() == changes.bytes_freed.tolist() == [0, 0]
    assert changes.preempted.tolist() == [0, 0]
    assert changes.ready_s.tolist() == [14.0, 18.75]
    assert after.kv_layer_blocks == before.kv_layer_blocks
    assert engine.records().status.tolist() == [Status.FINISHED] * 3


@pytest.mark.parametrize("kind", [SimEngine, PlainEngine])
def test_a_run_that_switches_in_every_iteration_takes_the_sum_of_its_iterations(kind: type[Any]) -> None:
    engine = serving(kind, DENSE)
    expected, time_s, plans = [], 0.0, (LOWER, DENSE, replace(DENSE, compute_bits=(8, 16, 16)))
    for number in range(12):
        engine.run_until(time_s)
        engine.apply(plans[number % 3])
        each = sum(LAYER_S[bits] for bits in plans[number % 3].product_bits)
        expected.append(1.0 + each)
        time_s += expected[-1]
    engine.run_until(time_s)
    starts = engine.iterations().start_s
    assert np.diff(starts)[1:11].tolist() == pytest.approx(expected[1:11], rel=1e-12)


def test_kv_and_a_cache_of_prompts_stay() -> None:
    """Two requests with one prompt: the second finds its prefix, though products changed in between."""
    engine = SimEngine(
        model=TINY,
        latency=latency(),
        config=EngineConfig(limits=Limits(max_batch_tokens=64, max_running=8), kv_block_tokens=4, prefix_caching=True,
                            hash_block_tokens=4),
        plan=DENSE,
        budget_bytes=budget_for_kv_blocks(TINY, DENSE, 100, 0, 4),
    )  # fmt: skip
    one, two = (replace(each, hash_ids=(1, 2, 3)) for each in requests((0.0, 13, 4), (60.0, 13, 4)))
    engine.submit([one, two])
    engine.run_until(50.0)
    engine.apply(LOWER)
    engine.run_until(1e9)
    assert engine.records().cached_tokens.tolist() == [0, 12]


def test_half_of_a_layers_bits_are_read_while_it_waits_for_its_copy() -> None:
    """A plan of 8 bits computed at 4: until a layer is copied, its 16 bits are computed at 8."""
    engine = serving(SimEngine, DENSE)
    engine.run_until(10.0)
    engine.apply(replace(DENSE, weight_bits=(8,) * 3, compute_bits=(4,) * 3))
    engine.run_until(14.5)
    engine.run_until(1e9)
    gaps = np.diff(engine.iterations().start_s)
    assert gaps[2] == 1.0 + 3 * LAYER_S[8]
    assert gaps[-1] == 1.0 + 3 * LAYER_S[4]
    assert engine.transitions().bytes_in[0] > 0
