"""``python -m agents.knobs``: what each way to free memory is worth, at equal bytes and by load.

A **knob** is one way to free memory; its **steps** are plans that free more and more:

    dropped blocks   the first n blocks of the model's order (RAP, BlockPruner)
    W4               the first n layers at 4 bits (MorphServe)
    KV bits          KV at 8 bits, and at 4 bits in the first n layers (KIVI)
    narrow FFN       FFN blocks at 7/8, then 3/4, then 5/8 of their channels, the last n layers first (AmoebaLLM)
    hidden states    in place of keys and values, which decodes compute again (Apt-Serve; only models without GQA)
    compressed KV    n percent of the bytes of a prompt's KV stay (Ada-KV, or ThinK where that loses less)
    streamed         n layers, at equal distances, cross the host link in every iteration (Oneiros)

``Plan.compute_bits`` is none of them: it saves time and frees no byte (``python -m sim.compare
experiment=compute_bits``).

Three tables. **At equal bytes**: for a number of bytes, the first step of each knob that frees at least as many, what
it loses, and how long a decode iteration takes, by formula. **All knobs together**: the combination that loses least
while it frees as many bytes and its iterations take no longer than a bound (``agents.evaluation.knob_search``). **By
load**: requests are served with each step, which never changes, under a constant budget; of each knob, and of all, the
best step on validation windows is reported on test windows, next to ``policy=least_loss``, which chooses among all
combinations at every decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import product
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from agents.envs.prune_loads import Split
from agents.envs.reward import kept_quality
from agents.envs.serve import ServeSetting
from agents.envs.serve_windows import Window
from agents.evaluation.knob_search import adapting, combined
from agents.evaluation.knobs_page import by_load_table, equal_bytes_table, page, plot_steps
from sim.config import one_thread, run_command
from sim.cost.ffn_width import FFN_WIDTHS
from sim.cost.kv_format import stored_kv_bytes
from sim.cost.memory import weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KVCompression, Plan, dense_plan, drop, with_mask
from sim.cost.streaming import LEAST_STREAMED, even_layers
from sim.engine.plan_graph import PlanGraph
from sim.engine.server_spec import ServerSpec, named_quality
from sim.engine.steady_decode import steady_decode_s
from sim.errors import BudgetError, ConfigError
from sim.paths import results_folder
from sim.policies.orders import own_order
from sim.progress import progress
from sim.results.metrics import met_slo
from sim.results.run_folder import provenance, write_json, write_text
from sim.types import Floats

Loss = Callable[[Plan], float]
"""Returns the nats per token that a plan costs."""
DENSE = "dense"
STREAMED = "streamed"
NARROW = "narrow FFN"
HIDDEN = "hidden states"
COMPRESSED = "compressed KV"
ANY = "any one plan"
"""The best of all steps but those that stream."""
ADAPTING = "least loss, adapting"
TPOT_SHARES = (0.5, 0.8)
HEADROOMS = (1.1, 3.0)
"""Settings of ``policy=least_loss``: the bound of a decode iteration, in shares of the target per token; and how many
times the present KV has to fit, as requests keep the bits of KV with which they began."""
PERCENTS = (90, 80, 70, 60, 50, 40, 30)
WAIT_S = 1.5
"""Longest wait for admission in every plan (SABER): without it an overloaded server meets no SLO, whatever it frees."""


@dataclass(kw_only=True)
class KnobsConfig:
    """Which steps to compare, and where.

    env: the server, and its traces. qualities: files of conf/quality, for the same model.
    links: name of a host link -> its bytes per second.
    batches: decodes of an iteration, for the table at equal bytes. context_tokens: of each of them.
    freed_gb: bytes to free, in GB, for the same table.
    shares: budgets, in multiples of the dense weight bytes. loads: positions in each source's range of rates.
    sources: traces. windows: test windows for each source and load; half as many, rounded up, validate.
    seed: of the windows. out: folder of the page and its figures.
    """

    env: Any
    qualities: list[str] = field(default_factory=lambda: ["llama2_7b_transferred", "llama2_7b_transferred_w4"])
    links: dict[str, float] = field(default_factory=dict)
    batches: list[int] = field(default_factory=lambda: [8, 32, 128])
    context_tokens: int = 512
    freed_gb: list[float] = field(default_factory=lambda: [2.0, 4.0, 8.0])
    shares: list[float] = field(default_factory=lambda: [1.781, 1.484, 1.187, 0.890])
    loads: list[float] = field(default_factory=lambda: [0.1, 0.5, 0.9])
    sources: list[str] = field(default_factory=lambda: ["burst", "azure_conv", "azure_code", "gamma", "mmpp"])
    windows: int = 2
    seed: int = 20261128
    out: str = "runs/knobs"


ConfigStore.instance().store(name="knobs_schema", node=KnobsConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One plan of a knob. amount: what it does, such as "8 layers"."""

    knob: str
    amount: str
    plan: Plan


# --- Steps -----------------------------------------------------------------------------------------------------------


def dropped(model: ModelSpec, count: int) -> Plan:
    """Return the plan without the first blocks of the model's order."""
    blocks = own_order(model)[:count]
    layers = {kind: [int(name[3:]) for name in blocks if name.startswith(kind)] for kind in ("MHA", "FFN")}
    return with_mask(dense_plan(model), drop(model, mha=layers["MHA"], ffn=layers["FFN"]))


def low_weights(model: ModelSpec, count: int) -> Plan:
    """Return the plan whose first layers have 4-bit weights."""
    dense = dense_plan(model)
    return replace(dense, weight_bits=(4,) * count + dense.weight_bits[count:])


def low_kv(model: ModelSpec, count: int) -> Plan:
    """Return the plan that keeps KV at 4 bits in the first layers, and at 8 bits in the others."""
    return replace(dense_plan(model), kv_bits=(4,) * count + (8,) * (model.num_layers - count))


def streaming(model: ModelSpec, count: int) -> Plan:
    """Return the plan that streams ``count`` layers at equal distances."""
    layers = set(even_layers(model.num_layers, count))
    return replace(dense_plan(model), streamed=tuple(layer in layers for layer in range(model.num_layers)))


def narrow_ffn(model: ModelSpec, width: int, count: int) -> Plan:
    """Return the plan whose last layers have FFN blocks of a width in eighths, and the others one eighth more."""
    return replace(dense_plan(model), ffn_width=(width + 1,) * (model.num_layers - count) + (width,) * count)


def keeping_hidden(model: ModelSpec) -> Plan:
    """Return the plan that keeps hidden states in place of KV."""
    return replace(dense_plan(model), kv_hidden=True)


def compressing(model: ModelSpec, percent: int) -> Plan:
    """Return the plan that keeps this percent of a prompt's KV bytes, by the method that loses less on SmolLM2-135M."""
    method = "think" if percent >= 80 else "ada_kv"
    return replace(dense_plan(model), kv_compression=KVCompression(method=method, percent=percent))


def all_steps(model: ModelSpec) -> dict[str, list[Step]]:
    """Return every step of every knob, in ascending order, for the table at equal bytes."""
    layers = range(1, model.num_layers + 1)
    return {
        "dropped blocks": [
            Step(knob="dropped blocks", amount=_count(n, "block"), plan=dropped(model, n))
            for n in range(1, len(own_order(model)) + 1)
        ],
        "W4": [Step(knob="W4", amount=_count(n, "layer"), plan=low_weights(model, n)) for n in layers],
        "KV bits": [
            Step(knob="KV bits", amount=f"4 bits in {n}, 8 in {model.num_layers - n} layers", plan=low_kv(model, n))
            for n in (0, *layers)
        ],
        NARROW: [
            Step(knob=NARROW, amount=f"{width}/8 in {_count(n, 'layer')}", plan=narrow_ffn(model, width, n))
            for width in FFN_WIDTHS[1:]
            for n in layers
        ],
        HIDDEN: [Step(knob=HIDDEN, amount="all layers", plan=keeping_hidden(model))] if model.hidden_halves_kv else [],
        COMPRESSED: [
            Step(knob=COMPRESSED, amount=f"{percent} %", plan=compressing(model, percent)) for percent in PERCENTS
        ],
        STREAMED: [
            Step(knob=STREAMED, amount=f"{n} layers", plan=streaming(model, n)) for n in layers[LEAST_STREAMED - 1 :]
        ],
    }


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def served_steps(model: ModelSpec) -> list[Step]:
    """Return the steps that are served: a few of each knob, and of pairs of knobs."""
    every, total = all_steps(model), model.num_layers
    quarter = max(1, total // 4)
    blocks = [n for n in (2, 4, 6, 10, 20) if n <= len(every["dropped blocks"])]
    steps = [Step(knob=DENSE, amount="-", plan=dense_plan(model))]
    steps += [every["dropped blocks"][n - 1] for n in blocks]
    steps += [every["W4"][n - 1] for n in (quarter, 2 * quarter, 3 * quarter, total)]
    steps += [every["KV bits"][n] for n in (0, total // 2, total)]
    steps += every[NARROW][total - 1 :: total] + every[HIDDEN]
    steps += [every[COMPRESSED][PERCENTS.index(percent)] for percent in (90, 70, 50, 30)]
    counts = [n for n in (4, 6, 8, 12, 16, 24, total) if LEAST_STREAMED <= n <= total]
    steps += [every[STREAMED][n - LEAST_STREAMED] for n in sorted(set(counts))]
    for n, bits in ((0, "8 bits"), (total, "4 bits")):
        kv_bits = low_kv(model, n).kv_bits
        pairs = [("W4 and KV bits", f"{total} layers", low_weights(model, total))]
        pairs += [(f"{STREAMED} and KV bits", f"{c} layers", streaming(model, c)) for c in (4, 8, 16) if c <= total]
        pairs += [("dropped blocks and KV bits", f"{c} blocks", dropped(model, c)) for c in blocks[:3]]
        pairs += [(f"{NARROW} and KV bits", f"{w}/8", narrow_ffn(model, w, total)) for w in FFN_WIDTHS[1:]]
        steps += [
            Step(knob=knob, amount=f"{amount}, KV at {bits}", plan=replace(plan, kv_bits=kv_bits))
            for knob, amount, plan in pairs
        ]
    return steps


# --- By formula ------------------------------------------------------------------------------------------------------


def freed_bytes(model: ModelSpec, plan: Plan, requests: int, context_tokens: int) -> int:
    """Return the bytes that a plan frees: of the dense model's weights, and of the KV of requests with such prompts."""
    dense = dense_plan(model)
    kv = requests * (stored_kv_bytes(model, dense, context_tokens) - stored_kv_bytes(model, plan, context_tokens))
    return weight_bytes(model, dense) - weight_bytes(model, plan) + kv


def at_equal_bytes(
    server: ServerSpec,
    links: Mapping[str, float],
    loss: Mapping[str, Loss],
    batches: Sequence[int],
    context_tokens: int,
) -> list[dict[str, Any]]:
    """Return one row for each step, load and link: bytes freed, loss, and seconds of a decode iteration.

    Args:
        loss: name of a quality -> nats per token that a plan loses.
    """
    rows = []
    for batch in batches:
        dense_s = steady_decode_s(server, dense_plan(server.model), batch, context_tokens)
        for knob, steps in all_steps(server.model).items():
            for step in steps:
                for name, speed in links.items() if knob == STREAMED else [("", None)]:
                    here = server if speed is None else with_link(server, speed)
                    seconds = steady_decode_s(here, step.plan, batch, context_tokens)
                    rows.append(
                        {
                            "knob": knob,
                            "amount": step.amount,
                            "link": name,
                            "batch": batch,
                            "freed_bytes": freed_bytes(server.model, step.plan, batch, context_tokens),
                            "loss_nats": {quality: nats(step.plan) for quality, nats in loss.items()},
                            "decode_s": seconds,
                            "times_dense": seconds / dense_s,
                        }
                    )
    return rows


def with_link(server: ServerSpec, bytes_per_s: float) -> ServerSpec:
    """Return the server with another host link; its copies take their share of the memory's rate from iterations."""
    latency = replace(server.priced(), copying=None)
    return replace(server, latency=latency, gpu=replace(server.gpu, host_to_device_bytes_per_s=bytes_per_s))


# --- By load ---------------------------------------------------------------------------------------------------------


def windows_of(
    setting: ServeSetting, split: Split, sources: Sequence[str], load: float, each: int, seed: int
) -> list[Window]:
    """Return ``each`` windows with requests for every source, at one load."""
    rng = np.random.default_rng([seed, split == "test", round(1000 * load)])
    at_load = setting.windows.at_load(load, load)
    found: list[Window] = []
    for source in sources:
        while len(found) % each or not found or found[-1].source != source:
            window = at_load.sample(rng, split, (source,), budget="full")
            if len(at_load.arrays(window)[0]):
                found.append(window)
    return found


def attained(
    server: ServerSpec,
    setting: ServeSetting,
    step: Step,
    budget_bytes: int,
    windows: Sequence[Window],
    graph: PlanGraph,
) -> Floats:
    """Return the share of requests that meet the SLO with a step in each window; 0 where the budget is too small."""
    plan = replace(step.plan, max_wait_s=WAIT_S)
    found = np.zeros(len(windows))
    for at, window in enumerate(windows):
        try:
            engine = server.build_engine(plan, budget_bytes, keep_iterations=False, graph=graph, quality_nll=None)
        except BudgetError:
            return found
        setting.submit(engine, window)
        engine.run_until(math.inf)
        found[at] = met_slo(engine.records(), setting.slo).mean()
    return found


def best_steps(
    validation: Mapping[tuple[str, int], Floats], test: Mapping[tuple[str, int], Floats], steps: Sequence[Step]
) -> dict[str, dict[str, Any]]:
    """Return, for each knob and link, the step with the highest mean on validation windows, and its test windows.

    Args:
        validation, test: (link, number of a step) -> utility of each window; the link is empty where none matters.
    """
    found: dict[str, dict[str, Any]] = {}
    for (link, number), utility in validation.items():
        step = steps[number]
        chosen = {"validation": float(utility.mean()), "by_window": test[link, number].tolist()}
        chosen["utility"] = float(test[link, number].mean())
        _keep_better(found, f"{step.knob}, {link}" if link else step.knob, chosen | {"step": step.amount})
        if not link and step.knob != ADAPTING:
            named = step.knob if step.knob == DENSE else f"{step.knob}: {step.amount}"
            _keep_better(found, ANY, chosen | {"step": named})
    return found


def _keep_better(found: dict[str, dict[str, Any]], label: str, chosen: dict[str, Any]) -> None:
    if label not in found or chosen["validation"] > found[label]["validation"]:
        found[label] = chosen


def by_load(cfg: DictConfig, setting: ServeSetting, loss: Mapping[str, Loss]) -> list[dict[str, Any]]:
    """Serve all windows with all steps; return one row for each quality, budget and load."""
    steps = served_steps(setting.model)
    dense_bytes = weight_bytes(setting.model, dense_plan(setting.model))
    graph = PlanGraph(setting.model)
    target_s = setting.slo.tpot_s
    bounds = [
        (share * target_s, headroom, hidden)
        for share, headroom, hidden in product(TPOT_SHARES, HEADROOMS, (False, True))
        if target_s is not None
    ]
    adapting_steps = [
        Step(
            knob=ADAPTING,
            amount=f"{1e3 * tpot_s:g} ms, {headroom:g} times the KV" + ", hidden states too" * hidden,
            plan=dense_plan(setting.model),
        )
        for tpot_s, headroom, hidden in bounds
    ]
    graphs = {quality: PlanGraph(setting.model, nats) for quality, nats in loss.items()}
    kept = {
        quality: [float(kept_quality(np.array(nats(step.plan)))) for step in steps] for quality, nats in loss.items()
    }
    rows = []
    done, total = 0, len(cfg.shares) * len(cfg.loads) * (len(steps) + len(loss))
    with progress("serving", total, "steps") as report:
        for share in cfg.shares:
            budget = round(share * dense_bytes)
            for load in cfg.loads:
                played: dict[str, dict[tuple[str, int], Floats]] = {"validation": {}, "test": {}}
                sizes: list[tuple[Split, int]] = [("validation", -(-int(cfg.windows) // 2)), ("test", int(cfg.windows))]
                chosen = {
                    split: windows_of(setting, split, list(cfg.sources), load, each, int(cfg.seed))
                    for split, each in sizes
                }
                for number, step in enumerate(steps):
                    links = cfg.links if any(step.plan.streamed) else {"": None}
                    for link, speed in links.items():
                        server = setting.server if speed is None else with_link(setting.server, float(speed))
                        for split, windows in chosen.items():
                            played[split][link, number] = attained(server, setting, step, budget, windows, graph)
                    done += 1
                    report(done)
                for quality, factors in kept.items():
                    worth = {
                        split: {key: values * factors[key[1]] for key, values in found.items()}
                        for split, found in played.items()
                    }
                    for number, (tpot_s, headroom, hidden) in enumerate(bounds, start=len(steps)):
                        for split, windows in chosen.items():
                            worth[split]["", number] = adapting(
                                setting,
                                loss[quality],
                                tpot_s,
                                headroom,
                                hidden,
                                budget,
                                windows,
                                graphs[quality],
                                WAIT_S,
                            )
                    done += 1
                    report(done)
                    rows.append(
                        {
                            "quality": quality,
                            "budget_bytes": budget,
                            "load": load,
                            "windows": {split: len(windows) for split, windows in chosen.items()},
                            "knobs": best_steps(worth["validation"], worth["test"], [*steps, *adapting_steps]),
                        }
                    )
    return rows


def _loss(nll: Loss, dense_nll: float, plan: Plan) -> float:
    return nll(plan) - dense_nll


def play(cfg: DictConfig) -> dict[str, Any]:
    """Return the figures of the page."""
    kwargs: Any = OmegaConf.to_container(cfg.env.kwargs, resolve=True)
    setting = ServeSetting(**{**kwargs, "sources": list(cfg.sources)})
    if not cfg.links or not cfg.qualities:
        raise ConfigError("links or qualities is empty; name at least one of each, such as links={PCIe: 25e9}")
    if int(cfg.windows) < 1:
        raise ConfigError(f"windows is {cfg.windows}; it must be at least 1")
    loss: dict[str, Loss] = {}
    for name in cfg.qualities:
        quality = named_quality(name)
        dense_nll = quality.nll(dense_plan(setting.model))  # an error where the table is for a model of other layers
        loss[name] = lru_cache(maxsize=None)(partial(_loss, quality.nll, dense_nll))
    links = {str(name): float(speed) for name, speed in cfg.links.items()}
    equal = at_equal_bytes(setting.server, links, loss, list(cfg.batches), int(cfg.context_tokens))
    return {
        **provenance(int(cfg.seed)),
        "model": setting.model.name,
        "gpu": setting.gpu.title,
        "links": links,
        "dense_bytes": weight_bytes(setting.model, dense_plan(setting.model)),
        "sources": list(cfg.sources),
        "context_tokens": int(cfg.context_tokens),
        "freed_gb": [float(x) for x in cfg.freed_gb],
        "equal_bytes": equal,
        "combined": combined(
            {name: with_link(setting.server, speed) for name, speed in links.items()},
            loss,
            list(cfg.batches),
            int(cfg.context_tokens),
            list(cfg.freed_gb),
        ),
        "by_load": by_load(cfg, setting, loss),
    }


def _run(cfg: DictConfig) -> None:
    figures = play(cfg)
    folder = results_folder(cfg.out, KnobsConfig.out)
    write_json(folder / "knobs.json", figures)
    plot_steps(folder / "knobs.png", figures)
    write_text(folder / "index.md", page(figures))
    shown = f"{equal_bytes_table(figures)}\n\n{by_load_table(figures, figures['by_load'][0]['quality'])}"
    Console().print(f"{shown}\nfiles: {folder}", highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Run ``python -m agents.knobs``."""
    one_thread()
    run_command(_run, "knobs")
