"""Readers of request traces, one file per published format; each returns a ``sim.traces.trace.Trace``.

To add a format, add three files: a reader here, a ``conf/trace/NAME.yaml`` whose ``_target_`` names its function by
module path (``sim.traces.readers.azure.read_azure``), and a test. A file passes through ``files.py`` (unpacked, text,
of bounded size), then ``csv_table.py``, ``json_table.py`` or ``parquet_table.py`` (a ``table.py`` of columns), then
``rows.py`` (each row checked, with ``cells.py`` for numbers and times), and becomes a trace. ``any_format.py`` chooses
the reader by the names of the columns, which ``formats.py`` lists.
"""
