"""Scores against plain algorithms that share no code with them, on tiny random models."""

from __future__ import annotations

import copy
import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")
transformers = pytest.importorskip("transformers", reason="the real model needs transformers: pip install -e '.[hw]'")

from hw.elastic.kv import RequestKV  # noqa: E402
from hw.elastic.model import ElasticModel  # noqa: E402
from hw.elastic.text import IDS, TOKENIZER, differing, read_windows  # noqa: E402
from hw.score import candidate_states, loss_bound  # noqa: E402
from hw.score.block_numbers import (  # noqa: E402
    block_name,
    block_number,
    plan_without,
    random_order,
    staged_plan,
)
from hw.score.cosine import block_cosines  # noqa: E402
from hw.score.full_test import Agreement, agreement, chosen_plans, greedy_tokens, measure_chosen, spread  # noqa: E402
from hw.score.gsi import gsi, gsi_round_naive  # noqa: E402
from hw.score.job import SCORES  # noqa: E402
from hw.score.lis import layer_importance  # noqa: E402
from hw.score.nll import measure, measure_many, rounded, token_nll  # noqa: E402
from hw.score.one_shot import one_shot, single_removals  # noqa: E402
from hw.score.pdtrim import attention_mass, redundancy_order, redundancy_sets, two_stage_search  # noqa: E402
from hw.score.quality_table import measure_table, table_plans  # noqa: E402
from hw.score.report import generation, scores_page, speed_of  # noqa: E402
from hw.score.run import main  # noqa: E402
from sim.cost.kv_loss import read_kv_loss  # noqa: E402
from sim.cost.plan import KVKeep, Plan, check_plan, dense_plan  # noqa: E402
from sim.cost.plan_json import plan_from_json, plan_to_json  # noqa: E402
from sim.cost.quality import QUALITIES, read_fitted  # noqa: E402
from sim.errors import ConfigError  # noqa: E402
from sim.paths import RESULTS  # noqa: E402
from sim.results.run_folder import write_json  # noqa: E402
from tests.commands import exit_status  # noqa: E402
from tests.sim.pages.test_render import cells  # noqa: E402

LAYERS, VOCABULARY = 3, 61


def tiny(seed: int = 0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=0,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def text(rows: int = 4, tokens: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


class Nothing(torch.nn.Module):
    """A block that was removed."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, hidden_states, **_):
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.pair else nothing


def plain_nll(model, windows: torch.Tensor, removed: set[int]) -> float:
    """Return the NLL per token of a plain model rebuilt without some blocks."""
    model = copy.deepcopy(model)
    for block in removed:
        setattr(model.model.layers[block // 2], "mlp" if block % 2 else "self_attn", Nothing(block % 2 == 0))
    with torch.inference_mode():
        logits = model(windows, use_cache=False).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def plain_gsi(model, windows: torch.Tensor) -> list[tuple[int, float]]:
    """GSI as RAP states it: every kept block removed in turn, every time on all tokens."""
    removed: list[int] = []
    found = []
    while len(removed) < 2 * LAYERS:
        candidates = [block for block in range(2 * LAYERS) if block not in removed]
        nll, block = min((plain_nll(model, windows, {*removed, block}), block) for block in candidates)
        removed.append(block)
        found.append((block, nll))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_gsi_finds_the_order_of_the_naive_algorithm(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_bound, "LIKELY_TOKENS", 8)
    monkeypatch.setattr(candidate_states, "BATCH_TOKENS", 48)  # two candidates a batch
    model, windows = tiny(seed), text(seed=seed)
    expected = plain_gsi(model, windows)
    rounds = gsi(ElasticModel(copy.deepcopy(model)), windows)
    assert [r.removed for r in rounds] == [block for block, _ in expected]
    assert [r.nll for r in rounds] == pytest.approx([nll for _, nll in expected], rel=1e-5)


def test_gsi_reports_for_an_abandoned_candidate_a_lower_bound_above_the_winner() -> None:
    model, windows = tiny(), text()
    first = gsi(ElasticModel(copy.deepcopy(model)), windows, removals=1)[0]
    assert first.abandoned
    for block, value in first.candidates.items():
        true = plain_nll(model, windows, {block})
        if block in first.abandoned:
            assert first.nll < value <= true * (1 + 1e-5)
        else:
            assert value == pytest.approx(true, rel=1e-5)


@pytest.mark.parametrize("cache_bytes", [0, 40_000])
def test_gsi_with_less_memory_for_hidden_states_finds_the_same_order(cache_bytes: int) -> None:
    model, windows = tiny(2), text(seed=2)
    roomy = gsi(ElasticModel(copy.deepcopy(model)), windows)
    tight = gsi(ElasticModel(copy.deepcopy(model)), windows, cache_bytes=cache_bytes)
    assert [(r.removed, r.nll) for r in tight] == [(r.removed, pytest.approx(r.nll)) for r in roomy]


def test_the_loss_bound_is_below_the_loss_and_close_if_models_are_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_bound, "LIKELY_TOKENS", 8)
    elastic, window = ElasticModel(tiny(1)), text(1)[0]
    with torch.inference_mode():
        hidden = torch.randn(1, len(window), 32, generator=torch.Generator().manual_seed(0))
        bounds = loss_bound.LossBound(elastic, elastic.head(hidden[:, :-1])[0], window)
        for change, closeness in ((0.0, 1e-3), (0.1, 0.05), (1.0, math.inf)):
            noise = torch.randn(5, *hidden.shape[1:], generator=torch.Generator().manual_seed(1))
            changed = hidden + change * noise
            loss = token_nll(elastic, changed, window.expand(5, -1)).double().sum(-1)
            gap = (loss - bounds.bound(changed)) / loss
            assert (gap > -1e-5).all()
            assert (gap < closeness).all()


def test_gsi_continues_from_a_checkpoint_to_the_same_order() -> None:
    model, windows = tiny(1), text(seed=1)
    complete = gsi(ElasticModel(copy.deepcopy(model)), windows)
    seen = []
    first = gsi(ElasticModel(copy.deepcopy(model)), windows, removals=2, on_round=lambda r: seen.append(len(r)))
    assert seen == [1, 2]
    rest = gsi(ElasticModel(copy.deepcopy(model)), windows, done=first)
    assert [(r.removed, r.nll) for r in rest] == [(r.removed, r.nll) for r in complete]


def test_the_naive_round_for_comparisons_of_speed_gives_the_losses_of_a_plain_model() -> None:
    model, windows = tiny(), text()
    found = gsi_round_naive(ElasticModel(copy.deepcopy(model)), windows, [3])
    assert found == pytest.approx({b: plain_nll(model, windows, {3, b}) for b in (0, 1, 2, 4, 5)}, rel=1e-5)


def test_one_shot_orders_blocks_by_the_loss_of_removing_each_alone() -> None:
    model, windows = tiny(), text()
    found = single_removals(ElasticModel(copy.deepcopy(model)), windows)
    expected = {block: plain_nll(model, windows, {block}) for block in range(2 * LAYERS)}
    assert found == pytest.approx(expected, rel=1e-5)
    assert one_shot(found) == sorted(expected, key=lambda block: expected[block])


def test_random_orders_are_permutations_and_follow_their_seed() -> None:
    assert sorted(random_order(60, 1)) == list(range(60))
    assert random_order(60, 1) == random_order(60, 1) != random_order(60, 2)


def test_the_names_of_blocks_read_back() -> None:
    assert [block_name(b) for b in (0, 1, 7)] == ["MHA0", "FFN0", "FFN3"]
    assert [block_number(block_name(b)) for b in range(20)] == list(range(20))
    with pytest.raises(ConfigError, match="names no block"):
        block_number("MLP3")


# --- The loss of plans -----------------------------------------------------------------------------------------------


def served_nll(elastic: ElasticModel, plan: Plan, window: torch.Tensor, prompt: int) -> float:
    """Return the mean NLL after the prompt, token by token with a KV cache, as a server computes it."""
    elastic.apply(plan)
    request, tokens = RequestKV(), window.tolist()
    logits = [elastic.forward([tokens[:prompt]], [request], "prefill")]
    elastic.end_prefill(request)
    logits += [elastic.forward([[token]], [request], "decode") for token in tokens[prompt:-1]]
    elastic.apply(dense_plan(elastic.spec))
    return float(torch.nn.functional.cross_entropy(torch.cat(logits), window[prompt:]))


def plans_of(spec) -> list[Plan]:
    dense = dense_plan(spec)
    keep = (KVKeep(first_tokens=2, last_tokens=3), KVKeep(), KVKeep(first_tokens=0, last_tokens=1))
    staged = staged_plan(spec, prefill={3}, decode={0, 3, 5})
    return [
        dense,
        plan_without(spec, {0, 3}),
        staged,
        replace(dense, kv_keep=keep),
        replace(staged, kv_keep=keep, weight_bits=(4, 16, 8)),
        replace(dense, kv_bits=(4, 16, 8)),
        replace(staged, kv_keep=keep, kv_bits=(8, 4, 4)),
    ]


@pytest.mark.parametrize("index", range(7))
def test_one_pass_gives_the_loss_that_serving_token_by_token_has(index: int) -> None:
    elastic = ElasticModel(tiny(3))
    window = text(1, 20, seed=9)[0]
    plan = plans_of(elastic.spec)[index]
    found = measure(elastic, plan, window[None], prompt_tokens=8)
    assert found.decode_tokens == 12
    # In both, prefill makes the first prediction after the prompt.
    assert found.decode_mean == pytest.approx(served_nll(elastic, plan, window, 8), rel=1e-4)


def test_many_plans_measured_at_once_have_the_loss_of_each_alone_bit_for_bit() -> None:
    elastic, windows = ElasticModel(tiny(3)), text(2, 20, seed=9)
    plans = [*plans_of(elastic.spec), dense_plan(elastic.spec)]
    assert measure_many(elastic, plans, windows) == [measure(elastic, plan, windows) for plan in plans]


def test_rounded_weights_are_restored_afterwards() -> None:
    elastic, window = ElasticModel(tiny()), text(1)
    before = measure(elastic, dense_plan(elastic.spec), window).total
    with rounded(elastic, (4, 4, 4)):
        assert measure(elastic, dense_plan(elastic.spec), window).total != before
    assert measure(elastic, dense_plan(elastic.spec), window).total == before


# --- Similarities ----------------------------------------------------------------------------------------------------


def test_cosines_are_those_of_the_hidden_states_of_the_plain_model() -> None:
    model, windows = tiny(), text()
    found = block_cosines(ElasticModel(copy.deepcopy(model)), windows)
    with torch.inference_mode():
        states = model(windows, output_hidden_states=True).hidden_states
    # transformers shows the states between layers, but not those between the two blocks of a layer.
    assert len(found) == 2 * LAYERS
    assert all(-1 <= value <= 1 for value in found.values())
    without_attention = copy.deepcopy(model)
    without_attention.model.layers[0].self_attn.o_proj.weight.data.zero_()
    assert block_cosines(ElasticModel(without_attention), windows)[0] == pytest.approx(1.0, abs=1e-6)
    without_attention.model.layers[1].self_attn.o_proj.weight.data.zero_()
    with torch.inference_mode():
        states = without_attention(windows, output_hidden_states=True).hidden_states
    expected = torch.nn.functional.cosine_similarity(states[1], states[2], dim=-1).mean()
    assert block_cosines(ElasticModel(without_attention), windows)[3] == pytest.approx(float(expected), rel=1e-5)


def test_the_redundant_blocks_are_those_at_the_threshold_or_above_it() -> None:
    assert redundancy_sets({0: 0.99, 1: 0.5, 2: 0.95, 3: 0.999}, 0.95) == ([3, 0, 2], [1])


def test_each_removal_of_the_redundancy_order_is_the_most_redundant_block_of_what_is_left() -> None:
    elastic, windows = ElasticModel(tiny()), text(2)
    order = redundancy_order(elastic, windows, 4)
    for count, block in enumerate(order):
        cosines = block_cosines(elastic, windows, removed=order[:count])
        assert cosines.keys() == set(range(2 * LAYERS)) - set(order[:count])
        assert cosines[block] == max(cosines.values())


@pytest.mark.parametrize("removals", [-1, 2 * LAYERS + 1])
def test_more_removals_than_blocks_are_refused(removals: int) -> None:
    elastic, windows = ElasticModel(tiny()), text(2)
    with pytest.raises(ConfigError, match=rf"pdtrim\.removals is {removals}; .* {2 * LAYERS} blocks"):
        redundancy_order(elastic, windows, removals)
    with pytest.raises(ConfigError, match=rf"gsi\.removals is {removals}; .* {2 * LAYERS} blocks"):
        gsi(elastic, windows, removals=removals)


@pytest.mark.parametrize("bits", [8, 4])
def test_lis_is_its_formula_and_orders_every_layer_once(bits: int) -> None:
    elastic, windows = ElasticModel(tiny()), text(2)
    found = layer_importance(elastic, windows, bits)
    assert sorted(found.order) == list(range(LAYERS))
    for layer in range(LAYERS):
        expected = 0.25 * found.lts[layer] + 0.25 * found.lrs[layer] + 0.5 * found.mds[layer]
        assert found.lis[layer] == pytest.approx(expected)
    # MDS of the first layer chosen: the logits of dense against those with that layer swapped.
    first = found.order[0]
    swapped = replace(dense_plan(elastic.spec), weight_bits=tuple(bits if i == first else 16 for i in range(LAYERS)))
    dense = elastic.forward(windows, all_logits=True)
    elastic.apply(swapped)
    cosine = torch.nn.functional.cosine_similarity(dense, elastic.forward(windows, all_logits=True), dim=-1).mean()
    assert found.mds[first] == pytest.approx(float(cosine), rel=1e-4)


def test_two_stage_sets_are_nested_and_no_worse_than_where_they_started() -> None:
    elastic, windows = ElasticModel(tiny()), text(2)
    found = two_stage_search(
        elastic,
        windows,
        [0, 2, 3, 4, 5],
        prefill_removals=1,
        decode_removals=3,
        steps=12,
        rng=np.random.default_rng(0),
    )
    assert set(found.prefill) <= set(found.decode) <= {0, 2, 3, 4, 5}
    assert (len(found.prefill), len(found.decode)) == (1, 3)
    assert found.nll <= found.start_nll
    with pytest.raises(ConfigError, match="prefill must drop no more"):
        two_stage_search(
            elastic, windows, [0], prefill_removals=2, decode_removals=1, steps=1, rng=np.random.default_rng(0)
        )


def test_attention_mass_is_the_share_of_the_plain_models_attention() -> None:
    model, windows = tiny(), text(2, 32)
    found = attention_mass(ElasticModel(copy.deepcopy(model)), windows, first_tokens=2, last_tokens=3)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        weights = model(windows, output_attentions=True).attentions
    for layer in range(LAYERS):
        shares = [
            float(row[: min(2, q - 2)].sum() + row[q - 2 : q + 1].sum())
            for window in weights[layer]
            for head in window
            for q, row in enumerate(head)
            if q >= 16
        ]
        assert found[layer] == pytest.approx(sum(shares) / len(shares), rel=1e-4)
    with pytest.raises(ConfigError, match="take longer windows"):
        attention_mass(ElasticModel(copy.deepcopy(model)), windows, first_tokens=8, last_tokens=8)


# --- The table and the command ---------------------------------------------------------------------------------------


def test_every_plan_of_the_table_is_legal_and_a_seed_gives_the_same_plans() -> None:
    spec = ElasticModel(tiny()).spec
    orders = {"gsi": random_order(6, 0), "one_shot": random_order(6, 1)}
    plans = list(table_plans(spec, orders, {"lis_w4": [2, 0, 1]}, seed=0))
    for _, plan in plans:
        check_plan(spec, plan)
    assert plans == list(table_plans(spec, orders, {"lis_w4": [2, 0, 1]}, seed=0))
    kinds = {kind for kind, _ in plans}
    assert {"dense", "single removal", "random mask", "kv_keep", "prefix of gsi"} <= kinds


# --- Full test text and greedy decoding ------------------------------------------------------------------------------


def test_greedy_decoding_of_a_plan_is_what_serving_it_produces() -> None:
    elastic, prompts = ElasticModel(tiny(3)), text(3, 8, seed=5)
    plan = plans_of(elastic.spec)[4]  # staged masks, cut KV and rounded weights together
    found = greedy_tokens(elastic, plan, prompts, 6)
    elastic.apply(plan)
    for row, prompt in enumerate(prompts.tolist()):
        request = RequestKV()
        logits = elastic.forward([prompt], [request], "prefill")
        elastic.end_prefill(request)
        for token in found[row].tolist():
            assert int(logits.argmax()) == token
            logits = elastic.forward([[token]], [request], "decode")
    elastic.apply(dense_plan(elastic.spec))


def test_agreement_counts_equal_places_and_the_tokens_before_the_first_that_differs() -> None:
    reference = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    found = torch.tensor([[1, 9, 3, 4], [5, 6, 7, 8]])
    assert agreement(reference, found) == Agreement(share=7 / 8, first=(1 + 4) / 2)


def test_plans_are_spread_evenly_over_the_losses_below_a_limit() -> None:
    losses = [0.5, 9.0, 0.1, 0.4, 0.2, 0.3]
    assert spread(losses, 3, 1.0) == [2, 5, 0]
    assert spread(losses, 10, 0.45) == [2, 4, 5, 3]


def test_chosen_plans_that_were_measured_are_not_measured_again_unless_they_changed() -> None:
    elastic, windows = ElasticModel(tiny()), text(2)
    orders = {name: random_order(6, seed) for seed, name in enumerate(("gsi", "one_shot", "cosine"))}
    plans = chosen_plans(elastic.spec, orders, {"lis_w4": [2, 0, 1]}, [([0, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 0])])
    assert plans[0] == ("dense", dense_plan(elastic.spec))
    seen = []
    rows = measure_chosen(elastic, windows, plans[:3], [], lambda found: seen.append(len(found)))
    assert seen == [1, 2, 3]
    assert rows[1]["nll"] == measure(elastic, plans[1][1], windows).mean
    changed = [plans[0], (plans[1][0], plans[2][1]), plans[2]]
    again = measure_chosen(elastic, windows, changed, rows, lambda found: seen.append(len(found)))
    assert seen[3:] == [2]
    assert [again[0], again[2]] == [rows[0], rows[2]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model, its tokenizer, and a text."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    tiny().save_pretrained(folder)
    rng = np.random.default_rng(0)
    rows = [" ".join(f"w{i}" for i in rng.integers(1, VOCABULARY, 40)) for _ in range(10)]
    (folder / "text.txt").write_text("\n\n".join(rows), encoding="utf-8")
    return folder


Score = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def score(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Score:
    """Return a function that runs the command in this process on the tiny checkpoint."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [f"model.path={checkpoint}", "model.name=tiny", "model.dtype=float32"]
        for which in ("calibration", "test"):
            command += [f"{which}.path={checkpoint / 'text.txt'}", f"{which}.tokens=120", f"{which}.window=40"]
        command += [f"hydra.run.dir={checkpoint / 'run'}", *arguments]
        return subprocess.CompletedProcess(command, exit_status(main, *command), *capsys.readouterr())

    return run


def test_an_interrupted_gsi_continues_and_states_what_it_was_measured_on(checkpoint: Path, score: Score) -> None:
    out = checkpoint / "gsi.json"
    first = score("kind=gsi", f"out={out}", "gsi.removals=2")
    assert first.returncode == 0, first.stderr
    assert len(json.loads(out.read_text())["order"]) == 2
    second = score("kind=gsi", f"out={out}", "gsi.compare_every=3")
    assert "continuing from round 2" in second.stderr
    found = json.loads(out.read_text())
    assert sorted(found["order"]) == sorted(block_name(b) for b in range(2 * LAYERS))
    assert [row["round"] for row in found["naive_rounds"]] == [4]
    assert all(row["naive_removes"] == row["exact_removes"] for row in found["naive_rounds"])
    assert {"model", "text", "seed", "seconds", "date", "commit", "source", "dtype"} <= set(found)
    other = score("kind=gsi", f"out={out}", "seed=7")
    assert other.returncode == 2
    assert "has the result of another run: seed differ" in other.stderr


def test_the_page_of_scores_shows_what_was_measured_and_lists_what_was_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tiny_gsi\.json in conf/score; run python -m hw\.score kind=gsi first"):
        scores_page("tiny", tmp_path, tmp_path)
    elastic, windows = ElasticModel(tiny(), name="tiny"), text()
    rounds = gsi(elastic, windows)
    order = [block_name(r.removed) for r in rounds]
    source = {"text": "text.txt", "tokens": 96, "window_tokens": 24, "windows": "all"}
    described = {"model": "tiny", "weights": "random", "dtype": "float32", "device": "cpu", "text": source}
    value = {**described, "naive_rounds": [], "order": order, "rounds": [r.to_json() for r in rounds]}
    write_json(tmp_path / "tiny_gsi.json", value)
    page = scores_page("tiny", tmp_path, tmp_path)
    assert " ".join(order) in page
    missing = ("table", "samples", "generation", "full_test")
    assert all(f"`python -m hw.score kind={kind}" in page for kind in missing)
    scores = tmp_path / "tiny.json"
    measure_table(
        elastic,
        windows[:1],
        windows[1:2],
        scores,
        {**described, "test_text": source},
        tmp_path,
        seed=0,
        say=lambda _: None,
    )
    page = scores_page("tiny", tmp_path, tmp_path)
    loss = measure(elastic, dense_plan(elastic.spec), windows[1:2]).mean
    assert f"{math.exp(loss):.2f}" in page
    plan = plan_without(elastic.spec, {block_number(name) for name in order[:4]})
    assert ["4", f"{math.exp(measure(elastic, plan, windows[1:2]).mean):.2f}"] in [row[:2] for row in cells(page)]


def test_the_page_of_scores_adds_up_what_was_timed_sampled_and_decoded(tmp_path: Path) -> None:
    source = {"text": "text.txt", "tokens": 96, "window_tokens": 24, "windows": "drawn with seed 0"}
    described = {"model": "tiny", "weights": "random", "dtype": "float32", "device": "cpu", "text": source}
    order = ["MHA0", "FFN1", "MHA1", "FFN0"]
    rounds = [
        {"removed": name, "nll": 4.0, "candidates": dict.fromkeys(order[i:], 4.0), "abandoned": [], "cpu_s": 1.0}
        for i, name in enumerate(order)
    ]
    naive = [
        {
            "round": number,
            "candidates": 5 - number,
            "naive_cpu_s": float((5 - number) * (6 - number)),  # falls evenly a candidate: the rounds between are known
            "exact_cpu_s": 1.0,
            "naive_removes": order[number - 1],
            "exact_removes": "FFN0" if number == 3 else order[number - 1],
            "naive_nll": 4.0,
            "naive_nll_of_exact": 4.0001 if number == 3 else 4.0,
        }
        for number in (1, 3, 4)
    ]
    write_json(
        tmp_path / "tiny_gsi.json",
        {**described, "order": order, "rounds": rounds, "naive_rounds": naive},
    )
    losses = {"gsi": (3.0, 3.2, 3.4), "one_shot": (4.0, 4.0, 4.0)}
    samples = [
        {"order": name, "sample": f"seed {seed}", "removals": 4, "drop": order, "nll": math.log(value)}
        for name, values in losses.items()
        for seed, value in enumerate(values)
    ]
    write_json(tmp_path / "tiny_samples.json", {**described, "rows": samples})
    plans = [
        {"loss": loss, "share_equal": share, "tokens_before_parting": 64 * share}
        for loss, share in ((0.01, 0.9), (0.05, 0.5), (0.06, 0.7), (0.9, 0.1))
    ]
    decoded = {"prompts": 8, "prompt_tokens": 64, "decoded_tokens": 64, "plans": plans}
    write_json(tmp_path / "tiny_generation.json", {**described, **decoded})
    write_json(tmp_path / "tiny_full_test.json", {**described, "plans": [{"name": "dense", "nll": math.log(21.32)}]})
    speed = speed_of({**described, "rounds": rounds, "naive_rounds": naive})
    assert speed["ratio"] == pytest.approx((20 + 6 + 2) / 3)
    assert (speed["all_naive_s"], speed["all_s"]) == (pytest.approx(40.0), 4.0)
    assert (speed["same"], speed["compared"]) == (2, 3)
    assert [(row["round"], row["naive_removes"], row["exact_removes"]) for row in speed["different"]] == [
        (3, "MHA1", "FFN0")
    ]
    assert speed["different"][0]["behind"] == pytest.approx(1e-4)
    assert generation(decoded)["spearman_share"] == pytest.approx(-0.8)
    found = cells(scores_page("tiny", tmp_path, tmp_path))
    assert ["4", "3.20", "3.00 to 3.40", "3", "4.00", "4.00 to 4.00", "3"] in found
    assert ["dense", "21.32"] in found
    assert ["0.02 to 0.1", "2", "0.60", "0.50 to 0.70", "38.4"] in found


def test_the_committed_page_is_what_the_committed_files_give() -> None:
    text = (RESULTS / "scores" / "index.md").read_text(encoding="utf-8")
    assert scores_page("smollm2_135m", SCORES, QUALITIES) == text


@pytest.mark.slow
def test_the_table_is_measured_fitted_and_continued(checkpoint: Path, score: Score) -> None:
    out = checkpoint / "table.json"
    assert score("kind=table", f"out={out}").returncode == 0
    rows = json.loads(out.read_text())["plans"]
    assert len(rows) > 50
    again = score("kind=table", f"out={out}")
    assert f"{len(rows)} plans in" in again.stderr
    assert json.loads(out.read_text())["plans"] == rows
    assert len(read_fitted(out).blocks) == 2 * LAYERS
    dense = next(row for row in rows if row["chosen_as"] == ["dense"])
    assert plan_from_json(dense["plan"]).weight_bits == (16,) * LAYERS
    assert math.isfinite(dense["nll_test"])


def test_the_costs_of_kv_are_measured_and_fitted_again_without_measuring(
    checkpoint: Path, score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hw.score.job.SCORES", tmp_path)
    out = tmp_path / "kv_bits.json"
    missing = score("kind=kv_bits", f"out={out}")
    assert "no tiny_one_shot.json in conf/score; run python -m hw.score kind=one_shot first" in missing.stderr
    write_json(tmp_path / "tiny_one_shot.json", {"order": ["FFN1", "MHA2"]})
    assert score("kind=kv_bits", f"out={out}").returncode == 0
    found = json.loads(out.read_text())
    costs = read_kv_loss(out, "test", "tiny", LAYERS)
    assert (list(costs.at_8), list(costs.at_4)) == (found["fits"]["test"]["8"], found["fits"]["test"]["4"])
    elastic = ElasticModel(tiny())
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    windows = read_windows(checkpoint / "text.txt", tokenizer, tokens=120, window=40, seed=None).tokens
    for row in found["plans"][::5]:
        assert row["tokens"] == {"calibration": 60, "test": 60}
        assert row["nll"]["test"] == pytest.approx(
            measure(elastic, plan_from_json(row["plan"]), windows).decode_mean, rel=1e-5
        )
    write_json(out, {**found, "fits": {}, "commit": "an earlier one"})
    again = score("kind=kv_bits", f"out={out}")
    assert "has these losses; they are fitted again" in again.stderr
    refitted = json.loads(out.read_text())
    assert (refitted["fits"], refitted["plans"]) == (found["fits"], found["plans"])
    assert refitted["commit"] == "an earlier one"  # that of the losses
    write_json(tmp_path / "tiny_one_shot.json", {"order": ["FFN0", "MHA2"]})
    assert "has losses of other plans or another test text" in score("kind=kv_bits", f"out={out}").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kind=one_shut"], "did you mean 'one_shot'"),
        ([], "unknown kind ''; allowed: attention"),
        (["kind=gsi", "calibration.path=nowhere.txt"], "no text at"),
        (["kind=gsi", "gsi.removal=1"], "did you mean 'gsi.removals'"),
    ],
)
@pytest.mark.slow
def test_a_mistake_ends_with_one_clear_message(
    checkpoint: Path, arguments: list[str], message: str, score: Score
) -> None:
    ended = score(*arguments)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_rows_may_keep_their_newlines(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    path = tmp_path / "rows.txt"
    path.write_text("one row\n\nanother row\n" * 40)
    joined, kept = (
        read_windows(path, tokenizer, tokens=None, window=4, seed=None, keep_newlines=keep) for keep in (False, True)
    )
    newlines = [tokenizer.decode(windows.tokens.flatten()).count("\n") for windows in (joined, kept)]
    assert newlines[1] == pytest.approx(1.5 * newlines[0], rel=0.1)
    assert kept.source["keep_newlines"]
    assert "keep_newlines" not in joined.source


def test_windows_are_random_with_a_seed_and_all_of_the_text_without(checkpoint: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    path = checkpoint / "text.txt"
    every = read_windows(path, tokenizer, tokens=None, window=40, seed=None)
    assert every.tokens.shape == (10, 40)
    assert every.count == 390
    chosen = read_windows(path, tokenizer, tokens=120, window=40, seed=3)
    assert torch.equal(chosen.tokens, read_windows(path, tokenizer, tokens=120, window=40, seed=3).tokens)
    assert all(any(torch.equal(window, other) for other in every.tokens) for window in chosen.tokens)
    with pytest.raises(ConfigError, match="has 10 windows of 40 tokens, but 11 were requested"):
        read_windows(path, tokenizer, tokens=440, window=40, seed=None)


# --- Which tokens a result was measured on ---------------------------------------------------------------------------


def test_a_description_pins_the_token_ids_and_the_tokenizer_not_only_the_file(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    given = {"tokens": 120, "window": 40, "seed": None}
    first = read_windows(checkpoint / "text.txt", tokenizer, **given)  # type: ignore[arg-type]
    assert first.source == read_windows(checkpoint / "text.txt", tokenizer, **given).source  # type: ignore[arg-type]

    class Shifted:
        """Reads the same file one token later, as another way to split rows would."""

        def __call__(self, *texts: str, **options: bool) -> object:
            found = tokenizer(*texts, **options)
            found.input_ids = found.input_ids[1:]
            return found

        def get_vocab(self) -> dict[str, int]:
            return dict(tokenizer.get_vocab(), another=10_000)

    other = read_windows(checkpoint / "text.txt", Shifted(), **given)  # type: ignore[arg-type]
    assert other.source["sha256"] == first.source["sha256"]
    assert other.source[IDS] != first.source[IDS]
    assert other.source[TOKENIZER] != first.source[TOKENIZER]


def test_results_on_other_tokens_differ_and_old_ones_without_a_hash_are_named_as_such() -> None:
    now = {"model": "m", "text": {"sha256": "a", IDS: "1", TOKENIZER: "t"}, "test_text": None}
    assert differing(now, dict(now)) == ([], False)
    assert differing(now, now | {"text": now["text"] | {IDS: "2"}}) == (["text"], False)  # type: ignore[operator]
    assert differing(now, now | {"text": now["text"] | {TOKENIZER: "u"}}) == (["text"], False)  # type: ignore[operator]
    old = now | {"text": {"sha256": "a"}}
    assert differing(now, old) == ([], True)
    assert differing(now, old | {"text": {"sha256": "b"}}) == (["text"], True)
    assert differing(now, {}) == (["model", "text"], False)


def test_an_old_table_is_continued_only_on_the_tokens_that_give_its_dense_loss(tmp_path: Path) -> None:
    elastic, said = ElasticModel(tiny(), name="tiny"), list[str]()
    calibration, test = text(2, 24, seed=1), text(2, 24, seed=2)
    path, described = tmp_path / "tiny.json", {"model": "tiny", "text": {"sha256": "a", IDS: "1"}}
    dense = next(iter(table_plans(elastic.spec, {}, {}, seed=0)))[1]
    losses = [measure(elastic, dense, tokens).mean for tokens in (calibration, test)]
    row = {"plan": plan_to_json(dense), "chosen_as": ["dense"], "nll_calibration": losses[0], "nll_test": losses[1]}
    write_json(path, {"model": "tiny", "text": {"sha256": "a"}, "plans": [row | {"nll_test": losses[1] + 0.06}]})
    given = (path, described, tmp_path)
    with pytest.raises(ConfigError, match="was measured on other tokens: nll_test"):
        measure_table(elastic, calibration, test, *given, seed=0, say=said.append)
    assert "states no hash of its token ids" in said[0]
    assert json.loads(path.read_text())["plans"][0]["nll_test"] == losses[1] + 0.06  # the file is as it was


def search_one_step(elastic, windows) -> None:
    rng = np.random.default_rng(0)
    two_stage_search(elastic, windows, [0, 2, 3], prefill_removals=1, decode_removals=2, steps=2, rng=rng)


SCORED = {
    "nll": lambda elastic, windows: measure(elastic, dense_plan(elastic.spec), windows),
    "one_shot": single_removals,
    "cosine": block_cosines,
    "lis": lambda elastic, windows: layer_importance(elastic, windows, 8),
    "pdtrim order": lambda elastic, windows: redundancy_order(elastic, windows, 2),
    "pdtrim search": search_one_step,
    "attention": lambda elastic, windows: attention_mass(elastic, windows, first_tokens=1, last_tokens=2),
    "full_test": lambda elastic, windows: measure_chosen(
        elastic, windows, [("a", dense_plan(elastic.spec)), ("b", plan_without(elastic.spec, [1]))], [], lambda _: None
    ),
}


@pytest.mark.parametrize("kind", SCORED)
def test_every_score_shows_how_much_is_done_until_all_is(kind: str, shown_progress: list[Any]) -> None:
    SCORED[kind](ElasticModel(tiny()), text(2))
    assert shown_progress[-1].done == shown_progress[-1].total > 0, shown_progress
