"""More measurements for the page of scores: selected plans on the full test text, and greedy decoding under a plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hw.elastic.kv import RequestKV
from hw.elastic.model import ElasticModel
from hw.score.block_numbers import plan_without, staged_plan
from hw.score.nll import measure, rounded
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan, dense_plan
from sim.cost.plan_json import plan_to_json
from sim.progress import progress

Rows = list[dict[str, Any]]


def swapped(spec: ModelSpec, layers: Sequence[int], bits: int) -> Plan:
    """Return the plan that has some layers at ``bits`` and is otherwise dense."""
    return replace(
        dense_plan(spec), weight_bits=tuple(bits if i in set(layers) else 16 for i in range(spec.num_layers))
    )


def spread(losses: Sequence[float], count: int, below: float) -> list[int]:
    """Return the indices of ``count`` losses, evenly spread in rank over those below a limit, the lowest first."""
    ranked = sorted((i for i, loss in enumerate(losses) if loss < below), key=lambda i: (losses[i], i))
    if len(ranked) <= count:
        return ranked
    return [ranked[round(i * (len(ranked) - 1) / (count - 1))] for i in range(count)]


def chosen_plans(
    spec: ModelSpec,
    orders: Mapping[str, Sequence[int]],
    layer_orders: Mapping[str, Sequence[int]],
    searches: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> list[tuple[str, Plan]]:
    """Return about a dozen named plans to measure on the full test text, the most important first.

    Args:
        spec: the model.
        orders: name -> order in which blocks are removed; gsi, one_shot and cosine must be there.
        layer_orders: name -> order in which layers change precision.
        searches: blocks that PDTrim's searches remove in prefill and in decode.
    """
    layers = range(spec.num_layers)
    plans = [("dense", dense_plan(spec))]
    for size in (8, 4, 12):
        # The order of an unfinished search may be too short.
        long_enough = [name for name in ("gsi", "one_shot") if len(orders[name]) >= size]
        plans += [(f"{name}, {size} removals", plan_without(spec, orders[name][:size])) for name in long_enough]
        if size == 8:
            plans += [("W4, all layers", swapped(spec, layers, 4)), ("W8, all layers", swapped(spec, layers, 8))]
    plans.append(("cosine, 8 removals", plan_without(spec, orders["cosine"][:8])))
    if "lis_w4" in layer_orders:
        plans.append(("W4, 16 layers by LIS", swapped(spec, layer_orders["lis_w4"][:16], 4)))
    plans.append(("W4, first 16 layers", swapped(spec, layers[:16], 4)))
    for prefill, decode in searches:
        if (len(prefill), len(decode)) == (4, 8):
            plan = staged_plan(spec, prefill=prefill, decode=decode)
            plans.append(("PDTrim, 4 removals in prefill, 8 in decode", plan))
    return plans


def measure_chosen(
    elastic: ElasticModel,
    windows: Tensor,
    plans: Sequence[tuple[str, Plan]],
    done: Sequence[Mapping[str, Any]],
    on_plan: Callable[[Rows], None],
) -> Rows:
    """Return one row per plan with its NLL on the windows; rows of ``done`` with the same name and plan are reused.

    Args:
        elastic: with all blocks at full precision.
        windows: token ids [n, t].
        plans: names and plans.
        done: rows of an earlier run.
        on_plan: called with all rows so far after every measured plan.
    """
    earlier = {row["name"]: row for row in done}
    known = {name: earlier[name] for name, plan in plans if earlier.get(name, {}).get("plan") == plan_to_json(plan)}
    rows: Rows = []
    measured = 0
    with progress("measuring", len(plans) - len(known), "plans") as report:
        for name, plan in plans:
            if name in known:
                rows.append(dict(known[name]))
                continue
            started = time.process_time()
            found = measure(elastic, plan, windows)
            rows.append(
                {
                    "name": name,
                    "plan": plan_to_json(plan),
                    "nll": found.mean,
                    "nll_decode": found.decode_mean,
                    "tokens": found.tokens,
                    "cpu_s": round(time.process_time() - started, 1),
                }
            )
            on_plan(rows)
            measured += 1
            report(measured)
    return rows


# --- Greedy decoding -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Agreement:
    """Greedy decoding compared with the dense model.

    share: of positions with the same token. first: mean number of tokens before the first difference.
    """

    share: float
    first: float


@torch.inference_mode()
def greedy_tokens(elastic: ElasticModel, plan: Plan, prompts: Tensor, tokens: int) -> Tensor:
    """Return the tokens [n, tokens] that greedy decoding produces after prompts [n, t] under a plan.

    ``elastic`` must hold all blocks at full precision: the plan's masks work as gates, and weights are rounded.
    """
    assert elastic.plan == dense_plan(elastic.spec)
    produced = []
    with rounded(elastic, plan.weight_bits, plan.nested):
        elastic.plan = replace(plan, weight_bits=elastic.plan.weight_bits, compute_bits=None)
        try:
            requests = [RequestKV() for _ in prompts]
            logits = elastic.forward(prompts, requests, "prefill")
            for request in requests:
                elastic.end_prefill(request)
            while True:
                produced.append(logits.argmax(-1))
                if len(produced) == tokens:
                    break
                logits = elastic.forward(produced[-1][:, None], requests, "decode")
        finally:
            elastic.plan = dense_plan(elastic.spec)
    return torch.stack(produced, dim=1)


def agreement(reference: Tensor, found: Tensor) -> Agreement:
    """Compare tokens [n, tokens] of two greedy decodings of the same prompts."""
    equal = reference == found
    return Agreement(float(equal.float().mean()), float(equal.cumprod(1).sum(1).float().mean()))
