"""Replays: a trace, an engine and a policy give a run folder: ``python -m sim.replay``.

Others import `loop` (`replay`), `run` (build the parts from a configuration), `sweep` (seeds and windows, in several
processes) and `variants` (configurations that are compared).
"""
