"""The real engine refuses plans that store KV in ways that it does not have; it never runs something else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hw.elastic.model import ElasticModel
from sim.cost.plan import KV_METHODS, KVCompression, check_plan, dense_plan
from sim.errors import PlanError
from tests.hw.serving import hw_engine, tiny, tiny_spec

COMPRESSED = [
    replace(dense_plan(tiny_spec()), kv_compression=KVCompression(method=method, percent=70)) for method in KV_METHODS
]


@pytest.mark.parametrize("plan", COMPRESSED, ids=KV_METHODS)
def test_a_model_refuses_such_a_plan_and_keeps_its_own(plan) -> None:
    elastic = ElasticModel(tiny(), name="tiny")
    with pytest.raises(PlanError, match=f"the real engine cannot compress KV by {plan.kv_compression.method}: its KV"):
        elastic.apply(plan)
    assert elastic.plan == dense_plan(elastic.spec)


def test_an_engine_refuses_such_a_plan_at_its_start_and_later() -> None:
    with pytest.raises(PlanError, match="the real engine cannot compress KV by ada_kv"):
        hw_engine(plan=COMPRESSED[0])
    engine = hw_engine()
    with pytest.raises(PlanError, match="use kv_keep or kv_bits, or simulate the plan"):
        engine.apply(COMPRESSED[2])


def test_hidden_states_are_refused() -> None:
    spec = ElasticModel(tiny("opt"), name="tiny").spec
    hidden = replace(dense_plan(spec), kv_hidden=True)
    check_plan(spec, hidden)
    elastic = ElasticModel(tiny("opt"), name="tiny")
    with pytest.raises(PlanError, match="the real engine cannot keep hidden states in place of keys and values"):
        elastic.apply(hidden)
    assert elastic.plan == dense_plan(spec)
