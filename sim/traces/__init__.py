"""Traces: arrivals and lengths of requests; transforms, generators and readers of published files."""
