"""Step: throughput and time per token next to Transformers' own, with the same weights, prompts and machine."""

from __future__ import annotations

import traceback
from dataclasses import asdict
from typing import Any

from hw.checkup.findings import Findings
from hw.checkup.setup import Setup
from hw.elastic.checkpoint import DTYPES, checkpoint_of, config_of, load_checkpoint, pick_device
from hw.elastic.random_weights import random_model, seed_of
from hw.validate.transformers_engines import ENGINES, OURS, compare

AMOUNTS = {"gpu": ((1, 8, 32), 512, 32), "cpu": ((1, 8, 32), 32, 16), "short": ((1, 2), 8, 4)}
"""Batches, and tokens of each prompt and of each answer."""
ROUNDS = 2
LEAST_RATIO = {"gpu": 0.9, "cpu": 0.9, "short": 0.0}
"""Of this project's throughput over that of the better peer."""


def run(setup: Setup, findings: Findings) -> None:
    """Compare with ``generate`` and with continuous batching, batch by batch."""
    model = _model(setup)
    batches, prompt_tokens, output_tokens = AMOUNTS[setup.size]
    rows: list[dict[str, Any]] = []
    for batch in batches:
        engines = list(ENGINES)
        while engines:
            try:
                found = compare(
                    model,
                    setup.device,
                    batches=(batch,),
                    prompt_tokens=prompt_tokens,
                    output_tokens=output_tokens,
                    rounds=ROUNDS,
                    seed=setup.seed,
                    engines=engines,
                )
                break
            except Exception:  # a peer that fails here is left out, and the step says so
                if len(engines) < len(ENGINES):
                    raise
                traceback.print_exc()
                findings.figure("left out", {"engine": engines.pop(), "traceback": traceback.format_exc()})
        rows += [asdict(row) for row in found]
        findings.figure("rows", rows)
        findings.figure("tokens_per_s", {f"{row['engine']}, {row['batch']}": row["tokens_per_s"] for row in rows})
        speed = {row.engine: row.tokens_per_s for row in found}
        ratio = speed[OURS] / max(value for name, value in speed.items() if name != OURS)
        least = LEAST_RATIO[setup.size]
        findings.check(f"throughput over the better peer's, batch {batch}", ratio >= least, ratio, f"at least {least}")


def _model(setup: Setup) -> Any:
    """Return the model of Transformers, with the weights that every other step has."""
    dtype = "float32" if setup.model.weight_dtype_bytes == 4 else "bfloat16"
    cfg = setup.config()
    checkpoint = checkpoint_of(cfg.model, setup.checkpoint, setup.model.name)
    seed = seed_of(checkpoint)
    if seed is None:
        return load_checkpoint(checkpoint, dtype=dtype, device=setup.device)[0]
    return random_model(
        setup.model, seed=seed, dtype=DTYPES[dtype], place=pick_device(setup.device), config_path=config_of(cfg.model)
    )
