"""``python -m agents.export run=...``: write a trained policy as two files that NumPy runs, without torch or ray.

``runs=...`` names several trainings, such as ten seeds: the policy averages their networks (``learned.Network``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from safetensors.numpy import save

from agents.training.model_card import model_card
from sim.atomic import write_whole
from sim.config import option_names, run_command
from sim.cost.model_spec import load_model
from sim.cost.quality import BEST_FORM, QUALITIES
from sim.engine.server_spec import find_calibration
from sim.errors import ConfigError, RapLabError, nearest
from sim.policies.learned import SHIPPED, Learned, Network, averaged, read_learned
from sim.policies.learned_files import MAX_MEMBERS, SERVING, SERVING_TERMS, read_about
from sim.policies.prune_guard import about_guard
from sim.results.run_folder import commit, write_json, write_text


@dataclass(kw_only=True)
class ExportConfig:
    """What to export.

    run: run folder of a training.
    runs: run folders of several trainings whose networks are averaged, or a pattern such as runs/train/mine/seed_*.
    name: of the exported policy; not needed if ``out`` is a file.
    out: folder or NAME.json to write to; the run folder if empty (of several: the folder that holds them).
    cards: only write NAME.md again for the policies in conf/policy, from their files.
    guard: for pruning: run greedy_stop's plan unless the network's is clearly better (``sim.policies.prune_guard``).
    pace_share: for serving: bound what runs at once, so that an iteration takes at most this share of the TPOT target
        (``sim.policies.admission.PaceLimit``); null for no bound.
    run_share: for serving: the same limit in place of the network's own; null keeps the network's.
    wait_share: for serving: in place of the network's limits of the wait, let a request wait for this share of what the
        TTFT target leaves after the measured time to start (``sim.policies.admission.WaitLimit``); null keeps the
        network's.
    room_weight: for serving: lower the value of a plan with room for less than half of the demanded tokens by this much
        times ln(half of the demand / room) (``sim.policies.kv_room.KvRoom``); null leaves it.
    """

    run: str = ""
    runs: Any = None
    name: str = ""
    out: str = ""
    cards: bool = False
    guard: bool = False
    pace_share: float | None = None
    run_share: float | None = None
    wait_share: float | None = None
    room_weight: float | None = None


ConfigStore.instance().store(name="export_schema", node=ExportConfig)


def about_network(
    network: Network, cfg: DictConfig, env_kwargs: Mapping[str, Any], status: Mapping[str, Any], utility: float
) -> dict[str, Any]:
    """Return the JSON next to the weights: the tables of observations and actions, and how the policy was trained."""
    from agents.envs.cluster import ClusterSetting
    from agents.envs.prune import PruneSetting
    from agents.envs.roles import RolesSetting
    from agents.envs.serve import ServeSetting

    task = str(cfg.env.id).removesuffix("-v0")
    kinds: dict[str, type[ServeSetting | PruneSetting]] = {
        "ServeTrace": ServeSetting,
        "ServeCluster": ClusterSetting,
        "ServeRoles": RolesSetting,
    }
    setting = kinds.get(task, PruneSetting)(**{**env_kwargs, "split": "validation"})
    about: dict[str, Any] = {
        "task": task,
        "model": setting.model.name,
        "layers": [list(weight.shape) for weight in network.weights],
        "parameters": network.parameters,
        "activation": network.activation,
        **({} if network.heads is None else {"heads": list(network.heads)}),
        "environment": {key: value for key, value in env_kwargs.items() if key != "split"},
        "training": {
            "label": cfg.label,
            "seed": int(cfg.seed),
            "algorithm": OmegaConf.to_container(cfg.algorithm, resolve=True),
            "iteration": int(status["iteration"]),
            "seconds": round(float(status["seconds"]), 1),
            "validation_utility": round(utility, 6),
        },
        "quality_sha256": hashlib.sha256(_quality_file(setting).read_bytes()).hexdigest(),
        "commit": commit(),
        "actions": list(setting.table.actions),
        "observation": setting.table.rows(),
    }
    if isinstance(setting, ServeSetting):
        about["tick_s"] = setting.tick_s
        about["slo"] = dataclasses.asdict(setting.slo)
        if not isinstance(setting, RolesSetting):  # which chooses no plans
            about["plans"] = setting.action_options
            about["low_loss"] = setting.low_loss(1.0)
    elif setting.scores is not None:
        about["scores"] = [float(x) for x in setting.scores]
    return about


def _quality_file(setting: Any) -> Path:
    """Return the file of conf/quality whose losses an environment uses."""
    name = setting.quality_name
    return next(path for path in QUALITIES.glob(f"{name}.*") if path.suffix in (".json", ".yaml"))


def export_network(
    path: Path,
    network: Network,
    cfg: DictConfig,
    env_kwargs: Mapping[str, Any],
    status: Mapping[str, Any],
    utility: float,
) -> None:
    """Write a policy of a training."""
    write_policy(path, network, about_network(network, cfg, env_kwargs, status, utility))


def export_layers(
    path: Path,
    network: Network,
    env: str,
    env_kwargs: Mapping[str, Any] | None = None,
    *,
    label: str = "",
    seed: int = 0,
) -> float:
    """Write a network that was trained by code of one's own; return its mean validation utility, in [0, 1].

    Args:
        path: NAME.json; the weights go next to it. network: its outputs are the actions' values before masking.
        env: of its training, such as ``PruneToBudget-v0``. env_kwargs: those it was trained with.
        label, seed: of the training, as the file states them.
    Raises:
        ConfigError: for a path that does not end in .json, or a network whose inputs or outputs are not those of the
            environment.
    """
    if path.suffix != ".json":
        raise ConfigError(f"the path of the policy is {path}; it must end in .json, such as {path}.json")
    from agents.training.validation import validation_utilities

    kwargs = dict(env_kwargs or {})
    cfg = OmegaConf.create({"env": {"id": env}, "label": label, "seed": seed, "algorithm": {"name": "own"}})
    about = about_network(network, cfg, kwargs, {"iteration": 0, "seconds": 0.0}, 0.0)
    actions = len(about["actions"])
    wanted, found = (len(about["observation"]) - actions, actions), (network.inputs, network.actions)
    if found != wanted:
        raise ConfigError(
            f"the network has {found[0]} inputs and {found[1]} actions; {env} has {wanted[0]} entries, not counting "
            f"the flags of legal actions, and {wanted[1]} actions"
        )
    utility = float(validation_utilities(env, kwargs, network).mean())
    about["training"] = {"label": label, "seed": seed, "validation_utility": round(utility, 6)}
    write_policy(path, network, about)
    write_card(path)
    return utility


def write_policy(path: Path, network: Network, about: Mapping[str, Any]) -> None:
    """Write NAME.safetensors, then NAME.json: a policy whose JSON file exists is complete."""
    arrays = {}
    for i, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        # safetensors writes the memory of an array as it lies, so a transposed view must become contiguous first.
        arrays[f"{i}.weight"], arrays[f"{i}.bias"] = np.ascontiguousarray(weight), np.ascontiguousarray(bias)
    write_whole(path.with_suffix(".safetensors"), lambda part: part.write_bytes(save(arrays)))
    write_json(path, about)


def export(run: Path, target: Path) -> Path:
    """Copy the best policy of a training as NAME.safetensors and NAME.json; return the JSON file.

    Args:
        run: run folder of the training. target: the JSON file to write.
    Raises:
        ConfigError: for a run folder without a usable policy.
    """
    best = best_policy(run).path
    if target.resolve() != best.resolve():
        for suffix in (".safetensors", ".json"):
            source = best.with_suffix(suffix)
            write_whole(target.with_suffix(suffix), lambda part, source=source: shutil.copyfile(source, part))  # type: ignore[misc]
    return target


def export_average(runs: Sequence[Path], target: Path) -> Path:
    """Write one policy whose members are the best policies of several trainings; return the JSON file.

    Its ``trainings`` state how each member was trained; ``training`` holds the utility of the average on the validation
    episodes, and the seconds of all.

    Args:
        runs: run folders of the trainings. target: the JSON file to write.
    Raises:
        ConfigError: as ``export``, and for policies whose tables, layers or environments differ.
    """
    policies = [best_policy(run) for run in runs]
    if len(policies) > MAX_MEMBERS:
        raise ConfigError(f"runs names {len(policies)} trainings; at most {MAX_MEMBERS} can be averaged")
    if len(policies) == 1:
        return export(runs[0], target)
    first = policies[0].about
    for policy in policies:
        if "members" in policy.about:
            raise ConfigError(f"{policy.path} averages {policy.network.members} networks already; name its trainings")
        for key in sorted({*first, *policy.about} - OWN):
            if first.get(key) != policy.about.get(key):
                raise ConfigError(
                    f"{policy.path} and {policies[0].path} cannot be averaged: their {key} differs; average trainings "
                    "of one configuration that differ in the seed"
                )
    from agents.training.validation import validation_utilities

    network = averaged([policy.network for policy in policies])
    trainings = [
        {**policy.about.get("training", {}), **({"commit": policy.about["commit"]} if "commit" in policy.about else {})}
        for policy in policies
    ]
    environment = dict(first["environment"])
    utility = float(validation_utilities(f"{first['task']}-v0", environment, network).mean())
    training = {
        "seconds": round(sum(float(one.get("seconds", 0.0)) for one in trainings), 1),
        "validation_utility": round(utility, 6),
    }
    about = {**first, "members": network.members, "parameters": network.parameters, "training": training}
    write_policy(target, network, about | {"trainings": trainings, "commit": commit()})
    return target


OWN = {"training", "parameters", "commit"}
"""Keys of NAME.json in which the members of one policy may differ."""


def best_policy(run: Path) -> Learned:
    """Return the best policy of a training.

    Raises:
        ConfigError: for a run folder without a usable policy.
    """
    best = run / "best" / "policy.json"
    if not best.exists():
        raise ConfigError(
            f"run: {run} has no best/policy.json; set run to the folder of a training, such as "
            "runs/train/ppo_prune/seed_0"
        )
    return read_learned(best, policy_task(best))


def add_guard(path: Path) -> None:
    """State a guard in the JSON file of a pruning policy.

    Raises:
        ConfigError: for another policy, or a model for which there is no guard.
    """
    learned = read_learned(path, policy_task(path))
    if learned.about["task"] != "PruneToBudget":
        raise ConfigError(f"guard is true, but {path.name} was trained in {learned.about['task']}; set guard=false")
    form = str(learned.about.get("environment", {}).get("form", BEST_FORM))
    guard = about_guard(load_model(str(learned.about["model"])), form)
    write_json(path, {**learned.about, "guard": guard})


TARGETS = {
    "pace_share": ("tpot_s", "the time per output token"),
    "run_share": ("tpot_s", "the time per output token"),
    "wait_share": ("ttft_s", "the time to the first token"),
}
"""Share of a target -> the target, and what it is of."""


def check_terms(policy: Learned, terms: Mapping[str, float]) -> None:
    """Check that ``SERVING_TERMS`` can be stated in the file of a policy.

    Raises:
        ConfigError: for a value out of range, two limits of what runs, another policy, or training without the target.
    """
    for name, value in terms.items():
        target, what = TARGETS.get(name, ("", ""))
        if not 0.0 < value < 1e18:
            kind = f"a share of the target of {what}, above 0, such as 0.9" if what else "a number above 0, such as 4.0"
            raise ConfigError(f"{name} is {value:g}; it must be {kind}")
        if policy.about["task"] not in SERVING or (target and not (policy.about.get("slo") or {}).get(target)):
            trained = "to serve" + f" with a target of {what}" * bool(what)
            raise ConfigError(f"{name} is {value:g}, but {policy.path} was not trained {trained}; leave {name} out")
    both = {"pace_share", "run_share"}
    if both <= terms.keys() | policy.about.keys():
        stated = sorted(both & policy.about.keys() - terms.keys())
        remedy = f"{policy.path} states {stated[0]} already" if stated else "leave one of them out"
        raise ConfigError(f"pace_share and run_share both limit what runs at once; {remedy}")


def add_terms(path: Path, terms: Mapping[str, float]) -> None:
    """State ``SERVING_TERMS`` in the JSON file of a serving policy.

    Raises:
        ConfigError: as ``check_terms``.
    """
    learned = read_learned(path, policy_task(path))
    check_terms(learned, terms)
    write_json(path, {**learned.about, **terms})


def policy_task(path: Path) -> str:
    """Return the environment in which the policy of a JSON file was trained.

    Raises:
        ConfigError: for a file that is no policy, or of an environment that no command runs.
    """
    try:
        task = str(read_about(path)["task"])
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a learned policy ({error}); train one: python -m agents.train") from error
    if task not in POLICIES:
        raise ConfigError(f"{path} was trained in {task!r}; {nearest(task, POLICIES)}")
    return task


POLICIES = {
    "PruneToBudget": ("sim.replay", "learned_prune"),
    "ServeTrace": ("sim.replay", "learned_serve"),
    "ServeCluster": ("sim.cluster", "learned_cluster"),
    "ServeRoles": ("sim.disaggregate", "learned"),
}
"""Environment: the command and the option of ``policy``, or of ``roles``, that run what was trained in it."""


def shown_path(path: Path) -> str:
    """Return a path as a command names it: from the current folder if it lies below."""
    file = path.resolve()
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def next_command(path: Path, shown: str | None = None) -> str:
    """Return a command that runs an exported policy, on the model and device of its training.

    Args:
        path: the JSON file. shown: how the command names it; None takes the path from the current folder.
    """
    shown = shown_path(path) if shown is None else shown
    about = read_about(path)
    command, policy = POLICIES[about["task"]]
    environment = about.get("environment", {})
    keys = {"model": about["model"]}
    group, trace = "roles" if about["task"] == "ServeRoles" else "policy", "burst"
    if about["task"] == "PruneToBudget":
        keys |= dict(zip(("gpu",), calibrated_gpus(str(about["model"])), strict=False))
    elif about["task"] == "ServeRoles":
        keys |= {key: environment[key] for key in ("gpu", "latency", "engine", "slo", "turn_s") if key in environment}
        prefill, replicas = environment.get("prefill", 1), len(about["actions"]) + 1
        keys |= {"prefill_replicas": prefill, "decode_replicas": replicas - prefill}
        if "budget_bytes" in environment:
            keys |= {"budget": "constant", "budget.budget_bytes": environment["budget_bytes"]}
    else:
        from agents.envs.serve_windows import source_trace

        keys |= {key: environment[key] for key in ("gpu", "latency", "engine", "slo", "tick_s") if key in environment}
        keys |= {"quality_table": environment["quality"]} if "quality" in environment else {}
        keys |= {"gpu.tp": environment["tp"]} if environment.get("tp", 1) != 1 else {}
        source = next(iter(environment.get("sources") or ()), "")
        if environment.get("prefix_caching") and source in option_names("trace"):
            trace, keys["engine.prefix_caching"] = source, "true"
            with contextlib.suppress(RapLabError):  # a published trace that is not here
                keys["engine.hash_block_tokens"] = source_trace(trace).block_tokens
    keys = {key: value for key, value in keys.items() if value is not None}  # a key that training left to be found
    if not re.fullmatch(r"[\w./@-]+", shown):
        shown = f'"{shown}"'  # Hydra reads quoted text as it stands
    # Names come from the file, which may come from anywhere, and the line is meant to be pasted into a shell.
    settings = [shlex.quote(f"{key}={value}") for key, value in {**keys, group: policy, f"{group}.path": shown}.items()]
    return f"python -m {command} trace={shlex.quote(trace)} {' '.join(settings)}"


def calibrated_gpus(model: str) -> list[str]:
    """Return the files of conf/gpu of which one serves a model, with a calibration."""
    found = []
    for gpu in option_names("gpu"):
        with contextlib.suppress(ConfigError):
            find_calibration(model, gpu, 1)
            found.append(gpu)
    return found


def run_folders(runs: Any) -> list[Path]:
    """Return the folders that ``runs`` names: a pattern, a folder or a list of both; in the order of their numbers.

    Raises:
        ConfigError: for anything else, or if nothing matches.
    """
    patterns = [runs] if isinstance(runs, str) else runs
    if not patterns or not isinstance(patterns, list) or not all(isinstance(one, str) and one for one in patterns):
        raise ConfigError(f"runs is {runs!r}; it must be a pattern or a list, such as 'runs=runs/train/mine/seed_*'")
    found = []
    for pattern in patterns:
        matches = [Path(one) for one in glob(pattern)]  # noqa: PTH207 - Path.glob takes no absolute one
        matches = sorted((path for path in matches if path.is_dir()), key=_by_number)
        if not matches:
            raise ConfigError(f"runs: no folder matches {pattern!r}; see the run folders with: ls runs/train/*")
        found += [folder for folder in matches if folder not in found]
    return found


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Sort seed_10 after seed_9."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", str(path))]


def target_file(name: str, out: str, folder: Path) -> Path:
    """Return the JSON file that ``name`` and ``out`` ask for; ``folder`` holds it if ``out`` is empty.

    Raises:
        ConfigError: if neither names it, both do, or the name is no file name.
    """
    file = Path(out) if out.endswith(".json") else None
    if file is not None and name:
        raise ConfigError(f"name is {name!r} and out is the file {out!r}; leave one of them out")
    name = file.stem if file is not None else name
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise ConfigError(
            f"name is {name!r}; it may have letters, digits, '_', '-' and '.', such as name=mine or out=mine.json"
        )
    return file or (Path(out) if out else folder) / f"{name}.json"


def write_card(path: Path, shown: str | None = None) -> Path:
    """Write NAME.md next to NAME.json; return its path. Arguments as of ``next_command``."""
    card = path.with_suffix(".md")
    write_text(card, model_card(path.stem, read_about(path), next_command(path, shown)))
    return card


def shipped_policies() -> list[Path]:
    """Return the JSON files of the policies in conf/policy, sorted."""
    return sorted(SHIPPED.glob("*.json"))


def _move_policy(made: Path, target: Path) -> None:
    """Move the two files of a policy. A kill in between leaves no JSON file, and never one with other weights."""
    target.unlink(missing_ok=True)
    for suffix in (".safetensors", ".json"):
        made.with_suffix(suffix).replace(target.with_suffix(suffix))


def _run(cfg: DictConfig) -> None:
    if cfg.cards:
        for path in shipped_policies():
            print(write_card(path, path.stem))
        return
    runs = OmegaConf.to_container(cfg.runs) if OmegaConf.is_config(cfg.runs) else cfg.runs
    if bool(cfg.run) == (runs is not None):
        raise ConfigError("set run=FOLDER for one training, or 'runs=FOLDERS' for the average of several")
    folders = [Path(cfg.run)] if cfg.run else run_folders(runs)
    target = target_file(str(cfg.name), str(cfg.out), folders[0] if cfg.run else folders[0].parent)
    terms = {name: float(cfg[name]) for name in SERVING_TERMS if cfg[name] is not None}
    check_terms(best_policy(folders[0]), terms)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export_") as folder:
        made = Path(folder) / target.name
        made = export(folders[0], made) if cfg.run else export_average(folders, made)
        if cfg.guard:
            add_guard(made)
        if terms:
            add_terms(made, terms)
        _move_policy(made, target)
    learned = read_learned(target, policy_task(target))
    utility = learned.about.get("training", {}).get("validation_utility")
    validated = "" if utility is None else f", validation utility {utility:.4f}"
    members = learned.network.members
    averages = f"the average of {members} networks, " if members > 1 else ""
    averages += "a guard, " if cfg.guard else ""
    print(f"{target}: {averages}{learned.network.parameters:,} parameters{validated}")
    write_card(target)
    print(f"run it:\n  {next_command(target)}")


def main() -> None:
    """Run ``python -m agents.export``."""
    run_command(_run, "export")
