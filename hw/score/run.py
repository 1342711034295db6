"""``python -m hw.score kind=...``: measure on a real model what its blocks are worth; ``--help`` lists the kinds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from hw.elastic.checkpoint import SMOLLM2, SMOLLM2_NOTE, load_checkpoint
from hw.elastic.model import ElasticModel
from hw.score.full_test import agreement, chosen_plans, greedy_tokens, measure_chosen, spread, uniform
from hw.score.importance import (
    Round,
    attention_mass,
    block_cosines,
    block_number,
    gsi,
    gsi_round_naive,
    layer_importance,
    one_shot,
    random_order,
    redundancy_order,
    redundancy_sets,
    single_removals,
    two_stage_search,
)
from hw.score.nll import block_name, measure
from hw.score.quality_table import measure_table, read_orders, read_searches
from hw.score.report import SIZES, scores_page
from hw.score.text import Windows, read_windows
from sim.config import one_thread, run_command
from sim.cost.plan import dense_plan
from sim.cost.plan_json import plan_to_json
from sim.cost.quality import read_table
from sim.errors import ConfigError, nearest
from sim.paths import REPOSITORY, RESULTS
from sim.results.run_folder import commit, write_json, write_text

SCORES = REPOSITORY / "conf" / "score"
TABLES = REPOSITORY / "conf" / "quality"


@dataclass(kw_only=True)
class ModelConfig:
    """path: ``smollm2_135m``, a local folder or a hub id. name: what files are called after; the last part of the path
    when empty. dtype: float32, bfloat16 or float16. device: auto, cpu or cuda."""

    path: str = SMOLLM2
    name: str = ""
    dtype: str = "bfloat16"
    device: str = "auto"


@dataclass(kw_only=True)
class TextConfig:
    """A text and what is taken of it; see ``hw.score.text.read_windows``."""

    path: str = ""
    tokens: int | None = None
    window: int = 256
    seed: int | None = None
    keep_newlines: bool = False


@dataclass(kw_only=True)
class GsiConfig:
    """removals: how many blocks to remove; null removes all. compare_every: the naive algorithm runs the first round
    and every so-manieth after it too, from the same state, and is timed; null runs it nowhere."""

    removals: int | None = None
    compare_every: int | None = None


@dataclass(kw_only=True)
class LisConfig:
    """bits: of the swapped copies. tokens: calibration tokens; every step runs all remaining layers on them."""

    bits: int = 4
    tokens: int = 128


@dataclass(kw_only=True)
class PdtrimConfig:
    """threshold: cosine that splits the blocks. sizes: removals in prefill and in decode, a pair a search of so many
    steps. removals: length of the order by redundancy that is measured anew after every removal."""

    threshold: float = 0.95
    sizes: list[list[int]] = field(default_factory=lambda: [[2, 6], [4, 4], [4, 8], [6, 6], [8, 8]])
    steps: int = 40
    tokens: int = 512
    removals: int = 40


@dataclass(kw_only=True)
class AttentionConfig:
    """The lengths of the first and the last run, and the share of attention from which a layer counts as local."""

    first_tokens: int = 4
    last_tokens: int = 32
    threshold: float = 0.9


@dataclass(kw_only=True)
class GenerationConfig:
    """How many plans of the quality table, spread over those below so many times dense, decode how many tokens."""

    plans: int = 40
    times_dense: float = 4.0
    prompt_tokens: int = 64
    tokens: int = 64


@dataclass(kw_only=True)
class ScoreConfig:
    """What a measurement is told. kind: what to measure. out: the file to write; empty names it by model and kind.

    full_plans: how many plans the whole test text is spent on; null takes all that ``chosen_plans`` names.
    """

    kind: str
    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: TextConfig = field(default_factory=TextConfig)
    test: TextConfig = field(default_factory=TextConfig)
    gsi: GsiConfig = field(default_factory=GsiConfig)
    lis: LisConfig = field(default_factory=LisConfig)
    pdtrim: PdtrimConfig = field(default_factory=PdtrimConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    random_orders: int = 3
    full_plans: int | None = None
    out: str = ""
    seed: int = 0


ConfigStore.instance().store(name="score_schema", node=ScoreConfig)


class Job:
    """One measurement: the model, the text, the file to write, and what is said meanwhile."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.console = Console(stderr=True, highlight=False)
        self.name = model_name(cfg)
        model, self.tokenizer = load_checkpoint(cfg.model.path, dtype=cfg.model.dtype, device=cfg.model.device)
        self.elastic = ElasticModel(model, name=self.name)
        self.rng = np.random.default_rng(cfg.seed)
        self._started = time.perf_counter()
        self._started_cpu = time.process_time()

    def text(self, which: str, tokens: int | None = None) -> Windows:
        """Return the windows of the calibration or the test text."""
        text = self.cfg[which]
        return read_windows(
            text.path,
            self.tokenizer,
            tokens=tokens or text.tokens,
            window=text.window,
            seed=text.seed,
            keep_newlines=text.keep_newlines,
        )

    def path(self, kind: str) -> Path:
        """Return the file of a score of this model; another calibration sample has one of its own."""
        tokens, seed = self.cfg.calibration.tokens, self.cfg.calibration.seed
        sampled = kind in ("gsi", "one_shot") and (tokens, seed) != (1024, 0)
        sample = f"_{tokens}_seed{seed}" if sampled else ""
        return Path(self.cfg.out) if self.cfg.out else SCORES / f"{self.name}_{kind}{sample}.json"

    def described(self, windows: Windows | None) -> dict[str, Any]:
        """Return what a score was measured on."""
        cfg = self.cfg.model
        return {
            "model": self.name,
            "weights": SMOLLM2_NOTE if cfg.path == SMOLLM2 else cfg.path,
            "dtype": cfg.dtype,
            "device": str(self.elastic.device),
            "text": windows.source if windows is not None else None,
            "seed": self.cfg.seed,
        }

    def write(self, path: Path, windows: Windows | None, source: str, result: Mapping[str, Any]) -> None:
        """Write a score with where it comes from."""
        spent = {
            "seconds": round(time.perf_counter() - self._started, 1),
            "cpu_seconds": round(time.process_time() - self._started_cpu, 1),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
        }
        write_json(path, {**self.described(windows), "source": source, **spent, **result})
        self.console.print(f"wrote {path}", soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line of progress."""
        self.console.print(text, soft_wrap=True)


def model_name(cfg: DictConfig) -> str:
    """Return what the files of a model are called after."""
    name: str = cfg.model.name or Path(cfg.model.path).name
    return name.lower().replace(".", "_").replace("-", "_")


def _gsi(job: Job) -> None:
    windows = job.text("calibration")
    path = job.path("gsi")
    settings = job.described(windows)
    done: list[Round] = []
    naive: list[dict[str, Any]] = []
    earlier_s = 0.0
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        if all(old.get(key) == value for key, value in settings.items()):
            done, naive = [Round.from_json(value) for value in old["rounds"]], old["naive_rounds"]
            earlier_s = old["cpu_seconds"]
            job.say(f"going on from round {len(done)} in {path}")
        else:
            different = sorted(key for key, value in settings.items() if old.get(key) != value)
            raise ConfigError(
                f"{path} holds the order of another run: {', '.join(different)} differ; "
                "remove the file, or set out= to another"
            )
    blocks = 2 * job.elastic.spec.num_layers
    wanted = min(blocks, job.cfg.gsi.removals or blocks)
    windows_tokens = windows.tokens
    dense = measure(job.elastic, dense_plan(job.elastic.spec), windows_tokens).mean
    started = time.perf_counter()

    def save(rounds: list[Round]) -> None:
        spent = time.perf_counter() - started
        last = rounds[-1]
        # A round with k candidates runs about k / 2 blocks for each, so what is left goes with the sum of squares.
        work = [(blocks - index) ** 2 for index in range(wanted)]
        left_s = spent * sum(work[len(rounds) :]) / max(sum(work[len(done) : len(rounds)]), 1)
        job.say(
            f"round {len(rounds)}/{wanted}: {block_name(last.removed)} leaves {last.nll:.4f} nats a token; "
            f"{len(last.abandoned)} of {len(last.candidates)} abandoned; {last.cpu_s:.1f} CPU s, about "
            f"{left_s / 60:.1f} min left"
        )
        if job.cfg.gsi.compare_every and (len(rounds) - 1) % job.cfg.gsi.compare_every == 0:
            naive.append(_naive_round(job, windows_tokens, rounds))
            job.say(json.dumps(naive[-1]))
        result = {
            "dense_nll": dense,
            "order": [block_name(r.removed) for r in rounds],
            "nll": [r.nll for r in rounds],
            "rounds": [r.to_json() for r in rounds],
            "naive_rounds": naive,
            "earlier_cpu_seconds": earlier_s,
        }
        job.write(path, windows, "RAP (arXiv 2505.17138), Greedy Sequential Importance", result)

    gsi(job.elastic, windows_tokens, done=done, removals=wanted, on_round=save)


def _naive_round(job: Job, windows: Tensor, rounds: list[Round]) -> dict[str, Any]:
    started = time.process_time()
    found = gsi_round_naive(job.elastic, windows, [r.removed for r in rounds[:-1]])
    spent = time.process_time() - started
    removed = min(found, key=lambda block: (found[block], block))
    return {
        "round": len(rounds),
        "candidates": len(found),
        "naive_cpu_s": spent,
        "exact_cpu_s": rounds[-1].cpu_s,
        "naive_removes": block_name(removed),
        "exact_removes": block_name(rounds[-1].removed),
        "naive_nll": found[removed],
        "naive_nll_of_exact": found[rounds[-1].removed],
    }


def _read_order(job: Job, kind: str) -> list[int]:
    path = SCORES / f"{job.name}_{kind}.json"
    if not path.is_file():
        raise ConfigError(f"no {path.name} in conf/score; run python -m hw.score kind={kind.split('_w')[0]} first")
    return [block_number(name) for name in json.loads(path.read_text(encoding="utf-8"))["order"]]


def _one_shot(job: Job) -> None:
    windows = job.text("calibration")
    found = single_removals(job.elastic, windows.tokens)
    order = one_shot(found)
    result = {"order": [block_name(b) for b in order], "nll": [found[b] for b in order]}
    job.write(job.path("one_shot"), windows, "RAP (arXiv 2505.17138), one-shot ranking", result)


def _cosine(job: Job) -> None:
    windows = job.text("calibration")
    cosines = block_cosines(job.elastic, windows.tokens)
    pruning, distillation = redundancy_sets(cosines, job.cfg.pdtrim.threshold)
    order = pruning + distillation
    result = {
        "order": [block_name(b) for b in order],
        "cosine": [cosines[b] for b in order],
        "threshold": job.cfg.pdtrim.threshold,
        "pruning_set": [block_name(b) for b in pruning],
        "distillation_set": [block_name(b) for b in distillation],
    }
    source = "ShortGPT (arXiv 2403.03853), Block Influence, of half layers; PDTrim (arXiv 2509.04467), redundancy"
    job.write(job.path("cosine"), windows, source, result)


def _lis(job: Job) -> None:
    windows = job.text("calibration", job.cfg.lis.tokens)
    bits = job.cfg.lis.bits
    found = layer_importance(
        job.elastic, windows.tokens, bits, lambda step, steps: job.say(f"layer {step} of {steps} chosen")
    )
    result = {"bits": bits, "order": found.order, "lts": found.lts, "lrs": found.lrs, "mds": found.mds}
    result["lis"] = found.lis
    source = "MorphServe (arXiv 2506.02006), LIS = 0.25 LTS + 0.25 LRS + 0.5 MDS"
    job.write(job.path(f"lis_w{bits}"), windows, source, result)


def _pdtrim(job: Job) -> None:
    windows = job.text("calibration", job.cfg.pdtrim.tokens)
    pool = _read_order(job, "cosine")
    searches = []
    for prefill, decode in job.cfg.pdtrim.sizes:
        found = two_stage_search(
            job.elastic,
            windows.tokens,
            pool,
            prefill_removals=prefill,
            decode_removals=decode,
            steps=job.cfg.pdtrim.steps,
            rng=job.rng,
        )
        searches.append(
            {
                "prefill": [block_name(b) for b in found.prefill],
                "decode": [block_name(b) for b in found.decode],
                "decode_nll": found.nll,
                "start_decode_nll": found.start_nll,
                "evaluations": found.evaluations,
            }
        )
        job.say(f"{prefill} in prefill, {decode} in decode: {found.start_nll:.4f} -> {found.nll:.4f} nats a token")
    order = redundancy_order(job.elastic, windows.tokens, job.cfg.pdtrim.removals)
    source = "PDTrim (arXiv 2509.04467), iterative removal and nested search; schedule and objective are ours"
    result = {"order": [block_name(b) for b in order], "steps": job.cfg.pdtrim.steps, "searches": searches}
    job.write(job.path("pdtrim"), windows, source, result)


def _attention(job: Job) -> None:
    windows = job.text("calibration")
    cfg = job.cfg.attention
    shares = attention_mass(job.elastic, windows.tokens, first_tokens=cfg.first_tokens, last_tokens=cfg.last_tokens)
    result = {
        "first_tokens": cfg.first_tokens,
        "last_tokens": cfg.last_tokens,
        "threshold": cfg.threshold,
        "share": shares,
        "order": sorted(range(len(shares)), key=lambda layer: (-shares[layer], layer)),
        "local_layers": [layer for layer, share in enumerate(shares) if share >= cfg.threshold],
    }
    job.write(job.path("attention"), windows, "PDTrim (arXiv 2509.04467), token-aware cache pruning", result)


def _random(job: Job) -> None:
    blocks = 2 * job.elastic.spec.num_layers
    orders = [
        [block_name(b) for b in random_order(blocks, job.cfg.seed + index)] for index in range(job.cfg.random_orders)
    ]
    job.write(job.path("random"), None, "uniform permutations, one seed after the other", {"orders": orders})


def _table(job: Job) -> None:
    path = Path(job.cfg.out) if job.cfg.out else TABLES / f"{job.name}.json"
    calibration, test = job.text("calibration"), job.text("test")
    described = {**job.described(calibration), "test_text": test.source}
    measure_table(job.elastic, calibration.tokens, test.tokens, path, described, SCORES, seed=job.cfg.seed, say=job.say)


def _full_test(job: Job) -> None:
    windows = job.text("test")
    path = job.path("full_test")
    done: list[dict[str, Any]] = []
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        described = job.described(windows)
        if different := sorted(key for key, value in described.items() if old.get(key) != value):
            raise ConfigError(f"{path} was measured otherwise: {', '.join(different)} differ; remove it, or set out=")
        done = old["plans"]
    plans = chosen_plans(job.elastic.spec, *read_orders(SCORES, job.name), read_searches(SCORES, job.name))
    plans = plans[: job.cfg.full_plans]

    def save(rows: list[dict[str, Any]]) -> None:
        row = rows[-1]
        job.say(f"{len(rows)} of {len(plans)}: {row['name']}, perplexity {np.exp(row['nll']):.3f}, {row['cpu_s']} s")
        job.write(path, windows, "perplexity of all but a window's first token", {"plans": rows})

    measure_chosen(job.elastic, windows.tokens, plans, done, save)


def _samples(job: Job) -> None:
    windows = job.text("test")
    path, spec = job.path("samples"), job.elastic.spec
    described = job.described(windows)
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    same = all(old.get(key) == value for key, value in described.items())
    known = {json.dumps(sorted(r["drop"])): r for r in old.get("rows", [])} if same else {}
    rows: list[dict[str, Any]] = []
    files = [file for kind in ("gsi", "one_shot") for file in sorted(SCORES.glob(f"{job.name}_{kind}_*_seed*.json"))]
    if not files:
        raise ConfigError(
            f"no orders of other calibration samples of {job.name} in conf/score; make some: "
            "python -m hw.score kind=gsi,one_shot calibration.tokens=256 calibration.seed=0,1,2 --multirun"
        )
    for file in files:
        score = json.loads(file.read_text(encoding="utf-8"))
        for size in (size for size in SIZES if size <= len(score["order"])):
            drop = score["order"][:size]
            row = known.get(json.dumps(sorted(drop)))
            if row is None:
                plan = uniform(spec, [block_number(b) for b in drop])
                row = {"drop": drop, "nll": measure(job.elastic, plan, windows.tokens).mean}
                known[json.dumps(sorted(drop))] = row
            kind = "gsi" if "_gsi" in file.stem else "one_shot"
            sample = f"{score['text']['tokens']} tokens {score['text']['windows']}"
            rows.append({"order": kind, "sample": sample, "removals": size, "drop": drop, "nll": row["nll"]})
            job.say(f"{file.stem}, {size} removals: perplexity {np.exp(row['nll']):.2f}")
            job.write(path, windows, "the same sizes of orders from several calibration samples", {"rows": rows})


def _generation(job: Job) -> None:
    cfg = job.cfg.generation
    table = read_table(TABLES / f"{job.name}.json")
    windows = job.text("test")
    prompts = windows.tokens[:, : cfg.prompt_tokens]
    dense = greedy_tokens(job.elastic, dense_plan(job.elastic.spec), prompts, cfg.tokens)
    rows: list[dict[str, Any]] = []
    for index in spread(table.loss.tolist(), cfg.plans, float(np.log(cfg.times_dense))):
        plan = table.plans[index]
        found = agreement(dense, greedy_tokens(job.elastic, plan, prompts, cfg.tokens))
        rows.append(
            {
                "plan": plan_to_json(plan),
                "chosen_as": list(table.kinds[index]),
                "loss": float(table.loss[index]),
                "share_equal": found.share,
                "tokens_before_parting": found.first,
            }
        )
        job.say(f"{len(rows)} of {cfg.plans}: loss {rows[-1]['loss']:.3f}, {found.share:.2f} of tokens equal")
    result = {"prompt_tokens": cfg.prompt_tokens, "decoded_tokens": cfg.tokens, "prompts": len(prompts), "plans": rows}
    job.write(job.path("generation"), windows, "greedy decoding beside dense, place by place", result)


def _perplexity(job: Job) -> None:
    windows = job.text("test")
    found = measure(job.elastic, dense_plan(job.elastic.spec), windows.tokens)
    result = {"nll": found.mean, "perplexity": float(np.exp(found.mean)), "predicted_tokens": found.tokens}
    job.write(job.path("perplexity"), windows, "perplexity of the dense model; all but a window's first token", result)
    job.say(f"perplexity {result['perplexity']:.3f}")


KINDS: dict[str, Callable[[Job], None]] = {
    "gsi": _gsi,
    "one_shot": _one_shot,
    "cosine": _cosine,
    "lis": _lis,
    "pdtrim": _pdtrim,
    "attention": _attention,
    "random": _random,
    "table": _table,
    "full_test": _full_test,
    "samples": _samples,
    "generation": _generation,
    "perplexity": _perplexity,
}


def _run(cfg: DictConfig) -> None:
    if not OmegaConf.is_missing(cfg, "kind") and cfg.kind == "report":
        page = Path(cfg.out) if cfg.out else RESULTS / "scores" / "index.md"
        write_text(page, scores_page(model_name(cfg), SCORES, TABLES))
        return
    if OmegaConf.is_missing(cfg, "kind") or cfg.kind not in KINDS:
        given = "" if OmegaConf.is_missing(cfg, "kind") else cfg.kind
        raise ConfigError(f"kind {given!r} is no measurement; {nearest(given, [*KINDS, 'report'])}")
    torch.set_num_threads(1)
    KINDS[cfg.kind](Job(cfg))


def main() -> None:
    """Run ``python -m hw.score``."""
    one_thread()
    run_command(_run, "score")
