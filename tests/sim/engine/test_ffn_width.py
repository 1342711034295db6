"""Changes of the width of FFN blocks: what is freed at once, what is copied, and when it runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sim.cost.memory import ffn_weight_bytes, weight_bytes
from sim.cost.plan import dense_plan, drop, with_mask
from sim.engine.protocol import EngineConfig
from sim.engine.sim_engine import SimEngine
from sim.engine.transition import (
    copies_between,
    joined,
    peak_weight_bytes,
    resident_of,
    running_plan,
    without_dropped,
)
from tests.sim.serving import TINY, linear_latency

WIDE = replace(TINY, intermediate_size=512)
DENSE = dense_plan(WIDE)
NARROW = replace(DENSE, ffn_width=(5, 6, 8))
BYTES = {width: ffn_weight_bytes(WIDE, width=width) for width in (8, 7, 6, 5)}


def test_cutting_a_block_frees_its_last_channels_at_once_and_copies_nothing() -> None:
    held = without_dropped(resident_of(DENSE), NARROW)
    assert held == resident_of(NARROW)
    assert copies_between(WIDE, held, NARROW) == []
    freed = resident_of(DENSE).weight_bytes(WIDE) - held.weight_bytes(WIDE)
    assert freed == 2 * BYTES[8] - BYTES[5] - BYTES[6]
    assert freed == weight_bytes(WIDE, DENSE) - weight_bytes(WIDE, NARROW)


def test_widening_copies_the_missing_channels_and_replaces_nothing() -> None:
    held = without_dropped(resident_of(NARROW), DENSE)
    assert held == resident_of(NARROW)
    copies = copies_between(WIDE, held, DENSE)
    assert [(copy.layer, copy.ffn_width, copy.copied_bytes, copy.net_bytes) for copy in copies] == [
        (1, 8, BYTES[8] - BYTES[6], BYTES[8] - BYTES[6]),
        (0, 8, BYTES[8] - BYTES[5], BYTES[8] - BYTES[5]),
    ]
    first = joined(held, copies[0])
    assert running_plan(first, DENSE).ffn_width == (5, 8, 8)
    assert joined(first, copies[1]) == resident_of(DENSE)
    assert peak_weight_bytes(WIDE, NARROW, DENSE) == weight_bytes(WIDE, DENSE)


def test_a_change_to_other_widths_cuts_first_and_then_widens() -> None:
    other = replace(DENSE, ffn_width=(7, 5, 6))
    held = without_dropped(resident_of(NARROW), other)
    assert held.ffn_width == (5, 5, 6)
    (copy,) = copies_between(WIDE, held, other)
    assert (copy.layer, copy.ffn_width, copy.copied_bytes) == (0, 7, BYTES[7] - BYTES[5])


def test_a_block_at_other_bits_is_copied_at_its_width_and_replaces_the_old_one() -> None:
    four = replace(NARROW, weight_bits=(4, 16, 16))
    held = without_dropped(resident_of(DENSE), four)
    assert held.ffn_width == (5, 6, 8)
    (copy,) = copies_between(WIDE, held, four)
    mha = resident_of(with_mask(four, drop(WIDE, ffn=[0])))
    assert copy.ffn_bits == copy.mha_bits == 4
    assert copy.copied_bytes == ffn_weight_bytes(WIDE, 4, 5) + mha.layer_bytes(WIDE)[0]
    assert joined(held, copy) == resident_of(four)


def test_a_dropped_block_comes_back_at_the_width_of_the_plan() -> None:
    dropped = with_mask(DENSE, drop(WIDE, ffn=[0]))
    held = without_dropped(resident_of(dropped), NARROW)
    (copy,) = copies_between(WIDE, held, NARROW)
    assert (copy.copied_bytes, copy.net_bytes) == (BYTES[5], BYTES[5])
    assert running_plan(held, NARROW).prefill.ffn[0] is False
    assert joined(held, copy) == resident_of(NARROW)


def test_streamed_layers_cross_the_link_at_their_width() -> None:
    streamed = replace(NARROW, streamed=(True,) * 3)
    full = resident_of(replace(DENSE, streamed=(True,) * 3)).layer_bytes(WIDE)
    saved = [BYTES[8] - BYTES[width] for width in NARROW.ffn_width]
    assert resident_of(streamed).layer_bytes(WIDE) == [a - b for a, b in zip(full, saved, strict=True)]
    held = without_dropped(resident_of(streamed), DENSE)
    copies = copies_between(WIDE, held, DENSE)
    assert all(copy.copied_bytes == copy.net_bytes for copy in copies)
    assert sum(copy.copied_bytes for copy in copies) == resident_of(DENSE).weight_bytes(WIDE)


@pytest.mark.parametrize("change_back", [False, True])
def test_freed_bytes_become_kv_blocks_until_the_channels_are_back(change_back: bool) -> None:
    engine = SimEngine(
        model=WIDE,
        latency=linear_latency(base_s=1.0),
        config=EngineConfig(kv_block_tokens=1),
        plan=DENSE,
        budget_bytes=weight_bytes(WIDE, DENSE) + 10**5,
        host_to_device_bytes_per_s=2e4,
    )
    engine.submit_arrays(np.array([0.0]), np.array([4]), np.array([60]))
    before = engine.run_until(0.5).kv_layer_blocks
    engine.apply(NARROW)
    after = engine.run_until(2.5)
    freed = weight_bytes(WIDE, DENSE) - weight_bytes(WIDE, NARROW)
    per_block = WIDE.kv_bytes_per_token_layer
    assert after.kv_layer_blocks == (10**5 + freed) // per_block > before
    assert after.plan == NARROW
    if change_back:
        engine.apply(DENSE)
        assert engine.run_until(4.5).plan == NARROW  # nothing has arrived yet
        state = engine.run_until(4.5 + freed / 2e4 + 3.0)
        assert state.plan == DENSE
        assert state.kv_layer_blocks == before
    transitions = engine.transitions()
    assert transitions.bytes_freed[0] == freed
    assert transitions.bytes_in.tolist() == [0, freed][: 1 + change_back]


def test_a_request_ran_the_parameters_of_its_widths() -> None:
    shares = []
    for plan in (DENSE, NARROW):
        engine = SimEngine(
            model=WIDE,
            latency=linear_latency(base_s=1.0),
            config=EngineConfig(),
            plan=plan,
            budget_bytes=10**9,
            host_to_device_bytes_per_s=1e9,
        )
        engine.submit_arrays(np.array([0.0]), np.array([4]), np.array([5]))
        engine.run_until(100.0)
        shares.append(engine.records().kept_params_share[0])
    removed = 3 * WIDE.hidden_size * (512 - 320 + 512 - 384)
    assert shares == pytest.approx([1.0, 1.0 - removed / WIDE.total_params])
