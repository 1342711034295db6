"""Values that never change are not copied."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError

import pytest

from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan


def test_a_copy_of_something_that_holds_a_plan_holds_the_same_plan() -> None:
    model = load_model("llama2_7b")
    plan = dense_plan(model)
    copied = copy.deepcopy([model, plan, [plan.decode]])
    assert copied[0] is model
    assert copied[1] is plan
    assert copied[2][0] is plan.decode
    with pytest.raises(FrozenInstanceError):
        plan.max_running = 3  # type: ignore[misc]
