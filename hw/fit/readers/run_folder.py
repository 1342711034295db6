"""Run folders of hw.client, hw.replay and sim.replay: ``records.parquet``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from hw.fit.measured import Columns, MeasuredRun, Side, measured_run
from sim.errors import ConfigError

NEEDED = ("arrival_s", "admitted_s", "first_token_s", "finish_s", "prompt_tokens", "produced_tokens", "status")


def read_run_folder(folder: Path) -> MeasuredRun:
    """Return the run of a folder. A request of hw.client counts from its sending, which may be after its arrival.

    Raises:
        ConfigError: if the table cannot be read or lacks a column.
    """
    path = folder / "records.parquet"
    try:
        frame = pd.read_parquet(path)
    except Exception as error:  # pyarrow raises errors of many types for a file that it cannot read
        raise ConfigError(f"{path} is no Parquet file; run the command of that folder again") from error
    if missing := [name for name in NEEDED if name not in frame]:
        raise ConfigError(f"{path} lacks the column {missing[0]}; run the command of that folder again")
    by_client = (folder / "client.json").is_file()
    values = {}
    for name in NEEDED[:-1]:
        values[name] = pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64)
    seen = "client_ttft_s" in frame and not by_client  # simulated with a front end
    sent_s = values["admitted_s"] if by_client else values["arrival_s"]
    first_s, finish_s = values["first_token_s"], values["finish_s"]
    if seen:
        # The sending and the front end's way back are not columns, the two latencies of clients are.
        ttft_s, e2e_s = (pd.to_numeric(frame[f"client_{name}_s"], errors="coerce") for name in ("ttft", "e2e"))
        sent_s = first_s - ttft_s.to_numpy(dtype=np.float64)
        finish_s = sent_s + e2e_s.to_numpy(dtype=np.float64)
    columns = Columns(
        sent_s=sent_s,
        first_token_s=first_s,
        finish_s=finish_s,
        prompt_tokens=values["prompt_tokens"],
        output_tokens=values["produced_tokens"],
        failed=(frame["status"].astype(str) != "finished").to_numpy(dtype=bool),
    )
    kind = "hw.client" if by_client else "run folder"
    side: Side = "client" if by_client or seen else "engine"
    return measured_run(columns, name=folder.name, source=str(folder), kind=kind, side=side)
