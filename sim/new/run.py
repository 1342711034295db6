"""``python -m sim.new policy NAME``: write the two files of a policy of one's own."""

from __future__ import annotations

import importlib.util
import keyword
import shlex
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path

import jinja2
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from sim.config import option_names, run_command
from sim.errors import ConfigError, nearest

TEMPLATES = Path(__file__).parent / "templates"
FILES = {"policy": {"policy.py.j2": "{name}.py", "policy.yaml.j2": "policy/{name}.yaml"}}
"""What can be begun -> template -> the file that it becomes."""


TEMPLATE_NAMES = ("Plan", "EngineState", "ConfigError", "PolicyContext")
"""What the templates import."""


@dataclass(kw_only=True)
class NewConfig:
    """What to begin, and where.

    what: what it is, and its name: policy NAME.
    folder: where the files go, which is what ``--config-dir`` then takes.
    """

    what: list[str] = field(default_factory=list)
    folder: str = "."


ConfigStore.instance().store(name="new_schema", node=NewConfig)


def write_files(kind: str, name: str, folder: Path) -> list[Path]:
    """Write the files of a new thing and return their paths.

    Args:
        kind: a key of ``FILES``. name: of the option and of its Python file.
    Raises:
        ConfigError: for a name that cannot be one or is taken, or a file that exists.
    """
    if kind not in FILES:
        raise ConfigError(f"{kind!r} cannot be begun; {nearest(kind, FILES)}")
    if not (name.isidentifier() and name.isascii() and name == name.lower()) or keyword.iskeyword(name):
        raise ConfigError(f"{name!r} cannot be the name; use small letters, digits and _, such as my_policy")
    class_name = "".join(part.capitalize() for part in name.split("_"))
    if yaml.safe_load(name) != name or not class_name.isidentifier() or keyword.iskeyword(class_name):
        raise ConfigError(f"{name!r} cannot be the name: it means something else in YAML or Python; choose another one")
    if class_name in TEMPLATE_NAMES:
        raise ConfigError(f"{name!r} cannot be the name: the file uses {class_name} already; choose another one")
    if name in option_names(kind):
        raise ConfigError(f"there is a {kind}={name} already; choose another name")
    if importlib.util.find_spec(name) and not PathFinder.find_spec(name, [str(folder)]):
        raise ConfigError(f"Python has a module {name} already, which would be imported instead; choose another name")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    texts = {
        folder / path.format(name=name): environment.get_template(template).render(name=name, class_name=class_name)
        for template, path in FILES[kind].items()
    }
    if there := [str(path) for path in texts if path.exists()]:
        raise ConfigError(f"{', '.join(there)} exists already; choose another name or folder=")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(texts)


def main() -> None:
    """Run the command."""
    run_command(_new, "new", positional="what")


def _new(cfg: DictConfig) -> None:
    if len(cfg.what) != 2:
        raise ConfigError("say what to begin and its name: python -m sim.new policy my_policy")
    kind, name = cfg.what
    for path in write_files(kind, name, Path(cfg.folder)):
        print(f"wrote {path}")
    options = f"--config-dir {shlex.quote(cfg.folder)} {kind}={name}"
    print(f"run it:\n  python -m sim.replay {options}\n  python -m hw.replay {options}   # on the real model")
