"""Prefill and decode of the real model in two processes."""
