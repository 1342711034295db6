"""Readers of request traces as they are published, one file a format; each returns a ``sim.trace.Trace``."""

from sim.readers.azure import read_azure
from sim.readers.burstgpt import read_burstgpt
from sim.readers.lengths import read_lengths
from sim.readers.mooncake import read_mooncake
from sim.readers.own import read_trace, write_trace
from sim.readers.servegen import read_servegen

__all__ = [
    "read_azure",
    "read_burstgpt",
    "read_lengths",
    "read_mooncake",
    "read_servegen",
    "read_trace",
    "write_trace",
]
