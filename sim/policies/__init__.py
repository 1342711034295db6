"""Policies: each chooses the plan for the next period from what a server could really see.

A policy is built by the function of its module that a file of conf/policy names.
"""

from sim.policies.base import ClusterPolicy, Policy, Served, ServerModel
from sim.policies.fixed import Fixed

__all__ = ["ClusterPolicy", "Fixed", "Policy", "Served", "ServerModel"]
