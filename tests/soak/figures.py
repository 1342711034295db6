"""The saved figures of each part, and when, where and from which commit they were made."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sim.atomic import write_whole
from sim.results.run_folder import commit


def read(path: Path) -> dict[str, Any]:
    """Return saved figures, nothing if there are none."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Save figures: the file is complete, or is the earlier one."""
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def add(path: Path, group: str, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Save what was found of one member of a group, such as one command; return all that is saved."""
    content = {group: {}, **read(path)}
    content[group][name] = {**found, **made_now()}
    content["faults"] = sum(len(one["faults"]) for one in content[group].values())
    save(path, content)
    return content


def made_now() -> dict[str, Any]:
    """Return date, commit and machine."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
    }


def processor() -> str:
    """Return the name of the processor."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return platform.processor()
