"""All knobs of ``agents.knobs`` at once: which combination loses least under a bound of bytes and one of seconds.

By formula, every combination of a grid is weighed, so the answer is exact for the grid. By load, ``policy=least_loss``
chooses among such combinations at every decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from agents.envs.serve import ServeSetting
from agents.envs.serve_windows import Window
from sim.cost.ffn_width import FFN_WIDTHS
from sim.cost.kv_format import stored_kv_bytes
from sim.cost.memory import weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan, dense_plan
from sim.engine.plan_graph import PlanGraph
from sim.engine.server_spec import ServerSpec
from sim.engine.steady_decode import steady_decode_s
from sim.errors import BudgetError
from sim.policies.base import PolicyContext
from sim.policies.least_loss import least_loss
from sim.policies.observation.serve import HIDDEN, serve_actions
from sim.policies.orders import own_order
from sim.results.metrics import met_slo
from sim.results.utility import utility
from sim.types import Bools, Floats, Ints

TIMES_DENSE = (0.9, 1.0, 1.5)
"""Bounds of the time per token, over that of the dense model at the same load."""
DWELL_S = 4.0
"""How long weights stay that ``policy=least_loss`` changed, as in env=serve_trace."""
COMPRESSED = (
    {"method": "think", "percent": 90},
    {"method": "ada_kv", "percent": 70},
    {"method": "ada_kv", "percent": 50},
)
"""Compressed KV in the grid: of each share of the bytes, the method that loses least on SmolLM2-135M."""


def grid_options(model: ModelSpec, *, streaming: bool, hidden: bool) -> dict[str, Any]:
    """Return the combinations of all knobs, as options of ``serve_actions``.

    Args:
        streaming: whether layers are streamed in some of them; where none are, fewer ways to compress KV are tried.
        hidden: whether hidden states take the place of KV in some, if the model allows that.
    """
    order, layers = own_order(model), model.num_layers
    return {
        "order": list(order),
        "drops": [n for n in (0, 2, 4, 6, 10, 20) if n <= len(order)],
        "low_layers": sorted({round(layers * part / 4) for part in range(5)}),
        "kv_bits": [16, 8, 4, HIDDEN] if hidden and model.hidden_halves_kv else [16, 8, 4],
        "kv_compression": [None, *COMPRESSED] if streaming else [None, COMPRESSED[0]],
        "streamed": [n for n in (0, 4, 8, 16) if n <= layers] if streaming else [0],
        "ffn_width": list(FFN_WIDTHS[:2]),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """What the combinations of a grid free and take at a load: float64[a] and int64[a]."""

    seconds: Floats
    freed_bytes: Ints


def weighed(server: ServerSpec, plans: Sequence[Plan], batch: int, context_tokens: int) -> Weighed:
    """Return the seconds of a decode iteration and the bytes freed of weights and KV, for each plan."""
    model, dense = server.model, dense_plan(server.model)

    def held(plan: Plan) -> int:
        return weight_bytes(model, plan) + batch * stored_kv_bytes(model, plan, context_tokens)

    return Weighed(
        seconds=np.array([steady_decode_s(server, plan, batch, context_tokens) for plan in plans]),
        freed_bytes=held(dense) - np.array([held(plan) for plan in plans]),
    )


def best_of(losses: Floats, allowed: Bools, seconds: Floats) -> int | None:
    """Return the number of the allowed plan with the least loss, of equal ones the fastest; None if none is allowed."""
    if not allowed.any():
        return None
    found = np.lexsort((seconds, np.where(allowed, losses, np.inf)))
    return int(found[0])


def combined(
    servers: Mapping[str, ServerSpec],
    loss: Mapping[str, Callable[[Plan], float]],
    batches: Sequence[int],
    context_tokens: int,
    freed_gb: Sequence[float],
) -> list[dict[str, Any]]:
    """Return one row for each load, link and pair of bounds: the combination that loses least, for each quality.

    Args:
        servers: name of a host link -> the server with it. loss: name of a quality -> nats per token of a plan.
    """
    rows = []
    for link, server in servers.items():
        table = serve_actions(server.model, **grid_options(server.model, streaming=True, hidden=True))
        losses = {name: np.array([nats(plan) for plan in table.plans]) for name, nats in loss.items()}
        for batch in batches:
            every = weighed(server, table.plans, batch, context_tokens)
            dense_s = steady_decode_s(server, dense_plan(server.model), batch, context_tokens)
            for least_gb in freed_gb:
                for bound in TIMES_DENSE:
                    allowed = (every.freed_bytes >= least_gb * 1e9) & (every.seconds <= bound * dense_s)
                    best = {name: best_of(nats, allowed, every.seconds) for name, nats in losses.items()}
                    rows.append(
                        {"batch": batch, "freed_gb": float(least_gb), "times_dense": bound, "link": link}
                        | {"allowed": int(allowed.sum()), "plans": len(table.plans)}
                        | {
                            "best": {
                                name: None
                                if number is None
                                else {
                                    "plan": short_name(table.names[number]),
                                    "loss_nats": float(losses[name][number]),
                                    "times_dense": float(every.seconds[number] / dense_s),
                                }
                                for name, number in best.items()
                            }
                        }
                    )
    return rows


UNUSED = ("FFN 8/8", "drop 0", "W4 0", "queue any", "KV16", "KV whole", "streamed 0")
"""What a name says of knobs that are left alone."""


def short_name(name: str) -> str:
    """Return the name of a combination without the knobs that it leaves alone."""
    parts = [part for part in name.split(", ") if part not in UNUSED]
    return ", ".join(parts) or "dense"


def adapting(
    setting: ServeSetting,
    loss: Callable[[Plan], float],
    tpot_s: float,
    headroom: float,
    hidden: bool,
    budget_bytes: int,
    windows: Sequence[Window],
    graph: PlanGraph,
    wait_s: float,
) -> Floats:
    """Return the utility of ``policy=least_loss`` over all knobs but streaming in each window, float64[windows].

    Args:
        loss: nats per token that a plan loses. tpot_s, headroom: of the policy. hidden: whether hidden states are
            among its plans. graph: of plans with this loss. wait_s: the longest wait for admission.
    """
    server = replace(setting.server, quality_nll=loss)
    options = grid_options(server.model, streaming=False, hidden=hidden)
    options |= {"waits": [wait_s], "start_drops": 0, "dwell_s": DWELL_S}
    found = np.zeros(len(windows))
    for at, window in enumerate(windows):
        policy = least_loss(PolicyContext.of(server), actions=options, tpot_s=tpot_s, headroom=headroom)
        try:
            engine = server.build_engine(policy.first_plan, budget_bytes, keep_iterations=False, graph=graph)
        except BudgetError:
            return found
        setting.submit(engine, window)
        for tick in range(1, setting.ticks):
            engine.apply(policy(engine.run_until(tick * setting.tick_s)))
        engine.run_until(math.inf)
        records = engine.records()
        found[at] = utility(met_slo(records, setting.slo), records.quality_nll, 0.0)
    return found
