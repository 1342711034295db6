"""Replays a trace against any OpenAI-compatible server."""
