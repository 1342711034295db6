"""Export: the files go to the run folder, and the command that is printed runs the policy."""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from agents.training.export import (
    add_terms,
    export,
    export_average,
    next_command,
    run_folders,
    shipped_policies,
    target_file,
    write_card,
)
from agents.training.validation import validation_utilities
from sim.config import check_overrides, option_path
from sim.errors import ConfigError
from sim.policies.learned import SHIPPED, read_learned
from tests.agents.helpers import run_module

NAMES = ["learned_prune_smollm2", "learned_replica_llama2", "learned_cluster_llama2", "learned_roles_llama2"]


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
    run = training(tmp_path / "run", name)
    target = export(run, target_file("mine", "", run))
    assert target == tmp_path / "run" / "mine.json"
    assert target.read_bytes() == (SHIPPED / f"{name}.json").read_bytes()
    assert target.with_suffix(".safetensors").read_bytes() == (SHIPPED / f"{name}.safetensors").read_bytes()
    assert shipped() == before
    for name_of, out in (("mine", tmp_path / "new" / "folder"), ("", tmp_path / "newer" / "mine.json")):
        elsewhere = export(run, target_file(name_of, str(out), run))
        assert elsewhere.with_suffix(".safetensors").exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_printed_command_names_keys_and_options_that_exist(tmp_path: Path, name: str) -> None:
    target = export(training(tmp_path / "run", name), tmp_path / "mine.json")
    _, _, module, *arguments = shlex.split(next_command(target))
    importlib.import_module(f"{module}.__main__")  # which registers its schema
    assert f"{'roles' if 'roles' in name else 'policy'}.path={target}" in arguments
    check_overrides(arguments, {"sim.replay": "replay"}.get(module, module.removeprefix("sim.")))


def test_the_printed_command_names_the_server_of_the_training_and_no_key_without_a_value(tmp_path: Path) -> None:
    target = export(training(tmp_path / "run", "learned_serve_llama2"), tmp_path / "mine.json")
    about = json.loads(target.read_text())
    more = {"latency": None, "tp": 2, "prefix_caching": True, "sources": ["chats", "burst"]}
    about["environment"] |= more
    target.write_text(json.dumps(about))
    _, _, module, *arguments = shlex.split(next_command(target))
    assert {"trace=chats", "gpu.tp=2", "engine.prefix_caching=true"} <= set(arguments)
    assert not any(argument.startswith("latency=") or argument.endswith("=None") for argument in arguments)
    check_overrides(arguments, "replay")
    run = run_module(module, *arguments, "trace.arrivals.duration_s=5", f"hydra.run.dir={tmp_path / 'out'}")
    assert run.returncode == 0, run.stderr


def test_the_command_runs_what_was_exported_from_a_folder_with_any_name(tmp_path: Path) -> None:
    folder = training(tmp_path / "a b=c,(d)", "learned_replica_llama2")
    shown = run_module("agents.export", f'run="{folder}"', "name=mine")
    assert shown.returncode == 0, shown.stderr
    _, _, module, *arguments = shlex.split(shown.stdout.splitlines()[-1])
    run = run_module(module, *arguments, "trace.duration_s=5", f"hydra.run.dir={tmp_path / 'run'}")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run" / "records.parquet").exists()


def test_an_export_leaves_nothing_but_the_policy_and_its_page(tmp_path: Path) -> None:
    folder = training(tmp_path / "run", "learned_serve_llama2")
    made = run_module("agents.export", f"run={folder}", f"out={tmp_path / 'new' / 'mine.json'}", "room_weight=4.0")
    assert made.returncode == 0, made.stderr
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["mine.json", "mine.md", "mine.safetensors"]
    assert read_learned(tmp_path / "new" / "mine.json", "ServeTrace").about["room_weight"] == 4.0
    none = run_module("agents.export", "runs=[]")
    assert (none.returncode, "Traceback" in none.stderr) == (2, False)
    assert "runs is []; it must be a pattern or a list" in none.stderr


def test_names_in_a_policys_file_cannot_add_to_the_command(tmp_path: Path) -> None:
    target = export(training(tmp_path / "run", "learned_replica_llama2"), tmp_path / "mine.json")
    about = json.loads(target.read_text())
    about["environment"]["gpu"] = "a; touch it_ran"
    target.write_text(json.dumps(about))
    assert "gpu=a; touch it_ran" in shlex.split(next_command(target))


@pytest.mark.parametrize("name", ["../mine", "a/b", "", ".hidden", "a b"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name is"):
        target_file(name, "", tmp_path)
    with pytest.raises(ConfigError, match="leave one of them out"):
        target_file("mine", "mine.json", tmp_path)


def test_a_run_without_a_policy_or_with_a_damaged_one_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no best/policy\.json"):
        export(tmp_path, tmp_path / "mine.json")
    run = training(tmp_path / "run", NAMES[0])
    best = run / "best" / "policy.json"
    about = json.loads(best.read_text())
    for text in ("[]", json.dumps({**about, "task": "Chess"}), json.dumps({**about, "layers": [[60, 71]]})):
        best.write_text(text)
        with pytest.raises(ConfigError, match=r"policy\.json"):
            export(run, run / "mine.json")
    assert not (run / "mine.json").exists()


def seeds(folder: Path, count: int = 3) -> list[Path]:
    """Run folders of trainings that differ in the seed, with the weights of a shipped policy plus noise."""
    runs = []
    for seed in range(count):
        run = training(folder / f"seed_{seed}", "learned_prune_smollm2")
        best, rng = run / "best" / "policy.json", np.random.default_rng(seed)
        arrays = {key: x[0] for key, x in load_file(best.with_suffix(".safetensors")).items()}  # of its first network
        noisy = {key: x + rng.normal(size=x.shape).astype(np.float32) / 8 for key, x in arrays.items()}
        about = json.loads(best.read_text())
        best.write_text(json.dumps({key: about[key] for key in about if key not in ("members", "trainings", "guard")}))
        save_file(noisy, best.with_suffix(".safetensors"))
        change(best, training={"seed": seed, "seconds": 1.5, "validation_utility": 0.25})
        runs.append(run)
    return runs


def change(path: Path, **changed: Any) -> None:
    """Change keys of a policy's JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def test_the_average_of_seeds_has_the_mean_of_their_values_and_states_every_training(tmp_path: Path) -> None:
    runs = seeds(tmp_path)
    average = read_learned(export_average(runs, tmp_path / "mean.json"), "PruneToBudget")
    alone = [read_learned(run / "best" / "policy.json", "PruneToBudget").network for run in runs]
    features = np.random.default_rng(0).random((50, average.network.inputs)).astype(np.float32)
    expected = np.mean([network(features) for network in alone], axis=0)
    np.testing.assert_allclose(average.network(features), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(average.network(features[7]), expected[7], rtol=1e-5, atol=1e-5)
    assert average.network.parameters == sum(network.parameters for network in alone)
    assert average.about["members"] == 3
    assert [one["seed"] for one in average.about["trainings"]] == [0, 1, 2]
    assert average.about["training"]["seconds"] == 4.5
    env_kwargs = average.about["environment"]
    utility = float(validation_utilities("PruneToBudget-v0", env_kwargs, average.network).mean())
    assert average.about["training"]["validation_utility"] == pytest.approx(utility, abs=1e-6)


def test_one_training_alone_is_copied(tmp_path: Path) -> None:
    run = seeds(tmp_path, 1)[0]
    target = export_average([run], tmp_path / "mean.json")
    assert target.read_bytes() == (run / "best" / "policy.json").read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"actions": ["drop everything"]}, "their actions differs"),
        ({"environment": {"hide": ["kept"]}}, "their environment differs"),
        ({"quality_sha256": "0"}, "their quality_sha256 differs"),
        ({"tick_s": 2.0}, "their tick_s differs"),
        ({"activation": "tanh"}, "their activation differs"),
    ],
)
def test_trainings_whose_tables_differ_are_not_averaged(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    runs = seeds(tmp_path)
    change(runs[1] / "best" / "policy.json", **changed)
    with pytest.raises(ConfigError, match=f"seed_1.*{message}"):
        export_average(runs, tmp_path / "mean.json")
    assert not (tmp_path / "mean.json").exists()


def test_an_average_is_not_averaged_again_and_a_run_without_a_policy_is_named(tmp_path: Path) -> None:
    runs = seeds(tmp_path)
    mean = export_average(runs, tmp_path / "mean" / "best" / "policy.json")
    with pytest.raises(ConfigError, match="averages 3 networks already"):
        export_average([*runs, mean.parent.parent], tmp_path / "again.json")
    (runs[2] / "best" / "policy.json").unlink()
    with pytest.raises(ConfigError, match=r"seed_2 has no best/policy\.json"):
        export_average(runs, tmp_path / "again.json")


def test_runs_are_a_pattern_or_a_list_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for seed in (10, 9, 1):
        (tmp_path / f"seed_{seed}").mkdir()
    pattern = str(tmp_path / "seed_*")
    assert [path.name for path in run_folders(pattern)] == ["seed_1", "seed_9", "seed_10"]
    assert [path.name for path in run_folders([str(tmp_path / "seed_9"), pattern])] == ["seed_9", "seed_1", "seed_10"]
    for wrong, message in ((str(tmp_path / "x*"), "no folder matches"), (3, "must be a pattern"), ([1], "a pattern")):
        with pytest.raises(ConfigError, match=message):
            run_folders(wrong)


def test_the_command_averages_and_says_so_and_wants_one_of_run_and_runs(tmp_path: Path) -> None:
    seeds(tmp_path, 2)
    shown = run_module("agents.export", f"runs={tmp_path}/seed_*", f"out={tmp_path}/mean.json")
    assert shown.returncode == 0, shown.stderr
    assert "the average of 2 networks" in shown.stdout
    wrong = run_module("agents.export", "name=mine")
    assert wrong.returncode == 2
    assert "set run=FOLDER for one training, or 'runs=FOLDERS'" in wrong.stderr


def test_a_policy_that_is_no_option_says_how_to_run_a_file() -> None:
    with pytest.raises(ConfigError, match=r"there is no policy=mine; .*policy\.path=FILE\.json"):
        option_path("policy", "mine")


def test_only_a_policy_that_serves_with_a_target_gets_a_bound_by_it_and_only_one_that_serves_weighs_room(
    tmp_path: Path,
) -> None:
    target = export(training(tmp_path / "serve", "learned_serve_llama2"), tmp_path / "mine.json")
    for name, share in (("run_share", 0.9), ("wait_share", 0.7)):
        add_terms(target, {name: share})
        assert read_learned(target, "ServeTrace").about[name] == share
    for name in ("learned_prune_smollm2", "learned_serve_smollm2"):  # the second has a target for the first token alone
        other = export(training(tmp_path / name, name), tmp_path / f"{name}.json")
        with pytest.raises(ConfigError, match="was not trained to serve with a target of the time per output token"):
            add_terms(other, {"run_share": 0.9})
    add_terms(tmp_path / "learned_serve_smollm2.json", {"wait_share": 0.7})
    with pytest.raises(ConfigError, match="was not trained to serve with a target of the time to the first token"):
        add_terms(tmp_path / "learned_prune_smollm2.json", {"wait_share": 0.7})
    add_terms(target, {"room_weight": 4.0})
    assert read_learned(target, "ServeTrace").about["room_weight"] == 4.0
    with pytest.raises(ConfigError, match=r"room_weight is 4, but .* was not trained to serve; leave room_weight out"):
        add_terms(tmp_path / "learned_prune_smollm2.json", {"room_weight": 4.0})
    before = target.read_bytes()
    both = "pace_share and run_share both limit what runs at once; "
    with pytest.raises(ConfigError, match=both + r".*mine\.json states run_share already"):
        add_terms(target, {"pace_share": 0.9})
    with pytest.raises(ConfigError, match=both + "leave one of them out"):
        add_terms(target, {"pace_share": 0.9, "run_share": 0.8})
    wrong = run_module("agents.export", f"run={tmp_path / 'serve'}", f"out={target}", "room_weight=1e19")
    assert wrong.returncode == 2
    assert "room_weight is 1e+19; it must be a number above 0" in wrong.stderr
    assert target.read_bytes() == before  # it is checked before anything is written
    done = run_module("agents.export", f"run={tmp_path / 'serve'}", "name=mine", "pace_share=0")
    assert done.returncode == 2
    assert "pace_share is 0; it must be a share of the target of the time per output token, above 0" in done.stderr


@pytest.mark.parametrize("path", shipped_policies(), ids=lambda path: path.stem)
def test_the_page_about_a_shipped_policy_is_what_its_file_says(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    written = write_card(copy, path.stem).read_text()
    assert path.with_suffix(".md").read_text() == written, "write it again: python -m agents.export cards=true"
    about = json.loads(path.read_text())
    assert f"validation utility {about['training']['validation_utility']:.4f}" in " ".join(
        written.replace("|", " ").split()
    )
