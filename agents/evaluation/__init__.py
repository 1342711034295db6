"""Policies next to each other on held-out loads and windows."""
