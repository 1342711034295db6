"""Latency calibrations: published or measured kernel times, written as the tables that the simulator reads."""
