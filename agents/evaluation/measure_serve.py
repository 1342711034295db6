"""Plays rules and learned policies on the listed windows of ``ServeTrace``; writes serve*.parquet and serve.json.

The test windows are played only for a committed claim (``agents.evaluation.claim``); ``claim=none`` plays the
validation windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from agents.baselines.serve import Build, learned_serve_policies, member_policies
from agents.envs.prune_loads import Split
from agents.envs.serve import ServeSetting
from agents.envs.serve_lists import Listed, check_scenarios, listed_windows, scenario_kwargs
from agents.envs.serve_sources import sources_with
from agents.envs.serve_windows import check_sources
from agents.evaluation.chosen import glob_files
from agents.evaluation.claim import check_claim, claim_commits, claimed, policy_hashes
from agents.evaluation.measure import (
    check_any,
    check_same_played,
    read_summary,
    selected,
    sources_of,
    split_of,
    training_seconds,
    tuned_before,
    write_curves,
    write_rows,
)
from agents.evaluation.rules import RULES
from agents.evaluation.serve import MEMBERS, ORACLES, Match, evaluate_serve, first_windows
from agents.evaluation.tuning import rules_tuned_to, tuned_folder, tuned_rules
from agents.evaluation.unfinished import Unfinished
from sim.errors import ConfigError
from sim.paths import REPOSITORY
from sim.policies.learned import read_learned
from sim.progress import say
from sim.results.run_folder import commit, provenance, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What an evaluation plays.

    files: of learned policies, by name. tuned: by scenario, the rules and their parameters. oracles: which of them.
    """

    split: Split
    listed: Sequence[Listed]
    matches: Mapping[str, Match]
    files: Mapping[str, Sequence[Path]]
    tuned: Mapping[str, Mapping[str, Any]]
    oracles: Sequence[str]


def what_is_played(cfg: DictConfig, split: Split, tuned: Mapping[str, Any] | None = None) -> Played:
    """Return what a configuration plays on the windows of a split.

    Args:
        cfg: an ``EvaluateConfig``. tuned: parameters of rules from an earlier run; None reads or searches them.
    Raises:
        ConfigError: for an unknown name, or if no window would be played.
    """
    _check_counts(cfg)
    scenarios = check_scenarios(None if cfg.scenarios is None else list(cfg.scenarios))
    sources = None if cfg.serve_sources is None else list(cfg.serve_sources)
    listed = first_windows(listed_windows(split, scenarios=scenarios, sources=sources), cfg.serve_windows)
    files = {str(name): glob_files(str(glob)) for name, glob in cfg.serve_learned.items()}
    names = None if cfg.baselines is None else [name for name in cfg.baselines if name in RULES]
    matches, found = {}, {}
    for scenario in scenarios:
        setting = ServeSetting(**{**scenario_kwargs(scenario), "split": split})
        if tuned is None:
            rules, found[scenario] = tuned_rules(setting, names, tuned_folder(cfg))
        elif scenario not in tuned:
            raise ConfigError(f"only: the results have no scenario {scenario}; set scenarios=[{','.join(tuned)}]")
        else:
            rules, found[scenario] = rules_tuned_to(tuned[scenario]), tuned[scenario]
        policies: dict[str, Sequence[Build]] = {name: [build] for name, build in rules.items()}
        policies |= learned_policies(files, low_bits=not scenario.endswith("/none"))
        matches[scenario] = Match(setting=setting, policies=policies)
    oracles = [name for name in ORACLES if cfg.baselines is None or name in cfg.baselines]
    return Played(split=split, listed=listed, matches=matches, files=files, tuned=found, oracles=oracles)


def _check_counts(cfg: DictConfig) -> None:
    for key, least in (("serve_windows", 1), ("serve_oracle", 0)):
        if cfg[key] is not None and cfg[key] < least:
            raise ConfigError(
                f"{key} is {cfg[key]}; it must be at least {least} (windows of each trace in each scenario)"
            )
    if cfg.serve_sources is not None:
        check_sources(cfg.serve_sources, "serve_sources")


def learned_policies(files: Mapping[str, Sequence[Path]], *, low_bits: bool) -> dict[str, Sequence[Build]]:
    """Return the policies of every name, and the networks of those that average several."""
    found: dict[str, Sequence[Build]] = {}
    for name, paths in files.items():
        found[name] = learned_serve_policies(paths, low_bits=low_bits)
        if len(paths) == 1 and (members := member_policies(paths[0], low_bits=low_bits)):
            found[f"{name}{MEMBERS}"] = members
    return found


def measure_serve(cfg: DictConfig, folder: Path) -> None:
    """Evaluate the policies of ``ServeTrace``; write serve.parquet and serve.json.

    Raises:
        ConfigError: for the test windows without a committed claim that fits, or with results of the same claim.
    """
    split = split_of(cfg, "claim")
    if split == "test":
        claim_commits(REPOSITORY / str(cfg.claim))  # a missing claim is an error before the windows are read
    before = read_summary(folder / "serve.json", cfg) if cfg.only else None
    played = what_is_played(cfg, split, None if before is None else tuned_before(before, folder / "serve.json"))
    matches, oracles = played.matches, played.oracles
    check_any({**next(iter(matches.values())).policies, **dict.fromkeys(oracles)}, "serve")
    summary = provenance(0) if before is None else before
    now = claimed(cfg, played)
    if before is not None:
        check_same_played(before, split, "windows", now["windows"], folder)
    if split == "test":
        summary["claim"] = check_claim(cfg, played, folder)
    for note in sources_with(split)[1]:
        say(note)
    if cfg.only:
        matches = {
            scenario: Match(setting=match.setting, policies=_chosen(cfg, match.policies))
            for scenario, match in matches.items()
        }
        oracles = []
    unfinished = Unfinished(folder / "serve_unfinished.jsonl", now | {"only": list(cfg.only)}, commit())
    rows = evaluate_serve(
        matches,
        played.listed,
        oracles=oracles,
        oracle_each=cfg.serve_oracle,
        workers=cfg.workers,
        unfinished=unfinished,
    )
    summary["begun"] = unfinished.begun
    write_rows(cfg, folder / "serve.parquet", rows)
    write_curves(cfg, folder / "serve_training.parquet", cfg.serve_curves)
    stated = {"compared": cfg.compared, "windows": now["windows"], **about_played(played, summary)}
    write_json(folder / "serve.json", summary | stated)
    unfinished.remove()


def _chosen(cfg: DictConfig, policies: Mapping[str, Sequence[Build]]) -> dict[str, Sequence[Build]]:
    """Return the policies that ``only`` names, with their members; rules that cannot run in a scenario are missing."""
    members = [f"{name}{MEMBERS}" for name in cfg.only]
    rules = [name for name in cfg.only if name in policies or name not in RULES]
    return selected(rules, policies) | {name: policies[name] for name in members if name in policies}


def about_played(played: Played, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what serve.json states of what was played."""
    abouts = {name: [read_learned(path, "ServeTrace").about for path in paths] for name, paths in played.files.items()}
    return {
        "split": played.split,
        "tuned": played.tuned,
        "policies": policy_hashes(played.files),
        "trained_on": sorted({source for seeds in abouts.values() for about in seeds for source in sources_of(about)}),
        "seconds": summary.get("seconds", {}) | training_seconds(abouts),
    }
