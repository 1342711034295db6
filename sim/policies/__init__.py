"""Policies: each chooses the plan for the next period from what a server can observe.

To add one, write one file here and one ``conf/policy/NAME.yaml`` whose ``_target_`` names its function. `base` defines
the protocols; `learned`, `learned_serve` and `learned_cluster` run trained policies on what `observation` returns.
"""

from sim.policies.base import ClusterPolicy, Policy, PolicyContext, checked_policy, plans_of
from sim.policies.fixed import Fixed

__all__ = ["ClusterPolicy", "Fixed", "Policy", "PolicyContext", "checked_policy", "plans_of"]
