"""A rule with the parameters that ``python -m agents.tune_rules`` found, read from its file in conf/rules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sim.config import CONF_DIR
from sim.errors import ConfigError, nearest
from sim.policies.admission import built
from sim.policies.base import Policy, PolicyContext

FOLDER = CONF_DIR / "rules"


def tuned(served: PolicyContext, *, rule: str, file: str) -> Policy:
    """Build a tuned rule.

    Args:
        rule: its name, such as ``load_ladder+wait``. file: the name of a file of conf/rules, or a path.
    Raises:
        ConfigError: for a missing or malformed file, or an unknown rule, with the nearest name.
    """
    rules = read_rules(rules_path(file))["rules"]
    if rule not in rules:
        raise ConfigError(f"policy.rule: {file} has no rule {rule!r}; {nearest(rule, rules)}")
    return built(rules[rule]["policy"], served)


def rules_path(file: str) -> Path:
    """Return the path of a file of tuned rules: its name in conf/rules, or a path.

    Raises:
        ConfigError: if there is no such file, with the nearest name.
    """
    path = FOLDER / f"{file}.json"
    if path.is_file():
        return path
    if Path(file).is_file():
        return Path(file)
    known = sorted(found.stem for found in FOLDER.glob("*.json"))
    there = nearest(file, known) if known else "conf/rules has none yet"
    raise ConfigError(
        f"policy.file: there are no tuned rules {file!r}; {there}; python -m agents.tune_rules writes them, and a path "
        "names a file elsewhere"
    )


def read_rules(path: Path) -> dict[str, Any]:
    """Return the content of a file of tuned rules.

    Raises:
        ConfigError: for a malformed file, or one that names what runs other than files of conf/policy.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name, rule in content["rules"].items():
            if not isinstance(rule["policy"], Mapping) or "name" not in rule["policy"]:
                raise ValueError(f"rules.{name}.policy has no name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} holds no tuned rules ({type(error).__name__}: {error}); python -m agents.tune_rules writes such a "
            "file"
        ) from error
    if (key := _target_in(content["rules"])) is not None:
        raise ConfigError(f"{path} has a key {key}; tuned rules name files of conf/policy and nothing else that runs")
    return content


def _target_in(value: Any) -> str | None:
    """Return the first key that Hydra would act on, at any depth; None if there is none."""
    if isinstance(value, Mapping):
        own = next((str(key) for key in value if str(key).startswith("_")), None)
        return own or next((found for one in value.values() if (found := _target_in(one))), None)
    if isinstance(value, list):
        return next((found for one in value if (found := _target_in(one))), None)
    return None
