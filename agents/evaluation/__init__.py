"""Evaluates learned policies and baselines on the same held-out loads, windows and clusters."""
