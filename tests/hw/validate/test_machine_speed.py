"""Reference runs: how much slower a machine is than its calibration, and at what."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="reference runs need the real engine: pip install -e '.[hw]'")

from hw.calibrate.calibration import calibration_content, with_factors
from hw.elastic.model import ElasticModel
from hw.validate.machine_speed import (
    MachineFactors,
    MachineSpeed,
    factor_of,
    factors_by_precision,
    machine_factors,
    run_speeds,
    said_factors,
    without_passes,
)
from sim.cost.bounds import Factors
from sim.cost.latency import calibration_from_dict, load_calibration
from sim.cost.model_spec import ModelSpec, load_model
from sim.cost.plan import dense_plan
from sim.errors import ConfigError
from tests.hw.serving import tiny

CALIBRATION = "smollm2_135m_cpu_epyc_1thread"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let reference runs serve for a second."""
    monkeypatch.setattr("hw.validate.machine_speed.SERVED_S", 1.0)
    monkeypatch.setattr("hw.calibrate.engine_runs.LEAST_REQUESTS", 4)


def pair(memory_bound: float, compute_bound: float) -> Factors:
    return Factors(memory_bound=memory_bound, compute_bound=compute_bound)


def made_up(
    content: dict[str, Any],
    spec: ModelSpec,
    machine: MachineFactors,
    seed: int,
    *,
    bits: int = 16,
    prompts: bool = True,
) -> dict[str, Any]:
    """Return a reference run of a machine whose passes take exactly what its factors say."""
    rng = np.random.default_rng(seed)
    usual, real = calibration_from_dict(content), calibration_from_dict(machine.over(content))
    plan = replace(dense_plan(spec), weight_bits=(bits,) * spec.num_layers)
    passes, priced_s = [], 0.0
    for _ in range(80):
        decodes = int(rng.integers(0, 12))
        chunks = [[int(rng.integers(5, 120)), 0]] if not decodes or (prompts and rng.random() < 0.3) else []
        if chunks and not prompts:
            chunks, decodes = [], 1
        shape = (chunks, decodes, decodes * int(rng.integers(20, 120)), decodes + len(chunks))
        batch = dict(zip(("chunks", "decode_batch", "decode_context_sum", "sequences"), shape, strict=True))
        passes.append(batch | {"measured_s": machine.slowdown * real.iteration_s(plan, *shape)})
        priced_s += usual.iteration_s(plan, *shape)
    measured_s = sum(one["measured_s"] for one in passes)
    return {"bits": bits, "iterations": 80, "measured_s": measured_s, "priced_s": priced_s, "passes": passes}


def test_the_speed_of_the_machine_is_what_all_references_took_over_their_prices(tmp_path: Path) -> None:
    speed = MachineSpeed(tmp_path)
    assert factor_of(speed.references) == 1.0
    elastic, latency = ElasticModel(tiny()), load_calibration(CALIBRATION)
    speed.measure(elastic, "cpu", latency)
    speed.measure(elastic, "cpu", latency)
    found = MachineSpeed(tmp_path).references
    assert found == speed.references
    assert len(found) == 2
    assert all(one["iterations"] == len(one["passes"]) > 5 for one in found)
    for one in found:
        assert one["measured_s"] == pytest.approx(sum(each["measured_s"] for each in one["passes"]), rel=1e-4)
        assert without_passes(one) == {key: one[key] for key in ("bits", "iterations", "measured_s", "priced_s")}
    measured_s, priced_s = (sum(one[side] for one in found) for side in ("measured_s", "priced_s"))
    assert factor_of(found) == measured_s / priced_s


def test_reference_runs_take_the_precisions_in_turn_and_say_how_fast_each_is(tmp_path: Path) -> None:
    content = calibration_content(CALIBRATION)
    speed, elastic, latency = MachineSpeed(tmp_path), ElasticModel(tiny()), calibration_from_dict(content)
    for _ in range(3):
        speed.measure(elastic, "cpu", latency, precisions=(16, 4))
    found = MachineSpeed(tmp_path).references
    assert [one["bits"] for one in found] == [16, 4, 16]
    machine = machine_factors(found, content, elastic.spec)
    dense = found[::2]
    assert machine.slowdown == sum(one["measured_s"] for one in dense) / sum(one["priced_s"] for one in dense)
    assert list(machine.block_factors) == [4]
    assert {bits: len(each) for bits, each in factors_by_precision(found).items()} == {16: 2, 4: 1}
    assert machine_factors([], content, elastic.spec) == MachineFactors()


def test_the_factors_of_a_machine_are_found_from_its_passes() -> None:
    content, spec = calibration_content(CALIBRATION), load_model("smollm2_135m")
    machine = MachineFactors(
        slowdown=1.8, factors=pair(1.15, 0.7), block_factors={8: pair(1.4, 0.9), 4: pair(0.8, 1.1)}
    )
    references = [made_up(content, spec, machine, seed, bits=bits) for seed, bits in enumerate((16, 8, 4, 16, 8, 4))]
    found = machine_factors(references, content, spec)
    # The slowdown is that of the dense runs; the product with the factors is what counts.
    for ours, theirs in [(found.factors, machine.factors)] + [
        (found.block_factors[bits], machine.block_factors[bits]) for bits in (8, 4)
    ]:
        assert found.slowdown * ours.memory_bound == pytest.approx(1.8 * theirs.memory_bound, rel=2e-3)
        assert found.slowdown * ours.compute_bound == pytest.approx(1.8 * theirs.compute_bound, rel=2e-3)
    assert MachineFactors.from_pairs(found.slowdown, json.loads(json.dumps(found.pairs()))) == found


def test_how_fast_single_runs_were_is_relative_to_the_machine_that_all_of_them_show() -> None:
    content, spec = calibration_content(CALIBRATION), load_model("smollm2_135m")
    slow, fast = (MachineFactors(slowdown=slowdown) for slowdown in (2.2, 1.8))
    references = [made_up(content, spec, machine, 4) for machine in (slow, fast)]
    machine = machine_factors(references, content, spec)
    assert machine.slowdown == pytest.approx(2.0)
    assert run_speeds(references, content, spec, machine) == pytest.approx([1.1, 0.9], rel=1e-2)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_predicted_seconds_of_both_kinds_of_passes_are_the_measured_ones(noise: float) -> None:
    content, spec = calibration_content(CALIBRATION), load_model("smollm2_135m")
    one = made_up(content, spec, MachineFactors(slowdown=1.5, factors=pair(1.2, 0.8)), 7)
    rng = np.random.default_rng(1)
    for each in one["passes"]:
        each["measured_s"] *= float(np.exp(noise * rng.normal()))
    one["measured_s"] = sum(each["measured_s"] for each in one["passes"])
    found = machine_factors([one], content, spec)
    latency, plan = calibration_from_dict(found.over(content)), dense_plan(spec)
    sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for each in one["passes"]:
        shape = (each["chunks"], each["decode_batch"], each["decode_context_sum"], each["sequences"])
        group = sums[bool(each["chunks"])]
        group[0] += found.slowdown * latency.iteration_s(plan, *shape)
        group[1] += each["measured_s"]
    for predicted_s, measured_s in sums.values():
        assert predicted_s == pytest.approx(measured_s, rel=1e-3)


def test_what_no_pass_shows_keeps_the_slowdown() -> None:
    content, spec = calibration_content(CALIBRATION), load_model("smollm2_135m")
    one = made_up(content, spec, MachineFactors(slowdown=2.0), 3, prompts=False)
    found = machine_factors([one], content, spec)
    assert found.factors.memory_bound == pytest.approx(1.0, rel=1e-3)
    assert found.factors.compute_bound == pytest.approx(1.0, rel=1e-3)


def test_factors_come_on_top_of_those_that_a_calibration_has() -> None:
    content = calibration_content(CALIBRATION)
    fitted = content | {
        "factors": {"memory_bound": 1.1, "compute_bound": 1.4},
        "block_factors": {"4": {"memory_bound": 2.0, "compute_bound": 1.0}},
    }
    assert with_factors(fitted, pair(1.5, 0.5), {8: pair(3.0, 1.0)}) == content | {
        "factors": {"memory_bound": pytest.approx(1.65), "compute_bound": pytest.approx(0.7)},
        "block_factors": {
            "4": {"memory_bound": pytest.approx(3.0), "compute_bound": pytest.approx(0.5)},
            "8": {"memory_bound": pytest.approx(3.3), "compute_bound": pytest.approx(1.4)},
        },
    }


def test_reference_runs_of_an_earlier_version_are_refused() -> None:
    content, spec = calibration_content(CALIBRATION), load_model("smollm2_135m")
    older = [{"iterations": 129.0, "measured_s": 5.0, "priced_s": 4.8, "bits": 16.0}]
    with pytest.raises(ConfigError, match="of an earlier version"):
        machine_factors(older, content, spec)


def test_a_page_says_what_is_slower() -> None:
    found = MachineFactors(factors=pair(1.21, 0.7), block_factors={4: pair(0.8, 1.1)})
    assert said_factors({}) == ""
    assert said_factors(found.pairs()) == (
        " Relative to this factor, what memory bounds and what arithmetic bounds took 1.21 and 0.70, 0.80 and 1.10 for "
        "blocks at 4 bits times as long as calibrated."
    )
