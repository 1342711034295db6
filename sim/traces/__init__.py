"""Traces: what arrives, when, and how long it is; transforms, generators and readers of published files."""
