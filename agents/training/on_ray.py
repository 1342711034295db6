"""Ray clusters: whether one answers at an address, and many replays at once on its machines (``executor=ray``)."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sim.errors import ConfigError

T = TypeVar("T")

ANSWER_S = 10.0
PASSED_ON = ("RAP_LAB_DATA", "OMP_NUM_THREADS")


def join_ray(address: str | None, **more: Any) -> tuple[Any, bool]:
    """Join the cluster at an address (``auto``, ``host:port`` or ``ray://host:port``), or start ray here for None.

    Returns:
        The module ``ray``, and whether it was joined now; where it had been before, nothing is done.
    Raises:
        ConfigError: when no cluster answers there, or ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "a Ray cluster needs ray, which is not installed: pip install -e '.[agents]'; or use processes of this "
            "machine (executor=processes workers=N)"
        ) from error
    if ray.is_initialized():
        return ray, False
    try:
        host, _, port = (address or "").removeprefix("ray://").rpartition(":")
        if host and port.isdigit():
            # Where nothing listens, ray ends the whole process instead of raising.
            socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
        # Without an address a stale file of an old cluster would otherwise be followed.
        ray.init(
            address=address or "local",
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            **more,
        )
    except OSError as error:
        raise ConfigError(f"no Ray cluster answers at address={address} ({error}); leave it out") from error
    return ray, True


class OnRay:
    """Does a task for many items on a Ray cluster, one CPU each; results come in the order of the items.

    Where ray has been joined already, by whoever calls, it is that cluster.

    Its machines need the same version of this package, and the data at the same path.
    """

    def __init__(self, address: str | None = "auto") -> None:
        """Set where the cluster is, as ``join_ray`` has it."""
        self.address = address

    def __call__(self, task: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        """Do it; a task whose machine fails is done again on another."""
        ray, own = join_ray(self.address)
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        try:
            remote = ray.remote(num_cpus=1, max_retries=3, runtime_env={"env_vars": environment})(task)
            results: list[T] = ray.get([remote.remote(item) for item in items])
            return results
        finally:
            if own:
                ray.shutdown()
