"""Mooncake: requests to Kimi with the ids of their shareable prefix blocks; one JSON object per line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from sim.traces.readers.native import read_hash_ids
from sim.traces.readers.rows import OnBadRow, Rows, read_jsonl
from sim.traces.trace import HASH_BLOCK_TOKENS, Trace

ORIGIN = (
    "https://github.com/kvcache-ai/Mooncake (FAST25-release/traces, commit 3b5a594133958449a1feaf1c9e0fc1b553e34a28)"
)
SCHEMA = pa.schema(
    [
        ("timestamp", pa.float64()),
        ("input_length", pa.int64()),
        ("output_length", pa.int64()),
        ("hash_ids", pa.list_(pa.int64())),
    ]
)


def read_mooncake(
    path: str | Path,
    *,
    time_quantum_s: float = 3.0,
    on_bad_row: OnBadRow = "error",
    sort: bool = False,
    name: str = "mooncake",
) -> Trace:
    """Return a Mooncake trace with its prefix ids; the first arrival is at time 0.

    Args:
        path: JSONL, plain or gzip: ``timestamp`` in ms, ``input_length``, ``output_length``, ``hash_ids``.
        time_quantum_s: step of the clock. The conversation trace arrives in batches every 3 s (gaps of 2999 to
            3001 ms), so it does not show bursts shorter than 3 s: spread its arrivals with
            ``sim.traces.transforms.spread_ties``, or state that batches are replayed. The synthetic trace has a clock
            of 1 ms: set 0.
        on_bad_row, sort, name: as ``read_azure``.
    Raises:
        TraceError: if the file or a row of it cannot be used, for example if the number of ids differs from the
            number of 512-token blocks of the prompt.
    Source:
        Qin et al., Mooncake (FAST 2025); kvcache-ai/Mooncake, Apache-2.0.
    """
    rows = Rows(read_jsonl(path, schema=SCHEMA, on_bad_row=on_bad_row, origin=ORIGIN), on_bad_row)
    arrival_s = rows.seconds("timestamp", unit_s=1e-3)
    prompt_tokens = rows.tokens("input_length")
    output_tokens = rows.tokens("output_length")
    hash_ids = read_hash_ids(rows)
    counts = np.fromiter(map(len, hash_ids), dtype=np.int64, count=len(hash_ids))
    rows.reject(
        counts != -(-prompt_tokens // HASH_BLOCK_TOKENS),
        "hash_ids",
        "wrong number of ids",
        f"one id for each {HASH_BLOCK_TOKENS} tokens of input_length, including a partly filled last block",
    )
    return rows.trace(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        hash_ids=hash_ids,
        sort=sort,
        name=name,
        time_quantum_s=time_quantum_s,
    )
