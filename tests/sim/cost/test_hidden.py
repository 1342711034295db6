"""Hidden states in place of keys and values (Apt-Serve): bytes, text and JSON of such plans, and who refuses them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sim.cost.kv_format import kv_formats, stored_kv_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import KVCompression, check_plan, dense_plan, describe
from sim.cost.plan_json import plan_from_json, plan_to_json
from sim.cost.plan_text import plan_from_text
from sim.errors import PlanError

LLAMA = load_model("llama2_7b")
HIDDEN = replace(dense_plan(LLAMA), kv_hidden=True)


def test_hidden_states_take_half_the_bytes_of_keys_and_values():
    assert 2 * stored_kv_bytes(LLAMA, HIDDEN, 1000) == stored_kv_bytes(LLAMA, dense_plan(LLAMA), 1000)
    formats = kv_formats(LLAMA, HIDDEN, 16)
    assert formats is not None
    assert {form.block_tokens for form in formats} == {32}


def test_a_plan_with_hidden_states_survives_its_line_and_its_json():
    check_plan(LLAMA, HIDDEN)
    assert plan_from_text(describe(HIDDEN), LLAMA.num_layers) == HIDDEN
    assert plan_from_json(plan_to_json(HIDDEN)) == HIDDEN


def test_hidden_states_need_a_model_without_gqa_on_one_gpu():
    for model in (load_model("llama3_8b"), LLAMA.shard(2)):
        with pytest.raises(PlanError, match="no GQA"):
            check_plan(model, replace(dense_plan(model), kv_hidden=True))


def test_hidden_states_do_not_go_with_changes_of_keys_and_values():
    for changes in ({"kv_bits": (8,) * 32}, {"kv_compression": KVCompression(method="lorc", percent=60)}):
        with pytest.raises(PlanError, match="kv_hidden"):
            check_plan(LLAMA, replace(HIDDEN, **changes))
