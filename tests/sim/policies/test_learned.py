"""Learned policies: the network computed by hand, refused files, and plans that fit memory."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sim.cost.memory import peak_bytes
from sim.cost.model_spec import load_model
from sim.engine.protocol import EngineState
from sim.errors import ConfigError
from sim.policies.base import PolicyContext
from sim.policies.learned import Network, averaged, learned_prune, prune_network, read_learned
from sim.policies.observation.prune import loads, mask_of, prune_table
from sim.policies.prune_guard import about_guard, first_that_fit, read_guard
from tests.sim.serving import TINY, tiny_engine


def seen(budget_bytes: int, running: int = 0, running_tokens: int = 0) -> EngineState:
    state = tiny_engine().run_until(0.0)
    return dataclasses.replace(
        state,
        budget_bytes=budget_bytes,
        next_budget_bytes=budget_bytes,
        running=running,
        running_tokens=running_tokens,
    )


def exported(folder: Path, **changed: Any) -> Path:
    """A policy for TINY with seeded random weights, written as agents.export writes it."""
    table = prune_table(TINY)
    rng = np.random.default_rng(0)
    sizes = [(7, table.features), (len(table.actions), 7)]
    arrays = {}
    for i, size in enumerate(sizes):
        arrays[f"{i}.weight"] = rng.normal(size=size).astype(np.float32)
        arrays[f"{i}.bias"] = rng.normal(size=size[0]).astype(np.float32)
    about = {
        "task": "PruneToBudget",
        "model": TINY.name,
        "layers": [list(size) for size in sizes],
        "activation": "relu",
        "environment": {},
        "actions": list(table.actions),
        "observation": table.rows(),
        **changed,
    }
    save_file(arrays, folder / "policy.safetensors")
    (folder / "policy.json").write_text(json.dumps(about))
    return folder / "policy.json"


def test_the_network_is_the_perceptron_it_says() -> None:
    network = Network(
        (np.array([[1.0, -1.0]], dtype=np.float32), np.array([[2.0], [-3.0]], dtype=np.float32)),
        (np.array([0.5], dtype=np.float32), np.array([0.0, 1.0], dtype=np.float32)),
        "relu",
    )
    np.testing.assert_allclose(network(np.array([3.0, 1.0], dtype=np.float32)), [5.0, -6.5])
    np.testing.assert_allclose(network(np.array([[0.0, 9.0]], dtype=np.float32)), [[0.0, 1.0]])
    assert network.parameters == 2 + 1 + 2 + 2


def test_the_mean_of_logits_chooses_as_the_mean_of_log_probabilities_over_legal_actions() -> None:
    rng = np.random.default_rng(2)
    alone = [
        Network((10 * rng.normal(size=(6, 3)).astype(np.float32),), (rng.normal(size=6).astype(np.float32),))
        for _ in range(5)
    ]
    features = rng.normal(size=(200, 3)).astype(np.float32)
    legal = rng.random((200, 6)) < 0.5
    legal[:, 0] |= ~legal.any(axis=1)
    total = np.zeros((200, 6))
    for network in alone:
        logits = np.where(legal, network(features), -np.inf).astype(np.float64)
        total += logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    np.testing.assert_array_equal(averaged(alone).act(features, legal), total.argmax(axis=1))
    assert (averaged(alone).act(features, legal) != alone[0].act(features, legal)).any()


def test_members_must_have_equal_layers_activations_and_heads() -> None:
    def network(width: int = 4, **options: Any) -> Network:
        weights = (np.zeros((width, 3), np.float32), np.zeros((5, width), np.float32))
        return Network(weights, (np.zeros(width, np.float32), np.zeros(5, np.float32)), **options)

    assert averaged([network(), network()]).members == 2
    for other in (network(6), network(activation="tanh"), network(heads=(2, 3)), averaged([network(), network()])):
        with pytest.raises(ConfigError, match="members need"):
            averaged([network(), other])


@pytest.mark.parametrize("members", [1, 3])
def test_two_heads_rate_a_pair_by_the_sum_and_number_the_second_head_fastest(members: int) -> None:
    rng = np.random.default_rng(3)
    alone = [
        Network((rng.normal(size=(5, 3)).astype(np.float32),), (rng.normal(size=5).astype(np.float32),), heads=(2, 3))
        for _ in range(members)
    ]
    pairs = averaged(alone)
    features = rng.normal(size=(7, 3)).astype(np.float32)
    raw = averaged([dataclasses.replace(network, heads=None) for network in alone])(features)
    assert pairs.actions == 6
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(pairs(features)[:, 3 * i + j], raw[:, i] + raw[:, 2 + j], rtol=1e-6)
            np.testing.assert_allclose(pairs(features[4])[3 * i + j], raw[4, i] + raw[4, 2 + j], rtol=1e-5)
    with pytest.raises(ConfigError, match=r"heads \[2, 2\] need 4 outputs; the network has 5"):
        dataclasses.replace(alone[0], heads=(2, 2))


def test_an_illegal_action_is_never_chosen_however_good_it_looks() -> None:
    rng = np.random.default_rng(1)
    network = Network((rng.normal(size=(6, 3)).astype(np.float32),), (np.zeros(6, dtype=np.float32),))
    features = rng.normal(size=(200, 3)).astype(np.float32)
    legal = rng.random((200, 6)) < 0.3
    legal[:, 0] |= ~legal.any(axis=1)
    chosen = network.act(features, legal)
    assert legal[np.arange(200), chosen].all()
    assert (chosen != network(features).argmax(axis=1)).any()


def test_layers_that_do_not_follow_one_another_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not fit one another"):
        Network(
            (np.zeros((2, 3), dtype=np.float32), np.zeros((2, 3), dtype=np.float32)),
            (np.zeros(2, dtype=np.float32),) * 2,
        )


@pytest.mark.parametrize("budget_share", [0.9, 0.6, 0.3])
def test_it_drops_blocks_until_the_load_fits_and_no_more(tmp_path: Path, budget_share: float) -> None:
    prune = prune_network(TINY, exported(tmp_path))
    budget_bytes = int(budget_share * peak_bytes(TINY, mask_of(np.zeros(6, dtype=np.bool_)), 4, 64))
    removed = prune.removed_for(4, 64, budget_bytes)
    assert peak_bytes(TINY, mask_of(removed), 4, 64) <= budget_bytes or removed.all()
    assert removed.any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"observation": prune_table(TINY, scores=True).rows()}, "has 29 entries, this table has 23"),
        ({"observation": [{**row, "unit": "furlong"} for row in prune_table(TINY).rows()]}, "its entry 'batch'"),
        ({"actions": ["drop everything"]}, "its 1 actions differ"),
        ({"model": "llama2_7b"}, "was trained on llama2_7b, not on tiny"),
        ({"task": "ServeTrace"}, "expected 'PruneToBudget'"),
        ({"layers": [[1, 1]]}, "is not a learned policy"),
        ({"activation": "sigmoidal"}, "is not a learned policy|unknown activation"),
        ({"environment": {"restore": True}}, "trained with restore"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prune_network(TINY, exported(tmp_path, **changed))


@pytest.mark.parametrize("keep", [0, 5, 40, -4])
def test_cut_weights_are_an_error_that_names_the_file_and_what_to_do(tmp_path: Path, keep: int) -> None:
    path = exported(tmp_path)
    weights = path.with_suffix(".safetensors")
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"policy\.json is not a learned policy.*agents\.export"):
        read_learned(path, "PruneToBudget")


def test_weights_of_another_shape_or_without_a_layer_are_refused(tmp_path: Path) -> None:
    path = exported(tmp_path)
    arrays = load_file(path.with_suffix(".safetensors"))
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    for changed in ({**arrays, "1.bias": arrays["0.bias"]}, {k: v for k, v in arrays.items() if k != "1.bias"}):
        save_file(changed, path.with_suffix(".safetensors"))
        with pytest.raises(ConfigError):
            read_learned(path, "PruneToBudget")


def test_missing_weights_and_unknown_names_say_what_to_do(tmp_path: Path) -> None:
    path = exported(tmp_path)
    shutil.move(path.with_suffix(".safetensors"), tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"agents\.export"):
        read_learned(path, "PruneToBudget")
    with pytest.raises(ConfigError, match="no learned policy 'nowhere'"):
        read_learned("nowhere", "PruneToBudget")


def test_the_policy_prunes_at_once_and_restores_patiently(tmp_path: Path) -> None:
    policy = learned_prune(PolicyContext(model=TINY), path=str(exported(tmp_path)), patience=2)
    dense_bytes = policy.dense_bytes
    assert policy(seen(dense_bytes)) != policy.dense  # one token of KV does not fit next to the weights
    assert policy(seen(10 * dense_bytes)) != policy.dense
    assert policy(seen(10 * dense_bytes)) == policy.dense
    assert policy(seen(10 * dense_bytes, running=4, running_tokens=400)) == policy.dense
    with pytest.raises(ConfigError, match="patience"):
        learned_prune(PolicyContext(model=TINY), path=str(tmp_path / "policy.json"), patience=0)


def test_a_policy_of_another_model_is_refused_for_this_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not on llama2_7b"):
        prune_network(load_model("llama2_7b"), exported(tmp_path))


def test_a_guard_keeps_greedy_stops_plan_unless_the_other_loses_less_by_more_than_the_fits_error() -> None:
    model = load_model("smollm2_135m")
    prune = prune_network(model, "learned_prune_smollm2")
    guard = read_guard(model, about_guard(model, "warped"))
    assert 0.0 < guard.margin_nats < 0.1
    kept = set()
    for batch, tokens, share in [(1, 4096, 0.9), (8, 2048, 0.8), (16, 1024, 0.6), (4, 2048, 0.5), (16, 4096, 0.95)]:
        load = loads(model, [batch], [tokens], [0])
        peak, freed = int(load.dense_bytes[0]), (int(load.mha_bytes[0]), int(load.ffn_bytes[0]))
        greedy = first_that_fit(guard.order, peak, int(share * peak), freed, 60)
        alone = dataclasses.replace(prune, guard=None).removed_for(batch, tokens, int(share * peak))
        found = dataclasses.replace(prune, guard=guard).removed_for(batch, tokens, int(share * peak))
        better = guard.loss(alone) < guard.loss(greedy) - guard.margin_nats
        np.testing.assert_array_equal(found, alone if better else greedy)
        assert guard.loss(found) <= guard.loss(greedy)
        kept.add(bool(better))
    assert kept == {True, False}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"order": ["MHA0"]}, "must name each of the 6 blocks of tiny once"),
        ({"order": "MHA0"}, "guard.order is 'MHA0'"),
        ({"margin_nats": -1.0}, "guard.margin_nats is -1.0"),
        ({"margin_nats": None}, "guard.margin_nats is None"),
        ({"rule": "knapsack"}, "guard.rule is 'knapsack'; it must be greedy_stop"),
    ],
)
def test_a_guard_that_does_not_fit_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    guard = {"rule": "greedy_stop", "order": [], "form": "warped", "margin_nats": 0.0, **changed}
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        prune_network(TINY, exported(tmp_path, guard=guard))
    with pytest.raises(ConfigError, match=r"no key guard\.rule"):
        prune_network(TINY, exported(tmp_path, guard={}))
