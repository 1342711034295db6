"""Evaluation of PruneToBudget: bounds, budgets and orders that hold for every policy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from agents.baselines.prune import baselines, learned_prune_policies, read_order, stop_at_budget
from agents.envs.prune_loads import prune_loads
from agents.envs.surrogate import mask_losses, quality_on
from agents.evaluation.ablation import PRUNE_GROUPS, shuffled_loads
from agents.evaluation.evaluate import EvaluateConfig
from agents.evaluation.measure import measure_prune
from agents.evaluation.prune import evaluate_prune, grid
from agents.evaluation.prune_report import REFERENCE, unseen_loads
from sim.cost.memory import peak_bytes
from sim.errors import ConfigError
from sim.policies.learned import SHIPPED
from sim.policies.observation.prune import block_names, mask_of
from sim.results.run_folder import write_json, write_parquet
from tests.agents.helpers import FEW_LOADS, SMALL_MODEL


def test_no_policy_beats_the_knapsack_on_the_losses_that_it_solves(played: pd.DataFrame) -> None:
    best = grid(played, "knapsack", "utility_calibration").mean(axis=0)
    bound = grid(played, "oracle", "utility_test").mean(axis=0)
    for name in played["policy"].unique():
        assert (grid(played, name, "utility_calibration") <= best + 1e-9).all(), name
        assert (grid(played, name, "utility_test") <= bound + 1e-9).all(), name


def test_every_policy_but_dense_and_static_fits_every_budget(played: pd.DataFrame) -> None:
    fits = played.groupby("policy")["fits"].mean()
    assert fits["dense"] == 0.0
    assert (fits.drop(["dense", "static"]) == 1.0).all()
    assert played.loc[~played["fits"], "utility_test"].eq(0.0).all()


def test_plans_beyond_the_fitted_range_are_charged_its_upper_bound(played: pd.DataFrame) -> None:
    fitted = quality_on(SMALL_MODEL.name, "test")
    assert fitted.range is not None
    old = replace(fitted, range=None)
    place = {name: at for at, name in enumerate(block_names(SMALL_MODEL.num_layers))}
    for row in played.itertuples():
        removed = np.zeros((1, len(place)), dtype=np.bool_)
        removed[0, [place[name] for name in row.dropped.split()]] = True
        predicted = float(mask_losses(old, removed)[0])
        assert row.in_range == (predicted <= fitted.range.loss)
        bound = min(predicted * fitted.range.factor, fitted.max_loss)
        assert row.loss_test == pytest.approx(predicted if row.in_range else bound)
    assert 0.0 < played["in_range"].mean() < 1.0


def test_playing_some_policies_again_keeps_the_plans_of_the_others_and_charges_all_as_today(
    played: pd.DataFrame, tmp_path: Path
) -> None:
    before = played[played["policy"].isin(["static", "knapsack", "ratio"])].assign(loss_test=0.5, decision_s=9.0)
    for name in ("prune.parquet", "prune_unseen.parquet"):
        write_parquet(tmp_path / name, before)
    cfg = OmegaConf.structured(EvaluateConfig(only=["knapsack"]))
    with pytest.raises(ConfigError, match="without only="):
        measure_prune(cfg, tmp_path)
    write_json(
        tmp_path / "prune.json", {"commit": "1", "replayed": [{"policies": ["ratio", "knapsack"], "commit": "2"}]}
    )
    measure_prune(cfg, tmp_path)
    after = pd.read_parquet(tmp_path / "prune.parquet")
    assert list(dict.fromkeys(after["policy"])) == list(dict.fromkeys(before["policy"]))
    kept = after[after["policy"] != "knapsack"]
    assert (kept["decision_s"] == 9.0).all()
    expected = played[played["policy"].isin(["static", "ratio"])]
    assert kept["loss_test"].tolist() == expected["loss_test"].tolist()
    assert len(after[after["policy"] == "knapsack"]) == len(prune_loads().test)
    made = json.loads((tmp_path / "prune.json").read_text(encoding="utf-8"))
    assert [replay["policies"] for replay in made["replayed"]] == [["ratio"], ["knapsack"]]
    cfg.only = ["knapsak"]
    with pytest.raises(ConfigError, match="knapsack"):
        measure_prune(cfg, tmp_path)


def test_an_order_stops_at_the_first_plan_that_fits() -> None:
    order = read_order(SMALL_MODEL, "gsi")
    load = FEW_LOADS[2]
    removed = stop_at_budget(SMALL_MODEL, order, load)
    count = int(removed.sum())
    assert removed[order[:count]].all()
    peak = peak_bytes(SMALL_MODEL, mask_of(removed), load.batch, load.sequence_tokens)
    removed[order[count - 1]] = False
    before = peak_bytes(SMALL_MODEL, mask_of(removed), load.batch, load.sequence_tokens)
    assert peak <= load.budget_bytes(SMALL_MODEL) < before


def test_every_order_names_every_block_once() -> None:
    for kind in ("gsi", "one_shot", "cosine", "lis_w4"):
        assert sorted(read_order(SMALL_MODEL, kind)) == list(range(2 * SMALL_MODEL.num_layers))
    with pytest.raises(ConfigError, match=r"hw\.score"):
        read_order(SMALL_MODEL, "none_such")


def test_unseen_loads_lie_outside_the_training_ranges() -> None:
    split = prune_loads()
    for load in unseen_loads():
        inside = split.batch[0] <= load.batch <= split.batch[1]
        inside &= split.sequence_tokens[0] <= load.sequence_tokens <= split.sequence_tokens[1]
        assert not inside


@pytest.mark.parametrize("name", ["learned_prune_smollm2"])
def test_the_shipped_policy_beats_greedy_stop_on_held_out_loads(name: str) -> None:
    path = SHIPPED / f"{name}.json"
    policies = {"learned": learned_prune_policies(SMALL_MODEL, [path]), REFERENCE: baselines(SMALL_MODEL)[REFERENCE]}
    frame = evaluate_prune(SMALL_MODEL.name, policies, prune_loads().validation)
    means = frame.groupby("policy")["utility_calibration"].mean()
    assert means["learned"] > 1.05 * means[REFERENCE]
    shuffled = shuffled_loads([path]).set_index("hidden")["utility"]
    # Shuffling plays the network alone, without its guard.
    assert shuffled["nothing"] == pytest.approx(means["learned"], abs=2e-3)
    assert shuffled["kept"] < shuffled["nothing"]
    assert set(PRUNE_GROUPS) < set(shuffled.index)
