"""Frozen runs: a refactoring changes no record. ``python -m tests.frozen.runs --check`` compares every bit."""

from __future__ import annotations

import numpy as np
import pytest

from tests.frozen.runs import CONFIGURED, RUNS, differing_tables, hashes, machine, numbered, read_hashes

RANDOM = [name for name in RUNS if name not in CONFIGURED]
GROUPS = {
    "engines": [name for name in RANDOM if name.startswith("engine ")],
    "clusters": [name for name in RANDOM if name.startswith("cluster ")],
    "disaggregated": [name for name in RANDOM if name.startswith("disaggregated ")],
    "configured": sorted(CONFIGURED),
}


def test_every_run_is_frozen_and_in_one_group() -> None:
    assert list(read_hashes()["runs"]) == list(RUNS)
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(RUNS)


@pytest.mark.parametrize("group", GROUPS)
def test_runs_are_equal_to_the_frozen_ones(group: str) -> None:
    """Exactly for random cases on a machine like the one that wrote the hashes; else to the last bits of floats."""
    content = read_hashes()
    kind = "exact" if group != "configured" and machine() == content["machine"] else "rounded"
    differ = {}
    for name in GROUPS[group]:
        found, frozen = hashes(RUNS[name]()), content["runs"][name]
        if found[kind] != frozen[kind]:
            differ[name] = differing_tables(frozen, found)
    assert differ == {}


def test_last_bits_change_the_exact_hash_alone_and_a_whole_number_both() -> None:
    times_s, counts = np.array([0.1, np.nan, 2.5, np.inf]), np.array([3, 1, 4, 1])
    before = hashes({"a": [times_s, counts]})
    last_bits = hashes({"a": [np.nextafter(times_s, 9.0, where=np.isfinite(times_s), out=times_s.copy()), counts]})
    assert last_bits["exact"] != before["exact"]
    assert last_bits["rounded"] == before["rounded"]
    assert differing_tables(before, last_bits) == ["a"]
    for changed in ([times_s, counts + (counts > 3)], [times_s[::-1], counts], [times_s * 1.0001, counts]):
        assert hashes({"a": changed})["exact"] != before["exact"]
        assert hashes({"a": changed})["rounded"] != before["rounded"]


def test_every_nan_is_one_and_texts_count_by_which_are_equal() -> None:
    other_nan = np.array([0x7FF8000000000001], dtype=np.int64).view(np.float64)
    assert hashes({"a": [other_nan]}) == hashes({"a": [np.array([np.nan])]})
    assert numbered(["x", "y", "x"]).tolist() == numbered(["one", "two", "one"]).tolist() == [0, 1, 0]
