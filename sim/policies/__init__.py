"""Policies: each chooses the plan for the next period from what a server could really see.

A file of conf/policy names the function that builds a policy from a ``PolicyContext``.
"""

from sim.policies.base import ClusterPolicy, Policy, PolicyContext
from sim.policies.fixed import Fixed

__all__ = ["ClusterPolicy", "Fixed", "Policy", "PolicyContext"]
