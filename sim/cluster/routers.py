"""Routers of a cluster: choose the replica that serves a request.

| router | sends a request to | as in |
|---|---|---|
| `round_robin` | the next one in turn | every proxy |
| `least_outstanding` | the one with the fewest waiting and running requests | nginx `least_conn` |
| `least_kv` | the one with the smallest used share of the KV pool, waiting prompts included | llm-d's KV scorer |
| `shortest_expected_wait` | the one that soonest computes its waiting prompts and this one | - |
| `prefix_affinity` | the one that last computed most of the prompt's prefix, while loads are close | SGLang |
| `session_affinity` | the one that served the session's last turn, while loads are close | sticky sessions |
| `power_of_two` | the one with fewer requests of two random replicas | Mitzenmacher 2001 |

Ties go to the first replica. A replica whose context limit is too small for the request is skipped. These seven are
compiled (sim/cluster/kernel.py). Any other `PythonRouter` works too; it is called for each request, which is slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sim.cluster import kernel as cluster_kernel
from sim.engine.protocol import EngineState
from sim.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A replica that can accept a request, as a router observes it.

    replica: its number. prefill_token_s: seconds per prompt token there, in a full batch of prompts.
    """

    replica: int
    state: EngineState
    prefill_token_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRequest:
    """A request as a router observes it; the length of its output is not known.

    produced_tokens: above 0 if it was moved from another replica.
    hash_ids: ids of its prompt's prefix blocks, where an id also covers all blocks before it; empty if the trace has
        none.
    """

    request_id: int
    prompt_tokens: int
    produced_tokens: int
    hash_ids: tuple[int, ...]


class PythonRouter(Protocol):
    """A router in Python, called for each request."""

    def __call__(self, candidates: Sequence[Candidate], request: RoutingRequest) -> int:
        """Return the number of the replica that serves the request, one of the candidates."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRouter:
    """A compiled router.

    rule: a constant of sim/cluster/kernel.py.
    most_apart, most_times: prefix affinity applies unless the largest number of requests at a replica exceeds the
        smallest by more than ``most_apart`` and is more than ``most_times`` times as large.
    """

    rule: int
    most_apart: int = 0
    most_times: int = 0

    def draws(self, requests: int, seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """Return the random numbers of each request, float64[requests, 2] in [0, 1); one row if the rule uses none."""
        if self.rule != cluster_kernel.POWER_OF_TWO:
            return np.zeros((1, 2))
        return np.random.default_rng(seed).random((max(requests, 1), 2))


Router = KernelRouter | PythonRouter


def round_robin() -> KernelRouter:
    """Return the router that takes replicas in turn."""
    return KernelRouter(rule=cluster_kernel.ROUND_ROBIN)


def least_outstanding() -> KernelRouter:
    """Return the router to the replica with the fewest waiting and running requests."""
    return KernelRouter(rule=cluster_kernel.LEAST_OUTSTANDING)


def least_kv() -> KernelRouter:
    """Return the router to the replica with the smallest share of its KV pool in use or needed by waiting prompts."""
    return KernelRouter(rule=cluster_kernel.LEAST_KV)


def shortest_expected_wait() -> KernelRouter:
    """Return the router to the replica with the least (waiting + own prompt tokens) x seconds per prompt token."""
    return KernelRouter(rule=cluster_kernel.SHORTEST_WAIT)


def prefix_affinity(*, most_apart: int = 32, most_times: int = 2) -> KernelRouter:
    """Return the router to the replica that last computed the longest prefix of the prompt.

    Args:
        most_apart, most_times: if the largest number of requests at a replica exceeds the smallest by more than
            ``most_apart`` and is more than ``most_times`` times as large, the request goes to the replica with the
            fewest instead (SGLang's router has 32 and 1.0001).
    Raises:
        ConfigError: for negative values.
    """
    if most_apart < 0 or most_times < 0:
        raise ConfigError(f"router.most_apart is {most_apart} and most_times {most_times}; both must be at least 0")
    return KernelRouter(rule=cluster_kernel.PREFIX_AFFINITY, most_apart=most_apart, most_times=most_times)


def session_affinity(*, most_apart: int = 32, most_times: int = 2) -> KernelRouter:
    """Return the router to the replica that served the last turn of the session; a first turn goes to the fewest.

    Args:
        most_apart, most_times: as ``prefix_affinity``. A session that moves stays where it has moved to. Without
            sessions, every request goes to the replica with the fewest.
    Raises:
        ConfigError: for negative values.
    """
    if most_apart < 0 or most_times < 0:
        raise ConfigError(f"router.most_apart is {most_apart} and most_times {most_times}; both must be at least 0")
    return KernelRouter(rule=cluster_kernel.SESSION_AFFINITY, most_apart=most_apart, most_times=most_times)


def power_of_two() -> KernelRouter:
    """Return the router that picks two random replicas and takes the one with fewer requests."""
    return KernelRouter(rule=cluster_kernel.POWER_OF_TWO)
