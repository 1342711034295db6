"""Evaluation of ServeTrace: the ablation of a policy's observation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import OmegaConf

from agents.evaluation.ablation import SERVE_GROUPS, ablation_markdown, shuffled_windows
from agents.evaluation.evaluate import EvaluateConfig
from agents.evaluation.measure_cluster import measure_cluster
from agents.evaluation.measure_serve import measure_serve
from agents.training.validation import pool_windows, serve
from sim.errors import ConfigError
from sim.policies.learned import SHIPPED, read_learned
from sim.results.run_folder import write_parquet
from tests.sim.pages.test_render import cells


def test_a_policy_loses_utility_if_the_entry_that_it_needs_most_comes_from_another_window() -> None:
    path = SHIPPED / "learned_serve_llama2.json"
    about = read_learned(path, "ServeTrace").about
    names = {entry["name"] for entry in about["observation"]}
    assert all(set(entries) <= names for entries in SERVE_GROUPS.values())
    table = shuffled_windows([path], windows=8)
    utility = table.set_index("hidden")["utility"]
    env_kwargs = {**about["environment"], "split": "validation"}
    env_kwargs["pool"] = {**env_kwargs["pool"], "validation": 8}  # servers of many speeds, as in its training
    network = read_learned(path, "ServeTrace").network
    drawn = pool_windows(json.dumps(env_kwargs, sort_keys=True))
    assert len({window.slowdown for window in drawn}) == 8
    unchanged = serve(network.act, env_kwargs, drawn).mean()
    assert utility["nothing"] == pytest.approx(unchanged, abs=1e-12)
    assert utility.min() < utility["nothing"] - 0.005
    assert set(utility.index) == {"nothing", *SERVE_GROUPS} | {n for n in names if not n.startswith("legal.")}
    shown = ablation_markdown(table, "windows")
    assert ["nothing", f"{unchanged:.4f}", "0.0 %"] in cells(shown)
    two = pd.concat([table, table.assign(seed=1)])
    assert ["nothing", f"{unchanged:.4f}", "0.0 %", "0.0 %", "0.0 %"] in cells(ablation_markdown(two, "windows"))


@pytest.mark.parametrize(
    ("measure", "name", "named"), [(measure_serve, "serve", "windows"), (measure_cluster, "cluster", "clusters")]
)
def test_a_rule_played_again_replaces_its_own_rows_alone(measure: Any, name: str, named: str, tmp_path: Path) -> None:
    few = {"scenarios": ["roomy/published"], "serve_sources": ["gamma"], "serve_windows": 1}
    few |= {"cluster_sources": ["gamma"], "cluster_each": 1}
    cfg = OmegaConf.structured(EvaluateConfig(claim="none", baselines=["dense", "int4"], **few))
    measure(cfg, tmp_path)
    path = tmp_path / f"{name}.parquet"
    first = pd.read_parquet(path)
    write_parquet(path, first.assign(utility=-1.0))
    cfg.only = ["dense"]
    measure(cfg, tmp_path)
    again = pd.read_parquet(path)
    assert list(dict.fromkeys(again["policy"])) == ["dense", "int4"]
    assert (again[again["policy"] == "int4"]["utility"] == -1.0).all()
    played = [frame[frame["policy"] == "dense"]["utility"].tolist() for frame in (first, again)]
    assert played[0] == played[1]
    made = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert [replay["policies"] for replay in made["replayed"]] == [["dense"]]
    if name == "serve":
        with pytest.raises(ConfigError, match=r"no scenario mid/none; set scenarios=\[roomy/published\]"):
            measure(OmegaConf.merge(cfg, {"scenarios": ["mid/none"]}), tmp_path)
    cfg.serve_windows, cfg.cluster_each = 2, 2
    with pytest.raises(ConfigError, match=rf"only: .* has results of other {named} \(split validation\)"):
        measure(cfg, tmp_path)
    pd.testing.assert_frame_equal(pd.read_parquet(path), again)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("serve_windows", 0, "serve_windows is 0; it must be at least 1"),
        ("serve_windows", -1, "serve_windows is -1"),
        ("serve_oracle", -1, "serve_oracle is -1; it must be at least 0"),
        ("serve_sources", [], "serve_sources is empty"),
        ("serve_sources", ["gamma", "burst", "gamma"], "serve_sources has gamma more than once; name each trace once"),
    ],
)
def test_an_evaluation_that_would_play_no_window_is_refused(key: str, value: Any, message: str, tmp_path: Path) -> None:
    cfg = OmegaConf.structured(EvaluateConfig(claim="none", baselines=["dense"], scenarios=["roomy/published"]))
    cfg[key] = value
    with pytest.raises(ConfigError, match=message):
        measure_serve(cfg, tmp_path)
    assert not list(tmp_path.iterdir())
