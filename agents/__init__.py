"""Reinforcement learning: environments, training and evaluation of policies. Imports ``sim``, never ``hw``.

    envs         the Gymnasium environments
    baselines    rules and solvers to imitate and to compare with
    training     ``python -m agents.train``, ``agents.tune``, ``agents.clone``, ``agents.offline``, ``agents.export``
    evaluation   ``python -m agents.evaluate``, ``agents.tune_rules``, ``agents.windows``, ``agents.claim``

Importing this package registers the environments: ``import agents; gymnasium.make("ServeTrace-v0")``. It loads neither
torch nor ray, and no environment before one is made.
"""

from __future__ import annotations

try:
    from agents.registration import register_environments
except ModuleNotFoundError as error:
    # The core install has no Gymnasium; a command of this package says which extra it needs.
    if error.name != "gymnasium":
        raise
else:
    register_environments()
