"""The keys of ``hw.loop``, and the configuration of one of its runs, which sim.replay and hw.replay share."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict

from hw.replay.run import HwReplayConfig
from sim.config import with_differences
from sim.errors import ConfigError, nearest
from sim.replay.run import build_trace
from sim.traces.transforms import scale_rate

PAGES = ("also", "predict", "serve", "judge", "only")
EACH = ("run", "window")
OWN_FOLDERS = ("before", "sim", "real")
"""What a folder of predictions and judged runs holds."""


@dataclass(kw_only=True)
class LoopConfig(HwReplayConfig):
    """What to predict, to serve and to judge.

    windows: label -> what a window is, as differences from the rest of the configuration (``trace: NAME``,
        ``KEY: VALUE``). Arrival rates hold for a machine as fast as its calibration; on one that is slower by a factor,
        requests arrive slower by it.
    policies: label -> the differences of a policy.
    learner: label of the policy that must not be below the best rule; null for none.
    fixed: labels of policies that never change the plan; the other ones must.
    rounds: number of the last round. In each, every window is served under every policy, right after it was predicted
        at the speed that reference runs measured. Their number is not stated with the predictions, so decide on it
        before you read results. first_round: number of the first one; two processes can serve different rounds into one
        folder.
    predict_each: what one prediction covers: ``run``, one window under one policy, or ``window``, one window under all
        policies, which takes fewer reference runs and is for a machine of steady speed.
    repeats: real runs of each policy after one prediction.
    measure: whether reference runs measure the speed of the machine; false takes ``slowdown``. There are ``references``
        of them at each of ``reference_bits``, because the machine may be slower at one precision than at another, with
        arrivals for ``reference_s`` seconds. An empty list means every precision that the calibration has. Blocks at
        others are priced with the factors of the highest.
    ranges: whether each window is also simulated with a machine as fast as in each single reference run; the predicted
        utility is then the mean of these, with a range. After the judged runs, each is simulated once more with a
        machine as fast as it was during the run; no claim depends on these.
    least_requests: of a window. least_changes: changes of the weights that run, per minute in which requests arrive.
    points: how far a simulated utility may be from the real one, unless the noise is larger. These
        three are stated with the predictions and cannot be changed when runs are judged.
    runs: the folder of run folders. out: where results go.
    note: what else a reader of the page has to know about the runs, such as what the machine did meanwhile.
    page: also (run what is missing, judge, write the page), predict (only write and show the predictions of
        ``first_round``), serve (run what is missing, and judge nothing yet), judge (run nothing), or only (write the
        page again from the results).
    """

    windows: dict[str, Any] = field(default_factory=dict)
    policies: dict[str, Any] = field(default_factory=dict)
    learner: str | None = None
    fixed: list[str] = field(default_factory=list)
    rounds: int = 3
    first_round: int = 1
    predict_each: str = "run"
    repeats: int = 1
    measure: bool = True
    references: int = 4
    reference_s: float = 8.0
    reference_bits: list[int] = field(default_factory=list)
    ranges: bool = True
    least_requests: int = 150
    least_changes: float = 20.0
    points: float = 0.05
    runs: str = "runs/loop"
    out: str | None = None
    note: str = ""
    page: str = "also"


ConfigStore.instance().store(name="hw_loop_schema", node=LoopConfig)
PREDICTIONS = "predictions.json"
OWN_KEYS = (
    "windows",
    "policies",
    "learner",
    "fixed",
    "rounds",
    "first_round",
    "predict_each",
    "repeats",
    "measure",
    "references",
    "reference_s",
    "reference_bits",
    "ranges",
    "least_requests",
    "least_changes",
    "points",
    "runs",
    "out",
    "note",
    "page",
)
"""Keys of the loop itself, which the configuration of a run lacks."""
NO_PREDICTION = (
    *("rounds", "first_round", "predict_each", "repeats", "references", "reference_s", "reference_bits", "ranges"),
    *("runs", "out", "note", "page"),
    *("slowdown", "measure", "plot", "label", "tags"),
)
"""Keys that are not compared with those of the predictions, in which the slowdown and the reference runs stand."""


def check_settings(cfg: DictConfig) -> None:
    """Check the keys of the loop itself.

    Raises:
        ConfigError: for a value out of range, or a label that does not exist.
    """
    if cfg.page not in PAGES:
        raise ConfigError(f"page is {cfg.page!r}; {nearest(cfg.page, PAGES)}")
    if cfg.predict_each not in EACH:
        raise ConfigError(f"predict_each is {cfg.predict_each!r}; {nearest(cfg.predict_each, EACH)}")
    if not cfg.windows or len(cfg.policies) < 2:
        raise ConfigError(
            f"there are {len(cfg.windows)} windows and {len(cfg.policies)} policies; name at least one window and two "
            "policies, or take an experiment that does: experiment=loop_smollm2"
        )
    for key, least in (("rounds", 1), ("repeats", 1), ("references", 1), ("least_requests", 1)):
        if cfg[key] < least:
            raise ConfigError(f"{key} is {cfg[key]}; it must be at least {least}")
    if not 1 <= cfg.first_round <= cfg.rounds:
        raise ConfigError(f"first_round is {cfg.first_round}; it must be from 1 to the number of rounds, {cfg.rounds}")
    if not 0 < cfg.reference_s < math.inf:
        raise ConfigError(f"reference_s is {cfg.reference_s}; it must be a number of seconds above 0, such as 8")
    for label in (*map(str, cfg.windows), *map(str, cfg.policies)):
        if not label or label.startswith(".") or "/" in label or label in OWN_FOLDERS:
            raise ConfigError(
                f"{label!r} cannot be the label of a window or a policy, because it names a folder; take one that does "
                f"not begin with a dot, has no slash, and is none of {', '.join(OWN_FOLDERS)}"
            )
    if not 0 <= cfg.points <= 1 or not cfg.least_changes >= 0:
        raise ConfigError(
            f"points is {cfg.points} and least_changes {cfg.least_changes}; they must be from 0 to 1, and at least 0"
        )
    for key, labels in (("learner", [cfg.learner] if cfg.learner is not None else []), ("fixed", list(cfg.fixed))):
        for label in labels:
            if label not in cfg.policies:
                raise ConfigError(f"{key}: there is no policy {label!r}; {nearest(label, map(str, cfg.policies))}")


def parts_of(cfg: DictConfig, number: int) -> list[tuple[DictConfig, Path]]:
    """Return the parts of a round: what one prediction covers, and is served right after it, in this order.

    The windows come in random order; with ``predict_each=run`` so do the policies of each window.

    Returns:
        The configuration with a single window, and all policies or one, and the folder of its runs.
    """
    rng = random.Random(f"{cfg.seed} {number}")
    windows, found = list(map(str, cfg.windows)), []
    rng.shuffle(windows)
    for window in windows:
        folder, policies = Path(cfg.runs) / f"round{number}" / window, list(map(str, cfg.policies))
        if cfg.predict_each == "window":
            found.append((_part(cfg, window, policies), folder))
            continue
        rng.shuffle(policies)
        found += [(_part(cfg, window, [policy]), folder / policy) for policy in policies]
    return found


def check_folder(cfg: DictConfig, number: int) -> None:
    """Check that the folder of a round holds no window or policy that this configuration lacks.

    Raises:
        ConfigError: if it does: a part of what was served says something else than all of it.
    """
    folder = Path(cfg.runs) / f"round{number}"
    for each, pattern in (("window", "*"), ("run", "*/*")):
        for path in sorted(folder.glob(f"{pattern}/{PREDICTIONS}")):
            labels = path.parent.relative_to(folder).parts
            if each != cfg.predict_each:
                raise ConfigError(f"{path} was made with predict_each={each}; set that, or another folder: runs=FOLDER")
            for kind, label, known in zip(("windows", "policies"), labels, (cfg.windows, cfg.policies), strict=False):
                if label not in known:
                    raise ConfigError(
                        f"{folder} has runs of {kind}.{label}, which this configuration lacks; add it, because all "
                        "that was served is judged, or take another folder: runs=FOLDER"
                    )


def _part(cfg: DictConfig, window: str, policies: Sequence[str]) -> DictConfig:
    one = cfg.copy()
    with open_dict(one):
        one.windows = {window: cfg.windows[window]}
        one.policies = {policy: cfg.policies[policy] for policy in policies}
    return one


def cells(cfg: DictConfig) -> list[tuple[str, str]]:
    """Return every pair of a window and a policy."""
    return [(str(window), str(policy)) for window in cfg.windows for policy in cfg.policies]


def run_config(cfg: DictConfig, window: str, policy: str, slowdown: float) -> DictConfig:
    """Return the configuration of one run: requests arrive slower by ``slowdown``.

    Raises:
        ConfigError: for a difference that names no key or option.
    """
    one = cfg.copy()
    with open_dict(one):
        for key in OWN_KEYS:
            del one[key]
        one.label = window
    for key, label in (("windows", window), ("policies", policy)):
        differences = cfg[key][label] or {}
        if not isinstance(differences, Mapping):
            raise ConfigError(f"{key}.{label} is {differences!r}; it must be a mapping, such as {{policy: dense}}")
        one = with_differences(one, dict(differences), f"{key}.{label}")
    step = {"_target_": f"{scale_rate.__module__}.{scale_rate.__name__}", "_partial_": True, "factor": 1 / slowdown}
    with open_dict(one):
        one.slowdown = slowdown
        one.workload = {"steps": [*one.workload.steps, step]}
    return one


def check_windows(cfg: DictConfig, slowdown: float) -> dict[str, dict[str, float]]:
    """Return requests and seconds of every window, after building each policy's configuration once.

    Raises:
        ConfigError: for a window with too few requests.
    """
    found = {}
    first = str(next(iter(cfg.policies)))
    for label in map(str, cfg.windows):
        trace = build_trace(run_config(cfg, label, first, slowdown))
        if len(trace) < cfg.least_requests:
            raise ConfigError(
                f"windows.{label} has {len(trace)} requests, but least_requests is {cfg.least_requests}; make its "
                "trace longer, raise its rate, or lower least_requests"
            )
        found[label] = {"requests": len(trace), "seconds": round(float(trace.duration_s), 3)}
    for policy in map(str, cfg.policies):
        run_config(cfg, next(iter(found)), policy, slowdown)
    return found


def results_folder(cfg: DictConfig, default: Path) -> Path:
    """Return where the results go."""
    return default if cfg.out is None else Path(cfg.out)


def description(cfg: DictConfig) -> Mapping[str, Any]:
    """Return what predictions depend on: the configuration of every run, without places of files."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key not in NO_PREDICTION}
