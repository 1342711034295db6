"""Step: the replays of the step before in simulation, at the prices measured here, and how far they differ."""

from __future__ import annotations

from typing import Any

from hw.checkup.findings import Findings, Skip
from hw.checkup.policies import configuration, policies_for, serve
from hw.checkup.setup import Setup
from hw.validate.compare import compare, read_run, verdicts
from sim.replay.run import build_engine

SHOWN = ("ttft_s.mean", "tpot_s.mean", "e2e_s.mean", "makespan_s")


def run(setup: Setup, findings: Findings) -> None:
    """Simulate and compare every policy whose replay is complete; a missed tolerance is shown, not judged."""
    if not setup.calibration.is_file():
        raise Skip(f"no prices of this device: the step calibration has not written {setup.calibration.name}")
    folder = setup.folder("replays")
    done = [name for name in policies_for(setup.model) if (folder / name / "summary.json").is_file()]
    if not done:
        raise Skip("no replay on the device to compare with: the step policies has completed none")
    results: dict[str, Any] = {}
    for name in done:
        cfg = configuration(setup, name)
        simulated = folder / f"{name}_simulated"
        serve(simulated, cfg, *build_engine(cfg))
        result = compare(read_run(simulated), [read_run(folder / name)])
        judged = verdicts(result)
        results[name] = {
            "held": result["held"],
            "missed": [figure for figure, verdict in judged.items() if verdict == "missed"],
            "judged": len(judged),
            "speed_factor": result["speed_factor"],
            "errors": {figure: result["figures"][figure]["error"] for figure in SHOWN},
        }
        findings.figure("comparisons", results)
    findings.check("comparisons", bool(results), len(results), "one at least")
