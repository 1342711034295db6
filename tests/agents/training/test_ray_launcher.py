"""``--multirun hydra/launcher=ray``: the jobs of a sweep on a Ray cluster that the command starts."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from agents.training.ray_launcher import RayLauncher
from sim.errors import ConfigError
from tests.agents.helpers import run_python

QUICK = ("trace=poisson", "trace.duration_s=3")


def test_jobs_run_on_ray_and_one_that_fails_is_named_in_the_table(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    code = f"import os; os.chdir({str(tmp_path)!r}); from sim.replay.__main__ import main; main()"
    arguments = ("--multirun", "hydra/launcher=ray", "policy=dense,int8", f"hydra.sweep.dir={sweep}", *QUICK)
    done = run_python("-c", code, *arguments)
    assert done.returncode == 2
    assert "job 1 (policy=int8," in done.stderr
    assert "Traceback" not in done.stderr
    table = pd.read_parquet(sweep / "table.parquet").set_index("=policy")
    assert table["state"].to_dict() == {"dense": "complete", "int8": "failed"}
    assert "has no 8-bit times" in table["error"]["int8"]
    made = json.loads((sweep / table["run"]["dense"] / "provenance.json").read_text())
    assert made["overrides"][0] == "policy=dense"
    assert made["command"].startswith("python -m sim.replay --multirun hydra/launcher=ray policy=dense,int8 ")


def test_a_wrong_key_of_the_launcher_is_one_sentence() -> None:
    arguments = ("--multirun", "hydra/launcher=ray", "hydra.launcher.cpus=0", "policy=dense", *QUICK)
    done = run_python("-c", "from sim.replay.__main__ import main; main()", *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: hydra.launcher.cpus is 0")
    assert "Traceback" not in done.stderr


def test_a_job_needs_a_share_of_a_cpu() -> None:
    with pytest.raises(ConfigError, match="more than 0 CPUs"):
        RayLauncher(cpus=0.0)
