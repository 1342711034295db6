"""Streamed layers: the ring of two slots against an event-by-event reference, bytes, and what a pass waits for."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from sim.cost.memory import layer_weight_bytes, weight_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan, drop, with_mask
from sim.cost.streaming import (
    even_layers,
    held_bytes,
    nested_layers,
    steady_pass_s,
    stream_ready_s,
    stream_rows,
    streamed_end_s,
)
from sim.errors import PlanError
from sim.policies.fixed import static_plan

LINK = 100.0


def ring(sizes: list[int], blocks: list[int], streamed: list[bool], passes: list[tuple[float, float]]) -> list[float]:
    """Return when passes end, one event after another: slots are named, and every layer looks for its own.

    passes: for each, how long after the end of the one before it starts, and its seconds of computing.
    """
    order = [i for i, flag in enumerate(streamed) if flag and sizes[i]]
    slots: list[tuple[int, float] | None] = [None] * min(2, len(order))  # which layer, and from when on
    link_free_s, now_s, ends = 0.0, 0.0, []
    wanted = 0  # how many copies have begun
    free_s = [0.0] * len(slots)
    for gap_s, compute_s in passes:
        now_s += gap_s
        for layer, count in enumerate(blocks):
            if layer in order:
                while layer not in [slot[0] for slot in slots if slot is not None]:
                    empty = min((i for i, slot in enumerate(slots) if slot is None), key=lambda i: free_s[i])
                    start_s = max(link_free_s, free_s[empty])
                    link_free_s = start_s + sizes[order[wanted % len(order)]] / LINK
                    slots[empty] = order[wanted % len(order)], link_free_s
                    wanted += 1
                at = [slot is not None and slot[0] == layer for slot in slots].index(True)
                now_s = max(now_s, slots[at][1])  # type: ignore[index]
            now_s += compute_s * count / sum(blocks)
            if layer in order:
                slots[at], free_s[at] = None, now_s
        ends.append(now_s)
    return ends


def found_ends(
    sizes: list[int], blocks: list[int], streamed: list[bool], passes: list[tuple[float, float]]
) -> list[float]:
    rows, shares = stream_rows(sizes, blocks, streamed)
    count = len(rows) - 1
    first_s, second_s = stream_ready_s(rows, 0, count, 0.0, LINK, 0.0, 1.0)
    now_s, ends = 0.0, []
    for gap_s, compute_s in passes:
        now_s, first_s, second_s = streamed_end_s(
            rows, shares, 0, count, now_s + gap_s, compute_s, LINK, 0.0, 1.0, first_s, second_s
        )
        ends.append(now_s)
    return ends


@pytest.mark.parametrize("seed", range(200))
def test_passes_end_as_in_a_ring_of_named_slots(seed: int) -> None:
    rng = random.Random(seed)
    layers = rng.randint(1, 12)
    sizes = [rng.choice([0, 50, 100, 300]) for _ in range(layers)]
    sizes[rng.randrange(layers)] = 100
    blocks = [0 if size == 0 else rng.choice([1, 2]) for size in sizes]
    streamed = [rng.random() < rng.choice([0.3, 0.8]) for _ in range(layers)]
    streamed[sizes.index(100)] = True
    passes = [(rng.choice([0.0, 0.0, 5.0]), rng.choice([0.1, 1.0, 10.0, 40.0])) for _ in range(8)]
    assert found_ends(sizes, blocks, streamed, passes) == pytest.approx(ring(sizes, blocks, streamed, passes))


def test_at_equal_distances_a_pass_takes_the_longer_of_computing_and_link() -> None:
    layers = even_layers(32, 8)
    streamed = [layer in layers for layer in range(32)]
    for compute_s in (1.0, 7.0, 9.0, 30.0):
        ends = found_ends([100] * 32, [2] * 32, streamed, [(0.0, compute_s)] * 20)
        assert ends[-1] - ends[-2] == pytest.approx(max(compute_s, 8 * 100 / LINK))


def test_computing_is_slower_for_as_long_as_copies_run() -> None:
    sizes, blocks, streamed = [100] * 32, [2] * 32, [layer in even_layers(32, 8) for layer in range(32)]
    for compute_s, expected in ((20.0, 20.0 + 0.1 * 8.0), (4.0, 8.0), (7.9, 1.1 * 7.9)):
        assert steady_pass_s(sizes, blocks, streamed, compute_s, LINK, slowdown=0.1) == pytest.approx(expected)
    assert steady_pass_s(sizes, blocks, [False] * 32, 5.0, LINK, slowdown=0.1) == 5.0
    assert steady_pass_s(sizes, blocks, streamed, 4.0, LINK, layer_s=0.5) == pytest.approx(8 * 1.5)


def test_layers_close_together_are_waited_for_although_the_link_would_suffice() -> None:
    streamed = [layer < 8 for layer in range(32)]
    ends = found_ends([100] * 32, [2] * 32, streamed, [(0.0, 9.0)] * 20)
    assert ends[-1] - ends[-2] > 9.0 * 1.4


def test_even_layers_are_distinct_and_lie_inside() -> None:
    for layers in (1, 3, 28, 32):
        for count in range(1, layers + 1):
            found = even_layers(layers, count)
            assert len(set(found)) == count
            assert 0 <= min(found) <= max(found) < layers
    assert even_layers(32, 4) == (4, 12, 20, 28)


def test_nested_layers_are_all_layers_far_from_each_other_from_the_first_on() -> None:
    for layers in (1, 3, 30, 32):
        assert sorted(nested_layers(layers)) == list(range(layers))
    for count in (2, 4, 8, 16):
        chosen = sorted(nested_layers(32)[:count])
        assert {b - a for a, b in itertools.pairwise([*chosen, chosen[0] + 32])} == {32 // count}


def test_streaming_frees_all_but_the_room_of_two_layers() -> None:
    model = load_model("llama2_7b")
    dense, layer = weight_bytes(model, dense_plan(model)), layer_weight_bytes(model)
    plan = static_plan(model, streamed=even_layers(32, 10))
    assert weight_bytes(model, plan) == dense - 8 * layer
    mixed = replace(plan, weight_bits=(4, *plan.weight_bits[1:]))
    assert weight_bytes(model, mixed) == weight_bytes(model, plan) - layer + layer_weight_bytes(model, 4)
    without = with_mask(plan, drop(model, mha=[even_layers(32, 10)[0]]))  # a streamed block that does not run
    assert weight_bytes(model, without) == weight_bytes(model, plan)


def test_held_bytes_count_the_largest_streamed_layer_twice() -> None:
    assert held_bytes([5, 7, 3, 9], [False, True, True, True]) == 5 + 2 * 9
    assert held_bytes([5, 7, 0, 0], [False, True, True, True]) == 5 + 7
    assert held_bytes([5, 7], [False, False]) == 12


def test_streaming_fewer_than_three_layers_is_refused() -> None:
    model = load_model("llama2_7b")
    for layers in ([3], [3, 9]):
        with pytest.raises(PlanError, match="fewer than 3 free nothing: stream more, or none"):
            static_plan(model, streamed=layers)
    with pytest.raises(PlanError, match="streamed: layer 32 does not exist"):
        static_plan(model, streamed=[3, 9, 32])
    with pytest.raises(PlanError, match="streamed of layer 1 is 1; it must be true or false"):
        weight_bytes(model, replace(dense_plan(model), streamed=(True, 1, *(True,) * 30)))  # type: ignore[arg-type]


def test_without_streamed_layers_there_are_no_rows() -> None:
    rows, shares = stream_rows([100, 100], [2, 2], [False, False])
    assert (len(rows), shares.shape) == (0, (0, 2))
    rows, shares = stream_rows([100, 0, 300], [2, 0, 1], [False, True, True])
    assert rows.tolist() == [300, 300]
    assert np.allclose(shares, [[2 / 3, 1 / 3], [0, 0]])
