"""Tokens of the real engine when every operation is a Triton kernel, in triton's interpreter on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")
pytest.importorskip("triton", reason="triton has wheels for Linux on x86_64 alone: pip install -e '.[dev]' there")

from hw.elastic import ops
from hw.elastic.kernels.launch import INTERPRETED, LAUNCHES
from sim.cost.plan import KVKeep, dense_plan, drop
from tests.hw.engine.runs import plain_tokens, serve
from tests.hw.serving import engine_config, hw_engine, tiny_spec
from tests.hw.tiny_models import FAMILIES, SHORT_TOKENS
from tests.sample import quick

ROWS = [(0.0, 11, 2), (0.4, 26, 4)]
"""Arrival, prompt and output tokens: a chunk with a prefix, full windows and rings, a decode with a chunk."""
FIRST = ("llama", "gemma3")

pytestmark = pytest.mark.skipif(not INTERPRETED.value, reason="needs triton's interpreter: set TRITON_INTERPRET=1")


@pytest.mark.parametrize("family", quick([*FIRST, *sorted({*FAMILIES} - {*FIRST})], len(FIRST)))
def test_in_fp32_tokens_are_those_of_generate(family: str) -> None:
    before, config = LAUNCHES.copy(), engine_config(max_context_tokens=SHORT_TOKENS)
    with ops.use_kernels():
        assert serve(hw_engine(family=family, config=config), ROWS) == plain_tokens(family, ROWS)
    assert {"_decode_kernel", "_prefill_kernel", "_rope_and_store_kernel"} <= set(LAUNCHES - before)


@pytest.mark.parametrize("family", quick(FIRST, 1))
def test_precision_kept_tokens_and_dropped_blocks_give_the_tokens_of_the_plain_operations(family: str) -> None:
    spec = tiny_spec()
    plan = replace(
        dense_plan(spec),
        weight_bits=(8, 16, 4, 4),
        kv_keep=(KVKeep(first_tokens=2, last_tokens=6), KVKeep(), KVKeep(first_tokens=0, last_tokens=3), KVKeep()),
        prefill=drop(spec, ffn=[3]),
        decode=drop(spec, mha=[2], ffn=[1, 3]),
    )
    expected = serve(hw_engine(family=family, plan=plan), ROWS)
    before = LAUNCHES.copy()
    with ops.use_kernels():
        assert serve(hw_engine(family=family, plan=plan), ROWS) == expected
    assert {"_row_kernel", "_tile_kernel"} <= set(LAUNCHES - before)


@pytest.mark.parametrize("family", quick(FIRST, 1))
def test_prompts_that_only_write_kv_give_the_tokens_of_the_plain_operations(family: str) -> None:
    spec = tiny_spec()
    plan = replace(dense_plan(spec), kv_only=tuple(layer != 1 for layer in range(spec.num_layers)))
    expected = serve(hw_engine(family=family, plan=plan), ROWS)
    with ops.use_kernels():
        assert serve(hw_engine(family=family, plan=plan), ROWS) == expected
