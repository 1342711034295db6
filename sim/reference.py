"""``python -m sim.reference``: write docs/reference/configuration.md from conf/ and the code that it configures.

It also writes sim/console/keys.json, what the ``rap`` command completes.

For every command the page lists its groups and keys. For every group it lists the options and the arguments of what
they build, with types, defaults and the text of the docstrings. With ``check=true`` it writes nothing and exits 1 if
the page is out of date.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from sim.config import CONF_DIR, run_command
from sim.config.annotations import KEYWORDS_OF
from sim.console.commands import commands as console_commands
from sim.console.completion import KEYS, LAUNCHER
from sim.errors import ConfigError
from sim.new.run import FILES as BEGUN
from sim.paths import REPOSITORY
from sim.results.run_folder import write_text

PAGE = CONF_DIR.parent / "docs" / "reference" / "configuration.md"
BASE = "sim.replay"
POSITIONAL = {
    "sim.new": "what",
    "sim.report": "runs",
    "sim.runs": "folders",
    "sim.table": "folders",
    "sim.trace": "runs",
    "hw.compare": "runs",
}
"""Command -> the key that takes its arguments without ``=``."""
LONGEST_VALUE = 60
"""Characters of a value in a table; longer ones are cut."""

GROUPS = {
    "trace": "Which requests arrive: a published trace, a generator, or a file of your own.",
    "workload": "Steps applied to the trace before the replay: cut, scale, filter, inject a burst.",
    "model": "The shape of the served model. `model=hf` reads any Hugging Face `config.json`.",
    "gpu": "The device: memory, bandwidth and peak speed from its data sheet.",
    "engine": "Scheduler and limits of the serving engine.",
    "frontend": "What lies between clients and the queue of the engine: delays on the way in and back.",
    "budget": "Memory that weights, workspace and KV cache may use together, constant or over time.",
    "policy": "Which plan runs, and when it changes.",
    "slo": "The targets that each request must meet.",
    "router": "Which replica of a cluster serves a request.",
    "outages": "When replicas fail and come back.",
    "autoscaler": "How many replicas of a cluster serve.",
    "roles": "How many replicas prefill while the others decode.",
    "executor": "What runs several replays at once: local processes or a Ray cluster.",
    "experiment": "A named set of overrides. The second line of each file is the command that runs it.",
    "env": "The environment to train in.",
    "scenario": "How much memory a window of `ServeTrace` has, with the SLO and the prices. `low_bits` completes it.",
    "low_bits": "Which copies of the weights at low precision a scenario has, what they cost, and its table of plans.",
    "algorithm": "The learning algorithm and its hyperparameters.",
    "reward": "What the agent is paid for. See `agents/` for the formulas.",
    "imitate": "What training starts from: nothing, a solver, recorded episodes, or an exported policy.",
    "split": "Which loads and windows belong to training, validation and test. Read by name, not overridden.",
    "quality": "Perplexity of plans, measured or published: choose one with `quality_table=NAME`.",
}

INTRO = """\
# Configuration

<!-- Written by `python -m sim.reference` (`make reference`). Do not edit. -->

Every command takes `GROUP=OPTION`, which chooses a file of `conf/GROUP/`, and `KEY=VALUE`, which changes one value.
Nested keys have dots: `budget=kv_blocks budget.blocks=7300 engine.limits.max_running=128`. `--help` prints the same for
one command. An unknown group, option or key is an error that names the nearest valid one. `_s`, `_bytes` and `_tokens`
in a name are its unit. A `_target_` names the Python function or class that a file configures, so a configuration is
code: run only files that you trust.
"""


def commands() -> dict[str, Path]:
    """Return command -> its file in conf/, in the order of the page."""
    packages, known = ("sim", "hw", "agents"), console_commands()
    # sim.replay comes first, for most others take its keys too.
    order = sorted(known, key=lambda name: (name != BASE, packages.index(name.split(".")[0]), name))
    return {name: known[name].path for name in order}


def page() -> str:
    """Return the page."""
    groups = sorted({path.parent.name for path in CONF_DIR.glob("*/*.yaml")})
    if missing := sorted(set(groups) - set(GROUPS)):
        raise ConfigError(f"conf/{missing[0]} is not described; add a line to GROUPS in {Path(__file__).name}")
    parts, shared = [INTRO, "## Commands\n"], list[Sequence[str]]()
    for command, path in commands().items():
        text, rows = _command(command, path, shared)
        parts.append(text)
        shared = shared or rows
    parts.append("## Groups\n")
    parts += [_group(name) for name in GROUPS if name in groups]
    return "\n".join(parts).rstrip() + "\n"


def completions() -> dict[str, dict[str, Any]]:
    """Return for each command what the ``rap`` command completes.

    ``groups`` with their defaults, ``keys`` with their types, ``hydra``: keys of Hydra that do something there, and
    ``first``: what its first argument without ``=`` may be. The key of such arguments is left out, so that the shell
    completes folders.
    """
    found: dict[str, dict[str, Any]] = {}
    for command, path in commands().items():
        cfg, chosen, rows = _groups_and_keys(command, path)
        keys = {row[0].strip("`"): row[1].strip("`").partition(" or ")[0] for row in rows}
        keys.pop(POSITIONAL.get(command, ""), None)
        hydra = cfg["hydra"]
        own = ["hydra.run.dir"] if hydra.get("run", {}).get("dir", ".") != "." else []
        own += ["hydra.sweep.dir", LAUNCHER] if "sweep" in hydra else []
        found[command] = {
            "groups": chosen,
            "keys": {key: kind if kind == "bool" else "" for key, kind in keys.items()},
            "hydra": own,
            "first": sorted(BEGUN) if command == "sim.new" else [],
        }
    for command, path in commands().items():
        for entry in yaml.safe_load(path.read_text(encoding="utf-8")).get("defaults", []):
            base = next((one for one, where in commands().items() if where.stem == entry), None)
            if base is not None:  # the file begins with that of another command
                mine, theirs = found[command], found[base]
                found[command] = {key: theirs[key] | mine[key] for key in ("groups", "keys")} | {
                    key: list(dict.fromkeys(theirs[key] + mine[key])) for key in ("hydra", "first")
                }
    return found


def _groups_and_keys(command: str, path: Path) -> tuple[dict[str, Any], dict[str, Any], list[Sequence[str]]]:
    """Return a command's file without its defaults, its groups with their default options, and a row for each key."""
    cfg = yaml.safe_load(path.read_text(encoding="utf-8"))
    chosen: dict[str, Any] = {}
    schema = None
    for entry in cfg.pop("defaults", []):
        if isinstance(entry, str) and entry.endswith("_schema"):
            schema = _schema(command, entry)
        elif isinstance(entry, Mapping):
            chosen |= {k: v for k, v in entry.items() if not str(k).startswith("override ")}
    return cfg, chosen, list(_fields(schema, cfg, skip=set(chosen))) if schema is not None else []


def _command(command: str, path: Path, shared: Sequence[Sequence[str]]) -> tuple[str, list[Sequence[str]]]:
    """Return the section of a command, and its rows of keys; rows equal to ``shared`` ones are named, not repeated."""
    cfg, chosen, rows = _groups_and_keys(command, path)
    template = cfg.get("hydra", {}).get("help", {}).get("template", "")
    parts = [f"### {command}\n", template.partition("\n\n")[0].strip() + "\n"]
    examples = re.findall(r"^  python -m .*(?:\\\n.*)*(?:\n {20,}\S.*)*$", template, re.MULTILINE)
    if examples:
        parts.append("```text\n" + "\n".join(example.strip() for example in examples) + "\n```\n")
    if chosen:
        links = [f"[`{group}`](#{group})={_plain(option)}" for group, option in chosen.items()]
        parts.append("Groups and their default options: " + ", ".join(links) + ".\n")
    if own := [row for row in rows if row not in shared]:
        parts.append(_table(("key", "type", "default", "meaning"), own))
    if same := [row[0] for row in rows if row in shared]:
        anchor = BASE.replace(".", "")
        parts.append(f"With the meaning and default that they have in [{BASE}](#{anchor}): {', '.join(same)}.\n")
    return "\n".join(parts), rows


def _schema(command: str, name: str) -> type:
    """Return the dataclass that a command's file is checked against, from the module that registers it.

    Raises:
        ConfigError: when no module registers it.
    """
    root = CONF_DIR.parent
    for package in dict.fromkeys((command.partition(".")[0], "sim")):
        for path in sorted((root / package).rglob("*.py")):
            if f'name="{name}"' in path.read_text(encoding="utf-8"):
                importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
                schema = OmegaConf.get_type(ConfigStore.instance().load(f"{name}.yaml").node)
                assert schema is not None
                return schema
    raise ConfigError(f'{command}: no module stores {name}; store it with ConfigStore, name="{name}"')


def _fields(schema: type, values: Mapping[str, Any], *, skip: set[str], prefix: str = "") -> Iterator[Sequence[str]]:
    """Yield key, type, default and meaning of each field; a field that is a dataclass yields its own fields."""
    described: dict[str, str] = {}
    names = [field.name for field in dataclasses.fields(schema)]
    for base in reversed(schema.__mro__):
        described |= descriptions(vars(base).get("__doc__") or "", names)
    types = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if field.name in skip:
            continue
        if dataclasses.is_dataclass(types[field.name]):
            inner = values.get(field.name) or {}
            yield from _fields(types[field.name], inner, skip=set(), prefix=f"{prefix}{field.name}.")
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = values.get(field.name, default)
        yield _row(prefix + field.name, field.type, value, described.get(field.name, ""))


def _group(name: str) -> str:
    parts = [f"### {name}\n", GROUPS[name] + "\n"]
    options, targets = [], dict[tuple[str, bool], None]()
    for path in sorted((CONF_DIR / name).glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) or {}
        targets |= dict.fromkeys(_targets(content))
        options.append((f"`{path.stem}`", _cell(_comment(text, path)), _values(content)))
    parts.append(_table(("option", "what it is", "values"), options))
    return "\n".join(parts + [part for target, partial in targets for part in _target(target, partial)])


def _target(target: str, partial: bool) -> list[str]:
    """Return what a target is, and the table of its keys; of a partial one, keys are what its caller does not pass."""
    function = get_object(target)
    docstring = inspect.getdoc(function) or ""
    first = docstring.partition("\n\n")[0].replace("\n", " ")
    parameters = list(inspect.signature(function).parameters.values())
    if target in KEYWORDS_OF:
        passed_on = get_object(KEYWORDS_OF[target])
        docstring = inspect.getdoc(passed_on) or ""
        parameters += inspect.signature(passed_on).parameters.values()
    keys = [
        p
        for p in parameters
        if p.kind is p.KEYWORD_ONLY or (p.kind is p.POSITIONAL_OR_KEYWORD and not (partial and p.default is p.empty))
    ]
    if not keys:
        return []
    described = descriptions(docstring, [p.name for p in keys])
    rows = [_row(p.name, p.annotation, p.default, described.get(p.name, "")) for p in keys]
    return [f"`{target}`: {_cell(first)}\n", _table(("key", "type", "default", "meaning"), rows)]


def descriptions(docstring: str, names: Sequence[str]) -> dict[str, str]:
    """Return what a docstring says of each name: ``name: text`` or ``name, other: text``, also several on one line."""
    any_name = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    if not any_name:
        return {}
    heading = re.compile(rf"(?:(?<=\s)|^)(?P<names>(?:{any_name})(?:, (?:{any_name}))*): ")
    # A paragraph or a section such as Raises ends a description.
    text = re.sub(r"^\s*(?:Args|Raises|Returns|Source):", "\n\n", inspect.cleandoc(docstring), flags=re.MULTILINE)
    found: dict[str, str] = {}
    for paragraph in re.split(r"\n\s*\n", text):
        matches = list(heading.finditer(paragraph))
        for i, match in enumerate(matches):
            end = matches[i + 1].start() if i + 1 < len(matches) else len(paragraph)
            said = " ".join(paragraph[match.end() : end].split())
            found |= dict.fromkeys(match["names"].split(", "), said)
    return found


def _targets(node: Any) -> Iterator[tuple[str, bool]]:
    """Yield every target of a file, and whether it is partial."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield str(node["_target_"]), bool(node.get("_partial_"))
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value)


def _values(content: Any, prefix: str = "") -> str:
    """Return the values that an option sets, ``key=value`` with dots for nested keys."""
    if not isinstance(content, Mapping):
        return ""
    shown = []
    for key, value in content.items():
        if str(key) in ("_target_", "_partial_", "defaults"):
            continue
        if isinstance(value, Mapping) and value:
            shown.append(_values(value, f"{prefix}{key}."))
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            shown += [_values(item, f"{prefix}{key}.{i}.") for i, item in enumerate(value) if isinstance(item, Mapping)]
        else:
            shown.append(f"{prefix}{key}={_plain(value)}")
    if prefix:
        return ", ".join(part for part in shown if part)
    return _code(", ".join(part for part in shown if part))


def _comment(text: str, path: Path) -> str:
    """Return the comment at the head of a file, without a name of the file itself or Hydra's package line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    lines = [line for line in lines if not line.startswith("@package")]
    comment = " ".join(lines).removeprefix(f"conf/{path.parent.name}/{path.name} - ")
    if path.parent.name == "experiment":
        return f"`{lines[0]}` {' '.join(lines[1:])}"
    return comment


def _row(key: str, type_: Any, default: Any, meaning: str) -> Sequence[str]:
    kind = "" if type_ in (inspect.Parameter.empty, "Any", Any) else _code(str(type_).replace(" | ", " or "))
    missing = default is dataclasses.MISSING or default is inspect.Parameter.empty or default == "???"
    return f"`{key}`", kind, "required" if missing else _code(_plain(default)), _cell(meaning)


def _plain(value: Any) -> str:
    """Return a value as one types it on the command line; paths inside the project are relative to it."""
    if isinstance(value, str):
        value = value.replace(f"{REPOSITORY}/", "")
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    if value is None or isinstance(value, bool):
        shown = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, float):
        short = f"{value:g}"
        shown = short if float(short) == value else repr(value)
    elif isinstance(value, list | tuple):
        shown = "[" + ",".join(_plain(item) for item in value) + "]"
    elif isinstance(value, Mapping):
        shown = "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    elif dataclasses.is_dataclass(value):
        shown = "{" + ", ".join(f"{f.name}: {_plain(getattr(value, f.name))}" for f in dataclasses.fields(value)) + "}"
    else:
        # A folder of the checkout is shown relative to it, so that the page is the same on every machine.
        shown = str(value).removeprefix(f"{REPOSITORY}/") or '""'
    return shown if len(shown) <= LONGEST_VALUE else f"{shown[: LONGEST_VALUE - 3]}..."


def _code(text: str) -> str:
    return f"`{text.replace('|', chr(92) + '|')}`" if text else ""


def _cell(text: str) -> str:
    return " ".join(text.replace("``", "`").replace("|", r"\|").split())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


@dataclasses.dataclass(kw_only=True)
class ReferenceConfig:
    """What to do. check: write nothing, and exit with status 1 if the page is out of date."""

    check: bool = False


ConfigStore.instance().store(name="reference_schema", node=ReferenceConfig)


def write_reference(cfg: DictConfig) -> int:
    """Write the page and what ``rap`` completes, or check that both are up to date; return the exit status."""
    made = {PAGE: page(), KEYS: json.dumps(completions(), indent=1) + "\n"}
    status = 0
    for path, text in made.items():
        if not cfg.check:
            write_text(path, text)
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            print(f"error: {path} is out of date; run `make reference` and commit it", file=sys.stderr)
            status = 1
    return status


def main() -> None:
    """Run the command."""
    run_command(write_reference, "reference")


if __name__ == "__main__":
    main()
