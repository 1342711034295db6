"""The claim: what test windows, clusters or episodes are played with, written down before they are played.

The order is: claim (``python -m agents.claim``), commit, play. ``python -m agents.evaluate`` plays the test windows
only if a claim is committed, unchanged since, and says exactly what is about to be played: the policies' files, the
rules with their parameters and the windows, each by hash, and what is compared; code and configuration must be as they
were. Its result records the claim's commit, and how many claims there were before. A claim is played once into a
folder.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from agents.envs.serve_lists import FILE, windows_sha256
from sim.config import CONF_DIR
from sim.errors import ConfigError
from sim.json_file import read_json_object
from sim.paths import REPOSITORY

if TYPE_CHECKING:
    from agents.evaluation.measure_serve import Played

COMPARISON = (
    "utility of the policy minus that of a rule, on the windows that both play, each trace counting the same; 95 % "
    "intervals by agents.evaluation.statistics"
)
MOST_BELOW, ORACLE_SHARE = 0.005, 0.95
CRITERIA = {
    "rules": "above every rule that does not know the future, averaged over traces; the interval excludes zero",
    "traces": f"on no trace more than {MOST_BELOW} below any of these rules",
    "oracle": f"at least {ORACLE_SHARE:.0%} of the utility of oracle_search, on the windows that it plays",
}
"""What is claimed; ``agents.evaluation.serve_report`` says of each whether it holds."""
RULE = "python -m agents.windows (agents/evaluation/windows.py)"


PLAYED_BY = ("agents", "conf", "sim")
"""The folders on which the played figures depend; they must be as they were at the claim."""


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def policy_hashes(files: Mapping[str, Sequence[Path]]) -> dict[str, list[dict[str, str]]]:
    """Return name and hash of the two files of each policy; the path is stated if it lies in the repository."""
    return {
        name: [
            {
                "file": str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else path.name,
                "sha256": file_sha256(path),
                "weights_sha256": file_sha256(path.with_suffix(".safetensors")),
            }
            for path in paths
        ]
        for name, paths in files.items()
    }


SERVER_GROUPS = ("model", "gpu", "calibration", "quality", "engine", "slo")
"""The folders of conf with the files that ``ServeSetting.stated["server"]`` names, in its order."""


def server_hashes(played: Played) -> dict[str, str]:
    """Return the SHA-256 of every file that says how the served machines behave and what is asked of them."""
    files: set[Path] = set()
    for match in played.matches.values():
        for group, name in zip(SERVER_GROUPS, match.setting.stated["server"], strict=False):
            # A quality may be derived from other files of its folder.
            pattern = "**/*" if group == "quality" else f"{name}.*"
            files.update(path for path in (CONF_DIR / group).glob(pattern) if path.is_file())
    return {path.relative_to(CONF_DIR.parent).as_posix(): file_sha256(path) for path in sorted(files)}


def rules_hash(tuned: Mapping[str, Any]) -> dict[str, Any]:
    """Return the names of a scenario's rules, the name of the file they come from, and the SHA-256 of all of it."""
    content = json.dumps(tuned, sort_keys=True).encode()
    return {"file": tuned["file"], "names": list(tuned["rules"]), "sha256": hashlib.sha256(content).hexdigest()}


def claimed(cfg: DictConfig, played: Played) -> dict[str, Any]:
    """Return what a claim states of what is played, without its date and commit."""
    listed = played.listed
    content = {
        "comparison": {"policy": cfg.compared, "by": COMPARISON, "claims": CRITERIA},
        "policies": policy_hashes(played.files),
        "rules": {scenario: rules_hash(tuned) for scenario, tuned in played.tuned.items()},
        "server_files": server_hashes(played),
        "oracles": {"names": list(played.oracles), "windows_each": int(cfg.serve_oracle)},
        "windows": {
            "split": played.split,
            "rule": RULE,
            "list": FILE.relative_to(CONF_DIR.parent).as_posix(),
            "list_sha256": file_sha256(FILE),
            "sha256": windows_sha256(listed),
            "count": len(listed),
            "blocks": len({(one.window.source, one.block) for one in listed}),
            "scenarios": list(dict.fromkeys(one.scenario for one in listed)),
            "sources": list(dict.fromkeys(one.window.source for one in listed)),
        },
    }
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def claim_path(file: str, key: str = "claim") -> Path:
    """Return the file in which a claim is written; a relative path counts from the repository.

    Args:
        file: the value of ``key``.
    Raises:
        ConfigError: for none, which names no file; for a file outside of the repository, where it cannot be committed;
            or for one that holds something else.
    """
    if file == "none":
        raise ConfigError(f"{key} is none, with which no claim is played; name the file to write, or leave {key} out")
    path = (REPOSITORY / file).resolve()
    if not path.is_relative_to(REPOSITORY.resolve()) or path.suffix != ".json":
        raise ConfigError(f"{key} is {file}; a claim is a JSON file in the repository, such as docs/claim.json")
    if path.exists() and "comparison" not in read_json_object(path, ConfigError, f"set {key} to another file"):
        raise ConfigError(f"{path} is no claim; set {key} to another file, which does not exist yet")
    return REPOSITORY / file


def check_claim(cfg: DictConfig, played: Played, folder: Path) -> dict[str, Any]:
    """Return what a result records of its claim: its file, hash, date and commit, and how many came before.

    Args:
        cfg: an ``EvaluateConfig``. played: what is about to be played. folder: for the results.
    Raises:
        ConfigError: if the claim is missing, says something else, is not committed or changed since, or if the folder
            has its results already; or if code or configuration changed since.
    """
    path = REPOSITORY / str(cfg.claim)
    commits = claim_commits(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stated = {key: content[key] for key in content if key not in ("date", "commit")}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a claim ({error}); write one with python -m agents.claim") from error
    now = claimed(cfg, played)
    if differing := [key for key in now if stated.get(key) != now[key]]:
        raise ConfigError(
            f"{path} claims other {', '.join(differing)} than are about to be played; play what was claimed, or claim "
            "this and commit it: python -m agents.claim"
        )
    if not cfg.only:
        check_unchanged_since(commits[0])
    found = {
        "file": str(cfg.claim),
        "sha256": file_sha256(path),
        "date": content["date"],
        "commit": commits[0],
        "claims_before": len(every_claim(path) - {commits[0]}),
    }
    _check_not_played(folder / "serve.json", found, again=bool(cfg.only))
    return found


def check_stated(file: str, now: Mapping[str, Any], results: Path, command: str, *, only: bool) -> dict[str, Any]:
    """Return the content of a claim of clusters or roles, with its file, hash and commit.

    Args:
        file: of the claim, from the repository. now: what is about to be played. results: the JSON file of the results.
        command: that writes the claim. only: whether some policies are played again.
    Raises:
        ConfigError: if it is missing, not committed as it is, or says something else than is about to be played; if
            code or configuration changed since; or if the folder has its results already.
    """
    path = REPOSITORY / str(file)
    made_in = claim_commits(path, command)[0]
    content = read_json_object(path, ConfigError, f"write a claim: {command}")
    if differing := [key for key in now if content.get(key) != now[key]]:
        raise ConfigError(
            f"{path} claims other {', '.join(differing)} than are about to be played; play what was claimed, or claim "
            f"this and commit it: {command}"
        )
    if not only:
        check_unchanged_since(made_in, command)
    found = {**content, "file": str(file), "sha256": file_sha256(path), "claim_commit": made_in}
    _check_not_played(results, found, again=only)
    return found


def claim_commits(path: Path, command: str = "python -m agents.claim") -> list[str]:
    """Return the commits that changed a claim, the latest first.

    Raises:
        ConfigError: if it is missing, not committed, or changed since.
    """
    if not path.is_file():
        raise ConfigError(
            f"there is no claim {path}; what is held out for the test is played after it: {command}, then commit "
            "it; or play what is held out for validation: claim=none"
        )
    commits = _git("log", "--format=%H", "--", str(path)).split()
    if not commits or _git("status", "--porcelain", "--", str(path)):
        raise ConfigError(f"{path} is not committed as it is; commit it before it is played")
    return commits


def check_unchanged_since(commit: str, command: str = "python -m agents.claim") -> None:
    """Check that no code and no configuration changed since a claim, and that no file of either is new.

    Raises:
        ConfigError: if a file changed, or git does not know it and does not ignore it.
    """
    folders = [f":/{folder}" for folder in PLAYED_BY]
    if changed := _git("diff", "--name-only", commit, "--", *folders):
        raise ConfigError(
            f"{changed.splitlines()[0]} changed since the claim {commit[:12]}; play the claim as it was made, or claim "
            f"again: {command}"
        )
    if new := _git("ls-files", "--full-name", "--others", "--exclude-standard", "--", *folders):
        raise ConfigError(
            f"{new.splitlines()[0]} is not part of the claim {commit[:12]}; move it out of the checkout, or commit it "
            f"and claim again: {command}"
        )


def every_claim(path: Path) -> set[str]:
    """Return the commits that added or changed a claim, under this name or any other."""
    # A file that holds what a claim of windows holds: the hash of their list.
    found = _git("log", "--format=", "--name-only", "--diff-filter=A", '-S"list_sha256":', "--", "*.json").split("\n")
    files = [f":/{name}" for name in dict.fromkeys(found) if name]
    return set(_git("log", "--format=%H", "--diff-filter=AM", "--", str(path), *files).split())


def _check_not_played(path: Path, claim: Mapping[str, Any], *, again: bool) -> None:
    """Refuse to play a claim a second time; ``only`` may play some of its policies again."""
    if again or not path.is_file():
        return
    before = read_json_object(path, ConfigError, "set out=FOLDER to another folder").get("claim", {})
    if before.get("sha256") == claim["sha256"]:
        raise ConfigError(
            f"{path.parent} has the results of this claim, which is played once; read them with measure=false, or set "
            "out=FOLDER to see whether they come out the same"
        )


def _git(*arguments: str) -> str:
    """Return what a git command prints.

    Raises:
        ConfigError: if it fails, such as outside of a checkout.
    """
    try:
        run = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"git {arguments[0]} failed ({error}); a claim lies in a git checkout of the project, or use claim=none"
        ) from error


__all__ = ["check_claim", "claim_path", "claimed", "policy_hashes"]
