"""Evaluation: what the statistics and the contest must satisfy, whoever wins; the page says what the files say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from agents.envs.prune_loads import PruneLoad, prune_loads
from agents.evaluation.ablation import PRUNE_GROUPS, SERVE_GROUPS, ablation_markdown, shuffled_loads, shuffled_windows
from agents.evaluation.cluster_report import cluster_table_markdown, cluster_verdict
from agents.evaluation.page import FOLDER, page, write_report
from agents.evaluation.prune import baselines, contest, grid, read_order, stop_at_budget
from agents.evaluation.prune_report import REFERENCE, prune_table_markdown, unseen_loads, verdict
from agents.evaluation.serve_report import serve_table_markdown, serve_verdict
from agents.evaluation.statistics import paired_difference
from agents.training.validation import serve, validation_windows
from sim.cost.memory import peak_bytes
from sim.cost.model_spec import load_model
from sim.errors import ConfigError
from sim.policies.observation.prune import mask_of
from sim.results.run_folder import write_json, write_parquet
from tests.sim.pages.test_render import cells

MODEL = load_model("smollm2_135m")
FEW = [
    PruneLoad(batch=b, sequence_tokens=s, budget_share=r)
    for b, s in ((1, 4096), (8, 2048), (16, 512))
    for r in (0.8, 0.5)
]


@pytest.fixture(scope="module")
def played() -> pd.DataFrame:
    return contest(MODEL.name, baselines(MODEL), FEW)


def test_a_policy_against_itself_differs_by_nothing() -> None:
    values = np.random.default_rng(0).random((1, 30))
    same = paired_difference(values, values, resamples=200)
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)


def test_pairing_sees_a_small_gain_that_the_spread_of_loads_would_hide() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.random((1, 50))
    ours = theirs + 0.01 + 0.001 * rng.standard_normal((1, 50))
    paired = paired_difference(ours, theirs, resamples=1000)
    assert paired.excludes_zero()
    assert paired.low < 0.01 < paired.high
    unpaired = paired_difference(ours, theirs[:, rng.permutation(50)], resamples=1000)
    assert not unpaired.excludes_zero()


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        ours = 0.5 + rng.standard_normal((1, 40))
        interval = paired_difference(ours, np.zeros((1, 40)), resamples=400, seed=trial)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_seeds_widen_the_interval() -> None:
    rng = np.random.default_rng(2)
    theirs = rng.random((1, 40))
    alike = np.repeat(theirs + 0.02, 5, axis=0)
    spread = alike + 0.1 * np.arange(-2, 3)[:, None]
    narrow, wide = (paired_difference(x, theirs, resamples=500) for x in (alike, spread))
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_policies_that_played_different_loads_are_not_compared() -> None:
    with pytest.raises(ValueError, match="not be paired"):
        paired_difference(np.zeros((1, 3)), np.zeros((1, 4)))


def test_no_policy_beats_the_knapsack_on_the_losses_that_it_knows(played: pd.DataFrame) -> None:
    best = grid(played, "knapsack", "utility_calibration").mean(axis=0)
    bound = grid(played, "oracle", "utility_test").mean(axis=0)
    for name in played["policy"].unique():
        assert (grid(played, name, "utility_calibration") <= best + 1e-9).all(), name
        assert (grid(played, name, "utility_test") <= bound + 1e-9).all(), name


def test_everything_but_dense_and_static_fits_every_budget(played: pd.DataFrame) -> None:
    fits = played.groupby("policy")["fits"].mean()
    assert fits["dense"] == 0.0
    assert (fits.drop(["dense", "static"]) == 1.0).all()
    assert played.loc[~played["fits"], "utility_test"].eq(0.0).all()


def test_an_order_stops_at_the_first_plan_that_fits() -> None:
    order = read_order(MODEL, "gsi")
    draw = FEW[2]
    removed = stop_at_budget(MODEL, order, draw)
    count = int(removed.sum())
    assert removed[order[:count]].all()
    peak = peak_bytes(MODEL, mask_of(removed), draw.batch, draw.sequence_tokens)
    removed[order[count - 1]] = False
    before = peak_bytes(MODEL, mask_of(removed), draw.batch, draw.sequence_tokens)
    assert peak <= draw.budget_bytes(MODEL) < before


def test_every_order_names_every_block_once() -> None:
    for kind in ("gsi", "one_shot", "cosine", "lis_w4"):
        assert sorted(read_order(MODEL, kind)) == list(range(2 * MODEL.num_layers))
    with pytest.raises(ConfigError, match=r"hw\.score"):
        read_order(MODEL, "none_such")


def test_unseen_loads_lie_outside_what_training_draws() -> None:
    draws = prune_loads()
    for draw in unseen_loads():
        inside = draws.batch[0] <= draw.batch <= draws.batch[1]
        inside &= draws.sequence_tokens[0] <= draw.sequence_tokens <= draws.sequence_tokens[1]
        assert not inside


PROVENANCE = {"command": "python -m agents.evaluate", "commit": "0" * 40, "machine": "a machine"}
TUNED = {"static": "drop 0", "queue": 8, "greedy_stop": {"headroom": 1.1}, "saber_margin": 0.4, "windows": 16}
STEPS = {"env_steps": [1000, 2000], "seconds": [5.0, 10.0], "validation_utility": [0.7, 0.6]}


def row_of(text: str, label: str) -> list[str]:
    """Return the first row of a Markdown table that begins with a label."""
    return next(row for row in cells(text) if row[0] == label)


def write_prune(folder: Path, frame: pd.DataFrame) -> None:
    """Write what the section on pruning is made from."""
    for name in ("prune.parquet", "prune_unseen.parquet"):
        write_parquet(folder / name, frame)
    more = {"quality_sha256": "1" * 64, "trained_on": ["1" * 64], "model": MODEL.name, "knapsack_validation": 0.3}
    write_json(folder / "prune.json", {**PROVENANCE, **more, "network_p50_s": 1e-5, "network_p99_s": 2e-5})


def test_the_committed_page_is_what_the_committed_files_give(tmp_path: Path) -> None:
    for path in FOLDER.iterdir():
        if path.suffix in (".parquet", ".json"):
            shutil.copy(path, tmp_path)
    assert page(tmp_path) == (FOLDER / "index.md").read_text(encoding="utf-8")


def test_the_page_names_the_best_learned_policy_and_holds_the_means_of_the_files(
    played: pd.DataFrame, tmp_path: Path
) -> None:
    # "ours" is the knapsack under another name, "worse" a random order: the verdict must name the former.
    knapsack, random = (played[played["policy"] == name] for name in ("knapsack", "random"))
    frame = pd.concat([played, knapsack.assign(policy="ours"), random.assign(policy="worse")])
    write_prune(tmp_path, frame)
    assert ["ours", "1"] in [row[:2] for row in cells(write_report(tmp_path).read_text(encoding="utf-8"))]
    assert (tmp_path / "prune.png").stat().st_size > 10_000
    mean = frame[frame["policy"] == REFERENCE]["utility_test"].mean()
    assert row_of(prune_table_markdown(frame), REFERENCE)[1:4] == ["1", f"{mean:.4f}", "-"]
    found = verdict(frame)
    assert found["name"] == "ours"
    assert found["of_knapsack"] == pytest.approx(1.0)
    assert "random" in found["beats"]
    assert "knapsack" in found["undecided"]
    assert REFERENCE in verdict(pd.concat([played, random.assign(policy="worse")]))["loses_to"]
    assert verdict(played) == {}
    assert len(cells(prune_table_markdown(frame))) == 1 + frame["policy"].nunique()


SHIPPED = ["learned_prune_smollm2"]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_policy_that_ships_beats_greedy_stop_on_loads_that_it_was_not_trained_on(name: str) -> None:
    from agents.evaluation.prune import learned
    from sim.policies.learned import SHIPPED as FOLDER

    draws = list(prune_loads().validation)
    policies = {"learned": learned(MODEL, [FOLDER / f"{name}.json"]), REFERENCE: baselines(MODEL)[REFERENCE]}
    means = contest(MODEL.name, policies, draws).groupby("policy")["utility_calibration"].mean()
    assert means["learned"] > 1.05 * means[REFERENCE]
    shuffled = shuffled_loads([FOLDER / f"{name}.json"]).set_index("hidden")["utility"]
    assert shuffled["nothing"] == pytest.approx(means["learned"], abs=1e-6)
    assert shuffled["kept"] < shuffled["nothing"]
    assert set(PRUNE_GROUPS) < set(shuffled.index)


def test_a_policy_of_serving_loses_when_it_is_told_of_another_windows_memory() -> None:
    from sim.policies.learned import SHIPPED as FOLDER
    from sim.policies.learned import read_learned

    path = FOLDER / "learned_serve_llama2.json"
    about = read_learned(path, "ServeTrace").about
    names = {entry["name"] for entry in about["observation"]}
    assert all(set(entries) <= names for entries in SERVE_GROUPS.values())
    table = shuffled_windows([path], windows=8)
    utility = table.set_index("hidden")["utility"]
    words = {**about["environment"], "split": "validation"}
    plainly = serve(read_learned(path, "ServeTrace").network.act, words, validation_windows(("burst",), 8)).mean()
    assert utility["nothing"] == pytest.approx(plainly, abs=1e-12)
    assert utility["all of the KV cache"] < utility["nothing"]
    assert set(utility.index) == {"nothing", *SERVE_GROUPS} | {n for n in names if not n.startswith("legal.")}
    shown = ablation_markdown(table, "windows")
    assert row_of(shown, "nothing") == ["nothing", f"{plainly:.4f}", "0.0 %", "0.0 %", "0.0 %"]


def scenarios(utilities: dict[str, float], helped: str, columns: dict[str, list[Any]]) -> pd.DataFrame:
    """Return 40 scenarios of policies with these mean utilities; one policy is better by 0.05 on trace burst."""
    easy = np.random.default_rng(0).normal(0.0, 0.05, 40)
    figures = ("slo_attainment", "goodput_rps", "ttft_p95_s", "rejected_share", "loss", "budget_violation_s")
    zeros = dict.fromkeys((*figures, "transitions", "decision_p50_s", "decision_p99_s", "busiest_share"), 0.0)
    return pd.DataFrame(
        [
            {
                "policy": name,
                "seed": 0,
                "window": window,
                "source": "burst" if window < 20 else "azure_code",
                **{column: kinds[window % len(kinds)] for column, kinds in columns.items()},
                "utility": value + (easy - easy.mean())[window] + (0.05 if window < 20 and name == helped else 0.0),
                **zeros,
            }
            for name, value in utilities.items()
            for window in range(40)
        ]
    )


def test_the_verdict_on_serving_names_who_won_and_where(played: pd.DataFrame, tmp_path: Path) -> None:
    rules = {"dense": 0.5, "greedy_stop": 0.6, "dense+queue": 0.8, "greedy_stop+queue": 0.82}
    utilities = rules | {"oracle_static": 0.9, "oracle_search": 0.95, "learned_x": 0.83}
    frame = scenarios(utilities, "learned_x", {"budget": ["full"], "load": [0.85, 0.25]})
    found = serve_verdict(frame, ["burst"])
    assert (found["best"], found["simple"], found["oracle"]) == ("learned_x", "greedy_stop+queue", "oracle_search")
    assert set(found["beats"]) == set(rules)
    assert found["undecided"] == found["loses_to"] == []
    assert found["worst"] == ("azure_code", pytest.approx(0.01))
    assert found["easiest"] == ("burst", pytest.approx(0.06))
    assert found["where_trained"] == pytest.approx(0.06)
    assert found["queue_gain"] == (pytest.approx(0.22), pytest.approx(0.30))
    assert found["rule_gain"] == pytest.approx(0.1)
    worse = frame.assign(utility=frame["utility"].where(frame["policy"] != "learned_x", frame["utility"] - 0.5))
    assert "dense" in serve_verdict(worse, ["burst"])["loses_to"]
    assert "best" not in serve_verdict(frame[frame["policy"] != "learned_x"], ["burst"])
    assert row_of(serve_table_markdown(frame), "learned_x")[:3] == ["learned_x", "1", "0.8550"]

    write_prune(tmp_path, played)
    write_parquet(tmp_path / "serve.parquet", frame)
    made = {**PROVENANCE, "tuned": TUNED, "trained_on": ["burst"]}
    write_json(tmp_path / "serve.json", made)
    assert sum(row[0] == "learned_x" for row in cells(page(tmp_path))) == 2
    write_parquet(tmp_path / "serve_elsewhere.parquet", frame[frame["policy"] == "learned_x"].assign(policy="on_moon"))
    write_parquet(tmp_path / "serve_quality.parquet", frame[frame["policy"].isin(["learned_x", "dense"])])
    anew = {"policies": ["learned_x"], "commit": "2" * 40}
    write_json(tmp_path / "serve.json", {**made, "other_quality": "some_quality", "anew": anew})
    write_parquet(tmp_path / "serve_training.parquet", pd.DataFrame({"policy": "learned_x", "seed": 0, **STEPS}))
    text = page(tmp_path)
    assert ["learned_x", "1", "0.7000", "0.7000 to 0.7000", "10", "2,000"] in cells(text)
    assert len(row_of(text, "on_moon")) == 1 + 2 + 2  # two traces, two loads
    assert ["policy", "published", "some_quality"] in cells(text)
    assert "222222222222" in text
    assert (tmp_path / "serve.png").stat().st_size > 10_000


def test_the_verdict_on_clusters_names_who_won_where_and_what_training_in_them_adds(
    played: pd.DataFrame, tmp_path: Path
) -> None:
    rules = {"dense": 0.5, "static": 0.7, "precision+queue": 0.8}
    learned = {"learned_serve": 0.81, "learned_cluster": 0.83, "learned_cluster_own": 0.79}
    utilities = rules | {"oracle_static": 0.9} | learned
    frame = scenarios(utilities, "learned_cluster", {"load": [0.9, 0.7], "pressed": [0, 1, 2, 3, 4]})
    found = cluster_verdict(frame)
    assert (found["best"], found["simple"]) == ("learned_cluster", "precision+queue")
    assert found["simple_utility"] == pytest.approx(0.8)
    assert set(found["beats"]) == set(rules)
    assert found["worst"] == ("azure_code", pytest.approx(0.03))
    assert found["easiest"] == ("burst", pytest.approx(0.08))
    added = {(pair["policy"], pair["minus"]): pair["utility"].split()[0] for pair in found["pairs"]}
    assert added["learned_cluster", "learned_serve"] == "+0.0450"
    assert added["learned_cluster", "learned_cluster_own"] == "+0.0650"
    worse = frame.assign(utility=frame["utility"].where(frame["policy"] != "learned_cluster", 0.1))
    assert cluster_verdict(worse)["best"] == "learned_cluster_own"
    assert "best" not in cluster_verdict(frame[frame["policy"].isin(rules)])
    compared = [row[3] for row in cells(cluster_table_markdown(frame))]
    assert compared.count("-") == 1  # the reference alone is not compared with itself

    write_prune(tmp_path, played)
    write_parquet(tmp_path / "cluster.parquet", frame)
    made = {**PROVENANCE, "tuned": TUNED, "rules_commit": "3" * 40, "replicas": 4, "router": "least_kv", "seconds": {}}
    made |= {"learned_serve_validation": 0.9, "sources": {"learned_cluster": ["burst", "azure_conv"]}}
    write_json(tmp_path / "cluster.json", made)
    assert "333333333333" in page(tmp_path)
    write_parquet(tmp_path / "cluster_routers.parquet", frame.assign(router="round_robin"))
    curves = pd.DataFrame({"policy": "learned_cluster", "seed": 0, **STEPS})
    write_parquet(tmp_path / "cluster_training.parquet", curves)
    text = page(tmp_path)
    assert ["policy", "round_robin"] in cells(text)
    assert ["learned_cluster", "1", "0.7000", "0.7000 to 0.7000", "10", "2,000"] in cells(text)
    assert (tmp_path / "cluster.png").stat().st_size > 10_000
