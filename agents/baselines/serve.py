"""Builds the policies that serve a ``ServeTrace`` window: rules, queue limits, fixed plans, learned policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from agents.envs.serve import ServeSetting
from sim.config import build_option
from sim.cost.plan import Plan
from sim.policies.admission import Limited
from sim.policies.base import Policy, PolicyContext
from sim.policies.fixed import Fixed
from sim.policies.learned import read_learned
from sim.policies.learned_serve import learned_serve

Build = Callable[[PolicyContext], Policy]
"""Builds a policy from what stays constant while it decides."""


def policy_context(setting: ServeSetting) -> PolicyContext:
    """Return what stays constant while a policy decides: the model, memory, and prices of the server."""
    return PolicyContext.of(setting.server)


def conf_policy(name: str, **changed: Any) -> Build:
    """Return a builder of the policy in a file of conf/policy; ``changed`` replaces some of its keys."""
    build: Build = build_option("policy", name, changed)
    return build


def with_queue_limit(build: Build, max_waiting: int | None) -> Build:
    """Return a builder of the policy with a queue limit; None means no limit."""
    if max_waiting is None:
        return build
    return lambda context: Limited(build(context), max_waiting)


def fixed_plan(plan: Plan) -> Build:
    """Return a builder of the policy that always runs one plan."""
    return lambda context: Fixed(plan)


def learned_serve_policies(paths: Sequence[Path], *, low_bits: bool = True) -> list[Build]:
    """Return a builder of the exported policy of each file; ``low_bits`` as in ``learned_serve``."""
    return [partial(learned_serve, path=str(path), low_bits=low_bits) for path in paths]


def member_policies(path: Path, *, low_bits: bool = True) -> list[Build]:
    """Return a builder for each network that an exported policy averages, to play it alone."""
    network = read_learned(path, "ServeTrace").network

    def alone(context: PolicyContext, member: int) -> Policy:
        policy = learned_serve(context, path=str(path), low_bits=low_bits)
        policy.network = network.member(member)
        return policy

    return [partial(alone, member=member) for member in range(network.members)] if network.members > 1 else []
