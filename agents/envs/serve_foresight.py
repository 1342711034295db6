"""What a critic may know of a training window beyond what a server observes: the requests and the memory to come.

How much utility a state leads to depends more on the arrivals that follow than on the plan that is chosen. A critic
that knows them explains that part of a return, so what is left over says more about the action. The gradient stays
unbiased, because arrivals and memory do not depend on actions (Mao et al., Variance Reduction for Reinforcement
Learning in Input-Driven Environments, ICLR 2019, arXiv 1807.02264). The actor never sees these entries.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from agents.envs.serve_requests import WindowRequests
from sim.engine.budget import Budget
from sim.types import Floats32

EDGES_S = (0.0, 2.0, 5.0, 10.0, 20.0, 40.0, 1e9)
"""Bounds of the spans ahead, in seconds from now; the last reaches to the end of the window."""
ENTRIES = 4 * (len(EDGES_S) - 1) + 3
MOST = 16.0
"""The largest value of an entry."""


def foresight(
    requests: WindowRequests, budget: Budget, slowdown: float, dense_bytes: int, tick_s: float, ticks: int
) -> Floats32:
    """Return what comes after each tick, float32[ticks + 1, ENTRIES], each entry in [0, MOST].

    For each span between two ``EDGES_S``: the share of the window's requests that arrive in it, times 10; the tokens of
    their prompts, and of their outputs, as log2(1 + tokens) / 20; the least memory at its ticks, in dense weights / 8;
    a span after the window has the memory at its end. Then log2(1 + requests of the window) / 12, the share of the
    window that is left, and log2(slowdown) + 1.

    Args:
        requests, budget, slowdown: of the window. dense_bytes: of the dense weights. tick_s, ticks: of the environment.
    """
    count = len(requests)
    now_s = np.arange(ticks + 1) * tick_s
    order = np.argsort(requests.arrival_s, kind="stable")
    arrival_s = requests.arrival_s[order]
    sums = [
        np.concatenate(([0.0], np.cumsum(column[order], dtype=np.float64)))
        for column in (np.ones(count), requests.prompt_tokens, requests.output_tokens)
    ]
    step = np.searchsorted(budget.change_s, now_s, side="right") - 1
    memory = np.asarray(budget.budget_bytes, dtype=np.float64)[step] / (8.0 * dense_bytes)
    columns = []
    for begin_s, end_s in pairwise(EDGES_S):
        first, last = (np.searchsorted(arrival_s, now_s + edge_s, side="left") for edge_s in (begin_s, end_s))
        arriving, prompts, outputs = (total[last] - total[first] for total in sums)
        columns += [10.0 * arriving / max(1, count), np.log2(1.0 + prompts) / 20.0, np.log2(1.0 + outputs) / 20.0]
        ahead = np.minimum(np.arange(ticks + 1) + int(begin_s / tick_s), ticks)
        reach = int(min(end_s, ticks * tick_s) / tick_s)
        columns.append(np.array([memory[at : max(at + 1, now + reach)].min() for now, at in enumerate(ahead)]))
    columns += [
        np.full(ticks + 1, np.log2(1.0 + count) / 12.0),
        1.0 - now_s / now_s[-1],
        np.full(ticks + 1, np.log2(slowdown) + 1.0),
    ]
    return np.clip(np.stack(columns, axis=1), 0.0, MOST).astype(np.float32)
