"""Plays the test episodes of ``ServeRoles`` for a committed claim; writes roles.parquet and roles.json.

The order is that of ``agents.evaluation.claim``: ``python -m agents.claim 'tasks=[roles]'`` tunes ``by_load`` on
training episodes and states policies, rules, episodes and the comparison; it is committed; then
``python -m agents.evaluate 'tasks=[roles]'`` plays. ``claim=none`` plays validation episodes, with thresholds that are
tuned then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from agents.envs.prune_loads import Split
from agents.envs.roles import RolesSetting
from agents.envs.serve_windows import Window
from agents.evaluation.chosen import glob_files
from agents.evaluation.claim import check_stated, claim_path, policy_hashes
from agents.evaluation.measure import check_same_played, read_summary, selected, split_of, training_seconds, write_rows
from agents.evaluation.roles import (
    SEEDS,
    Start,
    episodes,
    evaluate_roles,
    learned_policies,
    roles_setting,
    rules,
    tune_by_load,
)
from sim.errors import ConfigError
from sim.policies.learned import read_learned
from sim.results.run_folder import commit, provenance, write_json

COMPARISON = (
    "SLO attainment of the policy minus that of each fixed number of prefill replicas and of by_load (with the "
    "thresholds of conf/roles/by_load.yaml and with tuned ones), on the same episodes, each traffic counting the same; "
    "95 % intervals by agents.evaluation.statistics, episodes resampled within each traffic"
)
ANY_THRESHOLDS = {"most_wait_s": 1.0, "most_kv_share": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedRoles:
    """What an evaluation of roles plays; files: of learned policies, by name."""

    setting: RolesSetting
    episodes: Sequence[tuple[str, tuple[Window, ...]]]
    files: Mapping[str, Sequence[Path]]


def roles_played(cfg: DictConfig, split: Split) -> PlayedRoles:
    """Return what a configuration plays on a split.

    Args:
        cfg: an ``EvaluateConfig``.
    Raises:
        ConfigError: if no episode would be played.
    """
    if cfg.roles_each < 1:
        raise ConfigError(f"roles_each is {cfg.roles_each}; it must be at least 1 (episodes of each traffic)")
    setting = roles_setting(split)
    files = {str(name): glob_files(str(glob)) for name, glob in cfg.roles_learned.items()}
    return PlayedRoles(setting=setting, episodes=episodes(setting, int(cfg.roles_each)), files=files)


def roles_claimed(cfg: DictConfig, played: PlayedRoles) -> dict[str, Any]:
    """Return what a claim states of what is played, without its date, commit and tuned thresholds."""
    windows = [[asdict(window) for window in windows] for _, windows in played.episodes]
    content = {
        "comparison": {"policy": cfg.roles_compared, "by": COMPARISON},
        "policies": policy_hashes(played.files),
        "rules": [*rules(played.setting, ANY_THRESHOLDS)],
        "episodes": {
            "split": played.setting.split,
            "environment": "conf/env/serve_roles.yaml",
            "traffic": [dict(mix) for mix in played.setting.traffic],
            "each": int(cfg.roles_each),
            "seed": SEEDS[played.setting.split],
            "windows_sha256": hashlib.sha256(json.dumps(windows, sort_keys=True).encode()).hexdigest(),
        },
    }
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def write_roles_claim(cfg: DictConfig) -> Path:
    """Tune ``by_load`` on training episodes and write the claim of a configuration; return its path.

    Raises:
        ConfigError: if the policy of the comparison is not among those played.
    """
    path = claim_path(str(cfg.roles_claim), "roles_claim")
    played = roles_played(cfg, "test")
    if cfg.roles_compared not in played.files:
        raise ConfigError(
            f"roles_compared is {cfg.roles_compared!r}; it must be one of roles_learned: "
            f"{', '.join(played.files) or 'none'}"
        )
    stated = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    tuned = tune_by_load(roles_setting("train"))
    write_json(path, {**stated, **roles_claimed(cfg, played), "by_load": tuned})
    return path


def measure_roles(cfg: DictConfig, folder: Path) -> None:
    """Evaluate how many replicas prefill; write roles.parquet, then roles.json.

    Raises:
        ConfigError: for the test episodes without a committed claim that fits, or with results of the same claim.
    """
    split = split_of(cfg, "roles_claim")
    played = roles_played(cfg, split)
    now = roles_claimed(cfg, played)
    summary = read_summary(folder / "roles.json", cfg) if cfg.only else provenance(0)
    if cfg.only:
        check_same_played(summary, split, "episodes", now["episodes"], folder)
    if split == "test":
        command = "python -m agents.claim 'tasks=[roles]'"
        claim = check_stated(cfg.roles_claim, now, folder / "roles.json", command, only=bool(cfg.only))
        summary["claim"] = {key: claim[key] for key in ("file", "sha256", "date", "commit", "claim_commit")}
        tuned = claim["by_load"]
    else:
        tuned = summary.get("by_load") or tune_by_load(roles_setting("train"))
    policies: dict[str, Sequence[Start]] = {name: [one] for name, one in rules(played.setting, tuned["tuned"]).items()}
    policies |= learned_policies(played.files)
    if cfg.only:
        policies = selected(cfg.only, policies)
    write_rows(cfg, folder / "roles.parquet", evaluate_roles(played.setting, policies, played.episodes))
    abouts = {name: [read_learned(path, "ServeRoles").about for path in paths] for name, paths in played.files.items()}
    about = {
        "split": split,
        "episodes": now["episodes"],
        "compared": cfg.roles_compared,
        "by_load": tuned,
        "replicas": played.setting.replicas,
        "tick_s": played.setting.tick_s,
        "policies": policy_hashes(played.files),
        "seconds": training_seconds(abouts),
    }
    write_json(folder / "roles.json", summary | about)


__all__ = ["measure_roles", "roles_claimed", "roles_played", "write_roles_claim"]
