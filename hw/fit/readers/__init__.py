"""Readers of measured runs: one format per file. ``read_run`` finds the format."""

from hw.fit.readers.any_format import read_run

__all__ = ["read_run"]
