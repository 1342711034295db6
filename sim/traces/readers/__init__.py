"""Readers of request traces as they are published, one file a format; each returns a ``sim.traces.trace.Trace``."""

from sim.traces.readers.azure import read_azure
from sim.traces.readers.burstgpt import read_burstgpt
from sim.traces.readers.lengths import read_lengths
from sim.traces.readers.mooncake import read_mooncake
from sim.traces.readers.native import read_trace, write_trace
from sim.traces.readers.servegen import read_servegen

__all__ = [
    "read_azure",
    "read_burstgpt",
    "read_lengths",
    "read_mooncake",
    "read_servegen",
    "read_trace",
    "write_trace",
]
