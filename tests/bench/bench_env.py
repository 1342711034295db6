"""CPU microseconds of an environment step, resets included, and of a decision of the policies that ship."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import numpy as np

from agents.baselines.serve import conf_policy, policy_context
from agents.envs.cluster_vector import ServeReplicas
from agents.envs.prune_vector import PruneToBudgetVector
from agents.envs.serve import ServeSetting
from agents.envs.serve_lists import listed_windows, scenario_kwargs
from agents.envs.serve_vector import ServeTraceVector
from agents.evaluation.serve import play_window
from sim.cost.model_spec import load_model
from sim.cost.plan import Plan
from sim.engine.protocol import EngineState
from sim.policies.base import Policy
from sim.policies.learned import Network, averaged, network_of, prune_network, read_learned

ENVIRONMENTS = 32
SCENARIO = "mid/published"


class Timed:
    """A policy that keeps the seconds of each of its decisions."""

    def __init__(self, policy: Policy, took_s: list[float]) -> None:
        self.policy, self.took_s, self.first_plan = policy, took_s, policy.first_plan

    def __call__(self, state: EngineState) -> Plan:
        begun_s = time.perf_counter()
        plan = self.policy(state)
        self.took_s.append(time.perf_counter() - begun_s)
        return plan


def bench_vector(name: str, vector: Any, steps: int, change_share: float, warm_steps: int = 125) -> None:
    """Print the cost of a step under random legal actions, each changed with probability ``change_share``.

    warm_steps: taken before; compiled code is loaded then, and most of what follows from a plan is met.
    """
    seen, _ = vector.reset(seed=0)
    features = vector.setting.table.features
    rng = np.random.default_rng(0)
    actions = np.zeros(ENVIRONMENTS, dtype=np.int64)
    for step in range(warm_steps + steps):
        if step == warm_steps:
            begun_s = time.process_time()
        legal = seen[:, features:]
        drawn = (rng.random(legal.shape) * legal).argmax(axis=1)
        actions = np.where(rng.random(ENVIRONMENTS) < change_share, drawn, actions)
        seen, *_ = vector.step(actions)
    micros = (time.process_time() - begun_s) / steps / ENVIRONMENTS * 1e6
    print(f"{name:58s} {micros:9.1f} us a step, {ENVIRONMENTS} environments")


def bench_decision(name: str, network: Network, features: int, actions: int) -> None:
    """Print the time of one decision of a network."""
    rng = np.random.default_rng(0)
    seen = rng.random((10_000, features)).astype(np.float32)
    legal = rng.random((10_000, actions)) < 0.5
    legal[:, 0] = True
    took_s = []
    for row, flags in zip(seen, legal, strict=True):
        begun_s = time.perf_counter()
        network.act(row, flags)
        took_s.append(time.perf_counter() - begun_s)
    print_decisions(name, took_s)


def bench_served_decision(name: str) -> None:
    """Print the time of one decision of a policy in validation windows: observation, network and terms.

    The first window is played once before, without being timed.
    """
    setting = ServeSetting(**scenario_kwargs(SCENARIO))
    took_s: list[float] = []
    windows = [one.window for one in listed_windows("validation", scenarios=[SCENARIO], sources=["gamma", "mmpp"])]
    for number, window in enumerate((windows[0], *windows)):
        policy = conf_policy(name)(policy_context(setting))
        play_window(setting, window, Timed(policy, took_s) if number else policy)
    print_decisions(f"{name}: observation, network and terms", took_s)


def print_decisions(name: str, took_s: list[float]) -> None:
    """Print the median and the 99th percentile of the seconds of decisions."""
    p50, p99 = np.quantile(took_s, (0.5, 0.99)) * 1e6
    print(f"{name:58s} {p50:9.1f} us a decision, P99 {p99:.1f} us, {len(took_s):,} decisions")


def main() -> None:
    """Run every benchmark."""
    bench_vector("PruneToBudget-v0, random legal actions", PruneToBudgetVector(ENVIRONMENTS), 1000, 1.0)
    bench_vector("ServeTrace-v0, one plan", ServeTraceVector(ENVIRONMENTS), 500, 0.0)
    bench_vector("ServeTrace-v0, a new plan every tenth tick", ServeTraceVector(ENVIRONMENTS), 500, 0.1, 1500)
    name = "ServeCluster-v0, 4 replicas, a new plan every tenth tick"
    bench_vector(name, ServeReplicas(ENVIRONMENTS), 500, 0.1, 1500)
    prune = prune_network(load_model("smollm2_135m"), "learned_prune_smollm2")
    bench_decision("learned_prune_smollm2, one block", prune.network, prune.network.inputs, prune.network.actions)
    serve = read_learned("learned_serve_llama2", "ServeTrace").network
    bench_decision("learned_serve_llama2", serve, serve.inputs, serve.actions)
    bench_served_decision("learned_serve")
    ten = averaged([random_network([32, 84, 84, 12], seed) for seed in range(10)])
    bench_decision("the mean of 10 networks with 2 x 84 neurons", ten, ten.inputs, ten.actions)


def random_network(sizes: list[int], seed: int) -> Network:
    """Return a network with random weights and layers of these sizes."""
    rng = np.random.default_rng(seed)
    pairs = [(rng.normal(size=(out, size)), rng.normal(size=out)) for size, out in pairwise(sizes)]
    return network_of([(weight.astype(np.float32), bias.astype(np.float32)) for weight, bias in pairs], "relu")


if __name__ == "__main__":
    main()
