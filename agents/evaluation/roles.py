"""Evaluates how many replicas prefill: fixed numbers, the rule ``by_load`` and learned policies on the same episodes.

Every policy decides as often as in ``ServeRoles``. Fixed numbers begin with their number; all others begin with the
environment's. The thresholds of ``by_load`` are searched on training episodes. The test episodes are played only for a
committed claim (``agents.evaluation.roles_claim``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from agents.envs.prune_loads import Split
from agents.envs.roles import RolesSetting
from agents.envs.serve_windows import Window
from agents.evaluation.figures import serving_figures
from sim.config import load_option
from sim.disaggregate.disaggregate import Disaggregated
from sim.disaggregate.learned_roles import learned_roles
from sim.disaggregate.members import role_changes
from sim.disaggregate.roles import ByLoad
from sim.progress import counted, progress
from sim.results.records import Status

Start = Callable[[RolesSetting, Sequence[Window]], Disaggregated]
"""Builds the system of an episode with what decides on its roles."""
SEEDS: Mapping[Split, int] = {"train": 20251128, "validation": 20251127, "test": 20251129}
TUNING_EPISODES = 6
WAITS_S, KV_SHARES = (0.1, 0.5, 1.5), (0.6, 0.8, 0.95)
"""The thresholds of ``by_load`` that are tried."""


def roles_setting(split: Split) -> RolesSetting:
    """Return the environment of conf/env/serve_roles.yaml on a split."""
    kwargs: Any = OmegaConf.to_container(load_option("env", "serve_roles").kwargs)
    return RolesSetting(**{**kwargs, "split": split})


def fixed_number(setting: RolesSetting, windows: Sequence[Window], *, count: int) -> Disaggregated:
    """Return the system of an episode in which this many replicas prefill."""
    return setting.build_system(windows, prefill=count)


def by_load(
    setting: RolesSetting, windows: Sequence[Window], *, most_wait_s: float, most_kv_share: float
) -> Disaggregated:
    """Return the system of an episode under the rule ``by_load`` with these thresholds."""
    rule = ByLoad(most_wait_s=most_wait_s, most_kv_share=most_kv_share, period_s=setting.tick_s)
    return setting.build_system(windows, roles=rule)


def learned(setting: RolesSetting, windows: Sequence[Window], *, path: str) -> Disaggregated:
    """Return the system of an episode under an exported policy."""
    policy = learned_roles(path=path, period_s=setting.tick_s)
    policy.check_served(setting.model.name, setting.replicas)
    return setting.build_system(windows, roles=policy)


def rules(setting: RolesSetting, tuned: Mapping[str, float]) -> dict[str, Start]:
    """Return every rule by name: each fixed number, and ``by_load`` as conf/roles has it and with tuned thresholds."""
    known = {"by_load": load_option("roles", "by_load"), "by_load (tuned)": tuned}
    return {
        **{f"fixed_{count}": partial(fixed_number, count=count) for count in range(1, setting.replicas)},
        **{
            name: partial(by_load, most_wait_s=float(own["most_wait_s"]), most_kv_share=float(own["most_kv_share"]))
            for name, own in known.items()
        },
    }


def learned_policies(files: Mapping[str, Sequence[Path]]) -> dict[str, list[Start]]:
    """Return a builder of the exported policy of each file, by name."""
    return {name: [partial(learned, path=str(path)) for path in paths] for name, paths in files.items()}


def episodes(setting: RolesSetting, each: int) -> list[tuple[str, tuple[Window, ...]]]:
    """Return (traffic, windows) of the split's episodes, the same in every call: ``each`` for every traffic."""
    rng = np.random.default_rng(SEEDS[setting.split])
    return [(" + ".join(mix), setting.sample(rng, mix=mix)) for _ in range(each) for mix in setting.traffic]


def play(setting: RolesSetting, windows: Sequence[Window], start: Start) -> dict[str, Any]:
    """Serve an episode; return its figures.

    They are ``serving_figures``, P95 TPOT of finished requests in seconds, and how often a replica changed its role.
    """
    system = start(setting, windows)
    system.run()
    records = system.records()
    tpot_s = records.tpot_s[(records.status == Status.FINISHED) & np.isfinite(records.tpot_s)]
    return {
        **serving_figures(setting, system, len(system.trace)),
        "tpot_p95_s": float(np.quantile(tpot_s, 0.95)) if len(tpot_s) else np.nan,
        "role_changes": role_changes(system.events()),
    }


def tune_by_load(setting: RolesSetting) -> dict[str, Any]:
    """Search the thresholds of ``by_load`` on the setting's episodes.

    Returns:
        ``tuned``, the thresholds with the highest mean utility; ``trials``, each pair with its mean utility.
    """
    played, trials = episodes(setting, -(-TUNING_EPISODES // len(setting.traffic))), []
    pairs = list(product(WAITS_S, KV_SHARES))
    with progress("tuning by_load", len(pairs), "trials") as report:
        for number, (wait_s, share) in enumerate(pairs):
            start = partial(by_load, most_wait_s=wait_s, most_kv_share=share)
            utility = float(np.mean([play(setting, windows, start)["utility"] for _, windows in played]))
            trials.append({"most_wait_s": wait_s, "most_kv_share": share, "utility": round(utility, 6)})
            report(number + 1)
    best = max(trials, key=lambda trial: trial["utility"])
    return {
        "tuned": {key: best[key] for key in ("most_wait_s", "most_kv_share")},
        "trials": trials,
        "episodes": len(played),
    }


def evaluate_roles(
    setting: RolesSetting, policies: Mapping[str, Sequence[Start]], played: Sequence[tuple[str, Sequence[Window]]]
) -> pd.DataFrame:
    """Return one row for each policy, seed and episode."""

    def rows_of(number: int, traffic: str, windows: Sequence[Window]) -> list[dict[str, Any]]:
        outages = setting.outages.of(windows[0].budget_seed, setting.windows.window_s)
        scenario = {
            "window": number,
            "source": traffic,
            "phases": setting.phases_of(windows)[0],
            "outages": "yes" if any(outages(replica) for replica in range(setting.replicas)) else "no",
        }
        return [
            {"policy": name, "seed": seed, **scenario, **play(setting, windows, start)}
            for name, seeds in policies.items()
            for seed, start in enumerate(seeds)
        ]

    with progress("playing", len(played), "episodes") as report:
        parts = (rows_of(number, traffic, windows) for number, (traffic, windows) in enumerate(played))
        return pd.DataFrame([row for rows in counted(parts, report) for row in rows])
