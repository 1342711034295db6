"""Azure's public LLM inference traces of 2023: CSV with one row per request and wall-clock times in steps of 100 ns."""

from __future__ import annotations

from pathlib import Path

from sim.traces.readers.rows import OnBadRow, Rows, read_csv
from sim.traces.trace import Trace

ORIGIN = "https://github.com/Azure/AzurePublicDataset (data/, commit b469a113cedca53ddc3bdea71a143dc4b7d8700c)"


def read_azure(path: str | Path, *, on_bad_row: OnBadRow = "error", sort: bool = False, name: str = "azure") -> Trace:
    """Return an Azure trace; the first arrival is at time 0.

    The published files have 7 fractional digits, CRLF line endings and no line end after the last row. Time zones
    (``+00:00``, as in the traces of 2024) are accepted too.

    Args:
        path: CSV, plain or gzip, with columns ``TIMESTAMP,ContextTokens,GeneratedTokens``.
        on_bad_row: "error" reports the first bad row; "skip" leaves out bad rows and counts each kind.
        sort: sort rows by arrival; if False, a row out of order is an error.
        name: the trace's name.
    Raises:
        TraceError: if the file or a row of it cannot be used.
    Source:
        Patel et al., Splitwise (ISCA 2024); Azure/AzurePublicDataset, AzureLLMInferenceDataset2023.md, CC-BY 4.0.
    """
    required = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    rows = Rows(read_csv(path, required=required, on_bad_row=on_bad_row, origin=ORIGIN), on_bad_row)
    return rows.trace(
        arrival_s=rows.timestamps("TIMESTAMP"),
        prompt_tokens=rows.tokens("ContextTokens"),
        output_tokens=rows.tokens("GeneratedTokens"),
        sort=sort,
        name=name,
    )
