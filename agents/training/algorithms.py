"""RLlib's algorithms as this project uses them: the new API stack, one vector environment a runner, masked actions.

Each function is named by a file of conf/algorithm, which holds its numbers. Trainer settings that no paper states are
ours: RAP (arXiv 2505.17138) gives DQN and the size of the network, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.marwil import MARWILConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from agents.training.episodes import FILE
from agents.training.modules import MaskedDQN, MaskedPPO
from sim.paths import REPOSITORY


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every algorithm is told.

    env, words: the environment's id and arguments. runners: remote env runners; 0 samples in the driver.
    """

    env: str
    words: dict[str, Any]
    seed: int
    num_envs: int
    runners: int
    hidden: Sequence[int]
    activation: str


def _common(config: AlgorithmConfig, setup: Setup, module: type, fragment: int | str, **model: Any) -> AlgorithmConfig:
    return (
        config.environment(setup.env, env_config=setup.words)
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
    epsilon: Sequence[Sequence[float]],
    n_step: int,
    double_q: bool,
) -> AlgorithmConfig:
    """Build DQN.

    Args:
        setup: what to train on. lr, discount, batch, n_step, double_q: as ever.
        buffer_steps: transitions that are remembered. learning_starts: environment steps before the first update.
        steps_an_update: environment steps from one update to the next.
        target_update_steps: environment steps from one copy to the target network to the next.
        epsilon: [environment step, share of random actions] points of a line.
    """
    fragment = max(1, steps_an_update // setup.num_envs)
    config = DQNConfig().training(  # type: ignore[no-untyped-call]
        lr=lr,
        gamma=discount,
        train_batch_size_per_learner=batch,
        num_steps_sampled_before_learning_starts=learning_starts,
        target_network_update_freq=target_update_steps,
        replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": buffer_steps},
        epsilon=[(int(step), float(share)) for step, share in epsilon],
        n_step=n_step,
        double_q=double_q,
        dueling=False,
        num_atoms=1,
        grad_clip=10,
    )
    return _common(config, setup, MaskedDQN, fragment)


# A constant, or [environment step, value] points of a line.
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
) -> AlgorithmConfig:
    """Build PPO with separate networks for policy and value."""
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
    return _common(config, setup, MaskedPPO, "auto", vf_share_layers=False)


def marwil(
    setup: Setup, *, data: str, beta: float, lr: float, discount: float, batch: int, updates_an_iteration: int
) -> AlgorithmConfig:
    """Build MARWIL: learns from written episodes alone; the environment only says what its spaces are.

    Args:
        setup: what to train on. lr, discount, batch: as ever. data: the folder of the episodes (``agents.offline``).
        beta: how much more a good action weighs; 0 copies what was done.
        updates_an_iteration: batches from one iteration to the next.
    """
    config: AlgorithmConfig = MARWILConfig().training(  # type: ignore[no-untyped-call]
        beta=beta, lr=lr, gamma=discount, train_batch_size_per_learner=batch, grad_clip=10.0
    )
    config.offline_data(
        input_=[str(REPOSITORY / data / FILE)],  # type: ignore[arg-type]
        input_read_episodes=True,
        input_read_batch_size=1,  # a batch is learned from for each row read: ray.data begins anew at the file's end
        map_batches_kwargs={"concurrency": 1, "num_cpus": 0.5},
        iter_batches_kwargs={"prefetch_batches": 2},
        dataset_num_iters_per_learner=updates_an_iteration,
    )
    config = _common(config, setup, MaskedPPO, "auto", vf_share_layers=False)
    env = gym.make(setup.env, **setup.words)
    return config.environment(observation_space=env.observation_space, action_space=env.action_space)
