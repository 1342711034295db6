"""Ray clusters: join one, and run many replays on its machines (``executor=ray``)."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sim.config.failures import how_to_install, same_handler_of_sigterm
from sim.errors import ConfigError
from sim.progress import VARIABLE, counted, progress

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0
FORWARDED_VARIABLES = ("RAP_LAB_DATA", "OMP_NUM_THREADS")


def join_ray(address: str | None, **more: Any) -> tuple[Any, bool]:
    """Join the Ray cluster at an address, or start a local one.

    Args:
        address: ``auto``, ``host:port`` or ``ray://host:port``; None starts Ray on this machine.
        more: further arguments of ``ray.init``.
    Returns:
        The module ``ray``, and whether this call initialized it; if Ray was initialized before, nothing changes.
    Raises:
        ConfigError: if no cluster answers at the address, it wants a token, or Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"a Ray cluster needs ray, which is not installed; {how_to_install('ray')}, or use processes on this "
            "machine: executor=processes workers=N, or hydra/launcher=joblib in a sweep"
        ) from error
    if ray.is_initialized():
        return ray, False
    from ray.exceptions import AuthenticationError, RayError

    try:
        host, _, port = (address or "").removeprefix("ray://").rpartition(":")
        if host and port.isdigit():
            # If nothing listens there, ray ends the process instead of raising; so try to connect first.
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
        if address and not address.startswith("ray://"):
            _check_token(address)
        # "local" keeps ray from following the address file that an earlier cluster left behind.
        with same_handler_of_sigterm():  # Ray's ends the process without a word, or with a stack of C
            ray.init(
                address=address or "local",
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                **more,
            )
    except AuthenticationError as error:
        raise ConfigError(
            f"the Ray cluster at address={address} wants its token, and got none or another; set RAY_AUTH_MODE=token, "
            "and put the token into RAY_AUTH_TOKEN or into ~/.ray/auth_token (on a machine of the cluster, "
            "ray get-auth-token prints it)"
        ) from error
    except (OSError, OverflowError, ValueError, RuntimeError, RayError) as error:
        if address is None:
            raise  # this machine's own Ray did not start: not a matter of an address
        reason = str(error).split("\n", 1)[0]
        raise ConfigError(
            f"no Ray cluster answers at address={address} ({reason}); check the address, or set it to null to "
            "start Ray here"
        ) from error
    return ray, True


def _check_token(address: str) -> None:
    """Ask the cluster at ``auto`` or ``host:port`` once; ``ray.init`` would try for 20 s and then hide the reason.

    Raises:
        AuthenticationError: if the cluster wants a token that this process does not have.
    """
    from ray.exceptions import AuthenticationError

    try:
        # Private, but the only parts of Ray that report the reason. The calls are those of ray.init, in its order.
        from ray._private.authentication import authentication_token_setup as tokens
        from ray._private.services import canonicalize_bootstrap_address
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        found = canonicalize_bootstrap_address(address)
        if found is None:
            return
        if address == "auto":
            tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        tokens.ensure_token_if_auth_enabled(create_token_if_missing=False)
        GcsClient(address=found)
    except AuthenticationError:
        raise
    except Exception:  # any other trouble, of these private parts as well, is left to ray.init
        logging.getLogger(__name__).debug("no answer from %s", address, exc_info=True)


class OnRay:
    """Runs a task for many items on a Ray cluster, one CPU each; results come in the order of the items.

    If the process has already joined a cluster, that one is used. Its machines need the same version of this package,
    and the data at the same path.
    """

    def __init__(self, address: str | None = "auto") -> None:
        """Set the address of the cluster (see ``join_ray``)."""
        self.address = address

    def __call__(self, task: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        """Run the task for every item; if a machine fails, its items run again on another, up to three times."""
        return run_on_ray(self.address, task, items, "runs", retries=3)


def run_on_ray(
    address: str | None, task: Callable[[Any], T], items: Sequence[Any], unit: str, *, cpus: float = 1.0, retries: int
) -> list[T]:
    """Run a task for every item on a Ray cluster, without progress of their own; results come in the items' order.

    Args:
        address: as in ``join_ray``. unit: what an item is called in the progress. cpus: that each takes.
        retries: how often an item runs again on another machine if its own fails.
    """
    ray, initialized = join_ray(address)
    environment = {name: os.environ[name] for name in FORWARDED_VARIABLES if name in os.environ} | {VARIABLE: "0"}
    try:
        remote = ray.remote(num_cpus=cpus, max_retries=retries, runtime_env={"env_vars": environment})(task)
        waiting = [remote.remote(item) for item in items]
        with progress("running on Ray", len(items), unit) as report:
            results: list[T] = counted(map(ray.get, waiting), report)
        return results
    finally:
        if initialized:
            ray.shutdown()
