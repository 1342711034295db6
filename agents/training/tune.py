"""``python -m agents.tune experiment=...``: search over keys of a training with ray.tune; ``--help`` shows how.

Each trial is a training with some keys changed, in its own folder. Trials are compared by their best validation
utility; those that fall behind are stopped early (successive halving).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from agents.training.checks import check_training
from agents.training.train import TrainConfig, start_ray, train, without_none
from sim.config import one_thread, run_command
from sim.errors import ConfigError, nearest
from sim.progress import progress
from sim.results.run_folder import provenance, write_json, write_text


@dataclass(kw_only=True)
class TuneConfig(TrainConfig):
    """A training, and the space to search.

    space: maps keys of the training to their values: a list, or ``{low: a, high: b}``, with ``log: true`` for a
        logarithmic scale.
    samples: number of trials. at_once: trials that run in parallel, one CPU each.
    grace: validations before a trial may be stopped.
    """

    space: dict[str, Any] = field(default_factory=dict)
    samples: int = 8
    at_once: int = 1
    grace: int = 5


ConfigStore.instance().store(name="tune_schema", node=TuneConfig)


def search_space(cfg: DictConfig) -> dict[str, Any]:
    """Return ``cfg.space`` as ray.tune's distributions.

    Raises:
        ConfigError: for an empty space, a key that the training does not have, or malformed values.
    """
    from ray import tune

    if not cfg.space:
        raise ConfigError("space is empty; set it, such as '+space={algorithm.lr: {low: 1e-4, high: 1e-2}}'")
    space: dict[str, Any] = {}
    for key, node in cfg.space.items():
        if OmegaConf.select(cfg, str(key), throw_on_missing=False) is None:
            parent = OmegaConf.select(cfg, str(key).rpartition(".")[0]) if "." in str(key) else cfg
            raise ConfigError(
                f"space: there is no key {key!r}; {nearest(str(key).split('.')[-1], map(str, parent or cfg))}"
            )
        values: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        if isinstance(values, list) and values:
            space[str(key)] = tune.choice(values)
        elif isinstance(values, Mapping) and {"low", "high"} <= set(values) <= {"low", "high", "log"}:
            low, high = float(values["low"]), float(values["high"])
            space[str(key)] = tune.loguniform(low, high) if values.get("log") else tune.uniform(low, high)
        else:
            raise ConfigError(f"space.{key} is {values}; use a list of values, or {{low: a, high: b, log: true}}")
    return space


def with_values(cfg: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    """Return the configuration of one trial."""
    trial_cfg = cfg.copy()
    for key, value in values.items():
        OmegaConf.update(trial_cfg, key, value)
    return trial_cfg


def search(cfg: DictConfig, folder: Path) -> tuple[dict[str, Any], float]:
    """Run the trials in a folder; return the values of the best one and its validation utility."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    cfg = without_none(cfg)
    check_training(cfg)
    space = search_space(cfg)
    base = OmegaConf.to_container(cfg, resolve=True)

    def trial(values: dict[str, Any]) -> None:
        one_thread()
        trial_cfg: Any = OmegaConf.create(base)
        name = tune.get_context().get_trial_id()
        train(
            with_values(trial_cfg, values),
            folder / name,
            on_validation=lambda row: tune.report({"utility": row["best_utility"], "folder": name}),
        )

    class Ended(tune.Callback):
        """Counts the trials that have ended."""

        def __init__(self) -> None:
            self.count = 0

        def on_trial_complete(self, *_: Any, **__: Any) -> None:
            self.count += 1
            report(self.count)

        on_trial_error = on_trial_complete

    start_ray(cfg)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="utility",
            mode="max",
            num_samples=int(cfg.samples),
            max_concurrent_trials=int(cfg.at_once),
            scheduler=ASHAScheduler(max_t=10_000, grace_period=int(cfg.grace)),
            search_alg=tune.search.BasicVariantGenerator(random_state=int(cfg.seed)),
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder.absolute()), verbose=0, callbacks=[Ended()]),
    )
    with progress("searching", int(cfg.samples), "trials") as report:
        results = tuner.fit()
    rows: list[dict[str, Any]] = []
    for number in range(len(results)):
        metrics: dict[str, Any] = results[number].metrics or {}
        rows.append(
            {"values": metrics.get("config", {}), "utility": metrics.get("utility"), "folder": metrics.get("folder")}
        )
    if all(row["utility"] is None for row in rows):
        raise ConfigError(f"every trial failed; the error of the first: {results[0].error}")
    rows.sort(key=lambda row: float("-inf") if row["utility"] is None else float(row["utility"]), reverse=True)
    write_json(folder / "search.json", {"provenance": provenance(int(cfg.seed)), "trials": rows})
    return dict(rows[0]["values"]), float(rows[0]["utility"])


def _run(cfg: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    values, utility = search(cfg, folder)
    overrides = " ".join(f"{key}={value}" for key, value in values.items())
    Console().print(f"best validation utility {utility:.4f} with {overrides}; files: {folder}", highlight=False)


def main() -> None:
    """Run ``python -m agents.tune``."""
    one_thread()
    warnings.filterwarnings("ignore", module=r"ray\..*")
    run_command(_run, "tune")
