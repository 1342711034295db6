"""How the parallel workers of pytest-xdist divide the tests: a file goes to one worker, long files start first."""

from __future__ import annotations

from functools import cache

from xdist.scheduler import LoadScopeScheduling

from sim.paths import REPOSITORY

LONG_FILES = (
    "tests/agents/training/test_train.py",  # first of the group that uses ray
    "tests/test_command_lines.py",
    "tests/hw/disaggregate/test_run.py",
    "tests/hw/elastic/test_kernels.py",
    "tests/hw/score/test_score.py",
    "tests/sim/replay/test_run.py",
    "tests/sim/cluster/test_cluster.py",
    "tests/agents/envs/test_cluster.py",
    "tests/hw/checkup/test_run.py",
    "tests/hw/checkup/test_steps.py",
    "tests/agents/evaluation/test_evaluate.py",
    "tests/agents/training/test_clone.py",
    "tests/hw/replay/test_random_weights.py",
    "tests/hw/calibrate/test_device.py",
    "tests/hw/validate/test_compare.py",
    "tests/hw/fit/test_command.py",
    "tests/sim/disaggregate/test_disaggregate.py",
    "tests/hw/engine/test_plan_changes.py",
    "tests/hw/engine/test_contract.py",
    "tests/sim/engine/test_contract.py",
)
"""Files that start first, longest first, so that no worker is left with a long one at the end."""
RAY_FIXTURES = ("local_ray", "ray_address")
RAY_GROUP = "ray"


def rank(file: str) -> int:
    """Return the place of a file in the order of the tests."""
    return LONG_FILES.index(file) if file in LONG_FILES else len(LONG_FILES)


@cache
def group_of(file: str) -> str:
    """Return the group of a file: its own, or that of all files that use ray, which takes seconds and a gigabyte."""
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    return RAY_GROUP if any(name in text for name in RAY_FIXTURES) else file


class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc, unused-ignore]
    """Give each group to one worker, so that what a file's tests share is made once.

    ``--dist loadgroup`` alone does not: xdist 3.8 writes the group into the name of a test, and pytest 9.2 ignores it.
    """

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid.partition("::")[0])
