"""A transferred quality meets the published points, charges other blocks more, and says that it is an assumption."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sim.cost.quality as quality_module
from sim.cost.added_losses import AddedLosses
from sim.cost.model_spec import load_model
from sim.cost.plan import KVCompression, Plan, dense_plan, drop, with_mask
from sim.cost.quality import FittedQuality, PublishedQuality, TransferredQuality, load_quality
from sim.errors import CalibrationError

MODEL = load_model("llama2_7b")
DENSE = dense_plan(MODEL)
LAYERS = MODEL.num_layers


def transferred(name: str = "llama2_7b_transferred") -> TransferredQuality:
    found = load_quality(name)
    assert isinstance(found, TransferredQuality)
    return found


def profile() -> FittedQuality:
    found = load_quality("smollm2_135m")
    assert isinstance(found, FittedQuality)
    return found


def without(*, mha: list[int] | tuple[int, ...] = (), ffn: list[int] | tuple[int, ...] = ()) -> Plan:
    return with_mask(DENSE, drop(MODEL, mha=list(mha), ffn=list(ffn)))


def low(layers: int) -> Plan:
    return replace(DENSE, weight_bits=(4,) * layers + (16,) * (LAYERS - layers))


def test_every_published_mask_costs_what_was_published() -> None:
    quality = transferred()
    assert quality.perplexity(DENSE) == pytest.approx(5.472)
    assert len(quality.points) == 3
    for point in quality.points:
        assert quality.perplexity(without(mha=point.drop_mha, ffn=point.drop_ffn)) == pytest.approx(point.perplexity)
        assert quality.in_range(without(mha=point.drop_mha, ffn=point.drop_ffn))


def test_fewer_blocks_than_any_mask_follow_the_exponent_of_the_published_masks() -> None:
    quality = transferred()
    attention, feed_forward = 4 * 4096 * 4096, 3 * 4096 * 11008  # parameters of the two kinds, but for their norms
    share = 4 * attention / (9 * attention + 4 * feed_forward)  # of the mask of RAP's 80 %: 9 MHA and 4 FFN
    _, exponent = quality.power_law()
    by_hand = math.log(9.02 / 5.472) * share**exponent
    four = without(mha=[25, 27, 24, 23])
    assert quality.nll(four) - quality.nll(DENSE) == pytest.approx(by_hand, rel=1e-3)


def test_an_unpublished_block_costs_more_by_the_loss_of_its_counterpart() -> None:
    quality, ours = transferred(), profile()
    # The middle of layer 2 of 32 is at 2.5 / 32, between the middles of layers 1 and 2 of 30: (2.5 / 32) x 30 - 0.5.
    at = 2.5 / 32 * 30 - 0.5
    single = ours.root[0::2] ** 2
    cost = single[1] + (at - 1) * (single[2] - single[1])
    dropped = sorted({layer for point in quality.points for layer in point.drop_mha})
    usual = np.median(np.interp((np.array(dropped) + 0.5) / 32, (np.arange(30) + 0.5) / 30, single))
    assert quality.factors[2 * 2] == pytest.approx(cost / usual)
    assert quality.factors[2 * 2] > 2.0
    assert quality.nll(without(mha=[2])) > 2.0 * (quality.nll(without(mha=[25])) - math.log(5.472)) + math.log(5.472)


def test_no_other_choice_of_as_many_blocks_costs_less_than_the_published_one() -> None:
    quality, rng = transferred(), np.random.default_rng(0)
    for point in quality.points:
        for _ in range(50):
            mha = rng.permutation(LAYERS)[: len(point.drop_mha)].tolist()
            ffn = rng.permutation(LAYERS)[: len(point.drop_ffn)].tolist()
            assert quality.perplexity(without(mha=mha, ffn=ffn)) >= point.perplexity * (1 - 1e-9)


def test_dropping_more_never_helps_and_beyond_the_published_masks_it_costs_a_random_guess() -> None:
    quality, rng = transferred(), np.random.default_rng(1)
    before, mha, ffn = quality.nll(DENSE), [], []
    for block in rng.permutation(2 * LAYERS).tolist():
        (mha if block % 2 else ffn).append(block // 2)
        now = quality.nll(without(mha=mha, ffn=ffn))
        assert now >= before
        before = now
    assert before == pytest.approx(math.log(MODEL.vocab_size))
    # One block alone may lie beyond them: nothing published says that a model survives it.
    assert quality.nll(without(mha=[0, 1], ffn=[0, 31])) == pytest.approx(math.log(MODEL.vocab_size))


def test_w4_costs_what_was_published_or_what_was_measured_on_the_small_model_at_the_same_share() -> None:
    published, measured, ours = transferred(), transferred("llama2_7b_transferred_w4"), profile()
    assert published.nll(low(32)) - published.nll(DENSE) == pytest.approx(math.log(5.6 / 5.472))
    small = load_model("smollm2_135m")
    for share in (0.2, 0.5, 1.0):
        plan = replace(dense_plan(small), weight_bits=(4,) * int(30 * share) + (16,) * (30 - int(30 * share)))
        assert ours.w4_loss(share) == pytest.approx(ours.nll(plan) - ours.dense_nll)
    for layers in (0, 16, 32):
        assert measured.nll(low(layers)) - measured.nll(DENSE) == pytest.approx(ours.w4_loss(layers / 32))
    both = replace(without(mha=[25]), weight_bits=low(16).weight_bits)
    parts = measured.nll(without(mha=[25])) + measured.nll(low(16)) - measured.nll(DENSE)
    assert measured.nll(both) == pytest.approx(parts)


def held_out(name: str) -> tuple[float, float, bool]:
    """Return the published and the predicted perplexity of a mask that was left out, and whether it is in range."""
    published = load_quality("llama2_7b_published")
    assert isinstance(published, PublishedQuality)
    left_out = next(point for point in published.points if name in point.source)
    rest = replace(published, points=tuple(point for point in published.points if point is not left_out))
    quality, plan = TransferredQuality.of(rest, profile()), without(mha=left_out.drop_mha, ffn=left_out.drop_ffn)
    return left_out.perplexity, quality.perplexity(plan), quality.in_range(plan)


def test_a_published_mask_that_is_left_out_is_predicted_as_the_page_states() -> None:
    published, predicted, known = held_out("RAP, 80 %")  # the other two drop all of its blocks but one
    assert known
    assert predicted == pytest.approx(published, rel=0.01)
    published, predicted, known = held_out("BlockPruner")
    assert known
    assert predicted / published == pytest.approx(1.23, abs=0.01)
    _, predicted, known = held_out("RAP, 60 %")  # the largest: nothing that is left is as large
    assert not known
    assert predicted == pytest.approx(MODEL.vocab_size)


def test_it_says_that_it_is_an_assumption() -> None:
    assert "assumed, not measured" in transferred().summary()
    assert "the loss of W4 is assumed to be that of smollm2_135m" in transferred("llama2_7b_transferred_w4").summary()


def test_it_says_whether_the_loss_of_quantized_kv_is_known() -> None:
    known = transferred()
    assert "what KV at 8 and 4 bits costs is assumed to be that of smollm2_135m" in known.summary()
    assert "what layers cost in which prompts only write KV is not known" in known.summary()
    assert "what KV at 8 and 4 bits costs is not known" in replace(known, added=AddedLosses()).summary()


def test_compressed_kv_costs_what_it_costs_the_measured_model_at_the_same_share_of_its_bytes() -> None:
    known, theirs, small = transferred(), profile(), dense_plan(load_model("smollm2_135m"))
    for method, percent in (("ada_kv", 70), ("think", 80), ("lorc", 85)):
        held = KVCompression(method=method, percent=percent)
        ours = known.nll(replace(DENSE, kv_compression=held)) - known.nll(DENSE)
        assert ours == pytest.approx(theirs.loss(replace(small, kv_compression=held)))
        assert ours > 0.0
    with pytest.raises(CalibrationError, match="ada_kv to 20 %"):
        known.nll(replace(DENSE, kv_compression=KVCompression(method="ada_kv", percent=20)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{published: llama2_7b_published, profil: smollm2_135m}", "no key 'profil'.*profile"),
        ("{published: llama2_7b_published}", "profile is None; it must name a measured table"),
        (
            "{published: smollm2_135m, profile: smollm2_135m}",
            "published is 'smollm2_135m'; it must name a file",
        ),
        ("{published: llama2_7b_published, profile: llama3_8b_published}", "profile is 'llama3_8b_published'"),
        ("{published: llama2_7b_transferred, profile: smollm2_135m}", "published is 'llama2_7b_transferred'"),
        ("{published: llama2_7b_published, profile: smollm2_135m, w4: llama3_8b_published}", "w4 is 'llama3_8b_publ"),
        ("{published: llama3_8b_published, profile: smollm2_135m}", "no pruned llama3_8b has a published perplexity"),
    ],
)
def test_a_file_that_names_the_wrong_sources_is_refused(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in quality_module.QUALITIES.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(quality_module, "QUALITIES", tmp_path)
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(CalibrationError, match=message):
        load_quality("mine")


def test_a_file_that_names_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_module, "QUALITIES", tmp_path)
    (tmp_path / "mine.yaml").write_text("{published: mine, profile: mine}", encoding="utf-8")
    with pytest.raises(CalibrationError, match="must name a file of published points"):
        load_quality("mine")


def test_the_loss_of_w4_can_be_that_of_another_published_model_whatever_it_was_before() -> None:
    other = load_quality("llama3_8b_published")
    assert isinstance(other, PublishedQuality)
    for name in ("llama2_7b_published", "llama2_7b_transferred", "llama2_7b_transferred_w4"):
        ours = load_quality(name)
        assert isinstance(ours, PublishedQuality)
        quality = ours.with_w4_of(other)
        assert quality.nll(low(32)) - quality.nll(DENSE) == pytest.approx(math.log(6.53 / 6.14))
        assert quality.nll(without(mha=[2])) == ours.nll(without(mha=[2]))
