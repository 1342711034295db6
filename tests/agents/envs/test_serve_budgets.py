"""The budgets of ``ServeTrace`` are shares of the served model's dense weights."""

from dataclasses import replace
from itertools import pairwise

import pytest

from agents.envs.serve import ServeSetting
from agents.envs.serve_budgets import BUDGETS, BudgetRange, budget_range, window_budget
from agents.envs.serve_windows import Window
from sim.cost.memory import weight_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan
from sim.engine.budget import Budget, BudgetContext
from sim.engine.server_spec import ServerSpec
from sim.errors import ConfigError

SERVER = ServerSpec.from_names(model="llama2_7b", gpu="a100_80gb")
CONTEXT: BudgetContext = SERVER.budget_context(dense_plan(SERVER.model))
DENSE_BYTES = 13_476_831_232  # 2 bytes for each of the 6,738,415,616 parameters of Llama-2-7B
TIGHT = BudgetRange(high_share=1.187, low_share=0.445, notice_s=5.0)


def budget(kind: str, limits: BudgetRange = TIGHT, seed: int = 3, horizon_s: float = 120.0) -> Budget:
    return window_budget(CONTEXT, limits, kind, seed, horizon_s)


def test_shares_are_multiples_of_the_dense_weights() -> None:
    assert weight_bytes(SERVER.model, dense_plan(SERVER.model)) == DENSE_BYTES
    assert TIGHT.bytes_of(CONTEXT) == (round(1.187 * DENSE_BYTES), round(0.445 * DENSE_BYTES))
    assert [round(one / 1e9) for one in BudgetRange().bytes_of(CONTEXT)] == [72, 24]


def test_no_budget_exceeds_nine_tenths_of_the_device() -> None:
    small = replace(CONTEXT, gpu=replace(CONTEXT.gpu, memory_bytes=24e9))
    assert BudgetRange().bytes_of(small) == (21_600_000_000, 21_600_000_000)
    assert window_budget(small, BudgetRange(), "cotenant", 3, 120.0).budget_bytes == (21_600_000_000,)


@pytest.mark.parametrize("kind", BUDGETS)
def test_every_kind_begins_and_ends_at_the_most_and_stays_in_its_range(kind: str) -> None:
    high, low = TIGHT.bytes_of(CONTEXT)
    for seed in range(20):
        found = budget(kind, seed=seed)
        assert found.budget_bytes[0] == found.budget_bytes[-1] == high
        assert all(low <= one <= high for one in found.budget_bytes)
        assert found == budget(kind, seed=seed)
        assert found.notice_s == 5.0


def test_each_kind_moves_as_it_says() -> None:
    high, low = TIGHT.bytes_of(CONTEXT)
    assert budget("full").budget_bytes == (high,)
    assert set(budget("cotenant").budget_bytes) == {high, low}
    assert budget("steps").budget_bytes == (high, low, high)
    _, begin_s, end_s = budget("steps").change_s
    assert 12.0 <= begin_s <= 60.0
    assert 24.0 <= end_s - begin_s <= 48.0
    walk = budget("random_walk").budget_bytes
    # The last step returns to the most, from wherever the walk is.
    assert max(abs(a - b) for a, b in pairwise(walk[:-1])) <= (high - low) / 6


def test_a_step_is_announced_to_the_policy_and_not_before() -> None:
    setting = ServeSetting(budget={"high_share": 1.484, "low_share": 0.89, "notice_s": 4.0})
    window = Window(source="burst", start_s=300.0, rate=0.4, budget="steps", budget_seed=1)
    engine = setting.idle_engine(window, setting.actions.plans[0])
    steps = window_budget(CONTEXT, setting.budget, "steps", 1, 120.0)
    begin_s, low = steps.change_s[1], steps.budget_bytes[1]
    assert engine.run_until(begin_s - 4.5).next_budget_bytes == steps.budget_bytes[0]
    state = engine.run_until(begin_s - 3.5)
    assert (state.next_budget_bytes, state.next_budget_s) == (low, begin_s)


def test_another_model_has_the_same_tightness() -> None:
    model = load_model("smollm2_135m")
    small = replace(CONTEXT, model=model)
    assert TIGHT.bytes_of(small)[1] == round(0.445 * weight_bytes(model, dense_plan(model)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"high_share": 1.0, "low_share": 1.2}, "at most high_share"),
        ({"low_share": 0.0}, "above 0"),
        ({"low_share": float("nan")}, "finite number"),
        ({"high_share": "much"}, "finite number"),
        ({"notice_s": -1.0}, "at least 0 seconds"),
        ({"higher": 1.0}, "no field 'higher'.*high_share"),
    ],
)
def test_a_range_that_makes_no_sense_is_refused_with_its_value(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        budget_range(fields)


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="random_walk"):
        budget("random")
