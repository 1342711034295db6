"""``python -m agents.tune_rules``: search the parameters of the rules on training windows; write them to conf/rules.

Every rule gets the same number of trials: first its defaults, then random parameters of the space that it declares
(``agents.evaluation.rules``). All rules are tried on the same windows, of every training source and budget, at the
loads of the test windows: a plain reference serves 60, 75 or 90 % of their requests in time. Rules of clusters are
tried on training clusters, each of one source as the test clusters are; slow rules keep their defaults there. The
trials begin on a third of the windows, and the best third of them goes on to all (successive halving, as for the
learner's hyperparameters). The score is the mean utility, averaged over traces.
"""

from __future__ import annotations

import itertools
import json
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from agents.baselines.serve import Build, policy_context
from agents.envs.cluster import ClusterSetting
from agents.envs.serve import ServeSetting
from agents.envs.serve_lists import SHARES, check_scenarios, scenario_kwargs
from agents.envs.serve_pool import FACTOR, at_attainment
from agents.envs.serve_sources import sources_with
from agents.envs.serve_windows import Window
from agents.evaluation.rule_tables import Served, best_table, serve_all
from agents.evaluation.rules import (
    BASES,
    RULES,
    Choice,
    build_rule,
    check_parameters,
    default_parameters,
    left_out,
    low_bits_of,
    parts_of,
    rule_config,
    runnable,
    sampled_parameters,
    space_of,
)
from agents.evaluation.serve import play_window
from sim.atomic import check_writable
from sim.config import one_thread, run_command
from sim.errors import ConfigError
from sim.paths import REPOSITORY
from sim.policies.tuned import FOLDER, read_rules
from sim.processes import in_processes
from sim.progress import counted, progress, say
from sim.results.run_folder import provenance, write_json

TRIALS, SEED, TRAIN_SEED = 12, 0, 20250603
TRIES = 5
"""How often a window is sampled that has no load of its own."""
KEPT = 3
"""The first round plays a third of the windows; the best third of its trials goes on to all windows."""


def mean_utility(setting: ServeSetting, windows: Sequence[Window], build: Build) -> float:
    """Return the mean utility of a policy over windows, in [0, 1]; the policy is built again for each window."""
    context = policy_context(setting)
    return float(np.mean([play_window(setting, window, build(context))["utility"] for window in windows]))


# --- Windows ---------------------------------------------------------------------------------------------------------


def train_windows(setting: ServeSetting, each: int = 1) -> list[Window]:
    """Return the training windows on which rules are tuned, the same in every call.

    There are ``each`` for every source, budget and load; windows in which no load is neither light nor hopeless are
    sampled again, a few times. The first ninth of them, and the first third, cover sources, budgets and loads evenly.
    """
    rng = np.random.default_rng(TRAIN_SEED)
    low_bits = low_bits_of(setting) is not None
    found: list[tuple[tuple[int, ...], Window]] = []
    kinds = itertools.product(
        enumerate(setting.sources), enumerate(setting.windows.budgets), enumerate(SHARES), range(each)
    )
    for (i, source), (j, kind), (k, share), number in kinds:
        for _ in range(TRIES):
            # The rate is searched; the lowest makes the shortest window, which fits every part.
            lowest = setting.windows.rates[source][0] / FACTOR
            sampled = setting.windows.sample(rng, "train", (source,), rate=lowest, budget=kind)
            window = at_attainment(setting, replace(sampled, low_bits=low_bits), "train", share)
            if window is not None:
                found.append((((i + j + k) % KEPT, (i - j) % KEPT, number, i), window))
                break
    return [window for _, window in sorted(found, key=lambda one: one[0])]


def train_clusters(setting: ClusterSetting, each: int = 1) -> list[Sequence[Window]]:
    """Return the training clusters on which rules are tuned, the same in every call.

    There are ``each`` for every source and load. The first third has every source, at loads that take turns.
    """
    from agents.evaluation.cluster import LOADS, clusters_of  # it imports this module

    clusters = [windows for _, windows in clusters_of(setting, "train", setting.sources, each)]
    turns = [(i + k) % KEPT for i in range(len(setting.sources)) for k in range(len(LOADS)) for _ in range(each)]
    return [clusters[number] for number in sorted(range(len(clusters)), key=lambda number: turns[number])]


# --- Scores ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Games:
    """What rules are tuned on: windows of one server, or clusters of them.

    games: the windows of each game: one, or one for each replica. The first ninth of them, and the first third, cover
        traces and loads evenly. loads: of the games. play: returns the utility of a policy in a game.
    served: how all plans served the windows, by their longest wait (``agents.evaluation.rule_tables``).
    """

    setting: ServeSetting
    games: Sequence[Sequence[Window]]
    loads: Sequence[float]
    play: Callable[[Build, Sequence[Window]], float]
    served: dict[float | None, Served] = field(default_factory=dict)

    def utilities(self, build: Build, games: Sequence[Sequence[Window]]) -> list[float]:
        """Return the utility of a policy in each game."""
        return [self.play(build, game) for game in games]

    def by_source(self, utilities: Sequence[float]) -> dict[str, float]:
        """Return the mean utility on each trace; ``utilities``: of the first games."""
        sources = [game[0].source for game in self.games[: len(utilities)]]
        return {
            source: float(np.mean([value for of, value in zip(sources, utilities, strict=True) if of == source]))
            for source in dict.fromkeys(sources)
        }

    def score(self, utilities: Sequence[float]) -> float:
        """Return the mean utility, averaged over traces; ``utilities``: of the first games."""
        return float(np.mean(list(self.by_source(utilities).values())))

    def table(self, parameters: Mapping[str, Any], limited: bool) -> dict[str, Any]:
        """Return what load_table reads, made from these windows."""
        wait_s = 0.75 * self.setting.slo.ttft_s if limited and self.setting.slo.ttft_s else None
        if wait_s not in self.served:
            windows = [window for game in self.games for window in game]
            self.served[wait_s] = serve_all(self.setting, windows, wait_s)
        values = parameters["policy"]
        return best_table(self.setting, self.served[wait_s], values["columns"], values["rows"], values["smoothing_s"])


def games_of(setting: ServeSetting, each: int = 1, games: Sequence[Sequence[Window]] | None = None) -> Games:
    """Return what the rules of a setting are tuned on: clusters for a setting of clusters, else windows.

    Args:
        each: windows for every source, budget and load, or clusters for every source and load.
        games: made before, in another process.
    """
    if isinstance(setting, ClusterSetting):
        from agents.evaluation.cluster import LOADS, play_cluster  # it imports this module

        clusters, several = setting, train_clusters(setting, each) if games is None else games
        return Games(setting, several, LOADS, lambda build, game: float(play_cluster(clusters, game, build)["utility"]))
    context = policy_context(setting)
    return Games(
        setting,
        [(window,) for window in train_windows(setting, each)] if games is None else games,
        SHARES,
        lambda build, game: float(play_window(setting, game[0], build(context))["utility"]),
    )


# --- Search ----------------------------------------------------------------------------------------------------------


def trials_of(setting: ServeSetting, name: str, trials: int, seed: int) -> list[dict[str, dict[str, Any]]]:
    """Return the parameters to try of a rule: all, if its space holds no more; else its defaults and random ones.

    A slow rule in clusters has its defaults alone: a search would take hours.
    """
    if isinstance(setting, ClusterSetting) and BASES[parts_of(name)[0]].slow:
        trials = 1
    space = space_of(setting, name)
    searched = [(part, key, values) for part, keys in space.items() for key, values in keys.items()]
    choices = [values.values for _, _, values in searched if isinstance(values, Choice)]
    if len(choices) == len(searched) and np.prod([len(values) for values in choices]) <= trials:
        tried = []
        for chosen in itertools.product(*choices):
            parameters: dict[str, dict[str, Any]] = {part: {} for part in space}
            for (part, key, _), value in zip(searched, chosen, strict=True):
                parameters[part][key] = value
            tried.append(parameters)
        return tried
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return [default_parameters(setting, name), *(sampled_parameters(setting, name, rng) for _ in range(trials - 1))]


def tune_rule(games: Games, name: str, trials: int, seed: int) -> dict[str, Any]:
    """Return the best parameters of a rule, its scores with them and with its defaults, and the policy they make.

    Raises:
        ConfigError: for an unknown rule, with the nearest name.
    """
    setting, slow = games.setting, BASES[parts_of(name)[0]].slow
    tried = trials_of(setting, name, trials, seed)
    made = [_made(games, name, parameters) for parameters in tried]
    configs = [rule_config(setting, name, *both) for both in zip(tried, made, strict=True)]
    builds = [build_rule(config) for config in configs]
    count = len(games.games) // KEPT if slow else len(games.games)  # a slow rule plays a third of the windows in all
    count = max(1, count)
    first = max(1, count // KEPT) if len(tried) > 1 else 0
    begun = [games.utilities(build, games.games[:first]) for build in builds]
    order = sorted(range(len(tried)), key=lambda i: -games.score(begun[i]) if first else 0.0)
    kept = order[: 1 if slow else max(1, len(tried) // KEPT)]
    finished = {i: begun[i] + games.utilities(builds[i], games.games[first:count]) for i in dict.fromkeys([*kept, 0])}
    best = max(sorted(finished), key=lambda i: games.score(finished[i]))
    return {
        "score": round(games.score(finished[best]), 5),
        "default_score": round(games.score(finished[0]), 5),
        "by_source": {source: round(value, 5) for source, value in games.by_source(finished[best]).items()},
        "windows": count,
        "trials": len(tried),
        "trial": best,
        "parameters": tried[best],
        "made": made[best],
        "policy": configs[best],
    }


def _made(games: Games, name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    base, limit = parts_of(name)
    return games.table(parameters, bool(limit)) if base == "load_table" else {}


SETTINGS: Mapping[str, type[ServeSetting]] = {"serve": ServeSetting, "cluster": ClusterSetting}


@cache
def _games(task: str, kwargs: str, games: str) -> Games:
    """Return the games of a task, once in each process."""
    windows = [[Window(**window) for window in game] for game in json.loads(games)]
    return games_of(SETTINGS[task](**json.loads(kwargs)), games=windows)


def _job(job: tuple[str, str, str, str, int, int]) -> dict[str, Any]:
    task, kwargs, games, name, trials, seed = job
    return tune_rule(_games(task, kwargs, games), name, trials, seed)


def tune_all(games: Games, names: Sequence[str], trials: int = TRIALS, seed: int = SEED) -> dict[str, Any]:
    """Return the entry of every rule, tuned in this process."""
    found = {}
    with progress("tuning rules", len(names), "rules") as report:
        for number, name in enumerate(names):
            found[name] = tune_rule(games, name, trials, seed)
            report(number + 1, name)
    return found


def tune(
    kwargs: Mapping[str, Any],
    *,
    task: str = "serve",
    names: Sequence[str] | None = None,
    trials: int = TRIALS,
    each: int = 1,
    seed: int = SEED,
    workers: int = 1,
    file: Path | None = None,
) -> dict[str, Any]:
    """Return the tuned rules of a setting, the content of a file of conf/rules.

    Args:
        kwargs: arguments of ``ServeSetting``, or of ``ClusterSetting`` for the task ``cluster``.
        names: rules; None for all that can run there.
        trials: of every rule. each: windows for every source, budget and load; for clusters, clusters for every source
            and load. seed: of the random parameters. workers: processes; the result does not depend on it.
        file: of an earlier search for the same setting, whose other rules the content keeps; None for none.
    Raises:
        ConfigError: for an unknown rule, with the nearest name, or a file that was made otherwise.
    """
    started_s = time.perf_counter()
    setting = SETTINGS[task](**kwargs)
    wanted, games = runnable(setting, names), games_of(setting, each)
    searched = {
        "task": task,
        "served": served_of(setting),
        "windows": {
            "sources": list(setting.sources),
            "budgets": list(setting.windows.budgets),
            "each": each,
            "count": len(games.games),
        },
        "loads": list(games.loads),
        "trials": trials,
        "seed": seed,
    }
    before = None if file is None else _searched_alike(file, searched)
    if workers < 2:
        rules = tune_all(games, wanted, trials, seed)
    else:
        slow_first = sorted(wanted, key=lambda name: not BASES[parts_of(name)[0]].slow)
        texts = json.dumps(dict(kwargs)), json.dumps([[asdict(window) for window in game] for game in games.games])
        jobs = [(task, *texts, name, trials, seed) for name in slow_first]
        with progress("tuning rules", len(jobs), "rules") as report:
            tuned = counted(in_processes(_job, jobs, min(workers, len(jobs) or 1)), report)
        rules = dict(zip(slow_first, tuned, strict=True))
    made = {**provenance(seed), "seconds": round(time.perf_counter() - started_s, 1), "workers": workers}
    missing = {n: reason for n, reason in left_out(setting).items() if names is None or n in names}
    content = {"made": made, **searched, "left_out": missing, "rules": {name: rules[name] for name in wanted}}
    return content if before is None else _added(before, content)


def _searched_alike(file: Path, searched: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a file of tuned rules.

    Raises:
        ConfigError: if the file is missing, or was made for another setting or by another search.
    """
    before = read_rules(file)
    plain = json.loads(json.dumps(searched))
    if differing := [key for key in plain if before.get(key) != plain[key]]:
        raise ConfigError(
            f"{file} was made with other {', '.join(differing)}; rules of one file are searched alike, so set "
            "out=FOLDER to another folder, or tune all of them with add=false"
        )
    return before


def _added(before: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of an earlier search with the rules of another one in place of its own."""
    rules = {**before["rules"], **content["rules"]}
    missing = {**before.get("left_out", {}), **content["left_out"]}
    made = content["made"]
    added = {"rules": [*content["rules"]], **{key: made.get(key) for key in ("command", "commit", "seconds")}}
    return {
        **before,
        "left_out": {name: reason for name, reason in missing.items() if name not in rules},
        "rules": {name: rules[name] for name in RULES if name in rules},
        "added": [*before.get("added", []), added],
    }


# --- Files -----------------------------------------------------------------------------------------------------------


def served_of(setting: ServeSetting) -> dict[str, Any]:
    """Return what tuned parameters are for: the server, its memory, and which plans it can run."""
    found = {
        "server": setting.stated["server"],
        "budget": asdict(setting.budget),
        "tick_s": setting.tick_s,
        "low_bits": low_bits_of(setting),
        "order": list(setting.action_options["order"]),
    }
    if isinstance(setting, ClusterSetting):
        found["replicas"] = setting.replicas
    served: dict[str, Any] = json.loads(json.dumps(found))
    return served


def file_for(setting: ServeSetting, folder: Path = FOLDER) -> Path | None:
    """Return the file of tuned rules that was made for a setting; None if there is none."""
    served = served_of(setting)
    return next((path for path in sorted(folder.glob("*.json")) if read_rules(path).get("served") == served), None)


def tuned_folder(cfg: DictConfig) -> Path:
    """Return the folder of tuned rules that an ``EvaluateConfig`` names; a relative path counts as its others do.

    Raises:
        ConfigError: if no such folder holds a file.
    """
    for root in (Path.cwd(), REPOSITORY):
        folder = root / str(cfg.tuned_rules)
        if any(folder.glob("*.json")):
            return folder
    raise ConfigError(
        f"tuned_rules is {str(cfg.tuned_rules)!r}, no folder of tuned rules; python -m agents.tune_rules out=FOLDER "
        "makes one"
    )


def tuned_rules(
    setting: ServeSetting, names: Sequence[str] | None = None, folder: Path = FOLDER
) -> tuple[dict[str, Build], dict[str, Any]]:
    """Return rules with their tuned parameters, and these.

    They come from the file of ``folder`` that was made for the setting. Rules that it lacks are tuned now, which takes
    minutes; rules without parameters need neither.

    Args:
        names: which rules; None for all that can run in the setting. folder: of tuned rules.
    Raises:
        ConfigError: for an unknown rule, or a file whose parameters lie outside the declared space.
    """
    wanted = runnable(setting, names)
    fixed = [name for name in wanted if not any(space_of(setting, name).values())]
    rules: dict[str, Any] = {name: {"policy": rule_config(setting, name, {})} for name in fixed}
    summary: dict[str, Any] = {"file": "", "left_out": left_out(setting)}
    path = file_for(setting, folder) if len(fixed) < len(wanted) else None
    if path is not None:
        content = read_rules(path)
        found = {name: entry for name, entry in content["rules"].items() if name in wanted and name not in fixed}
        for name, entry in found.items():
            if not isinstance(entry.get("parameters"), Mapping):
                raise ConfigError(
                    f"{path} has no parameters of {name}; python -m agents.tune_rules writes files that have them"
                )
            check_parameters(setting, name, entry["parameters"])
        rules |= found
        made = content.get("made")
        summary |= {"file": path.name, "commit": made.get("commit", "") if isinstance(made, Mapping) else ""}
    if missing := [name for name in wanted if name not in rules]:
        say(
            f"{folder} has no tuned parameters for {len(missing)} rules of this setting, such as {missing[0]}; "
            "tuning them now (python -m agents.tune_rules writes such a file)"
        )
        rules |= tune_all(games_of(setting), missing)
    summary["rules"] = {name: rules[name] for name in wanted}
    return {name: build_rule(rules[name]["policy"]) for name in wanted}, summary


def rules_tuned_to(tuned: Mapping[str, Any]) -> dict[str, Build]:
    """Return the rules with the parameters that ``tuned_rules`` returned.

    Raises:
        ConfigError: for parameters of an earlier version.
    """
    if "rules" not in tuned:
        raise ConfigError(
            "the results are from an earlier version, whose rules had other parameters; run without only="
        )
    return {name: build_rule(entry["policy"]) for name, entry in tuned["rules"].items()}


# --- Command ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class TuneRulesConfig:
    """What to tune.

    scenarios: MEMORY/LOW_BITS, each with a file of its own; null for all.
    label: name of the file of another setting, which ``env`` describes, in place of scenarios; null for scenarios.
    env: the environment with ``label``, an option of the group env; its kwargs say what is served.
    task: serve or cluster, the latter with env=serve_cluster.
    baselines: rules by name; null for all that can run there. trials: of every rule.
    each: windows for every source, budget and load; for clusters, clusters for every source and load. seed: of the
        random parameters. workers: processes.
    out: folder of the files. add: put the rules into the files that are there; false to replace these.
    """

    scenarios: list[str] | None = None
    label: str | None = None
    env: Any = None
    task: str = "serve"
    baselines: list[str] | None = None
    trials: int = TRIALS
    each: int = 1
    seed: int = SEED
    workers: int = 2
    out: str = "conf/rules"
    add: bool = False


LABEL = re.compile(r"\w[\w.-]*")
ConfigStore.instance().store(name="tune_rules_schema", node=TuneRulesConfig)


def settings_of(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Return the arguments of each setting to tune for, by the name of its file.

    Raises:
        ConfigError: for an unknown scenario, or a label together with scenarios.
    """
    if cfg.label is not None:
        if cfg.scenarios is not None:
            raise ConfigError(f"label is {cfg.label!r} and scenarios {list(cfg.scenarios)}; set one of the two")
        kwargs: Any = OmegaConf.to_container(cfg.env.kwargs, resolve=True)
        return {str(cfg.label): {**kwargs, "split": "train"}}
    names, notes = sources_with("train")
    for note in notes:
        say(note)
    return {
        scenario.replace("/", "_"): {**scenario_kwargs(scenario), "sources": names, "split": "train"}
        for scenario in check_scenarios(cfg.scenarios)
    }


def _run(cfg: DictConfig) -> None:
    if cfg.task not in SETTINGS:
        raise ConfigError(f"task is {cfg.task!r}; allowed: {', '.join(SETTINGS)}")
    for key in ("trials", "each", "workers"):
        if cfg[key] < 1:
            raise ConfigError(f"{key} is {cfg[key]}; it must be at least 1")
    names = None if cfg.baselines is None else list(cfg.baselines)
    if names == []:
        raise ConfigError("baselines is empty; name at least one rule, or null for all that can run there")
    if cfg.label is not None and not LABEL.fullmatch(str(cfg.label)):
        raise ConfigError(f"label is {cfg.label!r}; it must be a file name of letters, digits, _, - and dots")
    search = {key: int(cfg[key]) for key in ("trials", "each", "seed", "workers")}
    for label, kwargs in settings_of(cfg).items():
        path = Path(cfg.out) / f"{label}.json"
        check_writable(path)
        content = tune(kwargs, task=cfg.task, names=names, **search, file=path if cfg.add else None)
        write_json(path, content)
        console = Console()
        for name, entry in sorted(content["rules"].items(), key=lambda item: -item[1]["score"]):
            console.print(f"{name:28} {entry['score']:.4f} (defaults {entry['default_score']:.4f})", highlight=False)
        for name, reason in content["left_out"].items():
            console.print(f"{name:28} left out: {reason}", highlight=False)
        console.print(f"file: {path}", highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Run ``python -m agents.tune_rules``."""
    one_thread()
    run_command(_run, "tune_rules")
