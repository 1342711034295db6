"""Ids of prefix blocks: whole numbers or text of any size, numbered when they are not whole numbers of 63 bits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from sim.traces.readers.arguments import check_whole
from sim.traces.readers.rows import Rows
from sim.types import Ints

NO_IDS_NOTE = "no hash_ids in the file, so no request shares a prefix; engine.prefix_caching=true needs them"
ALLOWED = "a list of ids: whole numbers or text (in CSV separated by spaces)"


def read_hash_ids(rows: Rows, history: list[str], *, name: str = "hash_ids") -> list[Ints] | None:
    """Return the ids of each row, or None (with a line of history) if the file has none.

    Whole numbers from 0 below 2**63 stay as they are. If the file has any other id, such as a hexadecimal or a 64-bit
    hash, all are numbered by first appearance. A row whose ids are neither numbers nor text is marked bad.
    """
    if not rows.has(name):
        history.append(NO_IDS_NOTE)
        return None
    column = rows.table.columns[name]
    if (clean := _clean_ids(column)) is not None:
        return clean
    cells = [_ids_of(cell) for cell in (column if isinstance(column, list) else column.to_pylist())]
    rows.reject(np.array([cell is None for cell in cells], dtype=bool), name, "not a list of ids", ALLOWED)
    ids = [cell or [] for cell in cells]
    of_csv = not isinstance(column, list) and pa.types.is_string(column.type)
    if of_csv and all(_is_number(i) for cell in ids for i in cell if isinstance(i, str)):
        ids = [[int(i) for i in cell] for cell in ids]
    try:
        flat = np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=sum(map(len, ids)))
        if flat.min(initial=0) >= 0:
            return _split(flat, np.cumsum([0, *map(len, ids)]))
    except (OverflowError, ValueError):  # an id of more than 63 bits, or text
        pass
    numbers: dict[int | str, int] = {}
    numbered = [np.array([numbers.setdefault(i, len(numbers)) for i in cell], dtype=np.int64) for cell in ids]
    history.append(f"numbered {len(numbers):,} hash ids that are not all whole numbers from 0 below 2**63")
    return numbered


def check_number_of_ids(rows: Rows, hash_ids: Sequence[Ints], prompt_tokens: Ints, block_tokens: int) -> None:
    """Mark rows as bad that do not have one id for each ``block_tokens`` tokens of the prompt."""
    check_whole("block_tokens", block_tokens)
    counts = np.fromiter(map(len, hash_ids), dtype=np.int64, count=len(hash_ids))
    rows.reject(
        counts != -(-prompt_tokens // block_tokens),
        "hash_ids",
        "wrong number of ids",
        f"one id for each {block_tokens} tokens of input_length, including a partly filled last block",
    )


def _clean_ids(column: pa.ChunkedArray | list[Any]) -> list[Ints] | None:
    """Return the ids of a column that Arrow holds as lists of whole numbers from 0 below 2**63, else None."""
    if not (isinstance(column, pa.ChunkedArray) and pa.types.is_list(column.type) and column.null_count == 0):
        return None
    array = column.combine_chunks()
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    if not pa.types.is_signed_integer(array.type.value_type) or array.values.null_count:
        return None
    flat = np.asarray(array.values.to_numpy(), dtype=np.int64)
    return _split(flat, array.offsets.to_numpy()) if flat.min(initial=0) >= 0 else None


def _split(flat: Ints, ends: Ints) -> list[Ints]:
    return [flat[start:end] for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


def _ids_of(cell: Any) -> list[int | str] | None:
    """Return the ids of one cell, or None if it is no list of ids."""
    if isinstance(cell, str):
        return list(cell.split())
    # A float would merge ids that differ beyond 53 bits, and true is no id.
    return cell if isinstance(cell, list) and set(map(type, cell)) <= {int, str} else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 20
