"""In which order blocks are dropped: each model has its own, and none is used for another model."""

from __future__ import annotations

from sim.config import CONF_DIR, load_option
from sim.cost.model_spec import ModelSpec
from sim.errors import ConfigError, PlanError
from sim.json_file import read_json_object

HOW = "python -m hw.score kind=gsi measures one"


def own_order(model: ModelSpec) -> tuple[str, ...]:
    """Return the order of blocks that was published or measured for a model.

    It is that of conf/policy/greedy_stop.yaml for the model it was made for, and for others the greedy order of
    conf/score/MODEL_gsi.json.

    Raises:
        ConfigError: if there is none.
    """
    published = load_option("policy", "greedy_stop")
    if published["made_for"] == model.name:
        return tuple(map(str, published["order"]))
    path = CONF_DIR / "score" / f"{model.name}_gsi.json"
    if not path.is_file():
        raise ConfigError(
            f"no order of blocks is known for {model.name}; state one with the model that it was made for (order=, "
            f"made_for=), or drop nothing; {HOW}"
        )
    found = read_json_object(path, ConfigError, f"measure it again: {HOW}").get("order")
    if not isinstance(found, list) or not found:
        raise ConfigError(f"{path} holds no order of blocks; measure it again: {HOW}")
    return tuple(map(str, found))


def check_made_for(model: ModelSpec, made_for: str | None, key: str) -> None:
    """Check that an order was made for the model that it is used for; None accepts any model.

    Args:
        key: what holds ``order`` and ``made_for``, such as "policy".
    Raises:
        PlanError: if it was made for another model.
    """
    if made_for is not None and made_for != model.name:
        raise PlanError(
            f"{key}.order was measured on {made_for}, not on {model.name}; set an order of this model "
            f"({key}.order='[MHA20,FFN3,...]' {key}.made_for={model.name}; {HOW})"
        )


__all__ = ["check_made_for", "own_order"]
