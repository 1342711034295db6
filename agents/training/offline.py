"""``python -m agents.offline by=lookahead``: record the episodes of any policy, to learn from.

The file is in RLlib's offline format (``agents.training.episodes``). ``algorithm=marwil`` learns from it alone;
``imitate=offline`` starts from it and then trains in the environment. If a policy of ``ServeTrace`` chooses a plan that
is not in the environment's table, the nearest legal plan is recorded: nearest in bytes of weights, then in queue limit.

Here a file of episodes is read without unpickling anything. RLlib's own reader unpickles arrays of Python objects, so
give it no file from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from agents.baselines.prune import baselines, learned_prune_policies
from agents.baselines.serve import conf_policy, learned_serve_policies, policy_context
from agents.envs.prune import PruneToBudget
from agents.envs.serve import ServeTrace
from agents.training.episodes import FILE, write_episodes
from agents.training.train import environment_kwargs
from sim.config import one_thread, option_names, run_command
from sim.cost.memory import weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan
from sim.errors import ConfigError, nearest
from sim.paths import REPOSITORY
from sim.policies.base import Policy
from sim.policies.learned_serve import own_plan
from sim.policies.observation.prune import removed_blocks
from sim.policies.observation.serve import ServeActions
from sim.progress import counted, progress
from sim.types import Bools

Choose = Callable[[], int]
"""Returns the next action of the current episode."""


@dataclass(kw_only=True)
class OfflineConfig:
    """Which episodes to record.

    by: the policy that plays: the name of a file of conf/policy (ServeTrace), a baseline of agents/evaluation/prune.py
        (PruneToBudget), or the path of an exported policy.
    episodes: how many. seed: of the environment. out: folder to write to; runs/offline/BY if empty.
    """

    env: Any
    reward: Any
    by: str
    episodes: int = 200
    seed: int = 0
    out: str = ""


ConfigStore.instance().store(name="offline_schema", node=OfflineConfig)


def nearest_action(actions: ServeActions, model: ModelSpec, plan: Plan, legal: Bools) -> int:
    """Return the legal action whose plan equals ``plan``, or is nearest: in bytes of weights, in what runs, in limits.

    What runs is compared in this order: bits of KV in all layers, whether KV or hidden states are kept, the layers in
    which KV is only written, how KV is compressed, bits of products, streamed layers. Then limits: waiting requests,
    seconds of waiting, running requests.
    """
    weights = weight_bytes(model, plan)

    def difference(ours: float | None, theirs: float | None) -> float:
        # Two that are unlimited differ by 0, not by inf - inf.
        limits = [math.inf if limit is None else float(limit) for limit in (ours, theirs)]
        return 0.0 if limits[0] == limits[1] else abs(limits[0] - limits[1])

    def layers(name: str, other: Plan) -> int:
        return sum(abs(ours - theirs) for ours, theirs in zip(getattr(plan, name), getattr(other, name), strict=True))

    def compression(other: Plan) -> tuple[bool, int]:
        ours, theirs = plan.kv_compression, other.kv_compression
        method = ours is not None and theirs is not None and ours.method != theirs.method
        return method, abs((100 if ours is None else ours.percent) - (100 if theirs is None else theirs.percent))

    def distance(action: int) -> tuple[float, ...]:
        other = actions.plans[action]
        return (
            other != plan,
            abs(actions.weights_bytes[action] - weights),
            layers("kv_bits", other),
            plan.kv_hidden != other.kv_hidden,
            layers("kv_only", other),
            *compression(other),
            layers("product_bits", other),
            layers("streamed", other),
            difference(plan.max_waiting, other.max_waiting),
            difference(plan.max_wait_s, other.max_wait_s),
            difference(plan.max_running, other.max_running),
        )

    return min(np.flatnonzero(legal).tolist(), key=distance)


def serve_player(env: ServeTrace, by: str) -> Callable[[int], Choose]:
    """Return a function that starts episode i of ``ServeTrace`` after a reset and returns its ``Choose``."""
    setting, context = env.setting, policy_context(env.setting)
    known = option_names("policy")
    if by.endswith(".json"):
        build = learned_serve_policies([Path(by)])[0]
    elif by in known:
        build = conf_policy(by)
    else:
        raise ConfigError(f"by={by}: there is no such policy; {nearest(by, known)}, or pass a path of a policy.json")

    def begin(episode: int) -> Choose:
        policy: Policy = build(context)

        def choose() -> int:
            legal = env.core.actions.legal(env.core.state, env.core.choice)
            plan = own_plan(policy, policy(env.core.state))
            return nearest_action(setting.actions, setting.model, plan, legal)

        return choose

    return begin


def prune_player(env: PruneToBudget, by: str, seed: int) -> Callable[[int], Choose]:
    """Return a function that starts episode i of ``PruneToBudget``, which drops a policy's blocks in random order."""
    if env.setting.restore or env.setting.sequence != 1:
        raise ConfigError(
            "baselines solve one load per episode and restore nothing; set env.kwargs.restore=false and "
            "env.kwargs.sequence=1"
        )
    model = env.setting.model
    known = baselines(model)
    if by.endswith(".json"):
        decide = learned_prune_policies(model, [Path(by)])[0]
    elif by in known and by != "oracle":
        decide = known[by][0]
    else:
        raise ConfigError(f"by={by}: there is no such baseline; {nearest(by, known)}, or pass a path of a policy.json")

    def begin(episode: int) -> Choose:
        rng = np.random.default_rng([seed, episode])
        removed = decide(env.load)

        def choose() -> int:
            legal = ~removed_blocks(env.mask)
            left = np.flatnonzero(removed & legal)
            return int(rng.choice(left if len(left) else np.flatnonzero(legal)))

        return choose

    return begin


def episodes(cfg: DictConfig) -> Iterator[Any]:
    """Play the episodes of a configuration; yield each as an RLlib SingleAgentEpisode."""
    from ray.rllib.env.single_agent_episode import SingleAgentEpisode

    if cfg.env.id not in ("ServeTrace-v0", "PruneToBudget-v0"):
        raise ConfigError(
            f"env.id is {cfg.env.id}, but episodes are written for one agent; use env=serve_trace or "
            "env=prune_to_budget"
        )
    env_kwargs = environment_kwargs(cfg)
    env: Any = ServeTrace(**env_kwargs) if cfg.env.id == "ServeTrace-v0" else PruneToBudget(**env_kwargs)
    begin = serve_player(env, cfg.by) if isinstance(env, ServeTrace) else prune_player(env, cfg.by, int(cfg.seed))
    for number in range(cfg.episodes):
        observation, _ = env.reset(seed=int(cfg.seed) if number == 0 else None)
        episode = SingleAgentEpisode(observation_space=env.observation_space, action_space=env.action_space)
        episode.add_env_reset(observation)
        choose, over = begin(number), False
        while not over:
            action = choose()
            observation, reward, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            episode.add_env_step(observation, np.int64(action), reward, terminated=terminated, truncated=truncated)
        episode.to_numpy()
        yield episode


def _run(cfg: DictConfig) -> None:
    name = Path(cfg.by).parent.parent.name if cfg.by.endswith(".json") else cfg.by
    folder = Path(cfg.out) if cfg.out else REPOSITORY / "runs" / "offline" / name
    with progress("playing", cfg.episodes, "episodes") as report:
        played = counted(episodes(cfg), report)
    write_episodes(folder / FILE, [episode.get_state() for episode in played])
    mean = float(np.mean([episode.get_return() for episode in played]))
    print(f"{folder / FILE}: {len(played)} episodes by {cfg.by}, mean return {mean:.3f}")


def main() -> None:
    """Run ``python -m agents.offline``."""
    one_thread()
    run_command(_run, "offline")
