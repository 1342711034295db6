"""The page of POP: what layers of ``kv_only`` cost a measured model, and how much faster prompts are, as priced."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hw.score.pop import kv_only_plan
from sim.cost.latency import load_calibration
from sim.cost.model_spec import load_model
from sim.pages.render import commit_of, render, table

TEMPLATE = Path(__file__).parent / "templates" / "pop.md.j2"
PRICED = ("llama3.1_8b_a100", "llama2_7b_a100")
"""Calibrations of the speed-ups."""
PROMPTS = (512, 1024, 2048, 4096, 8192)
SHARES = (1 / 4, 1 / 3, 1 / 2)
"""Of the layers: the deepest ones only write KV."""
PAPER = 1.37
"""The speed-up of prefill in the abstract of POP (arXiv 2602.03295), "up to"."""


def speed_up(calibration: str, layers: int, prompt_tokens: int) -> float:
    """Return the seconds of a prompt, computed alone and at once, over those with this many layers of ``kv_only``."""
    latency = load_calibration(calibration)
    spec = load_model(latency.model)
    deepest = range(spec.num_layers)[spec.num_layers - layers :]
    seconds = [
        latency.iteration_s(kv_only_plan(spec, chosen), [(prompt_tokens, 0)], 0, 0, 1, qkv_share=spec.qkv_share)
        for chosen in ((), deepest)
    ]
    return seconds[0] / seconds[1]


def speed_table(calibration: str) -> str:
    """Return the speed-ups of a calibration by length of the prompt, and the number of layers that reaches POP's."""
    latency = load_calibration(calibration)
    layers = load_model(latency.model).num_layers
    rows = []
    for prompt in PROMPTS:
        if not latency.in_range([(prompt, 0)], 0, 0, 1):
            continue
        reach = next((n for n in range(layers + 1) if speed_up(calibration, n, prompt) >= PAPER), None)
        rows.append(
            {
                "prompt tokens": prompt,
                **{
                    f"{round(share * layers)} layers": speed_up(calibration, round(share * layers), prompt)
                    for share in SHARES
                },
                f"layers for {PAPER}": reach,
            }
        )
    return table(rows, {"prompt tokens": ",", **{f"{round(share * layers)} layers": ".2f" for share in SHARES}})


def loss_table(figures: Mapping[str, Any]) -> str:
    """Return the losses on test text by number of layers, in both orders, with the perplexity over dense."""
    measured, deepest = figures["losses"]["test"], figures["deepest"]
    rows = []
    for number, loss in zip(deepest["numbers"], deepest["losses"]["test"], strict=True):
        own = measured[number - 1]
        rows.append(
            {
                "layers": number,
                "by the score": own,
                "by the score: perplexity over dense": math.exp(own),
                "deepest": loss,
                "deepest: perplexity over dense": math.exp(loss),
            }
        )
    return table(
        rows,
        {
            "by the score": ".4f",
            "deepest": ".4f",
            "by the score: perplexity over dense": ".3f",
            "deepest: perplexity over dense": ".3f",
        },
    )


def importance_table(figures: Mapping[str, Any], count: int = 5) -> str:
    """Return the importance of runs of layers, front to back, for prompts and for what follows them."""
    scores = figures["importance"]
    layers = len(scores["prefill"])
    rows = []
    for first in range(0, layers, count):
        part = slice(first, min(first + count, layers))
        rows.append(
            {
                "layers": f"{first} to {part.stop - 1}",
                **{stage: sum(scores[stage][part]) / (part.stop - first) for stage in ("prefill", "decode")},
            }
        )
    return table(rows, {"prefill": ".2e", "decode": ".2e"})


def within(losses: Sequence[float], ratio: float) -> int:
    """Return how many layers an order can name before the perplexity exceeds this times that of dense."""
    return next((n for n, loss in enumerate(losses) if math.exp(loss) > ratio), len(losses))


def page(figures: Mapping[str, Any]) -> str:
    """Return the page."""
    test = figures["losses"]["test"]
    layers = len(test)
    third = max(number for number in figures["deepest"]["numbers"] if number <= round(layers / 3))
    deepest = dict(zip(figures["deepest"]["numbers"], figures["deepest"]["losses"]["test"], strict=True))
    spec = load_model(load_calibration(PRICED[0]).model)
    return render(
        TEMPLATE,
        figures=figures,
        commit=commit_of(figures),
        layers=layers,
        third=third,
        loss_of_third=test[third - 1],
        ratio_of_third=math.exp(test[third - 1]),
        deepest_third=deepest[third],
        within={ratio: within(test, ratio) for ratio in (1.01, 1.05, 1.1)},
        importance=importance_table(figures),
        deep={stage: _mean(scores[-layers // 3 :]) / _mean(scores) for stage, scores in figures["importance"].items()},
        losses=loss_table(figures),
        priced=[{"name": name, "table": speed_table(name), "share": _share(name)} for name in PRICED],
        paper=PAPER,
        example={
            "model": spec.name,
            "layers": round(spec.num_layers / 3),
            "of": spec.num_layers,
            "speed_up": speed_up(PRICED[0], round(spec.num_layers / 3), 2048),
        },
        perplexity=math.exp(figures["dense_nll"]["test"]),
        first=figures["order"][:third],
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _share(calibration: str) -> float:
    return load_model(load_calibration(calibration).model).qkv_share
