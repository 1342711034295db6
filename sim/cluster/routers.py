"""Which replica serves a request: the routers of a cluster.

| router | sends a request to | as in |
|---|---|---|
| `round_robin` | the next one in turn | every proxy |
| `least_outstanding` | where fewest requests wait or run | nginx `least_conn` |
| `least_kv` | where least of the KV pool is held, prompts that wait counted as if computed | llm-d's KV scorer |
| `shortest_expected_wait` | where prompts that wait, and its own, are computed soonest at this replica's price | - |
| `prefix_affinity` | where most of its prompt's beginning was computed last, while loads are close | SGLang |
| `power_of_two` | the one of two drawn at random that has fewer requests | Mitzenmacher 2001 |

Ties go to the first replica. A replica whose context limit does not hold the request is passed over. These six are
compiled (sim/cluster/kernel.py); any other function of what can be seen is asked for each request, which is slower.
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
    """A replica that accepts a request, as a router sees it.

    replica: its number. prefill_token_s: seconds that a token of a prompt takes there, in a full batch of prompts.
    """

    replica: int
    state: EngineState
    prefill_token_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRequest:
    """A request as a router sees it: not how long its answer will be.

    produced_tokens: above 0 when another replica began it and failed. hash_ids: of its prompt's KV blocks, each for
    all before it too; none where the trace has none.
    """

    request_id: int
    prompt_tokens: int
    produced_tokens: int
    hash_ids: tuple[int, ...]


class PythonRouter(Protocol):
    """A router of one's own: asked for each request."""

    def __call__(self, candidates: Sequence[Candidate], request: RoutingRequest) -> int:
        """Return the number of the replica that shall serve it, one of the candidates'."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRouter:
    """A compiled router.

    rule: of sim/cluster/kernel.py. most_apart, most_times: prefix affinity gives way to the fewest requests while the
    most and the fewest of any replica differ by more than both (more than so many, and than so many times).
    """

    rule: int
    most_apart: int = 0
    most_times: int = 0

    def draws(self, requests: int, seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """Return float64[requests, 2] in [0, 1), what it draws for each; one row where it draws nothing."""
        if self.rule != cluster_kernel.POWER_OF_TWO:
            return np.zeros((1, 2))
        return np.random.default_rng(seed).random((max(requests, 1), 2))


Router = KernelRouter | PythonRouter


def round_robin() -> KernelRouter:
    """Return the router that takes replicas in turn."""
    return KernelRouter(rule=cluster_kernel.ROUND_ROBIN)


def least_outstanding() -> KernelRouter:
    """Return the router to where fewest requests wait or run."""
    return KernelRouter(rule=cluster_kernel.LEAST_OUTSTANDING)


def least_kv() -> KernelRouter:
    """Return the router to where the smallest share of the KV pool is held or waited for."""
    return KernelRouter(rule=cluster_kernel.LEAST_KV)


def shortest_expected_wait() -> KernelRouter:
    """Return the router to where (tokens that wait + its own) x seconds a prompt token are least."""
    return KernelRouter(rule=cluster_kernel.SHORTEST_WAIT)


def prefix_affinity(*, most_apart: int = 32, most_times: int = 2) -> KernelRouter:
    """Return the router to where the longest beginning of the prompt was computed last.

    Args:
        most_apart, most_times: when the most requests of any replica exceed the fewest by more than ``most_apart`` and
            ``most_times`` times, the request goes to the fewest instead (SGLang's router has 32, and 1.0001 times).
    Raises:
        ConfigError: for negative ones.
    """
    if most_apart < 0 or most_times < 0:
        raise ConfigError(f"router.most_apart is {most_apart} and most_times {most_times}; both must be at least 0")
    return KernelRouter(rule=cluster_kernel.PREFIX_AFFINITY, most_apart=most_apart, most_times=most_times)


def power_of_two() -> KernelRouter:
    """Return the router that draws two replicas and takes the one with fewer requests."""
    return KernelRouter(rule=cluster_kernel.POWER_OF_TWO)
