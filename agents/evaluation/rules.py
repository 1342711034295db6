"""The rules without learning that learned policies are compared with, and what of each is tuned.

A rule is a policy of conf/policy (``BASES``) and a limit of admission around it (``LIMITS``): ``greedy_stop+wait`` is
greedy_stop with a longest wait. Both declare here, and only here, which of their parameters are searched, and where.
``agents.evaluation.tuning`` searches them on training windows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agents.baselines.serve import Build
from agents.envs.cluster import ClusterSetting
from agents.envs.serve import ServeSetting
from sim.errors import ConfigError, nearest
from sim.policies.admission import maker
from sim.policies.greedy_stop import block_of

Parameters = Mapping[str, Mapping[str, Any]]
"""``{"policy": {key: value}, "limit": {key: value}}``; what is missing keeps its value of conf/policy."""


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from ``low`` to ``high``, sampled evenly or on a logarithmic scale; whole ones if both are whole.

    default: what the first trial uses. above: a parameter to which the number is added.
    """

    low: float
    high: float
    default: float
    log: bool = False
    above: str = ""

    def sample(self, rng: np.random.Generator) -> float:
        """Return a random number of the range, with three significant digits."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        low, high = (self.low - 0.5, self.high + 0.5) if whole else (self.low, self.high)
        value = math.exp(rng.uniform(math.log(low), math.log(high))) if self.log else rng.uniform(low, high)
        if whole:
            return int(min(self.high, max(self.low, round(value))))
        return min(self.high, max(self.low, float(f"{value:.3g}")))

    def holds(self, value: Any) -> bool:
        """Return whether a value lies in the range."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low - 1e-9 <= value <= self.high + 1e-9


@dataclass(frozen=True, slots=True)
class Choice:
    """A few values; the first trial uses the first of them."""

    values: Sequence[Any]
    above: str = ""

    @property
    def default(self) -> Any:
        """The first value."""
        return self.values[0]

    def sample(self, rng: np.random.Generator) -> Any:
        """Return one of the values."""
        return self.values[int(rng.integers(len(self.values)))]

    def holds(self, value: Any) -> bool:
        """Return whether a value is one of these."""
        return value in self.values


Space = Mapping[str, Range | Choice]


# --- Policies --------------------------------------------------------------------------------------------------------

STOP: Space = {
    "headroom": Range(1.0, 1.6, 1.1),
    "restore_headroom": Range(0.05, 0.6, 0.2, above="headroom"),
    "waiting_share": Choice((0.0, 0.25, 0.5, 1.0)),
    "waiting_most": Range(0.1, 1.0, 0.25),
    "patience": Range(1, 20, 5, log=True),
}
PRESSURE: Space = {
    "smoothing": Range(0.1, 1.0, 0.25),
    "pressure_kv_share": Range(0.7, 0.98, 0.85),
    "pressure_delay_s": Range(0.05, 1.5, 0.1, log=True),
    "pressure_samples": Range(1, 6, 3),
    "recovery_kv_share": Range(0.3, 0.7, 0.65),
    "recovery_delay_s": Range(0.005, 0.3, 0.025, log=True),
    "recovery_samples": Range(2, 15, 5),
}
LEVELS: Space = {
    "calm": Range(0.3, 0.95, 0.6),
    "wait_s": Range(0.2, 3.0, 1.0, log=True),
    "smoothing": Range(0.2, 1.0, 0.5),
    "hysteresis": Range(0.0, 1.5, 0.5),
}
TABLE: Space = {
    "columns": Choice((3, 1, 2, 4, 6)),
    "rows": Choice((2, 1, 3, 4)),
    "smoothing_s": Range(3.0, 40.0, 10.0, log=True),
    "margin": Range(0.0, 0.3, 0.1),
}
LOOKAHEAD: Space = {
    "margin": Range(0.02, 1.0, 0.1, log=True),
    "horizon_s": Range(6.0, 20.0, 12.0),
    "memory_s": Range(2.0, 15.0, 5.0, log=True),
    "grace_s": Range(0.0, 1.5, 1.0),
    "factors": Choice(([1.0, 1.5], [1.0], [1.0, 2.0])),
}
ALL_LIMITS = ("", "+wait", "+saber")


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A policy of conf/policy as a rule.

    file: its name there. about: what it does, for tables. keys: values that differ from the file. space: what is
    searched, next to what depends on the setting (``space_of``). needs_bits: low precision without which it cannot run,
    0 for any. limits: limits of admission around it. slow: it is tuned on a third of the windows.
    changes: whether it changes the plan; such a rule starts with the plan that learned policies start with, and a fixed
    plan with itself.
    """

    file: str
    about: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    space: Space = field(default_factory=dict)
    needs_bits: int | None = None
    limits: tuple[str, ...] = ALL_LIMITS
    slow: bool = False
    changes: bool = True


BASES: Mapping[str, Base] = {
    "dense": Base(
        file="dense",
        about="the full model",
        limits=("", "+queue", "+wait", "+saber", "+saber_queue"),
        changes=False,
    ),
    "int4": Base(file="int4", about="all layers at 4 bits", needs_bits=4, changes=False),
    "int8": Base(file="int8", about="all layers at 8 bits", needs_bits=8, changes=False),
    "static": Base(file="fixed", about="the best single plan of training windows", changes=False),
    "greedy_stop": Base(
        file="greedy_stop",
        about="RAP's rule without learning: drop in a greedy order until memory suffices",
        space=STOP,
        limits=("", "+queue", "+wait", "+saber"),
    ),
    "random_stop": Base(file="random", about="the same in random orders", space=STOP),
    "pressure_stop": Base(
        file="adaptive_pruning",
        about="drop in a greedy order under pressure of memory or queue",
        space={"step": Choice((2, 1, 4)), "most": Choice((8, 4, 16)), **PRESSURE},
    ),
    "precision": Base(
        file="adaptive_precision",
        about="lower precision in proportion to pressure",
        space={"levels": Choice((4, 1, 2, 8)), **LEVELS},
        needs_bits=0,
        limits=("", "+queue", "+wait", "+saber"),
    ),
    **{
        f"morphserve_{mode}": Base(
            file="morphserve",
            about=f"MorphServe's controller, {mode} mode",
            keys={"mode": mode},
            space=PRESSURE,
            needs_bits=0,
        )
        for mode in ("accuracy", "default", "performance")
    },
    "memory_ladder": Base(
        file="memory_ladder", about="lower precision, then drop, until memory suffices", space=STOP, needs_bits=0
    ),
    "load_ladder": Base(
        file="load_ladder",
        about="lower precision, then drop, in proportion to pressure; only plans that fit",
        space={"prefill_tokens": Choice((None, 128, 256, 512, 1024)), **LEVELS},
    ),
    "load_table": Base(file="load_table", about="a table: arrival rate and budget pick the plan", space=TABLE),
    "lookahead": Base(
        file="lookahead",
        about="try every plan on a model of the server, without knowing the future",
        space=LOOKAHEAD,
        limits=("",),
        slow=True,
    ),
}

# --- Limits of admission ---------------------------------------------------------------------------------------------

LIMITS: Mapping[str, str] = {
    "": "",
    "+queue": "with a limit of waiting requests",
    "+wait": "with a longest wait in seconds and a limit of running requests",
    "+saber": "with SABER's limits, predicted from the targets",
    "+saber_queue": "with a limit of waiting requests that follows the measured speed",
}
"""Suffixes of the names of rules, with what they stand for."""

RULES: tuple[str, ...] = tuple(f"{name}{limit}" for name, base in BASES.items() for limit in base.limits)


def limit_space(setting: ServeSetting, limit: str) -> Space:
    """Return what is searched of a limit of admission; limits in seconds scale with the target."""
    target_s = setting.slo.ttft_s or math.nan
    spaces: Mapping[str, Space] = {
        "": {},
        "+queue": {"max_waiting": Range(1, 64, 8, log=True)},
        "+wait": {
            "max_wait_s": Range(0.2 * target_s, target_s, 0.75 * target_s),
            "max_running": Choice((None, 64, 48, 32, 20, 12)),
        },
        "+saber": {"margin": Range(0.4, 1.1, 0.8), "smoothing_s": Range(2.0, 30.0, 10.0, log=True)},
        "+saber_queue": {"margin": Range(0.1, 1.0, 0.4), "smoothing_s": Range(2.0, 30.0, 10.0, log=True)},
    }
    tpot_s = setting.slo.tpot_s
    return {**spaces[limit], **({"tpot_s": Choice((tpot_s, None))} if limit == "+saber" and tpot_s else {})}


_NO_LIMITS: Mapping[str, None] = {"max_waiting": None, "max_wait_s": None, "max_running": None}


def _limit_config(setting: ServeSetting, limit: str, values: Mapping[str, Any], inner: Any) -> Any:
    """Return the policy with a limit of admission around ``inner``, in the form of ``maker``."""
    if not limit:
        return inner
    if limit in ("+queue", "+wait"):
        return {"name": "limited", **_NO_LIMITS, **values, "policy": inner}
    kind = "requests" if limit == "+saber_queue" else "seconds"
    return {"name": "saber", "limit": kind, "ttft_s": setting.slo.ttft_s, **values, "policy": inner}


# --- Rules of a setting ----------------------------------------------------------------------------------------------


def parts_of(name: str) -> tuple[str, str]:
    """Return the policy and the limit of a rule's name: ``("greedy_stop", "+wait")``.

    Raises:
        ConfigError: for an unknown rule, with the nearest name.
    """
    if name not in RULES:
        raise ConfigError(f"there is no rule {name!r}; {nearest(name, RULES)}")
    base, plus, limit = name.partition("+")
    return base, plus + limit


def low_bits_of(setting: ServeSetting) -> int | None:
    """Return the bits of the low precision of which a setting has copies; None if it has none."""
    copies = {bits for plan in setting.actions.plans for bits in plan.weight_bits} - {setting.model.weight_bits}
    return min(copies, default=None)


def left_out(setting: ServeSetting) -> dict[str, str]:
    """Return the rules that cannot run in a setting, each with the reason."""
    found, low_bits = {}, low_bits_of(setting)
    for name in RULES:
        base, limit = parts_of(name)
        needs = BASES[base].needs_bits
        if needs is not None and low_bits is None:
            found[name] = "there are no copies of the weights at low precision"
        elif needs and needs != low_bits:
            found[name] = f"there are copies at {low_bits} bits, not at {needs}"
        elif limit not in ("", "+queue") and setting.slo.ttft_s is None:
            found[name] = "the SLO has no target for the first token"
    return found


def runnable(setting: ServeSetting, names: Sequence[str] | None = None) -> list[str]:
    """Return the rules with these names that can run in a setting, in the order of ``RULES``; None for all.

    Raises:
        ConfigError: for an unknown rule, with the nearest name.
    """
    for name in names or ():
        parts_of(name)
    missing = left_out(setting)
    return [name for name in RULES if name not in missing and (names is None or name in names)]


def space_of(setting: ServeSetting, name: str) -> dict[str, Space]:
    """Return what is searched of a rule in a setting: of its policy, and of its limit of admission."""
    base, limit = parts_of(name)
    return {"policy": {**BASES[base].space, **_setting_space(setting, base)}, "limit": limit_space(setting, limit)}


def _setting_space(setting: ServeSetting, base: str) -> Space:
    """Return the part of a policy's space that depends on the setting: which plans there are."""
    options, layers = setting.action_options, setting.model.num_layers
    low_bits, blocks = low_bits_of(setting), len(options["order"])
    if base == "static":
        return {"drops": Choice(list(options.get("drops", (0,)))), "low_layers": Choice(list(options["low_layers"]))}
    if base in ("memory_ladder", "load_ladder"):
        deepest = max(options.get("drops", (0,))) or min(8, blocks)
        steps = [list(range(step, deepest + 1, step)) for step in (2, 4)]
        quarters = [list(range(layers // n, layers + 1, layers // n)) for n in (4, 2, 1)]
        return {
            "drops": Choice([*steps, *([] if low_bits is None else [[]])]),
            "low_layers": Choice([[]] if low_bits is None else quarters),
        }
    return {}


def default_parameters(setting: ServeSetting, name: str) -> dict[str, dict[str, Any]]:
    """Return the parameters of a rule before any tuning."""
    return {
        part: _shifted(space, {key: values.default for key, values in space.items()})
        for part, space in space_of(setting, name).items()
    }


def sampled_parameters(setting: ServeSetting, name: str, rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Return random parameters of a rule."""
    return {
        part: _shifted(space, {key: values.sample(rng) for key, values in space.items()})
        for part, space in space_of(setting, name).items()
    }


def _shifted(space: Space, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with what they lie above added."""
    above = {key: values[of.above] for key, of in space.items() if of.above}
    return {key: round(value + above[key], 4) if key in above else value for key, value in values.items()}


def check_parameters(setting: ServeSetting, name: str, parameters: Parameters) -> None:
    """Check that parameters lie in the declared space of a rule.

    Raises:
        ConfigError: for an unknown rule, or a parameter that is missing, unknown or out of range.
    """
    for part, space in space_of(setting, name).items():
        values = parameters.get(part, {})
        if set(values) != set(space):
            raise ConfigError(f"rule {name}: {part} has {sorted(values)}; tuning searches {sorted(space)}")
        for key, allowed in space.items():
            value = values[key] - values[allowed.above] if allowed.above else values[key]
            if not allowed.holds(value):
                raise ConfigError(f"rule {name}: {part}.{key} is {values[key]!r}; the space of tuning is {allowed}")


def rule_config(setting: ServeSetting, name: str, parameters: Parameters, made: Mapping[str, Any] | None = None) -> Any:
    """Return a rule as the content of ``policy.policy`` (``sim.policies.admission.maker``).

    Args:
        made: keys of the policy that tuning made from windows: the table of load_table.
    """
    base, limit = parts_of(name)
    values = {**_keys_of(setting, base, dict(parameters.get("policy", {}))), **(made or {})}
    inner = {"name": BASES[base].file, **BASES[base].keys, **values}
    if BASES[base].changes and base != "lookahead":  # which starts as its table says
        inner = {"name": "starting", **_start(setting), "policy": inner}
    return _limit_config(setting, limit, parameters.get("limit", {}), inner)


def _start(setting: ServeSetting) -> dict[str, Any]:
    """Return the plan with which policies start that change plans, as keys of conf/policy/starting.yaml.

    An engine refuses prompts, and cuts answers, that do not fit the memory that its first plan leaves for KV. With one
    start they all serve the same requests. A fixed plan starts with itself: after another start, a prompt that does not
    fit next to its weights would block the queue.
    """
    plan = setting.actions.plans[setting.actions.start]
    gone = {
        key: [i for i, kept in enumerate(of) if not kept]
        for key, of in (("drop_mha", plan.decode.mha), ("drop_ffn", plan.decode.ffn))
    }
    return {**gone, "weight_bits": list(plan.weight_bits)}


def _keys_of(setting: ServeSetting, base: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a policy: the searched values and what the setting determines."""
    options, layers = setting.action_options, setting.model.num_layers
    low_bits = low_bits_of(setting)
    if base == "static":
        blocks = [block_of(block) for block in options["order"][: values.pop("drops")]]
        low = values.pop("low_layers")
        values["weight_bits"] = [low_bits if i < low else setting.model.weight_bits for i in range(layers)]
        mha, ffn = ([layer for of, layer in blocks if of == kind] for kind in ("MHA", "FFN"))
        return values | {"drop_mha": mha, "drop_ffn": ffn}
    if base == "lookahead":
        # Half the table: trying a plan costs time, and those between are seldom the best.
        table = {**options, "low_layers": sorted({min(options["low_layers"]), max(options["low_layers"])})}
        runs, waits = list(options.get("runs", [None])), list(options.get("waits", [None]))
        table["runs"] = runs[:2]
        if isinstance(setting, ClusterSetting):  # every replica tries plans, so try fewer
            table["runs"] = [runs[i] for i in sorted({0, len(runs) // 2})]
            table["waits"] = waits[:1]
        return values | {"actions": table, "ttft_s": setting.slo.ttft_s or 2.0, "tpot_s": setting.slo.tpot_s}
    if base in ("greedy_stop", "pressure_stop", "memory_ladder", "load_ladder", "load_table"):
        values |= {"order": list(options["order"]), "made_for": None}
    if base == "pressure_stop" and "most" in values:
        values["most"] = min(values["most"], len(options["order"]))
    if base == "random_stop":
        values["max_dropped"] = min(max(20, *options.get("drops", (0,))), 2 * (layers - 2))
    if base == "load_table":
        values.pop("columns", None)
        values.pop("rows", None)
    if low_bits is not None and base in ("memory_ladder", "load_ladder", "load_table"):
        values["low_bits"] = low_bits
    if low_bits is not None and base in ("precision", *(name for name in BASES if name.startswith("morphserve"))):
        values["bits"] = low_bits
    return values


def build_rule(config: Any) -> Build:
    """Return a builder of the policy of ``rule_config``."""
    return maker(config)


def about_rule(name: str) -> str:
    """Return what a rule does, for tables."""
    base, limit = parts_of(name)
    return f"{BASES[base].about}{', ' if limit else ''}{LIMITS[limit]}"
