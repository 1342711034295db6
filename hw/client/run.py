"""From the answers to a run folder: ``python -m hw.client``."""

from __future__ import annotations

import asyncio
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from hw.client.payload import Payloads
from hw.client.replayer import Answer, Replayer
from hw.client.settings import ClientSettings
from hw.client.target import target_of
from sim.config import build, run_command
from sim.config.failures import interrupts_held_back
from sim.engine.protocol import sessions_of
from sim.errors import ConfigError
from sim.progress import progress
from sim.replay.loop import requests_of
from sim.replay.run import about, build_trace, turn_columns
from sim.results.metrics import Slo, records_frame, summarise, transitions_frame
from sim.results.records import Iterations, Records, Status, TokenGaps, Transitions
from sim.results.report import print_summary
from sim.results.run_folder import begin_run, provenance, write_begun, write_json, write_parquet

MOST_DIFFERENCE = 0.10
"""Warn if the server counts more or fewer prompt tokens than the trace by more than this share."""
MOST_REASONS = 20
"""How many reasons for failures are kept; the most frequent come first."""
SHOWN_REASONS = 5


def records_of(answers: Sequence[Answer]) -> Records:
    """Return one row per request.

    Tokens of prompts and outputs are those of the server's ``usage``; without it, the prompt of the trace and the
    number of pieces. A failed request counts as rejected.
    """

    def floats(values: Sequence[float]) -> Any:
        return np.array(values, dtype=np.float64)

    def ints(values: Sequence[int]) -> Any:
        return np.array(values, dtype=np.int64)

    lines = [a.timeline for a in answers]
    prompts = [line.prompt_tokens if line is not None else None for line in lines]
    unknown = np.full(len(answers), np.nan)
    return Records(
        arrival_s=floats([a.arrival_s for a in answers]),
        prompt_tokens=ints([p or a.request.prompt_tokens for p, a in zip(prompts, answers, strict=True)]),
        output_tokens=ints([a.request.output_tokens for a in answers]),
        produced_tokens=ints([line.tokens if line is not None else 0 for line in lines]),
        admitted_s=floats([a.sent_s for a in answers]),
        first_token_s=floats([line.piece_s[0] if line is not None else math.nan for line in lines]),
        finish_s=floats([line.piece_s[-1] if line is not None else math.nan for line in lines]),
        preemptions=ints([0] * len(answers)),
        status=ints([int(_status(a)) for a in answers]),
        kept_params_share=unknown,
        quality_nll=unknown,
        cached_tokens=ints([0] * len(answers)),
    )


def _status(answer: Answer) -> Status:
    if answer.timeline is not None:
        return Status.FINISHED
    if answer.error is not None:
        return Status.REJECTED
    return Status.WAITING if math.isnan(answer.sent_s) else Status.RUNNING  # interrupted


def gaps_of(answers: Sequence[Answer]) -> TokenGaps:
    """Return the gaps between tokens, over all complete answers."""
    gaps = [gap for a in answers if a.timeline is not None for gap in a.timeline.gaps()]
    itl_s, place = np.unique(np.array([seconds for seconds, _ in gaps], dtype=np.float64), return_inverse=True)
    count = np.zeros(len(itl_s), dtype=np.int64)
    np.add.at(count, place, [tokens for _, tokens in gaps])
    return TokenGaps(itl_s=itl_s, count=count)


def summary_of(answers: Sequence[Answer], slo: Slo, *, not_arrived: int = 0) -> dict[str, Any]:
    """Return the summary of a replay; figures that only a server knows are 0 or None."""
    records = records_of(answers)
    ends = records.finish_s[np.isfinite(records.finish_s)]
    # A client sees no iterations. One row that spans the run gives the summary its makespan.
    span = np.array([ends.max()]) if len(ends) else np.array([])
    zeros = np.zeros(len(span), dtype=np.int64)
    spanning = Iterations(
        start_s=np.zeros(len(span)),
        end_s=span,
        prefill_tokens=zeros,
        decode_requests=zeros,
        running=zeros,
        waiting=zeros,
        kv_used_share=np.zeros(len(span)),
        preemptions=zeros,
        extrapolated=np.zeros(len(span), dtype=np.bool_),
    )
    summary = summarise(records, spanning, gaps_of(answers), slo, not_arrived=not_arrived)
    return summary | {"iterations": 0, "interrupted": False}


def client_figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return what only a client knows, the content of ``client.json``.

    errors: reason and number of requests, the most frequent first. late_p99_s: sending minus arrival.
    itl: ``per token`` if the server said how many tokens there were, ``inter-chunk`` if not, ``mixed`` for both.
    inter_chunk_answers: complete answers whose gaps are between pieces of an unknown number of tokens.
    prompt_tokens_of_usage, prompt_tokens_of_trace: of the answers whose usage states the first.
    """
    complete = [(a, a.timeline) for a in answers if a.timeline is not None]
    unknown = sum(not line.per_token for _, line in complete)
    itl = None if not complete else {0: "per token", len(complete): "inter-chunk"}.get(unknown, "mixed")
    counted = [(line.prompt_tokens, a.request.prompt_tokens) for a, line in complete if line.prompt_tokens is not None]
    late = [a.sent_s - a.arrival_s for a in answers if not math.isnan(a.sent_s)]
    reasons = Counter(a.error for a in answers if a.error is not None)
    return {
        "failed": sum(reasons.values()),
        "errors": [{"reason": reason, "requests": count} for reason, count in reasons.most_common(MOST_REASONS)],
        "retried": sum(a.retries for a in answers),
        "late_p99_s": float(np.quantile(late, 0.99)) if late else None,
        "itl": itl,
        "inter_chunk_answers": unknown,
        "prompt_tokens_of_usage": sum(usage for usage, _ in counted),
        "prompt_tokens_of_trace": sum(trace for _, trace in counted),
    }


def warnings_of(figures: dict[str, Any], settings: ClientSettings) -> list[str]:
    """Return what a reader of the figures must know."""
    found = []
    if figures["inter_chunk_answers"]:
        found.append(
            f"the server did not say how many tokens each piece of {figures['inter_chunk_answers']} answers has: "
            "their ITL is inter-chunk, the gap between two pieces"
        )
    usage, trace = figures["prompt_tokens_of_usage"], figures["prompt_tokens_of_trace"]
    if trace and abs(usage / trace - 1) > MOST_DIFFERENCE:
        message = (
            f"the server counted {usage:,} prompt tokens, the trace has {trace:,} ({usage / trace - 1:+.0%}); "
            "the records state what the server counted"
        )
        if settings.text is not None:
            fitting = settings.characters_per_token * trace / max(usage, 1)
            message += f"; client.characters_per_token={fitting:.2g} would fit this text better"
        found.append(message)
    return found


def run_client(cfg: DictConfig) -> int:
    """Replay against the server, write the run folder, print the table; return the exit status."""
    settings = ClientSettings(**{str(key): value for key, value in cfg.client.items()})
    settings.check()
    target = target_of(settings.url, chat=settings.chat, key_variable=settings.api_key)
    slo, model = build(cfg.slo), build(cfg.model)
    payloads = Payloads(settings, model.name, model.vocab_size, seed=cfg.seed)
    replayer = Replayer(settings, target, payloads)
    folder, trace = Path(HydraConfig.get().runtime.output_dir), build_trace(cfg)
    sessions = sessions_of(trace)
    if sessions is not None and settings.loop == "closed":
        raise ConfigError(
            f"client.loop=closed sends single requests, but {trace.name} has sessions, which say who waits for whom; "
            "leave client.loop=open, and choose the users with trace=chat_users or workload=closed_loop"
        )
    made_by = {**provenance(cfg.seed), "trace": about(trace)}
    begin_run(folder, cfg, made_by)
    interrupted = False
    try:
        with progress("sending", len(trace), "requests") as report:
            asyncio.run(replayer.run(requests_of(trace), report, sessions))
    except KeyboardInterrupt:
        interrupted = True
    with interrupts_held_back():
        answers = replayer.answers
        summary = summary_of(answers, slo, not_arrived=len(trace) - len(answers)) | {"interrupted": interrupted}
        figures = {"url": target.url, "loop": settings.loop, **client_figures(answers)}
        console = Console()
        try:
            write_begun(folder, cfg, made_by)
            order = np.array([answer.request.request_id for answer in answers], dtype=np.int64)
            frame = records_frame(records_of(answers), slo).assign(**turn_columns(trace, order))
            write_parquet(folder / "records.parquet", frame)
            write_parquet(folder / "transitions.parquet", transitions_frame(no_transitions()))
            write_json(folder / "client.json", figures)
            write_json(folder / "summary.json", summary)  # last: a folder with a summary is complete
        finally:  # a full disk loses the files, not the figures
            print_summary(summary, f"{len(answers):,} requests to {target.base}", console)
            _print_problems(figures, warnings_of(figures, settings), len(answers))
        console.print(f"files: {folder}", markup=False, highlight=False, soft_wrap=True)
    if interrupted:
        print(f"interrupted: kept the records of {len(answers):,} of {len(trace):,} requests", file=sys.stderr)
        return 130
    if not summary["finished"]:
        print(f"error: none of {len(answers):,} requests finished", file=sys.stderr)
        return 1
    return 0


def _print_problems(figures: dict[str, Any], warnings: Sequence[str], requests: int) -> None:
    """Print warnings, and each reason for failures once, to stderr."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    errors = figures["errors"]
    for error in errors[:SHOWN_REASONS]:
        print(f"failed: {error['requests']:,} of {requests:,} requests: {error['reason']}", file=sys.stderr)
    if len(errors) > SHOWN_REASONS:
        print(f"failed: others for other reasons; client.json lists {len(errors)}", file=sys.stderr)


def no_transitions() -> Transitions:
    """Return an empty table: a client sees no plan changes."""
    empty_int, empty_float = np.array([], dtype=np.int64), np.array([], dtype=np.float64)
    return Transitions(
        time_s=empty_float,
        from_plan=(),
        to_plan=(),
        bytes_in=empty_int,
        bytes_freed=empty_int,
        ready_s=empty_float,
        preempted=empty_int,
        recomputed_tokens=empty_int,
        kv_blocks_before=empty_int,
        kv_blocks_after=empty_int,
    )


def main() -> None:
    """Run ``python -m hw.client``."""
    run_command(run_client, "client")
