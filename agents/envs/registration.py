"""``gymnasium.make("agents.envs.registration:ServeTrace-v0")`` imports this module, which registers the environments.

Worker processes need that form: they make an environment without importing ``agents`` first.
"""

from agents.registration import ENVIRONMENTS, register_environments

register_environments()

__all__ = ["ENVIRONMENTS", "register_environments"]
