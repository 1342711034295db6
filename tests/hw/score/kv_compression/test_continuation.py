"""The loss after a compressed prompt against the engine's own ways to hold less KV, and against plain attention."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")
pytest.importorskip("transformers", reason="the real model needs transformers: pip install -e '.[hw]'")

from hw.elastic.kv import RequestKV  # noqa: E402
from hw.elastic.kv_compression import lorc, refree_kv  # noqa: E402
from hw.elastic.kv_compression.prompt_kv import attention, full, kept_tokens  # noqa: E402
from hw.elastic.model import ElasticModel  # noqa: E402
from hw.score.kv_compression.continuation import Prompt, continuation_nll, read_prompt  # noqa: E402
from hw.score.kv_compression.page import better_than, losses, page, reach  # noqa: E402
from hw.score.kv_compression.variants import (  # noqa: E402
    FULL,
    bits_of_layers,
    compressed,
    variants,
)
from hw.score.nll import measure  # noqa: E402
from sim.cost.model_spec import load_model  # noqa: E402
from sim.cost.plan import KeepMask, dense_plan  # noqa: E402
from sim.cost.quality import QUALITIES  # noqa: E402
from sim.errors import ModelError  # noqa: E402
from sim.paths import RESULTS  # noqa: E402
from sim.results.run_folder import write_json  # noqa: E402
from tests.hw.elastic.test_model import some_tokens  # noqa: E402
from tests.hw.score.test_score import LAYERS as CHECKPOINT_LAYERS  # noqa: E402
from tests.hw.score.test_score import Score, checkpoint, score  # noqa: E402, F401
from tests.hw.tiny_models import LAYERS, tiny  # noqa: E402

PROMPT, LENGTH, OBSERVED = 24, 33, 5


def read(family: str = "llama", seed: int = 1) -> tuple[ElasticModel, Any, Prompt]:
    elastic = ElasticModel(tiny(family), name="tiny")
    window = torch.tensor(some_tokens(LENGTH, seed=seed))
    return elastic, window, read_prompt(elastic, window[:PROMPT], OBSERVED)


@pytest.mark.parametrize("family", ["llama", "sliding", "qwen2", "qwen3", "phi3", "gemma3", "opt"])
def test_full_kv_loses_what_the_dense_model_loses(family: str) -> None:
    elastic, window, prompt = read(family)
    found = continuation_nll(elastic, prompt, window, [full(layer) for layer in prompt.layers])
    dense = measure(elastic, dense_plan(elastic.spec), window[None], prompt_tokens=PROMPT)
    assert len(found) == LENGTH - PROMPT == dense.decode_tokens
    assert float(found.sum()) == pytest.approx(dense.decode, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "sliding", "qwen2", "qwen3", "phi3", "gemma3", "opt"])
def test_the_queries_and_keys_of_a_prompt_give_the_attention_of_the_model(family: str) -> None:
    elastic, window, prompt = read(family)
    expected = elastic.attention_weights(window[None, :PROMPT])
    for layer, weights in zip(prompt.layers, expected, strict=True):
        torch.testing.assert_close(attention(layer, OBSERVED), weights[0, :, -OBSERVED:].float(), rtol=1e-4, atol=1e-5)


def test_tokens_that_all_heads_drop_are_as_if_the_cache_never_held_them() -> None:
    elastic, window, prompt = read()
    kept = torch.ones(PROMPT, dtype=torch.bool)
    kept[[0, 3, 4, 11, 22]] = False
    heads = elastic.spec.num_kv_heads
    found = continuation_nll(
        elastic, prompt, window, [kept_tokens(layer, kept.expand(heads, -1)) for layer in prompt.layers]
    )
    request = RequestKV()
    logits = elastic.forward([window[:PROMPT].tolist()], [request], "prefill")
    for layer in range(LAYERS):
        request._keys[layer] = request._keys[layer][:, kept]
        request._values[layer] = request._values[layer][:, kept]
        request._positions[layer] = request._positions[layer][kept]
    after = elastic.forward([window[PROMPT:-1].tolist()], [request], "decode", all_logits=True)[0]
    expected = torch.nn.functional.cross_entropy(torch.cat((logits, after)), window[PROMPT:], reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_each_query_head_sees_the_tokens_of_its_own_kv_head() -> None:
    elastic, window, prompt = read()
    spec, number = elastic.spec, 0
    kept = torch.rand(spec.num_kv_heads, PROMPT, generator=torch.Generator().manual_seed(3)) < 0.5
    stored = [full(layer) for layer in prompt.layers]
    stored[number] = kept_tokens(prompt.layers[number], kept)
    longer = read_prompt(elastic, window, LENGTH - PROMPT).layers[number]  # the same keys, and those that follow
    wide = longer.keys.repeat_interleave(spec.num_heads // spec.num_kv_heads, 0)
    values = longer.values.repeat_interleave(spec.num_heads // spec.num_kv_heads, 0)
    scores = longer.queries @ wide.transpose(1, 2) * longer.scale
    at = torch.arange(LENGTH)
    for head in range(spec.num_heads):
        seen = (at[None] <= at[PROMPT:, None]) & torch.cat(
            (kept[head // (spec.num_heads // spec.num_kv_heads)], torch.ones(LENGTH - PROMPT, dtype=torch.bool))
        )
        scores[head].masked_fill_(~seen, -torch.inf)
    mixed = (scores.softmax(-1) @ values).transpose(0, 1).flatten(1)
    hidden = elastic.embed(window[None], at[None])
    with torch.inference_mode():
        hidden = hidden[:, PROMPT:] + elastic.layers[number].out(mixed)[None]
        hidden = hidden + elastic.feed(number, hidden)
    rest = _Replaced(elastic, hidden)
    assert torch.allclose(rest.found(prompt, window, stored), rest.expected, rtol=1e-4, atol=1e-5)


class _Replaced:
    """Compares the hidden states after the first layer with those that a test computed."""

    def __init__(self, elastic: ElasticModel, expected: Any) -> None:
        self.elastic, self.expected = elastic, expected

    def found(self, prompt: Prompt, window: Any, stored: Any) -> Any:
        """Return the hidden states after the first layer, as ``continuation_nll`` computes them."""
        seen: list[Any] = []
        feed = self.elastic.feed

        def noted(layer: int, hidden: Any) -> Any:
            added = feed(layer, hidden)
            if layer == 0:
                seen.append(hidden + added)
            return added

        self.elastic.feed = noted  # type: ignore[method-assign]
        continuation_nll(self.elastic, prompt, window, stored)
        return seen[0]


def test_a_dropped_block_loses_what_the_plan_that_drops_it_in_decode_loses() -> None:
    elastic, window, prompt = read()
    stored, share = compressed(_variants(elastic, [0.5])["dropped MHA blocks", 0.5], prompt.layers)
    assert [one is None for one in stored] == [False, True, False, True]
    assert share == 0.5
    dense = dense_plan(elastic.spec)
    plan = replace(dense, decode=KeepMask(mha=(True, False, True, False), ffn=dense.decode.ffn))
    found = continuation_nll(elastic, prompt, window, stored)
    expected = measure(elastic, plan, window[None], prompt_tokens=PROMPT).decode
    assert float(found.sum()) == pytest.approx(expected, rel=1e-5)


def _variants(elastic: ElasticModel, factors: list[float]) -> dict[tuple[str, float | None], Any]:
    made = variants(
        elastic,
        factors,
        thresholds=dict.fromkeys(factors, 0.1),
        mha_order=[3, 1, 0, 2],
        ada_queries=OBSERVED,
        think_queries=OBSERVED,
        prompt_tokens=PROMPT,
    )
    return {(one.method, one.factor): one for one in made}


def test_every_variant_stores_the_share_it_is_compared_at() -> None:
    elastic, window, prompt = read()
    factors = [0.9, 0.75, 0.5]
    found = _variants(elastic, factors)
    base = continuation_nll(elastic, prompt, window, compressed(FULL, prompt.layers)[0])
    numbers = 2 * elastic.spec.num_kv_heads * elastic.spec.head_dim * PROMPT
    for (method, factor), variant in found.items():
        stored, share = compressed(variant, prompt.layers)
        assert torch.isfinite(continuation_nll(elastic, prompt, window, stored)).all()
        if factor is None or method == "ReFreeKV":
            continue
        coarse = method in ("kv_bits", "dropped MHA blocks", "ThinK")  # whole layers and whole channels
        assert share == pytest.approx(factor, abs=0.13 if coarse else 4 * PROMPT / numbers + 0.03), variant
    assert ("ThinK", 0.5) not in found
    assert ("LoRC, keys alone", 0.5) not in found
    assert base.shape == (LENGTH - PROMPT,)


def test_kv_keep_drops_the_same_tokens_as_the_plan_of_the_engine() -> None:
    elastic, _, prompt = read()
    (stored, *_), _ = compressed(_variants(elastic, [0.75])["kv_keep", 0.75], prompt.layers)
    assert stored is not None
    assert stored.kept is not None
    keep = torch.arange(PROMPT)
    assert torch.equal(stored.kept[0], (keep < refree_kv.FIRST) | (keep >= PROMPT - (18 - refree_kv.FIRST)))


def test_layers_go_to_8_and_then_to_4_bits_until_the_share_is_reached() -> None:
    spec = load_model("smollm2_135m")
    at_8, at_4 = (spec.kv_bytes_per_token_layer_at(bits) / spec.kv_bytes_per_token_layer for bits in (8, 4))
    sizes = {16: 1.0, 8: at_8, 4: at_4}
    for factor in (0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.4, 0.3):
        bits = bits_of_layers(spec, factor)
        assert bits is not None
        assert len(bits) == spec.num_layers
        share = sum(sizes[width] for width in bits) / len(bits)
        assert share == pytest.approx(factor, abs=0.5 * (1 - at_8) / spec.num_layers + 1e-9)
        assert bits == sorted(bits)
    assert bits_of_layers(spec, 0.2) is None
    assert bits_of_layers(spec, at_4) == [4] * spec.num_layers


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_the_directions_of_a_model_are_those_of_its_own_keys_and_values(family: str) -> None:
    elastic, _, prompt = read(family)
    keys, values = lorc.key_and_value_directions(elastic.layers, elastic.spec)
    for layer, of_keys, of_values in zip(prompt.layers, keys, values, strict=True):
        # Nothing is lost in all directions but for rounding, which the shortcut for all of them would hide.
        wide = lorc.Directions(torch.cat((of_values.basis, of_values.basis[:, :1] * 0), 1), 0.0, of_values.bias)
        torch.testing.assert_close(lorc.truncated(layer.values, wide, of_values.count), layer.values)
        wide = lorc.Directions(torch.cat((of_keys.basis, of_keys.basis[:, :1] * 0), 1), 0.0, of_keys.bias)
        torch.testing.assert_close(lorc.truncated_keys(layer, wide, of_keys.count), layer.keys, rtol=1e-4, atol=1e-5)


def test_lorc_refuses_a_model_that_normalizes_its_keys() -> None:
    elastic = ElasticModel(tiny("qwen3"), name="tiny")
    with pytest.raises(ModelError, match="LoRC needs keys that are a product with a weight"):
        lorc.key_and_value_directions(elastic.layers, elastic.spec)


# --- The command and its page ----------------------------------------------------------------------------------------

SETTINGS = (
    "compression.prompt_tokens=24",
    "compression.scored_tokens=8",
    "compression.windows=3",
    "compression.calibration_windows=2",
    "compression.ada_queries=4",
    "compression.think_queries=4",
    "compression.factors=[0.9,0.6]",
)


def test_the_command_writes_losses_of_every_window_and_their_page(
    tmp_path: Path,
    score: Score,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hw.score.job.SCORES", tmp_path)
    out = tmp_path / "tiny.json"
    missing = score("kind=kv_compression", f"out={out}", *SETTINGS)
    assert "no tiny_one_shot.json in conf/score; run python -m hw.score kind=one_shot first" in missing.stderr
    write_json(tmp_path / "tiny_one_shot.json", {"order": ["FFN1", "MHA2", "MHA0", "MHA1"]})
    done = score("kind=kv_compression", f"out={out}", *SETTINGS)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    for row in figures["variants"]:
        for text, count in (("calibration", 2), ("test", 3)):
            assert len(row["nll"][text]) == len(row["share"][text]) == count
    found = {(one.method, one.factor): one for one in losses(figures)}
    assert found["dropped MHA blocks", 0.6].setting == "1 blocks"
    assert found["dropped MHA blocks", 0.6].share == pytest.approx(1 - 1 / CHECKPOINT_LAYERS)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    written = (tmp_path / "index.md").read_text(encoding="utf-8")
    assert written == page(figures)
    (tmp_path / "index.md").unlink()
    assert score("kind=kv_compression_page", f"out={out}").returncode == 0
    assert (tmp_path / "index.md").read_text(encoding="utf-8") == written


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("compression.factors=[0.6,0.9]", "list shares between 0 and 1 in descending order"),
        ("compression.factors=[1.0]", "list shares between 0 and 1 in descending order"),
        ("compression.prompt_tokens=6", "a prompt needs at least 7 tokens"),
        ("compression.scored_tokens=0", "at least 1 must be scored"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(score: Score, setting: str, message: str) -> None:  # noqa: F811
    found = score("kind=kv_compression", *SETTINGS, setting)
    assert found.returncode == 2
    assert message in " ".join(found.stderr.split())


def figures_of(nll: dict[tuple[str, float | None], list[float]]) -> dict[str, Any]:
    rows = [
        {"method": method, "factor": factor, "setting": "", "nll": {"test": listed}, "share": {"test": [factor or 1.0]}}
        for (method, factor), listed in nll.items()
    ]
    return {"factors": [0.9, 0.6], "variants": rows}


def test_a_loss_is_the_mean_difference_over_windows_with_its_standard_error() -> None:
    figures = figures_of({("full", 1.0): [3.0, 5.0, 4.0], ("x", 0.9): [3.1, 5.3, 4.2]})
    (loss,) = losses(figures)
    assert loss.mean == pytest.approx(0.2)
    assert loss.error == pytest.approx(0.1 / math.sqrt(3))


def test_reach_ends_at_the_first_factor_beyond_the_ratio() -> None:
    figures = figures_of({("full", 1.0): [3.0], ("x", 0.9): [3.02], ("x", 0.6): [3.04], ("y", 0.9): [3.2]})
    assert reach(figures, 1.05) == {"x": 0.6, "y": None}
    assert reach(figures, 1.03) == {"x": 0.9, "y": None}


def test_better_ones_differ_by_more_than_both_standard_errors() -> None:
    figures = figures_of(
        {("full", 1.0): [3.0, 3.0], ("x", 0.9): [3.4, 3.6], ("y", 0.9): [3.3, 3.5], ("z", 0.9): [3.2, 3.2]}
    )
    assert better_than(losses(figures), "x") == ["0.9 z"]


def test_the_committed_page_is_what_the_committed_figures_give() -> None:
    figures = json.loads((QUALITIES / "kv_compression" / "smollm2_135m.json").read_text(encoding="utf-8"))
    assert page(figures) == (RESULTS / "kv_compression" / "index.md").read_text(encoding="utf-8")
