"""The comparison with Transformers' own engines: the same tokens, and a row for each batch and engine."""

from __future__ import annotations

import argparse

import pytest

torch = pytest.importorskip("torch", reason="the real engine needs torch: pip install -e '.[hw]'")

from hw.validate.transformers_engines import CONTINUOUS, ENGINES, GENERATE, OURS, compare  # noqa: E402
from tests.bench.bench_transformers import section, with_section  # noqa: E402
from tests.hw.tiny_models import tiny  # noqa: E402


def test_all_engines_give_the_tokens_of_generate_and_one_row_for_each_batch() -> None:
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = compare(model, "cpu", batches=(1, 3), prompt_tokens=9, output_tokens=4, rounds=1)
    assert [(row.batch, row.engine) for row in rows] == [(batch, name) for batch in (1, 3) for name in ENGINES]
    assert {row.same_tokens for row in rows} == {1.0}
    for row in rows:
        assert row.tokens_per_s > 0
        assert row.ttft_ms > 0
        assert row.tpot_ms > 0
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    args = argparse.Namespace(
        checkpoint="tiny", dtype="float32", device="cpu", prompt_tokens=9, output_tokens=4, rounds=1
    )
    text = section(rows, args, "a CPU")
    assert text.count("\n| 3 |") == 3
    page = "# On a GPU\n\nText.\n\n## Against Transformers\n\nold\n\n## After\n\nmore\n"
    assert with_section(page, text) == f"# On a GPU\n\nText.\n\n{text}\n## After\n\nmore\n"
    assert with_section(with_section("", text), text) == text


def test_some_engines_alone_can_be_compared() -> None:
    rows = compare(
        tiny("gemma3"), "cpu", batches=(2,), prompt_tokens=5, output_tokens=3, rounds=1, engines=(OURS, GENERATE)
    )
    assert [row.engine for row in rows] == [OURS, GENERATE]
    assert rows[0].same_tokens == 1.0
    assert CONTINUOUS not in {row.engine for row in rows}
