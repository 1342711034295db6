"""Every entry that a serving policy observes, computed by hand for one server.

The numbers below are literals or plain arithmetic on the states, and no two entries are equal in all of them. So an
entry in another unit, or one that shows the value of another, fails here even if both implementations agree.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from sim.cost.memory import weight_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import KVCompression, dense_plan
from sim.engine import batch_step
from sim.engine.protocol import EngineState
from sim.errors import ConfigError, PlanError, RapLabError
from sim.policies.observation.serve import (
    SERVE_ENTRIES,
    SERVER_ENTRIES,
    Choice,
    ServeObserver,
    ServeObservers,
    Terms,
    actions_from,
    serve_actions,
    serve_table,
)

MODEL = load_model("llama2_7b")
DENSE = dense_plan(MODEL)
DENSE_BYTES = weight_bytes(MODEL, DENSE)
BLOCK_BYTES = 262_144
ACTIONS = serve_actions(
    MODEL,
    order=["MHA25", "MHA27", "FFN7", "MHA24"],
    drops=(0, 1, 2, 4),
    low_layers=(0, 8, 16, 24, 32),
    waits=(0.5, 0.9),
    runs=(None, 48),
    dwell_s=10.0,
)
FIRST = {
    "time_s": 1.0,
    "waiting": 0,
    "waiting_tokens": 0,
    "oldest_wait_s": 0.0,
    "running": 0,
    "running_tokens": 0,
    "kv_layer_blocks": 160_000,
    "kv_used_layer_blocks": 0,
    "budget_bytes": 5 * DENSE_BYTES,
    "weight_bytes": DENSE_BYTES,
    "arrived": 0,
    "arrived_prompt_tokens": 0,
    "first_tokens": 0,
    "ttft_sum_s": 0.0,
    "produced_tokens": 0,
    "finished": 0,
    "rejected": 0,
    "preemptions": 0,
    "iterations": 0,
    "busy_s": 0.0,
    "priced_s": 0.0,
    "next_budget_bytes": 5 * DENSE_BYTES,
    "next_budget_s": math.inf,
    "budget_violation_s": 0.0,
    "incoming_bytes": 0,
    "plan": DENSE,
    "target": DENSE,
}
SECOND = FIRST | {
    "time_s": 3.0,  # two seconds later
    "waiting": 7,
    "waiting_tokens": 4_095,
    "oldest_wait_s": 0.7,
    "running": 15,
    "running_tokens": 16_383,
    "kv_layer_blocks": 150_000,
    "kv_used_layer_blocks": 123_000,
    "budget_bytes": 352 * DENSE_BYTES // 100,
    "weight_bytes": int(0.55 * DENSE_BYTES),
    "arrived": 40,
    "arrived_prompt_tokens": 20_000,
    "first_tokens": 30,
    "ttft_sum_s": 12.0,
    "produced_tokens": 900,
    "rejected": 3,
    "finished": 18,
    "preemptions": 5,
    "iterations": 45,
    "busy_s": 1.8,
    "priced_s": 1.2,
    "next_budget_bytes": 2 * DENSE_BYTES,
    "next_budget_s": 8.0,
    "incoming_bytes": 1,
}
ACTION = 4 * (1 * 5 + 3) + 3
"""The second of four numbers of drops, the fourth of five of low layers, the second wait, the second run limit."""
CHANGED_S = -0.5
TERMS = Terms(tpot_s=0.064, low_loss=0.03)


def share(seconds: float) -> float:
    """Return the weight of two seconds in an average over ``seconds``."""
    return 1.0 - math.exp(-2.0 / seconds)


def log(value: float, scale: float) -> float:
    return math.log2(1.0 + value) / scale


EXPECTED = {
    "waiting": 3.0 / 10.0,
    "waiting_tokens": 12.0 / 20.0,
    "oldest_wait": 0.35,
    "running": 4.0 / 10.0,
    "running_tokens": 14.0 / 20.0,
    "kv_used": 0.82,
    "kv_pool": 150_000 * 262_144 / DENSE_BYTES / 8.0,
    "budget": 0.44,
    "weights": 0.55,
    "next_budget": -0.19,
    "next_budget_soon": math.exp(-0.5),
    "arrivals_1s": log(20.0 * share(1.0), 8.0),
    "arrivals_10s": log(20.0 * share(10.0), 8.0),
    "arrivals_60s": log(20.0 * share(60.0), 8.0),
    "prompts_1s": log(10_000.0 * share(1.0), 16.0),
    "prompts_10s": log(10_000.0 * share(10.0), 16.0),
    "first_tokens_10s": log(15.0 * share(10.0), 8.0),
    "ttft_10s": 0.4 / 2.0,
    "produced_10s": log(450.0 * share(10.0), 16.0),
    "busy_10s": 0.9 * share(10.0),
    "preemptions_10s": log(2.5 * share(10.0), 8.0),
    "rejected_10s": log(1.5 * share(10.0), 8.0),
    "copying": 1.0,
    "dwell_left": 1.0 - 3.5 / 10.0,
    "level_drop": 1.0 / 3.0,
    "level_low": 3.0 / 4.0,
    "level_admit": 1.0,
    "slowdown": math.log2(1.5) / 2.0,
    "tpot_headroom": 1.0 - 0.04 / 0.064,
    "low_bits": 1.0,
    "low_loss": 0.03 / 0.4,
    "outputs_60s": log(900.0 / 18.0, 12.0),
    "wait_limit": 0.45,
    "run_limit": log(48.0, 10.0),
}


def state(values: dict[str, object]) -> EngineState:
    assert {field.name for field in fields(EngineState)} == set(values)
    return EngineState(**values)  # type: ignore[arg-type]


def seen(values: dict[str, object]) -> np.ndarray:
    row = np.zeros((1, batch_step.SEEN_COLUMNS))
    for name, value in values.items():
        if name not in ("budget_violation_s", "plan", "target"):
            row[0, getattr(batch_step, name.upper())] = value
    return row


def observed(
    terms: Terms, *, low_bits: bool = True, second: dict[str, Any] = SECOND, action: int = ACTION
) -> list[np.ndarray]:
    """Return the second observation by both implementations."""
    actions = ACTIONS if low_bits else ACTIONS.without_low_bits()
    one = ServeObserver(MODEL, actions, BLOCK_BYTES, terms)
    one(state(FIRST), Choice())
    many = ServeObservers(MODEL, ACTIONS, BLOCK_BYTES, 1, terms.tpot_s)
    many.begin(0, low_bits=low_bits, low_loss=terms.low_loss)
    many(seen(FIRST))
    many.action[0], many.changed_s[0] = action, CHANGED_S
    return [one(state(second), Choice(action, CHANGED_S)), many(seen(second))[0]]


NO_COPY = EXPECTED | {"copying": 0.0, "level_admit": 2.0 / 3.0, "run_limit": 1.0}
"""Nothing is copied, and the third of the limits holds: the second wait, and no limit of what runs."""


def test_every_entry_shows_its_own_value_in_its_unit() -> None:
    assert [entry.name for entry in SERVE_ENTRIES] == list(EXPECTED)
    assert SERVE_ENTRIES[: len(SERVER_ENTRIES)] == SERVER_ENTRIES
    both = {(round(EXPECTED[name], 6), round(NO_COPY[name], 6)) for name in EXPECTED}
    assert len(both) == len(EXPECTED)  # so an entry that shows another's value is wrong in one of the two
    for expected, shown in (
        (EXPECTED, observed(TERMS)),
        (NO_COPY, observed(TERMS, second=SECOND | {"incoming_bytes": 0}, action=ACTION - 1)),
    ):
        for values in shown:
            for entry, value in zip(SERVE_ENTRIES, values, strict=True):
                assert value == pytest.approx(expected[entry.name], rel=1e-5), entry.name


def test_a_server_without_low_precision_copies_or_a_tpot_target_says_so() -> None:
    expected = EXPECTED | {"low_bits": 0.0, "low_loss": 0.0, "tpot_headroom": 1.0}
    for values in observed(Terms(low_loss=0.03), low_bits=False):
        for entry, value in zip(SERVE_ENTRIES, values, strict=True):
            assert value == pytest.approx(expected[entry.name], rel=1e-5), entry.name


def test_plans_at_low_precision_are_illegal_without_copies() -> None:
    low = np.array([min(plan.weight_bits) < 16 for plan in ACTIONS.plans])
    actions, choice = ACTIONS.without_low_bits(), Choice(0, -math.inf)
    np.testing.assert_array_equal(ACTIONS.legal(state(FIRST), choice), np.ones(len(low), dtype=np.bool_))
    np.testing.assert_array_equal(actions.legal(state(FIRST), choice), ~low)
    many = ServeObservers(MODEL, ACTIONS, BLOCK_BYTES, 1)
    many.begin(0, low_bits=False)
    np.testing.assert_array_equal(many.legal(seen(FIRST))[0], ~low)
    # With too little memory for any plan, the smallest that there is stays legal.
    short = FIRST | {"budget_bytes": DENSE_BYTES // 8}
    legal = actions.legal(state(short), choice)
    smallest = min(b for b, needs in zip(actions.weights_bytes, low, strict=True) if not needs)
    np.testing.assert_array_equal(legal, ~low & (np.array(actions.weights_bytes) == smallest))
    np.testing.assert_array_equal(many.legal(seen(short))[0], legal)


MORE = serve_actions(
    MODEL,
    order=["MHA25", "MHA27"],
    drops=(0, 2),
    low_layers=(0, 32),
    waits=(0.5, 0.9),
    kv_bits=(16, 8),
    streamed=(0, 4, 8),
    start_drops=2,
)


def test_a_table_may_have_streamed_layers_and_bits_of_kv() -> None:
    assert len(MORE.plans) == len(set(MORE.plans)) == len(set(MORE.names)) == 2 * 2 * 3 * 2 * 2
    assert MORE.heads == (12, 4)
    assert [entry.name for entry in MORE.extra_entries] == ["level_streamed", "kv_bits"]
    assert ACTIONS.extra_entries == ()
    for number, plan in enumerate(MORE.plans):
        weights, limit = divmod(number, 4)
        assert sum(plan.streamed) == (0, 4, 8)[weights % 3]
        assert set(plan.kv_bits) == {(16, 8)[limit // 2]}
        assert plan.max_wait_s == (0.5, 0.9)[limit % 2]
        assert plan.weight_bits == ((4 if weights // 3 % 2 else 16),) * 32
        assert MORE.groups[number] == weights
        assert MORE.extras[number] == ((0.0, 0.5, 1.0)[weights % 3], (1.0, 0.5)[limit // 2])
    assert MORE.names[-1] == "drop 2, W4 32, queue any, wait 0.9 s, KV8, streamed 8"
    starts = [MORE.plans[at] for at in MORE.starts]
    assert starts[0].weight_bits == (4,) * 32
    assert not any(any(plan.streamed) for plan in starts)
    assert sum(starts[1].decode.mha) == 30
    for wrong in ((2,), (33,), (-1,)):
        with pytest.raises(RapLabError, match="streamed"):
            serve_actions(MODEL, streamed=wrong)


def test_a_table_may_have_products_at_fewer_bits_and_prompts_that_only_write_kv() -> None:
    made = serve_actions(MODEL, low_layers=(0, 16, 32), waits=(0.5, 0.9), compute_bits=(16, 8), kv_only=(0, 4, 8))
    assert made.heads == (3, 2 * 3 * 2)
    assert [entry.name for entry in made.extra_entries] == ["compute_bits", "level_kv_only"]
    assert serve_table(made).entries == (*SERVE_ENTRIES, *made.extra_entries)
    for number, plan in enumerate(made.plans):
        compute, writing = (16, 8)[number // 6 % 2], (0, 4, 8)[number // 2 % 3]
        low = (0, 16, 32)[number // 12]
        assert plan.product_bits == (4,) * low + (compute,) * (32 - low)
        # The deepest layers: what prompts need of this model was not measured.
        assert plan.kv_only == (False,) * (32 - writing) + (True,) * writing
        assert made.extras[number] == (compute / 16, (0.0, 0.5, 1.0)[number // 2 % 3])
    assert made.names[-1] == "drop 0, W4 32, queue any, wait 0.9 s, products at 8, KV only 8"
    with pytest.raises(ConfigError, match=r"actions.compute_bits is \[12\]; allowed are 16, 8, 4"):
        serve_actions(MODEL, compute_bits=(12,))
    with pytest.raises(ConfigError, match=r"actions.kv_only is \[33\]"):
        serve_actions(MODEL, kv_only=(33,))


def test_a_plan_is_found_by_its_name_without_the_knobs_that_it_leaves_alone() -> None:
    assert [MORE.named(name) for name in MORE.names] == list(range(len(MORE.names)))
    assert MORE.names[MORE.named("drop 0, W4 32, queue any, wait 0.9 s")].endswith("wait 0.9 s, KV16, streamed 0")
    for unknown in ("drop 0, W4 32, queue any", "drop 0, W4 32, queue any, wait 0.9", ""):
        with pytest.raises(ConfigError, match="there is no plan"):
            MORE.named(unknown)


def test_a_table_may_have_compressed_kv() -> None:
    way = {"method": "ada_kv", "percent": 70}
    made = serve_actions(MODEL, waits=(0.5, 0.9), kv_bits=(16, 8), kv_compression=(None, way))
    assert [entry.name for entry in made.extra_entries] == ["level_streamed", "kv_bits", "kv_stays"]
    assert made.heads == (1, 2 * 2 * 2)
    for number, plan in enumerate(made.plans):
        held = (None, KVCompression(method="ada_kv", percent=70))[number // 2 % 2]
        assert plan.kv_compression == held
        assert made.extras[number][2] == (0.7 if held else 1.0)
    assert made.names[2] == "drop 0, W4 0, queue any, wait 0.5 s, KV16, KV ada_kv 70%"
    assert made.names[0].endswith("KV whole")
    for wrong in ("ada_kv", {"method": "ada_kv"}, {"method": "ada_kv", "percent": 70, "layers": 3}):
        with pytest.raises(ConfigError, match="an entry is null, or a method and the percent"):
            serve_actions(MODEL, kv_compression=(wrong,))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"actions.kv_compression: there is no way"):
        serve_actions(MODEL, kv_compression=({"method": "zip", "percent": 70},))


def test_hidden_states_are_one_of_the_ways_to_keep_kv() -> None:
    made = serve_actions(MODEL, kv_bits=(16, "hidden"), kv_compression=(None, {"method": "think", "percent": 90}))
    assert [plan.kv_hidden for plan in made.plans] == [False, False, True]  # hidden states are not compressed
    assert [values[1] for values in made.extras] == [1.0, 1.0, 0.0]
    assert made.names[2] == "drop 0, W4 0, queue any, KV hidden, KV whole"
    with pytest.raises(ConfigError, match=r"actions.kv_bits is \['hid'\]; allowed are 16, 8, 4, hidden"):
        serve_actions(MODEL, kv_bits=("hid",))
    with pytest.raises(PlanError, match="no GQA"):
        serve_actions(load_model("smollm2_135m"), kv_bits=("hidden",))


def test_a_table_may_have_narrower_ffn_blocks() -> None:
    made = serve_actions(
        MODEL, order=["MHA25"], drops=(0, 1), low_layers=(0, 32), waits=(0.5, 0.9), ffn_width=(8, 6), start_drops=1
    )
    assert made.heads == (2 * 2 * 2, 2)
    assert [entry.name for entry in made.extra_entries] == ["ffn_width"]
    for number, plan in enumerate(made.plans):
        assert set(plan.ffn_width) == {(8, 6)[number // 2 % 2]}
        assert made.extras[number] == ((1.0, 0.75)[number // 2 % 2],)
    assert made.names[2] == "drop 0, W4 0, queue any, wait 0.5 s, FFN 6/8"
    low, dropping = (made.plans[at] for at in made.starts)
    assert (set(low.weight_bits), set(low.ffn_width), all(low.decode.mha)) == ({4}, {8}, True)
    assert (set(dropping.weight_bits), set(dropping.ffn_width), dropping.decode.mha[25]) == ({16}, {8}, False)
    with pytest.raises(ConfigError, match=r"actions.ffn_width is \[4\]; allowed are 8, 7, 6, 5"):
        serve_actions(MODEL, ffn_width=(4,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bits": []}, r"actions.kv_bits is \[\]; it must be a list of at least one entry, such as \[16, 8\]"),
        ({"kv_bits": 16}, "actions.kv_bits is 16; it must be a list"),
        ({"kv_bits": "hidden"}, "actions.kv_bits is 'hidden'; it must be a list"),
        ({"kv_bits": [16, 8.0]}, r"actions.kv_bits is \[16, 8.0\]; allowed are 16, 8, 4, hidden"),
        ({"kv_bits": [[16]]}, "actions.kv_bits is"),
        ({"kv_bits": [16, 16]}, r"actions.kv_bits is \[16, 16\]; an entry is there twice, leave one out"),
        ({"kv_compression": [{"method": "think", "percent": 90}] * 2}, "an entry is there twice"),
        ({"compute_bits": [8.0]}, r"actions.compute_bits is \[8.0\]; allowed are 16, 8, 4$"),
        ({"kv_compression": None}, r"actions.kv_compression is None; .* such as \[null, \{method: ada_kv"),
        ({"kv_compression": {"method": "think", "percent": 90}}, "it must be a list"),
        ({"kv_bits": ["hidden"], "kv_compression": [{"method": "think", "percent": 90}]}, "add null to kv_compression"),
        ({"kv_bits": [16, "hidden"], "kv_compression": [{"method": "think", "percent": 90}]}, "or leave hidden out"),
        ({"drops": ["a"]}, r"actions.drops is \['a'\]; the entries must be whole numbers from 0 to 1, the length of"),
        ({"drops": [2]}, "from 0 to 1"),
        ({"low_layers": [None]}, r"actions.low_layers is \[None\]; .* from 0 to 32, the layers of llama2_7b"),
        ({"low_layers": [64]}, "from 0 to 32"),
        ({"streamed": [8.0]}, r"actions.streamed is \[8.0\]"),
        ({"waits": [math.nan]}, "max_wait_s is nan"),
        (
            {"start_drops": math.nan},
            "actions.start_drops is nan; it must be a whole number of blocks from 0 on, or null",
        ),
        ({"start_drops": -1}, "actions.start_drops is -1"),
        ({"dwell_s": math.nan}, "actions.dwell_s is nan; it must be a finite number of seconds from 0 on"),
        ({"dwell_s": math.inf}, "actions.dwell_s is inf"),
        ({"dwell_s": "long"}, "actions.dwell_s is 'long'"),
        ({"order": [3]}, "3 is not a block; write blocks as MHA0"),
        ({"kvbits": [8]}, "actions has no option 'kvbits'; did you mean 'kv_bits'"),
        ({"workspace_bytes": 5}, "actions has no option 'workspace_bytes'"),
    ],
)
def test_a_table_is_refused_in_a_sentence_that_says_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, PlanError), match=message):
        actions_from(MODEL, {"order": ["MHA25"], **options}, 0)


def test_actions_that_are_no_options_are_refused() -> None:
    for wrong in (None, [16], 3):
        with pytest.raises(ConfigError, match="it must be options by name"):
            actions_from(MODEL, wrong, 0)  # type: ignore[arg-type]


def test_streamed_layers_and_bits_of_kv_are_observed_last_where_plans_differ_in_them() -> None:
    number = MORE.names.index("drop 0, W4 0, queue any, wait 0.5 s, KV8, streamed 4")
    one = ServeObserver(MODEL, MORE, BLOCK_BYTES, TERMS)
    one(state(FIRST), Choice())
    many = ServeObservers(MODEL, MORE, BLOCK_BYTES, 1, TERMS.tpot_s)
    many.begin(0, low_loss=TERMS.low_loss)
    many(seen(FIRST))
    many.action[0], many.changed_s[0] = number, CHANGED_S
    entries = serve_table(MORE).entries
    assert [entry.name for entry in entries[-2:]] == ["level_streamed", "kv_bits"]
    assert serve_table(ACTIONS).entries == SERVE_ENTRIES
    for values in (one(state(SECOND), Choice(number, CHANGED_S)), many(seen(SECOND))[0]):
        assert len(values) == len(entries)
        assert values[-2:].tolist() == [0.5, 0.5]


def test_an_action_is_a_pair_of_weights_and_wait() -> None:
    weights, waits = ACTIONS.heads
    assert (weights, waits, len(ACTIONS.plans)) == (20, 4, 80)
    for number, plan in enumerate(ACTIONS.plans):
        assert ACTIONS.groups[number] == number // waits
        assert plan.max_wait_s == (0.5, 0.5, 0.9, 0.9)[number % waits]
        assert plan.max_running == (None, 48)[number % 2]
        assert plan.weight_bits == ACTIONS.plans[number - number % waits].weight_bits
