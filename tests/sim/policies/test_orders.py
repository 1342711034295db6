"""No order of blocks is used for another model than the one it was made for, unless the user says so."""

from __future__ import annotations

import json

import pytest

from sim.config import CONF_DIR, build_option
from sim.cost.model_spec import load_model
from sim.engine.server_spec import ServerSpec
from sim.errors import ConfigError, PlanError
from sim.policies.base import PolicyContext
from sim.policies.orders import own_order

LLAMA, SMOL, OTHER = (load_model(name) for name in ("llama2_7b", "smollm2_135m", "llama3_8b"))


def test_each_model_has_its_own_order() -> None:
    assert own_order(LLAMA)[:3] == ("MHA25", "MHA27", "MHA24")  # BlockPruner's
    measured = json.loads((CONF_DIR / "score" / "smollm2_135m_gsi.json").read_text(encoding="utf-8"))["order"]
    assert own_order(SMOL) == tuple(measured)
    with pytest.raises(ConfigError, match=r"no order of blocks is known for llama3_8b.*hw\.score kind=gsi"):
        own_order(OTHER)


@pytest.mark.parametrize("policy", ["greedy_stop", "adaptive_pruning", "rap_80", "rap_60", "pdtrim", "lookahead"])
def test_a_policy_of_conf_refuses_a_model_that_its_blocks_were_not_made_for(policy: str) -> None:
    server = ServerSpec.from_names(model="llama3.1_8b", gpu="a100_80gb")  # 32 layers, as Llama-2-7B has
    with pytest.raises((ConfigError, PlanError), match=r"not (on|for) llama3\.1_8b"):
        build_option("policy", policy)(PolicyContext.of(server))
