"""An environment drops blocks in the order of the model that it serves."""

from __future__ import annotations

from typing import Any

import pytest

from agents.envs.serve import ServeSetting
from sim.errors import ConfigError, PlanError
from sim.policies.observation.serve import serve_actions

SMALL: dict[str, Any] = {
    "model": "smollm2_135m",
    "gpu": "cpu_epyc_1thread",
    "latency": "smollm2_135m_cpu_epyc_1thread",
    "quality": "smollm2_135m",
    "workspace_bytes": 1e8,
}


def test_an_environment_takes_the_order_of_its_model_and_exports_for_which() -> None:
    setting = ServeSetting(**SMALL, actions={"drops": [0, 3], "low_layers": [0]})
    assert setting.action_options["made_for"] == "smollm2_135m"
    assert setting.actions.plans[1].decode.mha.index(False) == 6  # MHA18, MHA7 and MHA6 are the first three
    assert serve_actions(setting.model, **setting.action_options).plans == setting.actions.plans


def test_an_order_without_its_model_or_of_another_model_is_refused() -> None:
    order = ["MHA25", "MHA27"]
    with pytest.raises(ConfigError, match=r"does not say for which model.*made_for, such as smollm2_135m"):
        ServeSetting(**SMALL, actions={"drops": [0, 2], "low_layers": [0], "order": order})
    other = {"drops": [0, 2], "low_layers": [0], "order": order, "made_for": "llama2_7b"}
    with pytest.raises(PlanError, match=r"measured on llama2_7b, not on smollm2_135m"):
        ServeSetting(**SMALL, actions=other)
    ours = ServeSetting(**SMALL, actions={**other, "made_for": "smollm2_135m"})
    assert ours.actions.plans[1].decode.mha.count(False) == 2


def test_a_model_without_an_order_can_be_served_where_nothing_is_dropped() -> None:
    options = {"model": "llama3_8b", "gpu": "l4_24gb", "latency": "llama3_8b_l4", "quality": "llama3_8b_published"}
    with pytest.raises(ConfigError, match="no order of blocks is known for llama3_8b"):
        ServeSetting(**options, actions={"drops": [0, 2], "low_layers": [0]})
    assert len(ServeSetting(**options, actions={"drops": [0], "low_layers": [0, 16]}).actions.plans) == 2
