"""What RLlib leaves out of its checkpoints: the running episodes of the local env runner, and the random generators.

With it, a resumed training goes on exactly as an unbroken one would have. Remote env runners (``ray.runners``) begin
new episodes instead.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

RUNNER = (
    "_cached_to_module",
    "_done_episodes_for_metrics",
    "_needs_initial_reset",
    "_ongoing_episodes",
    "_ongoing_episodes_for_metrics",
    "_shared_data",
    "_weights_seq_no",
)
"""Attributes of RLlib's SingleAgentEnvRunner (2.60) that hold its running episodes."""


def local_runner(algorithm: Any) -> Any:
    """Return the env runner that samples in this process; None if there is none, or if remote ones sample."""
    runner = getattr(algorithm, "env_runner", None) if algorithm.config.num_env_runners == 0 else None
    return runner if getattr(runner, "env", None) is not None else None


def runner_state(algorithm: Any) -> dict[str, Any]:
    """Return the state of the local env runner and of the process's random generators, to be pickled."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - RLlib uses the global generator
        "torch": torch.get_rng_state(),
    }
    if (runner := local_runner(algorithm)) is not None:
        state["runner"] = {name: getattr(runner, name) for name in RUNNER if hasattr(runner, name)}
        state["env"] = runner.env.unwrapped.episodes_state()
    if (buffer := algorithm.local_replay_buffer) is not None:
        state["buffer"] = buffer.rng
    learner = algorithm.learner_group._learner
    # Such as that of the entropy bonus; RLlib restarts them at step 0, which one iteration would notice.
    state["schedules"] = {
        (name, module): float(schedule.get_current_value())
        for name, schedules in vars(learner).items()
        if name.endswith("schedulers_per_module")
        for module, schedule in schedules.items()
    }
    return state


def restore_runner(algorithm: Any, state: dict[str, Any]) -> None:
    """Restore what ``runner_state`` returned, in an algorithm with the same configuration."""
    if (runner := local_runner(algorithm)) is not None and state.get("env") is not None:
        runner.env.unwrapped.restore_episodes(state["env"])
        for name, value in state["runner"].items():
            setattr(runner, name, value)
    if (buffer := algorithm.local_replay_buffer) is not None and "buffer" in state:
        buffer.rng = state["buffer"]
    for (name, module), value in state["schedules"].items():
        schedule = getattr(algorithm.learner_group._learner, name)[module]
        if isinstance(schedule._curr_value, torch.Tensor):
            schedule._curr_value.data = torch.tensor(value)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
