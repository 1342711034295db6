"""Policies: each chooses the plan for the next period from what a server could really see."""

from sim.policies.base import Policy
from sim.policies.fixed import Fixed

__all__ = ["Fixed", "Policy"]
