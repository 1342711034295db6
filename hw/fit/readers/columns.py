"""Tables with one row per request: AIBrix's, inference-sim's, or any CSV, Parquet or JSON lines with named columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hw.fit.measured import Bools, Columns, MeasuredRun, Side, measured_run
from hw.fit.readers.fields import LARGEST, PER_SECOND
from sim.errors import ConfigError, nearest
from sim.traces.readers.cells import dates_ns, holds_dates, to_floats
from sim.traces.readers.files import TraceFile
from sim.traces.readers.rows import read_table
from sim.traces.readers.table import RawTable
from sim.types import Floats

ROLES = ("sent", "prompt", "output", "ttft", "first_token", "finish", "e2e", "decode", "gap", "failed")
"""What a column may hold: sent, first_token, finish are times on one clock; ttft, e2e (from the sending), decode (from
the first token to the last) and gap (mean between two tokens) are durations; failed is true where not empty or 0."""
KNOWN: Mapping[str, tuple[str, ...]] = {
    "sent": ("sent_s", "send_time_us", "launch_time", "arrival_s", "arrival_time_us", "start_time", "arrival_time"),
    "prompt": ("server_input_tokens", "prompt_tokens", "input_tokens", "input_toks", "prompt_len", "input_len"),
    "output": ("generation_tokens", "produced_tokens", "output_tokens", "output_toks", "output_len"),
    "ttft": ("ttft_s", "ttft_ms", "ttft", "time_to_first_token_ms", "time_to_first_token"),
    "first_token": ("first_token_s", "first_chunk_time_us", "first_token_time"),
    "finish": ("finish_s", "last_chunk_time_us", "finish_time", "end_time"),
    "e2e": ("e2e_s", "e2e_ms", "latency_s", "latency_ms", "request_latency"),
    "decode": ("generation_time", "decode_s", "decode_ms"),
    "gap": ("itl_s", "itl_ms", "tpot_s", "tpot_ms", "inter_token_latency_ms"),
}
"""Names of columns that need no columns=, the first that a file has. AIBrix: launch_time, generation_tokens, ttft,
generation_time; inference-sim's TraceV2: send_time_us, first_chunk_time_us, last_chunk_time_us."""
EPOCH_NS = 1_700_000_000 * 10**9
"""What is subtracted from dates: 2023-11-14."""
GOOD_STATUS = ("", "0", "false", "ok", "success", "none", "null")


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """How a table is read. columns: role -> name of its column. unit: of columns whose names end in no unit."""

    columns: Mapping[str, str]
    unit: str = "s"

    def __post_init__(self) -> None:
        if self.unit not in PER_SECOND:
            raise ConfigError(f"unit is {self.unit!r}; {nearest(str(self.unit), PER_SECOND)}")
        for role, column in self.columns.items():
            if role not in ROLES:
                raise ConfigError(f"columns.{role} is unknown; {nearest(str(role), ROLES)}")
            if not isinstance(column, str) or not column:
                raise ConfigError(f"columns.{role} is {column!r}; it must be the name of a column")


def read_columns(file: TraceFile, source: Path, naming: Naming, side: Side = "client") -> MeasuredRun:
    """Return the run of a table.

    Raises:
        ConfigError: if a column is missing, with what the file has.
    """
    every = sorted({name for names in KNOWN.values() for name in names} | set(naming.columns.values()))
    table = read_table(file, required=(), optional=[*every, "status", "error"])
    have = table.columns
    chosen = {role: next((name for name in names if name in have), None) for role, names in KNOWN.items()}
    for role, name in naming.columns.items():
        if name not in have:
            raise ConfigError(
                f"{source} has no column {name!r} (columns.{role}); of those known here it has {_names(have)}"
            )
        chosen[role] = name
    _check_roles(chosen, source, _names(have))
    values = {role: _values(table, role, name, naming.unit) for role, name in chosen.items() if name}
    first_s, finish_s = _times(values)
    columns = Columns(
        sent_s=values["sent"],
        first_token_s=first_s,
        finish_s=finish_s,
        prompt_tokens=values["prompt"],
        output_tokens=values["output"],
        failed=_failed(table, naming.columns.get("failed")),
    )
    return measured_run(columns, name=source.stem, source=str(source), kind="table", side=side)


def _check_roles(chosen: Mapping[str, str | None], source: Path, names: str) -> None:
    missing = [role for role in ("sent", "prompt", "output") if chosen[role] is None]
    if chosen["ttft"] is None and chosen["first_token"] is None:
        missing.append("ttft")
    if all(chosen[role] is None for role in ("finish", "e2e", "decode", "gap")):
        missing.append("e2e")
    if missing:
        raise ConfigError(
            f"{source}: no column is known to hold {' or '.join(missing)} (it has {names}); name it: "
            f"columns='{{{missing[0]}: NAME}}', roles are {', '.join(ROLES)}"
        )


def _times(values: Mapping[str, Floats]) -> tuple[Floats, Floats]:
    """Return the times of the first and last tokens. Durations come before times: a finish may be that of the request.

    A TTFT is preferred for the same reason: its clock is the client's.
    """
    first_s = values["sent"] + values["ttft"] if "ttft" in values else values["first_token"]
    if "decode" in values:
        return first_s, first_s + values["decode"]
    if "e2e" in values:
        return first_s, values["sent"] + values["e2e"]
    if "finish" in values:
        return first_s, values["finish"]
    return first_s, first_s + values["gap"] * np.maximum(values["output"] - 1, 0)


def _values(table: RawTable, role: str, name: str, unit: str) -> Floats:
    """Return a column as seconds, or as it is if it holds no times; NaN where a cell has no number."""
    column = table.columns[name]
    if role in ("sent", "first_token", "finish") and holds_dates(column):
        times_ns, good, _ = dates_ns(table.text_column(name))
        # Dates lose their first digits before they become floats, which hold 16.
        return np.where(good, (times_ns - np.int64(EPOCH_NS)) / 1e9, np.nan)
    values = to_floats(column)
    with np.errstate(invalid="ignore"):
        values = np.where(np.abs(values) <= LARGEST, values, np.nan)
    if role in ("prompt", "output"):
        return values
    return values / PER_SECOND.get(name.rpartition("_")[2], PER_SECOND[unit])


def _failed(table: RawTable, named: str | None) -> Bools:
    failed = np.zeros(len(table.line), dtype=bool)
    for name in (named, "status", "error"):
        if name is not None and name in table.columns:
            cells = table.text_column(name).to_pylist()
            failed |= np.array([cell.strip().lower() not in GOOD_STATUS for cell in cells], dtype=bool)
    return failed


def _names(have: Mapping[str, object]) -> str:
    return ", ".join(list(have)[:20]) or "none"
