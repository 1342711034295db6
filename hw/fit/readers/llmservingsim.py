"""LLMServingSim's benchmark runs: ``requests.jsonl.gz`` and ``meta.json``, which states the engine's settings."""

from __future__ import annotations

from pathlib import Path

from hw.fit.measured import Columns, MeasuredRun, measured_run, stating
from hw.validate import fidelity


def read_llmservingsim(folder: Path) -> MeasuredRun:
    """Return the run of a folder with the settings that it states.

    Its times of tokens are the engine's, which it takes before the front end sees them; arrivals are the client's, on a
    clock that is aligned at the request that reached the queue the fastest.
    """
    real = fidelity.read_run(folder)
    columns = Columns(
        sent_s=real.arrival_s,
        first_token_s=real.first_token_s,
        finish_s=real.finish_s,
        prompt_tokens=real.prompt_tokens.astype(float),
        output_tokens=real.produced_tokens.astype(float),
    )
    run = measured_run(columns, name=folder.name, source=str(folder), kind="LLMServingSim", side="engine")
    return stating(run, real.config, real.kv_blocks, real.model, real.device)
