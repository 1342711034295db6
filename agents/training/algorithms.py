"""RLlib's algorithms as this project uses them: new API stack, one vector environment per runner, masked actions.

A file of conf/algorithm names one of these functions and holds its numbers. RAP (arXiv 2505.17138) states DQN and the
size of the network; all other training settings are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.marwil import MARWILConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from agents.envs.serve_foresight import ENTRIES as FORESEEN
from agents.training.episodes import FILE, read_recorded
from agents.training.learners import KeepsMargin, ReportsDivergence
from agents.training.modules import MaskedDQN, MaskedPPO
from agents.training.prelearner import CheckedPreLearner
from sim.errors import ConfigError
from sim.paths import REPOSITORY


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Settings that all algorithms share.

    env, env_kwargs: the environment's id and arguments.
    num_envs: environments per runner. runners: remote env runners; 0 samples in the driver.
    hidden: sizes of the hidden layers. activation: "relu" or "tanh".
    heads: (n, m) for an actor whose action i * m + j is a pair, with an output for each i and each j; DQN has none.
    """

    env: str
    env_kwargs: dict[str, Any]
    seed: int
    num_envs: int
    runners: int
    hidden: Sequence[int]
    activation: str
    heads: tuple[int, int] | None = None


def _common(config: AlgorithmConfig, setup: Setup, module: type, fragment: int | str, **model: Any) -> AlgorithmConfig:
    return (
        config.environment(setup.env, env_config=setup.env_kwargs)
        .framework("torch")
        .env_runners(
            num_env_runners=setup.runners,
            num_envs_per_env_runner=setup.num_envs,
            gym_env_vectorize_mode=gym.VectorizeMode.VECTOR_ENTRY_POINT,
            rollout_fragment_length=fragment,
        )
        .learners(num_learners=0)
        .rl_module(
            rl_module_spec=RLModuleSpec(
                module_class=module,
                model_config={
                    "fcnet_hiddens": list(setup.hidden),
                    "fcnet_activation": setup.activation,
                    "head_fcnet_hiddens": [],
                    **model,
                },
            )
        )
        .fault_tolerance(restart_failed_env_runners=True, delay_between_env_runner_restarts_s=1)
        .reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=0)
        .debugging(seed=setup.seed, log_level="ERROR")
    )


def dqn(
    setup: Setup,
    *,
    lr: float,
    discount: float,
    batch: int,
    buffer_steps: int,
    learning_starts: int,
    steps_an_update: int,
    target_update_steps: int,
    tau: float,
    epsilon: Sequence[Sequence[float]],
    n_step: int,
    double_q: bool,
) -> AlgorithmConfig:
    """Build DQN.

    Args:
        setup: shared settings.
        lr: learning rate. discount: per step. batch: transitions per update.
        buffer_steps: transitions in the replay buffer. learning_starts: environment steps before the first update.
        steps_an_update: environment steps between updates.
        target_update_steps: environment steps between updates of the target network.
        tau: share by which an update moves the target network to the trained one; 1 copies it.
        epsilon: share of random actions as [environment step, share] points, linear between them.
        n_step: steps of a return, at most 3 and steps_an_update // num_envs. double_q: use double Q-learning.
    """
    fragment = max(1, steps_an_update // setup.num_envs)
    config = DQNConfig().training(  # type: ignore[no-untyped-call]
        lr=lr,
        gamma=discount,
        train_batch_size_per_learner=batch,
        num_steps_sampled_before_learning_starts=learning_starts,
        target_network_update_freq=target_update_steps,
        tau=tau,
        replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": buffer_steps},
        epsilon=[(int(step), float(share)) for step, share in epsilon],
        n_step=n_step,
        double_q=double_q,
        dueling=False,
        num_atoms=1,
        grad_clip=10,
    )
    config = config.learners(learner_class=KeepsMargin)
    return _common(config, setup, MaskedDQN, fragment)


# A constant, or [environment step, value] points, linear between them.
Schedule = float | Sequence[Sequence[float]]


def _schedule(value: Schedule) -> Any:
    return value if isinstance(value, int | float) else [(int(step), float(x)) for step, x in value]


def ppo(
    setup: Setup,
    *,
    lr: Schedule,
    discount: float,
    gae_lambda: float,
    steps_an_iteration: int,
    minibatch: int,
    epochs: int,
    clip: float,
    entropy: Schedule,
    foresight: bool = False,
) -> AlgorithmConfig:
    """Build PPO with separate networks for policy and value.

    Args:
        setup: shared settings.
        lr, entropy: learning rate and weight of the entropy bonus, constant or scheduled. discount: per tick or action.
        gae_lambda: of generalized advantage estimation.
        steps_an_iteration: environment steps per iteration. minibatch, epochs: of its updates.
        clip: limit of the change of the action probability ratio.
        foresight: the critic also reads the requests and the memory to come (``agents.envs.serve_foresight``); the
            actor does not.
    Raises:
        ConfigError: for foresight in another environment than ``ServeTrace``.
    """
    if foresight and not setup.env.endswith(":ServeTrace-v0"):
        raise ConfigError("algorithm.foresight is for env=serve_trace and env=serve_many alone; set it to false")
    if foresight:
        setup = replace(setup, env_kwargs={**setup.env_kwargs, "foresight": True})
    config = PPOConfig().training(  # type: ignore[no-untyped-call]
        lr=_schedule(lr),
        gamma=discount,
        lambda_=gae_lambda,
        train_batch_size_per_learner=steps_an_iteration,
        minibatch_size=minibatch,
        num_epochs=epochs,
        clip_param=clip,
        entropy_coeff=_schedule(entropy),
        vf_clip_param=100.0,
        use_kl_loss=False,
        grad_clip=10.0,
    )
    config = config.learners(learner_class=ReportsDivergence)
    foreseen = FORESEEN if foresight else 0
    return _common(config, setup, MaskedPPO, "auto", vf_share_layers=False, heads=setup.heads, foreseen=foreseen)


def marwil(
    setup: Setup, *, data: str, beta: float, lr: float, discount: float, batch: int, updates_an_iteration: int
) -> AlgorithmConfig:
    """Build MARWIL, which learns from recorded episodes alone; the environment only provides the spaces.

    Args:
        setup: shared settings. data: folder of the episodes (``agents.offline``).
        beta: exponent of the advantage that weights an action; 0 is behavior cloning.
        lr, discount, batch: learning rate, discount per step, and rows per update.
        updates_an_iteration: updates per iteration.
    Raises:
        ConfigError: if the folder has episodes that are damaged, or of another environment.
    """
    # Ray Data describes every execution, and at the end of the process that Ray has ended before it.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    path = REPOSITORY / data / FILE
    env = gym.make(setup.env, **setup.env_kwargs)
    assert isinstance(env.observation_space, gym.spaces.Box)
    assert isinstance(env.action_space, gym.spaces.Discrete)
    if path.exists():
        # A bad file is an error here, before any actor starts; CheckedPreLearner checks again what is read later.
        read_recorded(path, env.observation_space.shape, int(env.action_space.n))
    config: AlgorithmConfig = MARWILConfig().training(  # type: ignore[no-untyped-call]
        beta=beta, lr=lr, gamma=discount, train_batch_size_per_learner=batch, grad_clip=10.0
    )
    config.offline_data(
        input_=[str(path)],  # type: ignore[arg-type]
        input_read_episodes=True,
        prelearner_class=CheckedPreLearner,
        # One update for each row that is read; ray.data starts over at the end of the file.
        input_read_batch_size=1,
        map_batches_kwargs={"concurrency": 1, "num_cpus": 0.5},
        iter_batches_kwargs={"prefetch_batches": 2},
        dataset_num_iters_per_learner=updates_an_iteration,
    )
    config = _common(config, setup, MaskedPPO, "auto", vf_share_layers=False, heads=setup.heads)
    return config.environment(observation_space=env.observation_space, action_space=env.action_space)
