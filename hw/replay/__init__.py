"""Replays a trace on the real model, with the keys and files of ``sim.replay``.

Everything is in ``run``; others import ``HwReplayConfig``, ``load_elastic`` and ``hardware`` from it.
"""
