"""Azure's public LLM inference traces of 2023, 2024 and 2025 (multimodal): CSV with one row per request and dates.

Those of 2023 have steps of 100 ns and no time zone, those of 2024 a time zone and some requests without an output,
the multimodal one a column with the number of images.
"""

from __future__ import annotations

from pathlib import Path

from sim.traces.readers.arguments import check_choice
from sim.traces.readers.files import MAX_BYTES, MAX_ROWS, OnBadRow, TraceFile
from sim.traces.readers.rows import Failed, Rows, read_table
from sim.traces.trace import Trace

ORIGIN = "https://github.com/Azure/AzurePublicDataset (data/, commit b469a113cedca53ddc3bdea71a143dc4b7d8700c)"
COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def read_azure(
    path: str | Path,
    *,
    failed: Failed = "drop",
    on_bad_row: OnBadRow = "error",
    sort: bool = False,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    name: str = "azure",
) -> Trace:
    """Return an Azure trace; the first arrival is at time 0.

    Args:
        path: CSV (plain or packed), JSON lines or Parquet with columns ``TIMESTAMP,ContextTokens,GeneratedTokens``.
            ``NumImages`` may be there; images are not simulated beyond the tokens that ``ContextTokens`` counts.
        failed: what happens to rows of 0 generated tokens: "drop" leaves them out and counts them; "error" treats them
            as bad rows.
        on_bad_row: "error" reports the first bad row; "skip" leaves out bad rows and counts each kind.
        sort: sort rows by arrival; if False, a row out of order is an error.
        max_rows, max_bytes: limits on the rows and on the unpacked size of the file.
        name: the trace's name.
    Raises:
        TraceError: if the file or a row of it cannot be used.
    Source:
        Patel et al., Splitwise (ISCA 2024); Azure/AzurePublicDataset, AzureLLMInferenceDataset2023.md, CC-BY 4.0.
    """
    check_choice("failed", failed, Failed)
    file = TraceFile(path=path, on_bad_row=on_bad_row, max_rows=max_rows, max_bytes=max_bytes, origin=ORIGIN)
    rows = Rows(read_table(file, required=COLUMNS, optional=("NumImages",)))
    arrival_s = rows.timestamps("TIMESTAMP")
    prompt_tokens = rows.tokens("ContextTokens")
    output_tokens = rows.tokens("GeneratedTokens", minimum=0 if failed == "drop" else 1)
    history = []
    if rows.has("NumImages"):
        images = rows.tokens("NumImages", minimum=0)
        history.append(f"{int((images > 0).sum()):,} requests have images, which only ContextTokens stands for")
    return rows.trace(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        leave_out=rows.failed(output_tokens == 0, "0 generated tokens", history),
        sort=sort,
        name=name,
        history=history,
    )
