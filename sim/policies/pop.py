"""``pop``: in some layers prompts only write their keys and values (POP, arXiv 2602.03295).

Prefill gets faster, and no weights move. Decodes and the last token of a prompt run the whole model; the first token of
the answer is computed from that last token (``Plan.kv_only``).
"""

from __future__ import annotations

from dataclasses import replace

from sim.cost.kv_only_loss import kv_only_loss_path, read_kv_only_loss
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import dense_plan
from sim.cost.quality import QUALITIES
from sim.errors import ConfigError, nearest
from sim.limits import is_whole
from sim.policies.base import PolicyContext
from sim.policies.fixed import Fixed

ORDERS = ("measured", "deepest")
SHARE = 1 / 3
"""Of the layers, unless their number is stated: ours, as the abstract of the paper states none."""


def pop(served: PolicyContext, *, layers: int | None = None, order: str | None = None) -> Fixed:
    """Build the policy that always lets prompts only write KV in the first layers of an order.

    Args:
        served: what the policy knows of the server.
        layers: how many; None takes a third of them.
        order: ``measured``: those that prompts need least, by ``python -m hw.score kind=pop``; ``deepest``: from the
            last layer on. None takes the measured one if the model has one, else the deepest.
    Raises:
        ConfigError: for an unknown order, one that was not measured, or more layers than the model has.
    """
    model = served.model
    count = round(SHARE * model.num_layers) if layers is None else layers
    if not is_whole(count) or not 0 <= count <= model.num_layers:
        raise ConfigError(
            f"policy.layers is {layers!r}; {model.name} has {model.num_layers}, so 0 to {model.num_layers} are "
            "allowed, or null for a third of them"
        )
    chosen = set(layer_order(model, order)[:count])
    return Fixed(replace(dense_plan(model), kv_only=tuple(layer in chosen for layer in range(model.num_layers))))


def layer_order(model: ModelSpec, order: str | None) -> list[int]:
    """Return the layers of a model in an order; see ``pop``."""
    if order is not None and order not in ORDERS:
        raise ConfigError(f"unknown policy.order {order!r}; {nearest(str(order), ORDERS)}")
    path = kv_only_loss_path(QUALITIES / f"{model.name}.json")
    if order == "deepest" or (order is None and not path.is_file()):
        return list(range(model.num_layers))[::-1]
    if not path.is_file():
        raise ConfigError(
            f"policy.order is measured, but what prompts need of {model.name} was not; set policy.order=deepest, or "
            "measure it: python -m hw.score kind=pop model.path=..."
        )
    return list(read_kv_only_loss(path, "calibration", model.name, model.num_layers).order)
