"""Plans that cut FFN blocks on the real engine: from the start of a run on, or never."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hw.elastic.model import ElasticModel
from hw.replay.channel_order import order_channels
from sim.cost.memory import weight_bytes
from sim.cost.plan import dense_plan, drop, with_mask
from sim.errors import PlanError
from sim.policies import Fixed
from sim.policies.schedule import Schedule
from tests.hw.elastic.test_model import some_tokens
from tests.hw.engine.runs import serve, some_rows
from tests.hw.serving import LAYERS, hw_engine, save_checkpoint, tiny, tiny_spec, torch, transformers
from tests.hw.tiny_models import few_channels  # noqa: F401 - a fixture

DENSE = dense_plan(tiny_spec())
NARROW = replace(DENSE, ffn_width=(7, *DENSE.ffn_width[1:]))


pytestmark = pytest.mark.usefixtures("few_channels")


def test_an_engine_without_channels_in_order_refuses_such_a_plan_at_its_start_and_later() -> None:
    with pytest.raises(PlanError, match="Otherwise drop FFN blocks, or simulate the plan"):
        hw_engine(plan=NARROW)
    with pytest.raises(PlanError, match="put them in order of importance if the first plan"):
        hw_engine(plans=[NARROW])
    engine = hw_engine()
    with pytest.raises(PlanError, match="cannot run FFN blocks at fewer channels"):
        engine.apply(NARROW)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_an_engine_serves_at_fewer_channels_in_the_bytes_that_are_counted(bits: int) -> None:
    plan = replace(DENSE, ffn_width=(5, 6, 7, 8), weight_bits=(bits,) * LAYERS)
    engine = hw_engine(plan=plan, plans=[plan], ordered=True)
    serve(engine, some_rows(3, 6))
    assert engine.elastic.bytes() == weight_bytes(tiny_spec(), plan)
    rows = engine.memory_rows()
    assert rows
    assert all(row.predicted_bytes == row.allocated_bytes for row in rows)


def test_the_width_of_a_block_that_does_not_run_is_no_reason() -> None:
    elastic = ElasticModel(tiny(), name="tiny")
    elastic.apply(with_mask(NARROW, drop(tiny_spec(), ffn=[0])))
    assert not elastic.plan.decode.ffn[0]


# --- The order of a run ----------------------------------------------------------------------------------------------


def test_channels_are_put_in_order_only_for_plans_that_cut_them(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{token}" for token in some_tokens(9000)), encoding="utf-8")
    elastic = ElasticModel(tiny(), name="tiny")
    before = elastic.layers[0].down.weight.value.clone()
    order_channels(elastic, tokenizer, Fixed(DENSE), str(text))
    assert not elastic.ordered
    assert torch.equal(elastic.layers[0].down.weight.value, before)
    elastic.apply(with_mask(DENSE, drop(tiny_spec(), ffn=[0])))  # as an earlier run leaves it
    order_channels(elastic, tokenizer, Schedule((0.0, 1.0), (DENSE, NARROW)), str(text))
    assert elastic.ordered
    after = elastic.layers[0].down.weight.value
    assert not torch.equal(after, before)
    assert torch.equal(after.sort(1).values, before.sort(1).values)
    order_channels(elastic, tokenizer, Fixed(NARROW), str(text))  # a second time changes nothing
    assert elastic.layers[0].down.weight.value is after


@pytest.mark.parametrize(("note", "text"), [("random weights", "no such text"), ("", None)])
def test_random_weights_and_no_text_keep_the_order_of_the_checkpoint(note: str, text: str | None) -> None:
    elastic = ElasticModel(tiny(), name="tiny", note=note)
    before = elastic.layers[0].down.weight.value.clone()
    order_channels(elastic, None, Fixed(NARROW), text)
    assert elastic.ordered
    assert torch.equal(elastic.layers[0].down.weight.value, before)
