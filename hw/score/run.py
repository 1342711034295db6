"""``python -m hw.score kind=...``: measures what the blocks of a real model are worth; ``--help`` lists the kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from hw.score.fit import write_fits
from hw.score.job import SCORES, Job, model_name
from hw.score.kv_bits import score_kv_bits
from hw.score.kv_compression.compare import FIGURES as KV_COMPRESSION_FIGURES
from hw.score.kv_compression.compare import score_kv_compression
from hw.score.losses import score_full_test, score_generation, score_perplexity, score_samples, score_table
from hw.score.offline_search import figures_path, score_offline_search
from hw.score.offline_search_page import page
from hw.score.orders import (
    score_attention,
    score_cosine,
    score_gsi,
    score_lis,
    score_one_shot,
    score_pdtrim,
    score_random,
)
from hw.score.pop import score_pop
from hw.score.pop_page import page as pop_page_of
from hw.score.report import scores_page
from hw.score.width import FIGURES as WIDTH_FIGURES
from hw.score.width import score_width
from sim.config import one_thread, run_command
from sim.cost.quality import QUALITIES
from sim.errors import ConfigError, nearest
from sim.json_file import read_json_object
from sim.paths import RESULTS
from sim.results.run_folder import write_text

MEASURED: dict[str, Callable[[Job], None]] = {
    "gsi": score_gsi,
    "one_shot": score_one_shot,
    "cosine": score_cosine,
    "lis": score_lis,
    "pdtrim": score_pdtrim,
    "attention": score_attention,
    "random": score_random,
    "table": score_table,
    "kv_bits": score_kv_bits,
    "pop": score_pop,
    "kv_compression": score_kv_compression,
    "width": score_width,
    "full_test": score_full_test,
    "samples": score_samples,
    "generation": score_generation,
    "perplexity": score_perplexity,
    "offline_search": score_offline_search,
}
"""The kinds that run the model."""


def fit_table(cfg: DictConfig) -> None:
    """Fit the quality table of a model and write the coefficients that ``sim.cost.quality`` reads."""
    print(write_fits(Path(cfg.out) if cfg.out else QUALITIES / f"{model_name(cfg)}.json"))


def report(cfg: DictConfig) -> None:
    """Write the page of scores."""
    page = Path(cfg.out) if cfg.out else RESULTS / "scores" / "index.md"
    write_text(page, scores_page(model_name(cfg), SCORES, QUALITIES))


def offline_page(cfg: DictConfig) -> None:
    """Write the page of the offline searches again, next to its figures."""
    path = figures_path(cfg, model_name(cfg))
    figures = read_json_object(path, ConfigError, "run python -m hw.score kind=offline_search first, or set out=")
    write_text(path.parent / "index.md", page(figures))


def pop_page(cfg: DictConfig) -> None:
    """Write the page of POP from the losses in conf/quality/kv_only."""
    path = QUALITIES / "kv_only" / f"{model_name(cfg)}.json"
    figures = read_json_object(path, ConfigError, "run python -m hw.score kind=pop first")
    write_text(Path(cfg.out) if cfg.out else RESULTS / "pop" / "index.md", pop_page_of(figures))


def compression_page(cfg: DictConfig) -> None:
    """Write the page and the picture of compressed KV from the losses in conf/quality/kv_compression."""
    KV_COMPRESSION_FIGURES.write_page(cfg.out, model_name(cfg))


def width_page(cfg: DictConfig) -> None:
    """Write the page and the picture of cut FFN blocks from the losses in conf/quality/ffn_width."""
    WIDTH_FIGURES.write_page(cfg.out, model_name(cfg))


FROM_FILES: dict[str, Callable[[DictConfig], None]] = {
    "fit": fit_table,
    "report": report,
    "offline_page": offline_page,
    "pop_page": pop_page,
    "kv_compression_page": compression_page,
    "width_page": width_page,
}
"""The kinds that only need files of the others."""


def run_score(cfg: DictConfig) -> None:
    """Run one kind.

    Raises:
        ConfigError: for a missing or an unknown kind.
    """
    kind = "" if OmegaConf.is_missing(cfg, "kind") else str(cfg.kind)
    if kind in FROM_FILES:
        FROM_FILES[kind](cfg)
    elif kind in MEASURED:
        torch.set_num_threads(1)
        MEASURED[kind](Job(cfg))
    else:
        raise ConfigError(f"unknown kind {kind!r}; {nearest(kind, [*MEASURED, *FROM_FILES])}")


def main() -> None:
    """Run ``python -m hw.score``."""
    one_thread()
    run_command(run_score, "score")
