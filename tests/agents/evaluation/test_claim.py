"""The order claim, commit, play: the test windows are played for a committed claim alone."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from agents.evaluation import claim as claims
from agents.evaluation.chosen import named, replaced
from agents.evaluation.claim import check_claim, claim_path, claimed, policy_hashes
from agents.evaluation.make_claim import write_claim
from agents.evaluation.measure_serve import Played, measure_serve, what_is_played
from sim.config import CONF_DIR
from sim.errors import ConfigError
from sim.results.run_folder import write_json
from tests.agents.helpers import begin_checkout, composed, git, run_module

POLICY = CONF_DIR / "policy" / "learned_replica_llama2.json"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout for claims, in place of the project's."""
    begin_checkout(tmp_path)
    monkeypatch.setattr(claims, "REPOSITORY", tmp_path)
    return tmp_path


def configuration(*more: str) -> DictConfig:
    arguments = [
        f"serve_learned={{mine: {POLICY}}}",
        "compared=mine",
        "tasks=[serve]",
        "baselines=[dense,int4]",
        "scenarios=[roomy/published]",
        "serve_sources=[gamma]",
        "serve_windows=1",
        "claim=claim.json",
        *more,
    ]
    arguments = [named(one) for one in arguments]
    return replaced(composed("evaluate", *arguments), arguments)


def commit_claim(checkout: Path, cfg: DictConfig) -> Played:
    write_claim(cfg)
    git(checkout, "add", "claim.json")
    git(checkout, "commit", "-q", "-m", "claim")
    return what_is_played(cfg, "test")


def test_a_committed_claim_lets_its_windows_be_played_and_is_recorded(checkout: Path, tmp_path: Path) -> None:
    cfg = configuration()
    played = commit_claim(checkout, cfg)
    found = check_claim(cfg, played, tmp_path / "results")
    head = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert found["commit"] == head.stdout.strip()
    assert found["claims_before"] == 0
    content = json.loads(claim_path(str(cfg.claim)).read_text())
    assert content["policies"] == policy_hashes({"mine": [POLICY]})
    assert content["windows"]["count"] == len(played.listed) == 1
    assert content["comparison"]["policy"] == "mine"
    assert content["rules"]["roomy/published"]["names"] == ["dense", "int4"]
    files = content["server_files"]
    assert {"conf/slo/ttft_2s_tpot_100ms.yaml", "conf/quality/llama2_7b_transferred.yaml"} <= set(files)
    assert {name.split("/")[1] for name in files} == {"model", "gpu", "calibration", "quality", "engine", "slo"}


def test_the_test_windows_are_not_played_before_a_claim_is_committed(checkout: Path, tmp_path: Path) -> None:
    cfg = configuration()
    with pytest.raises(ConfigError, match=r"there is no claim .*python -m agents\.claim"):
        measure_serve(cfg, tmp_path / "results")
    write_claim(cfg)
    played = what_is_played(cfg, "test")
    with pytest.raises(ConfigError, match="not committed"):
        check_claim(cfg, played, tmp_path / "results")
    git(checkout, "add", "claim.json")
    with pytest.raises(ConfigError, match="not committed"):
        check_claim(cfg, played, tmp_path / "results")
    git(checkout, "commit", "-q", "-m", "claim")
    check_claim(cfg, played, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_claim_that_was_changed_after_its_commit_is_refused(checkout: Path, tmp_path: Path) -> None:
    cfg = configuration()
    played = commit_claim(checkout, cfg)
    path = claim_path(str(cfg.claim))
    path.write_text(path.read_text().replace('"mine"', '"yours"'))
    with pytest.raises(ConfigError, match="not committed as it is"):
        check_claim(cfg, played, tmp_path / "results")


@pytest.mark.parametrize(
    ("more", "differs"),
    [
        (["baselines=[dense]"], "rules"),
        (["serve_windows=2"], "windows"),
        (["serve_oracle=3"], "oracles"),
        ([f"serve_learned={{mine: {POLICY}, other: {POLICY}}}"], "policies"),
        (["compared=other"], "comparison"),
    ],
)
def test_what_was_not_claimed_is_not_played(checkout: Path, tmp_path: Path, more: list[str], differs: str) -> None:
    commit_claim(checkout, configuration())
    cfg = configuration(*more)
    with pytest.raises(ConfigError, match=rf"claims other .*{differs}"):
        check_claim(cfg, what_is_played(cfg, "test"), tmp_path / "results")


def test_a_policy_whose_weights_changed_or_a_server_whose_quality_changed_since_the_claim_is_not_played(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = configuration()
    played = commit_claim(checkout, cfg)
    hashes = claims.file_sha256
    monkeypatch.setattr(claims, "file_sha256", lambda path: "0" * 64 if path.suffix == ".safetensors" else hashes(path))
    with pytest.raises(ConfigError, match="claims other policies"):
        check_claim(cfg, played, tmp_path / "results")
    monkeypatch.setattr(claims, "file_sha256", lambda path: "0" * 64 if path.parent.name == "quality" else hashes(path))
    with pytest.raises(ConfigError, match="claims other server_files"):
        check_claim(cfg, played, tmp_path / "results")


def test_a_claim_is_not_played_with_code_or_configuration_that_changed_since(checkout: Path, tmp_path: Path) -> None:
    (checkout / "sim").mkdir()
    (checkout / "sim" / "engine.py").write_text("tick = 1\n")
    git(checkout, "add", "sim")
    cfg = configuration()
    played = commit_claim(checkout, cfg)
    check_claim(cfg, played, tmp_path / "results")
    (checkout / "notes.md").write_text("anything")
    git(checkout, "add", "notes.md")
    check_claim(cfg, played, tmp_path / "results")
    (checkout / "sim" / "new.py").write_text("tick = 2\n")
    with pytest.raises(ConfigError, match=r"sim/new\.py is not part of the claim"):
        check_claim(cfg, played, tmp_path / "results")
    (checkout / "sim" / "new.py").unlink()
    (checkout / "sim" / "engine.py").write_text("tick = 2\n")
    with pytest.raises(ConfigError, match=r"sim/engine\.py changed since the claim"):
        check_claim(cfg, played, tmp_path / "results")
    git(checkout, "commit", "-q", "-a", "-m", "change")
    with pytest.raises(ConfigError, match=r"sim/engine\.py changed since the claim"):
        check_claim(cfg, played, tmp_path / "results")
    cfg.only = ["mine"]
    check_claim(cfg, played, tmp_path / "results")


def test_a_rule_with_another_parameter_than_claimed_is_not_played(checkout: Path, tmp_path: Path) -> None:
    cfg = configuration()
    played = commit_claim(checkout, cfg)
    tuned = json.loads(json.dumps(played.tuned))  # as a result file holds it
    check_claim(cfg, replace(played, tuned=tuned), tmp_path / "results")
    tuned["roomy/published"]["rules"]["dense"]["policy"] = {"name": "dense", "patience": 2}
    with pytest.raises(ConfigError, match="claims other rules"):
        check_claim(cfg, replace(played, tuned=tuned), tmp_path / "results")


def test_a_claim_is_played_once_into_a_folder_and_later_claims_count_those_before(
    checkout: Path, tmp_path: Path
) -> None:
    cfg, results = configuration(), tmp_path / "results"
    played = commit_claim(checkout, cfg)
    write_json(results / "serve.json", {"claim": check_claim(cfg, played, results)})
    with pytest.raises(ConfigError, match="played once"):
        check_claim(cfg, played, results)
    (results / "serve.json").write_text("{")
    with pytest.raises(ConfigError, match=r"serve.json .*another folder"):
        check_claim(cfg, played, results)
    write_json(results / "serve.json", {})
    other = configuration("serve_windows=2")
    played = commit_claim(checkout, other)
    assert check_claim(other, played, results)["claims_before"] == 1


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("none", "claim is none, with which no claim is played"),
        ("notes.txt", "claim is notes.txt; a claim is a JSON file in the repository"),
        ("../elsewhere.json", r"claim is \.\./elsewhere.json; a claim is a JSON file in the repository"),
        ("other.json", "other.json is no claim; set claim to another file"),
    ],
)
def test_a_claim_is_a_file_of_its_own_in_the_repository(checkout: Path, file: str, message: str) -> None:
    (checkout / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match=message):
        write_claim(configuration(f"claim={file}"))
    assert (checkout / "other.json").read_text() == "{}"


def test_what_is_no_part_of_a_claim_is_refused() -> None:
    for key, reason in (("out=runs/x", "is the folder of the results"), ("only=[dense]", "plays some policies again")):
        made = run_module("agents.claim", "tasks=[cluster]", key)
        assert made.returncode == 2
        assert f"{key.partition('=')[0]} {reason}" in made.stderr
        assert "the file of the claim is cluster_claim=FILE.json" in made.stderr


def test_claims_under_other_names_count_as_claims_before(checkout: Path, tmp_path: Path) -> None:
    commit_claim(checkout, configuration())
    cfg = configuration("claim=docs/another claim.json", "serve_windows=2")
    write_claim(cfg)
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "claim again")
    git(checkout, "rm", "-q", "claim.json")
    git(checkout, "commit", "-q", "-m", "remove the first claim")
    assert check_claim(cfg, what_is_played(cfg, "test"), tmp_path / "results")["claims_before"] == 1


def test_a_claim_needs_a_git_checkout_and_the_policy_that_it_compares(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = configuration("compared=yours")
    with pytest.raises(ConfigError, match="compared is 'yours'; it must be one of serve_learned: mine"):
        write_claim(cfg)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "claim.json").write_text("{}")
    monkeypatch.setattr(claims, "REPOSITORY", bare)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    with pytest.raises(ConfigError, match="claim=none"):
        check_claim(configuration(), what_is_played(configuration(), "test"), tmp_path)


def test_validation_windows_need_no_claim(tmp_path: Path) -> None:
    cfg: Any = configuration("claim=none", "baselines=[dense]", "serve_learned={}")
    measure_serve(cfg, tmp_path)
    made = json.loads((tmp_path / "serve.json").read_text())
    assert made["split"] == "validation"
    assert "claim" not in made


def test_equal_configurations_claim_the_same() -> None:
    cfg = configuration()
    assert claimed(cfg, what_is_played(cfg, "test")) == claimed(cfg, what_is_played(cfg, "test"))
