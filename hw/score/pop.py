"""POP: which layers prompts need least, by a Fisher score, and what it costs if they only write KV in them.

POP (arXiv 2602.03295) puts a virtual gate g of value 1 on what a layer adds to the hidden states of a stage's tokens,
and takes the second-order term of the loss in g as the layer's importance. Its second derivative is estimated by the
square of the first, as in the Fisher information: one pass forward and one back per window.

    importance of a layer = mean over windows of (d loss / d g)^2 / 2

Here a window is a prompt and its continuation, the loss is the mean NLL of the continuation, and the gate of prefill is
that of the prompt's tokens but the last: exactly those that only write KV in a layer of ``Plan.kv_only``. Their keys
and values stay as they are. The gate of decode is that of all other tokens. The text's own tokens are the labels; the
paper's details are open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hw.elastic.model import ElasticModel
from hw.score.job import Job
from hw.score.nll import Nll, measure_many, token_nll
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan, dense_plan
from sim.cost.quality import QUALITIES
from sim.progress import progress

# Shapes: n windows, t tokens of each, l layers.

AT_ONCE = 6
"""Plans that are measured between two reports of progress."""
EVERY = 3
"""Of the deepest layers, every third number is measured."""


@dataclass(frozen=True, slots=True)
class GateScores:
    """The importance of each layer, [l], for the tokens of a prompt and for those after it."""

    prefill: list[float]
    decode: list[float]

    @property
    def order(self) -> list[int]:
        """All layers, the one that prompts need least first; of equal ones the deepest."""
        return sorted(range(len(self.prefill)), key=lambda layer: (self.prefill[layer], -layer))


def gate_scores(elastic: ElasticModel, windows: Tensor, *, prompt_tokens: int | None = None) -> GateScores:
    """Return POP's scores of all layers.

    Args:
        elastic: with all blocks at full precision.
        windows: token ids [n, t]. prompt_tokens: of each window; None takes half of it.
    """
    assert elastic.plan == dense_plan(elastic.spec)
    prompt = windows.shape[1] // 2 if prompt_tokens is None else prompt_tokens
    total = torch.zeros(2, elastic.spec.num_layers, dtype=torch.float64)
    with progress("scoring layers", len(windows), "windows") as report:
        for number, window in enumerate(windows.to(elastic.device), start=1):
            total += _gate_gradients(elastic, window[None], prompt).double().cpu() ** 2 / 2
            report(number)
    prefill, decode = (total / len(windows)).tolist()
    return GateScores(prefill, decode)


def _gate_gradients(elastic: ElasticModel, window: Tensor, prompt: int) -> Tensor:
    """Return d loss / d gate [2, l] of a window [1, t], for prefill and decode, where the loss is that of the rest."""
    gates = torch.ones(2, elastic.spec.num_layers, device=elastic.device, requires_grad=True)
    length = window.shape[1]
    with torch.enable_grad():
        per_token = torch.cat((gates[:1].expand(prompt - 1, -1), gates[1:].expand(length - prompt + 1, -1)))
        positions = torch.arange(length, device=elastic.device)[None]
        hidden = elastic.embed(window, positions)
        rope = elastic.rope(hidden, positions)
        for layer in range(elastic.spec.num_layers):
            gate = per_token[None, :, layer, None].to(hidden.dtype)
            hidden = hidden + gate * elastic.attend(layer, hidden, rope)
            hidden = hidden + gate * elastic.feed(layer, hidden)
        loss = token_nll(elastic, hidden, window)[0, prompt - 1 :].mean()
        (found,) = torch.autograd.grad(loss, gates)
    return found.detach()


def kv_only_plan(spec: ModelSpec, layers: Sequence[int]) -> Plan:
    """Return the dense plan in which prompts only write KV in some layers."""
    chosen = set(layers)
    return replace(dense_plan(spec), kv_only=tuple(layer in chosen for layer in range(spec.num_layers)))


def score_pop(job: Job) -> None:
    """Write the order of layers, and the losses of its first layers and of the deepest ones."""
    calibration, test = job.text("calibration"), job.text("test")
    spec = job.elastic.spec
    scores = gate_scores(job.elastic, calibration.tokens)
    order, deepest = scores.order, list(range(spec.num_layers))[::-1]
    numbers = sorted({*range(EVERY, spec.num_layers + 1, EVERY), spec.num_layers})
    sets = [order[:count] for count in range(spec.num_layers + 1)] + [deepest[:count] for count in numbers]
    plans = [kv_only_plan(spec, layers) for layers in sets]
    found = {name: _measured(job, plans, text.tokens) for name, text in (("calibration", calibration), ("test", test))}
    dense = {name: nll[plans[0]] for name, nll in found.items()}
    losses = {name: [nll[plan].decode_mean - dense[name].decode_mean for plan in plans] for name, nll in found.items()}
    split = spec.num_layers + 1
    result: dict[str, Any] = {
        "test_text": test.source,
        "prompt_tokens": {"calibration": calibration.tokens.shape[1] // 2, "test": test.tokens.shape[1] // 2},
        "tokens": {name: one.decode_tokens for name, one in dense.items()},
        "importance": {"prefill": scores.prefill, "decode": scores.decode},
        "order": order,
        "dense_nll": {name: one.decode_mean for name, one in dense.items()},
        "losses": {name: listed[1:split] for name, listed in losses.items()},
        "deepest": {"numbers": numbers, "losses": {name: listed[split:] for name, listed in losses.items()}},
    }
    source = "POP (arXiv 2602.03295); NLL of the tokens after a prompt of half a window, in nats over dense"
    path = Path(job.cfg.out) if job.cfg.out else QUALITIES / "kv_only" / f"{job.name}.json"
    job.write(path, calibration, source, result)


def _measured(job: Job, plans: Sequence[Plan], windows: Tensor) -> dict[Plan, Nll]:
    """Return the NLL of plans, each measured once; those that share their first layers follow one another."""
    wanted = sorted(set(plans), key=lambda plan: plan.kv_only)
    found: dict[Plan, Nll] = {}
    with progress("measuring", len(wanted), "plans") as report:
        for first in range(0, len(wanted), AT_ONCE):
            part = wanted[first : first + AT_ONCE]
            found.update(zip(part, measure_many(job.elastic, part, windows), strict=True))
            report(len(found))
    return found
