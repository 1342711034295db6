"""FFN blocks at fewer channels on the real model: values, bytes, and every way from one width to another."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")
transformers = pytest.importorskip("transformers", reason="the real model needs transformers: pip install -e '.[hw]'")

from hw.elastic.channel_scores import ChannelScores, channel_scores, down_projection  # noqa: E402
from hw.elastic.ffn_channels import FFNChannels  # noqa: E402
from hw.elastic.model import ElasticModel  # noqa: E402
from sim.cost.ffn_width import FFN_WIDTHS, ffn_channels  # noqa: E402
from sim.cost.memory import weight_bytes  # noqa: E402
from sim.cost.model_spec import ModelSpec  # noqa: E402
from sim.cost.plan import Plan, dense_plan, drop, with_mask  # noqa: E402
from sim.errors import PlanError  # noqa: E402
from tests.hw.elastic.test_model import some_tokens  # noqa: E402
from tests.hw.tiny_models import LAYERS, VOCABULARY, few_channels, tiny  # noqa: E402, F401 - a fixture

WIDTHS = (5, 8, 7, 6)
TOKENS = [some_tokens(18, seed=1)]


pytestmark = pytest.mark.usefixtures("few_channels")


def wide_model(dtype: Any = torch.float32) -> Any:
    """Return a small model with 320 channels, whose widths end inside and at the end of groups of 128."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=320,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def in_order(model: Any) -> tuple[ElasticModel, ChannelScores, Any]:
    """Return a model whose channels are in FLAP's order, the scores, and the order of each layer."""
    elastic = ElasticModel(model, name="small")
    scores = channel_scores(elastic, torch.tensor(TOKENS))
    order = torch.stack([scores.order(layer) for layer in range(LAYERS)])
    elastic.order_channels(order, scores.mean)
    return elastic, scores, order


def cut_plan(spec: ModelSpec, bits: int = 16, widths: tuple[int, ...] = WIDTHS) -> Plan:
    return replace(dense_plan(spec), ffn_width=widths, weight_bits=(bits,) * LAYERS)


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "gemma3", "opt"])
def test_a_cut_plan_equals_channels_masked_to_their_means_in_the_plain_model(family: str) -> None:
    elastic, scores, order = in_order(tiny(family))
    plain = ElasticModel(tiny(family), name="plain")
    dense = plain.forward(TOKENS, all_logits=True)
    torch.testing.assert_close(elastic.forward(TOKENS, all_logits=True), dense, rtol=1e-4, atol=1e-5)
    for layer, width in enumerate(WIDTHS):
        removed = order[layer, ffn_channels(elastic.spec.intermediate_size, width) :]

        def mask(_: Any, inputs: Any, layer: int = layer, removed: Any = removed) -> Any:
            values = inputs[0].clone()
            values[..., removed] = scores.mean[layer, removed].to(values.dtype)
            return (values,)

        down_projection(plain, layer).register_forward_pre_hook(mask)
    masked = plain.forward(TOKENS, all_logits=True)
    elastic.apply(cut_plan(elastic.spec))
    found = elastic.forward(TOKENS, all_logits=True)
    torch.testing.assert_close(found, masked, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, dense, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "gemma3", "opt"])
def test_the_own_code_of_a_layer_computes_what_its_modules_compute(family: str) -> None:
    elastic, *_ = in_order(tiny(family))
    elastic.apply(cut_plan(elastic.spec))
    hidden = torch.randn(7, elastic.spec.hidden_size, generator=torch.Generator().manual_seed(2))
    for index, layer in enumerate(elastic.layers):
        with torch.inference_mode():
            own = layer.feed(layer.ffn_norm(hidden))
            torch.testing.assert_close(own, elastic.feed(index, hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_at_all_bits_the_channels_that_stay_keep_their_values(bits: int) -> None:
    (elastic, scores, order), (whole, *_) = in_order(wide_model()), in_order(wide_model())
    spec = elastic.spec
    lost = []
    for layer, width in enumerate(WIDTHS):
        down = down_projection(whole, layer)
        kept = ffn_channels(spec.intermediate_size, width)
        lost.append(down.weight[:, kept:].double() @ scores.mean[layer, order[layer, kept:]])
        down.register_forward_pre_hook(
            lambda _, x, kept=kept: (torch.cat([x[0][..., :kept], 0 * x[0][..., kept:]], -1),)
        )
        down.register_forward_hook(lambda _, x, y, layer=layer: y + lost[layer].to(y.dtype))
    whole.apply(cut_plan(spec, bits, (8,) * LAYERS))
    elastic.apply(cut_plan(spec, bits))
    expected = whole.forward(TOKENS, all_logits=True)
    torch.testing.assert_close(elastic.forward(TOKENS, all_logits=True), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model", ["llama", "mistral", "opt", "320 channels"])
def test_weights_do_not_depend_on_the_way_to_a_plan_and_take_the_bytes_that_are_counted(seed: int, model: str) -> None:
    def made() -> ElasticModel:
        return in_order(wide_model() if model == "320 channels" else tiny(model))[0]

    elastic, rng = made(), random.Random(seed)
    spec = elastic.spec
    plans = []
    for _ in range(10):
        plan = replace(
            cut_plan(spec, widths=tuple(rng.choice(FFN_WIDTHS) for _ in range(LAYERS))),
            weight_bits=tuple(rng.choice((16, 8, 4)) for _ in range(LAYERS)),
        )
        plans.append(with_mask(plan, drop(spec, ffn=[i for i in range(LAYERS) if rng.random() < 0.2])))
    if seed == 0:
        elastic.prepare_for(plans)
        stored = elastic.stored_bytes
    for plan in plans:
        elastic.apply(plan)
        assert elastic.bytes() == weight_bytes(spec, plan)
        direct = made()
        direct.apply(plan)
        assert torch.equal(elastic.forward(TOKENS), direct.forward(TOKENS))
        assert elastic.ready()
    if seed == 0:
        assert elastic.stored_bytes == stored  # nothing had to be stored on the way
    elastic.apply(dense_plan(spec))
    assert torch.equal(elastic.forward(TOKENS), made().forward(TOKENS))


def test_a_wider_block_copies_only_the_channels_that_it_lacks() -> None:
    elastic, *_ = in_order(wide_model())
    spec = elastic.spec
    elastic.apply(cut_plan(spec, widths=(5,) * LAYERS))
    block = elastic.blocks["ffn"][0]
    held = block.nbytes
    block.want(16, 7)
    assert block.pending is not None
    assert block.pending.nbytes == 3 * 48 * 4 * (280 - 200)
    assert block.nbytes == held + block.pending.nbytes
    block.join(wait=True)
    assert block.nbytes == held + 3 * 48 * 4 * (280 - 200)


def test_without_memory_for_a_moment_the_channels_that_stay_go_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    (elastic, *_), (other, *_) = in_order(tiny()), in_order(tiny())
    block, part, asked = elastic.blocks["ffn"][0], FFNChannels.part, list[bool]()

    def refused_once(*arguments: Any) -> list[torch.Tensor]:
        asked.append(True)
        if len(asked) == 2:  # the matrix of gate and up is there already
            raise torch.OutOfMemoryError("CUDA out of memory")
        return part(*arguments)

    monkeypatch.setattr(FFNChannels, "part", refused_once)
    block.narrow(5)
    assert len(asked) == 4
    other.blocks["ffn"][0].narrow(5)
    assert torch.equal(elastic.forward(TOKENS), other.forward(TOKENS))
    assert elastic.bytes() == other.bytes()


def test_half_of_the_bits_is_read_of_the_channels_that_stay() -> None:
    (elastic, *_), (cut_after, *_) = in_order(wide_model()), in_order(wide_model())
    plan = replace(cut_plan(elastic.spec, 8), compute_bits=(4,) * LAYERS)
    elastic.apply(plan)
    cut_after.apply(replace(plan, ffn_width=(8,) * LAYERS))
    cut_after.apply(plan)
    assert torch.equal(elastic.forward(TOKENS), cut_after.forward(TOKENS))


def test_a_model_whose_channels_are_not_in_order_refuses_and_keeps_its_plan() -> None:
    elastic = ElasticModel(tiny(), name="tiny")
    with pytest.raises(PlanError, match=r"cannot run FFN blocks at fewer channels \('FFN7/8 2; FFN6/8 3"):
        elastic.apply(cut_plan(elastic.spec))
    assert elastic.plan == dense_plan(elastic.spec)


def test_a_model_whose_plans_may_cut_blocks_does_not_stream_layers() -> None:
    elastic, *_ = in_order(tiny())
    plan = replace(dense_plan(elastic.spec), streamed=(True,) * LAYERS)
    with pytest.raises(PlanError, match=r"cannot stream layers .* use either in a run"):
        elastic.apply(plan)
    elastic.apply(cut_plan(elastic.spec))
    assert elastic.bytes() == weight_bytes(elastic.spec, elastic.plan)
