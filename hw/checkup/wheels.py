"""Fetches what a machine with torch and transformers alone still needs: ``python -m hw.checkup.wheels FOLDER``.

The packages are downloaded as wheels for Linux on x86-64, at the versions of constraints.txt, under 10 MiB in all. Take
the folder along with the code; no network is needed there:

    python3 -m pip install --no-index --no-deps --target SITE FOLDER/*.whl
    PYTHONPATH=SITE python3 -m hw.checkup
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

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
"""What the core, the engine and the server import beside torch, transformers, numpy, pandas and their like."""
WITH_NEEDS = ("pydantic",)
"""Packages whose own needs are fetched too: each pydantic takes exactly one pydantic-core."""
BUILT = {"antlr4-python3-runtime": "4.9.3"}
"""Packages without a wheel, and the version that omegaconf needs. Plain Python: what is built here runs there."""
PLATFORMS = ("manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux_2_28_x86_64")
MOST_BYTES = 10 << 20


def main(arguments: Sequence[str]) -> int:
    """Download the wheels; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hw.checkup.wheels", description="Fetch the missing packages.")
    parser.add_argument("folder", type=Path, help="where the wheels go")
    parser.add_argument("--python", default="3.12", help="Python of the other machine (3.12)")
    chosen = parser.parse_args(arguments)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    for old in chosen.folder.glob("*.whl"):
        old.unlink()  # two versions of one package would stop the installation there
    pins = constraints(REPOSITORY / "constraints.txt") | BUILT
    for name in NEEDED:
        if (status := fetch(name, pins, chosen.folder, chosen.python)) != 0:
            print(f"error: no wheel of {name}; see pip's message above", file=sys.stderr)
            return status
    wheels = sorted(chosen.folder.glob("*.whl"))
    size = sum(path.stat().st_size for path in wheels)
    print(f"{len(wheels)} wheels, {size / (1 << 20):.1f} MiB in {chosen.folder}")
    if size > MOST_BYTES:
        print(f"error: more than {MOST_BYTES >> 20} MiB", file=sys.stderr)
        return 1
    return 0


def constraints(path: Path) -> dict[str, str]:
    """Return the version of each package that a constraints file pins; nothing if there is no such file."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [re.match(r"([\w.-]+)(?:\[.*\])?==([^\s;#]+)", line) for line in lines]
    return {re.sub(r"[-_.]+", "-", pair[1]).lower(): pair[2] for pair in pairs if pair}


def fetch(name: str, pins: Mapping[str, str], folder: Path, python: str) -> int:
    """Download or build the wheel of one package; return pip's exit status."""
    wanted = f"{name}=={pins[name]}" if name in pins else name
    common = [sys.executable, "-m", "pip"]
    options = ["--quiet", "--disable-pip-version-check", *([] if name in WITH_NEEDS else ["--no-deps"])]
    if name in BUILT:
        command = [*common, "wheel", *options, "--wheel-dir", str(folder), wanted]
    else:
        target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
        target += [f"--platform={platform}" for platform in PLATFORMS]
        command = [*common, "download", *options, *target, "--dest", str(folder), wanted]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
