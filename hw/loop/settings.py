"""The keys of ``hw.loop``, and the configuration of one of its runs, which sim.replay and hw.replay share."""

from __future__ import annotations

import math
from collections.abc import Mapping
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

PAGES = ("also", "predict", "judge", "only")


@dataclass(kw_only=True)
class LoopConfig(HwReplayConfig):
    """What to predict, to serve and to judge.

    windows: label -> what a window is, as differences from the rest of the configuration (``trace: NAME``,
        ``KEY: VALUE``). Arrival rates hold for a machine as fast as its calibration; on one that is slower by a factor,
        requests arrive slower by it.
    policies: label -> the differences of a policy.
    learner: label of the policy that must not be below the best rule; null for none.
    fixed: labels of policies that never change the plan; the other ones must.
    rounds: how often each window is predicted, at the speed that reference runs measure then, and served right after.
    repeats: real runs of each policy in a round of a window.
    measure: whether reference runs measure the speed of the machine; false takes ``slowdown``. There are ``references``
        of them at each precision that the calibration has, because the machine may be slower at one than at another,
        with arrivals for ``reference_s`` seconds.
    ranges: whether each window is also simulated with a machine as fast as in each single reference run; the predicted
        utility is then the mean of these, with a range. After the judged runs, each is simulated once more with a
        machine as fast as it was during the run; no claim depends on these.
    least_requests: of a window. least_changes: changes of the weights that run, per minute.
    points: how far a simulated utility may be from the real one, unless the noise is larger.
    runs: the folder of run folders. out: where results go.
    note: what else a reader of the page has to know about the runs, such as what the machine did meanwhile.
    page: also (run what is missing, judge, write the page), predict (only write and show the predictions of the first
        round), judge (run nothing), or only (write the page again from the results).
    """

    windows: dict[str, Any] = field(default_factory=dict)
    policies: dict[str, Any] = field(default_factory=dict)
    learner: str | None = None
    fixed: list[str] = field(default_factory=list)
    rounds: int = 3
    repeats: int = 1
    measure: bool = True
    references: int = 4
    reference_s: float = 8.0
    ranges: bool = True
    least_requests: int = 150
    least_changes: float = 20.0
    points: float = 0.05
    runs: str = "runs/loop"
    out: str | None = None
    note: str = ""
    page: str = "also"


ConfigStore.instance().store(name="hw_loop_schema", node=LoopConfig)
OWN_KEYS = (
    "windows",
    "policies",
    "learner",
    "fixed",
    "rounds",
    "repeats",
    "measure",
    "references",
    "reference_s",
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
    *("rounds", "repeats", "references", "reference_s", "ranges", "runs", "out", "note", "page"),
    *("slowdown", "measure", "points", "plot", "label", "tags"),
)
"""Keys on which predictions do not depend; the slowdown stands in them."""


def check_settings(cfg: DictConfig) -> None:
    """Check the keys of the loop itself.

    Raises:
        ConfigError: for a value out of range, or a label that does not exist.
    """
    if cfg.page not in PAGES:
        raise ConfigError(f"page is {cfg.page!r}; {nearest(cfg.page, PAGES)}")
    if not cfg.windows or len(cfg.policies) < 2:
        raise ConfigError(
            f"there are {len(cfg.windows)} windows and {len(cfg.policies)} policies; name at least one window and two "
            "policies, or take an experiment that does: experiment=loop_smollm2"
        )
    for key, least in (("rounds", 1), ("repeats", 1), ("references", 1), ("least_requests", 1)):
        if cfg[key] < least:
            raise ConfigError(f"{key} is {cfg[key]}; it must be at least {least}")
    if not 0 < cfg.reference_s < math.inf:
        raise ConfigError(f"reference_s is {cfg.reference_s}; it must be a number of seconds above 0, such as 8")
    if not 0 <= cfg.points <= 1 or not cfg.least_changes >= 0:
        raise ConfigError(
            f"points is {cfg.points} and least_changes {cfg.least_changes}; they must be from 0 to 1, and at least 0"
        )
    for key, labels in (("learner", [cfg.learner] if cfg.learner is not None else []), ("fixed", list(cfg.fixed))):
        for label in labels:
            if label not in cfg.policies:
                raise ConfigError(f"{key}: there is no policy {label!r}; {nearest(label, map(str, cfg.policies))}")


def of_window(cfg: DictConfig, window: str) -> DictConfig:
    """Return the configuration with a single one of its windows."""
    one = cfg.copy()
    with open_dict(one):
        one.windows = {window: cfg.windows[window]}
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
    one = with_differences(one, dict(cfg.windows[window] or {}), f"windows.{window}")
    one = with_differences(one, dict(cfg.policies[policy] or {}), f"policies.{policy}")
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
