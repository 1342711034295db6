"""``python -m agents.tune experiment=...``: search over the keys of a training, by ray.tune; ``--help`` shows how.

Each trial is an ordinary training with some keys changed, in a folder of its own; what it is judged by is its best
validation utility. Trials that fall behind are stopped early (successive halving).
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

from agents.training.train import TrainConfig, start_ray, train
from sim.config import one_thread, run_command
from sim.errors import ConfigError, nearest
from sim.results.run_folder import provenance, write_json, write_text


@dataclass(kw_only=True)
class TuneConfig(TrainConfig):
    """A training, and what to search.

    space: key of the training -> its values: a list to choose from, or ``{low: a, high: b}``, with ``log: true`` on a
        logarithmic scale. samples: trials. at_once: trials that run together, one CPU each.
    grace: validations before a trial may be stopped for falling behind.
    """

    space: dict[str, Any] = field(default_factory=dict)
    samples: int = 8
    at_once: int = 1
    grace: int = 5


ConfigStore.instance().store(name="tune_schema", node=TuneConfig)


def search_space(cfg: DictConfig) -> dict[str, Any]:
    """Return the space in ray.tune's words.

    Raises:
        ConfigError: for no key, one that the training does not have, or values of another form.
    """
    from ray import tune

    if not cfg.space:
        raise ConfigError("space is empty; give keys to search, e.g. '+space={algorithm.lr: {low: 1e-4, high: 1e-2}}'")
    found: dict[str, Any] = {}
    for key, node in cfg.space.items():
        if OmegaConf.select(cfg, str(key), throw_on_missing=False) is None:
            parent = OmegaConf.select(cfg, str(key).rpartition(".")[0]) if "." in str(key) else cfg
            raise ConfigError(
                f"space: there is no key {key!r}; {nearest(str(key).split('.')[-1], map(str, parent or cfg))}"
            )
        values: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        if isinstance(values, list) and values:
            found[str(key)] = tune.choice(values)
        elif isinstance(values, Mapping) and {"low", "high"} <= set(values) <= {"low", "high", "log"}:
            low, high = float(values["low"]), float(values["high"])
            found[str(key)] = tune.loguniform(low, high) if values.get("log") else tune.uniform(low, high)
        else:
            raise ConfigError(f"space.{key} is {values}; give a list of values, or {{low: a, high: b, log: true}}")
    return found


def with_values(cfg: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    """Return the training of one trial."""
    one = cfg.copy()
    for key, value in values.items():
        OmegaConf.update(one, key, value)
    return one


def search(cfg: DictConfig, folder: Path) -> tuple[dict[str, Any], float]:
    """Run the trials in a folder; return the best values and the validation utility they reached."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    space = search_space(cfg)
    begun = OmegaConf.to_container(cfg, resolve=True)

    def trial(values: dict[str, Any]) -> None:
        one_thread()
        one: Any = OmegaConf.create(begun)
        name = tune.get_context().get_trial_id()
        train(
            with_values(one, values),
            folder / name,
            on_validation=lambda row: tune.report({"utility": row["best_utility"], "folder": name}),
        )

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
        run_config=tune.RunConfig(name="tune", storage_path=str(folder.absolute()), verbose=0),
    )
    results = tuner.fit()
    rows: list[dict[str, Any]] = []
    for number in range(len(results)):
        told: dict[str, Any] = results[number].metrics or {}
        row = {"values": told.get("config", {}), "utility": told.get("utility"), "folder": told.get("folder")}
        rows.append(row)
    if all(row["utility"] is None for row in rows):
        raise ConfigError(f"every trial failed; the first says: {results[0].error}")
    rows.sort(key=lambda row: float("-inf") if row["utility"] is None else float(row["utility"]), reverse=True)
    write_json(folder / "search.json", {"provenance": provenance(int(cfg.seed)), "trials": rows})
    return dict(rows[0]["values"]), float(rows[0]["utility"])


def _run(cfg: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    values, utility = search(cfg, folder)
    words = " ".join(f"{key}={value}" for key, value in values.items())
    Console().print(f"best validation utility {utility:.4f} with {words}; files: {folder}", highlight=False)


def main() -> None:
    """Run ``python -m agents.tune``."""
    one_thread()
    warnings.filterwarnings("ignore", module=r"ray\..*")
    run_command(_run, "tune")
