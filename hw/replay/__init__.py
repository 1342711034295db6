"""Replays a trace on the real model, with the keys and files of ``sim.replay``."""
