"""Checks of a training's configuration before anything slow starts, and of what a resumed training may change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from agents.envs.cluster import ClusterSetting
from agents.envs.prune import PruneSetting
from agents.envs.roles import RolesSetting
from agents.envs.serve import ServeSetting
from agents.envs.serve_windows import source_trace
from agents.registration import ENVIRONMENTS
from agents.training.demonstrations import imitated_plan, starting_policy
from agents.training.episodes import FILE, read_recorded
from sim.errors import ConfigError, RapLabError, nearest
from sim.paths import REPOSITORY
from sim.policies.learned import ACTIVATIONS
from sim.policies.learned_files import MAX_SIZE

Setting = PruneSetting | ServeSetting

# --- Values ----------------------------------------------------------------------------------------------------------


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return low <= value <= high and not (above and value == low)

    return check


def _count(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low


def _schedule(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return the check of [step, value] points: two or more, with steps that rise from 0."""

    def points(value: Any) -> bool:
        if not isinstance(value, list) or len(value) < 2:
            return False
        if not all(isinstance(point, list) and len(point) == 2 and check(point[1]) for point in value):
            return False
        steps = [point[0] for point in value]
        return all(map(_count(0), steps)) and steps[0] == 0 and steps == sorted(set(steps))

    return points


def _either(*checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(check(value) for check in checks)


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


Check = tuple[Callable[[Any], bool], str]
POINTS = "[[0, VALUE], [STEP, VALUE], ...] with rising steps"
RATE: Check = (_either(_number(0.0), _schedule(_number(0.0))), f"a number of at least 0, or {POINTS}")
SHARE: Check = (_number(0.0, 1.0), "a number from 0 to 1")
POSITIVE: Check = (_number(0.0, above=True), "a number above 0")
AT_LEAST_0: Check = (_number(0.0), "a number of at least 0")
COUNT: Check = (_count(1), "a whole number of at least 1")
COUNT_OR_0: Check = (_count(0), "a whole number of at least 0")
TEXT: Check = (_text, "a text")
BOOLEAN: Check = (lambda value: isinstance(value, bool), "true or false")
FIT: dict[str, Check] = {"epochs": COUNT, "batch": COUNT, "lr": AT_LEAST_0}
VALUES: Mapping[str, Mapping[str, Check]] = {
    "agents.training.algorithms.ppo": {
        "lr": RATE,
        "discount": SHARE,
        "gae_lambda": SHARE,
        "steps_an_iteration": COUNT,
        "minibatch": COUNT,
        "epochs": COUNT,
        "clip": POSITIVE,
        "entropy": RATE,
        "foresight": BOOLEAN,
    },
    "agents.training.algorithms.dqn": {
        "lr": AT_LEAST_0,
        "discount": SHARE,
        "batch": COUNT,
        "buffer_steps": COUNT,
        "learning_starts": COUNT_OR_0,
        "steps_an_update": COUNT,
        "target_update_steps": COUNT,
        "tau": (_number(0.0, 1.0, above=True), "a number above 0, at most 1"),
        "epsilon": (_schedule(_number(0.0, 1.0)), f"{POINTS}, each value from 0 to 1"),
        "n_step": (
            lambda value: _count(1)(value) and value <= 3,
            "1, 2 or 3 (RLlib's replay buffer counts longer ones wrongly at the end of an episode, and may not end)",
        ),
        "double_q": BOOLEAN,
    },
    "agents.training.algorithms.marwil": {
        "data": TEXT,
        "beta": AT_LEAST_0,
        "lr": AT_LEAST_0,
        "discount": SHARE,
        "batch": COUNT,
        "updates_an_iteration": COUNT,
    },
    "agents.training.clone.LookaheadClone": {
        **FIT,
        "windows": COUNT,
        "every": COUNT,
        "trials": (lambda value: value is None or _count(2)(value), "a whole number of at least 2, or null"),
        "demonstrations": (lambda value: value is None or _text(value), "the glob of files, or null"),
        "horizon_s": POSITIVE,
        "grace_s": AT_LEAST_0,
        "then": (lambda value: value is None or isinstance(value, str | Mapping), "the name of a policy, or null"),
        "hold_s": (lambda value: value is None or POSITIVE[0](value), "null, or a number above 0"),
        "stray": SHARE,
        "weight_decay": AT_LEAST_0,
    },
    "agents.training.imitate.imitate_knapsack": {
        **FIT,
        "loads": COUNT,
        "margin": POSITIVE,
        "margin_weight": AT_LEAST_0,
    },
    "agents.training.imitate.imitate_plan": {
        **FIT,
        "plan": TEXT,
        "share": (_number(0.0, 1.0, above=True), "a number above 0, at most 1"),
        "windows": COUNT,
    },
    "agents.training.imitate.imitate_offline": {**FIT, "data": TEXT},
    "agents.training.imitate.imitate_phases": {
        **FIT,
        "counts": (
            lambda value: isinstance(value, Mapping) and bool(value) and all(map(_count(1), value.values())),
            "a table SOURCE: PREFILL REPLICAS",
        ),
        "share": (_number(0.0, 1.0, above=True), "a number above 0, at most 1"),
        "episodes": COUNT,
    },
    "agents.training.imitate.imitate_nothing": {},
    "agents.training.imitate.imitate_policy": {
        **FIT,
        "path": TEXT,
        "member": (lambda value: value is None or _count(0)(value), "the number of a network, from 0 on, or null"),
        "temperature": POSITIVE,
        "windows": COUNT,
    },
}
"""The keys that each ``_target_`` takes, with the values that each may have."""
TRAINING: Mapping[str, Check] = {
    "seed": (lambda value: _count(0)(value) and value < 2**31, "a whole number from 0 to 2147483647"),
    "minutes": POSITIVE,
    "iterations": (lambda value: value is None or _count(1)(value), "null, or a whole number of at least 1"),
    "num_envs": COUNT,
    "hidden": (
        lambda value: isinstance(value, list) and all(map(_count(1), value)),
        "a list of sizes, at least 1 each",
    ),
    "activation": (lambda value: value in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"),
    "validate_every": COUNT,
    "patience": COUNT,
    "min_gain": AT_LEAST_0,
    "checkpoint_minutes": AT_LEAST_0,
}
TUNING: Mapping[str, Check] = {"samples": COUNT, "at_once": COUNT, "grace": COUNT}


def check_training(cfg: DictConfig) -> None:
    """Check every value of a training, and the files it reads, before Ray starts.

    Args:
        cfg: a ``TrainConfig``.
    Raises:
        ConfigError: for a value that is out of range, with what is allowed. Other errors of this project: for a file
            that is missing or damaged.
    """
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    _check(values, TRAINING, "")
    _check(values, TUNING, "")
    _check(values["ray"], {"runners": COUNT_OR_0}, "ray.")
    for group in ("algorithm", "imitate"):
        if values.get(group) is not None:
            _check_target(values[group], group)
    algorithm = values["algorithm"]
    for less, more in (("minibatch", "steps_an_iteration"), ("batch", "buffer_steps")):
        if more in algorithm and algorithm[less] > algorithm[more]:
            raise ConfigError(
                f"algorithm.{less} is {algorithm[less]}, but algorithm.{more} is only {algorithm[more]}; it must be at "
                "most as large"
            )
    if {"n_step", "steps_an_update"} <= algorithm.keys():
        most = max(1, algorithm["steps_an_update"] // values["num_envs"])
        if algorithm["n_step"] > most:
            raise ConfigError(
                f"algorithm.n_step is {algorithm['n_step']}, but each of num_envs={values['num_envs']} environments "
                f"takes {most} step(s) between updates (algorithm.steps_an_update={algorithm['steps_an_update']}); it "
                "must be at most as large, so lower num_envs or raise steps_an_update"
            )
    serves = values["env"]["id"] == "ServeTrace-v0"
    if values["env"]["kwargs"].get("foresight"):
        instead = "set algorithm.foresight=true in its place" if serves and "foresight" in algorithm else "leave it out"
        raise ConfigError(f"env.kwargs.foresight is for a critic alone; {instead}")
    if algorithm.get("foresight") and not serves:
        raise ConfigError("algorithm.foresight is for env=serve_trace and env=serve_many alone; set it to false")
    if algorithm.get("foresight") and "data" in (values.get("imitate") or {}):
        raise ConfigError(
            "algorithm.foresight is true, but recorded episodes (imitate.data) do not say what came; set it to false, "
            "or start in another way, such as imitate=none"
        )
    setting = check_environment(values)
    if int(setting.action_space.n) > MAX_SIZE:
        raise ConfigError(
            f"the table has {int(setting.action_space.n):,} plans, and the file of a policy at most {MAX_SIZE:,}; "
            "shorten the lists of env.kwargs.actions"
        )
    _check_files(values, setting)


def _check(values: Mapping[str, Any], checks: Mapping[str, Check], prefix: str) -> None:
    for key, (check, allowed) in checks.items():
        if key in values and not check(values[key]):
            raise ConfigError(f"{prefix}{key} is {values[key]!r}; it must be {allowed}")


def _check_target(node: Any, group: str) -> None:
    if not isinstance(node, Mapping) or "_target_" not in node:
        without = ", or imitate=none for no imitation" if group == "imitate" else ""
        raise ConfigError(f"{group} is {node!r}; choose an option of conf/{group}, such as {group}=...{without}")
    checks = VALUES.get(str(node["_target_"]))
    if checks is None:
        return  # one's own, which checks its own values
    for key, value in node.items():
        if not str(key).startswith("_") and key not in checks:
            raise ConfigError(f"there is no key {group}.{key}; {nearest(str(key), checks)}")
        if value == "???":
            raise ConfigError(f"{group}.{key} has no value; set it: {group}.{key}=VALUE")
    _check(node, checks, f"{group}.")


def check_environment(values: Mapping[str, Any]) -> Setting:
    """Return the environment's setting.

    Args:
        values: env, reward and num_envs of a ``TrainConfig``.
    Raises:
        ConfigError: for an unknown environment, or arguments that do not fit it.
    """
    name = values["env"]["id"]
    if name not in ENVIRONMENTS:
        raise ConfigError(f"env.id is {name!r}; {nearest(str(name), ENVIRONMENTS)}")
    check_train_split(values["env"]["kwargs"])
    kinds: dict[str, Callable[..., Setting]] = {
        "PruneToBudget-v0": PruneSetting,
        "ServeTrace-v0": ServeSetting,
        "ServeCluster-v0": ClusterSetting,
        "ServeRoles-v0": RolesSetting,
    }
    try:
        setting = kinds[name](**values["env"]["kwargs"], reward=values["reward"])
    except RapLabError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"env.kwargs or reward do not fit {name} ({text}); see conf/env and conf/reward") from error
    if isinstance(setting, ServeSetting):
        for source in setting.sources:
            source_trace(source)
    count = values.get("num_envs")
    if isinstance(setting, ClusterSetting) and count is not None and count % setting.replicas:
        raise ConfigError(
            f"num_envs is {count}; in ServeCluster a row is a replica, so it must be a multiple of "
            f"env.kwargs.replicas, {setting.replicas}"
        )
    return setting


def check_train_split(env_kwargs: Mapping[str, Any]) -> None:
    """Check that what is learned from is the training split: the file of a policy does not state the split.

    Raises:
        ConfigError: for another split.
    """
    split = env_kwargs.get("split", "train")
    if split != "train":
        raise ConfigError(
            f"env.kwargs.split is {split!r}; policies learn from the split train alone, so leave it out "
            "(python -m agents.evaluate plays the others)"
        )


def _check_files(values: Mapping[str, Any], setting: Setting) -> None:
    """Check the recorded episodes, the plan and the policy that the training starts from."""
    imitate = values.get("imitate") or {}
    for node in (values["algorithm"], imitate):
        if "data" in node and str(node["_target_"]) in VALUES:
            shape = setting.observation_space.shape
            assert shape is not None
            read_recorded(REPOSITORY / node["data"] / FILE, shape, int(setting.action_space.n))
    if "plan" in imitate and isinstance(setting, ServeSetting):
        imitated_plan(setting.actions, imitate["plan"])
    if "path" in imitate and "temperature" in imitate:
        path = imitate["path"]
        learned, network = starting_policy(path, imitate.get("member"))
        sizes = [weight.shape[0] for weight in network.weights[:-1]]
        if sizes != values["hidden"]:
            raise ConfigError(
                f"hidden is {values['hidden']}, but the policy of imitate.path has hidden layers of {sizes}; set "
                f"hidden={sizes}"
            )
        if isinstance(setting, ServeSetting) and learned.about["actions"] != list(setting.actions.names):
            raise ConfigError(
                f"imitate.path: {path} chooses from {len(learned.about['actions'])} plans, and this training from "
                f"{len(setting.actions.names)}, of which some differ; set env.kwargs.actions to the plans of that "
                "file, or imitate=none"
            )


# --- Resuming --------------------------------------------------------------------------------------------------------

FREE = ("minutes", "iterations", "validate_every", "patience", "min_gain", "checkpoint_minutes", "resume", "label")
"""Keys that a resumed training may change: limits, and what is written when."""


def check_resumed(cfg: DictConfig, folder: Path) -> None:
    """Check that a training resumes with the configuration that it began with, but for limits.

    Args:
        cfg: a ``TrainConfig``. folder: the run folder, whose config.yaml states how the training began.
    Raises:
        ConfigError: naming every key that changed, with both values.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return
    try:
        began: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        stored = dict(_leaves(began))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is no configuration of a training ({type(error).__name__}); see {folder}") from error
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    now = dict(_leaves(values))
    if "imitate" in began and (began["imitate"] is None) != (values["imitate"] is None):
        now["imitate"], stored["imitate"] = (_target(one["imitate"]) for one in (values, began))
    # A key that was added or removed between two versions is no change that the user made. But the arguments of the
    # environment are compared whether both have them or not: a training may add some, and others have defaults.
    stored.setdefault("algorithm.foresight", False)
    if "imitate.margin" in stored and now["algorithm._target_"] == "agents.training.algorithms.dqn":
        stored.setdefault("imitate.margin_weight", 0.0)
    changed = [
        key
        for key in dict.fromkeys([*now, *stored])
        if (key in now and key in stored) or key.startswith("env.kwargs.")
        if now.get(key, NOT_SET) != stored.get(key, NOT_SET) and key not in FREE and not key.startswith("ray.")
    ]
    if changed:
        both = "; ".join(
            f"{key} is {repr(now[key]) if key in now else 'not set'}, but the run began "
            + (f"with {stored[key]!r}" if key in stored else "without it")
            for key in changed[:5]
        )
        raise ConfigError(
            f"{folder} cannot resume: {both}; use the values it began with, or start another run with label=..."
        )


NOT_SET = object()
"""The value of a key that a configuration does not have."""


def _target(node: Any) -> str | None:
    return None if node is None else str(node.get("_target_"))


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the key, with dots, and the value of everything in a configuration that is no table."""
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value
