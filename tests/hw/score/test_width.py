"""FFN blocks cut to some channels: equal to a plain mask, scores by their definition, and predicted losses."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")
pytest.importorskip("transformers", reason="the real model needs transformers: pip install -e '.[hw]'")

from hw.elastic.model import ElasticModel  # noqa: E402
from hw.score.ffn_slices import FFNSlice, channel_scores, down_projection, sliced  # noqa: E402
from sim.cost.ffn_width import ffn_channels  # noqa: E402
from tests.hw.elastic.test_model import some_tokens  # noqa: E402
from tests.hw.tiny_models import LAYERS, tiny  # noqa: E402


def test_channels_are_rounded_up_to_a_multiple_and_never_exceed_all() -> None:
    assert [ffn_channels(1536, width) for width in (8, 7, 6, 5)] == [1536, 1344, 1152, 960]
    assert ffn_channels(11008, 7) == 9664
    assert ffn_channels(40, 5) == 40


@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_a_slice_equals_channels_masked_to_their_means(family: str) -> None:
    elastic = ElasticModel(tiny(family), name="tiny")
    tokens = torch.tensor([some_tokens(18, seed=1)])
    before = elastic.forward(tokens, all_logits=True)
    scores = channel_scores(elastic, tokens)
    down = down_projection(elastic, 1)
    order = scores.order(1)
    kept, removed = order[: len(order) // 2], order[len(order) // 2 :]

    def mask(_, inputs):
        values = inputs[0].clone()
        values[..., removed] = scores.mean[1, removed].to(values.dtype)
        return (values,)

    handle = down.register_forward_pre_hook(mask)
    masked = elastic.forward(tokens, all_logits=True)
    handle.remove()
    lost = (down.weight[:, removed].double() @ scores.mean[1, removed]).to(down.weight.dtype)
    with sliced(elastic, 1, FFNSlice(kept.sort().values, lost)):
        cut = elastic.forward(tokens, all_logits=True)
    torch.testing.assert_close(cut, masked, rtol=1e-4, atol=1e-5)
    assert not torch.equal(cut, before)
    assert torch.equal(elastic.forward(tokens, all_logits=True), before)  # the weights are back


def test_a_channel_scores_its_variance_times_the_squared_norm_of_its_column() -> None:
    elastic = ElasticModel(tiny(), name="tiny")
    windows = torch.tensor([some_tokens(12, seed=seed) for seed in (1, 2)])
    scores = channel_scores(elastic, windows)
    for layer in range(LAYERS):
        down, seen = down_projection(elastic, layer), []
        handle = down.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0][0].double()))
        for window in windows:
            elastic.forward(window[None])
        handle.remove()
        expected = torch.cat(seen).var(0) * down.weight.double().square().sum(0)
        torch.testing.assert_close(scores.importance[layer], expected, rtol=1e-6, atol=1e-12)
