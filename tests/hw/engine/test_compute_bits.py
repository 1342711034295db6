"""Products at half of the bits of resident weights, switched in every iteration, against plain models with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sim.cost.plan import Plan, dense_plan
from tests.hw.serving import LAYERS, VOCABULARY, hw_engine, requests, tiny, tiny_spec, torch, transformers
from tests.sample import quick

from hw.elastic.nested import half_of_16  # isort: skip
from hw.elastic.quantize import quantize  # isort: skip
from hw.engine.prompts import RandomPrompts  # isort: skip

DENSE = dense_plan(tiny_spec())
PROMPT, OUTPUT = 13, 12


def plain_model(family: str, bits: int, nested: tuple[bool, ...]) -> Any:
    """Return a plain model whose layers have the weights that are read."""
    model = tiny(family)
    for layer, half in zip(model.model.layers, nested, strict=True):
        for linear in (part for part in layer.modules() if isinstance(part, torch.nn.Linear)):
            weight = linear.weight.data
            if bits == 8:
                linear.weight.data = quantize(weight, 8).read(half=half).dequantize(weight.dtype)
            elif half:
                linear.weight.data = half_of_16(weight)
    return model


def expected_tokens(family: str, plans: list[Plan]) -> list[int]:
    """Return the tokens of a request whose iterations run these plans, by plain models that share their KV."""
    models: dict[Plan, Any] = {}
    for plan in plans:
        if plan not in models:
            models[plan] = plain_model(family, plan.weight_bits[0], plan.nested)
    cache = transformers.DynamicCache()
    tokens, made = torch.tensor([RandomPrompts(VOCABULARY)(0, PROMPT)]), []
    for plan in plans:
        with torch.inference_mode():
            logits = models[plan](input_ids=tokens, past_key_values=cache, use_cache=True).logits[0, -1]
        made.append(int(logits.argmax()))
        tokens = torch.tensor([[made[-1]]])
    return made


@pytest.mark.parametrize("family", quick(("llama", "qwen2"), 1))
@pytest.mark.parametrize("bits", [16, 8])
def test_tokens_are_those_of_models_with_the_weights_of_each_iteration(family: str, bits: int) -> None:
    full = replace(DENSE, weight_bits=(bits,) * LAYERS)
    low, some = (replace(full, compute_bits=low) for low in ((bits // 2,) * LAYERS, (bits // 2, bits, bits, bits // 2)))
    plans = [(full, low, some)[number % 3] for number in range(OUTPUT)]
    engine = hw_engine(family=family, plan=full)
    engine.submit(requests([(0.0, PROMPT, OUTPUT)]))
    held = set()
    for number in range(OUTPUT):  # the prompt takes 1.39 s, each token after it 1.03 s
        state = engine.run_until(0.7 + 1.03 * number)
        assert state.iterations == number
        held.add((state.weight_bytes, state.kv_layer_blocks))
        if number + 1 < OUTPUT:
            engine.apply(plans[number + 1])
    engine.run_until(100.0)
    engine.check()
    assert len(held) == 1
    assert engine.tokens(0) == expected_tokens(family, plans)
    assert engine.tokens(0) != expected_tokens(family, [full] * OUTPUT)
    assert not engine.transitions().bytes_in.any()


def served(**other: Any) -> list[list[int]]:
    """Return the tokens of two requests under a plan, with a plan change in between where ``later`` names one."""
    later = other.pop("later", None)
    engine = hw_engine(plan=replace(DENSE, **other))
    engine.submit(requests([(0.0, 9, 8), (0.5, 17, 6)]))
    engine.run_until(3.0)
    if later is not None:
        engine.apply(replace(DENSE, **later))
    engine.run_until(200.0)
    engine.check()
    return [engine.tokens(i) for i in range(2)]


def test_streamed_layers_are_read_at_half_of_their_bits_too() -> None:
    for compute_bits in ((8,) * LAYERS, (16, 8, 16, 8)):
        plain = served(compute_bits=compute_bits)
        assert served(compute_bits=compute_bits, streamed=(True,) * LAYERS) == plain
    assert plain != served()


def test_a_layer_that_is_copied_in_is_read_at_half_of_its_new_bits() -> None:
    """Eight bits arrive in all layers before the next token, and are read at four."""
    low = {"weight_bits": (8,) * LAYERS, "compute_bits": (4,) * LAYERS}
    assert served(later=low) != served(later={"weight_bits": (8,) * LAYERS})
    assert served(later=low)[0][:2] == served()[0][:2]


def test_prompts_that_only_write_kv_do_so_at_half_of_the_bits() -> None:
    kv_only = (True, False, True, False)
    assert served(compute_bits=(8,) * LAYERS, kv_only=kv_only) != served(kv_only=kv_only)
