"""Trace + engine + policy -> run folder; sweeps over seeds and windows."""
