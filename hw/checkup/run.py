"""``python -m hw.checkup``: runs everything that counts on this device, each step within a limit; writes JSON and PNG.

Each step is a process of its own. One that fails, hangs or crashes does not stop the next, and takes none of its time.
The JSON is complete after every step, so a check-up that is stopped keeps what it has found.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from hw.checkup import machine
from hw.checkup.child import SETUP, run_child, tail
from hw.checkup.figure import plot
from hw.checkup.findings import hide, without_paths
from hw.checkup.schedule import STEPS, TOTAL_S, Step, limit_s
from hw.checkup.setup import SIZES, Setup
from sim.config import build, option_names, run_command
from sim.errors import ConfigError, nearest
from sim.json_file import read_json_object
from sim.paths import CHECKOUT, REPOSITORY, RESULTS, data_dir
from sim.progress import say
from sim.results.run_folder import commit, own_folder, provenance, write_json

SCHEMA = 1
LEAST_STEP_S = 3.0
"""A step with less time than that is not started."""
SAY_EVERY_S = 10.0
OUTPUT_CHARACTERS = 6_000
PROBE_S = 120.0


@dataclass(kw_only=True)
class CheckupHardware:
    """Keys of ``hw.replay`` that every step takes.

    checkpoint: as there; null takes random:0 on a GPU, and the model's own on a CPU. threads: of PyTorch on a CPU.
    attention: auto, flashinfer, flash_attn, triton or sdpa. cuda_graphs: record decode passes that recur on a GPU.
    """

    checkpoint: str | None = None
    threads: int = 1
    attention: str = "auto"
    cuda_graphs: bool = True


@dataclass(kw_only=True)
class CheckupConfig:
    """What to check.

    device: cpu, cuda, cuda:N or auto. model, gpu: null takes llama2_7b and the option that fits the device's name on a
        GPU, smollm2_135m and cpu_epyc_1thread on a CPU.
    steps: by name, in the order of the check-up; all when empty. seconds: for all of them.
    size: gpu, cpu or short; null takes that of the device.
    out: a folder for checkup.json and checkup.png; null takes docs/results/gpu/DEVICE of a checkout, else
        ./checkup/DEVICE. work: a folder for the files of each step; null takes a new one under runs/.
    commit: of the code, for a copy of it that is not a checkout; null finds it.
    """

    model: Any = None
    gpu: Any = None
    device: str = "auto"
    hw: CheckupHardware = field(default_factory=CheckupHardware)
    steps: list[str] = field(default_factory=list)
    seconds: float = TOTAL_S
    size: str | None = None
    out: str | None = None
    work: str | None = None
    commit: str | None = None
    seed: int = 0


ConfigStore.instance().store(name="checkup_schema", node=CheckupConfig)


def main() -> None:
    """Run the command."""
    run_command(checkup, "checkup")


def checkup(cfg: DictConfig) -> int:
    """Run the steps, write the files; return 0 if no step failed, else 1."""
    started_s = time.monotonic()
    steps = chosen(list(cfg.steps))
    if not cfg.seconds > 0:
        raise ConfigError(f"seconds is {cfg.seconds}; it must be above 0")
    if cfg.size is not None and cfg.size not in SIZES:
        raise ConfigError(f"unknown size {cfg.size!r}; {nearest(cfg.size, SIZES)}")
    for described in (cfg.model, cfg.gpu):
        if described is not None:
            build(described)  # a mistake is an error now, and not in every step
    if cfg.gpu is not None:
        from hw.engine.hw_engine import check_gpu  # imported late: torch is what the steps import

        check_gpu(build(cfg.gpu))
    found = probe(str(cfg.device))
    setup = setup_of(cfg, found)
    work, out = Path(setup.work), Path(setup.out)
    hide(OUT=setup.out, WORK=setup.work, DATA=str(data_dir()))
    setup.write(work / SETUP)
    content = begun(cfg, setup, found, steps)
    path = out / "checkup.json"
    write_json(path, content)
    say(f"check-up of {found['name']}: {len(steps)} steps in at most {cfg.seconds:.0f} s; results: {path}")
    try:
        run_steps(steps, work, content, started_s, float(cfg.seconds), lambda: write_json(path, content))
    finally:
        content["seconds"] = round(time.monotonic() - started_s, 1)
        content["passed"] = all(row["status"] in ("passed", "skipped") for row in content["steps"])
        write_json(path, content)
    plot(out / "checkup.png", content)
    show(content, Console(width=None if sys.stdout.isatty() else 130))
    print(f"files: {path}, {out / 'checkup.png'}; output of each step: {work}")
    return 0 if content["passed"] else 1


def chosen(names: Sequence[str]) -> list[Step]:
    """Return the steps with these names, in their order; all for none.

    Raises:
        ConfigError: for an unknown name.
    """
    known = [step.name for step in STEPS]
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no step {name!r}; {nearest(str(name), known)}")
    return [step for step in STEPS if not names or step.name in names]


def probe(device: str) -> dict[str, Any]:
    """Return what torch says of the device, found by a process of its own.

    Raises:
        ConfigError: if torch cannot use it, with the last line of the error.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ConfigError(f"unknown device {device!r}; {nearest(device, ('auto', 'cpu', 'cuda', 'cuda:0'))}")
    command = [sys.executable, "-m", "hw.checkup.machine"]
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(device),
            capture_output=True,
            text=True,
            timeout=PROBE_S,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"torch did not find device={device} within {PROBE_S:.0f} s; is the driver in order?"
        ) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise ConfigError(f"torch cannot use device={device}: {without_paths(lines[-1])}; set device=cpu, or mend that")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def setup_of(cfg: DictConfig, found: Mapping[str, Any]) -> Setup:
    """Return what the steps work with: choices of the user, and for the rest those that fit the device."""
    place = str(found["place"])
    on_gpu = place.startswith("cuda")
    typed = [text for text in HydraConfig.get().overrides.task if _is_passed_on(text)]
    keys = {text.lstrip("+").partition("=")[0] for text in typed}
    overrides = list(typed)
    if "gpu" not in keys:
        overrides.insert(0, f"gpu={gpu_option(str(found['name'])) if on_gpu else 'cpu_epyc_1thread'}")
    if "model" not in keys:
        overrides.insert(0, f"model={'llama2_7b' if on_gpu else 'smollm2_135m'}")
    checkpoint = cfg.hw.checkpoint or ("random:0" if on_gpu else "")
    overrides = [text for text in overrides if not text.startswith("hw.checkpoint=")]
    if checkpoint:
        overrides.append(f"hw.checkpoint={checkpoint}")
    name = slug(str(found["name"])) if on_gpu else "cpu"
    results = RESULTS / "gpu" if CHECKOUT else Path("checkup")
    return Setup(
        device=place,
        size=cfg.size or ("gpu" if on_gpu else "cpu"),
        checkpoint=checkpoint,
        overrides=tuple(overrides),
        work=str(Path(cfg.work or own_folder("checkup")).absolute()),
        out=str(Path(cfg.out or results / name).absolute()),
        seed=int(cfg.seed),
    )


def _is_passed_on(override: str) -> bool:
    """Return whether an override is of the model, the GPU or the hardware, which every command takes."""
    return override.lstrip("+~").partition("=")[0].split(".")[0] in ("model", "gpu", "hw")


def gpu_option(name: str) -> str:
    """Return the option of conf/gpu that fits a device's name, such as h100_80gb for NVIDIA H100 80GB HBM3.

    Raises:
        ConfigError: if none fits.
    """
    plain, known = _letters(name), option_names("gpu")
    fitting = [one for one in known if _letters(re.sub(r"_\d+gb$", "", one)) in plain]
    if not fitting:
        raise ConfigError(
            f"no option of conf/gpu fits {name!r}; set gpu= to one of {', '.join(known)}, or add a file of its own"
        )
    return max(fitting, key=len)


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def slug(name: str) -> str:
    """Return a name as that of a folder: nvidia_h100_80gb_hbm3."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def begun(cfg: DictConfig, setup: Setup, found: Mapping[str, Any], steps: Sequence[Step]) -> dict[str, Any]:
    """Return the content of the JSON file before the first step."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": cfg.commit or commit(),
        "command": without_paths(provenance(int(cfg.seed))["command"].replace(".__main__", "")),
        "passed": False,
        "seconds": 0.0,
        "device": dict(found),
        "nvidia_smi": machine.nvidia_smi(),
        "host": machine.host(),
        "versions": machine.versions(),
        "settings": {
            "overrides": [without_paths(text) for text in setup.overrides],
            "size": setup.size,
            "seconds": float(cfg.seconds),
            "seed": setup.seed,
        },
        "steps": begun_rows(steps),
    }


def begun_rows(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Return the rows of steps that have not run."""
    return [{"name": step.name, "about": step.about, "status": "not run"} for step in steps]


def run_steps(
    steps: Sequence[Step],
    work: Path,
    content: dict[str, Any],
    started_s: float,
    total_s: float,
    save: Callable[[], None],
) -> None:
    """Run steps one after another, and save after each; they share the time that is left when the first begins."""
    end_s = started_s + total_s
    total_s = end_s - time.monotonic()
    for index, step in enumerate(steps):
        row = content["steps"][index]
        left_s = end_s - time.monotonic()
        most_s = limit_s(step, steps[index + 1 :], left_s, total_s)
        if most_s < LEAST_STEP_S:
            row |= {"status": "failed", "reason": f"no time was left: {most_s:.0f} s of {total_s:.0f} s"}
            save()
            continue
        row |= {"status": "running", "limit_s": round(most_s, 1)}
        save()
        say(f"{index + 1} of {len(steps)}: {step.name}, at most {most_s:.0f} s: {step.about}")
        begin_s, said_s = time.monotonic(), [0.0]

        def watch(seconds: float, line: str, said_s: list[float] = said_s, name: str = step.name) -> None:
            if seconds - said_s[0] >= SAY_EVERY_S:
                said_s[0] = seconds
                say(f"  {name}, {seconds:.0f} s: {line}")

        row |= {"status": "failed", "reason": "the check-up was stopped"}
        try:
            ended = run_child(step, work, most_s, watch)
            row |= outcome(work, step.name, ended)
        finally:
            row["seconds"] = round(time.monotonic() - begin_s, 1)
            save()
        say(f"  {row['status']} after {row['seconds']:.0f} s" + (f": {row['reason']}" if row["reason"] else ""))


def outcome(work: Path, name: str, ended: str | None) -> dict[str, Any]:
    """Return status, reason, figures, checks and output of a step that has ended.

    ended: why it ended early; None if it came to its end.
    """
    path = work / f"{name}.json"
    found = read_json_object(path, ConfigError, "run the step again") if path.is_file() else {}
    checks, error = found.get("checks", []), found.get("error")
    missed = [one for one in checks if not one["passed"]]
    if error is not None:
        reason = f"{error['type']}: {error['message'].strip().splitlines()[0] if error['message'].strip() else ''}"
    elif ended is not None:
        reason = ended
    else:
        reason = "; ".join(f"{one['name']}: {one['found']}, wanted {one['wanted']}" for one in missed)
    failed = bool(error or ended or missed)
    skipped = found.get("skipped")
    return {
        "status": "failed" if failed else "skipped" if skipped else "passed",
        "reason": reason if failed else skipped or "",
        "figures": found.get("figures", {}),
        "checks": checks,
        "error": error,
        "output": tail(work / f"{name}.txt", OUTPUT_CHARACTERS),
    }


def show(content: Mapping[str, Any], console: Console) -> None:
    """Print the outcome of every step."""
    table = Table(title=f"Check-up of {content['device']['name']}, {content['seconds']:.0f} s")
    table.add_column("step")
    table.add_column("outcome")
    table.add_column("seconds", justify="right")
    table.add_column("checks", justify="right")
    table.add_column("reason")
    for row in content["steps"]:
        checks = row.get("checks", [])
        held = sum(one["passed"] for one in checks)
        table.add_row(
            row["name"],
            row["status"],
            f"{row.get('seconds', 0):.0f}",
            f"{held} of {len(checks)}",
            row.get("reason", ""),
        )
    console.print(table)


if __name__ == "__main__":
    main()
