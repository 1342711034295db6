"""``python -m tests.bench.walk``: a new user's first hour from a bare machine, with the seconds of every step.

It clones the repository into a folder of its own, runs the commands of the documentation there one after another, in
the environment that they install, and writes docs/results/walk/index.md, with pictures of what two steps showed (the
report as Chromium shows it). A step that fails ends it.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sim.pages.render import table
from sim.paths import REPOSITORY
from sim.results.run_folder import provenance, write_text
from tests.sim.report.browser import find_browser, open_browser

SIMULATED = (
    "python -m sim.replay trace=small model=smollm2_135m gpu=cpu_epyc_1thread engine=small budget=small "
    "workspace_bytes=1e8 iterations=true hydra.run.dir=runs/simulated"
)
PAGE = REPOSITORY / "docs" / "results" / "walk" / "index.md"
STEPS = (
    ("see what it does", "make demo"),
    ("replay a trace", "python -m sim.replay policy=rap_80 hydra.run.dir=runs/one"),
    ("begin a policy of your own", "python -m sim.new policy my_policy folder=mine"),
    ("compare it", "python -m sim.compare --config-dir mine '+policies.mine={policy: my_policy}' 'only=[dense,mine]'"),
    (
        "sweep, and get one table",
        "python -m sim.replay --multirun policy=dense,rap_80 seed=0,1 hydra.sweep.dir=runs/s",
    ),
    ("install the rest: torch, RLlib, tests", "make .venv/.dev"),
    ("look at a run", "python -m sim.report runs/one"),
    ("train a policy for a minute", "python -m agents.train experiment=ppo_prune minutes=1"),
    ("export it", "python -m agents.export run=runs/train/ppo_prune/seed_0 name=my_network out=mine"),
    ("serve with a real model", "python -m hw.replay hydra.run.dir=runs/real"),
    ("simulate the same", SIMULATED),
    ("see how far the simulation was", "python -m hw.compare runs/simulated runs/real"),
)
"""What a user wants, and the command; ``python`` is that of the environment."""


JUDGES = "hw.compare"
"""Its exit status is 1 if a verdict does not hold, as on a machine that others use."""


def walk(folder: Path) -> list[dict[str, str]]:
    """Run every step in a clone in a folder; return a row for each.

    Raises:
        SystemExit: if a step fails.
    """
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(folder)], check=True)
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | {"RAP_LAB_PROGRESS": "0"}
    rows = []
    for what, command in STEPS:
        started_s = time.monotonic()
        words = shlex.split(command.replace("python ", ".venv/bin/python ", 1))
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - started_s
        print(f"{seconds:7.1f} s  {command}", flush=True)
        if done.returncode not in ((0, 1) if JUDGES in words else (0,)):
            raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        rows.append({"you want to": what, "command": f"`{command}`", "seconds": f"{seconds:.0f}"})
    return rows


def take_pictures(folder: Path, into: Path) -> None:
    """Copy the figure of the comparison, and take a picture of the report as a browser shows it."""
    into.mkdir(parents=True, exist_ok=True)
    shutil.copy(next(folder.glob("runs/**/compare.png")), into / "compare.png")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, open_browser(Path(profile)) as page:
        page.open((folder / "runs/one/report.html").as_uri(), "document.body && document.body.dataset.drawn")
        (into / "report.png").write_bytes(page.screenshot())


def main() -> None:
    """Walk, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write (docs/results/walk/index.md)")
    page = parser.parse_args().page
    if find_browser() is None:
        raise SystemExit("the picture of the report needs Chromium; install the package chromium")
    with tempfile.TemporaryDirectory() as place:
        rows = walk(folder := Path(place) / "rap-lab")
        take_pictures(folder, page.parent)
    made = provenance(0)
    total = sum(int(row["seconds"]) for row in rows)
    text = f"""# A walk from a bare machine

`python -m tests.bench.walk` writes this page: a new user's commands in a fresh clone, in an environment that they
install themselves. {made["written_at"][:10]}, commit `{made["commit"][:12]}`, Python {platform.python_version()},
{made["machine"]}, packages from a mirror in the same network; {total} s in all.

{table(rows, {}, left=2)}

The first step installs the core and compiles the simulator.

What `python -m sim.report runs/one` shows in a browser:

![The report of a run](report.png)

What the comparison draws:

![A policy of one's own next to the dense model](compare.png)
"""
    write_text(page, text)
    print(page)


if __name__ == "__main__":
    sys.exit(main())
