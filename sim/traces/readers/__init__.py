"""Readers of request traces, one file per published format; each returns a ``sim.traces.trace.Trace``.

To add a format, add three files: a reader here, a ``conf/trace/NAME.yaml`` whose ``_target_`` names its function by
module path (``sim.traces.readers.azure.read_azure``), and a test. ``rows.py`` reads CSV and JSONL and checks each row.
"""
