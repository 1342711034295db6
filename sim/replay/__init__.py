"""Replays: a trace, an engine and a policy give a run folder; sweeps over seeds and windows."""
