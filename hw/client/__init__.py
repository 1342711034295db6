"""Replays a trace against any OpenAI-compatible server. All code is in ``hw.client.client``."""
