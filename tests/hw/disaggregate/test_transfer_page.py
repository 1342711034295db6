"""The page that compares simulated transfers of KV with real ones."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from hw.disaggregate.transfer import (
    BUSY,
    CALIBRATION,
    COMMON,
    LINKS,
    LONE,
    MOST_BYTES_PER_S,
    VARIANTS,
    configuration,
    fit_link,
    policy_overrides,
    read_figures,
    simulate,
)
from hw.disaggregate.transfer_page import PAGE, RESULT, crowded, page
from sim.cost.kv_format import stored_kv_bytes
from sim.cost.model_spec import load_model
from sim.disaggregate.disaggregate import StagedRecords
from sim.disaggregate.run import plan_of
from sim.errors import ConfigError
from sim.replay.run import build_trace
from tests.sim.pages.test_render import cells

LINK = {"bytes_per_s": 1e7, "latency_s": 0.002}


def transfers(rows: list[tuple[float, float, int]]) -> StagedRecords:
    """Return records of (first token, its KV has arrived, bytes) rows."""
    n = len(rows)
    columns: dict[str, Any] = {f.name: np.zeros(n) for f in fields(StagedRecords)}
    first_s, sent_s, size = (np.array(column) for column in zip(*rows, strict=True))
    columns |= {"first_token_s": first_s, "sent_s": sent_s, "sent_bytes": size, "finish_s": sent_s + 1.0}
    columns["produced_tokens"] = np.full(n, 4)
    return StagedRecords(**columns)


def test_a_link_is_fitted_on_the_transfers_that_had_it_alone() -> None:
    alone = [
        (10.0 * i, 10.0 * i + 0.003 + size / 1e6, size) for i, size in enumerate((10_000, 500_000, 2_000_000, 70_000))
    ]
    together = [(100.0, 105.0, 1_000_000), (101.0, 104.0, 1_000_000), (200.0, math.nan, 5)]
    found = fit_link(transfers(alone + together))
    assert found["transfers"] == 4
    assert found["bytes_per_s"] == pytest.approx(1e6)
    assert found["latency_s"] == pytest.approx(0.003)
    assert found["median_error_s"] == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ConfigError, match="is the machine idle"):
        fit_link(transfers(alone[:2] + together))


def test_transfers_whose_time_does_not_grow_with_their_bytes_give_a_latency_only() -> None:
    found = fit_link(transfers([(10.0 * i, 10.0 * i + 0.01 - 1e-4 * i, 1000 * (i + 1)) for i in range(6)]))
    assert found["bytes_per_s"] == MOST_BYTES_PER_S
    assert 0.009 < found["latency_s"] < 0.01


def test_every_variant_can_be_built_and_its_simulated_bytes_are_those_of_the_plan() -> None:
    model, sent = load_model("smollm2_135m"), {}
    for label, (_, kind) in VARIANTS.items():
        overrides = policy_overrides(kind)
        plan = plan_of(configuration("hw_disaggregate", overrides))
        trace = build_trace(configuration("disaggregate", overrides))
        sent[label] = simulate(overrides, LINK)["sent_bytes"]
        several = trace.output_tokens > 1
        assert sent[label] == sum(stored_kv_bytes(model, plan, int(p)) for p in trace.prompt_tokens[several])
    halves = [sent[label] / sent["dense"] for label, (_, kind) in VARIANTS.items() if kind != "dense"]
    assert all(0.3 < half < 0.6 for half in halves)


def test_the_requests_that_calibrate_are_not_those_that_are_reported() -> None:
    arrivals = [
        set(build_trace(configuration("disaggregate", overrides)).arrival_s.tolist()) for overrides in ((), LONE, BUSY)
    ]
    assert not arrivals[0] & arrivals[1]
    assert not arrivals[0] & arrivals[2]
    assert any(word.startswith("seed=") for word in COMMON)


def test_a_side_that_computes_slower_makes_simulated_times_longer() -> None:
    overrides = policy_overrides("dense")
    plain, same = simulate(overrides, LINK), simulate(overrides, LINK, {"prefill": 1.0, "decode": 1.0})
    assert same["e2e_s"] == pytest.approx(plain["e2e_s"])
    slow_prefill, slow_decode = (
        simulate(overrides, LINK, {"prefill": p, "decode": d}) for p, d in ((1.5, 1.0), (1.0, 1.5))
    )
    assert slow_prefill["ttft_s"]["mean"] > 1.4 * plain["ttft_s"]["mean"]
    assert slow_decode["ttft_s"] == pytest.approx(plain["ttft_s"])
    assert slow_decode["tpot_s"]["p50"] > plain["tpot_s"]["p50"]


def made_up() -> dict[str, Any]:
    """Return results in which the simulator is 10 % too fast for dense and right for the others."""
    variants = {}
    for i, (label, (link, kind)) in enumerate(VARIANTS.items()):
        row = read_figures(transfers([(0.0, 0.1 + 0.02 * i, 10**6 // (i + 1)), (1.0, 1.3, 0)]), 5.0)
        real = [{**json.loads(json.dumps(row)), "as_planned": kind != "both"} for _ in range(3)]
        simulated = json.loads(json.dumps(row))
        if label == "dense":
            simulated["way_s"]["mean"] *= 0.9
            simulated["sent_bytes"] += 1
        variants[label] = {"link": link, "words": [], "plan": f"plan {i}", "header_bytes": 10, "real": real,
                           "simulated": simulated, "at_speed": row}  # fmt: skip
    return {
        "provenance": {"commit": "0" * 40, "machine": "a machine", "written_at": "2026-01-02T00:00:00"},
        "calibration": CALIBRATION,
        "repeats": 3,
        "words": {"common": list(COMMON), "lone": list(LONE), "busy": list(BUSY)},
        "load_before": 0.1,
        "others_busy_cores": [0.0, 0.3],
        "links": {name: {"transfers": 5, "median_error_s": 0.001, **LINK} for name in LINKS},
        "times": {"prefill": 1.1, "decode": 1.2},
        "speeds": [{"prefill": 1.05, "decode": 1.2}, {"prefill": 1.15, "decode": 1.2}],
        "difference_bytes": 0,
        "variants": variants,
    }


def test_the_page_shows_errors_next_to_noise_and_bytes_that_differ() -> None:
    found = cells(page(made_up()))
    assert ["dense", "1,000,000", "**differs**", "1.00x"] in [row[:4] for row in found]
    assert ["unified", "500,000", "equal", "2.00x"] in [row[:4] for row in found]
    assert ["PDTrim both", "200,000", "**differs**", "5.00x"] in [row[:4] for row in found]
    assert ["dense", "KV transfer", "200 ms", "0.0 %", "-10.0 %", "+0.0 %"] in found
    assert ["prefill", "1.10", "1.05 to 1.15"] in found
    assert ["decode", "1.20", "1.20 to 1.20"] in found
    assert ["10 MB/s", "5", "10.0", "2.0", "1.0"] in found


def test_a_busy_machine_is_named_so_and_single_runs_order_nothing() -> None:
    assert [crowded(busy) for busy in ([], [0.0, 0.3], [0.1, 0.9, 1.0])] == [False, False, True]
    single = made_up() | {"repeats": 1}
    for variant in single["variants"].values():
        del variant["real"][1:]
    ranked = [any(row[:2] == ["simulator", "time"] for row in cells(page(made))) for made in (made_up(), single)]
    assert ranked == [True, False]


def test_the_committed_page_is_what_the_committed_results_give() -> None:
    assert page(json.loads(RESULT.read_text(encoding="utf-8"))) == PAGE.read_text(encoding="utf-8")
