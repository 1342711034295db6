"""What a replica of a cluster observes in addition to its own state: how it compares with the others.

An observation starts with what a policy of one server observes (``serve_table`` of
sim/policies/observation/serve.py); the entries here follow. All come from states that servers publish, none from the
router or the trace. Entries about other replicas are 0 if there are none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sim.engine import batch_step
from sim.engine.protocol import EngineState
from sim.errors import ConfigError, nearest
from sim.policies.observation.prune import Entry, ObservationSpec
from sim.policies.observation.serve import ServeActions, serve_table
from sim.types import Floats, Floats32

# Shapes: c clusters of k replicas.


CLUSTER_ENTRIES = (
    Entry("replicas", "log2(replicas) / 8", 0.0, 1.0, "that accept requests, this one among them"),
    Entry("share_waiting", "share", 0.0, 1.0, "of the cluster's waiting requests, its own"),
    Entry("share_running", "share", 0.0, 1.0, "of the cluster's running requests, its own"),
    Entry("others_waiting", "log2(1 + requests) / 10", 0.0, 1.0, "requests that wait, mean of the others"),
    Entry("others_oldest_wait", "s / 2", 0.0, 2.0, "how long the head of the queue has waited, mean of the others"),
    Entry("others_kv_used", "share", 0.0, 1.0, "of the KV pool, mean of the others"),
    Entry("least_kv_used", "share", 0.0, 1.0, "of the KV pool, least of the others"),
    Entry("others_budget", "of dense weights / 8", 0.0, 1.0, "memory there is, mean of the others"),
    Entry("others_weights", "of dense weights", 0.0, 1.0, "bytes of what is resident, mean of the others"),
    Entry("others_copying", "share", 0.0, 1.0, "of the others that copy weights in"),
)
_LOWEST = np.array([entry.low for entry in CLUSTER_ENTRIES])
_HIGHEST = np.array([entry.high for entry in CLUSTER_ENTRIES])


def cluster_table(actions: ServeActions) -> ObservationSpec:
    """Return the table of one replica in ``ServeCluster``."""
    return ObservationSpec(serve_table(actions).entries + CLUSTER_ENTRIES, actions.names)


def shown_entries(table: ObservationSpec, hidden: Sequence[str]) -> Floats32:
    """Return float32[entries], 1 for shown entries and 0 for hidden ones.

    Raises:
        ConfigError: for a name that the table does not have.
    """
    names = [entry.name for entry in table.entries]
    for name in hidden:
        if name not in names:
            raise ConfigError(f"hide: there is no entry {name!r}; {nearest(name, names)}")
    return np.array([name not in hidden for name in names], dtype=np.float32)


def cluster_features(seen: Floats, dense_bytes: float) -> Floats32:
    """Return the values of ``CLUSTER_ENTRIES`` for every replica, float32[c, k, entries].

    Args:
        seen: float64[c, k, batch_step.SEEN_COLUMNS], what can be seen of each replica that accepts requests.
        dense_bytes: of the weights of the dense model.
    """
    k = seen.shape[1]
    waiting, running, pool = (
        seen[..., at] for at in (batch_step.WAITING, batch_step.RUNNING, batch_step.KV_LAYER_BLOCKS)
    )
    used = np.where(pool > 0, seen[..., batch_step.KV_USED_LAYER_BLOCKS] / np.maximum(pool, 1.0), 1.0)
    own = np.eye(k, dtype=np.bool_)
    values = (
        np.full(waiting.shape, np.log2(k) / 8.0),
        waiting / np.maximum(waiting.sum(axis=1, keepdims=True), 1.0),
        running / np.maximum(running.sum(axis=1, keepdims=True), 1.0),
        np.log2(1.0 + _mean_of_others(waiting)) / 10.0,
        _mean_of_others(seen[..., batch_step.OLDEST_WAIT_S]) / 2.0,
        _mean_of_others(used),
        np.where(own, np.inf, used[:, None, :]).min(axis=2) if k > 1 else np.zeros(used.shape),
        _mean_of_others(seen[..., batch_step.BUDGET_BYTES]) / dense_bytes / 8.0,
        _mean_of_others(seen[..., batch_step.WEIGHT_BYTES]) / dense_bytes,
        _mean_of_others((seen[..., batch_step.INCOMING_BYTES] > 0).astype(np.float64)),
    )
    found: Floats32 = np.clip(np.stack(values, axis=-1), _LOWEST, _HIGHEST).astype(np.float32)
    return found


def _mean_of_others(values: Floats) -> Floats:
    """Return the mean over the other replicas of the cluster for each replica, float64[c, k]."""
    others = values.shape[1] - 1
    mean: Floats = (values.sum(axis=1, keepdims=True) - values) / max(others, 1) if others else np.zeros(values.shape)
    return np.maximum(mean, 0.0)


def replica_features(state: EngineState, others: Sequence[EngineState], dense_bytes: float) -> Floats32:
    """Return ``CLUSTER_ENTRIES`` of one replica from its state and those of the others, float32[entries]."""
    seen = np.zeros((1, 1 + len(others), batch_step.SEEN_COLUMNS))
    for row, one in zip(seen[0], (state, *others), strict=True):
        row[_COLUMNS] = [getattr(one, name) for name in _NAMES]
    found: Floats32 = cluster_features(seen, dense_bytes)[0, 0]
    return found


_NAMES = (
    "waiting", "running", "oldest_wait_s", "kv_layer_blocks", "kv_used_layer_blocks", "budget_bytes", "weight_bytes",
    "incoming_bytes",
)  # fmt: skip
_COLUMNS = [getattr(batch_step, name.upper()) for name in _NAMES]
