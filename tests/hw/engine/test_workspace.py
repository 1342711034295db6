"""What a pass takes for a moment at the shapes of large models, and the smaller batches where it is too much."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="the real engine needs torch: pip install -e '.[hw]'")
pytest.importorskip("triton", reason="triton has wheels for Linux on x86_64 alone: pip install -e '.[dev]' there")

from hw.elastic.attention import Kernels, Sdpa  # noqa: E402
from hw.elastic.attention_packages import FlashInfer  # noqa: E402
from hw.engine.workspace import fit_batches, needed_bytes  # noqa: E402
from sim.cost.memory import LOGIT_BYTES, logit_rows, pass_bytes  # noqa: E402
from sim.cost.model_spec import load_model  # noqa: E402
from sim.engine.protocol import EngineConfig  # noqa: E402
from sim.engine.scheduler import Limits  # noqa: E402
from tests.bench.count_operations import count  # noqa: E402
from tests.hw.engine.test_graphs import engine_on  # noqa: E402
from tests.hw.fake_cuda import FakeCuda  # noqa: E402

SPEC = load_model("llama2_7b")
CONFIG = EngineConfig(scheduler="chunked", limits=Limits(max_batch_tokens=8192, max_running=64), kv_block_tokens=16)


@pytest.mark.parametrize(("requests", "context"), [(8, 300), (4, 2000), (64, 40)])
@pytest.mark.parametrize("bits", [16, 4])
def test_a_pass_of_llama_2_7b_takes_what_is_stated(bits: int, requests: int, context: int) -> None:
    prefill, decode = count("llama2_7b", bits, requests=requests, context=context)
    for seen, tokens in ((prefill, requests * context), (decode, requests)):
        staged = 2 << 20  # the arrays of the iteration
        stated = pass_bytes(SPEC, tokens, requests) + Kernels().scratch_bytes(SPEC, requests, context)
        assert seen.peak_bytes <= stated + staged
    stated = pass_bytes(SPEC, requests * context, requests)
    assert stated < 1.1 * prefill.peak_bytes


def test_sampling_takes_more_and_logits_of_many_sequences_no_more_than_a_part() -> None:
    assert pass_bytes(SPEC, 64, 64, sampled=True) > pass_bytes(SPEC, 64, 64)
    wide = load_model("llama3.1_8b")
    assert logit_rows(wide) * wide.vocab_size * 2 <= LOGIT_BYTES
    assert pass_bytes(wide, 1000, 1000) == pass_bytes(wide, 1000, logit_rows(wide))


def test_batches_that_fit_stay_as_they_are() -> None:
    assert fit_batches(SPEC, CONFIG, Kernels(), 1 << 30) == (CONFIG, None)


@pytest.mark.parametrize("workspace_bytes", [200 << 20, 400 << 20])
def test_batches_that_do_not_fit_become_as_large_as_they_can(workspace_bytes: int) -> None:
    fitted, problem = fit_batches(SPEC, CONFIG, Kernels(), workspace_bytes)
    tokens = fitted.limits.max_batch_tokens
    assert CONFIG.limits.max_running < tokens < 8192
    assert needed_bytes(SPEC, CONFIG, Kernels(), tokens) <= workspace_bytes
    assert needed_bytes(SPEC, CONFIG, Kernels(), tokens + 1) > workspace_bytes
    assert replace(fitted, limits=replace(fitted.limits, max_batch_tokens=8192)) == CONFIG
    assert problem is not None
    assert f"engine.limits.max_batch_tokens={tokens}" in problem
    assert f"workspace_bytes={needed_bytes(SPEC, CONFIG, Kernels(), 8192)}" in problem
    assert "\n" not in problem


def test_where_smaller_chunks_do_not_help_the_batch_stays_and_the_message_says_how_much_is_needed() -> None:
    for config in (CONFIG, replace(CONFIG, scheduler="prefill_first")):
        fitted, problem = fit_batches(SPEC, config, Kernels(), 1 << 20)
        assert fitted == config
        assert problem is not None
        assert f"set workspace_bytes={needed_bytes(SPEC, config, Kernels(), 8192)}" in problem


def test_each_way_of_attention_states_what_it_takes() -> None:
    kernels, sdpa = (way.scratch_bytes(SPEC, 64, 8192) for way in (Kernels(), Sdpa()))
    assert kernels < 32 << 20
    assert sdpa > 256 << 20
    assert FlashInfer(None, torch.device("cpu")).scratch_bytes(SPEC, 64, 8192) > 128 << 20


def test_an_engine_on_a_gpu_with_too_little_workspace_says_so_and_computes_fewer_tokens_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import hw.engine.hw_engine as hw_engine
    import tests.hw.engine.test_graphs as test_graphs
    from sim.engine.protocol import Request

    monkeypatch.setattr(hw_engine, "find_attention", lambda *_, **__: Kernels())
    monkeypatch.setattr(Kernels, "scratch_bytes", lambda *_: 0)
    monkeypatch.setattr(test_graphs, "WORKSPACE_BYTES", 25_000)
    with FakeCuda() as device:
        engine = engine_on(device)
        limit = engine.config.limits.max_batch_tokens
        assert 6 < limit < 24
        assert engine.notes[0] in capsys.readouterr().err
        device.limits.clear()  # the fake counts tensors of the host too
        device.limit = lambda _most: None  # type: ignore[method-assign]
        engine.submit([Request(request_id=i, arrival_s=0.0, prompt_tokens=40, output_tokens=3) for i in range(4)])
        engine.run_until(1e9)
    assert max(shape.prefill_tokens + shape.decode_batch for shape in engine.shapes()) == limit
