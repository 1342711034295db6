"""``python -m agents.offline by=lookahead``: what any policy does, written as episodes to learn from.

One Parquet file of RLlib's own offline form: a row an episode, packed with msgpack. ``algorithm=marwil`` learns from it
without playing; ``imitate=offline`` only begins with it. A policy of ``ServeTrace`` whose plan is not in the table is
written as the legal plan of the table that is nearest in bytes of weights, then in the queue's limit.
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

from agents.envs.prune import PruneToBudget
from agents.envs.serve import ServeTrace
from agents.evaluation.prune import baselines, learned
from agents.evaluation.serve import conf_policy, learned_policies, served_of
from agents.training.episodes import FILE, write_episodes
from agents.training.train import environment_words
from sim.config import CONF_DIR, one_thread, run_command
from sim.cost.memory import weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan
from sim.errors import ConfigError, nearest
from sim.paths import REPOSITORY
from sim.policies.base import Policy
from sim.policies.observation.prune import removed_blocks
from sim.policies.observation.serve import ServeActions
from sim.types import Bools

Choose = Callable[[], int]
"""Returns the next action of the episode that is played."""


@dataclass(kw_only=True)
class OfflineConfig:
    """What to write.

    by: who plays: a file of conf/policy (ServeTrace), a baseline of agents/evaluation/prune.py (PruneToBudget), or the
        path of an exported policy. episodes: how many. out: the folder; runs/offline/BY when empty.
    """

    env: Any
    reward: Any
    by: str
    episodes: int = 200
    seed: int = 0
    out: str = ""


ConfigStore.instance().store(name="offline_schema", node=OfflineConfig)


def nearest_action(actions: ServeActions, model: ModelSpec, plan: Plan, legal: Bools) -> int:
    """Return the legal plan of a table that is nearest to a plan."""
    weights = weight_bytes(model, plan)

    def distance(action: int) -> tuple[bool, int, float]:
        found = actions.plans[action]
        queue = [math.inf if admit is None else float(admit) for admit in (plan.admit, found.admit)]
        apart = 0.0 if queue[0] == queue[1] else abs(queue[0] - queue[1])
        return found != plan, abs(actions.weights_bytes[action] - weights), apart

    return min(np.flatnonzero(legal).tolist(), key=distance)


def serve_player(env: ServeTrace, by: str) -> Callable[[int], Choose]:
    """Return what begins to play one episode of ``ServeTrace`` after its reset, told the number of the episode."""
    setting, served = env.setting, served_of(env.setting)
    known = sorted(path.stem for path in (CONF_DIR / "policy").glob("*.yaml"))
    if by.endswith(".json"):
        build = learned_policies([Path(by)])[0]
    elif by in known:
        build = conf_policy(by)
    else:
        raise ConfigError(f"by={by}: there is no such policy; {nearest(by, known)}, or the path of a policy.json")

    def begin(episode: int) -> Choose:
        policy: Policy = build(served)

        def choose() -> int:
            legal = setting.actions.legal(env.core.state, env.core.choice)
            return nearest_action(setting.actions, setting.model, policy(env.core.state), legal)

        return choose

    return begin


def prune_player(env: PruneToBudget, by: str, seed: int) -> Callable[[int], Choose]:
    """Return what begins to play one episode of ``PruneToBudget``: the blocks of a policy's plan, in random order."""
    if env.setting.restore or env.setting.sequence != 1:
        raise ConfigError("baselines solve one load an episode and restore nothing; set env.words accordingly")
    model = env.setting.model
    known = baselines(model)
    if by.endswith(".json"):
        decide = learned(model, [Path(by)])[0]
    elif by in known and by != "oracle":
        decide = known[by][0]
    else:
        raise ConfigError(f"by={by}: there is no such baseline; {nearest(by, known)}, or the path of a policy.json")

    def begin(episode: int) -> Choose:
        rng = np.random.default_rng([seed, episode])
        wanted = decide(env.draw)

        def choose() -> int:
            legal = ~removed_blocks(env.mask)
            left = np.flatnonzero(wanted & legal)
            return int(rng.choice(left if len(left) else np.flatnonzero(legal)))

        return choose

    return begin


def episodes(cfg: DictConfig) -> Iterator[Any]:
    """Play the episodes of a configuration; yield each as RLlib's SingleAgentEpisode."""
    from ray.rllib.env.single_agent_episode import SingleAgentEpisode

    if cfg.env.id not in ("ServeTrace-v0", "PruneToBudget-v0"):
        raise ConfigError(
            f"env.id is {cfg.env.id}; episodes are written of one agent: env=serve_trace or env=prune_to_budget"
        )
    words = environment_words(cfg)
    env: Any = ServeTrace(**words) if cfg.env.id == "ServeTrace-v0" else PruneToBudget(**words)
    begin = serve_player(env, cfg.by) if isinstance(env, ServeTrace) else prune_player(env, cfg.by, int(cfg.seed))
    for number in range(cfg.episodes):
        seen, _ = env.reset(seed=int(cfg.seed) if number == 0 else None)
        episode = SingleAgentEpisode(observation_space=env.observation_space, action_space=env.action_space)
        episode.add_env_reset(seen)
        choose, over = begin(number), False
        while not over:
            action = choose()
            seen, reward, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            episode.add_env_step(seen, np.int64(action), reward, terminated=terminated, truncated=truncated)
        episode.to_numpy()
        yield episode


def _run(cfg: DictConfig) -> None:
    name = Path(cfg.by).parent.parent.name if cfg.by.endswith(".json") else cfg.by
    folder = Path(cfg.out) if cfg.out else REPOSITORY / "runs" / "offline" / name
    played = list(episodes(cfg))
    write_episodes(folder / FILE, [episode.get_state() for episode in played])
    mean = float(np.mean([episode.get_return() for episode in played]))
    print(f"{folder / FILE}: {len(played)} episodes by {cfg.by}, mean return {mean:.3f}")


def main() -> None:
    """Run ``python -m agents.offline``."""
    one_thread()
    run_command(_run, "offline")
