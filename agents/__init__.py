"""Reinforcement learning: environments, training and evaluation of policies. Imports neither torch nor ray."""
