"""Compile every kernel into Numba's cache: ``python -m tests.warm_up``, which parallel test runs do first.

Without it each worker of a fresh checkout compiles the same functions, for half a minute.
"""

from __future__ import annotations

from tests.sim.fuzz import KINDS


def main() -> None:
    """Serve one random case of each kind: an engine, a cluster, prefill and decode on separate replicas."""
    for random_case, differences, _ in KINDS.values():
        differences(random_case(0))


if __name__ == "__main__":
    main()
