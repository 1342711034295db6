"""Command ``python -m sim.replay``: one replay, or a sweep over seeds and windows."""

from __future__ import annotations

from omegaconf import DictConfig

from sim.config import one_thread, run_command
from sim.replay.run import run_replay
from sim.replay.sweep import replay_sweep


def main() -> None:
    """Run the command."""
    one_thread()
    run_command(_replay, "replay")


def _replay(cfg: DictConfig) -> None:
    if cfg.seeds or cfg.windows:
        replay_sweep(cfg)
    else:
        run_replay(cfg)


if __name__ == "__main__":
    main()
