"""The real engine refuses plans that cut FFN blocks; it never runs something else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hw.elastic.model import ElasticModel
from sim.cost.plan import dense_plan, drop, with_mask
from sim.errors import PlanError
from tests.hw.serving import hw_engine, tiny, tiny_spec

DENSE = dense_plan(tiny_spec())
NARROW = replace(DENSE, ffn_width=(7, *DENSE.ffn_width[1:]))


@pytest.fixture(autouse=True)
def cut_the_few_channels_of_the_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans of the tiny model cut its FFN blocks."""
    monkeypatch.setattr("sim.cost.plan.LEAST_CHANNELS", 1)


def test_a_model_refuses_such_a_plan_and_keeps_its_own() -> None:
    elastic = ElasticModel(tiny(), name="tiny")
    with pytest.raises(PlanError, match=r"cannot run FFN blocks at fewer channels \('FFN7/8 0'\)"):
        elastic.apply(NARROW)
    assert elastic.plan == dense_plan(elastic.spec)


def test_an_engine_refuses_such_a_plan_at_its_start_and_later() -> None:
    with pytest.raises(PlanError, match="drop FFN blocks, or simulate the plan"):
        hw_engine(plan=NARROW)
    engine = hw_engine()
    with pytest.raises(PlanError, match="cannot run FFN blocks at fewer channels"):
        engine.apply(NARROW)


def test_the_width_of_a_block_that_does_not_run_is_no_reason() -> None:
    elastic = ElasticModel(tiny(), name="tiny")
    elastic.apply(with_mask(NARROW, drop(tiny_spec(), ffn=[0])))
    assert not elastic.plan.decode.ffn[0]
