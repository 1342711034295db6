"""Which entries of an observation a trained policy depends on: permutation importance, without retraining."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from agents.envs.prune_vector import PruneToBudgetVector
from agents.training.validation import Act, play, pool_windows, serve, validation_episodes, validation_windows
from sim.pages.render import table
from sim.policies.learned import Network, read_learned
from sim.progress import progress
from sim.types import Bools, Floats32

WINDOWS = 96
PRUNE_GROUPS = {
    "batch, length and all shares of the load": (
        "batch",
        "sequence_tokens",
        "kv_share",
        "mha_share",
        "ffn_share",
        "mha_over_ffn",
    ),
    "everything missing": ("missing_share", "missing_mha", "missing_ffn"),
}
SERVE_GROUPS = {
    "all of the queue": ("waiting", "waiting_tokens", "oldest_wait"),
    "all of what runs": ("running", "running_tokens", "produced_10s", "busy_10s"),
    "all of the KV cache": ("kv_used", "kv_pool", "preemptions_10s"),
    "all of memory": ("budget", "weights", "next_budget", "next_budget_soon"),
    "all of arrivals": ("arrivals_1s", "arrivals_10s", "arrivals_60s", "prompts_1s", "prompts_10s"),
    "all of what was answered": ("first_tokens_10s", "ttft_10s", "rejected_10s"),
    "all of the plan in force": ("copying", "dwell_left", "level_drop", "level_low", "level_admit"),
}
"""Groups of related entries; shuffling a group together keeps its entries consistent with each other."""


def shuffled(network: Network, columns: NDArray[np.bool_], seed: int) -> Act:
    """Return the network's choices when these feature columns, bool[o], come from another row of the batch."""
    rng = np.random.default_rng(seed)

    def act(features: Floats32, legal: Bools) -> NDArray[np.int64]:
        mixed = features.copy()
        mixed[:, columns] = features[rng.permutation(len(features))][:, columns]
        return network.act(mixed, legal)

    return act


def _hidden(kinds: Sequence[str], groups: Mapping[str, tuple[str, ...]]) -> dict[str, NDArray[np.bool_]]:
    """Return the columns that each ablation shuffles, bool[o]; ``nothing`` is the unchanged policy."""
    names = {"nothing": (), **{kind: (kind,) for kind in dict.fromkeys(kinds)}, **groups}
    return {name: np.isin(kinds, entries) for name, entries in names.items()}


def shuffled_loads(paths: Sequence[Path], seed: int = 0) -> pd.DataFrame:
    """Return the validation utility of policies of ``PruneToBudget`` if one kind of entry comes from another load.

    Returns:
        One row for each policy and ablation: hidden, seed (number of the policy), utility.
    """
    rows: list[dict[str, Any]] = []
    for number, path in enumerate(paths):
        learned = read_learned(path, "PruneToBudget")
        env_kwargs = {**learned.about["environment"], "split": "validation"}
        kinds = [entry.name.split(".")[0] for entry in PruneToBudgetVector(1, **env_kwargs).setting.table.entries]
        hidden = _hidden(kinds, PRUNE_GROUPS)
        with progress(f"shuffling, policy {number + 1} of {len(paths)}", len(hidden), "entries") as report:
            for at, (name, columns) in enumerate(hidden.items(), start=1):
                ended = play(shuffled(learned.network, columns, seed), env_kwargs, validation_episodes(1))
                rows.append({"hidden": name, "seed": number, "utility": float(ended.utility.mean())})
                report(at)
    return pd.DataFrame(rows)


def shuffled_windows(paths: Sequence[Path], *, windows: int = WINDOWS, seed: int = 0) -> pd.DataFrame:
    """Return the same for policies of ``ServeTrace``; entries come from another window at the same tick.

    A policy that was trained on servers of many speeds and sizes plays on such servers here too: an entry that is the
    same in all windows, such as the speed of one server, would seem to be of no use.
    """
    rows: list[dict[str, Any]] = []
    for number, path in enumerate(paths):
        learned = read_learned(path, "ServeTrace")
        env_kwargs = {**learned.about["environment"], "split": "validation"}
        if pool := env_kwargs.get("pool"):
            env_kwargs["pool"] = {**pool, "validation": windows}
        # The network does not read the flags of legal actions.
        names = [entry["name"] for entry in learned.about["observation"] if not entry["name"].startswith("legal.")]
        drawn = pool_windows(json.dumps(env_kwargs, sort_keys=True)) if pool else validation_windows(windows)
        hidden = _hidden(names, SERVE_GROUPS)
        with progress(f"shuffling, policy {number + 1} of {len(paths)}", len(hidden), "entries") as report:
            for at, (name, columns) in enumerate(hidden.items(), start=1):
                utility = serve(shuffled(learned.network, columns, seed), env_kwargs, drawn)
                rows.append({"hidden": name, "seed": number, "utility": float(utility.mean())})
                report(at)
    return pd.DataFrame(rows)


def ablation_markdown(ablation: pd.DataFrame, between: str) -> str:
    """Return what shuffling each kind of entry costs: mean over policies; of several also the lowest and highest."""
    by_seed = ablation.pivot_table(index="hidden", columns="seed", values="utility")
    lost, several = 1 - by_seed / by_seed.loc["nothing"], len(by_seed.columns) > 1
    rows = [
        {
            f"shuffled between {between}": name,
            "utility": by_seed.loc[name].mean(),
            "lost": lost.loc[name].mean(),
        }
        | ({"lost, lowest seed": lost.loc[name].min(), "lost, highest seed": lost.loc[name].max()} if several else {})
        for name in by_seed.mean(axis=1).sort_values().index
    ]
    specs = {"utility": ".4f", "lost": ".1%", "lost, lowest seed": ".1%", "lost, highest seed": ".1%"}
    return table(rows, specs)
