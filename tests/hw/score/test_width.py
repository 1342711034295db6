"""FFN blocks cut to some channels: equal to a plain mask, scores by their definition, and predicted losses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")
pytest.importorskip("transformers", reason="the real model needs transformers: pip install -e '.[hw]'")

from hw.elastic.channel_scores import channel_scores, down_projection  # noqa: E402
from hw.elastic.model import ElasticModel  # noqa: E402
from hw.score.ffn_slices import FFNSlice, ffn_slice, sliced  # noqa: E402
from hw.score.width import Slicer, cut, cut_bytes, fit_width, rivals, width_variants  # noqa: E402
from hw.score.width_page import best, beyond, levels, losses, page  # noqa: E402
from sim.cost.ffn_width import FFN_WIDTHS, ffn_channels  # noqa: E402
from sim.cost.memory import ffn_weight_bytes, weight_bytes  # noqa: E402
from sim.cost.model_spec import load_model  # noqa: E402
from sim.cost.plan import dense_plan  # noqa: E402
from sim.cost.quality import QUALITIES  # noqa: E402
from sim.errors import PlanError  # noqa: E402
from sim.json_file import read_json_object  # noqa: E402
from sim.paths import RESULTS  # noqa: E402
from sim.results.run_folder import write_json  # noqa: E402
from tests.hw.elastic.test_model import some_tokens  # noqa: E402
from tests.hw.score.test_score import LAYERS as CHECKPOINT_LAYERS  # noqa: E402
from tests.hw.score.test_score import Score, checkpoint, score  # noqa: E402, F401
from tests.hw.tiny_models import LAYERS, few_channels, tiny  # noqa: E402, F401 - a fixture

SPEC = load_model("smollm2_135m")
ORDERS = {"forward": list(range(30)), "backward": list(range(30))[::-1]}


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


def test_a_width_that_is_not_one_is_refused() -> None:
    with pytest.raises(PlanError, match="an FFN width is 4 eighths; allowed are 8, 7, 6, 5"):
        ffn_channels(1536, 4)


# --- Bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "opt", "phi3"])
@pytest.mark.parametrize("width", [8, 7, 5])
@pytest.mark.usefixtures("few_channels")
def test_freed_bytes_are_those_of_the_tensors_that_a_slice_lacks(family: str, width: int) -> None:
    elastic = ElasticModel(tiny(family), name="tiny")
    scores = channel_scores(elastic, torch.tensor([some_tokens(18, seed=1)]))

    def stored() -> int:
        linears = elastic.blocks["ffn"][1].linears
        return sum(x.weight.nbytes + (0 if x.bias is None else x.bias.nbytes) for x in linears)

    full = stored()
    with sliced(elastic, 1, ffn_slice(elastic, scores, 1, width) if width < 8 else None):
        assert full - stored() == cut_bytes(elastic.spec, width)
    assert (cut_bytes(elastic.spec, width) > 0) == (width < 8)


def test_a_cut_whose_channels_round_up_to_all_frees_nothing() -> None:
    assert cut_bytes(replace(SPEC, intermediate_size=64), 5) == 0
    assert cut_bytes(replace(SPEC, intermediate_size=128), 5) == 0
    assert cut_bytes(replace(SPEC, intermediate_size=192), 5) > 0


def test_a_variant_frees_what_its_layers_free() -> None:
    variant = cut(SPEC, "width", "", {3: 7, 20: 5})
    assert variant.widths == (*(8,) * 3, 7, *(8,) * 16, 5, *(8,) * 9)
    assert variant.freed == cut_bytes(SPEC, 7) + cut_bytes(SPEC, 5)


def test_rivals_are_the_fewest_blocks_and_layers_that_free_as_much() -> None:
    level = 5 * ffn_weight_bytes(SPEC) - 1
    found = rivals(SPEC, [level, 1], ORDERS)
    dense = weight_bytes(SPEC, dense_plan(SPEC))
    for variant in found:
        assert variant.freed == dense - weight_bytes(SPEC, variant.plan)
    blocks = [one for one in found if one.kind == "dropped FFN"]
    assert [one.freed // ffn_weight_bytes(SPEC) for one in blocks] == [1, 1, 5, 5]
    assert [one.plan.decode.ffn.index(False) for one in blocks] == [0, 29, 0, 25]
    bits = [one for one in found if one.kind == "4 bits"]
    assert bits[0].plan.weight_bits.count(4) == 1
    fewest = bits[1].plan.weight_bits.count(4)
    assert bits[1].freed >= level > bits[1].freed * (fewest - 1) / fewest


def test_every_way_frees_at_least_the_bytes_of_every_width() -> None:
    variants = width_variants(SPEC, [1.0] * 30, [10, 20], ORDERS, mixed=3, seed=0)
    most = max(one.freed for one in variants if one.kind == "width")
    for kind in ("dropped FFN", "4 bits"):
        assert max(one.freed for one in variants if one.kind == kind) >= most
    assert len({one.widths for one in variants if one.kind == "mixed"}) == 3
    assert [one.setting for one in variants if one.random] == ["7/8, all", "6/8, all", "5/8, all"]


def test_layers_are_cut_by_their_loss_alone_first() -> None:
    alone = [5.0, 1.0, 3.0] + [9.0] * 27
    variants = width_variants(SPEC, alone, [2], ORDERS, mixed=1, seed=0)
    first = next(one for one in variants if one.setting == "7/8, least loss first")
    assert [layer for layer, width in enumerate(first.widths) if width == 7] == [1, 2]


@pytest.mark.usefixtures("few_channels")
def test_slices_are_made_once_and_random_ones_are_other_channels() -> None:
    elastic = ElasticModel(tiny(), name="tiny")
    slicer = Slicer(elastic, channel_scores(elastic, torch.tensor([some_tokens(18, seed=1)])), seed=0)
    important = slicer(cut(elastic.spec, "width", "", {1: 5, 2: 7}))
    assert set(important) == {1, 2}
    assert slicer(cut(elastic.spec, "width", "", {1: 5}))[1] is important[1]
    drawn = slicer(replace(cut(elastic.spec, "width", "", {1: 5}), random=True))[1]
    assert len(drawn.channels) == len(important[1].channels)
    assert not torch.equal(drawn.channels, important[1].channels)


# --- Predicted losses ------------------------------------------------------------------------------------------------


def row(kind: str, widths: tuple[int, ...], loss: float, setting: str = "", freed: int = 0) -> dict[str, Any]:
    """Return a row of the file that loses this much on both texts, in two windows that differ by 2."""
    nll = [2.0 + loss, 4.0 + loss]
    return {
        "kind": kind,
        "setting": setting,
        "widths": list(widths),
        "freed_bytes": freed,
        "nll": {"test": nll, "calibration": nll},
    }


def test_a_fit_finds_the_costs_of_layers_whose_losses_add_up() -> None:
    alone, factors = [0.4, 0.0, 0.1], {7: 0.25, 6: 0.5, 5: 1.5}
    rows = [row("dense", (8, 8, 8), 0.0)]
    rows += [
        row("one layer", tuple(5 if i == layer else 8 for i in range(3)), loss) for layer, loss in enumerate(alone)
    ]
    for width, factor in factors.items():
        rows.append(row("width", (width,) * 3, 0.5 * factor))
        rows.append(row("width", (width, 8, 8), 0.4 * factor))
    rows.append(row("mixed", (7, 6, 5), 0.4 * 0.25 + 0.1 * 1.5 + 0.03))
    found = fit_width(rows, "test")
    for width, factor in factors.items():
        assert found["factors"][str(width)] == pytest.approx(factor)
        assert found[str(width)] == pytest.approx([loss * factor for loss in alone])
    assert found["errors"]["count"] == 1
    assert found["errors"]["mean_error"] == found["errors"]["worst_error"] == pytest.approx(0.03)


def test_a_narrower_width_never_costs_less_and_a_gain_costs_nothing() -> None:
    rows = [row("dense", (8, 8), 0.0), row("one layer", (5, 8), 0.2), row("one layer", (8, 5), -0.1)]
    rows += [row("width", (7, 7), 0.3), row("width", (6, 6), 0.1), row("width", (5, 5), 0.2)]
    rows.append(row("mixed", (8, 8), 0.0))
    found = fit_width(rows, "calibration")
    assert found["7"] == found["6"] == found["5"] == pytest.approx([0.3, 0.0])


def test_of_layers_that_all_lose_nothing_each_costs_the_same() -> None:
    rows = [row("dense", (8, 8), 0.0), row("one layer", (5, 8), -0.2), row("one layer", (8, 5), 0.0)]
    rows += [row("width", (width, width), 0.1) for width in (7, 6, 5)]
    rows.append(row("mixed", (8, 8), 0.0))
    assert fit_width(rows, "test")["5"] == pytest.approx([0.05, 0.05])


# --- The command and its page ----------------------------------------------------------------------------------------


def test_a_loss_is_the_mean_difference_over_windows_with_its_standard_error() -> None:
    first, second = row("dense", (8,), 0.0), row("width", (7,), 0.0)
    second["nll"]["test"] = [2.1, 4.3]
    (loss,) = losses({"variants": [first, second]})
    assert loss.mean == pytest.approx(0.2)
    assert loss.error == pytest.approx(0.1 * math.sqrt(2) / math.sqrt(2))


def test_at_equal_bytes_the_least_loss_on_calibration_text_is_chosen() -> None:
    variants = [
        row("dense", (8,), 0.0),
        row("width", (7,), 0.3, "a", 1000),
        row("width", (6,), 0.2, "b", 1004),
        row("width", (5,), 0.1, "c", 2000),
        row("dropped FFN", (8,), 0.6, "few", 900),
        row("dropped FFN", (8,), 0.5, "enough", 1200),
        row("dropped FFN", (8,), 0.1, "more", 3000),
    ]
    variants[1]["nll"]["calibration"] = [2.0, 4.0]  # better there than its loss of 0.3 on test text
    listed = losses({"variants": variants})
    assert levels(listed) == [1000, 2000]
    assert [one.setting for level in (1000, 2000) if (one := best(listed, "width", level))] == ["a", "c"]
    assert [one.setting for level in (1000, 2000) if (one := best(listed, "dropped FFN", level))] == ["enough", "more"]
    assert best(listed, "4 bits", 1000) is None
    a, b = listed[0], listed[1]
    assert beyond(b, a)
    assert not beyond(a, b)


def test_the_committed_page_is_what_the_committed_figures_give() -> None:
    figures = read_json_object(QUALITIES / "ffn_width" / "smollm2_135m.json", ValueError, "")
    assert page(figures) == (RESULTS / "width" / "index.md").read_text(encoding="utf-8")


def test_the_committed_fits_are_those_of_the_committed_losses() -> None:
    figures = read_json_object(QUALITIES / "ffn_width" / "smollm2_135m.json", ValueError, "")
    for text in ("calibration", "test"):
        assert fit_width(figures["variants"], text) == figures["fits"][text]


SETTINGS = ("width.tokens=80", "width.layers=[1]", "width.mixed=2")


def test_the_command_writes_losses_of_every_window_and_their_page(
    tmp_path: Path,
    score: Score,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hw.score.job.SCORES", tmp_path)
    monkeypatch.setattr("sim.cost.ffn_width.CHANNEL_MULTIPLE", 8)
    out = tmp_path / "tiny.json"
    missing = score("kind=width", f"out={out}", *SETTINGS)
    assert "no tiny_one_shot.json in conf/score; run python -m hw.score kind=one_shot first" in missing.stderr
    for kind in ("one_shot", "gsi"):
        write_json(tmp_path / f"tiny_{kind}.json", {"order": ["FFN1", "MHA2", "FFN0", "FFN2", "MHA0", "MHA1"]})
    done = score("kind=width", f"out={out}", *SETTINGS)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    kinds = [one["kind"] for one in figures["variants"]]
    assert kinds.count("one layer") == CHECKPOINT_LAYERS
    assert {"width", "dropped FFN", "4 bits", "mixed", "random channels"} < set(kinds)
    for one in figures["variants"]:
        assert [len(one["nll"][text]) for text in ("calibration", "test")] == [3, 3]
    for text in ("calibration", "test"):
        assert [len(figures["fits"][text][width]) for width in ("7", "6", "5")] == [CHECKPOINT_LAYERS] * 3
        assert [figures["channels"][str(width)] for width in FFN_WIDTHS] == sorted(figures["channels"].values())[::-1]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    written = (tmp_path / "index.md").read_text(encoding="utf-8")
    assert written == page(figures)
    (tmp_path / "index.md").unlink()
    assert score("kind=width_page", f"out={out}").returncode == 0
    assert (tmp_path / "index.md").read_text(encoding="utf-8") == written


@pytest.mark.parametrize("setting", ["width.layers=[2,1]", "width.layers=[0]", f"width.layers=[{CHECKPOINT_LAYERS}]"])
def test_settings_that_cannot_be_measured_are_refused(score: Score, setting: str) -> None:  # noqa: F811
    found = score("kind=width", *SETTINGS, setting)
    assert found.returncode == 2
    assert f"list numbers from 1 to {CHECKPOINT_LAYERS - 1} in ascending order" in " ".join(found.stderr.split())


def test_no_plan_that_judges_the_predictions_is_refused(score: Score) -> None:  # noqa: F811
    found = score("kind=width", *SETTINGS, "width.mixed=0")
    assert found.returncode == 2
    assert "at least 1 plan with mixed widths" in " ".join(found.stderr.split())
