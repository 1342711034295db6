"""``python -m hw.checkup.wheels``: fetches what a machine with torch and transformers alone still needs.

The packages are downloaded as wheels for Linux on x86-64, at the versions of constraints.txt. Take the folder along
with the code; no network is needed there (docs/tasks/gpu.md, "On a bare machine").
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from sim.config import run_command
from sim.errors import ConfigError
from sim.paths import REPOSITORY

NEEDED = (
    "simpy",
    "hydra-core",
    "omegaconf",
    "antlr4-python3-runtime",
    "pydantic",
    "starlette",
    "uvicorn",
    "click",
    "httpx-sse",
    "tabulate",
)
"""Packages that the core, the engine and the server import, other than torch, transformers, numpy and pandas."""
WITH_NEEDS = ("pydantic",)
"""Packages whose own needs are fetched too: each pydantic takes exactly one pydantic-core."""
BUILT = {"antlr4-python3-runtime": "4.9.3"}
"""Packages without a wheel, and the version that omegaconf needs. Plain Python: what is built here runs there."""
PLATFORMS = ("manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux_2_28_x86_64")
MOST_BYTES = 10 << 20


@dataclass(kw_only=True)
class WheelsConfig:
    """What to fetch. folder: where the wheels go; those that it holds are removed. python: of the other machine."""

    folder: str = "wheels"
    python: str = "3.12"


ConfigStore.instance().store(name="wheels_schema", node=WheelsConfig)


def main() -> None:
    """Run the command."""
    run_command(wheels, "wheels")


def wheels(cfg: DictConfig) -> None:
    """Fetch the wheels into the folder.

    Raises:
        ConfigError: for a version of Python that is none, if pip fails, or if the wheels take too much.
    """
    if not re.fullmatch(r"3\.\d+", cfg.python):
        raise ConfigError(f"python is {cfg.python!r}; it must be a version such as 3.12")
    folder = Path(cfg.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()  # two versions of one package would stop the installation there
    pins = constraints(REPOSITORY / "constraints.txt") | BUILT
    for name in NEEDED:
        done = subprocess.run(command_for(name, pins, folder, cfg.python), capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ConfigError(f"pip found no wheel of {name} for Python {cfg.python}: {reason}")
    found = sorted(folder.glob("*.whl"))
    size = sum(path.stat().st_size for path in found)
    print(f"{len(found)} wheels, {size / (1 << 20):.1f} MiB: {folder}")
    if size > MOST_BYTES:
        raise ConfigError(f"the wheels take {size:,} bytes, more than {MOST_BYTES:,}; look for what has grown")


def constraints(path: Path) -> dict[str, str]:
    """Return the version of each package that a constraints file pins; nothing if there is no such file."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [re.match(r"([\w.-]+)(?:\[.*\])?==([^\s;#]+)", line) for line in lines]
    return {re.sub(r"[-_.]+", "-", pair[1]).lower(): pair[2] for pair in pairs if pair}


def command_for(name: str, pins: Mapping[str, str], folder: Path, python: str) -> list[str]:
    """Return the command of pip that downloads or builds the wheel of one package."""
    wanted = f"{name}=={pins[name]}" if name in pins else name
    options = ["--quiet", "--disable-pip-version-check", *([] if name in WITH_NEEDS else ["--no-deps"])]
    if name in BUILT:
        return [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), wanted]
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    target += [f"--platform={platform}" for platform in PLATFORMS]
    return [sys.executable, "-m", "pip", "download", *options, *target, "--dest", str(folder), wanted]


if __name__ == "__main__":
    main()
