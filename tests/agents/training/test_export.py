"""Export: the files go to the run folder, and the command that is printed runs the policy."""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
from pathlib import Path

import pytest

from agents.training.export import export, next_command
from sim.config import check_overrides, option_path
from sim.errors import ConfigError
from sim.policies.learned import SHIPPED
from tests.agents.helpers import run_module

NAMES = ["learned_prune_smollm2", "learned_serve_llama2", "learned_cluster_llama2"]


def training(folder: Path, name: str) -> Path:
    """A run folder whose best policy is a shipped one."""
    (folder / "best").mkdir(parents=True)
    for suffix in (".json", ".safetensors"):
        shutil.copy(SHIPPED / f"{name}{suffix}", folder / "best" / f"policy{suffix}")
    return folder


def shipped() -> list[Path]:
    return sorted(SHIPPED.glob("*"))


@pytest.mark.parametrize("name", NAMES)
def test_the_policy_goes_to_the_run_folder_and_the_package_stays_as_it_is(tmp_path: Path, name: str) -> None:
    before = shipped()
    target = export(training(tmp_path / "run", name), "mine")
    assert target == tmp_path / "run" / "mine.json"
    assert target.read_bytes() == (SHIPPED / f"{name}.json").read_bytes()
    assert target.with_suffix(".safetensors").read_bytes() == (SHIPPED / f"{name}.safetensors").read_bytes()
    assert shipped() == before
    elsewhere = export(tmp_path / "run", "mine", tmp_path / "new" / "folder")
    assert elsewhere.with_suffix(".safetensors").exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_printed_command_names_keys_and_options_that_exist(tmp_path: Path, name: str) -> None:
    target = export(training(tmp_path / "run", name), "mine")
    _, _, module, *arguments = shlex.split(next_command(target))
    importlib.import_module(f"{module}.__main__")  # which registers its schema
    assert f"policy.path={target}" in arguments
    check_overrides(arguments, {"sim.replay": "replay", "sim.cluster": "cluster"}[module])


def test_the_command_runs_what_was_exported_from_a_folder_with_any_name(tmp_path: Path) -> None:
    folder = training(tmp_path / "a b=c,(d)", "learned_serve_llama2")
    shown = run_module("agents.export", f'run="{folder}"', "name=mine")
    assert shown.returncode == 0, shown.stderr
    _, _, module, *arguments = shlex.split(shown.stdout.splitlines()[-1])
    run = run_module(module, *arguments, "trace.duration_s=5", f"hydra.run.dir={tmp_path / 'run'}")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run" / "records.parquet").exists()


def test_names_in_a_policys_file_cannot_add_to_the_command(tmp_path: Path) -> None:
    target = export(training(tmp_path / "run", "learned_serve_llama2"), "mine")
    about = json.loads(target.read_text())
    about["environment"]["gpu"] = "a; touch it_ran"
    target.write_text(json.dumps(about))
    assert "gpu=a; touch it_ran" in shlex.split(next_command(target))


@pytest.mark.parametrize("name", ["../mine", "a/b", "", ".hidden", "a b"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name is"):
        export(training(tmp_path / "run", NAMES[0]), name)


def test_a_run_without_a_policy_or_with_a_damaged_one_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no best/policy\.json"):
        export(tmp_path, "mine")
    run = training(tmp_path / "run", NAMES[0])
    best = run / "best" / "policy.json"
    about = json.loads(best.read_text())
    for text in ("[]", json.dumps({**about, "task": "Chess"}), json.dumps({**about, "layers": [[60, 71]]})):
        best.write_text(text)
        with pytest.raises(ConfigError, match=r"policy\.json"):
            export(run, "mine")
    assert not (run / "mine.json").exists()


def test_a_policy_that_is_no_option_says_how_to_run_a_file() -> None:
    with pytest.raises(ConfigError, match=r"there is no policy=mine; .*policy\.path=FILE\.json"):
        option_path("policy", "mine")
