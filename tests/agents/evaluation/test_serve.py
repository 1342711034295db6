"""Evaluation of ServeTrace: the ablation of a policy's observation."""

from __future__ import annotations

import pytest

from agents.evaluation.ablation import SERVE_GROUPS, ablation_markdown, shuffled_windows
from agents.training.validation import serve, validation_windows
from sim.policies.learned import SHIPPED, read_learned


def test_a_policy_loses_utility_if_its_kv_entries_come_from_another_window() -> None:
    path = SHIPPED / "learned_serve_llama2.json"
    about = read_learned(path, "ServeTrace").about
    names = {entry["name"] for entry in about["observation"]}
    assert all(set(entries) <= names for entries in SERVE_GROUPS.values())
    table = shuffled_windows([path], windows=8)
    utility = table.set_index("hidden")["utility"]
    env_kwargs = {**about["environment"], "split": "validation"}
    network = read_learned(path, "ServeTrace").network
    unchanged = serve(network.act, env_kwargs, validation_windows(("burst",), 8)).mean()
    assert utility["nothing"] == pytest.approx(unchanged, abs=1e-12)
    assert utility["all of the KV cache"] < utility["nothing"]
    assert set(utility.index) == {"nothing", *SERVE_GROUPS} | {n for n in names if not n.startswith("legal.")}
    shown = ablation_markdown(table, "windows")
    assert f"| nothing | {unchanged:.4f} | 0.0 % | 0.0 to 0.0 % |" in shown
