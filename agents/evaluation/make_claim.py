"""``python -m agents.claim``: write the claim of a configuration, for windows, clusters or the roles of replicas."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from agents.evaluation.chosen import allow_new_names, present, replaced
from agents.evaluation.claim import claim_path, claimed
from agents.evaluation.evaluate import TASKS, EvaluateConfig
from agents.evaluation.measure_cluster import write_cluster_claim
from agents.evaluation.measure_roles import write_roles_claim
from agents.evaluation.measure_serve import what_is_played
from sim.config import CONF_DIR, one_thread, run_command
from sim.errors import ConfigError
from sim.results.run_folder import commit, write_json


def write_claim(cfg: DictConfig) -> Path:
    """Write the claim of a configuration; return its path.

    Raises:
        ConfigError: if the policy of the comparison is not among those played.
    """
    path = claim_path(str(cfg.claim))
    played = what_is_played(cfg, "test")
    if cfg.compared not in played.files:
        raise ConfigError(
            f"compared is {cfg.compared!r}; it must be one of serve_learned: {', '.join(played.files) or 'none'}"
        )
    date = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(path, {"date": date, "commit": commit(), **claimed(cfg, played)})
    return path


WRITERS: Mapping[str, Callable[[DictConfig], Path]] = {
    "serve": write_claim,
    "cluster": write_cluster_claim,
    "roles": write_roles_claim,
}
KEYS = {"serve": "claim", "cluster": "cluster_claim", "roles": "roles_claim"}
"""The key that names the file of a task's claim."""
NOT_CLAIMED = {
    "out": "is the folder of the results, and nothing that is claimed",
    "only": "plays some policies again, after all that was claimed",
    "measure": "is for agents.evaluate",
}


def _run(cfg: DictConfig) -> None:
    default: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "evaluate.yaml"), resolve=False)
    cfg = replaced(cfg, HydraConfig.get().overrides.task)
    tasks = list(cfg.tasks)
    if tasks != list(TASKS) and (len(tasks) != 1 or tasks[0] not in WRITERS):
        raise ConfigError(f"tasks is {tasks}; a claim is for one of {', '.join(WRITERS)}, such as 'tasks=[cluster]'")
    task = "serve" if tasks == list(TASKS) else tasks[0]
    cfg.tasks = [task]
    cfg, notes = present(cfg, default)
    for note in notes:
        print(note)
    others = [override for override in HydraConfig.get().overrides.task if not override.startswith("tasks=")]
    for key, reason in NOT_CLAIMED.items():
        if any(override.partition("=")[0].strip("+~") == key for override in others):
            raise ConfigError(f"{key} {reason}; the file of the claim is {KEYS[task]}=FILE.json")
    path = WRITERS[task](cfg)
    changed = "".join(f" {shlex.quote(override)}" for override in others)
    print(f"wrote {path}\ncommit it, then play it once:")
    print(f"  python -m agents.evaluate 'tasks=[{task}]' out=docs/results/agents{changed}")


def main() -> None:
    """Run ``python -m agents.claim``."""
    one_thread()
    allow_new_names()
    run_command(_run, "claim")


__all__ = ["EvaluateConfig", "main", "write_claim"]
