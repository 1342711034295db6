"""The page on swapping: its figures on a tiny model, and that it says what they say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hw.validate import swapping
from hw.validate.swapping import (
    MODES,
    PAGE,
    RESULT,
    WORKLOADS,
    configuration,
    figures_of,
    page,
    ratios,
    simulate,
    speed_factor,
)
from tests.hw.serving import engine_config, hw_engine, requests
from tests.sim.pages.test_render import cells


def run(makespan_s: float, preemptions: int) -> dict[str, Any]:
    names = ("busy_s", "makespan_s", "ttft_s", "tpot_s", "e2e_s")
    counts = {"requests": 9, "finished": 9, "preemptions": preemptions, "recomputed_tokens": 7 * preemptions}
    return {**counts, **dict.fromkeys(names, makespan_s)}


def content(repeats: int, load: float) -> dict[str, Any]:
    modes: dict[str, Any] = {
        "recompute": {"real": [run(10.0 + i, 4) for i in range(repeats)], "simulated": run(11.0, 3)},
        "swap": {"real": [run(8.0 + i, 5) for i in range(repeats)], "simulated": run(9.9, 5)},
    }
    return {
        "provenance": {"commit": "0123456789abcdef", "written_at": "2026-01-02T03:04:05", "machine": "a machine"},
        "load_before": load,
        "repeats": repeats,
        "factor": 1.25,
        "host_bytes_per_s": 8e8,
        "words": {"common": list(swapping.COMMON), "workloads": WORKLOADS, "modes": MODES},
        "workloads": {"short prompts": modes},
    }


def test_the_page_states_ratios_within_repeats_and_errors_of_the_simulation() -> None:
    text = page(content(3, 0.1))
    rows = [row for row in cells(text) if row[0] == "short prompts"]
    makespans = [row for row in rows if "makespan" in row]
    # 8 / 10, 9 / 11 and 10 / 12, and 9.9 / 11 in simulation.
    assert makespans[0] == ["short prompts", "makespan", "0.818", "0.800", "0.833", "0.900"]
    assert makespans[1] == ["short prompts", "recompute", "makespan", "11", "10", "12", "11", "+0.0 %"]
    assert makespans[2] == ["short prompts", "swap", "makespan", "9", "8", "10", "9.9", "+10.0 %"]
    assert rows[0][2:] == ["9", "4, 4, 4", "3", "28, 28, 28", "21"]
    assert "23,040 bytes of KV" in text
    assert "was served 3 times" in text
    assert "less time in 3 of 3 pairs of runs" in text
    assert "not idle" not in text
    assert "not idle" in page(content(1, 2.0))


def test_the_committed_page_is_that_of_the_committed_figures() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(json.loads(RESULT.read_text(encoding="utf-8")))


def test_the_ratio_of_a_repeat_is_that_of_its_own_runs() -> None:
    found = ratios(content(2, 0.0)["workloads"]["short prompts"], "e2e_s")
    assert found == pytest.approx([0.8, 9 / 11])


def test_the_machine_is_as_slow_as_its_runs_took_longer_than_calibrated() -> None:
    assert speed_factor([{"busy_s": 3.0, "priced_s": 1.0}, {"busy_s": 3.0, "priced_s": 3.0}]) == 1.5


@pytest.mark.parametrize("workload", WORKLOADS)
def test_requests_are_preempted_in_every_workload_and_swapping_computes_nothing_again(workload: str) -> None:
    found = {mode: simulate(workload, mode, 1.3) for mode in MODES}
    assert all(one["preemptions"] >= 5 and one["finished"] == one["requests"] for one in found.values())
    assert found["recompute"]["recomputed_tokens"] > 500
    assert found["swap"]["recomputed_tokens"] == 0
    assert found["swap"]["busy_s"] < found["recompute"]["busy_s"]
    slower = simulate(workload, "swap", 2.6)
    assert slower["busy_s"] > 1.7 * found["swap"]["busy_s"]


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_the_figures_of_a_real_run_count_what_was_computed_again(mode: str) -> None:
    host = {"preemption": "swap", "host_kv_blocks": 100} if mode == "swap" else {}
    engine = hw_engine(config=engine_config(**host), kv_blocks=12)
    engine.submit(requests([(0.0, 15, 14), (0.0, 15, 14), (0.0, 13, 14)]))
    while not engine.drained:
        engine.run_until(float("inf"))
    found = figures_of(configuration("short prompts", mode), engine)
    assert found["preemptions"] > 0
    assert (found["recomputed_tokens"] == 0) == (mode == "swap")
    shapes = engine.shapes()
    assert found["busy_s"] > 0
    assert sum(shape.prefill_tokens for shape in shapes) == 43 + found["recomputed_tokens"]
    engine.close()
