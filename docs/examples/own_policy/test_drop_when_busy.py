"""The policy on a simulated server: ``pytest docs/examples/own_policy``."""

from collections.abc import Callable
from typing import Any

from sim.config import build_option
from sim.policies.base import PolicyContext


def test_blocks_are_dropped_only_while_many_requests_wait(server_at: Callable[..., Any]) -> None:
    context = PolicyContext(model=build_option("model", "llama2_7b"))
    policy = build_option("policy", "drop_when_busy", {"limit": 3})(context)
    calm, busy = server_at(waiting=2), server_at(waiting=4, kv_share=0.9)
    assert policy(calm.state) == policy.first_plan
    assert policy(busy.state) == policy.small_plan
