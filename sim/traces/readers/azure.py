"""Azure's public LLM inference traces of 2023: one CSV row a request, wall-clock times of 100 ns."""

from __future__ import annotations

from pathlib import Path

from sim.traces.readers.rows import OnBadRow, Rows, read_csv
from sim.traces.trace import Trace

ORIGIN = "https://github.com/Azure/AzurePublicDataset (data/, commit b469a113cedca53ddc3bdea71a143dc4b7d8700c)"


def read_azure(path: str | Path, *, on_bad_row: OnBadRow = "error", sort: bool = False, name: str = "azure") -> Trace:
    """Return an Azure trace: ``TIMESTAMP,ContextTokens,GeneratedTokens``, arrivals counted from the first.

    The published files have 7 fractional digits, CRLF line ends and no line end after the last row; zones
    (``+00:00``, as in the traces of 2024) are understood too.

    Args:
        path: CSV, plain or gzip.
        on_bad_row: "error" names the first bad row, "skip" leaves bad rows out and counts each kind.
        sort: put rows in order that are not; without it they are an error.
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
