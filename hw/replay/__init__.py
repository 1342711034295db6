"""Replays a trace on the real model."""
