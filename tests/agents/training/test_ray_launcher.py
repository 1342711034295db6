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
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: 1 job failed, the first: job 1 (policy=int8,")
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


@pytest.mark.slow
def test_jobs_on_ray_find_the_options_and_the_code_of_config_dir(tmp_path: Path) -> None:
    own = tmp_path / "mine of mine"
    (own / "policy").mkdir(parents=True)
    (own / "ray_own_policy.py").write_text(
        "from sim.cost.plan import dense_plan\n\n\nclass Own:\n    def __init__(self, context):\n"
        "        self.first_plan = dense_plan(context.model)\n\n"
        "    def __call__(self, state):\n        return self.first_plan\n"
    )
    (own / "policy" / "ray_own.yaml").write_text("_target_: ray_own_policy.Own\n_partial_: true\n")
    code = f"import os; os.chdir({str(tmp_path)!r}); from sim.replay.__main__ import main; main()"
    launcher = ("--config-dir", own.name, "--multirun", "hydra/launcher=ray", "hydra.sweep.dir=sweep")
    done = run_python("-c", code, *launcher, "policy=ray_own,dense", *QUICK)
    assert done.returncode == 0, done.stderr
    table = pd.read_parquet(tmp_path / "sweep" / "table.parquet").set_index("=policy")
    assert table["state"].to_dict() == {"ray_own": "complete", "dense": "complete"}
    same = ("slo_attainment", "ttft_s.p95", "finished")
    assert table.loc["ray_own", list(same)].to_dict() == table.loc["dense", list(same)].to_dict()
