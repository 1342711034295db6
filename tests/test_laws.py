"""The laws of docs/laws.md: the page has them all, and those that no other test holds are tested here."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import math
import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sim.cost.plan import dense_plan
from sim.engine.sim_engine import SimEngine
from sim.paths import REPOSITORY
from sim.results.records import Iterations, Records
from tests.sim.serving import linear_latency, requests, tiny_engine

PAGE = REPOSITORY / "docs" / "laws.md"
ROWS = st.lists(
    st.tuples(st.floats(0, 30, allow_nan=False), st.integers(1, 60), st.integers(1, 25)), min_size=1, max_size=20
)
WAITS = st.one_of(st.none(), st.floats(0.01, 20, allow_nan=False))
Row = tuple[float, int, int]


def test_the_page_has_every_law_once() -> None:
    laws = re.findall(r"^\| (\d+) \|.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert laws == [str(number) for number in range(1, 14)]


def served(
    rows: list[Row],
    *,
    time_scale: float = 1.0,
    kv_blocks: int = 20,
    ahead: bool = False,
    swaps: bool = False,
    max_wait_s: float | None = None,
) -> SimEngine:
    """Return an engine that has served all rows, every time in it multiplied by ``time_scale``."""
    engine = tiny_engine(
        kv_blocks=kv_blocks,
        schedules_ahead=ahead,
        preemption="swap" if swaps else "recompute",
        host_kv_blocks=10 if swaps else 0,
        host_to_device_bytes_per_s=2**18 / time_scale,
        latency=linear_latency(0.25 * time_scale, 0.0078125 * time_scale, 0.001 * time_scale),
    )
    if max_wait_s is not None:
        engine.apply(dataclasses.replace(dense_plan(engine.model), max_wait_s=max_wait_s * time_scale))
    engine.submit(requests(*((arrival_s * time_scale, *tokens) for arrival_s, *tokens in rows)))
    engine.run_until(math.inf)
    return engine


@given(rows=ROWS, kv_blocks=st.integers(16, 40), ahead=st.booleans(), swaps=st.booleans(), wait=WAITS)
def test_law_12_all_times_doubled_double_all_results_bit_for_bit(
    rows: list[Row], kv_blocks: int, ahead: bool, swaps: bool, wait: float | None
) -> None:
    """A factor of two is exact in binary floating point, so any difference is a time that was not scaled."""
    rows = sorted(rows)
    plain = served(rows, kv_blocks=kv_blocks, ahead=ahead, swaps=swaps, max_wait_s=wait)
    doubled = served(rows, time_scale=2.0, kv_blocks=kv_blocks, ahead=ahead, swaps=swaps, max_wait_s=wait)
    for kind, one, two in (
        (Records, plain.records(), doubled.records()),
        (Iterations, plain.iterations(), doubled.iterations()),
    ):
        for field in dataclasses.fields(kind):
            factor = 2 if field.name.endswith("_s") else 1
            expected = factor * np.asarray(getattr(one, field.name))
            assert np.array_equal(getattr(two, field.name), expected, equal_nan=expected.dtype.kind == "f"), field.name


@given(rows=ROWS, later=ROWS, kv_blocks=st.integers(16, 40), ahead=st.booleans(), wait=WAITS)
def test_law_12_what_arrives_later_changes_nothing_before(
    rows: list[Row], later: list[Row], kv_blocks: int, ahead: bool, wait: float | None
) -> None:
    rows = sorted(rows)
    from_s = rows[-1][0] + 1.0
    more = rows + sorted((from_s + arrival_s, *tokens) for arrival_s, *tokens in later)
    alone, followed = (served(some, kv_blocks=kv_blocks, ahead=ahead, max_wait_s=wait) for some in (rows, more))
    for name in ("admitted_s", "first_token_s", "finish_s"):
        one, two = getattr(alone.records(), name), getattr(followed.records(), name)[: len(rows)]
        # A moment before the later arrivals is the same in both; one after them lies after them in both.
        early = (one < from_s) | (two < from_s)
        assert np.array_equal(one[early], two[early]), name
    starts = [engine.iterations().start_s for engine in (alone, followed)]
    assert np.array_equal(*(start_s[start_s < from_s] for start_s in starts))


def test_law_10_sim_and_hw_unpickle_nothing() -> None:
    """Pickled data runs code when it is read. The agents read it only from checkpoints that a training wrote itself."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "msgpack_numpy"}
    found = set()
    for path in itertools.chain((REPOSITORY / "sim").rglob("*.py"), (REPOSITORY / "hw").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                found.add(f"{path}: allow_pickle")
            found |= {f"{path}: {name}" for name in names if name.partition(".")[0] in forbidden}
    assert found == set()
