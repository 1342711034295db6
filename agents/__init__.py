"""Reinforcement learning: environments, training and evaluation of policies. Imports ``sim``, never ``hw``.

    envs         the Gymnasium environments
    baselines    rules and solvers to imitate and to compare with
    training     ``python -m agents.train``, ``agents.tune``, ``agents.clone``, ``agents.offline``, ``agents.export``
    evaluation   ``python -m agents.evaluate``

Importing this package loads neither torch nor ray.
"""
