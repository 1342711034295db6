"""Tokens of the real engine on a real device: equal to ``generate`` in FP32, and greedy up to rounding in BF16.

The same tests run on a CPU, and on a GPU where there is one (``-m gpu``).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from hw.elastic.model import ElasticModel
from hw.engine.hw_engine import HwEngine
from hw.engine.prompts import RandomPrompts
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.plan import dense_plan
from sim.results.records import Status
from tests.hw.engine.runs import moving_budget, plain_tokens, plan_schedule, serve, some_rows
from tests.hw.serving import (
    LAYERS,
    VOCABULARY,
    PricedClock,
    engine_config,
    flat_latency,
    requests,
    tiny,
    tiny_spec,
    torch,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WORKSPACE_BYTES = 64 << 20


@pytest.fixture(params=DEVICES)
def place(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device whose attention is always computed by the same kernel: kernels differ in their last digits."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield torch.device(request.param)


def engine_of(model: Any, place: torch.device, **more: Any) -> HwEngine:
    elastic = ElasticModel(copy.deepcopy(model).to(place), name="tiny")
    plan, config = dense_plan(elastic.spec), more.pop("config", None) or engine_config(restore="recompute")
    budget = budget_for_kv_blocks(elastic.spec, plan, 200, WORKSPACE_BYTES, config.kv_block_tokens)
    settings = {"budget_bytes": budget, "workspace_bytes": WORKSPACE_BYTES, **more}
    return HwEngine(
        elastic=elastic,
        config=config,
        plan=plan,
        prompts=RandomPrompts(VOCABULARY),
        clock=PricedClock(flat_latency(), plan),
        **settings,
    )


def shortfall(model: Any, prompt: list[int], tokens: list[int]) -> float:
    """Return by how much the logit of some token is below the largest of its position, over the rounding of a logit."""
    ids = torch.tensor([[*prompt, *tokens]], device=next(model.parameters()).device)
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(tokens, device=ids.device)[:, None])[:, 0]
    rounding = torch.finfo(next(model.parameters()).dtype).eps * logits.abs().amax()
    return float((logits.amax(-1) - chosen).max() / rounding)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "sliding"])
def test_in_fp32_tokens_are_those_of_generate(place: torch.device, family: str) -> None:
    rows = some_rows(1, 6)
    engine = engine_of(tiny(family), place)
    assert serve(engine, rows) == plain_tokens(family, rows)
    engine.close()


def test_in_bf16_every_token_is_the_likeliest_up_to_rounding(place: torch.device) -> None:
    model, rows, prompts = tiny().to(torch.bfloat16), some_rows(2, 6), RandomPrompts(VOCABULARY)
    engine = engine_of(model, place)
    served, model = serve(engine, rows), model.to(place)
    for i, tokens in enumerate(served):
        prompt = list(prompts(i, rows[i][1]))
        assert shortfall(model, prompt, tokens) < 4
        wrong = [(token + 1) % VOCABULARY for token in tokens]
        assert shortfall(model, prompt, wrong) > 4
    engine.close()


def test_plans_and_budgets_that_change_lose_no_request_and_no_copy(place: torch.device) -> None:
    rng, rows, spec = random.Random(5), some_rows(5, 12, longest_output=20), tiny_spec()
    budget = moving_budget(5, 60)
    engine = engine_of(tiny(), place, budget_bytes=budget, workspace_bytes=0)
    plans = plan_schedule(5, 10, bits=True, kv=True, streams=True, writes=True).plans
    engine.submit(requests(rows))
    at_s = 0.0
    while not engine.drained:
        at_s += rng.choice([0.4, 1.1, 2.5])
        engine.run_until(at_s)
        engine.check()
        engine.apply(rng.choice(plans))
    assert (engine.records().status == Status.FINISHED).all()
    assert [len(engine.tokens(i)) for i in range(len(rows))] == [output for _, _, output in rows]
    assert all(row.allocated_bytes == row.predicted_bytes for row in engine.memory_rows())
    assert spec == engine.model
    engine.close()


@pytest.mark.parametrize("bits", [16, 8])
def test_streamed_layers_give_the_tokens_of_layers_on_the_device(place: torch.device, bits: int) -> None:
    rows, dense = some_rows(4, 8), dense_plan(tiny_spec())
    plan = replace(dense, weight_bits=(bits,) * LAYERS)
    served = []
    for streamed in ((), (True,) * LAYERS, (True, True, False, True)):
        engine = engine_of(tiny(), place)
        engine.apply(replace(plan, streamed=streamed))
        served.append(serve(engine, rows))
        engine.check()
        engine.close()
    assert served[1] == served[0] == served[2]
    assert bits < 16 or served[0] == plain_tokens("llama", rows)


def test_kv_that_was_on_the_host_comes_back_whole(place: torch.device) -> None:
    rows = some_rows(2, 12, longest_output=24)
    config = engine_config(preemption="swap", host_kv_blocks=200)
    budget = budget_for_kv_blocks(tiny_spec(), dense_plan(tiny_spec()), 16, WORKSPACE_BYTES, config.kv_block_tokens)
    engine = engine_of(tiny(), place, config=config, budget_bytes=budget)
    assert serve(engine, rows) == plain_tokens("llama", rows)
    assert engine.records().preemptions.sum() > 3
    assert engine.iterations().prefill_tokens.sum() == sum(prompt for _, prompt, _ in rows)
    engine.close()
